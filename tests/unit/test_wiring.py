"""Every row of the table in `lrcompile.wiring`: what is wired by hand with numpy computes what the node computes.

Numbers are small integers, so that float32 products and sums are exact and every comparison is for equality.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile.lower import lower
from lrcompile.records import Site, Step
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, run

K, N = 6, 4


def whole(*shape: int, seed: int = 0) -> Array:
    """Small whole numbers: sums of products of them are exact in float32."""
    return np.random.default_rng((seed, 7, *shape)).integers(-4, 5, shape).astype(np.float32)


def stepped(array: Array, steps: tuple[Step, ...]) -> Array:
    for kind, argument in steps:
        if kind == "transpose":
            array = array.transpose(argument)
        else:
            array = array.reshape(tuple(array.shape[i] if n == 0 else n for i, n in enumerate(argument)))
    return array


def by_hand(site: Site, W: Array, feeds: dict[str, Array], addend: Array | None) -> Array:
    """What `records.Wiring` says: before, x W or W[ids], scale, after, addend."""
    assert site.wiring is not None
    data = feeds[site.data.name or ""]
    x = stepped(data, site.wiring.before)
    y = W[x] if site.kind == "lookup" else x @ W
    y = stepped(site.wiring.scale * y, site.wiring.after)
    return y if addend is None or site.wiring.addend is None else y + site.wiring.addend_scale * addend


C = {"scalar": (), "one": (1,), "last": (N,), "row": (1, N), "column": (3, 1), "full": (3, N)}
# name -> (node, shape of the data or ids, constants)
ROWS: dict[str, tuple[onnx.NodeProto, tuple[int, ...] | Array, dict[str, Array]]] = {
    **{
        f"matmul right, x of rank {len(shape)}": (
            node("MatMul", ["x", "w"], ["y"]),
            shape,
            {"w": whole(K, N)},
        )
        for shape in [(K,), (3, K), (2, 3, K), (2, 1, 3, K)]
    },
    "matmul right (1, K, N)": (node("MatMul", ["x", "w"], ["y"]), (2, 3, K), {"w": whole(1, K, N)}),
    "matmul right (1, 1, K, N)": (node("MatMul", ["x", "w"], ["y"]), (5, 2, 3, K), {"w": whole(1, 1, K, N)}),
    **{
        f"matmul left, x of rank {len(shape)}": (node("MatMul", ["w", "x"], ["y"]), shape, {"w": whole(N, K)})
        for shape in [(K,), (K, 3), (2, K, 3), (2, 1, K, 3)]
    },
    "matmul left (1, M, K)": (node("MatMul", ["w", "x"], ["y"]), (2, K, 3), {"w": whole(1, N, K)}),
    "matmul left (1, M, K), x of rank 4": (
        node("MatMul", ["w", "x"], ["y"]),
        (2, 5, K, 3),
        {"w": whole(1, N, K)},
    ),
    **{
        f"gemm B, transA {a}, transB {b}": (
            node("Gemm", ["x", "w", "c"], ["y"], transA=a, transB=b, alpha=-0.5, beta=2.0),
            (K, 3) if a else (3, K),
            {"w": whole(N, K) if b else whole(K, N), "c": whole(N)},
        )
        for a in (0, 1)
        for b in (0, 1)
    },
    **{
        f"gemm A, transA {a}, transB {b}": (
            node("Gemm", ["w", "x", "c"], ["y"], transA=a, transB=b, alpha=-0.5, beta=2.0),
            (N, K) if b else (K, N),
            {"w": whole(K, 3) if a else whole(3, K), "c": whole(N)},
        )
        for a in (0, 1)
        for b in (0, 1)
    },
    **{
        f"gemm C {name}": (
            node("Gemm", ["x", "w", "c"], ["y"], beta=1.5),
            (3, K),
            {"w": whole(K, N), "c": whole(*shape)},
        )
        for name, shape in C.items()
    },
    "gemm A, C column": (node("Gemm", ["w", "x", "c"], ["y"]), (K, N), {"w": whole(3, K), "c": whole(3, 1)}),
    "gemm without C": (node("Gemm", ["x", "w"], ["y"], alpha=2.0), (3, K), {"w": whole(K, N)}),
    "gemm beta 0": (
        node("Gemm", ["x", "w", "c"], ["y"], beta=0.0),
        (3, K),
        {"w": whole(K, N), "c": whole(N)},
    ),
    "gemm alpha 0": (
        node("Gemm", ["x", "w", "c"], ["y"], alpha=0.0),
        (3, K),
        {"w": whole(K, N), "c": whole(N)},
    ),
    **{
        f"gather axis {axis}, ids of rank {ids.ndim}": (
            node("Gather", ["w", "x"], ["y"], axis=axis),
            ids,
            {"w": whole(K, N)},
        )
        for axis in (0, 1, -1, -2)
        for ids in (
            np.int64(-2),
            np.array([1, -1, 3]),
            np.array([[0, 2], [-3, 1]]),
            np.array([[[0], [2]], [[-3], [1]]]),
        )
    },
    **{
        f"einsum {equation}": (node("Einsum", ["x", "w"], ["y"], equation=equation), x, {"w": w})
        for equation, x, w in [
            ("bk,kn->bn", (3, K), whole(K, N)),
            ("bk,nk->bn", (3, K), whole(N, K)),
            (" b k, kn -> nb ", (3, K), whole(K, N)),
            ("bsk,kn->bns", (2, 3, K), whole(K, N)),
            ("bsk,khd->bshd", (2, 3, K), whole(K, 2, 5)),
            ("bsk,khd->bhsd", (2, 3, K), whole(K, 2, 5)),
            ("bhsd,hdn->bsn", (2, 3, 4, 5), whole(3, 5, N)),
            ("bhsd,dnh->bsn", (2, 3, 4, 5), whole(5, N, 3)),
            ("kb,kn->bn", (K, 3), whole(K, N)),
            ("bkc,kndc->bnd", (2, K, 3), whole(K, 2, 5, 3)),
            ("k,kn->n", (K,), whole(K, N)),
            ("bk,kn", (3, K), whole(K, N)),
            ("bk,ka", (3, K), whole(K, N)),  # implicit: the free label comes first
        ]
    },
    "einsum, weight first": (
        node("Einsum", ["w", "x"], ["y"], equation="nk,bk->bn"),
        (3, K),
        {"w": whole(N, K)},
    ),
}


def case(name: str) -> tuple[ir.Model, dict[str, Array]]:
    op, given, constants = ROWS[name]
    feed = whole(*given, seed=1) if isinstance(given, tuple) else np.asarray(given)
    return model([op], {"x": (feed.shape, feed.dtype)}, ["y"], constants), {"x": feed}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_table(name: str, tmp_path: Path) -> None:
    made, feeds = case(name)
    (site,) = find(made).sites
    assert site.refusal is None
    W = ModelWeights(Cache(tmp_path), 18).matrix(site)
    assert W.dtype == np.float64 and W.shape == (site.K, site.N)
    expected = run(made, feeds)["y"]
    ours = by_hand(site, W, feeds, ROWS[name][2].get("c"))
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", ROWS)
def test_rows_as_the_graph_writes_them(name: str, tmp_path: Path) -> None:
    """The same wiring as nodes: `dense` called as a factorization puts W itself between the steps, so equality is exact."""
    from lrcompile.curves import decision_of  # the decision of a candidate, without a whole plan around it
    from lrcompile.factors import FactorSet

    made, feeds = case(name)
    (group,) = find(made).units
    dense, weights = factorization("dense"), ModelWeights(Cache(tmp_path), 18)
    (candidate,) = dense.candidates(group, weights, None, None)  # type: ignore[arg-type]
    arrays = {n: a.astype(np.float32) for n, a in dense.factorize(group, weights, None, candidate, 0).items()}
    shapes = {n: a.shape for n, a in arrays.items()}
    factors = FactorSet(
        decision_of(group, candidate, ""), group, dense, ir.DataType.FLOAT, shapes, 0.0, lambda: arrays
    )
    before, inputs = [n.op_type for n in made.graph], [v.name for v in made.graph.inputs]
    neutral = rewrite(made, [factors])
    assert [n.op_type for n in made.graph] == before  # the model given is left as it is
    (call,) = neutral.graph
    assert call.domain == "lrcompile" and call.inputs[0] is neutral.graph.inputs[0]
    assert call.outputs[0] is neutral.graph.outputs[0]
    assert "w" not in neutral.graph.initializers  # nobody reads it any more
    lowered = lower(neutral, ())
    assert [v.name for v in lowered.graph.inputs] == inputs
    np.testing.assert_array_equal(run(lowered, feeds)["y"], run(made, feeds)["y"])
