"""Rewrite: calls of model-local functions by type and by identity, names, what is dropped and what stays, the oracle and the jitter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.lower import lower
from lrcompile.oracle import jittered, reconstructed
from lrcompile.plan import choose, prepare
from lrcompile.records import Budget
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal, run, weights

PLAIN = factorization("svd-plain")
K, N = 6, 4
# float32 products of a dozen numbers of size one, twice
ROUNDING = 2e-5


def sets_of(made: ir.Model, folder: Path, rank: Any = "full") -> tuple[FactorSet, ...]:
    finding, held = find(made), ModelWeights(Cache(folder), 18)
    plan = choose(prepare(finding, held, None, (PLAIN,), Budget(rank=rank), target="t"))
    return factorize(plan, {g.name: g for g in finding.groups}, held, None, {"svd-plain": PLAIN}, 0)


def ops(graph: ir.Graph | ir.Function) -> list[str]:
    return [n.op_type for n in graph]


def legal(made: ir.Model) -> None:
    onnx.checker.check_model(
        onnx.shape_inference.infer_shapes(ir.to_proto(made), check_type=True, strict_mode=True)
    )


def network(**options: Any) -> ir.Model:
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="/layers.0/MatMul"),
        node("Add", ["p", "b"], ["a"]),
        node("Relu", ["a"], ["y"], name="act"),
    ]
    return model(nodes, {"x": ("n", K)}, ["y"], {"w": normal(K, N), "b": normal(N)}, **options)


def test_the_neutral_form(tmp_path: Path) -> None:
    made = network()
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    (factors,) = sets_of(made, tmp_path)
    neutral = rewrite(made, [factors])
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before
    assert ops(neutral.graph) == ["/layers.0/MatMul/svd-plain", "Add", "Relu"]
    call, add, _ = neutral.graph
    assert call.domain == "lrcompile" and neutral.opset_imports["lrcompile"] == 1
    assert list(call.inputs) == [
        neutral.graph.inputs[0],
        *(neutral.graph.initializers[f"/layers.0/MatMul/svd-plain/{n}"] for n in "ab"),
    ]
    assert add.inputs[0] is call.outputs[0] and call.outputs[0].name == "p"
    assert set(neutral.graph.initializers) == {
        "b",
        "/layers.0/MatMul/svd-plain/a",
        "/layers.0/MatMul/svd-plain/b",
    }
    (function,) = neutral.functions.values()
    assert ops(function) == ["MatMul", "MatMul"] and len(function.inputs) == 3
    first, second = function
    assert first.inputs[0] is function.inputs[0] and second.inputs[0] is first.outputs[0]
    assert [function.inputs[1], function.inputs[2]] == [first.inputs[1], second.inputs[1]]
    for made_node in (call, *function):
        assert made_node.metadata_props["lrcompile.method"] == "svd-plain"
        assert made_node.metadata_props["lrcompile.weight"] == "w"
        assert made_node.metadata_props["lrcompile.group"] == "/layers.0/MatMul"


def test_lowered_it_is_plain_onnx(tmp_path: Path) -> None:
    made = network()
    lowered = lower(rewrite(made, sets_of(made, tmp_path)), ())
    assert ops(lowered.graph) == ["MatMul", "MatMul", "Add", "Relu"]
    assert not lowered.functions and "lrcompile" not in lowered.opset_imports
    first, second, add, _ = lowered.graph
    assert (
        first.inputs[0] is lowered.graph.inputs[0]
        and second.inputs[0] is first.outputs[0]
        and add.inputs[0] is second.outputs[0]
    )
    names = [n.name for n in lowered.graph]
    assert len(set(names)) == 4 and names[0] is not None and names[0].startswith("/layers.0/MatMul/svd-plain")
    legal(lowered)
    feed = {"x": normal(5, K, seed=3)}
    np.testing.assert_allclose(run(lowered, feed)["y"], run(made, feed)["y"], atol=ROUNDING, rtol=0)


def test_names_that_are_taken(tmp_path: Path) -> None:
    """The file already has what we would call ours: nobody's name is changed, and nothing is overwritten."""
    taken = "/layers.0/MatMul/svd-plain"
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="/layers.0/MatMul"),
        node("Add", ["p", f"{taken}/a"], [taken], name=f"{taken}_1"),
    ]
    nodes.append(node("Identity", [taken], ["y"], name=taken))
    made = model(nodes, {"x": ("n", K)}, ["y"], {"w": normal(K, N), f"{taken}/a": normal(N)})
    lowered = lower(rewrite(made, sets_of(made, tmp_path)), ())
    np.testing.assert_array_equal(lowered.graph.initializers[f"{taken}/a"].const_value.numpy(), normal(N))
    names = [n.name for n in lowered.graph]
    assert len(set(names)) == len(names) and taken in names
    feed = {"x": normal(5, K, seed=3)}
    np.testing.assert_allclose(run(lowered, feed)["y"], run(made, feed)["y"], atol=ROUNDING, rtol=0)


