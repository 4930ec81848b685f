"""What a model holds that could be rewritten: sites, groups, and for each the error against the parameters that it keeps.

A curve is a factorization's own candidates, all ranks of them; the figures read off it are

    energy      the rank from which on at least this share of ||S W||^2 is held (S S^T: second moment of the input)
    share       the error of the best form with at most this share of the weight's parameters
    break-even  the smallest rank whose factors take as many parameters as the weight itself

Of sites that are asked for by name the curves are kept themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrcompile.cost import bytes_of, dense_flops, parameters_of, stored_bytes
from lrcompile.curves import check_patterns, eligible, knows, too_old
from lrcompile.errors import UsageError
from lrcompile.interfaces import CandidateOptions, Factorization, StatisticsSource, Weights
from lrcompile.progress import Progress, silent
from lrcompile.records import Budget, Candidate, Finding, Group, Source
from lrcompile.report import families_file
from lrcompile.store import write_text
from lrcompile.tables import columns, counted

ENERGIES = (0.5, 0.9, 0.99)
SHARES = (0.9, 0.75, 0.5)
# Of a curve that is shown itself: its rows in the table, how many points are kept of it, and how many weights a picture holds.
_ROWS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_POINTS, _PANELS = 48, 6


@dataclass(frozen=True, slots=True)
class Point:
    """A form of a weight. share: of the weight's parameters. error: relative, of what the site computes."""

    rank: int | None
    parameters: int
    share: float
    flops: int
    error: float


