"""svd against brute force: the closed form with an inverse, random competitors, singular moments, one row or column, few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile import spectra
from lrcompile.curves import decision_of
from lrcompile.factorize import factorize
from lrcompile.interfaces import CandidateOptions
from lrcompile.loss import group_loss
from lrcompile.records import Candidate, Group, InputStatistics, Plan, Site
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal
from tests.graphs import weights as new_weights

SVD, PLAIN = factorization("svd"), factorization("svd-plain")
# Sums of a few hundred float64 products, twice through an eigenproblem: far above rounding, far below any real difference.
EXACT = 1e-9


@dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return str(id(self.known.get(site.name)))


def linear(W: Array, bias: Array | None = None) -> tuple[ir.Model, Group]:
    nodes = [node("MatMul", ["x", "w"], ["y" if bias is None else "p"], name="site")]
    constants = {"w": W}
    if bias is not None:
        nodes.append(node("Add", ["p", "b"], ["y"]))
        constants["b"] = bias
    made = model(nodes, {"x": (("n", W.shape[0]), W.dtype)}, {"y": W.dtype}, constants)
    (group,) = find(made).units
    return made, group


def samples(n: int, K: int, seed: int = 0, offset: float = 0.0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, K)) @ rng.standard_normal((K, K)) + offset


def seen(X: Array) -> Statistics:
    return Statistics({"site": InputStatistics(len(X), X.T @ X / len(X), X.mean(axis=0))})


def factors(
    method: Any, group: Group, statistics: Statistics | None, rank: int
) -> tuple[Candidate, Mapping[str, Array]]:
    weights = new_weights()
    (candidate,) = method.candidates(group, weights, statistics, CandidateOptions(ranks=(rank,)))
    return candidate, method.factorize(group, weights, statistics, candidate, 0)


def product(made: Mapping[str, Array]) -> Array:
    result: Array = made["a"] @ made["b"]
    return result


def lost(X: Array, W: Array, What: Array) -> float:
    return float(np.linalg.norm(X @ (W - What)))


SHAPES = [(9, 5), (5, 9), (7, 7), (12, 3), (3, 12)]


@pytest.mark.parametrize(("K", "N"), SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_closed_form(K: int, N: int, rank: int) -> None:
    """What = S^-T [S^T W]_r, S the Cholesky factor of C: SVD-LLM as it is written, inverse and all."""
    W, X = normal(K, N, dtype=np.float64), samples(200, K)
    S = np.linalg.cholesky(X.T @ X / len(X))
    U, sigma, Vt = np.linalg.svd(S.T @ W, full_matrices=False)
    wanted = np.linalg.solve(S.T, (U[:, :rank] * sigma[:rank]) @ Vt[:rank])
    candidate, made = factors(SVD, linear(W)[1], seen(X), rank)
    np.testing.assert_allclose(product(made), wanted, atol=EXACT * np.abs(W).max(), rtol=0)
    assert candidate.error == pytest.approx(
        np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()), abs=2e-7
    )  # it claims 1e-7 more


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_plain_is_eckart_young(K: int, N: int) -> None:
    W = normal(K, N, dtype=np.float64)
    U, sigma, Vt = np.linalg.svd(W, full_matrices=False)
    _, made = factors(PLAIN, linear(W)[1], None, 2)
    np.testing.assert_allclose(product(made), (U[:, :2] * sigma[:2]) @ Vt[:2], atol=EXACT, rtol=0)
    # data is not looked at
    _, again = factors(PLAIN, linear(W)[1], seen(samples(50, K)), 2)
    np.testing.assert_array_equal(product(again), product(made))


@given(K=st.integers(2, 9), N=st.integers(2, 9), seed=st.integers(0, 999), n=st.integers(2, 40))
@settings(max_examples=25, deadline=None)
def test_nobody_does_better(K: int, N: int, seed: int, n: int) -> None:
    """Random products of the rank, each fitted by least squares to one side of ours or its own: none loses less. n < K is among them."""
    W, X, rng = normal(K, N, seed=seed, dtype=np.float64), samples(n, K, seed), np.random.default_rng(seed)
    rank = int(rng.integers(1, min(K, N)))
    _, made = factors(SVD, linear(W)[1], seen(X), rank)
    ours = lost(X, W, product(made))
    slack = (
        1e-6 * float(np.linalg.norm(X @ W)) + 1e-12
    )  # the eigenvalues are good to 1e-15 of the largest: the root of that, and more
    for start in (rng.standard_normal((rank, N)), made["b"] + 0.1 * rng.standard_normal((rank, N))):
        for _ in range(3):  # alternating least squares: a strong competitor
            A = np.linalg.lstsq(X, (X @ W) @ np.linalg.pinv(start), rcond=None)[0]
            start = np.linalg.lstsq(X @ A, X @ W, rcond=None)[0]
            assert ours <= lost(X, W, A @ start) + slack


@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_singular_moments(K: int, N: int) -> None:
    """Inputs that live in two dimensions: rank 2 is then exact on them, whatever W is, and nothing is divided by zero."""
    X = np.random.default_rng(1).standard_normal((50, 2)) @ np.random.default_rng(2).standard_normal((2, K))
    W = normal(K, N, dtype=np.float64)
    candidate, made = factors(SVD, linear(W)[1], seen(X), 2)
    assert all(np.isfinite(a).all() for a in made.values())
    assert lost(X, W, product(made)) <= 1e-4 * np.linalg.norm(
        X @ W
    )  # the floor of eigenvalues is 1e-10 of the largest: its root
    assert candidate.error <= 1e-4


@pytest.mark.parametrize(("K", "N"), [(1, 5), (5, 1), (1, 1)])
def test_one_row_or_column(K: int, N: int) -> None:
    W = normal(K, N, dtype=np.float64)
    for method, statistics in ((SVD, seen(samples(20, K))), (PLAIN, None)):
        _, made = factors(method, linear(W)[1], statistics, 1)
        np.testing.assert_allclose(product(made), W, atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    "X",
    [np.zeros((5, 6)), np.zeros((5, 6)) + 1e-200, samples(1, 6), samples(3, 6)],
    ids=["zero", "tiny", "one", "few"],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-30])
def test_never_fails(X: Array, scale: float) -> None:
    """Inputs of zeros, fewer samples than dimensions, weights of zeros: finite factors and claims."""
    for shape in [(6, 4), (6, 9)]:
        W = scale * normal(*shape, dtype=np.float64)
        candidate, made = factors(SVD, linear(W)[1], seen(X), 2)
        assert all(np.isfinite(a).all() for a in made.values())
        assert 0 <= candidate.error <= 1 + 1e-6


def test_too_few_samples_are_said() -> None:
    W = normal(20, 10, dtype=np.float64)
    few, enough = (factors(SVD, linear(W)[1], seen(samples(n, 20)), 3)[0] for n in (5, 5000))
    assert "5" in few.note and few.note != ""
    assert enough.note == ""


@given(seed=st.integers(0, 999), offset=st.sampled_from([0.0, 1.0, 30.0]), rank=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_bias_correction_is_never_worse(seed: int, offset: float, rank: int) -> None:
    W, b, X = (
        normal(6, 5, seed=seed, dtype=np.float64),
        normal(5, dtype=np.float64),
        samples(100, 6, seed, offset),
    )
    _, without = factors(SVD, linear(W)[1], seen(X), rank)
    _, made = factors(SVD, linear(W, b)[1], seen(X), rank)
    wanted = X @ W + b
    plain = np.linalg.norm(wanted - (X @ product(without) + b))
    corrected = np.linalg.norm(wanted - (X @ product(made) + made["bias.0"]))
    assert corrected <= plain + 1e-6 * np.linalg.norm(wanted)
    # the correction makes the mean error zero: that is what b' = b + m (W - A B) means
    np.testing.assert_allclose(
        (wanted - X @ product(made) - made["bias.0"]).mean(axis=0), 0, atol=1e-8 * (1 + abs(offset)) * 10
    )


def test_bias_correction_where_the_mean_is_everything() -> None:
    """Inputs that all but never leave their mean: rank 1 with a bias is nearly exact, though W has full rank."""
    X = 10.0 + np.outer(np.random.default_rng(0).standard_normal(100), np.ones(6))
    W = normal(6, 5, dtype=np.float64)
    _, made = factors(SVD, linear(W, np.zeros(5))[1], seen(X), 1)
    error = np.linalg.norm(X @ W - X @ product(made) - made["bias.0"]) / np.linalg.norm(X @ W)
    assert error < 1e-6


# --- tables and heads ---------------------------------------------------------------------------------------------


def table(W: Array, head: bool) -> Group:
    nodes = [node("Gather", ["w", "ids"], ["y"], name="site")]
    if head:
        nodes.append(node("Gemm", ["x", "w"], ["logits"], transB=1, name="head"))
    inputs = {"ids": (("n",), np.int64), **({"x": (("n", W.shape[1]), W.dtype)} if head else {})}
    made = model(nodes, inputs, {"y": W.dtype, **({"logits": W.dtype} if head else {})}, {"w": W})
    (group,) = find(made).units
    return group


def test_tables_are_weighted_by_frequency() -> None:
    W = normal(12, 6, dtype=np.float64)
    share = np.array([0.9, *[0.1 / 11] * 11])
    statistics = Statistics({"site": InputStatistics(1000, frequencies=share)})
    _, weighted = factors(SVD, table(W, head=False), statistics, 2)
    _, plain = factors(PLAIN, table(W, head=False), None, 2)

    def error(made: Mapping[str, Array]) -> float:
        return float(np.sqrt(share @ ((W - product(made)) ** 2).sum(axis=1)))

    D = np.sqrt(share)[:, None]
    sigma = np.linalg.svd(D * W, compute_uv=False)
    assert error(weighted) == pytest.approx(
        np.sqrt((sigma[2:] ** 2).sum()), rel=1e-6
    )  # the optimum, by brute force
    assert error(weighted) < 0.7 * error(plain)
    assert np.linalg.norm(W - product(plain)) < np.linalg.norm(
        W - product(weighted)
    )  # which is better without the weights


def test_rows_never_asked_for() -> None:
    share = np.zeros(12)
    share[:3] = 1 / 3
    statistics = Statistics({"site": InputStatistics(30, frequencies=share)})
    W = normal(12, 6, dtype=np.float64)
    _, made = factors(SVD, table(W, head=False), statistics, 3)
    np.testing.assert_allclose(product(made)[:3], W[:3], atol=1e-6)  # three rows have rank three
    assert np.isfinite(product(made)).all()


def test_tied() -> None:
    """min over rank r of ||D (W - What) R||: by brute force through both roots and their inverses."""
    W, X = normal(12, 6, dtype=np.float64), samples(300, 6)
    share = np.random.default_rng(0).dirichlet(np.ones(12))
    statistics = Statistics({
        "site": InputStatistics(500, frequencies=share), "head": InputStatistics(300, X.T @ X / 300, X.mean(axis=0)),
    })  # fmt: skip
    _, made = factors(SVD, table(W, head=True), statistics, 2)
    D, R = np.diag(np.sqrt(share)), np.linalg.cholesky(X.T @ X / 300)
    U, sigma, Vt = np.linalg.svd(D @ W @ R, full_matrices=False)
    wanted = np.linalg.inv(D) @ (U[:, :2] * sigma[:2]) @ Vt[:2] @ np.linalg.inv(R)
    np.testing.assert_allclose(product(made), wanted, atol=1e-7 * np.abs(wanted).max(), rtol=0)
    changed = SVD.reconstruct(table(W, head=True), made)
    np.testing.assert_array_equal(changed["head", "weight"], changed["site", "weight"].T)


# --- full rank, storage, signs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SVD, PLAIN], ids=lambda m: m.name)
@pytest.mark.parametrize(("K", "N"), [*SHAPES, (1, 4), (4, 1)])
def test_full_rank(method: Any, K: int, N: int) -> None:
    W = normal(K, N, dtype=np.float64)
    W[:, 0] *= 1e6  # badly scaled columns must not cost the others their digits
    _, group = linear(W)
    weights = new_weights()
    (candidate,) = method.candidates(group, weights, None, CandidateOptions(full=True))
    made = method.factorize(group, weights, None, candidate, 0)
    assert candidate.rank == min(K, N) and candidate.cost.parameters == made["a"].size + made["b"].size
    np.testing.assert_allclose(product(made), W, atol=0, rtol=1e-9 * 10)


@pytest.mark.parametrize(
    ("dtype", "room"),  # errors of two rounded factors: a few units in the last place
    [(np.float64, 1e-12), (np.float32, 1e-6), (np.float16, 4e-3), (ml_dtypes.bfloat16, 4e-2)],
)
def test_storage(dtype: Any, room: float, tmp_path: Path) -> None:
    W = normal(10, 8, dtype=np.float64).astype(dtype)
    _, group = linear(W)
    weights = ModelWeights(Cache(tmp_path), 18)
    statistics = seen(samples(100, 10))
    (candidate,) = SVD.candidates(group, weights, statistics, CandidateOptions(ranks=(3,)))
    plan = Plan("reference", (decision_of(group, candidate, ""),))
    (made,) = factorize(plan, {group.name: group}, weights, statistics, {"svd": SVD}, 0)
    arrays = made.load()
    assert {a.dtype for a in arrays.values()} == {np.dtype(dtype)}
    assert candidate.cost.bytes == sum(a.nbytes for a in arrays.values())
    assert abs(made.measured - candidate.error) <= room + 1e-7  # the claim covers 1e-7 of its own
    assert made.measured == group_loss(group, weights, statistics, SVD.reconstruct(group, arrays))


def test_signs_do_not_depend_on_chance() -> None:
    """Each direction's largest entry is positive."""
    for shape in [(9, 5), (5, 9)]:
        W = normal(*shape, dtype=np.float64)
        _, made = factors(SVD, linear(W)[1], seen(samples(90, shape[0])), 3)
        b = made["b"]
        assert (b[np.arange(3), np.abs(b).argmax(axis=1)] > 0).all()
        np.testing.assert_allclose(b @ b.T, np.eye(3), atol=EXACT)


