"""A model of any size, made of numbers: a chain of seeded float32 MatMul whose weights lie in one external file.

    python models/generated.py -o DIR [--layers 96 --width 2048]

writes model.onnx (x [batch, width] -> y [batch, width]), model.onnx.data (1.6 GB by default: layers x width x width x 4
bytes), calib.npz and heldout.npz (seeded rows of x). One weight at a time is in memory. After every MatMul stands a Tanh
and the sum with what went in, so that numbers neither vanish nor grow; singular values fall like those of trained layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from _common import arguments
from onnx import TensorProto, helper

ROWS = 64  # of calib.npz and heldout.npz


def weight(width: int, layer: int, seed: int = 0) -> np.ndarray:
    """Layer's weight, (width, width) float32: noise times a falling scale of its columns, mixed by a reflection.

    A diagonal gives the spectrum and a Householder reflection turns it, so that it costs no matrix product.
    """
    rng = np.random.default_rng((seed, layer))
    made = rng.standard_normal((width, width), dtype=np.float32)
    made *= (np.arange(1, width + 1, dtype=np.float32) ** -0.5) * np.float32(2.0)
    v = rng.standard_normal(width).astype(np.float32)
    v /= np.linalg.norm(v)
    made -= np.outer(made @ v, 2 * v)
    made /= np.float32(np.sqrt(width))
    return made


def graph(layers: int, width: int) -> onnx.ModelProto:
    """The model without weights: each refers to its place in ``model.onnx.data``."""
    nodes, weights, size = [], [], 4 * width * width
    for i in range(layers):
        tensor = TensorProto(name=f"layer.{i}.weight", data_type=TensorProto.FLOAT, dims=(width, width))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "model.onnx.data"), ("offset", i * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
        x, y = ("x" if i == 0 else f"h{i}"), ("y" if i == layers - 1 else f"h{i + 1}")
        nodes.append(helper.make_node("MatMul", [x, tensor.name], [f"m{i}"], f"layer.{i}/MatMul"))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"], f"layer.{i}/Tanh"))
        nodes.append(helper.make_node("Add", [x, f"t{i}"], [y], f"layer.{i}/Add"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in "xy"]
    body = helper.make_graph(nodes, "generated", ends[:1], ends[1:], weights)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write(folder: Path, layers: int, width: int, seed: int = 0) -> Path:
    """All files into a folder; gives the path of the ``.onnx``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.onnx.data").open("wb") as file:
        for layer in range(layers):
            file.write(weight(width, layer, seed).data)
    (folder / "model.onnx").write_bytes(graph(layers, width).SerializeToString(deterministic=True))
    for number, name in enumerate(("calib", "heldout")):
        rows = np.random.default_rng((seed, 10**6 + number)).standard_normal((ROWS, width))
        np.savez(folder / f"{name}.npz", x=rows.astype(np.float32))
    return folder / "model.onnx"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=96, metavar="N", help="MatMul in a row")
    parser.add_argument(
        "--width", type=int, default=2048, metavar="N", help="rows and columns of each weight"
    )
    options = parser.parse_args()
    path = write(options.output, options.layers, options.width)
    size = path.with_name("model.onnx.data").stat().st_size
    print(f"{path}: {options.layers} MatMul {options.width}x{options.width}, {size / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
