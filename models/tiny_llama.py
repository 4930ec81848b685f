"""A Llama of 2 layers with grouped queries and random weights (2 to 3 MB), for tests.

    python models/tiny_llama.py -o DIR [--tied]

writes model.onnx (input_ids, attention_mask, position_ids, past_key_values.N.key|value -> logits, present.N.key|value),
calib/ and heldout/: feeds of random tokens, the first half with an empty past, the others with a random one.
"""

from __future__ import annotations

import numpy as np
import torch
from _common import arguments, write_feeds
from transformers import LlamaConfig, LlamaForCausalLM

from lrcompile.export import export

VOCABULARY, LAYERS, HEADS, CACHED_HEADS, HEAD_SIZE = 2048, 2, 4, 2, 32


def make(tied: bool = False) -> LlamaForCausalLM:
    """The module, with the same random weights each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=CACHED_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # equal ones would be exported as one constant
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def feeds(count: int, batch: int, length: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    result = []
    for index in range(count):
        past = 0 if index < (count + 1) // 2 else length // 2
        feed = {
            "input_ids": rng.integers(VOCABULARY, size=(batch, length)),
            "attention_mask": np.ones((batch, past + length), np.int64),
            "position_ids": np.tile(np.arange(past, past + length), (batch, 1)),
        }
        for layer in range(LAYERS):
            for part in ("key", "value"):
                cached = rng.standard_normal((batch, CACHED_HEADS, past, HEAD_SIZE)).astype(np.float32)
                feed[f"past_key_values.{layer}.{part}"] = cached
        result.append(feed)
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tied", action="store_true", help="head and embedding table are one weight")
    parser.add_argument("--size", type=int, default=8, metavar="N", help="feeds in calib/; heldout/ has half")
    options = parser.parse_args()
    print(export(make(options.tied), options.output / "model.onnx"))
    for seed, (name, count) in enumerate({"calib": options.size, "heldout": (options.size + 1) // 2}.items()):
        write_feeds(options.output / name, feeds(count, batch=2, length=64, seed=seed))
        print(f"{options.output / name}: {count} feeds")


if __name__ == "__main__":
    main()
