"""pivoted against what it re-encodes: the same product, bounded coefficients for hostile matrices, joint groups, counts, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.factorize import factorize
from lrcompile.interfaces import CandidateOptions
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.records import Decision, Group, InputStatistics, Plan, Site
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal, run
from tests.graphs import weights as new_weights

PIVOTED, SVD = factorization("pivoted"), factorization("svd")
# Products of a few dozen float64 numbers, with coefficients of at most two.
EXACT = 1e-12
# The same in float32, of size one, two layers deep.
ROUNDING = 2e-5


class Seen:
    """Statistics over one matrix of samples for every site that reads it."""

    def __init__(self, X: Array) -> None:
        self.X = X

    def of(self, site: Site) -> InputStatistics | None:
        if site.kind == "lookup":
            return InputStatistics(100, frequencies=np.full(site.K, 1 / site.K))
        return InputStatistics(len(self.X), self.X.T @ self.X / len(self.X), self.X.mean(axis=0))

    def key(self, site: Site) -> str:
        return "seen"


def samples(n: int, K: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, K)) @ rng.standard_normal((K, K)) + 0.5


def linear(W: Array, bias: bool = False) -> ir.Model:
    nodes = [node("MatMul", ["x", "w"], ["p" if bias else "y"], name="site")]
    constants = {"w": W}
    if bias:
        nodes.append(node("Add", ["p", "b"], ["y"]))
        constants["b"] = normal(W.shape[1], dtype=W.dtype)
    return model(nodes, {"x": (("n", W.shape[0]), W.dtype)}, {"y": W.dtype}, constants)


def siblings(K: int, *widths: int, bias: bool = False, dtype: Any = np.float32) -> ir.Model:
    """Several layers on one input; two are a gated pair."""
    nodes, constants, outputs = [], {}, []
    for i, N in enumerate(widths):
        constants[f"w{i}"] = normal(K, N, seed=i, dtype=dtype)
        nodes.append(node("MatMul", ["x", f"w{i}"], [f"p{i}"], name=f"site{i}"))
        if bias:
            constants[f"b{i}"] = normal(N, seed=i, dtype=dtype)
            nodes.append(node("Add", [f"p{i}", f"b{i}"], [f"y{i}"]))
        outputs.append(f"y{i}" if bias else f"p{i}")
    if len(widths) == 2:
        nodes.append(node("Mul", outputs, ["y"]))
        outputs = ["y"]
    return model(nodes, {"x": (("n", K), dtype)}, dict.fromkeys(outputs, dtype), constants)


def group_of(made: ir.Model, kind: str) -> Group:
    return next(g for g in find(made).groups if g.kind == kind)


def made_of(group: Group, seen: Seen | None, rank: int) -> tuple[Any, Mapping[str, Array]]:
    weights = new_weights()
    (candidate,) = PIVOTED.candidates(group, weights, seen, CandidateOptions(ranks=(rank,)))
    return candidate, PIVOTED.factorize(group, weights, seen, candidate, 0)


def best(group: Group, seen: Seen | None, rank: int) -> Array:
    found = new_weights().low_rank(group, seen, rank)
    product: Array = found["a"] @ found["b"]
    return product


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize(("K", "N"), [(9, 5), (5, 9), (7, 7), (12, 6)])
@pytest.mark.parametrize("with_data", [True, False])
def test_the_same_product(K: int, N: int, rank: int, with_data: bool) -> None:
    """P [I C], columns put back, is A B; P holds its pivot columns as they are."""
    seen = Seen(samples(60, K)) if with_data else None
    group = group_of(linear(normal(K, N, dtype=np.float64)), "alone")
    candidate, made = made_of(group, seen, rank)
    What = PIVOTED.reconstruct(group, made)["site", "weight"]
    wanted = best(group, seen, rank)
    np.testing.assert_allclose(What, wanted, atol=EXACT * np.abs(wanted).max(), rtol=0)
    assert made["p"].shape == (K, rank) and sum(f.size for n, f in made.items() if n in "pc") == rank * (
        K + N - rank
    )
    assert candidate.cost.parameters == rank * (K + N - rank) and candidate.cost.flops == 2 * rank * (
        K + N - rank
    )
    if rank == N:
        assert set(made) == {"p"} and candidate.cost.bytes == 8 * candidate.cost.parameters
    else:
        assert made["c"].shape == (rank, N - rank) and np.abs(made["c"]).max() <= 2
        assert made["order"].dtype == np.int32 and sorted(made["order"]) == list(range(N))
        assert candidate.cost.bytes == 8 * candidate.cost.parameters + 4 * N
        places = made["order"]
        np.testing.assert_allclose(
            made["p"][:, places[places < rank]],
            wanted[:, places < rank],
            atol=EXACT * np.abs(wanted).max(),
            rtol=0,
        )


def test_errors_and_biases_are_those_of_svd() -> None:
    group, seen, weights = (
        group_of(linear(normal(8, 6), bias=True), "alone"),
        Seen(samples(99, 8)),
        new_weights(),
    )
    ours, theirs = (
        [*m.candidates(group, weights, seen, CandidateOptions(multiple=2))] for m in (PIVOTED, SVD)
    )
    assert [(c.rank, c.error, c.bound) for c in ours] == [(c.rank, c.error, c.bound) for c in theirs]
    assert all(a.cost.parameters == b.cost.parameters - a.rank**2 for a, b in zip(ours, theirs, strict=True))  # type: ignore[operator]
    factors = [m.factorize(group, weights, seen, c[1], 0) for m, c in ((PIVOTED, ours), (SVD, theirs))]
    np.testing.assert_array_equal(factors[0]["bias.0"], factors[1]["bias.0"])
    edited = PIVOTED.edits(group, factors[0])
    assert set(edited) == {("site", "bias")} and edited["site", "bias"] is not None


def kahan(n: int, c: float) -> Array:
    """Upper triangular, where pivoting by columns does nothing and the last row hides a singular value far below its diagonal."""
    scale = np.sqrt(1 - c * c) ** np.arange(n)
    matrix: Array = scale[:, None] * (np.eye(n) - c * np.triu(np.ones((n, n)), 1)) + np.diag(
        1e-13 * np.arange(n, 0, -1)
    )
    return matrix


HOSTILE = {
    "kahan": np.concatenate([kahan(60, 0.285), normal(60, 20, dtype=np.float64)], axis=1),
    "kahan inverse": np.concatenate([np.eye(60), np.linalg.inv(kahan(60, 0.285))[:, -20:]], axis=1),
    "kahan and nearly itself": np.concatenate([kahan(40, 0.3), kahan(40, 0.3)[:, ::-1] + 1e-9], axis=1),
    "hilbert": scipy.linalg.hilbert(30)[:12],
    "vandermonde": np.vander(np.linspace(0, 1, 40), 15).T,
    "scales": normal(10, 30, dtype=np.float64) * np.geomspace(1, 1e-14, 30),
    "columns alike": np.repeat(normal(6, 5, dtype=np.float64), 6, axis=1),
    "rank one": np.outer(normal(7, dtype=np.float64), normal(20, dtype=np.float64)),
    "zero": np.zeros((4, 9)),
    "one row": normal(1, 9, dtype=np.float64),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_matrices(name: str) -> None:
    """Whatever B is, even of a lower rank than it has rows, the coefficients are bounded and the product is the same."""

    class Given:
        def low_rank(self, group: Any, statistics: Any, rank: int) -> dict[str, Array]:
            return {"a": A, "b": B}

    B = HOSTILE[name]
    r, N = B.shape
    A = normal(r + 5, r, dtype=np.float64)
    group = group_of(linear(np.ones((r + 5, N))), "alone")
    (candidate,) = PIVOTED.candidates(group, new_weights(), None, CandidateOptions(ranks=(r,)))
    made = PIVOTED.factorize(group, Given(), None, candidate, 0)  # type: ignore[arg-type]
    assert np.abs(made["c"]).max() <= 2 and made["c"].size + made["p"].size == candidate.cost.parameters
    wanted = A @ B
    What = PIVOTED.reconstruct(group, made)["site", "weight"]
    np.testing.assert_allclose(What, wanted, atol=1e-11 * max(np.abs(wanted).max(), 1e-300), rtol=0)


@pytest.mark.parametrize("name", ["kahan", "kahan inverse"])
def test_swaps_mend_pivots_that_hide_a_small_singular_value(name: str) -> None:
    """From the first columns, Kahan's own, the coefficients are in the millions."""
    from lrcompile_passes.pivoted import _bounded

    r, N = HOSTILE[name].shape
    b = scipy.linalg.qr(HOSTILE[name].T, mode="economic")[0].T
    first, rest = np.arange(r), np.arange(r, N)
    c = np.linalg.solve(b[:, :r], b[:, r:])
    assert np.abs(c).max() > 1e6
    pivots, others, mended = _bounded(b, first, rest, c)
    assert np.abs(mended).max() <= 2
    assert sorted([*pivots, *others]) == list(range(N)) and list(pivots) == sorted(pivots)
    np.testing.assert_allclose(b[:, pivots] @ mended, b[:, others], atol=EXACT, rtol=0)
    assert list(first) == list(range(r))  # what was given is left as it is


