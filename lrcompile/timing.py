"""The measured cost table: how long forms of a weight take on a target. Pure: measuring is `tune`'s business.

A form is a subgraph: a weight as it is, or one way to store it, for its sizes. What lies between two measured ranks is read off the
straight line between them, what lies between two measured numbers of rows off a straight line in logarithms; sizes that were not
measured follow those that were by radial basis functions over the logarithms of rows, K, N and rank (linear kernel and trend).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lrcompile.interfaces import Array, Factorization
from lrcompile.records import Candidate, Group, Kind, Site

if TYPE_CHECKING:
    from scipy.interpolate import RBFInterpolator

_FEWEST = 6  # points that a trend over four logarithms needs


@dataclass(frozen=True, slots=True)
class Form:
    """What is timed: `widths` weights (K, N) that read one value, stored by a method at a rank. method ``dense``: as they are, no rank.

    kind, transposed: as `interfaces.Call` has them. dtype: what it computes in. structure, permutes, storage, activations: as the
    candidate's.
    """

    method: str
    kind: Kind
    K: int
    widths: tuple[int, ...]
    rank: int | None
    dtype: str
    structure: tuple[tuple[str, int | str], ...] = ()
    permutes: str | None = None
    transposed: bool = False
    storage: str | None = None
    activations: str | None = None

    @property
    def family(self) -> tuple[object, ...]:
        """All but the sizes."""
        return (
            self.method, self.kind, len(self.widths), self.dtype, self.structure, self.permutes, self.transposed,
            self.storage, self.activations,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[object, ...]:
        return (*self.family, self.K, self.widths)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one pass of a form over so many rows: the median of several samples, and their interquartile range over it."""

    form: Form
    rows: int
    seconds: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class CostTable:
    """Timings of one device, library version and number of threads. fallback: measured elsewhere, and shipped with us."""

    target: str
    device: str
    version: str
    threads: int
    timings: tuple[Timing, ...] = ()
    fallback: bool = False

    def with_timings(self, more: Iterable[Timing]) -> CostTable:
        """The same with more measurements; a form that is measured again is replaced."""
        known = {(t.form, t.rows): t for t in (*self.timings, *more)}
        return replace(self, timings=tuple(known.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "device": self.device,
            "version": self.version,
            "threads": self.threads,
            "timings": [{**asdict(t.form), "rows": t.rows, "seconds": t.seconds, "spread": t.spread} for t in self.timings],
        }  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any], fallback: bool = False) -> CostTable:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError on what is no table."""
        timings = []
        for entry in document["timings"]:
            sizes = dict(entry)
            rows, seconds, spread = sizes.pop("rows"), float(sizes.pop("seconds")), float(sizes.pop("spread"))
            sizes["widths"] = tuple(sizes["widths"])
            sizes["structure"] = tuple((str(k), v) for k, v in sizes["structure"])
            if not seconds > 0:
                raise ValueError(f"{seconds} seconds")
            timings.append(Timing(Form(**sizes), int(rows), seconds, spread))
        return cls(
            document["target"], document["device"], document["version"], int(document["threads"]),
            tuple(timings), fallback,
        )  # fmt: skip


class Clock:
    """A table that is asked often. seconds: of one form over so many rows, None where nothing like it was measured.

    dtype: what everything computes in, whatever the sites say; None: what these say.
    """

    def __init__(self, table: CostTable, dtype: str | None = None) -> None:
        self.table, self.dtype = table, dtype
        self._measured: dict[tuple[object, ...], dict[int, list[tuple[int, float]]]] = {}
        self._families: dict[tuple[object, ...], list[Timing]] = {}
        self._trends: dict[tuple[object, ...], RBFInterpolator | None] = {}
        for timing in table.timings:
            at = self._measured.setdefault(timing.form.sizes, {}).setdefault(timing.rows, [])
            at.append((timing.form.rank or 0, timing.seconds))
            self._families.setdefault(timing.form.family, []).append(timing)
        for by_rows in self._measured.values():
            for points in by_rows.values():
                points.sort()

    def seconds(self, form: Form, rows: int) -> float | None:
        if rows == 0:
            return 0.0
        by_rows = self._measured.get(form.sizes)
        if by_rows is None or not min(by_rows) <= rows <= max(by_rows):
            return self._trend(form, rows)
        below, above = max(r for r in by_rows if r <= rows), min(r for r in by_rows if r >= rows)
        first = _between(by_rows[below], form.rank or 0)
        if below == above:
            return first
        last = _between(by_rows[above], form.rank or 0)
        share = np.log(rows / below) / np.log(above / below)
        return float(np.exp((1 - share) * np.log(first) + share * np.log(last)))

    def _trend(self, form: Form, rows: int) -> float | None:
        if form.family not in self._trends:
            self._trends[form.family] = _fitted(self._families.get(form.family, []))
        trend = self._trends[form.family]
        return float(np.exp(trend(_place(form, rows)[None])[0])) if trend is not None else None

    def of(
        self, group: Group, candidate: Candidate | None, method: Factorization | None, rows: Mapping[str, int]
    ) -> float | None:
        """Seconds of all readers of a group's weights, each at its number of rows; None where one was not timed, as no Conv is.

        candidate None: as they are.
        """
        if not can_be_timed(group):
            return None
        total = 0.0
        for form, site in forms_of(group, candidate, method, self.dtype):
            seconds = self.seconds(form, rows.get(site, 0))
            if seconds is None:
                return None
            total += seconds
        return total


def _between(points: Sequence[tuple[int, float]], rank: int) -> float:
    """Seconds at a rank; beyond the last measured ones by the line through zero, or through the two that are nearest."""
    ranks, seconds = zip(*points, strict=True)
    if len(points) > 1 and rank > ranks[-1]:
        slope = (seconds[-1] - seconds[-2]) / (ranks[-1] - ranks[-2])
        return float(max(seconds[-1] + slope * (rank - ranks[-1]), seconds[-1]))
    return float(np.interp(rank, ranks, seconds))


def _place(form: Form, rows: int) -> Array:
    return np.log(np.array([rows, form.K, sum(form.widths), form.rank or 1], np.float64))


def _fitted(timings: Sequence[Timing]) -> RBFInterpolator | None:
    """A trend through all timings of a family; None where these are too few, or all alike in a size that then says nothing."""
    if len(timings) < _FEWEST:
        return None
    places = np.array([_place(t.form, t.rows) for t in timings])
    seconds = np.log([t.seconds for t in timings])
    varied = np.ptp(places, axis=0) > 0
    degree = 1 if np.linalg.matrix_rank(places[:, varied] - places[0, varied]) == varied.sum() else 0
    from scipy.interpolate import RBFInterpolator  # slow to import, and seldom needed

    fitted = RBFInterpolator(places[:, varied], seconds, kernel="linear", degree=degree)
    return _OverVaried(fitted, varied)


class _OverVaried:
    """A trend over the sizes that were varied."""

    def __init__(self, fitted: RBFInterpolator, varied: Array) -> None:
        self._fitted, self._varied = fitted, varied

    def __call__(self, places: Array) -> Array:
        made: Array = self._fitted(places[:, self._varied])
        return made


def can_be_timed(group: Group) -> bool:
    """Micro-graphs multiply rows and gather them; what a Conv takes hangs on pictures, of which rows say nothing."""
    return all(s.kind in ("linear", "lookup") for s in group.sites)


def forms_of(
    group: Group, candidate: Candidate | None, method: Factorization | None, dtype: str | None = None
) -> tuple[tuple[Form, str], ...]:
    """The forms that a group consists of, each with the site whose rows it meets. dtype: as `Clock` has it."""

    def dense(site: Site, K: int, N: int) -> tuple[Form, str]:
        return Form("dense", site.kind, K, (N,), None, dtype or site.dtype), site.name

    def stored(site: Site, widths: tuple[int, ...], form: Candidate, transposed: bool) -> tuple[Form, str]:
        return Form(
            form.method, site.kind, site.K, widths, form.rank, dtype or site.dtype, form.structure, form.permutes, transposed,
            form.storage, form.activations,
        ), site.name  # fmt: skip

    if candidate is None or method is None:
        return tuple(dense(s, s.K, s.N) for s in group.sites)
    cut = {n: s for n, s in method.shapes(group, candidate).items() if n.startswith("weight.")}
    if cut:  # smaller weights in the places of the old ones
        return tuple(dense(s, *_sizes(cut[f"weight.{i}"])) for i, s in enumerate(group.sites))
    if not group.shares_weight:
        return (stored(group.sites[0], tuple(s.N for s in group.sites), candidate, False),)
    pairs = zip(group.sites, group.transposed, strict=True)
    return tuple(stored(s, (s.N,), candidate, t) for s, t in pairs)


def _sizes(shape: tuple[int, ...] | Array) -> tuple[int, int]:
    K, N = np.shape(shape) if isinstance(shape, np.ndarray) else shape
    return int(K), int(N)


def ranks_to_measure(ranks: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of these ranks, evenly spread, the first and the last among them: what lies between is interpolated."""
    ranks = sorted(set(ranks))
    if len(ranks) <= most:
        return tuple(ranks)
    places = np.linspace(0, len(ranks) - 1, most).round().astype(int)
    return tuple(ranks[i] for i in dict.fromkeys(places.tolist()))


