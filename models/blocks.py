"""Transformer blocks of any width with random weights and fused attention, to be put on the clock.

    python models/blocks.py -o DIR [--layers 4 --width 4096 --dtype float16]

writes model.onnx (x [batch, sequence, width] -> y, the same shape) and model.onnx.data. A block: LayerNormalization, query, key, value,
MultiHeadAttention (com.microsoft, heads of 128), output projection and residual; LayerNormalization, up (4 x width), Gelu by Erf, down
and residual. Weights of one size have the same random numbers, but copies of their own in the file: what is asked is how long they take.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from _common import arguments
from onnx import TensorProto, helper

HEAD = 128
TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


class Writer:
    """Nodes of a graph, and weights that go straight into the file beside it."""

    def __init__(self, file: Path, dtype: str) -> None:
        self.file, self.dtype = file.open("wb"), dtype
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._known: dict[tuple[int, ...], bytes] = {}

    def op(self, kind: str, *inputs: str, name: str, domain: str = "", **attributes: object) -> str:
        output = f"{name}/out"
        self.nodes.append(helper.make_node(kind, inputs, [output], name, domain=domain, **attributes))
        return output

    def weight(self, name: str, shape: tuple[int, ...], seed: int, scale: float, mean: float = 0.0) -> str:
        key = (*shape, seed)
        if key not in self._known:
            rng = np.random.default_rng(seed)
            self._known[key] = (
                (mean + scale * rng.standard_normal(shape, np.float32)).astype(self.dtype).tobytes()
            )
        tensor = TensorProto(name=name, data_type=TYPES[self.dtype], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        size = len(self._known[key])
        for k, v in (("location", "model.onnx.data"), ("offset", self.file.tell()), ("length", size)):
            tensor.external_data.add(key=k, value=str(v))
        self.file.write(self._known[key])
        self.tensors.append(tensor)
        return name

    def linear(self, x: str, name: str, K: int, N: int, seed: int) -> str:
        w = self.weight(f"{name}/weight", (K, N), seed, 1 / math.sqrt(K))
        b = self.weight(f"{name}/bias", (N,), seed + 100, 0.1)
        return self.op("Add", self.op("MatMul", x, w, name=name), b, name=f"{name}/Add")

    def norm(self, x: str, name: str, width: int, seed: int) -> str:
        scale = self.weight(f"{name}/scale", (width,), seed, 0.1, 1.0)
        shift = self.weight(f"{name}/shift", (width,), seed + 1, 0.1)
        return self.op("LayerNormalization", x, scale, shift, name=name, axis=-1, epsilon=1e-5)

    def gelu(self, x: str, name: str) -> str:
        half, one, root = (self.weight(f"{name}/{n}", (), i, 0.0, v) for i, (n, v) in enumerate(
            (("half", 0.5), ("one", 1.0), ("root", math.sqrt(2))), 900))  # fmt: skip
        erf = self.op("Erf", self.op("Div", x, root, name=f"{name}/Div"), name=f"{name}/Erf")
        gate = self.op("Add", erf, one, name=f"{name}/Add")
        return self.op("Mul", self.op("Mul", x, gate, name=f"{name}/Mul"), half, name=f"{name}/half_of")


def block(to: Writer, x: str, name: str, width: int) -> str:
    h = to.norm(x, f"{name}/norm1", width, 1)
    q, k, v = (
        to.linear(h, f"{name}/{n}", width, width, s) for n, s in (("query", 10), ("key", 10), ("value", 10))
    )
    heads = max(width // HEAD, 1)
    a = to.op(
        "MultiHeadAttention", q, k, v, name=f"{name}/attention", domain="com.microsoft", num_heads=heads
    )
    x = to.op("Add", x, to.linear(a, f"{name}/output", width, width, 10), name=f"{name}/residual1")
    h = to.linear(to.norm(x, f"{name}/norm2", width, 3), f"{name}/up", width, 4 * width, 14)
    y = to.linear(to.gelu(h, f"{name}/gelu"), f"{name}/down", 4 * width, width, 15)
    return to.op("Add", x, y, name=f"{name}/residual2")


def write(folder: Path, layers: int, width: int, dtype: str = "float16") -> Path:
    """All files into a folder; gives the path of the ``.onnx``."""
    folder.mkdir(parents=True, exist_ok=True)
    to = Writer(folder / "model.onnx.data", dtype)
    y = "x"
    for layer in range(layers):
        y = block(to, y, f"layer.{layer}", width)
    to.file.close()
    to.nodes[-1].output[0] = "y"
    x, y = (helper.make_tensor_value_info(n, TYPES[dtype], ["batch", "sequence", width]) for n in "xy")
    graph = helper.make_graph(to.nodes, "blocks", [x], [y], to.tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return folder / "model.onnx"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--width", type=int, default=4096, metavar="N")
    parser.add_argument("--dtype", choices=sorted(TYPES), default="float16")
    options = parser.parse_args()
    path = write(options.output, options.layers, options.width, options.dtype)
    size = path.with_name("model.onnx.data").stat().st_size
    print(f"{path}: {options.layers} blocks of width {options.width}, {size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