def test_candidates() -> None:
    """Rising rank, falling error, cost as documented; ranks above full are not made."""
    W = normal(10, 6, dtype=np.float32)
    _, group = linear(W)

    class Fixed:
        def __getattr__(self, name: str) -> Any:
            return {"matrix": lambda s: W.astype(np.float64), "bias": lambda s: None, "key": lambda s: "k", "itemsize": lambda s: 4,
                    "low_rank_errors": lambda group, seen: spectra.spectrum(group, self, None)["errors"], "low_rank_movements": lambda group, seen: None}[name]  # fmt: skip

    made = list(PLAIN.candidates(group, Fixed(), None, CandidateOptions()))  # type: ignore[arg-type]
    assert [c.rank for c in made] == [1, 2, 3, 4, 5, 6]
    assert all(a.error > b.error for a, b in pairwise(made))
    assert [(c.cost.parameters, c.cost.bytes, c.cost.flops) for c in made] == [
        (16 * r, 64 * r, 32 * r) for r in range(1, 7)
    ]
    assert [c.rank for c in PLAIN.candidates(group, Fixed(), None, CandidateOptions(multiple=4))] == [4]  # type: ignore[arg-type]
    assert not list(PLAIN.candidates(group, Fixed(), None, CandidateOptions(ranks=(7,))))  # type: ignore[arg-type]
