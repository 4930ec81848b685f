"""What a model holds that could be rewritten: sites, groups, and for each the error against the parameters that it keeps.

A curve is a factorization's own candidates, all ranks of them; the figures read off it are

    energy      the rank from which on at least this share of ||S W||^2 is held (S S^T: second moment of the input)
    share       the error of the best form with at most this share of the weight's parameters
    break-even  the smallest rank whose factors take as many parameters as the weight itself
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lrcompile.cost import bytes_of, parameters_of, stored_bytes
from lrcompile.curves import eligible, knows
from lrcompile.interfaces import CandidateOptions, Factorization, StatisticsSource, Weights
from lrcompile.progress import Progress, silent
from lrcompile.records import Budget, Candidate, Finding, Group, Source
from lrcompile.tables import columns, counted

ENERGIES = (0.5, 0.9, 0.99)
SHARES = (0.9, 0.75, 0.5)


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
    bound: whether the errors are upper bounds, not estimates.
    """

    method: str
    refusal: str | None = None
    bound: bool = True
    break_even: int | None = None
    at_energy: tuple[Point | None, ...] = ()
    at_share: tuple[Point | None, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group: its size, whether budgets count it (reason: why not), the rows of data seen at its input, its curves."""

    name: str
    kind: str
    op: str
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    parameters: int
    bytes: int
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
    *, data: str | None, include: str | None = None, exclude: str | None = None, progress: Progress = silent,
) -> Inspection:  # fmt: skip
    """All curves of all groups: one decomposition a weight and factorization, kept in the cache."""
    groups = []
    for index, group in enumerate(finding.groups):
        reasons = [eligible(s, group.kind == "tied", Budget(), include, exclude) for s in group.sites]
        known = [statistics.of(s) for s in group.sites] if statistics is not None else []
        site = group.sites[0]
        groups.append(
            GroupView(
                name=group.name,
                kind=group.kind,
                op=site.op,
                shape=site.weight_shape,
                sites=tuple(s.name for s in group.sites),
                parameters=group.elements,
                bytes=stored_bytes(group),
                reason=reasons[0] if all(reasons) else None,
                rows=next((k.count for k in known if k is not None), None),
                curves=tuple(
                    _curve(group, m, weights, statistics)
                    for m in methods.values()
                    if m.name != "dense" and knows(m, group)
                ),
            )
        )
        progress("inspect", index + 1, len(finding.groups))
    sites = tuple(
        SiteView(s.name, s.op, s.weight, s.weight_shape, s.stored, s.elements, s.path, s.refusal)
        for s in finding.sites
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
    group: Group, method: Factorization, weights: Weights, statistics: StatisticsSource | None
) -> Curve:
    if (refusal := method.serves(group)) is not None:
        return Curve(method.name, refusal.reason)
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
    )


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
