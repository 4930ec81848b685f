"""Figures by hand: small arrays whose relative L2, SNR, cosine, KL and top-1 can be worked out on paper; NaN, Inf, strings, nothing."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.figures import Movement
from lrcompile.records import OutputEvidence
from tests.graphs import Array

NAN, INF = np.nan, np.inf
EXACT = 1e-12  # a few float64 operations


def moved(a: Array, b: Array, name: str = "y") -> Movement:
    movement = Movement(name)
    movement.add(np.asarray(a), np.asarray(b))
    return movement


def figures(a: object, b: object, name: str = "y") -> OutputEvidence:
    return moved(np.asarray(a, np.float64), np.asarray(b, np.float64), name).evidence(0.0)


def test_nothing_moved() -> None:
    known = figures([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert (known.relative_l2, known.snr_db, known.max_abs) == (0, None, 0)
    assert known.cosine == pytest.approx(1, abs=EXACT)


def test_by_hand() -> None:
    known = figures([[3, 4], [0, 5]], [[3, 4], [5, 0]])  # second row turned by 90 degrees
    assert known.relative_l2 == pytest.approx(1, abs=EXACT)  # sqrt(50 / 50)
    assert known.snr_db == pytest.approx(0, abs=EXACT)
    assert known.cosine == pytest.approx(0.5, abs=EXACT)
    assert known.max_abs == 5
    assert known.kl is None and known.top1 is None


def test_ten_decibels() -> None:
    assert figures([10.0], [10.0 - math.sqrt(10)]).snr_db == pytest.approx(10, abs=1e-9)
    assert figures([10.0, 0], [9.0, 0]).relative_l2 == pytest.approx(0.1, abs=EXACT)


def test_the_sign_counts() -> None:
    known = figures([[1, 2]], [[-1, -2]])
    assert known.cosine == pytest.approx(-1, abs=EXACT) and known.relative_l2 == pytest.approx(2, abs=EXACT)


def test_scaling_moves_no_cosine_but_everything_else() -> None:
    known = figures([[1, 2]], [[2, 4]])
    assert known.cosine == pytest.approx(1, abs=EXACT) and known.relative_l2 == pytest.approx(1, abs=EXACT)


def test_rows_of_zeros() -> None:
    assert figures([[0, 0], [1, 0]], [[0, 0], [1, 0]]).cosine == 1
    assert (
        figures([[0, 0], [1, 0]], [[0, 1], [1, 0]]).cosine == 0.5
    )  # a row that was nothing has become something
    lost = figures([[0.0, 0.0]], [[0, 1e-9]])
    assert lost.relative_l2 == INF and lost.snr_db == -INF


def test_scalars_and_vectors_are_one_row() -> None:
    assert moved(np.float64(2.0), np.float64(-2.0)).evidence(0).cosine == -1
    assert moved(np.array([3.0, 4.0]), np.array([4.0, 3.0])).evidence(0).cosine == pytest.approx(
        24 / 25, abs=EXACT
    )
    assert moved(np.ones((2, 3, 4)), np.ones((2, 3, 4))).rows == 6


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_feeds_add_up(shape: list[int], seed: int, parts: int) -> None:
    """Feed by feed or all at once: the same figures."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, parts, *shape, 3))
    streamed = Movement("logits")
    for x, y in zip(a, b, strict=True):
        streamed.add(x, y)
    whole, piecewise = moved(a, b, "logits").evidence(0), streamed.evidence(0)
    for name in ("relative_l2", "snr_db", "cosine", "max_abs", "kl", "top1"):
        assert getattr(piecewise, name) == pytest.approx(getattr(whole, name), rel=1e-10)
    assert whole.relative_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-10)


# --- logits -------------------------------------------------------------------------------------------------------


def test_kl_and_top1_by_hand() -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    known = figures([np.log(p), np.log(q)], [np.log(q), np.log(q)], "my.Logits")
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert known.kl == pytest.approx(wanted / 2, abs=EXACT)  # the second row did not move
    assert known.top1 == 0.5  # of two equal entries the first is the largest
    assert figures([[0.0, 1, 2]], [[100.0, 101, 102]], "logits").kl == pytest.approx(
        0, abs=1e-10
    )  # a shift changes no probability


def test_kl_does_not_overflow() -> None:
    known = figures([[1000.0, 0.0]], [[0.0, 1000.0]], "logits")
    assert known.kl == pytest.approx(1000, abs=1e-9) and known.top1 == 0
    assert known.kl >= 0


