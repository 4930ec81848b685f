"""Curves: what every group could become, each form with its cost and its error. Pure, but for the candidates' reading of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrcompile.coding import FLOATS
from lrcompile.cost import dense_flops, stored_bytes
from lrcompile.errors import UsageError
from lrcompile.interfaces import CandidateOptions, Factorization, StatisticsSource, Weights
from lrcompile.permutations import absorbed
from lrcompile.progress import Progress, silent
from lrcompile.records import Budget, Candidate, Decision, Finding, Group, Kind, Refusal, Site
from lrcompile.storing import forms, legal
from lrcompile.weights import side_by_side

# Kernels like ranks in eights; matrices this small are fitted exactly.
_MULTIPLE, _SMALL = 8, 128
# Where speed is asked for kernels want whole tiles.
_TILE, _TILED = 32, 512

Supports = Callable[[Decision], Refusal | None]


@dataclass(frozen=True, slots=True)
class Curve:
    """The candidates of one group by rising cost, or the reason why it has none."""

    group: Group
    candidates: tuple[Candidate, ...]
    reason: str = ""


# Seconds of a group's readers with their weights in a form (None: as they are); None where nothing like it was timed.
Seconds = Callable[[Group, Candidate | None], float | None]


@dataclass(frozen=True, slots=True)
class Whole:
    """What budgets are relative to, and how often each site's weight meets a row of data.

    bytes: of all constants. seconds: of one run of the original; None where it was not timed.
    """

    bytes: int
    rows: Mapping[str, int]
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be planned.

    curves: of the groups that partition the sites. wider: of groups that overlap them, those that have candidates. total: elements
    of all eligible weights, of which `fixed` cannot be rewritten at all. seconds: what forms take, where speed is asked for; margin:
    how many times faster the engine must be then.
    """

    finding: Finding
    curves: tuple[Curve, ...]
    budget: Budget
    target: str
    total: int
    fixed: int
    wider: tuple[Curve, ...] = ()
    whole: Whole | None = None
    seconds: Seconds | None = None
    margin: float = 1.0

    @property
    def open(self) -> tuple[Curve, ...]:
        """The curves among which there is something to choose."""
        taken = {s.name for c in self.wider for s in c.group.sites}
        lone = (c for c in self.curves if c.candidates or all(s.name in taken for s in c.group.sites))
        return (*lone, *self.wider)

    @property
    def predicts(self) -> bool:
        """Whether it is known of every candidate how far it moves the outputs."""
        return bool(self.open) and all(x.movement is not None for c in self.open for x in c.candidates)


def eligible(site: Site, tied: bool, budget: Budget, include: str | None, exclude: str | None) -> str | None:
    """None when the site's weight counts for budgets and may be rewritten, else the reason in words."""
    if exclude is not None and re.search(exclude, site.name):
        return "excluded by name"
    if include is not None:
        return None if re.search(include, site.name) else "not included by name"
    if budget.rank == "full":
        return None
    if site.op not in ("MatMul", "Gemm", "Conv"):
        return f"a {site.op} weight takes part only when --include names it"
    return "a head tied to a table takes part only when --include names it" if tied else None


def prepare(
    finding: Finding,
    weights: Weights,
    statistics: StatisticsSource | None,
    methods: Sequence[Factorization],
    budget: Budget,
    *,
    target: str,
    supports: Supports = lambda decision: None,
    include: str | None = None,
    exclude: str | None = None,
    whole: Whole | None = None,
    storages: Sequence[str] = (),
    activations: Sequence[str] = (),
    progress: Progress = silent,
) -> Problem:
    """Curves of every group, computed once; all plans of a search choose from them."""
    check_patterns(include, exclude)
    curves: list[Curve] = []
    wider: list[Curve] = []
    counted: set[str] = set()
    fresh: dict[str, int] = {}  # elements of each eligible unit, each weight counted once
    units = finding.units
    # groups that overlap these compete with them where there is data to say which is better
    over = (
        ()
        if statistics is None or budget.rank is not None or budget.energy is not None
        else finding.overlapping
    )
    groups = (*units, *over)

    lone = {g.sites[0].name for g in units if g.kind == "alone" and not g.keeper}

    def work(group: Group) -> Curve | str:
        reasons = [eligible(s, group.kind == "tied", budget, include, exclude) for s in group.sites]
        # a weight with several readers is taken when any reader is wanted and none is excluded
        if group.shares_weight:
            barred = next((r for r in reasons if r == "excluded by name"), None) or (
                reasons[0] if all(reasons) else None
            )
        else:
            barred = next(filter(None, reasons), None) or next(
                (f"{s.name} has other readers" for s in group.sites if s.name not in lone), None
            )
        return barred or _curve(
            group, weights, statistics, methods, budget, target, supports, storages, activations
        )

    for group, made in zip(groups, side_by_side(work, groups, lambda group: group), strict=True):
        curve = Curve(group, (), made) if isinstance(made, str) else made
        (curves if group.shares_weight else wider).append(curve)
        if group.shares_weight and not isinstance(made, str):
            fresh[group.name] = _count(group.sites, counted)
        progress("plan", len(curves) + len(wider), len(groups))
    tied = {s.weight for g in units if g.kind == "tied" for s in g.sites}
    refused = [s for s in finding.sites if s.refusal is not None]
    elements = _count(
        [s for s in refused if eligible(s, s.weight in tied, budget, include, exclude) is None], counted
    )
    served = {s.name for c in wider if c.candidates for s in c.group.sites}
    fixed = elements + sum(
        fresh.get(c.group.name, 0)
        for c in curves
        if not c.candidates and not all(s.name in served for s in c.group.sites)
    )
    return Problem(
        finding, tuple(curves), budget, target, elements + sum(fresh.values()), fixed,
        tuple(c for c in wider if c.candidates), whole,
    )  # fmt: skip


