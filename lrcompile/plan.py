"""Plan: which form every weight takes, chosen from the candidates' curves. Pure, but for the candidates' own reading of weights.

A budget on parameters is met by one common ratio for all eligible weights, the largest that keeps it; an error limit alone is met
by bisecting that ratio over compiled and verified trials (`revise`). Dense is always allowed, and every decision says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lrcompile.cost import dense_flops, stored_bytes
from lrcompile.errors import BudgetError, UsageError
from lrcompile.interfaces import CandidateOptions, Factorization, StatisticsSource, Weights
from lrcompile.progress import Progress, silent
from lrcompile.records import Budget, Candidate, Decision, Evidence, Finding, Group, Plan, Refusal, Site
from lrcompile.weights import side_by_side

# Kernels like ranks in eights; matrices this small are fitted exactly.
_MULTIPLE, _SMALL = 8, 128
# A search over the common ratio ends when the bracket is this narrow.
_RATIO_STEP = 0.03

Supports = Callable[[Decision], Refusal | None]


@dataclass(frozen=True, slots=True)
class Curve:
    """The candidates of one group by rising rank, or the reason why it has none."""

    group: Group
    candidates: tuple[Candidate, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be planned. total: elements of all eligible weights, of which `fixed` cannot be rewritten at all."""

    finding: Finding
    curves: tuple[Curve, ...]
    budget: Budget
    target: str
    total: int
    fixed: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was compiled and verified."""

    plan: Plan
    evidence: Evidence


def eligible(site: Site, tied: bool, budget: Budget, include: str | None, exclude: str | None) -> str | None:
    """None when the site's weight counts for budgets and may be rewritten, else the reason in words."""
    if exclude is not None and re.search(exclude, site.name):
        return "excluded by name"
    if include is not None:
        return None if re.search(include, site.name) else "not included by name"
    if budget.rank == "full":
        return None
    if site.op not in ("MatMul", "Gemm"):
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
    progress: Progress = silent,
) -> Problem:
    """Curves of every group, computed once; all plans of a search choose from them."""
    _check_patterns(include, exclude)
    curves: list[Curve] = []
    total = fixed = 0
    counted: set[str] = set()
    units = finding.units

    def work(group: Group) -> Curve | str:
        reasons = [eligible(s, group.kind == "tied", budget, include, exclude) for s in group.sites]
        # a weight with several readers is taken when any reader is wanted and none is excluded
        barred = next((r for r in reasons if r == "excluded by name"), None) or (
            reasons[0] if all(reasons) else None
        )
        return barred or _curve(group, weights, statistics, methods, budget, target, supports)

    for group, made in zip(units, side_by_side(work, units, lambda group: group), strict=True):
        curve = Curve(group, (), made) if isinstance(made, str) else made
        curves.append(curve)
        if not isinstance(made, str):
            elements = _count(group.sites, counted)
            total += elements
            fixed += 0 if curve.candidates else elements
        progress("plan", len(curves), len(units))
    tied = {s.weight for g in units if g.kind == "tied" for s in g.sites}
    refused = [s for s in finding.sites if s.refusal is not None]
    elements = _count(
        [s for s in refused if eligible(s, s.weight in tied, budget, include, exclude) is None], counted
    )
    return Problem(finding, tuple(curves), budget, target, total + elements, fixed + elements)


def _count(sites: Iterable[Site], counted: set[str]) -> int:
    """Elements of the weights of these sites that were not counted yet."""
    fresh = {s.weight: s.elements for s in sites if s.weight not in counted}
    counted.update(fresh)
    return sum(fresh.values())


def _check_patterns(*patterns: str | None) -> None:
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
        multiple=_MULTIPLE if min(site.K, site.N) >= _SMALL else 1,
        full=full,
    )
    dense = _dense(group, "")
    for method in methods:
        if method.name == "dense":
            continue
        if (refusal := method.serves(group)) is not None:
            reasons.append(refusal.reason)
        elif full and not method.exact_at_full_rank:
            reasons.append(f"{method.name} is not exact at full rank")
        elif method.needs_data and not full and not any(statistics and statistics.of(s) for s in group.sites):
            reasons.append(f"{method.name} needs calibration data at this input")
        else:
            for candidate in method.candidates(group, weights, statistics, options):
                reason = None if full else _costs(candidate, dense)
                if reason is None and (no := supports(_decision(group, candidate, ""))) is not None:
                    reason = no.reason
                if reason is None:
                    found.append(candidate)
                elif reason not in reasons:
                    reasons.append(reason)
    found.sort(key=lambda c: (c.cost.parameters, c.error))
    if not reasons and isinstance(budget.rank, int) and budget.rank > min(site.K, site.N):
        reasons = [f"the weight has at most rank {min(site.K, site.N)}"]
    return Curve(group, tuple(found), "" if found else "; ".join(reasons) or "no method serves it")


