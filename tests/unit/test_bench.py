"""The race: shapes in both spellings, the order of the runs, and what the figures say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lrcompile.bench import Race, Spread, dims_of, parse_shapes, shapes_of, time_round
from lrcompile.errors import UsageError
from lrcompile.feeds import Input

FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("texts", "shapes"),
    [
        (["x:1x64"], {"x": (1, 64)}),
        (["x:[1,64]"], {"x": (1, 64)}),
        (["x:[1, 64]", "y:3"], {"x": (1, 64), "y": (3,)}),
        (["x:1x64,y:2x3"], {"x": (1, 64), "y": (2, 3)}),
        (["x:[1,64],y:[2,3]"], {"x": (1, 64), "y": (2, 3)}),
        (["input:0:1x2"], {"input:0": (1, 2)}),
        (["x:[]"], {"x": ()}),
        (["past:1x4x0x8"], {"past": (1, 4, 0, 8)}),
    ],
)
def test_shapes(texts: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
    assert parse_shapes(texts) == shapes


@pytest.mark.parametrize("text", ["x", "x:", ":1x2", "x:1xn", "x:[1,n]", "x:1,64", "x:-1x2", "x:[1,,2]"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(UsageError, match="--shape"):
        parse_shapes([text])


def test_shapes_give_dimensions_their_values() -> None:
    inputs = [Input("x", FLOAT, ("batch", 16, None)), Input("y", FLOAT, ("batch",))]
    assert dims_of(["x:2x16x5", "y:2"], inputs) == {"batch": 2, "x#2": 5}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["z:1"], "no input 'z'"),
        (["x:2x16"], "has 3 axes"),
        (["x:2x17x5"], "axis 1"),
        (["x:2x16x5", "y:3"], "both 2 and 3"),
    ],
)
def test_shapes_that_do_not_fit(texts: list[str], words: str) -> None:
    inputs = [Input("x", FLOAT, ("batch", 16, None)), Input("y", FLOAT, ("batch",))]
    with pytest.raises(UsageError, match=words):
        dims_of(texts, inputs)


def test_what_was_fed_is_said() -> None:
    feeds = [{"x": np.zeros((1, 2)), "s": np.zeros(())}] * 2
    assert shapes_of(feeds) == ("x:1x2, s:scalar",)


class Fake:
    """An engine that writes down when it runs."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        self.log.append(self.name)
        return {}

    def describe(self) -> Mapping[str, str]:
        return {}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.mark.parametrize(("swapped", "order"), [(False, "ABBA"), (True, "BAAB")])
def test_a_round_is_the_race_and_then_the_original_alone(swapped: bool, order: str) -> None:
    log: list[str] = []
    times = time_round(Fake("A", log), Fake("B", log), {}, 1, swapped)
    assert "".join(log) == order[0] + order + "A" + "AAAA"
    assert len(times) == 4 and all(min(pair) >= 0 for pair in times)


def test_times_belong_to_whom_they_are_of() -> None:
    class Slow(Fake):
        def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
            time.sleep(0.005)
            return {}

    for swapped in (False, True):
        quick, slow, _, _ = time_round(Fake("A", []), Slow("B", []), {}, 1, swapped)
        assert max(quick) < min(slow)


def race(ratio: float, band: tuple[float, float]) -> Race:
    flat = Spread(1e-3, 1e-3, 1e-3, 1e-3, 1e-3)
    ratios = Spread(ratio, ratio, ratio, ratio, ratio)
    return Race("ort-cpu", 1, ("x:1x2",), 10, flat, flat, ratios, Spread(1, 1, 1, 1, 1), band)


def test_a_ratio_within_the_noise_says_nothing() -> None:
    assert "within the noise" in str(race(1.04, (0.9, 1.1)))
    assert race(1.04, (0.9, 1.1)).to_json()["within_noise"]


@pytest.mark.parametrize(("ratio", "words"), [(2.0, "2.00 times faster"), (0.5, "2.00 times slower")])
def test_a_ratio_beyond_the_noise(ratio: float, words: str) -> None:
    assert words in str(race(ratio, (0.9, 1.1)))
    assert not race(ratio, (0.9, 1.1)).same


def test_quantiles() -> None:
    assert Spread.of([float(n) for n in range(101)]) == Spread(10, 25, 50, 75, 90)
