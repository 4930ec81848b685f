"""A vision-language model in one graph, with random weights (about 3 MB), for tests.

    python models/tiny_vlm.py -o DIR

Vision tower (patch Conv, 2 blocks) -> projector -> decoder (2 blocks) that reads image tokens, then text.
writes model.onnx (pixel_values, input_ids, attention_mask -> logits of the text positions), calib.npz and heldout.npz.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _common import arguments, smooth_images
from torch import nn
from torch.nn import functional

from lrcompile.export import export

IMAGE, PATCH, VISION, TEXT, VOCABULARY, POSITIONS = 32, 8, 96, 128, 1024, 128
PATCHES = (IMAGE // PATCH) ** 2


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class VisionTower(nn.Module):
    """pixel_values (batch, 3, 32, 32) -> (batch, 16, VISION)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, VISION, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn(1, PATCHES, VISION) * 0.02)
        self.blocks = nn.ModuleList(Block(VISION, heads=4) for _ in range(2))
        self.norm = nn.LayerNorm(VISION)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TinyVLM(nn.Module):
    """The image comes first and is seen by every text position; text is causal and may be padded."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = VisionTower()
        self.projector = nn.Sequential(nn.Linear(VISION, TEXT), nn.GELU(), nn.Linear(TEXT, TEXT))
        self.tokens = nn.Embedding(VOCABULARY, TEXT)
        self.positions = nn.Embedding(POSITIONS, TEXT)
        self.blocks = nn.ModuleList(Block(TEXT, heads=4) for _ in range(2))
        self.norm = nn.LayerNorm(TEXT)
        self.head = nn.Linear(TEXT, VOCABULARY, bias=False)

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        image = self.projector(self.vision(pixel_values))
        x = torch.cat([image, self.tokens(input_ids)], dim=1)
        place = torch.arange(x.shape[1], device=x.device)
        seen = functional.pad(attention_mask, (PATCHES, 0), value=1).bool()
        mask = (place[:, None] >= place) & seen[:, None, None, :]
        x = x + self.positions(place)
        for block in self.blocks:
            x = block(x, mask)
        return {"logits": self.head(self.norm(x[:, PATCHES:]))}


def make() -> tuple[TinyVLM, dict[str, torch.Tensor], dict[str, Any]]:
    """The module with the same random weights each time, example inputs and dynamic axes."""
    torch.manual_seed(0)
    model = TinyVLM().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # equal norms and biases would be exported as one constant
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
    inputs = {
        "pixel_values": torch.zeros(2, 3, IMAGE, IMAGE),
        "input_ids": torch.ones(2, 5, dtype=torch.int64),
        "attention_mask": torch.ones(2, 5, dtype=torch.int64),
    }
    text = {0: "batch", 1: "sequence"}
    return model, inputs, {"pixel_values": {0: "batch"}, "input_ids": text, "attention_mask": text}


def data(count: int, length: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, size=(count, 1))
    return {
        "pixel_values": smooth_images(count, IMAGE, seed).transpose(0, 3, 1, 2) / 127.5 - 1,
        "input_ids": rng.integers(VOCABULARY, size=(count, length)),
        "attention_mask": (np.arange(length) < lengths).astype(np.int64),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--size", type=int, default=64, metavar="N", help="rows of calib.npz; heldout has half"
    )
    options = parser.parse_args()
    module, inputs, axes = make()
    print(export(module, options.output / "model.onnx", inputs=inputs, axes=axes))
    for seed, (name, count) in enumerate({"calib": options.size, "heldout": (options.size + 1) // 2}.items()):
        np.savez(options.output / f"{name}.npz", **data(count, 24, seed))
        print(f"{options.output / name}.npz: {count} rows")


if __name__ == "__main__":
    main()