def standard_forms(K: int, widths: tuple[int, ...], dtype: str, most: int) -> tuple[Form, ...]:
    """What is measured of a weight of that size where no plan says what is asked for: as it is, a pair of factors, and the pivoted form
    with its permutation and without; `most` ranks of each up to where a pair has as many numbers as the weight.
    """
    N = sum(widths)
    even = K * N // (K + N)
    step = 32 if even >= 256 else 8 if even >= 64 else 1
    ranks = ranks_to_measure(range(step, even + 1, step), most)
    made = [Form("dense", "linear", K, (n,), None, dtype) for n in widths]
    made += [Form("svd", "linear", K, widths, r, dtype) for r in ranks]
    made += [Form("pivoted", "linear", K, widths, r, dtype) for r in ranks]
    if len(widths) == 1:
        made += [Form("pivoted", "linear", K, widths, r, dtype, permutes="out") for r in ranks]
    return tuple(dict.fromkeys(made))


def gaps(table: CostTable, wanted: Iterable[tuple[Form, int]]) -> tuple[tuple[Form, int], ...]:
    """What is wanted and was not measured: (form, rows), each once."""
    known = {(t.form, t.rows) for t in table.timings}
    return tuple(dict.fromkeys(pair for pair in wanted if pair not in known and pair[1] > 0))


def by_form(pairs: Iterable[tuple[Form, int]]) -> dict[Form, tuple[int, ...]]:
    """The rows of each form together: one engine serves them all."""
    ordered = sorted(pairs, key=lambda p: (repr(p[0]), p[1]))
    return {
        form: tuple(r for _, r in several) for form, several in itertools.groupby(ordered, key=lambda p: p[0])
    }