@dataclass(frozen=True, slots=True)
class Curve:
    """What one factorization can do with a group, or (refusal) why it can do nothing.

    at_energy, at_share: the forms at `ENERGIES` and `SHARES`; None where there is no such form.
    bound: whether the errors are upper bounds, not estimates. points: the curve itself, of sites that were asked for: no form of
    fewer parameters errs less.
    """

    method: str
    refusal: str | None = None
    bound: bool = True
    break_even: int | None = None
    at_energy: tuple[Point | None, ...] = ()
    at_share: tuple[Point | None, ...] = ()
    points: tuple[Point, ...] = ()

    def within(self, share: float) -> Point | None:
        """The most accurate point with at most this share of the parameters."""
        return min((p for p in self.points if p.share <= share), key=lambda p: p.error, default=None)


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group: its size, whether budgets count it (reason: why not), the rows of data seen at its input, its curves.

    flops: of the weights as they are, for one row (one position of the output of a Conv).
    """

    name: str
    kind: str
    op: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    parameters: int
    bytes: int
    flops: int
    reason: str | None
    rows: int | None
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class SiteView:
    """A constant weight use. refusal: why it is never taken, or None."""

    name: str
    op: str
    weight: str
    weight_shape: tuple[int, ...]
    storage: str
    parameters: int
    path: str
    refusal: str | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `lrcompile.inspect` gives back. Prints as a table. data: what the curves weigh the weights by; None: nothing."""

    opset: int
    parameters: int
    bytes: int
    data: str | None
    sites: tuple[SiteView, ...]
    groups: tuple[GroupView, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        for group in document["groups"]:
            for curve in group["curves"]:
                curve["at_energy"] = dict(zip(map(str, ENERGIES), curve["at_energy"], strict=False))
                curve["at_share"] = dict(zip(map(str, SHARES), curve["at_share"], strict=False))
        return document

    def __str__(self) -> str:
        curves = [(g, c) for g in self.groups for c in g.curves if c.refusal is None]
        head = ["weight", "op", "shape", "kept of all", "method"]
        head += [f"rank for {e:g}" for e in ENERGIES] + ["even at"] + [f"error at {s:g}" for s in SHARES]
        lines = columns([head, *(self._row(g, c) for g, c in curves)], left=(0, 1, 4)) if curves else []
        weighed = f"by {self.data}" if self.data else "by nothing: plain, without data"
        lines += [line for g in self.groups for line in _whole_curves(g)]
        lines += [
            "",
            f"Ranks hold that share of the energy, errors are at that share of the parameters; weighed {weighed}.",
        ]
        lines += self._not_taken()
        lines.append(
            f"{len(self.sites)} uses of constant weights, {len(self.groups)} groups, "
            f"{self.parameters:,} parameters, {self.bytes / 1e6:,.1f} MB, opset {self.opset}"
        )
        return "\n".join([*lines, *self.notes])

    def _row(self, group: GroupView, curve: Curve) -> list[str]:
        star = "" if group.reason is None else "*"
        return [
            group.name + star, group.op, "x".join(map(str, group.shape)), f"{group.parameters / max(self.parameters, 1):.1%}",
            curve.method,
            *("-" if p is None else f"{p.rank} ({p.share:.2f})" for p in curve.at_energy),
            "-" if curve.break_even is None else str(curve.break_even),
            *("-" if p is None else f"{p.error:.3f}" for p in curve.at_share),
        ]  # fmt: skip

    def _not_taken(self) -> list[str]:
        """What has no curve, or does not count for budgets (marked *), by reason."""
        reasons = [s.refusal for s in self.sites if s.refusal is not None]
        for group in self.groups:
            refusals = [c.refusal for c in group.curves if c.refusal is not None]
            if len(refusals) < len(group.curves) and group.reason is not None:
                reasons.append(f"* {group.reason}")
            elif len(refusals) == len(group.curves) and group.kind in ("alone", "shared", "tied"):
                reasons.append("; ".join(refusals) or "no factorization serves it")
        return counted(reasons)


def inspection(
    source: Source, finding: Finding, weights: Weights, statistics: StatisticsSource | None, methods: Mapping[str, Factorization],
    *, data: str | None, include: str | None = None, exclude: str | None = None, site: str | None = None,
    progress: Progress = silent,
) -> Inspection:  # fmt: skip
    """All curves of all groups: one decomposition a weight and factorization, kept in the cache.

    site: a pattern; only groups with a site of such a name, and their curves themselves. Raises UsageError where there is none.
    """
    check_patterns(site)
    asked = [g for g in finding.groups if site is None or any(re.search(site, s.name) for s in g.sites)]
    if site is not None and not asked:
        raise UsageError(
            f"--site {site!r} matches no weight that could be rewritten (lrcompile inspect lists them)"
        )
    groups = []
    for index, group in enumerate(asked):
        reasons = [eligible(s, group.kind == "tied", Budget(), include, exclude) for s in group.sites]
        known = [statistics.of(s) for s in group.sites] if statistics is not None else []
        first = group.sites[0]
        groups.append(
            GroupView(
                name=group.name,
                kind=group.kind,
                op=first.op,
                shape=first.weight_shape,
                sites=tuple(s.name for s in group.sites),
                parameters=group.elements,
                bytes=stored_bytes(group),
                flops=sum(dense_flops(s) for s in group.sites),
                reason=reasons[0] if all(reasons) else None,
                rows=next((k.count for k in known if k is not None), None),
                curves=tuple(
                    _curve(group, m, weights, statistics, site is not None)
                    for m in methods.values()
                    if m.name != "dense" and knows(m, group)
                ),
            )
        )
        progress("inspect", index + 1, len(asked))
    sites = tuple(
        SiteView(s.name, s.op, s.weight, s.weight_shape, s.stored, s.elements, s.path, s.refusal)
        for s in finding.sites
        if site is None or re.search(site, s.name)
    )
    return Inspection(
        opset=source.opset,
        parameters=parameters_of(source.model),
        bytes=bytes_of(source.model),
        data=data,
        sites=sites,
        groups=tuple(groups),
        notes=source.notes,
    )


def _curve(
    group: Group, method: Factorization, weights: Weights, statistics: StatisticsSource | None, whole: bool
) -> Curve:
    if (refusal := method.serves(group)) is not None:
        return Curve(method.name, refusal.reason)
    if (old := too_old(method, weights)) is not None:
        return Curve(method.name, old)
    if method.needs_data and not any(statistics and statistics.of(s) for s in group.sites):
        return Curve(method.name, f"{method.name} needs calibration data at this input")
    found = sorted(
        method.candidates(group, weights, statistics, CandidateOptions()),
        key=lambda c: (c.cost.parameters, c.error),
    )
    if not found:
        return Curve(method.name, f"{method.name} has no form for this weight")
    return Curve(
        method.name,
        bound=all(c.bound for c in found),
        break_even=next((c.rank for c in found if c.cost.parameters >= group.elements), None),
        at_energy=tuple(_point(_first(found, energy), group) for energy in ENERGIES),
        at_share=tuple(_point(_best(found, share * group.elements), group) for share in SHARES),
        points=_points(found, group) if whole else (),
    )


def _points(candidates: Sequence[Candidate], group: Group) -> tuple[Point, ...]:
    """Those that err less than all of at most as many parameters, up to the weight's own, thinned out evenly."""
    falling: list[Candidate] = []
    for candidate in candidates:
        if candidate.cost.parameters <= group.elements and (
            not falling or candidate.error < falling[-1].error
        ):
            falling.append(candidate)
    step = max(1.0, (len(falling) - 1) / (_POINTS - 1))
    kept = sorted({round(i * step) for i in range(_POINTS)} & set(range(len(falling))))
    return tuple(p for i in kept if (p := _point(falling[i], group)) is not None)


def _whole_curves(group: GroupView) -> list[str]:
    """The error of each method at falling shares of the parameters, and in brackets its multiplications in those of the weight."""
    curves = [c for c in group.curves if c.points]
    if not curves:
        return []
    rows = [["share", *(c.method for c in curves)]]
    for share in _ROWS:
        found = [c.within(share) for c in curves]
        cells = ["-" if p is None else f"{p.error:.3g} ({p.flops / max(group.flops, 1):.2g})" for p in found]
        rows.append([f"{share:g}", *cells])
    refused = [f"{c.method}: {c.refusal}" for c in group.curves if c.refusal is not None]
    head = f"{group.name}, {group.parameters:,} parameters: error at a share of them (multiplications, 1: the weight's own)"
    return ["", head, *columns(rows), *refused]


def write_curves(path: Path, found: Inspection) -> None:
    """The curves of the sites that were asked for, as SVG. Raises UsageError where there are none, or too many for a picture."""
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--curve {path}: the picture is an .svg file")
    groups = [g for g in found.to_json()["groups"] if any(c["points"] for c in g["curves"])]
    if not groups:
        raise UsageError(
            "--curve has nothing to draw: no method has a form of these weights (lrcompile inspect says why)"
        )
    if len(groups) > _PANELS:
        raise UsageError(
            f"--curve draws at most {_PANELS} weights or groups of weights, and {len(groups)} match: narrow --site"
        )
    write_text(path, families_file(groups))


def _first(candidates: Sequence[Candidate], energy: float) -> Candidate | None:
    """The smallest that holds this share of the energy."""
    return next((c for c in candidates if c.error**2 <= 1.0 - energy), None)


def _best(candidates: Sequence[Candidate], parameters: float) -> Candidate | None:
    """The most accurate within so many parameters."""
    return min(
        (c for c in candidates if c.cost.parameters <= parameters), key=lambda c: c.error, default=None
    )


def _point(candidate: Candidate | None, group: Group) -> Point | None:
    if candidate is None:
        return None
    cost = candidate.cost
    return Point(
        candidate.rank, cost.parameters, cost.parameters / max(group.elements, 1), cost.flops, candidate.error
    )