def _count(sites: Iterable[Site], counted: set[str]) -> int:
    """Elements of the weights of these sites that were not counted yet."""
    fresh = {s.weight: s.elements for s in sites if s.weight not in counted}
    counted.update(fresh)
    return sum(fresh.values())


def check_patterns(*patterns: str | None) -> None:
    """Raises UsageError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error


def _curve(
    group: Group,
    weights: Weights,
    statistics: StatisticsSource | None,
    methods: Sequence[Factorization],
    budget: Budget,
    target: str,
    supports: Supports,
    storages: Sequence[str] = (),
    activations: Sequence[str] = (),
) -> Curve:
    """All candidates of a group that are legal, or the reasons of all methods."""
    found: list[Candidate] = []
    reasons: list[str] = []
    full = budget.rank == "full"
    if group.keeper and not full:
        return Curve(
            group,
            (),
            f"{group.keeper} reads the weight too and keeps it in the file: factors would only add to it",
        )
    site = group.sites[0]
    options = CandidateOptions(
        ranks=(budget.rank,) if isinstance(budget.rank, int) else None,
        multiple=_multiple(min(site.K, site.N), budget),
        full=full,
        storages=tuple(t for t in storages if t not in FLOATS and legal(t, group, target) is None),
    )
    dense = dense_of(group, "")
    linear = all(s.kind == "linear" for s in group.sites)
    absorbs = group.shares_weight and all(absorbed(s) for s in group.sites)
    for method in methods:
        if method.name == "dense" or not knows(method, group):
            continue
        if (refusal := method.serves(group)) is not None:
            reasons.append(refusal.reason)
        elif full and not method.exact_at_full_rank:
            reasons.append(f"{method.name} is not exact at full rank")
        elif not full and (old := too_old(method, weights)) is not None:
            reasons.append(old)
        elif method.needs_data and not full and not any(statistics and statistics.of(s) for s in group.sites):
            reasons.append(f"{method.name} needs calibration data at this input")
        else:
            for made in method.candidates(group, weights, statistics, options):
                candidate = folded(made) if absorbs and made.index_bytes else made
                objective = "latency" if budget.asks_speed else budget.objective
                reason = None if full else _costs(candidate, dense, objective, linear)
                if candidate.storage is not None and reason is None:
                    no = legal(candidate.storage, group, target, folds=candidate.folds)
                    reason = no.reason if no is not None else None
                if reason is None and (no := supports(decision_of(group, candidate, ""))) is not None:
                    reason = no.reason
                if reason is None:
                    found.append(candidate)
                elif reason not in reasons:
                    reasons.append(reason)
    coded_forms = forms(group, methods, found, storages, target, weights, statistics, activations)
    for coded in coded_forms if not full else ():
        if isinstance(coded, Refusal):
            reasons.append(coded.reason)
        elif coded.cost.bytes < dense.bytes_before:
            if (no := supports(decision_of(group, coded, ""))) is None:
                found.append(coded)
            else:
                reasons.append(no.reason)
    found.sort(key=lambda c: (c.cost.parameters, c.error))
    if not reasons and isinstance(budget.rank, int) and budget.rank > min(site.K, site.N):
        reasons = [f"the weight has at most rank {min(site.K, site.N)}"]
    asking = "" if storages else " (some only with --storage)"
    return Curve(
        group,
        tuple(found),
        "" if found else "; ".join(reasons) or f"none of the methods is for {site.op}{asking}",
    )


def knows(method: Factorization, group: Group) -> bool:
    """Whether a factorization is for weights used like these: those of a Conv are only offered to those that name it in `kinds`."""
    kinds: tuple[Kind, ...] = getattr(method, "kinds", ("linear", "lookup"))
    return all(s.kind in kinds for s in group.sites)


def too_old(method: Factorization, weights: Weights) -> str | None:
    """Why a model of an early opset cannot hold the forms of a factorization that names its `least_opset`."""
    least: int = getattr(method, "least_opset", 0)
    if weights.opset >= least:
        return None
    return f"{method.name} needs opset {least} for its nodes, and the model is of opset {weights.opset}"


def _multiple(size: int, budget: Budget) -> int:
    """Ranks are offered in steps of this."""
    if budget.asks_speed and size >= _TILED:
        return _TILE
    return _MULTIPLE if size >= _SMALL else 1


def timed(problem: Problem, seconds: Seconds, whole: Whole, margin: float) -> Problem:
    """The same problem with only those forms that are expected to take less time than the weight as it is."""

    def faster(curve: Curve) -> Curve:
        dense = seconds(curve.group, None)
        if dense is None or not curve.candidates:
            reason = curve.reason or "its weight was not timed, so no form of it is known to be faster"
            return replace(curve, candidates=(), reason=reason)
        shares = [(c, t / dense) for c in curve.candidates if (t := seconds(curve.group, c)) is not None]
        kept = tuple(
            replace(c, note=f"{c.note}{'; ' if c.note else ''}expected to take {x:.2f} of the time")
            for c, x in shares
            if x < 1.0
        )
        best = min((x for _, x in shares), default=None)
        slow = (
            "was not timed"
            if best is None
            else f"would take at least {best:.2f} times the time of the weight"
        )
        return replace(
            curve, candidates=kept, reason=curve.reason if kept else f"no form pays: the best {slow}"
        )

    return replace(
        problem, curves=tuple(map(faster, problem.curves)), whole=whole, seconds=seconds, margin=margin,
        wider=tuple(c for c in map(faster, problem.wider) if c.candidates),
    )  # fmt: skip


def folded(candidate: Candidate) -> Candidate:
    """The form where neighbours absorb the permutation of its outputs: it needs no index."""
    cost = replace(candidate.cost, bytes=candidate.cost.bytes - candidate.index_bytes)
    return replace(candidate, cost=cost, index_bytes=0, permutes="out")


def _costs(candidate: Candidate, dense: Decision, objective: str, linear: bool) -> str | None:
    """Why a candidate is not worth having: it must save what the objective counts, and only the file may cost time."""
    if candidate.folds and objective != "disk":
        return (
            f"{candidate.method} would only make the file smaller, not the engine that is made of it: its cores are multiplied out "
            "to the weight (--objective disk)"
        )
    if objective in ("flops", "latency"):
        if candidate.cost.flops >= dense.flops_before:
            return f"rank {candidate.rank} would take as many FLOPs as the weight (--objective {objective})"
        return None
    if candidate.storage is None and candidate.cost.parameters >= dense.parameters_before:
        return f"rank {candidate.rank} would take as many parameters as the weight"
    if candidate.cost.bytes >= dense.bytes_before:
        return (
            f"its factors would take more bytes than the weight does in its own type ({dense.bytes_before:,})"
        )
    if linear and candidate.storage is None and candidate.cost.flops > dense.flops_before:
        return f"{candidate.method} would take more multiplications than the weight where it saves parameters"
    return None


def decision_of(group: Group, candidate: Candidate, reason: str) -> Decision:
    return replace(
        dense_of(group, reason),
        method=candidate.method,
        rank=candidate.rank,
        storage=candidate.storage,
        claimed_error=candidate.error,
        bound=candidate.bound,
        parameters_after=candidate.cost.parameters,
        bytes_after=candidate.cost.bytes,
        flops_after=candidate.cost.flops,
        structure=candidate.structure,
        movement=candidate.movement,
        permutes=candidate.permutes,
        activations=candidate.activations,
    )


def dense_of(group: Group, reason: str) -> Decision:
    size, flops = stored_bytes(group), sum(dense_flops(s) for s in group.sites)
    return Decision(
        group=group.name, sites=tuple(s.name for s in group.sites), method="dense", rank=None, storage=None, claimed_error=None,
        bound=True, parameters_before=group.elements, parameters_after=group.elements, bytes_before=size, bytes_after=size,
        flops_before=flops, flops_after=flops, reason=reason,
    )  # fmt: skip


def refused_of(site: Site) -> Decision:
    return Decision(
        group=site.name, sites=(site.name,), method="dense", rank=None, storage=None, claimed_error=None, bound=True,
        parameters_before=site.elements, parameters_after=site.elements, bytes_before=0, bytes_after=0, flops_before=0,
        flops_after=0, reason=site.refusal or "",
    )  # fmt: skip
