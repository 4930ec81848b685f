"""Few bits: types, rounding, feedback, corrections. Oracles by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.interfaces import Array
from lrcompile.quantize import alternating, correction, fed_back, loss, names, plain, searched, storage, sweep
from lrcompile.quantize.codebook import kmeans, kmeans_pairs
from lrcompile.quantize.feedback import damped
from lrcompile.quantize.rounding import Coded

FEW = settings(max_examples=6, deadline=None)
NAMES = names()
KINDS = (
    "int8",
    "int4",
    "uint4-16s8",
    "int3",
    "uint2",
    "float8",
    "nf4",
    "ternary",
    "sign",
    "kmeans4",
    "tensor4",
)


def weight(K: int, N: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((K, N))


def moment(K: int, seed: int, samples: int = 400) -> Array:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((samples, K)) @ rng.standard_normal((K, K)) + 1.0
    return X.T @ X / samples


def hostile() -> dict[str, Array]:
    W = weight(50, 7, 0)
    outlier, holes, tiny = W.copy(), W.copy(), 1e-9 * W
    outlier[3, 2] = 1e6
    holes[:, ::2] = 0.0
    return {
        "not divisible": W, "outlier": outlier, "zero columns": holes, "tiny": tiny, "zero": 0 * W,
        "constant": np.full((50, 7), 0.3), "negative": -np.abs(W) - 1, "one column": W[:, :1], "one row": W[:1],
    }  # fmt: skip


@pytest.mark.parametrize("case", sorted(hostile()))
@pytest.mark.parametrize("name", NAMES)
def test_hostile_weights(name: str, case: str) -> None:
    """Finite, codes inside their bits, and no number moved by more than the largest of its column's (of signs: twice)."""
    W, kind = hostile()[case], storage(name)
    C = moment(len(W), 1)
    for made in (
        plain(W, kind),
        searched(W, kind),
        fed_back(W, C, kind),
        sweep(W, C, fed_back(W, C, kind), 1),
    ):
        assert made.codes.shape == W.shape
        assert np.isfinite(made.values).all()
        low, high = (kind.low, kind.high) if made.levels is None else (0, len(made.levels) - 1)
        assert made.codes.min() >= low and made.codes.max() <= high
    if not kind.whole and case != "outlier":
        rounded = plain(W, kind).values
        assert (np.abs(W - rounded).max(axis=0) <= 2 * np.abs(W).max(axis=0) + 1e-12).all()
    if case in ("zero", "zero columns") and not kind.whole and name != "sign":
        # levels without a zero among them decode to the least scale there is, 1e-30
        assert np.abs(plain(W, kind).values[:, ::2]).max() <= 1e-20