def tied() -> ir.Model:
    nodes = [
        node("Gather", ["w", "ids"], ["e"], name="table"),
        node("Transpose", ["w"], ["t"], name="turn"),
        node("MatMul", ["e", "t"], ["y"], name="head"),
    ]
    return model(nodes, {"ids": (("n",), np.int64)}, ["y"], {"w": normal(K, N)})


def test_readers_of_one_weight_share_its_factors(tmp_path: Path) -> None:
    made = tied()
    neutral = rewrite(made, sets_of(made, tmp_path))
    assert len(neutral.functions) == 2 and set(neutral.graph.initializers) == {
        "table/svd-plain/a",
        "table/svd-plain/b",
    }
    table, head = neutral.graph  # the Transpose went with the weight
    assert table.inputs[1] is head.inputs[1] and table.inputs[2] is head.inputs[2]
    assert [ops(f) for f in neutral.functions.values()] == [
        ["Gather", "MatMul"],
        ["Transpose", "Transpose", "MatMul", "MatMul"],
    ]
    feed = {"ids": np.array([1, -1, 0])}
    np.testing.assert_allclose(
        run(lower(neutral, ()), feed)["y"], run(made, feed)["y"], atol=ROUNDING, rtol=0
    )


@pytest.mark.parametrize("reader", ["weight", "transposed"])
def test_what_somebody_else_reads_stays(reader: str, tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["w"], ["t"], name="turn"),
        node("MatMul", ["x", "t"], ["p"], name="layer"),
        node("Abs", ["w" if reader == "weight" else "t"], ["z"], name="other"),
        node("Identity", ["p"], ["y"]),
    ]
    made = model(nodes, {"x": ("n", K)}, ["y", "z"], {"w": normal(N, K)})
    neutral = rewrite(made, sets_of(made, tmp_path))
    assert "w" in neutral.graph.initializers
    assert ("Transpose" in ops(neutral.graph)) == (reader == "transposed")
    np.testing.assert_array_equal(
        run(lower(neutral, ()), {"x": normal(2, K)})["z"], run(made, {"x": normal(2, K)})["z"]
    )


def test_ir_3_keeps_its_rule(tmp_path: Path) -> None:
    """Every initializer is an input there: factors join them, the weight's goes."""
    made = network(ir_version=3, opset=8)
    lowered = lower(rewrite(made, sets_of(made, tmp_path)), ())
    inputs = [v.name for v in lowered.graph.inputs]
    assert lowered.ir_version == 3 and inputs[0] == "x" and "w" not in inputs
    assert set(inputs) - {"x"} == set(lowered.graph.initializers)
    legal(lowered)
    made = network(ir_version=4, opset=9)
    lowered = lower(rewrite(made, sets_of(made, tmp_path)), ())
    assert [v.name for v in lowered.graph.inputs] == ["x"]