def _costs(candidate: Candidate, dense: Decision) -> str | None:
    """Why a candidate is not worth having: it must be smaller than what it replaces."""
    if candidate.cost.parameters >= dense.parameters_before:
        return f"rank {candidate.rank} would take as many parameters as the weight"
    if candidate.cost.bytes >= dense.bytes_before:
        return (
            f"its factors would take more bytes than the weight does in its own type ({dense.bytes_before:,})"
        )
    return None


def choose(problem: Problem) -> Plan:
    """The first plan for the problem's budget. Raises BudgetError when no plan keeps it."""
    budget = problem.budget
    if budget.keep is not None:
        return _keep(problem, budget.keep)
    if budget.energy is not None:
        energy = budget.energy
        return _assemble(problem, lambda curve: _by_energy(curve, energy))
    if budget.rank is not None:
        return _assemble(problem, _as_asked)
    return _at_ratio(problem, 0.5)


def _as_asked(curve: Curve) -> tuple[Candidate, str] | None:
    """The best candidate of the one rank that there is."""
    best = min(curve.candidates, key=lambda c: (c.error, c.cost.parameters), default=None)
    return None if best is None else (best, "rank as asked")


def revise(problem: Problem, trials: Sequence[Trial]) -> Plan | None:
    """The next plan to try, or None when the search is over. Only an error limit alone makes a search."""
    budget = problem.budget
    if not budget.max_error or budget.bounds_size or not trials or trials[-1].plan.ratio is None:
        return None
    ratios = [(t.plan.ratio or 1.0, t.evidence.verdict != "failed") for t in trials]
    passed, failed = [r for r, ok in ratios if ok], [r for r, ok in ratios if not ok]
    high, low = min(passed, default=1.0), max(failed, default=0.0)
    known = {_forms(t.plan): t.evidence.verdict != "failed" for t in trials}
    while high - low > _RATIO_STEP:
        following = _at_ratio(problem, (high + low) / 2)
        if (verdict := known.get(_forms(following))) is None:
            return following
        low, high = (
            (low, (high + low) / 2) if verdict else ((high + low) / 2, high)
        )  # the same ranks: it need not be tried again
    return None


def _forms(plan: Plan) -> tuple[object, ...]:
    """What a plan does, whatever its reasons say."""
    return tuple((d.group, d.method, d.rank, d.structure, d.storage) for d in plan.decisions)


def dense_plan(problem: Problem, reason: str) -> Plan:
    """Everything as it is."""
    made = _assemble(problem, lambda curve: None)
    decisions = tuple(replace(d, reason=reason) if d.reason == "dense" else d for d in made.decisions)
    return replace(made, decisions=decisions, ratio=1.0)