@given(
    K=st.integers(1, 70),
    N=st.integers(1, 5),
    seed=st.integers(0, 99),
    name=st.sampled_from(("int8", "int4", "int3-64", "uint4-16")),
)
@FEW
def test_plain_rounding_moves_half_a_step(K: int, N: int, seed: int, name: str) -> None:
    W, kind = weight(K, N, seed), storage(name + "s32")
    made = plain(W, kind)
    # an asymmetric range is cut where its zero point is rounded: a whole step
    steps = 1.0 if kind.zero_points else 0.5
    scales = np.repeat(made.scales, kind.group or K, axis=0)[:K]
    assert (np.abs(W - made.values) <= steps * scales * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", [*NAMES, "int4-64s16", "uint3-128s32"])
def test_bits_are_counted_by_hand(name: str) -> None:
    K, N = 100, 6
    kind = storage(name)
    made = plain(weight(K, N, 0), kind)
    scales = {"float32": 32, "float16": 16, "float8": 8}[kind.scale]
    bits = K * N * kind.bits + (1 if kind.whole else made.scales.size) * scales
    bits += made.zeros.size * kind.bits if made.zeros is not None else 0
    bits += 32 if kind.scale == "float8" else 0
    bits += 32 * len(made.levels) if kind.fitted and made.levels is not None else 0
    assert made.bits == bits
    assert kind.bits_per_number(K, N) == pytest.approx(bits / (K * N))


def test_names_mean_types() -> None:
    made = storage("uint4-64s8")
    assert (made.bits, made.group, made.zero_points, made.scale) == (4, 64, True, "float8")
    assert storage("int4-64s32").signed and not storage("int4-64s32+").signed
    for wrong in ("int5", "int4-", "int4s7", "", "INT4", "int8+", "uint4+", "nf4+", "+"):
        with pytest.raises(KeyError):
            storage(wrong)


@pytest.mark.parametrize("name", ("int4", "uint4", "int3", "int2", "uint2", "ternary", "int4-16s8"))
@given(seed=st.integers(0, 99))
@FEW
def test_a_search_never_loses_to_plain_scales(name: str, seed: int) -> None:
    W, kind = weight(64, 5, seed), storage(name)
    rows = np.random.default_rng(seed).uniform(0.1, 3.0, 64)
    lost = [
        float(np.sum(rows[:, None] * np.square(W - m.values)))
        for m in (plain(W, kind), searched(W, kind, rows))
    ]
    assert lost[1] <= lost[0] * (1 + 1e-9)


@pytest.mark.parametrize("name", ("int4-32s32", "int3-64", "int2s16"))
def test_scales_are_positive_where_the_name_says_so(name: str) -> None:
    """And negative ones, where they may be, lose less: that is what they are for."""
    W, C = weight(96, 12, 2), moment(96, 3)
    signed, positive = storage(name), storage(f"{name}+")
    for round_ in (lambda kind: searched(W, kind), lambda kind: sweep(W, C, fed_back(W, C, kind), 2)):
        assert (round_(positive).scales > 0).all()
        assert (round_(signed).scales < 0).any()
    lost = [np.linalg.norm(W - searched(W, kind).values) for kind in (signed, positive)]
    assert lost[0] < lost[1]
    assert signed.size(96, 12) == positive.size(96, 12)


def fed_back_by_hand(W: Array, H: Array, start: Coded) -> Array:
    """The textbook: eliminate one row after another from the inverse."""
    order = np.argsort(-np.diagonal(H), kind="stable")
    work, inverse = W[order].copy(), np.linalg.inv(H[np.ix_(order, order)])
    made = np.zeros_like(W)
    for i in range(len(W)):
        value = start.row(order[i], work[i])[1]
        made[order[i]] = value
        e = (work[i] - value) / inverse[i, i]
        work -= inverse[:, i : i + 1] * e
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return made


@pytest.mark.parametrize("name", ("int8", "int4", "uint3", "nf4", "kmeans2", "tensor4"))
def test_feedback_is_the_textbook_one(name: str) -> None:
    W, C = weight(90, 4, 3), moment(90, 4)
    made = fed_back(W, C, storage(name))
    np.testing.assert_allclose(made.values, fed_back_by_hand(W, damped(C), made), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_feedback_and_sweeps_lose_less(name: str) -> None:
    """A sweep never loses more than what it starts from; feedback, a greedy pass, loses less in all than rounding by itself."""
    kind, rounded, fed = storage(name), 0.0, 0.0
    for seed in range(6):
        W, C = weight(48, 6, seed), moment(48, seed + 1)
        H, first = damped(C), fed_back(W, C, kind)
        lost = loss(W, H, first.values)
        assert loss(W, H, sweep(W, C, first).values) <= lost
        rounded, fed = rounded + loss(W, H, searched(W, kind, np.diagonal(C)).values), fed + lost
    assert fed < rounded


def test_feedback_without_correlations_rounds_to_nearest() -> None:
    W = weight(40, 3, 0)
    made = fed_back(W, np.eye(40), storage("int4"))
    np.testing.assert_array_equal(made.codes, searched(W, storage("int4")).codes)


def test_a_sweep_reaches_what_no_single_code_can_better() -> None:
    """Coordinate descent ends where changing any one code makes it worse."""
    W, C = weight(12, 2, 5), moment(12, 6)
    kind = storage("int3")
    made = sweep(W, C, fed_back(W, C, kind), 30)
    H = damped(C)
    least = loss(W, H, made.values)
    for i in range(12):
        for j in range(2):
            for code in range(kind.low, kind.high + 1):
                codes = made.codes.copy()
                codes[i, j] = code
                assert loss(W, H, Coded(kind, codes, made.scales).values) >= least * (1 - 1e-12)


def test_exact_correction_is_the_whitened_optimum() -> None:
    E, C = weight(20, 9, 1), moment(20, 2)
    S = np.linalg.cholesky(C)
    left = np.linalg.svd(S.T @ E, compute_uv=False)[3:] ** 2
    lost = {}
    for kind in ("plain", "scaled", "exact"):
        A, B = correction(E, C, 3, kind)
        lost[kind] = loss(E, C, A @ B)
    assert lost["exact"] == pytest.approx(float(left.sum()), rel=1e-9)
    assert lost["exact"] < min(lost["plain"], lost["scaled"])
    with pytest.raises(KeyError):
        correction(E, C, 3, "other")


@pytest.mark.parametrize("shape", ((20, 9), (9, 20)))
def test_a_two_sided_correction_is_the_optimum_too(shape: tuple[int, int]) -> None:
    """tr((E - A B)^T C (E - A B) G): what is left are the smallest singular values of S^T E R, whichever side is the shorter."""
    E, C, G = weight(*shape, 1), moment(shape[0], 2), moment(shape[1], 3)
    S, R = np.linalg.cholesky(C), np.linalg.cholesky(G)
    energy = np.linalg.svd(S.T @ E @ R, compute_uv=False) ** 2
    for rank in (1, 4, 9):
        left = E - np.matmul(*correction(E, C, rank, G=G))
        assert float(np.vdot(C @ left, left @ G)) == pytest.approx(
            float(energy[rank:].sum()), rel=1e-8, abs=1e-9 * energy.sum()
        )
    with pytest.raises(np.linalg.LinAlgError):
        correction(E, C, 2, G=-G)


def test_no_search_finds_a_better_correction() -> None:
    """Brute force: a minimizer over A and B, from many starts, ends no lower, and in one of them as low."""
    E, C, rank = weight(5, 4, 1), moment(5, 2), 2
    best = loss(E, C, np.matmul(*correction(E, C, rank)))

    def lost(x: Array) -> float:
        return loss(E, C, x[:10].reshape(5, rank) @ x[10:].reshape(rank, 4))

    rng = np.random.default_rng(0)
    found = min(scipy.optimize.minimize(lost, rng.standard_normal(18), method="BFGS").fun for _ in range(8))
    assert found == pytest.approx(best, rel=1e-5)


@given(
    K=st.integers(2, 24),
    N=st.integers(1, 24),
    seed=st.integers(0, 99),
    kind=st.sampled_from(("plain", "scaled", "exact")),
)
@FEW
def test_a_higher_rank_never_loses_more(K: int, N: int, seed: int, kind: str) -> None:
    """By what the kind makes small: the weight itself, its rows scaled, or the product."""
    E, C = weight(K, N, seed), moment(K, seed + 1)
    by = {"plain": np.eye(K), "scaled": np.diag(np.diagonal(C)), "exact": C}[kind]
    curve = [loss(E, by, np.matmul(*correction(E, C, r, kind))) for r in range(1, min(K, N) + 1)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(curve))
    assert curve[-1] <= 1e-9 * loss(E, by, 0 * E)


def test_alternating_is_no_worse_than_once() -> None:
    W, C = weight(40, 12, 1), moment(40, 2)

    def rounds(X: Array) -> Array:
        return fed_back(X, C, storage("int3")).values

    lost = []
    for times in (1, 3):
        made, A, B = alternating(W, C, 4, rounds, times)
        lost.append(loss(W, C, made + A @ B))
    assert lost[1] <= lost[0]


def test_kmeans_holds_still_at_its_means() -> None:
    x = np.random.default_rng(0).standard_normal(500)
    levels = kmeans(x, 4, steps=500)
    near = np.abs(x[:, None] - levels).argmin(axis=1)
    np.testing.assert_allclose([x[near == i].mean() for i in range(4)], levels, atol=1e-12)
    assert kmeans(np.array([1.0, 1.0, 1.0]), 4).tolist() == [1.0] * 4


def test_pairs_are_at_their_nearest_centroid() -> None:
    rng = np.random.default_rng(0)
    U, V = rng.standard_normal((2, 30, 5))
    centroids, codes = kmeans_pairs(U, V, 16, 0)
    d = np.square(U[..., None] - centroids[:, 0]) + np.square(V[..., None] - centroids[:, 1])
    np.testing.assert_array_equal(codes, d.argmin(axis=-1))
    assert float(np.mean(d.min(axis=-1))) < 0.35  # of 2.0: two bits a number leave 0.12 each
