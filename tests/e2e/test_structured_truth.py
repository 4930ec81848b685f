"""A model whose weights are block tensor trains and 1 % noise: the search must find the family, and beat a low rank at as many parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import lrcompile
from lrcompile.cores import product
from lrcompile.interfaces import Array
from lrcompile.networks import NetworkFactorization
from lrcompile.registry import factorization
from tests.graphs import model, node

D, LAYERS, RANK = 64, 2, 2
STRUCTURE = (("k", "4x16"), ("n", "16x4"))


def weight(seed: int) -> Array:
    family = factorization("btt")
    assert isinstance(family, NetworkFactorization)
    network = family.family.network(D, D, STRUCTURE, RANK)
    rng = np.random.default_rng(seed)
    W = product(network, [rng.standard_normal(network.shape(axes)) for axes in network.cores])
    W += 0.01 * np.sqrt(np.mean(W**2)) * rng.standard_normal(W.shape)
    return (W / np.linalg.norm(W, 2)).astype(np.float32)


def network_of_trains() -> ir.Model:
    constants = {f"w{i}": weight(i) for i in range(LAYERS)}
    made, x = [], "x"
    for i in range(LAYERS):
        last = i == LAYERS - 1
        made.append(node("MatMul", [x, f"w{i}"], ["y" if last else f"h{i}"], name=f"layer{i}"))
        if not last:
            made.append(node("Tanh", [f"h{i}"], [x := f"t{i}"], name=f"tanh{i}"))
    return model(made, {"x": (("n", D), np.float32)}, {"y": np.float32}, constants)


def test_auto_finds_the_family_and_beats_a_low_rank(tmp_path: Path) -> None:
    # not white: what is seen has a second moment of its own
    shape = np.random.default_rng(7).standard_normal((D, D)) * np.geomspace(2, 0.1, D)
    data = [
        {"x": (np.random.default_rng(i).standard_normal((64, D)) @ shape).astype(np.float32)}
        for i in range(8)
    ]
    kept = 1.02 * 8 * RANK * D / D**2  # what the cores of one train take of its weight
    errors = {}
    for methods in (("auto",), ("svd",)):
        options = lrcompile.Options(
            budget=lrcompile.Budget(keep=kept),
            data=data,
            methods=methods,
            cache=tmp_path / "cache",
            timeout=300,
        )
        out = tmp_path / methods[0]
        result = lrcompile.compile(network_of_trains(), out, options)
        assert result.evidence.verdict == "passed"
        errors[methods[0]] = max(figures.relative_l2 for _, figures in result.evidence.outputs)
        if methods == ("auto",):
            assert {d.method for d in result.plan.rewritten} == {"btt"}
            assert {d.structure for d in result.plan.rewritten} == {STRUCTURE}
            published = onnx.load(out / "model.onnx")
            assert {n.op_type for n in published.graph.node} <= {
                *("MatMul", "Reshape", "Transpose", "Shape", "Slice", "Concat", "Constant", "Tanh"),
            }  # fmt: skip
    assert errors["auto"] < 0.1 * errors["svd"]
