"""Bench: the original and the compiled model raced against each other, and the original against itself.

Both engines live in one process and take turns, A B B A in one round and B A A B in the next, so that what the machine does
meanwhile (clock, caches, neighbours) meets both alike. Runs go through `Engine.bound`: feeds lie, and outputs stay, where the engine
computes. A round gives one ratio, time of A over time of B: above 1 the second is faster. Each round also races the original against
itself in the same way: how far those ratios stray from 1 is the noise of this machine, and a ratio that does not leave it says nothing.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import UsageError
from lrcompile.interfaces import Array, BuildOptions, Engine
from lrcompile.progress import Progress, silent
from lrcompile.shapes import written

if TYPE_CHECKING:
    from lrcompile.child import Child, RemoteEngine
    from lrcompile.feeds import Feed

_WARM_UP = 3  # runs of each engine on each feed before anything counts
_SAMPLE = 2e-3  # seconds that a timed sample should last; what runs faster is run several times in it
_HEAT = 0.5  # seconds on one feed before the next has its turn
_FEWEST, _MOST = 20, 2000  # rounds
_PARTS = 10  # of the rounds, for the noise's band

Pair = tuple[float, float]
Run = Callable[[int], None]  # so many runs in a row: what `Engine.bound` gives


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles of a list of numbers."""

    p10: float
    p25: float
    median: float
    p75: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        percent = statistics.quantiles(values, n=100, method="inclusive")
        p10, p25, p75, p90, p95, p99 = (percent[n - 1] for n in (10, 25, 75, 90, 95, 99))
        return cls(p10, p25, statistics.median(values), p75, p90, p95, p99)


@dataclass(frozen=True, slots=True)
class Race:
    """One race. Times in seconds a run, of samples of one run, or of as many as take 2 ms; ratio above 1: the compiled model is faster.

    ratio: original over compiled, by round. noise: the same with the original in both places. band: the smallest and the largest
    median of ten consecutive parts of the noise; it narrows when more is measured. same: the median ratio lies in the band, so
    the two cannot be told apart.
    """

    target: str
    threads: int
    shapes: tuple[str, ...]
    rounds: int
    original: Spread
    compiled: Spread
    ratio: Spread
    noise: Spread
    band: tuple[float, float]

    @property
    def same(self) -> bool:
        return self.band[0] <= self.ratio.median <= self.band[1]

    def to_json(self) -> dict[str, Any]:
        throughput = {"original": 1.0 / self.original.median, "compiled": 1.0 / self.compiled.median}
        return {**asdict(self), "runs_per_second": throughput, "within_noise": self.same}

    def __str__(self) -> str:
        def times(name: str, t: Spread) -> str:
            return f"{name:10} {1e3 * t.median:10.3f} {1e3 * t.p90:10.3f} {1e3 * t.p95:10.3f} {1e3 * t.p99:10.3f} {1.0 / t.median:12,.1f}"

        def ratios(name: str, r: Spread) -> str:
            return f"{name:24} {r.median:.3f}  (quartiles {r.p25:.3f} to {r.p75:.3f}, 80% of rounds {r.p10:.3f} to {r.p90:.3f})"

        r = self.ratio.median
        words = "faster" if r > 1 else "slower"
        verdict = (
            f"the difference lies within the noise of this machine ({self.band[0]:.3f} to {self.band[1]:.3f}): neither is faster"
            if self.same
            else f"the compiled model is {r if r > 1 else 1 / r:.2f} times {words} than the original"
        )
        return "\n".join(
            [
                f"{'':10} {'p50 ms':>10} {'p90 ms':>10} {'p95 ms':>10} {'p99 ms':>10} {'runs/s':>12}",
                times("original", self.original),
                times("compiled", self.compiled),
                ratios("original / compiled", self.ratio),
                ratios("original / itself", self.noise),
                f"{verdict} ({self.rounds} rounds on {self.target}, {self.threads} thread{'s' * (self.threads > 1)}, "
                f"{'; '.join(self.shapes) or 'no input'})",
            ]
        )


def race(
    child: Child,
    target: str,
    original: Path,
    compiled: Path,
    feeds: Sequence[Feed],
    *,
    threads: int = 1,
    seconds: float = 5.0,
    timeout: float | None = None,
    progress: Progress = silent,
    options: BuildOptions | None = None,
) -> Race:
    """Rounds until so many seconds are over, each on the next feed. timeout: seconds that one round may take.

    Raises BuildError as the engines do.
    """
    # the kernels that users get, not the most accurate ones
    options = options or BuildOptions(target, threads=threads, exact=False)
    with child.build(target, original, options) as a, child.build(target, compiled, options) as b:
        return contest(
            child, target, a, b, feeds, threads=threads, seconds=seconds, timeout=timeout, progress=progress
        )