@given(r=st.integers(1, 8), more=st.integers(1, 12), seed=st.integers(0, 999), power=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_swaps_end_with_bounded_coefficients(r: int, more: int, seed: int, power: int) -> None:
    """From any pivots, also nearly dependent ones."""
    from lrcompile_passes.pivoted import _bounded

    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((r, r + more))
    raw[:, r - 1] = raw[:, 0] + 10.0**-power * raw[:, r - 1]
    b = scipy.linalg.qr(raw.T, mode="economic")[0].T
    pivots, rest, c = _bounded(b, np.arange(r), np.arange(r, r + more), np.linalg.solve(b[:, :r], b[:, r:]))
    assert np.abs(c).max() <= 2
    np.testing.assert_allclose(b[:, pivots] @ c, b[:, rest], atol=EXACT, rtol=0)


@pytest.mark.parametrize(("K", "N"), [(8, 8), (12, 5), (5, 12), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("deficient", [False, True])
def test_full_rank(K: int, N: int, deficient: bool) -> None:
    """A tall matrix is its own P, bit for bit and without an index; a wide one, even a singular one, is exact to rounding."""
    W = normal(K, N, dtype=np.float64)
    if deficient:
        W[:, 1:] = W[:, :1]
    made = linear(W)
    group, weights = group_of(made, "alone"), new_weights()
    (candidate,) = PIVOTED.candidates(group, weights, None, CandidateOptions(full=True))
    factors = PIVOTED.factorize(group, weights, None, candidate, 0)
    assert candidate.cost.parameters == K * N and candidate.rank == min(K, N)
    What = PIVOTED.reconstruct(group, factors)["site", "weight"]
    if N <= K:
        assert set(factors) == {"p"}
        np.testing.assert_array_equal(What, W)
    else:
        np.testing.assert_allclose(What, W, atol=EXACT * np.abs(W).max(), rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "widths"), [("gate_up", (5, 5)), ("qkv", (6, 3, 4)), ("qkv", (2, 2, 2))])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_weights_side_by_side(
    tmp_path: Path, kind: str, widths: tuple[int, ...], rank: int, bias: bool
) -> None:
    """One rank for all; each site gathers its own columns; what is computed alike is computed once."""
    K = 6
    made = siblings(K, *widths, bias=bias)
    group, seen = group_of(made, kind), Seen(samples(99, K))
    N = sum(widths)
    candidate, factors = made_of(group, seen, rank)
    assert (
        candidate.cost.parameters
        == rank * (K + N - rank)
        == factors["p"].size + (factors["c"].size if rank < N else 0)
    )
    assert candidate.cost.flops == 2 * candidate.cost.parameters and candidate.bound
    assert candidate.cost.bytes == 4 * candidate.cost.parameters + 4 * N
    changed = PIVOTED.reconstruct(group, factors)
    ours = np.concatenate([changed[s.name, "weight"] for s in group.sites], axis=1)
    wanted = best(group, seen, rank)
    np.testing.assert_allclose(ours, wanted, atol=EXACT * np.abs(wanted).max(), rtol=0)
    assert set(PIVOTED.edits(group, factors)) == ({(s.name, "bias") for s in group.sites} if bias else set())

    decision = Decision(
        group.name, tuple(s.name for s in group.sites), "pivoted", rank, None, candidate.error, True, 0, 0, 0, 0, 0, 0, ""
    )  # fmt: skip
    sets = factorize(
        Plan("t", (decision,)), {group.name: group}, new_weights(), seen, {"pivoted": PIVOTED}, 0
    )
    assert sets[0].measured <= candidate.error + 1e-6
    neutral = rewrite(made, sets)
    assert {str(v.dtype) for n, v in neutral.graph.initializers.items() if "/order." in n} == {"INT32"}
    lowered = lower(neutral, ())
    ops = [n.op_type for n in lowered.graph]
    assert ops.count("MatMul") == (2 if rank < N else 1) and ops.count("Concat") == (1 if rank < N else 0)
    assert ops.count("Gather") == len(widths)
    feed = {"x": normal(5, K, seed=9)}
    oracle, found = run(reconstructed(made, sets), feed), run(lowered, feed)
    for name, value in oracle.items():
        np.testing.assert_allclose(found[name], value, atol=ROUNDING * max(1, np.abs(value).max()), rtol=0)


def test_readers_of_one_weight() -> None:
    """Each multiplies for itself; a lookup takes its rows of P and multiplies them with C only."""
    linear_ = model(
        [node("MatMul", ["x", "w"], ["y"], name="one"), node("MatMul", ["z", "w"], ["v"], name="two")],
        {"x": ("n", 6), "z": ("n", 6)}, ["y", "v"], {"w": normal(6, 8)},
    )  # fmt: skip
    (candidate,) = PIVOTED.candidates(
        group_of(linear_, "shared"), new_weights(), None, CandidateOptions(ranks=(2,))
    )
    assert (
        candidate.cost.flops == 2 * 2 * 2 * (6 + 8 - 2)
        and candidate.cost.parameters == 24
        and not candidate.bound
    )
    table = model(
        [node("Gather", ["w", "ids"], ["y"], name="t")],
        {"ids": (("n",), np.int64)},
        ["y"],
        {"w": normal(9, 8)},
    )
    (candidate,) = PIVOTED.candidates(
        group_of(table, "alone"), new_weights(), None, CandidateOptions(ranks=(2,))
    )
    assert candidate.cost.flops == 2 * 2 * (8 - 2)


def test_ranks_asked_for() -> None:
    group, weights = group_of(linear(normal(8, 6)), "alone"), new_weights()

    def ranks(**options: Any) -> list[int | None]:
        return [c.rank for c in PIVOTED.candidates(group, weights, None, CandidateOptions(**options))]

    assert ranks() == [1, 2, 3, 4, 5, 6]
    assert ranks(multiple=4) == [4]
    assert ranks(ranks=(0, 2, 6, 7)) == [2, 6]
    assert ranks(full=True) == [6]
    assert [
        *PIVOTED.candidates(
            group_of(siblings(4, 3, 3), "gate_up"), weights, None, CandidateOptions(full=True)
        )
    ] == []


def test_too_few_samples_are_said() -> None:
    group = group_of(linear(normal(20, 10)), "alone")
    few, enough = (made_of(group, Seen(samples(n, 20)), 3)[0] for n in (5, 5000))
    assert "5 rows for 20 inputs" in few.note and enough.note == ""


def test_refusals() -> None:
    tied = model(
        [node("Gather", ["w", "ids"], ["e"], name="table"), node("Transpose", ["w"], ["wt"], perm=[1, 0]),
         node("MatMul", ["x", "wt"], ["y"], name="head")],
        {"ids": (("n",), np.int64), "x": ("n", 4)}, ["e", "y"], {"w": normal(9, 4)},
    )  # fmt: skip
    transposed = model(
        [node("Gemm", ["x", "w"], ["y"], name="one"), node("Gemm", ["z", "w"], ["v"], name="two", transB=1)],
        {"x": ("n", 6), "z": ("n", 8)}, ["y", "v"], {"w": normal(6, 8)},
    )  # fmt: skip
    ffn = model(
        [node("MatMul", ["x", "w"], ["h"], name="up"), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"], name="down")],
        {"x": ("n", 6)}, ["y"], {"w": normal(6, 8), "v": normal(8, 6)},
    )  # fmt: skip
    halves = siblings(4, 3, 3)
    mixed = group_of(halves, "gate_up")
    object.__setattr__(mixed.sites[0], "stored", "float16")
    groups = [group_of(tied, "tied"), group_of(transposed, "shared"), group_of(ffn, "up_down"), mixed]
    for group, word in zip(groups, ("transpose", "transpose", "up_down", "different types"), strict=True):
        refusal = PIVOTED.serves(group)
        assert refusal is not None and word in refusal.reason and "\n" not in refusal.reason
