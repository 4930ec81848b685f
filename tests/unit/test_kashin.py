"""Kashin's decomposition and fast orthogonal matrices."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.interfaces import Array
from lrcompile.quantize import kashin, loss, orthogonal, pairs, storage
from lrcompile.quantize.orthogonal import KINDS, sizes_of


@pytest.mark.parametrize("kind", KINDS)
@given(K=st.integers(1, 200), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_fast_matrices_are_orthogonal_products(kind: str, K: int, seed: int) -> None:
    q = orthogonal(K, kind, seed)
    dense = np.diag(q.signs) @ functools.reduce(np.kron, q.factors)
    X = np.random.default_rng(seed).standard_normal((3, K))
    np.testing.assert_allclose(q.apply(X), X @ dense, atol=1e-10)
    np.testing.assert_allclose(q.apply_transposed(q.apply(X)), X, atol=1e-10)
    np.testing.assert_allclose(dense.T @ dense, np.eye(K), atol=1e-10)


def test_products_are_cheap() -> None:
    assert sizes_of(384) == (16, 24)
    assert sizes_of(1536) == (32, 48)
    assert sizes_of(67) == (67,)
    assert orthogonal(1536, "hadamard", 0).macs < 1536 * 64
    with pytest.raises(KeyError):
        orthogonal(8, "fft", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("two_sided", (False, True))
def test_greedy_steps_converge_to_spread_out_factors(kind: str, two_sided: bool) -> None:
    W = np.random.default_rng(0).standard_t(3, (64, 48))
    made = kashin.decompose(
        W,
        orthogonal(64, kind, 0),
        orthogonal(48, kind, 1) if two_sided else None,
        by_column=not two_sided,
        tolerance=1e-5,
    )
    left = float(np.linalg.norm(W - made.values) / np.linalg.norm(W))
    assert left == pytest.approx(made.residual, rel=1e-6)
    assert made.residual <= 1e-5 and 0 < made.rate < 1
    assert made.rate**made.steps == pytest.approx(made.residual)
    # of heavy tails the largest entry stands 25 times above the rest: in the factors it does not
    assert max(made.peaks) < 4 < np.abs(W).max() / W.std()


def test_a_step_lowers_the_residual_by_the_stated_factor() -> None:
    W, q = np.random.default_rng(1).standard_normal((32, 16)), orthogonal(32, "random", 0)
    l1 = np.maximum(np.abs(W).sum(axis=0), np.abs(kashin.rotated(W, q, None)).sum(axis=0))
    expected = 1 - np.sum(l1**2 / 32) / np.linalg.norm(W) ** 2
    assert kashin.decompose(W, q, by_column=True, steps=1).residual ** 2 == pytest.approx(expected)
    right = orthogonal(16, "random", 1)
    whole = max(np.abs(W).sum(), np.abs(kashin.rotated(W, q, right)).sum())
    expected = 1 - whole**2 / (W.size * np.linalg.norm(W) ** 2)
    assert kashin.decompose(W, q, right, steps=1).residual ** 2 == pytest.approx(expected)


def test_it_stops() -> None:
    q = orthogonal(8, "hadamard", 0)
    assert kashin.decompose(np.zeros((8, 2)), q).steps == 0
    assert kashin.decompose(np.ones((8, 2)), q, steps=3, tolerance=0.0).steps <= 3


def test_four_steps_have_four_levels_a_column() -> None:
    W, q = np.random.default_rng(2).standard_normal((64, 5)), orthogonal(64, "dct", 0)
    made, u, v = kashin.four_steps(W, q)
    for X, sizes in ((made.U, u), (made.V, v)):
        for j in range(5):
            levels = {round(s * sizes[0, j] + t * sizes[1, j], 9) for s in (1, -1) for t in (1, -1)}
            assert {round(x, 9) for x in X[:, j]} <= levels
    assert made.residual == pytest.approx(0.132, abs=0.03)  # (1 - 2 / pi)^2


@pytest.mark.parametrize(
    "rounds",
    (kashin.to_kmeans(4), kashin.column_levels, kashin.to_uniform(4)),
    ids=("kmeans", "columns", "uniform"),
)
def test_refits_never_lose(rounds: kashin.Rounds) -> None:
    W, q = np.random.default_rng(3).standard_normal((64, 24)), orthogonal(64, "hadamard", 0)
    start = kashin.four_steps(W, q)[0]
    once, often = (kashin.refitted(W, start, rounds, rounds, n).residual for n in (0, 6))
    assert often <= once
    assert often < 0.16
    for X in (often, once):
        assert X > 0.05  # four bits in all: below that something is counted wrongly


def test_column_levels_are_found_again() -> None:
    rng = np.random.default_rng(4)
    c = np.array([[1.0, 2.0], [0.3, 0.5]])
    X = rng.choice((-1.0, 1.0), (200, 2)) * c[0] + rng.choice((-1.0, 1.0), (200, 2)) * c[1]
    np.testing.assert_allclose(kashin.column_levels(X, 40), X, atol=1e-12)


def test_joint_codes_name_a_pair() -> None:
    W, q = np.random.default_rng(5).standard_normal((64, 24)), orthogonal(64, "random", 0)
    start = kashin.decompose(W, q)
    made, centroids, codes = kashin.joint(W, start, 16, 0)
    np.testing.assert_array_equal(np.stack([made.U, made.V], axis=-1), centroids[codes])
    assert made.residual < 0.2


# --- refits that see the data ---------------------------------------------------------------------------------------


def moment(K: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((200, K)) @ rng.standard_normal((K, K)) + 1.0
    return X.T @ X / 200


def hostile() -> dict[str, Array]:
    W = np.random.default_rng(0).standard_normal((30, 5))
    outlier, holes = W.copy(), W.copy()
    outlier[3, 2], holes[:, ::2] = 1e4, 0.0
    return {
        "outlier": outlier, "zero columns": holes, "zero": 0 * W, "constant": np.full((30, 5), 0.3), "one column": W[:, :1], "prime": W[:29],
        "one row": W[:1],
    }  # fmt: skip


@pytest.mark.parametrize("name", ("quarters", "int4-0s32"))
def test_refits_that_see_the_data_lower_the_error_of_the_product(name: str) -> None:
    W, C, q = np.random.default_rng(3).standard_normal((48, 20)), moment(48, 1), orthogonal(48, "random", 0)
    start, kind = kashin.four_steps(W, q)[0], storage(name)

    def made(weighed: Array | None, times: int) -> Array:
        u, v = kashin.refitted_codes(W, start, kind, weighed, times)
        return u.values + kashin.rotated_back(v.values, q, None)

    plain, seeing = made(None, 4), made(C, 4)
    assert loss(W, C, seeing) < 0.8 * loss(W, C, plain)
    assert np.linalg.norm(W - plain) < np.linalg.norm(W - seeing)  # each is the better one by its own measure
    assert np.linalg.norm(W - plain) <= np.linalg.norm(W - made(None, 0))


@pytest.mark.parametrize("free", (True, False))
def test_pairs_are_refitted(free: bool) -> None:
    """Each turn loses no more, and far less is left than of k-means alone."""
    W, C, q = np.random.default_rng(4).standard_normal((48, 20)), moment(48, 2), orthogonal(48, "hadamard", 0)
    scales = pairs.scales_of(W)
    start = kashin.decompose(W / scales, q)
    made = pairs.free_pairs(start, scales, 16, 0) if free else pairs.all_pairs(start, scales, 4)
    curve = [loss(W, C, made.values)]
    for _ in range(4):
        made = pairs.refitted_pairs(W, C, made, 1)
        curve.append(loss(W, C, made.values))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(curve))
    assert curve[-1] < 0.6 * curve[0]
    assert len(made.levels) == 16
    np.testing.assert_allclose(
        made.values / made.scales,
        made.levels[made.codes][..., 0] + kashin.rotated_back(made.levels[made.codes][..., 1], q, None),
        atol=1e-12,
    )


def test_no_single_code_can_better_refitted_pairs() -> None:
    """Brute force: of all codes at all places, once the turns changed nothing any more."""
    W, C, q = np.random.default_rng(5).standard_normal((8, 2)), moment(8, 3), orthogonal(8, "random", 0)
    made = pairs.refitted_pairs(W, C, pairs.free_pairs(kashin.decompose(W, q), np.ones(2), 4, 0), 40)
    least = loss(W, C, made.values)
    for i, j, code in itertools.product(range(8), range(2), range(4)):
        codes = made.codes.copy()
        codes[i, j] = code
        assert loss(W, C, replace(made, codes=codes).values) >= least * (1 - 1e-9)


def test_levels_are_the_least_squares_ones() -> None:
    W, C, q = np.random.default_rng(6).standard_normal((12, 3)), moment(12, 4), orthogonal(12, "random", 0)
    start = pairs.all_pairs(kashin.decompose(W, q), np.array([0.5, 1.0, 2.0]), 3)
    made = pairs._with_better_levels(W, C, start)
    S = np.linalg.cholesky(C).T
    where = [(start.u[start.codes] == k) * start.scales for k in range(3)]
    where += [kashin.rotated_back((start.v[start.codes] == k) * start.scales, q, None) for k in range(3)]
    columns = [S @ X for X in where]
    A = np.stack([c.ravel() for c in columns], axis=1)
    best = np.linalg.lstsq(A, (S @ W).ravel(), rcond=None)[0]
    np.testing.assert_allclose(np.concatenate([made.a, made.b]), best, atol=1e-6)


@pytest.mark.parametrize("case", sorted(hostile()))
def test_hostile_weights(case: str) -> None:
    """Finite, and nothing lost beside k-means or the four steps."""
    W = hostile()[case]
    K = len(W)
    C, q = moment(K, 5), orthogonal(K, "random", 0)
    scales = pairs.scales_of(W)
    for start in (kashin.decompose(W / scales, q, steps=30), kashin.four_steps(W, q)[0]):
        for made in (pairs.free_pairs(start, scales, 16, 0), pairs.all_pairs(start, scales, 3)):
            refitted = pairs.refitted_pairs(W, C, made, 2)
            assert np.isfinite(refitted.values).all() and np.isfinite(refitted.levels).all()
            assert loss(W, C, refitted.values) <= loss(W, C, made.values) * (1 + 1e-9) + 1e-12
        for name in ("quarters", "int4-0s32"):
            for codes in kashin.refitted_codes(W, start, storage(name), C, 2):
                assert np.isfinite(codes.values).all()