def contest(
    child: Child,
    target: str,
    original: RemoteEngine,
    compiled: RemoteEngine,
    feeds: Sequence[Feed],
    *,
    threads: int = 1,
    seconds: float = 5.0,
    timeout: float | None = None,
    progress: Progress = silent,
) -> Race:
    """A race of engines that are built already."""
    if not feeds:
        raise UsageError("there is no feed to run the models on: give --shape or --data")
    rounds: list[tuple[Pair, ...]] = []
    end = (start := time.monotonic()) + seconds
    heats = 0
    while len(rounds) < _FEWEST or (time.monotonic() < end and len(rounds) < _MOST):
        left = max(1, math.ceil(_FEWEST / len(feeds)) if heats < len(feeds) else 1)
        heat = (
            original,
            compiled,
            feeds[heats % len(feeds)],
            left,
            min(_HEAT, seconds),
            len(rounds) % 2 == 1,
        )
        rounds += child.call(
            "lrcompile.bench:time_heat", *heat, threads=threads,
            timeout=None if timeout is None else timeout * left + _HEAT, what="timing",
        )  # fmt: skip
        heats += 1
        share = max(len(rounds) / _MOST, (time.monotonic() - start) / max(seconds, 1e-9))
        progress("bench", min(round(100 * share), 100), 100)
    noise = [sum(r[2]) / sum(r[3]) for r in rounds]
    return Race(
        target,
        threads,
        shapes_of(feeds),
        len(rounds),
        original=Spread.of([t for r in rounds for t in r[0]]),
        compiled=Spread.of([t for r in rounds for t in r[1]]),
        ratio=Spread.of([sum(r[0]) / sum(r[1]) for r in rounds]),
        noise=Spread.of(noise),
        band=_band(noise),
    )


def _band(noise: Sequence[float]) -> tuple[float, float]:
    bounds = [len(noise) * part // _PARTS for part in range(_PARTS + 1)]
    medians = [statistics.median(noise[a:b]) for a, b in itertools.pairwise(bounds)]
    return min(medians), max(medians)


# --- inside the child ---------------------------------------------------------------------------------------------


def time_heat(
    first: Engine, second: Engine, feed: Feed, fewest: int, seconds: float, swapped: bool
) -> list[tuple[Pair, ...]]:
    """Rounds on one feed, which lies where the engines compute: at least so many, and until the time is over."""
    a, b = first.bound(feed), second.bound(feed)
    quickest = min(_time(run, 1) for _ in range(_WARM_UP) for run in (a, b))
    repeats = max(1, round(_SAMPLE / max(quickest, 1e-7)))
    rounds: list[tuple[Pair, ...]] = []
    end = time.monotonic() + seconds
    while len(rounds) < fewest or (time.monotonic() < end and len(rounds) < _MOST):
        rounds.append(time_round(a, b, repeats, swapped))
        swapped = not swapped
    return rounds


def time_round(a: Run, b: Run, repeats: int, swapped: bool) -> tuple[Pair, ...]:
    """Seconds a run of A, B, and of A and A again in the same places, two samples each: A B B A, or B A A B when swapped."""
    was = gc.isenabled()
    gc.disable()
    try:
        return (*_race(a, b, repeats, swapped), *_race(a, a, repeats, swapped))
    finally:
        if was:
            gc.enable()


def _race(a: Run, b: Run, repeats: int, swapped: bool) -> tuple[Pair, Pair]:
    outer, inner = (b, a) if swapped else (a, b)
    outer(1)  # so that of the two samples of each one comes after itself, and one after the other
    first, second, third, fourth = (_time(run, repeats) for run in (outer, inner, inner, outer))
    outside, inside = (first, fourth), (second, third)
    return (inside, outside) if swapped else (outside, inside)


def _time(run: Run, repeats: int) -> float:
    start = time.perf_counter()
    run(repeats)
    return (time.perf_counter() - start) / repeats


# --- shapes -------------------------------------------------------------------------------------------------------


def shapes_of(feeds: Sequence[Mapping[str, Array]]) -> tuple[str, ...]:
    """What was fed, as trtexec writes it, each combination once."""
    texts = (written({n: a.shape for n, a in feed.items()}) for feed in feeds)
    return tuple(dict.fromkeys(texts))
