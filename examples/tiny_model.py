"""What the examples work on: a small MLP whose inputs lie near a subspace, as those of trained networks do.

y = Relu((x * scale) W1 + b1) W2, float32, x of 96 numbers; 150 KB in all. Seeded: the same each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, HIDDEN, CLASSES, RANK = 96, 256, 48, 24


def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"scale": (WIDTH,), "W1": (WIDTH, HIDDEN), "b1": (HIDDEN,), "W2": (HIDDEN, CLASSES)}
    weights = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    weights["scale"] = rng.uniform(0.5, 2.0, WIDTH)
    u, _, vt = np.linalg.svd(weights["W2"], full_matrices=False)
    weights["W2"] = (u * np.exp(-np.arange(CLASSES) / 8.0)) @ vt  # the decaying spectrum of a trained weight
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"], name="scale"),
        helper.make_node("MatMul", ["scaled", "W1"], ["wide"], name="up"),
        helper.make_node("Add", ["wide", "b1"], ["moved"], name="bias"),
        helper.make_node("Relu", ["moved"], ["hidden"], name="relu"),
        helper.make_node("MatMul", ["hidden", "W2"], ["y"], name="down"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def feeds(count: int = 16, rows: int = 32) -> list[dict[str, Any]]:
    """Inputs near a subspace of 24 dimensions: what calibration has to find out."""
    rng = np.random.default_rng(1)
    basis = rng.standard_normal((RANK, WIDTH)) / np.sqrt(RANK)
    near = (
        rng.standard_normal((rows, RANK)) @ basis + 0.05 * rng.standard_normal((rows, WIDTH))
        for _ in range(count)
    )
    return [{"x": x.astype(np.float32)} for x in near]


def write(folder: Path) -> Path:
    """``model.onnx`` and ``calib.npz`` in a folder, as an exporter would leave them; gives the model's path."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model(), folder / "model.onnx")
    np.savez(folder / "calib.npz", x=np.concatenate([feed["x"] for feed in feeds()]))
    return folder / "model.onnx"