def test_a_site_in_a_body(tmp_path: Path) -> None:
    """The call stands in the branch, its factors in the main graph, the dropped weight was the branch's."""
    tensor = onnx.numpy_helper.from_array(normal(K, N), "w")
    bodies = {}
    for name in ("then", "else"):
        op = (
            node("MatMul", ["x", "w"], [f"{name}_y"], name=name)
            if name == "then"
            else node("ReduceMax", ["x"], [f"{name}_y"], keepdims=1)
        )
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        bodies[f"{name}_branch"] = helper.make_graph(
            [op], name, [], [output], [tensor] if name == "then" else []
        )
    made = model([node("If", ["c"], ["y"], name="if", **bodies)], {"x": ("n", K), "c": ((), np.bool_)}, ["y"])
    neutral = rewrite(made, sets_of(made, tmp_path))
    body = next(iter(neutral.graph)).attributes["then_branch"].as_graph()
    assert not body.initializers and set(neutral.graph.initializers) == {
        "then/svd-plain/a",
        "then/svd-plain/b",
    }
    assert [n.domain for n in body] == ["lrcompile"]
    lowered = lower(neutral, ())
    for flag in (True, False):
        feed = {"x": normal(3, K), "c": np.asarray(flag)}
        np.testing.assert_allclose(run(lowered, feed)["y"], run(made, feed)["y"], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("stored", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_factors_stored_in_another_type_than_computed(stored: Any, tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
        node("MatMul", ["x", "c"], ["y"], name="layer"),
    ]
    made = model(nodes, {"x": ("n", K)}, ["y"], {"w": normal(K, N).astype(stored)})
    sets = sets_of(made, tmp_path)
    lowered = lower(rewrite(made, sets), ())
    assert {v.dtype for v in lowered.graph.initializers.values()} == {
        ir.DataType.from_numpy(np.dtype(stored))
    }
    assert sorted(ops(lowered.graph)) == ["Cast", "Cast", "MatMul", "MatMul"]
    feed = {"x": normal(5, K)}
    oracle = reconstructed(made, sets)
    np.testing.assert_allclose(run(lowered, feed)["y"], run(oracle, feed)["y"], atol=ROUNDING, rtol=0)


def test_the_oracle_is_the_original_with_other_numbers(tmp_path: Path) -> None:
    made = network()
    (factors,) = sets_of(made, tmp_path, rank=2)
    oracle = reconstructed(made, [factors])
    assert ops(oracle.graph) == ops(made.graph) and not oracle.functions
    W = oracle.graph.initializers["/layers.0/MatMul/weight"].const_value.numpy()
    arrays = factors.load()
    np.testing.assert_array_equal(
        W, (arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64)).astype(np.float32)
    )
    assert np.linalg.matrix_rank(W.astype(np.float64), tol=1e-5) == 2
    feed = {"x": normal(5, K)}
    np.testing.assert_allclose(
        run(oracle, feed)["y"], run(lower(rewrite(made, [factors]), ()), feed)["y"], atol=ROUNDING, rtol=0
    )


def test_the_oracle_keeps_the_shape_that_a_node_reads(tmp_path: Path) -> None:
    """A left operand, a stack of one, a reshaped constant: the replacement is what the node itself reads."""
    for op, shape, w in (
        (node("MatMul", ["w", "x"], ["y"]), (2, K, 3), normal(N, K)),
        (node("MatMul", ["x", "w"], ["y"]), (2, 3, K), normal(1, K, N)),
        (node("Gemm", ["x", "w"], ["y"], transB=1), (3, K), normal(N, K)),
        (node("Einsum", ["x", "w"], ["y"], equation="bsk,hkd->bshd"), (2, 3, K), normal(2, K, 3)),
    ):
        made = model([op], {"x": shape}, ["y"], {"w": w})
        oracle = reconstructed(made, sets_of(made, tmp_path))
        (value,) = oracle.graph.initializers.values()
        assert tuple(value.shape.numpy()) == w.shape  # type: ignore[union-attr]
        np.testing.assert_allclose(value.const_value.numpy(), w, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_the_jitter_is_half_a_unit_in_the_last_place(dtype: Any, tmp_path: Path) -> None:
    W = normal(K, N, dtype=np.float64).astype(dtype)
    made = model(
        [node("MatMul", ["x", "w"], ["y"], name="layer")], {"x": (("n", K), dtype)}, {"y": dtype}, {"w": W}
    )
    sets = sets_of(made, tmp_path)

    def moved(seed: int) -> Array:
        shaken = jittered(made, sets, weights().matrix, seed)
        assert ops(shaken.graph) == ["MatMul"]
        return np.asarray(shaken.graph.initializers["layer/weight"].const_value.numpy())  # type: ignore[union-attr]

    # half a unit rounds to the number itself or to its neighbour, never further; and some do move
    # (of an entry as large as the root mean square, where the entry is smaller)
    size = np.maximum(np.abs(W), np.sqrt(np.mean(np.square(W.astype(np.float64)))).astype(W.dtype))
    steps = np.abs(moved(0).astype(np.float64) - W.astype(np.float64)) / np.spacing(size).astype(np.float64)
    assert steps.max() <= 1.0 and (steps > 0).any()
    assert dtype == np.float64 or (steps == 0).any()  # float64 holds no half units: there it is a whole one
    np.testing.assert_array_equal(moved(0), moved(0))
    assert not np.array_equal(moved(0), moved(1))


def test_corrected_biases_touch_nobody_else(tmp_path: Path) -> None:
    """One constant, the bias of two layers: each gets its own, and a third reader the old one."""
    from lrcompile.records import InputStatistics

    nodes = [
        node("Gemm", ["x", "w1", "b"], ["y"], name="one"),
        node("Gemm", ["x", "w2", "b"], ["z"], name="two"),
        node("Identity", ["b"], ["given"], name="reader"),
    ]
    made = model(
        nodes,
        {"x": ("n", K)},
        ["y", "z", "given"],
        {"w1": normal(K, N), "w2": normal(K, N, seed=1), "b": normal(N)},
    )
    finding, held, svd = find(made), ModelWeights(Cache(tmp_path), 18), factorization("svd")
    X = normal(50, K, dtype=np.float64) + 3

    class Seen:
        def of(self, site: Any) -> InputStatistics:
            return InputStatistics(50, X.T @ X / 50, X.mean(axis=0))

        def key(self, site: Any) -> str:
            return "s"

    plan = choose(prepare(finding, held, Seen(), (svd,), Budget(rank=2), target="t"))
    sets = factorize(plan, {g.name: g for g in finding.groups}, held, Seen(), {"svd": svd}, 0)
    lowered, oracle = lower(rewrite(made, sets), ()), reconstructed(made, sets)
    feed = {"x": X.astype(np.float32)}
    ours, theirs, original = run(lowered, feed), run(oracle, feed), run(made, feed)
    np.testing.assert_array_equal(ours["given"], normal(N))
    for name in ("y", "z"):
        np.testing.assert_allclose(
            ours[name], theirs[name], atol=1e-4, rtol=0
        )  # sums of a dozen numbers of size ten
        np.testing.assert_allclose(
            ours[name].mean(axis=0), original[name].mean(axis=0), atol=1e-4, rtol=0
        )  # that is the correction
        assert (
            np.abs(ours[name] - original[name]).max() > 0.01
        )  # rank two is not exact, or this tests nothing