def test_only_logits_have_kl() -> None:
    assert figures([[1.0, 2]], [[1.0, 2]], "hidden").kl is None


# --- what is not finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_finite_number_became_something_else(bad: float) -> None:
    movement = moved([1.0, 2.0], [1.0, bad])
    assert movement.problem == "NaN or infinite values where the original's are finite"


@pytest.mark.parametrize(
    ("a", "b", "drift"),
    [
        (NAN, NAN, False),
        (INF, INF, False),
        (INF, -INF, True),
        (INF, NAN, True),
        (NAN, 1.0, True),
        (INF, 1.0, True),
    ],
)
def test_the_original_is_not_finite_there(a: float, b: float, drift: bool) -> None:
    movement = moved([1.0, a], [1.0, b])
    assert (movement.drift, movement.problem) == (drift, "")
    assert movement.evidence(0).relative_l2 == 0 and movement.count == 2
    assert moved([1.0, a], [1.5, b]).largest == 0.5  # the rest is compared all the same


def test_nan_in_logits_is_left_out() -> None:
    known = figures([[NAN, 1.0, 2.0]], [[NAN, 1.0, 2.0]], "logits")
    assert known.kl == 0 and known.top1 == 1 and known.cosine == pytest.approx(1, abs=EXACT)


# --- other types, other shapes, nothing ---------------------------------------------------------------------------


def test_shapes_must_be_the_same() -> None:
    movement = moved(np.ones((2, 3)), np.ones((3, 2)))
    assert movement.problem == "shape (3, 2) instead of (2, 3)" and movement.count == 0
    assert moved(np.ones((2, 1)), np.ones((2,))).problem  # no broadcasting


def test_types_must_be_the_same() -> None:
    assert moved(np.ones(2, np.float32), np.ones(2, np.float64)).problem == "type float64 instead of float32"
    assert moved(np.ones(2, np.int64), np.ones(2, np.float32)).problem == "type float32 instead of int64"


def test_strings() -> None:
    a = np.array(["x", "y"], object)
    assert moved(a, a.copy()).problem == "" and moved(a, a.copy()).count == 2
    assert moved(a, np.array(["x", "z"], object)).problem == "strings differ"
    assert moved(np.array(["x", "yy"]), np.array(["x", "yyy"])).problem == "strings differ"
    assert moved(np.array(["x"]), np.array(["xx"])).problem == "strings differ"


def test_nothing_at_all() -> None:
    movement = moved(np.zeros((0, 4)), np.zeros((0, 4)))
    assert (movement.count, movement.problem) == (0, "")
    known = movement.evidence(0.5)
    assert (known.relative_l2, known.snr_db, known.cosine, known.max_abs, known.noise_floor) == (
        0,
        None,
        1.0,
        0,
        0.5,
    )
    assert moved(np.zeros((2, 0)), np.zeros((2, 0))).count == 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.uint64, np.bool_])
def test_narrow_types_are_widened(dtype: type) -> None:
    a, b = np.array([[1, 0], [1, 1]]).astype(dtype), np.array([[1, 0], [1, 0]]).astype(dtype)
    assert moved(a, b).evidence(0).max_abs == 1
    assert moved(a, b).evidence(0).relative_l2 == pytest.approx(1 / math.sqrt(3), abs=EXACT)


def test_float16_sums_do_not_overflow() -> None:
    a = np.full((4, 100), 60000, np.float16)
    assert moved(a, (a / 2).astype(np.float16)).evidence(0).relative_l2 == pytest.approx(0.5, abs=1e-3)


def test_complex() -> None:
    known = moved(np.array([[3 + 4j]]), np.array([[3 - 4j]])).evidence(0)
    assert known.relative_l2 == pytest.approx(8 / 5, abs=EXACT) and known.max_abs == 8


@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_of_all_feeds(order: int) -> None:
    """Whichever feed comes last: the peak steers what is allowed, the largest difference is what is judged."""
    movement = Movement("y")
    for a, b in [(5.0, 5.5), (-1.0, -1.0)][::order]:
        movement.add(np.array([a]), np.array([b]))
    assert (movement.peak, movement.largest, movement.count) == (5.0, 0.5, 2)


def test_resolution() -> None:
    movement = moved(np.array([3.0, -8.0]), np.array([3.0, -8.0]))
    movement.eps = 0.25
    assert movement.resolution == 2.0