def _keep(problem: Problem, keep: float) -> Plan:
    """The largest common ratio whose parameters stay within the budget."""
    if keep >= 1.0:
        return dense_plan(problem, "the budget keeps everything")
    limit = keep * problem.total

    def size(ratio: float) -> int:
        return problem.fixed + sum(
            _parameters(_at(c, ratio), c.group) for c in problem.curves if c.candidates
        )

    low, high = 0.0, 1.0
    if size(low) > limit:
        best = size(low) / problem.total if problem.total else 1.0
        raise BudgetError(
            f"--keep {keep:g} cannot be met: the least that can be kept is {best:.3f} of the {problem.total:,} eligible "
            f"parameters, {problem.fixed:,} of which cannot be rewritten (lrcompile plan --why says why)"
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= limit else (low, middle)
    return replace(_at_ratio(problem, low), ratio=None)


def _at_ratio(problem: Problem, ratio: float) -> Plan:
    """Every group's best candidate of at most `ratio` of its parameters."""

    def choose(curve: Curve) -> tuple[Candidate, str] | None:
        candidate = _at(curve, ratio)
        return None if candidate is None else (candidate, f"one ratio for all, {ratio:.3f}")

    return replace(_assemble(problem, choose), ratio=ratio)


def _at(curve: Curve, ratio: float) -> Candidate | None:
    """The most accurate candidate within the ratio, or the smallest there is."""
    if not curve.candidates:
        return None
    within = [c for c in curve.candidates if c.cost.parameters <= ratio * curve.group.elements]
    return min(within, key=lambda c: (c.error, c.cost.parameters)) if within else curve.candidates[0]


def _parameters(candidate: Candidate | None, group: Group) -> int:
    return candidate.cost.parameters if candidate is not None else group.elements


def _by_energy(curve: Curve, energy: float) -> tuple[Candidate, str] | None:
    for candidate in curve.candidates:
        if candidate.error**2 <= 1.0 - energy:
            return candidate, f"smallest rank that holds {energy:g} of the energy"
    return None


def _assemble(problem: Problem, choose: Callable[[Curve], tuple[Candidate, str] | None]) -> Plan:
    decisions = []
    for curve in problem.curves:
        chosen = choose(curve)
        if chosen is None:
            decisions.append(_dense(curve.group, curve.reason or _no_room(problem.budget)))
        else:
            candidate, reason = chosen
            decisions.append(
                _decision(curve.group, candidate, f"{reason}; {candidate.note}" if candidate.note else reason)
            )
    decisions += [_refused(s) for s in problem.finding.sites if s.refusal is not None]
    return Plan(problem.target, tuple(decisions), eligible=problem.total)


def _no_room(budget: Budget) -> str:
    return (
        f"no rank below break-even holds {budget.energy:g} of the energy"
        if budget.energy is not None
        else "dense"
    )


def _decision(group: Group, candidate: Candidate, reason: str) -> Decision:
    return replace(
        _dense(group, reason),
        method=candidate.method,
        rank=candidate.rank,
        storage=candidate.storage,
        claimed_error=candidate.error,
        bound=candidate.bound,
        parameters_after=candidate.cost.parameters,
        bytes_after=candidate.cost.bytes,
        flops_after=candidate.cost.flops,
        structure=candidate.structure,
    )


def _dense(group: Group, reason: str) -> Decision:
    size, flops = stored_bytes(group), sum(dense_flops(s) for s in group.sites)
    return Decision(
        group=group.name, sites=tuple(s.name for s in group.sites), method="dense", rank=None, storage=None, claimed_error=None,
        bound=True, parameters_before=group.elements, parameters_after=group.elements, bytes_before=size, bytes_after=size,
        flops_before=flops, flops_after=flops, reason=reason,
    )  # fmt: skip


def _refused(site: Site) -> Decision:
    return Decision(
        group=site.name, sites=(site.name,), method="dense", rank=None, storage=None, claimed_error=None, bound=True,
        parameters_before=site.elements, parameters_after=site.elements, bytes_before=0, bytes_after=0, flops_before=0,
        flops_after=0, reason=site.refusal or "",
    )  # fmt: skip


def check_plan(
    given: Plan,
    finding: Finding,
    methods: Mapping[str, Factorization],
    weights: Weights,
    statistics: StatisticsSource | None,
    target: str,
) -> Plan:
    """A plan that a user may have edited, held against the model: cost and error are those of what it now asks for.

    Raises UsageError naming the group that does not fit.
    """
    if given.target != target:
        raise UsageError(
            f"the plan is for {given.target}, not for {target}: give --target {given.target}, or plan again"
        )
    groups = {g.name: g for g in finding.groups}
    refused = {s.name for s in finding.sites if s.refusal is not None}
    taken: dict[str, str] = {}
    decisions = []
    for decision in given.decisions:
        if not decision.rewrites:
            decisions.append(decision)
            continue
        group = groups.get(decision.group)
        if group is None:
            why = "cannot be rewritten" if decision.group in refused else "is not in this model"
            raise UsageError(f"the plan rewrites {decision.group!r}, which {why}")
        if tuple(s.name for s in group.sites) != decision.sites:
            raise UsageError(
                f"the plan's group {decision.group!r} holds other sites than the model's: {', '.join(decision.sites)}"
            )
        if decision.method not in methods:
            raise UsageError(
                f"the plan asks for {decision.method!r} at {decision.group!r}; known: {', '.join(sorted(methods))}"
            )
        if refusal := methods[decision.method].serves(group):
            raise UsageError(f"the plan asks for {decision.method!r} at {decision.group!r}: {refusal.reason}")
        site = group.sites[0]
        if decision.rank is not None and not 1 <= decision.rank <= min(site.K, site.N):
            raise UsageError(
                f"the plan's rank {decision.rank} at {decision.group!r} is not between 1 and {min(site.K, site.N)}"
            )
        for name in decision.sites:
            if name in taken:
                raise UsageError(
                    f"the plan rewrites {name!r} twice: in {taken[name]!r} and in {decision.group!r}"
                )
            taken[name] = decision.group
        decisions.append(_priced(decision, group, methods[decision.method], weights, statistics))
    return replace(given, decisions=tuple(decisions))


def _priced(
    decision: Decision,
    group: Group,
    method: Factorization,
    weights: Weights,
    statistics: StatisticsSource | None,
) -> Decision:
    """The decision with the cost and the error of the form that it names."""
    ranks = (decision.rank,) if decision.rank is not None else None
    form = (decision.rank, decision.structure, decision.storage)
    for options in (CandidateOptions(full=True), CandidateOptions(ranks=ranks)):
        if options.full and not method.exact_at_full_rank:
            continue
        if (
            not options.full
            and method.needs_data
            and not any(statistics and statistics.of(s) for s in group.sites)
        ):
            raise UsageError(
                f"the plan asks for {method.name!r} at {group.name!r}, which needs calibration data there: give --data"
            )
        for candidate in method.candidates(group, weights, statistics, options):
            if (candidate.rank, candidate.structure, candidate.storage) == form:
                return _decision(group, candidate, decision.reason)
    raise UsageError(
        f"the plan asks for {method.name!r} at {group.name!r} in a form that it does not have: {form}"
    )


def group_by_name(finding: Finding) -> Mapping[str, Group]:
    return {g.name: g for g in finding.groups}


def decisions_for(plan: Plan, finding: Finding) -> Iterable[tuple[Decision, Group]]:
    """The decisions that change something, each with its group."""
    groups = group_by_name(finding)
    return ((d, groups[d.group]) for d in plan.decisions if d.rewrites)
