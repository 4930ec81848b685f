"""Verification's policy: strict about names, shapes, types and NaN; the rule of the first question; every limit of the second.

Engines are stubs that return what they are told: the policy is tested, no runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lrcompile.errors import UsageError, VerificationError
from lrcompile.feeds import Feeds
from lrcompile.records import Evidence, Limit, OutputEvidence
from lrcompile.verify import (
    Noise,
    check_rewrite,
    compare,
    differences,
    judge,
    measure,
    noise_of,
    parse_limits,
)
from tests.graphs import Array

Outputs = Mapping[str, Any]


class Says:
    """An engine that gives these outputs, or what a function makes of each feed."""

    def __init__(self, outputs: Outputs | Callable[[Mapping[str, Array]], Outputs]) -> None:
        self.outputs = outputs
        self.ran = 0

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.ran += 1
        made = self.outputs(feeds) if callable(self.outputs) else self.outputs
        return {n: np.asarray(a) for n, a in made.items()}

    def describe(self) -> dict[str, str]:
        return {}

    def close(self) -> None: ...

    def __enter__(self) -> Says:
        return self

    def __exit__(self, *exc: object) -> None: ...


class Engines:
    """A child in which a model file is one of the stubs; optimisations off may be another."""

    def __init__(self, **engines: Says) -> None:
        self.engines = engines

    def build(self, target: str, path: Path, options: Any) -> Says:
        return self.engines[path.name if options.optimize else f"{path.name}_plain"]


ONE = [{"x": np.zeros(1, np.float32)}]
TWO = [{"x": np.full(1, i, np.float32)} for i in (1, 2)]
SILENT = Noise({}, {})


def feeds(data: Sequence[Mapping[str, Array]] = ONE) -> Feeds:
    return Feeds(lambda: data, len(data), "key", "somewhere")


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


# --- comparing ----------------------------------------------------------------------------------------------------


def test_both_run_on_every_feed() -> None:
    a, b = Says(lambda f: {"y": f["x"]}), Says(lambda f: {"y": 2 * f["x"]})
    policy = compare(a, b, iter(TWO))  # an iterator, too: read once
    assert (a.ran, b.ran) == (2, 2)
    assert policy.movements["y"].difference == 1 + 4 and policy.movements["y"].count == 2


@pytest.mark.parametrize("names", [("z",), (), ("y", "z"), ("Y",)])
def test_names_must_match(names: tuple[str, ...]) -> None:
    """Polygraphy would pair outputs of other names by position."""
    policy = compare(Says({"y": f32(1)}), Says(dict.fromkeys(names, f32(1))), ONE)
    assert policy.failures and "output names differ" in policy.failures[0]
    assert measure(Says({"y": f32(1)}), Says(dict.fromkeys(names, f32(1))), feeds(), None).failures


def test_the_order_of_outputs_does_not_matter() -> None:
    a, b = Says({"y": f32(1), "z": f32(2)}), Says({"z": f32(2), "y": f32(1)})
    assert not differences(a, b, SILENT, ONE, "it")


@pytest.mark.parametrize(
    ("outputs", "data"),
    [({"y": f32()}, ONE), ({}, ONE), ({"y": f32(1)}, []), ({"y": np.zeros((0, 4), np.float32)}, TWO)],
)
def test_an_empty_comparison_is_no_pass(outputs: Outputs, data: list[Mapping[str, Array]]) -> None:
    with pytest.raises(VerificationError, match="nothing was compared"):
        compare(Says(outputs), Says(outputs), data)


def test_one_empty_output_beside_another_is_legal() -> None:
    outputs = {"past": np.zeros((1, 2, 0, 4), np.float32), "y": f32(1)}
    assert not differences(Says(outputs), Says(outputs), SILENT, ONE, "it")


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16])
def test_types_that_polygraphy_does_not_know(dtype: Any) -> None:
    a, b = np.array([1, 2]).astype(dtype), np.array([1, 2.5]).astype(dtype)
    policy = compare(Says({"y": a}), Says({"y": b}), ONE)
    assert policy.movements["y"].largest == 0.5
    assert policy.movements["y"].eps == float(ml_dtypes.finfo(dtype).eps)


# --- the first question -------------------------------------------------------------------------------------------


def wrong(a: Any, b: Any, noise: Noise = SILENT) -> tuple[str, ...]:
    return differences(Says({"y": a}), Says({"y": b}), noise, ONE, "the oracle")


def test_the_rule() -> None:
    """max|a - b| <= max(10 noise, 1e-5 max|a| + 1e-6), in float64 to keep the numbers of the test exact."""
    a = np.array([100.0, 0.0])
    assert not wrong(a, a + np.array([0, 1.0009e-3]))
    (sentence,) = wrong(a, a + np.array([0, 1.0011e-3]))
    assert sentence.startswith("output 'y' differs by 1.001e-03 from the oracle, 1.001e-03 is allowed")
    assert not wrong(np.zeros(2), np.array([0, 0.9e-6])) and wrong(np.zeros(2), np.array([0, 1.1e-6]))
    loud = Noise({"y": 0.5}, {"y": 0.1})
    assert not wrong(a, a + 4.9, loud) and wrong(a, a + 5.1, loud)
    assert wrong(a, a + 4.9, Noise({"z": 0.5}, {}))  # another output's noise is no excuse


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_noise_excuses_nan(bad: float) -> None:
    assert wrong(f32(1, 2), f32(1, bad), Noise({"y": 1e9}, {})) == (
        "output 'y': NaN or infinite values where the original's are finite",
    )
    assert wrong(f32(1, bad), f32(1, 3), Noise({"y": 1e9}, {}))  # nor that it went away
    assert not wrong(f32(1, bad), f32(1, bad))
    drifting = Noise({}, {}, frozenset({"y"}))  # the original's own NaN moves between runs of itself
    assert not wrong(f32(1, bad), f32(1, 3), drifting)
    assert wrong(f32(1, bad), f32(7, bad), drifting)  # what is finite is compared all the same


def test_shapes_types_and_strings() -> None:
    assert wrong(f32(1, 2), f32(1)) == ("output 'y': shape (1,) instead of (2,)",)
    assert wrong(f32(1), np.array([1.0])) == ("output 'y': type float64 instead of float32",)
    assert wrong(np.array(["a"], object), np.array(["b"], object)) == ("output 'y': strings differ",)
    assert not wrong(np.array(["a"], object), np.array(["a"], object))
    assert wrong(np.array([1, 2]), np.array([1, 3]))  # integers: a difference of one
    assert wrong(np.array([True]), np.array([False]))


def test_every_output_is_named() -> None:
    a, b = Says({"y": f32(1), "z": f32(1)}), Says({"y": f32(2), "z": f32(3)})
    assert [s[:10] for s in differences(a, b, SILENT, ONE, "it")] == ["output 'y'", "output 'z'"]


def test_one_bad_feed_among_many() -> None:
    good = Says(lambda f: {"y": f["x"]})
    bad = Says(lambda f: {"y": f["x"] + (f["x"] == 2) * 0.1})
    assert differences(good, bad, SILENT, TWO, "it")


def test_check_rewrite_builds_both_files() -> None:
    engines = Engines(oracle=Says({"y": f32(1)}), lowered=Says({"y": f32(1.1)}))
    found = check_rewrite(engines, "t", Path("oracle"), Path("lowered"), SILENT, ONE)  # type: ignore[arg-type]
    assert len(found) == 1 and "the original with reconstructed weights" in found[0]


# --- the noise floor ----------------------------------------------------------------------------------------------


def noise(plain: Array, jittered: Array | None, a: Array) -> Noise:
    engines = {"model": Says({"y": a}), "model_plain": Says({"y": plain})}
    if jittered is not None:
        engines["shaken"] = Says({"y": jittered})
    return noise_of(
        Engines(**engines), "t", Path("model"), Path("shaken") if jittered is not None else None, ONE
    )  # type: ignore[arg-type]


def test_noise_is_the_larger_of_two_movements() -> None:
    a = np.array([1.0, 1.0])
    known = noise(a + np.array([0, 0.25]), a + np.array([0.5, 0]), a)
    assert known.largest["y"] == 0.5
    assert known.relative["y"] == pytest.approx(0.5 / math.sqrt(2), rel=1e-12)
    assert noise(a + np.array([0, 0.25]), None, a).largest["y"] == 0.25


def test_noise_is_never_below_the_resolution_of_the_type() -> None:
    a = f32(1000, 1)
    assert noise(a, a, a).largest["y"] == pytest.approx(1000 * 2.0**-23, rel=1e-6)
    half = np.array([1000, 1], np.float16)
    assert noise(half, half, half).largest["y"] == pytest.approx(1000 * 2.0**-10, rel=1e-6)
    assert noise(half, half, half).relative["y"] == 0


def test_noise_of_nan_that_moves() -> None:
    a = f32(1, np.nan)
    assert noise(f32(1, 2), a, a).drifts == {"y"}
    assert noise(a, f32(np.inf, np.nan), a).drifts == {"y"}
    assert noise(a, a, a).drifts == set()


# --- the second question ------------------------------------------------------------------------------------------


def test_measure() -> None:
    evidence = measure(Says({"y": f32(3, 4)}), Says({"y": f32(3, 3)}), feeds(), None)
    ((name, figures),) = evidence.outputs
    assert name == "y" and figures.relative_l2 == pytest.approx(0.2, abs=1e-7)
    assert (evidence.engine, evidence.held_out, evidence.verdict, evidence.failures) == (
        "ran",
        "somewhere",
        "passed",
        (),
    )


def test_measure_names_what_is_broken() -> None:
    assert measure(Says({"y": f32(1)}), Says({"y": f32(np.nan)}), feeds(), None).failures == (
        "output 'y': NaN or infinite values where the original's are finite",
    )
    evidence = judge(
        measure(Says({"y": f32(1)}), Says({"y": f32(np.nan)}), feeds(), None), (), unchanged=False
    )
    assert evidence.verdict == "failed"  # though no limit was asked for


def test_a_metric() -> None:
    def metric(run: Any, data: Any) -> float:
        return float(sum(run(f)["y"][0] for f in data))

    evidence = measure(
        Says(lambda f: {"y": f["x"]}), Says(lambda f: {"y": 2 * f["x"]}), feeds(TWO), (metric, 3.0)
    )
    assert evidence.metric == (3.0, 6.0)
    for limit, verdict in (
        (Limit("metric", 2.0, True), "passed"),
        (Limit("metric", 1.9, True), "failed"),
        (Limit("metric", 6.0), "passed"),
        (Limit("metric", 5.9), "failed"),
    ):
        assert judge(evidence, (limit,), unchanged=False).verdict == verdict


def test_a_metric_that_raises() -> None:
    def metric(run: Any, data: Any) -> float:
        raise KeyError("nothing")

    with pytest.raises(UsageError, match="--metric failed: KeyError: 'nothing'"):
        measure(Says({"y": f32(1)}), Says({"y": f32(1)}), feeds(), (metric, 1.0))


def evidence(*outputs: OutputEvidence, **more: Any) -> Evidence:
    names = ("logits", "hidden", "third")
    return Evidence(tuple(zip(names, outputs, strict=False)), "ran", "here", "passed", **more)


GOOD = OutputEvidence(0.01, 40.0, 0.999, 0.1, kl=0.001, top1=0.99)
BAD = OutputEvidence(0.1, 20.0, 0.9, 1.0, kl=0.1, top1=0.9)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("snr", 30, 45),
        ("cosine", 0.99, 0.9999),
        ("top1", 0.95, 0.999),
        ("relative_l2", 0.05, 0.001),
        ("max_abs", 0.5, 0.01),
        ("kl", 0.05, 0.0001),
    ],
)
def test_every_limit(name: str, good: float, bad: float) -> None:
    """Floors and ceilings: GOOD holds `good` and not `bad`, BAD holds neither; the worst output counts, wherever it stands."""
    assert judge(evidence(GOOD), (Limit(name, good),), unchanged=False).verdict == "passed"
    failed = judge(evidence(GOOD), (Limit(name, bad),), unchanged=False)
    assert failed.verdict == "failed" and failed.failures[0].startswith(f"logits: {name} is ")
    for outputs, guilty in (((GOOD, BAD), "hidden"), ((BAD, GOOD), "logits"), ((GOOD, GOOD, BAD), "third")):
        failed = judge(evidence(*outputs), (Limit(name, good),), unchanged=False)
        assert failed.verdict == "failed" and failed.failures[0].startswith(f"{guilty}: ")


def test_limits_hold_where_they_are_met_exactly() -> None:
    for limit in (Limit("snr", 40), Limit("cosine", 0.999), Limit("kl", 0.001), Limit("max_abs", 0.1)):
        assert judge(evidence(GOOD), (limit,), unchanged=False).verdict == "passed"


def test_all_limits_are_judged() -> None:
    failed = judge(
        evidence(BAD), (Limit("snr", 30), Limit("cosine", 0.5), Limit("kl", 0.01)), unchanged=False
    )
    assert [f.split()[1] for f in failed.failures] == ["snr", "kl"]


def test_nothing_moved_is_better_than_any_floor() -> None:
    still = OutputEvidence(0.0, None, 1.0, 0.0)
    assert judge(evidence(still), (Limit("snr", 300),), unchanged=False).verdict == "passed"


@pytest.mark.parametrize("name", ["snr", "cosine", "relative_l2", "max_abs", "kl"])
def test_nan_is_worse_than_anything(name: str) -> None:
    """A figure that overflowed must not slip through a comparison with NaN, wherever it stands."""
    nan = OutputEvidence(*[math.nan] * 4, kl=math.nan, top1=math.nan)
    for outputs in ((nan,), (GOOD, nan), (nan, GOOD), (GOOD, nan, GOOD)):
        assert (
            judge(
                evidence(*outputs),
                (Limit(name, 1e9 if name not in ("snr", "cosine") else -1e9),),
                unchanged=False,
            ).verdict
            == "failed"
        )


def test_outputs_that_overflow_are_not_passed() -> None:
    big = np.array([1e200, 1e200])
    figures = measure(Says({"y": big}), Says({"y": -big}), feeds(), None)
    assert judge(figures, (Limit("relative_l2", 0.5),), unchanged=False).verdict == "failed"


def test_limits_without_a_figure() -> None:
    plain = OutputEvidence(0.1, 20.0, 0.9, 1.0)
    with pytest.raises(UsageError, match="kl needs an output named like 'logits'"):
        judge(evidence(plain), (Limit("kl", 0.1),), unchanged=False)
    with pytest.raises(UsageError, match="needs --metric"):
        judge(evidence(plain), (Limit("metric", 0.1),), unchanged=False)


def test_verdicts() -> None:
    assert judge(evidence(GOOD), (), unchanged=True).verdict == "unchanged"
    assert judge(evidence(GOOD), (Limit("snr", 99),), unchanged=True).verdict == "failed"
    assert judge(evidence(GOOD, failures=("output names differ",)), (), unchanged=True).verdict == "failed"


def test_limits_as_they_are_written() -> None:
    assert parse_limits(" snr=30, cosine=0.99 ,kl=5e-2,metric=1.05x") == (
        Limit("snr", 30.0), Limit("cosine", 0.99), Limit("kl", 0.05), Limit("metric", 1.05, True),
    )  # fmt: skip
    assert ",".join(map(str, parse_limits("snr=30,metric=1.05x"))) == "snr=30,metric=1.05x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("snr", "NAME=NUMBER"),
        ("snr=high", "NAME=NUMBER"),
        ("psnr=3", "does not know 'psnr'"),
        ("snr=2x", "only metric"),
        ("=3", "does not know ''"),
    ],
)
def test_limits_that_are_none(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_limits(text)


@pytest.mark.parametrize("text", ["snr=nan", "cosine=inf", "metric=nanx"])
def test_limits_that_are_not_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        parse_limits(text)
