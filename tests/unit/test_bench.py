"""The race: shapes in both spellings, the order of the runs, and what the figures say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from lrcompile.bench import Race, Spread, shapes_of, time_heat, time_round


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

    def bound(self, feeds: Mapping[str, Any]) -> Callable[[int], None]:
        def times(count: int) -> None:
            for _ in range(count):
                self.run(feeds)

        return times

    def describe(self) -> Mapping[str, str]:
        return {}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.mark.parametrize(("swapped", "order"), [(False, "ABBA"), (True, "BAAB")])
def test_a_round_is_the_race_and_then_the_original_alone(swapped: bool, order: str) -> None:
    log: list[str] = []
    times = time_round(Fake("A", log).bound({}), Fake("B", log).bound({}), 1, swapped)
    assert "".join(log) == order[0] + order + "A" + "AAAA"
    assert len(times) == 4 and all(min(pair) >= 0 for pair in times)


def test_a_heat_turns_the_order_round_by_round_and_binds_each_engine_once() -> None:
    log: list[str] = []

    class Counted(Fake):
        def bound(self, feeds: Mapping[str, Any]) -> Callable[[int], None]:
            log.append(f"bind {self.name}")
            return lambda count: time.sleep(0.003)

    rounds = time_heat(Counted("A", log), Counted("B", log), {}, 3, 0.0, False)
    assert len(rounds) == 3
    assert log == ["bind A", "bind B"]
    assert all(0.003 <= t < 0.1 for r in rounds for pair in r for t in pair)


def test_times_belong_to_whom_they_are_of() -> None:
    class Slow(Fake):
        def run(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
            time.sleep(0.005)
            return {}

    for swapped in (False, True):
        quick, slow, _, _ = time_round(Fake("A", []).bound({}), Slow("B", []).bound({}), 1, swapped)
        assert max(quick) < min(slow)


def race(ratio: float, band: tuple[float, float]) -> Race:
    flat = Spread(*[1e-3] * 7)
    ratios = Spread(*[ratio] * 7)
    return Race("ort-cpu", 1, ("x:1x2",), 10, flat, flat, ratios, Spread(*[1] * 7), band)


def test_a_ratio_within_the_noise_says_nothing() -> None:
    assert "within the noise" in str(race(1.04, (0.9, 1.1)))
    assert race(1.04, (0.9, 1.1)).to_json()["within_noise"]


@pytest.mark.parametrize(("ratio", "words"), [(2.0, "2.00 times faster"), (0.5, "2.00 times slower")])
def test_a_ratio_beyond_the_noise(ratio: float, words: str) -> None:
    assert words in str(race(ratio, (0.9, 1.1)))
    assert not race(ratio, (0.9, 1.1)).same


def test_quantiles() -> None:
    assert Spread.of([float(n) for n in range(101)]) == Spread(10, 25, 50, 75, 90, 95, 99)
