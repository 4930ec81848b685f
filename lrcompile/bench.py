"""Bench: the original and the compiled model raced against each other, and the original against itself.

Both engines live in one process and take turns, A B B A in one round and B A A B in the next, so that what the machine does
meanwhile (clock, caches, neighbours) meets both alike. A round gives one ratio, time of A over time of B: above 1 the second is faster. Each round also races the
original against itself in the same way: how far those ratios stray from 1 is the noise of this machine, and a ratio that does
not leave it says nothing.
"""

from __future__ import annotations

import gc
import itertools
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import UsageError
from lrcompile.interfaces import Array, BuildOptions, Engine
from lrcompile.progress import Progress, silent

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feed, Input

_WARM_UP = 3  # runs of each engine on each feed before anything counts
_SAMPLE = 2e-3  # seconds that a timed sample should last; what runs faster is run several times in it
_FEWEST, _MOST = 20, 2000  # rounds
_PARTS = 10  # of the rounds, for the noise's band

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles of a list of numbers."""

    p10: float
    p25: float
    median: float
    p75: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        percent = statistics.quantiles(values, n=100, method="inclusive")
        return cls(percent[9], percent[24], statistics.median(values), percent[74], percent[89])


@dataclass(frozen=True, slots=True)
class Race:
    """What `lrcompile.bench` gives back. Times in seconds a run; ratio above 1: the compiled model is faster.

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
            return f"{name:10} {1e3 * t.median:10.3f} {1e3 * t.p10:10.3f} {1e3 * t.p90:10.3f} {1.0 / t.median:12,.1f}"

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
                f"{'':10} {'median ms':>10} {'10% ms':>10} {'90% ms':>10} {'runs/s':>12}",
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
    if not feeds:
        raise UsageError("there is no feed to run the models on: give --shape or --data")
    # the kernels that users get, not the most accurate ones
    options = options or BuildOptions(target, threads=threads, exact=False)
    with child.build(target, original, options) as a, child.build(target, compiled, options) as b:
        repeats = [_ask(child, "warm_up", a, b, feed, threads=threads, timeout=timeout) for feed in feeds]
        rounds: list[tuple[Pair, ...]] = []
        end = (start := time.monotonic()) + seconds
        while len(rounds) < _FEWEST or (time.monotonic() < end and len(rounds) < _MOST):
            at, swapped = len(rounds) % len(feeds), len(rounds) % 2 == 1
            args = (a, b, feeds[at], repeats[at], swapped)
            rounds.append(_ask(child, "time_round", *args, threads=threads, timeout=timeout))
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


def _ask(child: Child, function: str, *args: object, threads: int, timeout: float | None) -> Any:
    return child.call(f"lrcompile.bench:{function}", *args, threads=threads, timeout=timeout, what="timing")


# --- inside the child ---------------------------------------------------------------------------------------------


def warm_up(first: Engine, second: Engine, feed: Feed) -> int:
    """Run both until caches and arenas are filled; how many runs make a sample long enough to be timed."""
    quickest = min(_time(engine, feed, 1) for _ in range(_WARM_UP) for engine in (first, second))
    return max(1, round(_SAMPLE / max(quickest, 1e-7)))


def time_round(first: Engine, second: Engine, feed: Feed, repeats: int, swapped: bool) -> tuple[Pair, ...]:
    """Seconds a run of A, B, and of A and A again in the same places, two samples each: A B B A, or B A A B when swapped."""
    was = gc.isenabled()
    gc.disable()
    try:
        return (*_race(first, second, feed, repeats, swapped), *_race(first, first, feed, repeats, swapped))
    finally:
        if was:
            gc.enable()


def _race(a: Engine, b: Engine, feed: Feed, repeats: int, swapped: bool) -> tuple[Pair, Pair]:
    outer, inner = (b, a) if swapped else (a, b)
    outer.run(feed)  # so that of the two samples of each one comes after itself, and one after the other
    first, second, third, fourth = (_time(engine, feed, repeats) for engine in (outer, inner, inner, outer))
    outside, inside = (first, fourth), (second, third)
    return (inside, outside) if swapped else (outside, inside)


def _time(engine: Engine, feed: Feed, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        engine.run(feed)
    return (time.perf_counter() - start) / repeats


# --- shapes -------------------------------------------------------------------------------------------------------


def shapes_of(feeds: Sequence[Mapping[str, Array]]) -> tuple[str, ...]:
    """What was fed, as trtexec writes it, each combination once."""
    texts = (
        ", ".join(f"{n}:{'x'.join(map(str, a.shape)) or 'scalar'}" for n, a in feed.items()) for feed in feeds
    )
    return tuple(dict.fromkeys(texts))


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``x:1x64`` (trtexec, several with commas between), or ``x:[1,64]`` (Polygraphy). Raises UsageError."""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        for part in re.split(r",(?![^\[]*\])", text):
            match = re.fullmatch(r"\s*(.+):(?:\[\s*([\d,\s]*)\]|(\d+(?:x\d+)*))\s*", part)
            if match is None:
                raise UsageError(f"--shape {text!r}: write INPUT:1x64 or INPUT:[1,64]")
            numbers = re.split(r"[,x]", match[2] if match[2] is not None else match[3])
            try:
                found[match[1]] = tuple(int(n) for n in numbers if n.strip() or len(numbers) > 1)
            except ValueError as error:
                raise UsageError(f"--shape {text!r}: write INPUT:1x64 or INPUT:[1,64]") from error
    return found


def dims_of(texts: Sequence[str], inputs: Sequence[Input]) -> dict[str, int]:
    """The free dimensions of a model's inputs when these have the shapes given. Raises UsageError where they cannot."""
    known = {i.name: i for i in inputs}
    dims: dict[str, int] = {}
    for name, shape in parse_shapes(texts).items():
        if name not in known:
            raise UsageError(
                f"--shape: the model has no input {name!r}; it reads {', '.join(known) or 'nothing'}"
            )
        wanted = known[name].shape
        if wanted is None:
            raise UsageError(f"--shape: the model does not say which rank {name!r} has: give --data")
        if len(wanted) != len(shape):
            raise UsageError(f"--shape: input {name!r} has {len(wanted)} axes, not {len(shape)}")
        for axis, (dim, size) in enumerate(zip(wanted, shape, strict=True)):
            free = f"{name}#{axis}" if dim is None else dim
            if isinstance(free, int):
                if free != size:
                    raise UsageError(f"--shape: axis {axis} of {name!r} is {free}, not {size}")
            elif dims.setdefault(free, size) != size:
                raise UsageError(f"--shape: {free!r} would be both {dims[free]} and {size}")
    return dims
