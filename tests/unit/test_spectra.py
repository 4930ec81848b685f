"""Spectra against explicit decompositions of S^T W, for every kind of group; nobody does better; what is claimed is what the factors lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile import spectra
from lrcompile.loss import group_loss
from lrcompile.records import Group, InputStatistics, Site
from lrcompile.registry import factorization
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal
from tests.graphs import weights as new_weights

SVD = factorization("svd")
# Eigenvalues of a squared matrix: half of float64's digits, of an error that is at most one.
CLOSE = 3e-8


@dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return str(id(self.known.get(site.name)))


def samples(n: int, K: int, seed: int = 0, offset: float = 0.0, rank: int | None = None) -> Array:
    rng = np.random.default_rng((seed, n, K))
    rank = rank or K
    X: Array = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, K)) + offset
    return X


def seen(X: Array) -> InputStatistics:
    return InputStatistics(len(X), X.T @ X / len(X), X.mean(axis=0))


def side_by_side(
    widths: tuple[int, ...], K: int, biases: tuple[bool, ...], meet: bool = False, seed: int = 0
) -> Group:
    """Sites that read one value; the first group of several, or the lone one."""
    nodes, constants, ends = [], {}, []
    for i, (n, biased) in enumerate(zip(widths, biases, strict=True)):
        constants[f"w{i}"] = normal(K, n, seed=seed + i, dtype=np.float64)
        nodes.append(node("MatMul", ["x", f"w{i}"], [f"p{i}"], name=f"s{i}"))
        if biased:
            constants[f"b{i}"] = normal(n, seed=i, dtype=np.float64)
            nodes.append(node("Add", [f"p{i}", f"b{i}"], [f"h{i}"]))
        ends.append(f"h{i}" if biased else f"p{i}")
    if meet:
        nodes.append(node("Mul", ends, ["y"]))
        ends = ["y"]
    made = model(nodes, {"x": (("n", K), np.float64)}, dict.fromkeys(ends, np.float64), constants)
    found = find(made).groups
    return next((g for g in found if g.kind in ("qkv", "gate_up")), found[0])


def found_for(group: Group, statistics: Statistics | None) -> tuple[Array, Any]:
    weights = new_weights()
    made = spectra.spectrum(group, weights, statistics)
    return np.asarray(made["errors"]), lambda rank: spectra.low_rank(group, weights, statistics, made, rank)


def explicit(W: Array, X: Array | None, centred: bool) -> Array:
    """Errors at every rank, from singular values of the samples themselves: no moment is squared on the way."""
    rows = W if X is None else (X - X.mean(axis=0) if centred else X) @ W / np.sqrt(len(X))
    sigma = np.linalg.svd(rows, compute_uv=False)[: min(W.shape)]
    sigma = np.concatenate([sigma, np.zeros(min(W.shape) - len(sigma))])
    tails = np.concatenate([np.cumsum((sigma**2)[::-1])[::-1], [0.0]])
    total = np.sum(W**2) if X is None else np.sum((X @ W) ** 2) / len(X)
    errors: Array = np.sqrt(tails / total)
    return errors


CASES = {
    "alone": ((7,), (False,)), "alone with a bias": ((7,), (True,)), "wide": ((15,), (False,)), "wide with a bias": ((15,), (True,)),
    "square": ((9,), (True,)), "one column": ((1,), (True,)),
    "q, k, v": ((9, 4, 4), (True, True, True)), "k without a bias": ((9, 4, 4), (True, False, True)),
    "q, k, v, narrow": ((2, 2, 2), (False, False, False)), "gate, up": ((12, 12), (False, False)),
    "gate, up with biases": ((12, 12), (True, True)),
}  # fmt: skip


@pytest.mark.parametrize("data", ["none", "many", "few", "flat"])
@pytest.mark.parametrize("name", CASES)
def test_errors_are_those_of_the_samples(name: str, data: str) -> None:
    """data: more rows than inputs, fewer, or rows in a subspace (a moment without full rank)."""
    widths, biases = CASES[name]
    K = 9
    group = side_by_side(widths, K, biases, meet="gate" in name)
    assert (len(widths) > 1) == (group.kind in ("qkv", "gate_up"))
    X = {
        "none": None,
        "many": samples(200, K, offset=1.0),
        "few": samples(5, K, offset=1.0),
        "flat": samples(200, K, rank=3),
    }[data]
    statistics = None if X is None else Statistics({s.name: seen(X) for s in group.sites})
    W = np.concatenate([normal(K, n, seed=i, dtype=np.float64) for i, n in enumerate(widths)], axis=1)
    errors, at = found_for(group, statistics)
    centred = X is not None and all(biases)
    wanted = explicit(W, X, centred)
    assert len(errors) == min(W.shape) + 1
    # a squared spectrum ends at the root of rounding; a moment without full rank is raised to 1e-10 of its largest eigenvalue
    room = 3e-5 if data in ("few", "flat") else 1e-6
    np.testing.assert_allclose(errors, wanted, atol=room, rtol=0)
    np.testing.assert_allclose(errors[wanted > 1e-2], wanted[wanted > 1e-2], rtol=1e-6)
    assert (errors >= wanted - CLOSE).all()  # never less than what is lost
    for rank in {1, min(W.shape) // 2 or 1, min(W.shape)}:
        made = at(rank)
        a, b = made["a"], made["b"]
        assert a.shape == (K, rank) and b.shape == (rank, W.shape[1])
        D = W - a @ b
        rows = np.eye(K) if X is None else X - (X.mean(axis=0) if centred else 0)
        total = np.sum(W**2) if X is None else np.sum((X @ W) ** 2)
        assert np.sqrt(np.sum((rows @ D) ** 2) / total) == pytest.approx(wanted[rank], abs=CLOSE)
        biased = {n for n in made if n.startswith("bias")}
        assert biased == ({f"bias.{i}" for i in range(len(widths))} if centred else set())
        if centred and X is not None:  # mean outputs stay where they are
            b_all = np.concatenate([normal(n, seed=i, dtype=np.float64) for i, n in enumerate(widths)])
            moved = np.concatenate([made[f"bias.{i}"] for i in range(len(widths))])
            np.testing.assert_allclose(
                (X @ a @ b + moved).mean(axis=0), (X @ W + b_all).mean(axis=0), atol=1e-9
            )


@given(
    K=st.integers(2, 8),
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    n=st.integers(2, 30),
)
@settings(max_examples=30, deadline=None)
def test_nobody_does_better(K: int, widths: list[int], seed: int, n: int) -> None:
    """Random products of the rank, one side fitted to the samples, and ours disturbed: none loses less."""
    if len(widths) == 2:
        widths = [*widths, 2]
    group = side_by_side(tuple(widths), K, (False,) * len(widths), seed=seed)
    X, rng = samples(n, K, seed), np.random.default_rng(seed)
    W = np.concatenate([normal(K, m, seed=seed + i, dtype=np.float64) for i, m in enumerate(widths)], axis=1)
    rank = int(rng.integers(1, min(W.shape) + 1))
    _, at = found_for(group, Statistics({s.name: seen(X) for s in group.sites}))
    made = at(rank)
    ours = np.linalg.norm(X @ (W - made["a"] @ made["b"]))
    for _ in range(20):
        b = made["b"] + rng.standard_normal(made["b"].shape) * 10.0 ** rng.uniform(-4, 0)
        coefficients = np.linalg.lstsq(b.T, (X @ W).T, rcond=None)[0].T  # the best X a for this b
        assert ours <= np.linalg.norm(X @ W - coefficients @ b) + 1e-7 * np.linalg.norm(X @ W)


# --- weights with several readers -----------------------------------------------------------------------------------


def test_shared() -> None:
    """Readers of one weight: errors of the rows of both together, each by its share."""
    nodes = [node("MatMul", ["x", "w"], ["p"], name="one"), node("MatMul", ["z", "w"], ["q"], name="two")]
    W = normal(8, 6, dtype=np.float64)
    made = model(
        nodes,
        {"x": (("n", 8), np.float64), "z": (("m", 8), np.float64)},
        {"p": np.float64, "q": np.float64},
        {"w": W},
    )
    (group,) = find(made).groups[:1]
    assert group.kind == "shared"
    X, Z = samples(300, 8), samples(100, 8, seed=5) * 3
    errors, at = found_for(group, Statistics({"one": seen(X), "two": seen(Z)}))
    both = np.concatenate([X, Z])
    np.testing.assert_allclose(errors, explicit(W, both, False), atol=1e-6, rtol=0)
    D = W - at(2)["a"] @ at(2)["b"]
    assert np.linalg.norm(both @ D) / np.linalg.norm(both @ W) == pytest.approx(errors[2], abs=CLOSE)


def test_shared_as_transpose() -> None:
    """One reads W, the other its transpose: min tr(E^T C1 E C2)."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="one"),
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["z", "t"], ["q"], name="two"),
    ]
    W = normal(8, 6, dtype=np.float64)
    made = model(
        nodes,
        {"x": (("n", 8), np.float64), "z": (("m", 6), np.float64)},
        {"p": np.float64, "q": np.float64},
        {"w": W},
    )
    (group,) = find(made).groups[:1]
    X, Z = samples(300, 8), samples(100, 6, seed=5)
    check_two_sided(group, W, np.linalg.cholesky(X.T @ X / 300), np.linalg.cholesky(Z.T @ Z / 100), Statistics({"one": seen(X), "two": seen(Z)}))  # fmt: skip


def test_tied() -> None:
    nodes = [
        node("Gather", ["w", "ids"], ["e"], name="table"),
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["z", "t"], ["q"], name="head"),
    ]
    W = normal(11, 6, dtype=np.float64)
    made = model(
        nodes,
        {"ids": (("n",), np.int64), "z": (("m", 6), np.float64)},
        {"e": np.float64, "q": np.float64},
        {"w": W},
    )
    (group,) = find(made).groups[:1]
    assert group.kind == "tied"
    share, Z = np.random.default_rng(0).dirichlet(np.ones(11)), samples(100, 6, seed=5)
    statistics = Statistics({"table": InputStatistics(50, frequencies=share), "head": seen(Z)})
    check_two_sided(group, W, np.diag(np.sqrt(share)), np.linalg.cholesky(Z.T @ Z / 100), statistics)


def check_two_sided(group: Group, W: Array, S: Array, R: Array, statistics: Statistics) -> None:
    U, sigma, Vt = np.linalg.svd(S.T @ W @ R, full_matrices=False)
    errors, at = found_for(group, statistics)
    tails = np.sqrt(np.concatenate([np.cumsum((sigma**2)[::-1])[::-1], [0.0]]) / np.sum(sigma**2))
    np.testing.assert_allclose(errors, tails, atol=1e-6, rtol=0)
    for rank in (1, 3):
        made = at(rank)
        wanted = np.linalg.solve(S.T, U[:, :rank] * sigma[:rank]) @ Vt[:rank] @ np.linalg.inv(R)
        np.testing.assert_allclose(made["a"] @ made["b"], wanted, atol=1e-7 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize(("V", "D"), [(12, 5), (5, 12)])
def test_lookup(V: int, D: int) -> None:
    """Rows by how often each is asked for: D^(1/2) W."""
    W = normal(V, D, dtype=np.float64)
    made = model(
        [node("Gather", ["w", "ids"], ["e"], name="table")],
        {"ids": (("n",), np.int64)},
        {"e": np.float64},
        {"w": W},
    )
    (group,) = find(made).groups
    share = np.random.default_rng(0).dirichlet(np.ones(V))
    share[0] = 0.0
    errors, at = found_for(group, Statistics({"table": InputStatistics(50, frequencies=share)}))
    sigma = np.linalg.svd(np.sqrt(share)[:, None] * W, compute_uv=False)
    tails = np.sqrt(np.concatenate([np.cumsum((sigma**2)[::-1])[::-1], [0.0]]) / np.sum(sigma**2))
    np.testing.assert_allclose(errors, tails, atol=1e-6, rtol=0)
    made_ = at(2)
    lost = share @ ((W - made_["a"] @ made_["b"]) ** 2).sum(axis=1) / (share @ (W**2).sum(axis=1))
    assert np.sqrt(lost) == pytest.approx(errors[2], abs=CLOSE)


# --- with reactions of the outputs ----------------------------------------------------------------------------------


def reacting(K: int, N: int, seed: int, X: Array) -> InputStatistics:
    from lrcompile.records import Reaction

    rng = np.random.default_rng((seed, K, N))
    A, B = rng.standard_normal((K, K)), rng.standard_normal((N, N))
    A, B = A @ A.T, B @ B.T + 0.1 * np.eye(N)
    return replace(seen(X), reaction=Reaction(A / np.trace(A), B, 0.3))


@pytest.mark.parametrize("name", ["alone", "alone with a bias", "wide", "q, k, v", "k without a bias"])
def test_reactions_weigh_both_sides(name: str) -> None:
    """min tr(E^T C' E G) by a decomposition of S^T W R; movements are its tails, errors those of the factors in plain moments."""
    widths, biases = CASES[name]
    K = 9
    group = side_by_side(widths, K, biases)
    X = samples(200, K, offset=0.5)
    known = {s.name: reacting(K, s.N, i, X) for i, s in enumerate(group.sites)}
    weights, statistics = new_weights(), Statistics(known)
    made = spectra.spectrum(group, weights, statistics)
    W = np.concatenate([normal(K, n, seed=i, dtype=np.float64) for i, n in enumerate(widths)], axis=1)
    moment = np.cov(X.T, bias=True) if all(biases) else X.T @ X / len(X)
    C = np.mean([0.7 * moment + 0.3 * np.trace(moment) * k.reaction.input for k in known.values()], axis=0)  # type: ignore[union-attr]
    C = C + 1e-3 * np.trace(C) / K * np.eye(K)  # the documented ridge
    G = scipy.linalg.block_diag(*(k.reaction.output for k in known.values()))  # type: ignore[union-attr]
    sigma = np.linalg.svd(np.linalg.cholesky(C).T @ W @ np.linalg.cholesky(G), compute_uv=False)
    tails = np.concatenate([np.cumsum((sigma**2)[::-1])[::-1], [0.0]])
    np.testing.assert_allclose(made["movements"], tails, atol=1e-9 * tails[0], rtol=1e-6)
    for rank in (1, 4):
        low = spectra.low_rank(group, weights, statistics, made, rank)
        E = W - low["a"] @ low["b"]
        assert np.trace(E.T @ C @ E @ G) == pytest.approx(tails[rank], rel=1e-6, abs=1e-9 * tails[0])
        error = np.sqrt(np.sum(E * (moment @ E)) / np.sum((X @ W) ** 2) * len(X))
        assert made["errors"][rank] == pytest.approx(error, abs=1e-6)
        factors = SVD.factorize(group, weights, statistics, replace_candidate(rank), 0)
        assert group_loss(group, weights, statistics, SVD.reconstruct(group, factors)) == pytest.approx(
            error, abs=1e-6
        )


def replace_candidate(rank: int) -> Any:
    from lrcompile.records import Candidate, Cost

    return Candidate("svd", rank, Cost(0, 0, 0), 0.0)
