"""Plan: which form every group takes, chosen from the candidates' curves. Pure.

Where it is known how far each form moves the model's outputs, a budget is met by the least predicted movement over all groups,
methods and ranks together, dense included (`allocate`); without data by one common ratio for all. An error limit alone is
met by bisecting the share that is kept over compiled and verified trials (`revise`). Every decision says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lrcompile.allocate import Options, allocate, cheapest, covers_of
from lrcompile.cost import stored_bytes
from lrcompile.curves import Curve, Problem, Whole, decision_of, dense_of, prepare, refused_of
from lrcompile.errors import BudgetError
from lrcompile.measures import Measure, flops_after, measure_of
from lrcompile.records import Amount, Budget, Candidate, Decision, Evidence, Finding, Group, Plan

__all__ = [
    "Problem",
    "Trial",
    "Whole",
    "choose",
    "decisions_for",
    "dense_plan",
    "fast_enough",
    "flops_after",
    "group_by_name",
    "prepare",
    "revise",
    "traced",
]

# A search over the share that is kept ends when the bracket is this narrow.
_RATIO_STEP = 0.03
# How often a latency budget that was missed is tried again with less.
_TIGHTER = 3

Choice = tuple[Candidate, str] | None  # a form and why, or dense


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was compiled and verified. speedup: time of the original over its own, raced; None where speed was not asked for."""

    plan: Plan
    evidence: Evidence
    speedup: float | None = None


def choose(problem: Problem) -> Plan:
    """The first plan for the problem's budget. Raises BudgetError when no plan keeps it."""
    budget = problem.budget
    if any(b is not None for b in (budget.keep, budget.size, budget.flops, budget.latency, budget.bits)):
        measure = measure_of(problem)
        if measure.limit >= measure.sum_of(problem):
            return dense_plan(problem, "the budget keeps everything")
        return _within(problem, measure, measure.limit)
    if budget.energy is not None:
        energy = budget.energy
        return _assemble(problem, lambda curve: _by_energy(curve, energy))
    if budget.rank is not None:
        return _assemble(problem, _as_asked)
    return _at_share(problem, 0.5)


def _within(problem: Problem, measure: Measure, limit: float, share: float | None = None) -> Plan:
    """The least movement of the outputs for this much; one ratio for all where movements are not known."""
    best = _allocated if problem.predicts else _common_ratio
    plan = best(problem, measure, limit)
    if plan is None and problem.seconds is not None and problem.budget.latency is None:
        # of forms that are no faster none is wanted: as small as the others allow
        plan = (
            best(problem, measure, _least(problem, measure)) if problem.open else dense_plan(problem, "dense")
        )
    if plan is None:
        raise _cannot(problem, measure)
    return replace(plan, ratio=share)


def _cannot(problem: Problem, measure: Measure) -> BudgetError:
    asked = next(iter(problem.budget.bounds), str(problem.budget))
    options = {c.group.name: _options(c, measure) for c in problem.open}
    least = cheapest(options, covers_of([c.group for c in problem.open])).cost
    reached = least + measure.whole - measure.sum_of(problem)
    share = reached / measure.whole if measure.whole else 1.0
    if measure.words == "seconds":
        return BudgetError(
            f"{asked} cannot be met: by the cost table the fastest plan takes {share:.2f} of the original's time (lrcompile plan --why says why)"
        )
    amount = f" ({Amount(math.ceil(reached))}{'B' if measure.words == 'bytes' else ''})"
    return BudgetError(
        f"{asked} cannot be met: the least that can be kept is {share:.3f} of the {measure.whole:,.0f} {measure.words}"
        f"{amount if problem.budget.keep is None else ''}, {_rest(problem)} (lrcompile plan --why says why)"
    )


def _rest(problem: Problem) -> str:
    """What no form makes smaller."""
    fixed = f"{problem.fixed:,} parameters of which cannot be rewritten"
    if problem.budget.keep is not None:
        return fixed
    return f"where only the {problem.total:,} eligible parameters can shrink{f', {fixed}' if problem.fixed else ''}"


def _options(curve: Curve, measure: Measure) -> Options:
    """Dense first, where the group is one that can stay as it is."""
    movements = [c.movement or 0.0 for c in curve.candidates]
    costs = [measure.of(curve.group, c) for c in curve.candidates]
    if curve.group.shares_weight:
        movements, costs = [0.0, *movements], [measure.of(curve.group, None), *costs]
    return Options(np.array(movements), np.array(costs, np.float64))


def _allocated(problem: Problem, measure: Measure, limit: float) -> Plan | None:
    curves = {c.group.name: c for c in problem.open}
    options = {name: _options(curve, measure) for name, curve in curves.items()}
    found = allocate(options, covers_of([c.group for c in curves.values()]), limit)
    if found is None:
        return None
    chosen: dict[str, Choice] = {}
    for name, index in found.chosen.items():
        curve = curves[name]
        index -= curve.group.shares_weight
        form = curve.candidates[index] if index >= 0 else None
        chosen[name] = (
            None if form is None else (form, f"predicted to move the outputs by {form.movement:.1e}")
        )
    covered = {s.name for n in chosen for s in curves[n].group.sites}
    dense = "dense: no form is worth what it would move the outputs by"
    decisions = [_made(curves[n].group, c, dense) for n, c in chosen.items()]
    decisions += [
        dense_of(c.group, c.reason or dense)
        for c in problem.curves
        if c.group.name not in chosen and not any(s.name in covered for s in c.group.sites)
    ]
    made = _plan(problem, decisions)
    return replace(made, movement=found.movement)


def _common_ratio(problem: Problem, measure: Measure, limit: float) -> Plan | None:
    """The largest ratio for all that stays within the limit."""
    curves = [c for c in problem.curves if c.candidates]

    def spent(ratio: float) -> float:
        return sum(measure.of(c.group, _at(c, ratio)) for c in curves)

    low, high = 0.0, 1.0
    if spent(low) > limit:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= limit else (low, middle)

    def choose(curve: Curve) -> Choice:
        candidate = _at(curve, low)
        return None if candidate is None else (candidate, f"one ratio for all, {low:.3f}")

    return _assemble(problem, choose)


def _at_share(problem: Problem, share: float) -> Plan:
    """The best plan that keeps at most this share of what the objective counts, or the smallest there is."""
    measure = _objective(problem)
    return _within(problem, measure, max(share * measure.sum_of(problem), _least(problem, measure)), share)


def _least(problem: Problem, measure: Measure) -> float:
    """The least that all that is open together can cost."""
    options = {c.group.name: _options(c, measure) for c in problem.open}
    return cheapest(options, covers_of([c.group for c in problem.open])).cost if options else 0.0


def traced(problem: Problem, shares: Iterable[float]) -> Iterator[Plan]:
    """The best plan for each of these shares of what is eligible and open; equal ones once. What is not predicted gives none."""
    if not problem.predicts:
        return
    budget = problem.budget
    bound = budget.size is not None or budget.flops is not None or budget.latency is not None
    measure = measure_of(problem) if bound else _objective(problem)
    least, whole = _least(problem, measure), measure.sum_of(problem)
    known: set[tuple[object, ...]] = set()
    for share in shares:
        plan = _within(problem, measure, max(share * whole, least))
        if (forms := _forms(plan)) not in known:
            known.add(forms)
            yield plan


def _objective(problem: Problem) -> Measure:
    """What gets small under an error limit alone: FLOPs, time, or parameters: of one type bytes go with them."""
    unbound = replace(problem.budget, keep=None, size=None, flops=None, latency=None)
    if problem.budget.objective == "flops":
        asked = replace(unbound, flops=Amount(1.0, relative=True))
    elif problem.seconds is not None:
        asked = replace(unbound, latency=Amount(1.0, relative=True))
    else:
        asked = replace(unbound, keep=1.0)
    return measure_of(replace(problem, budget=asked))


def _as_asked(curve: Curve) -> Choice:
    """The best candidate of the one rank that there is."""
    best = min(curve.candidates, key=lambda c: (c.error, c.cost.parameters), default=None)
    return None if best is None else (best, "rank as asked")


def revise(problem: Problem, trials: Sequence[Trial]) -> Plan | None:
    """The next plan to try, or None when the search is over: of the smallest that holds the errors, then of one that is faster."""
    following = _searched(problem, trials)
    return following if following is not None else _gated(problem, trials)


def fast_enough(problem: Problem, trial: Trial) -> bool:
    """Whether a plan was measured to be as fast as was asked for; one that changes nothing need not be."""
    return trial.speedup is None or not trial.plan.rewritten or trial.speedup >= _needed(problem)


def _needed(problem: Problem) -> float:
    """How many times faster than the original an engine must be."""
    budget, whole = problem.budget, problem.whole
    if budget.latency is None or whole is None or whole.seconds is None:
        return problem.margin
    return whole.seconds / budget.latency.of(whole.seconds)


def _gated(problem: Problem, trials: Sequence[Trial]) -> Plan | None:
    """The speed gate. What was not fast enough is tried again without its least paying weights, half of them each time; under
    ``--latency`` with less time to spend, by as much as was missed.
    """
    held = [t for t in trials if t.evidence.verdict != "failed"]
    if problem.seconds is None or not held or fast_enough(problem, held[-1]):
        return None
    last = held[-1]
    assert last.speedup is not None
    if problem.budget.latency is None:
        return without_least_paying(problem, last.plan)
    missed = sum(not fast_enough(problem, t) for t in held)
    measure = measure_of(problem)
    tighter = measure.limit - missed * measure.whole * max(1.0 / last.speedup - 1.0 / _needed(problem), 0.005)
    if missed > _TIGHTER or tighter < _least(problem, measure):
        return None
    return _within(problem, measure, tighter)


def without_least_paying(problem: Problem, plan: Plan) -> Plan:
    """The plan with the half of its rewritten groups that is expected to save least as they were; everything dense where one is left."""
    seconds = problem.seconds
    assert seconds is not None
    groups = {c.group.name: c for c in (*problem.curves, *problem.wider)}

    def saves(decision: Decision) -> float:
        curve = groups[decision.group]
        form = next((c for c in curve.candidates if _is(c, decision)), None)
        return (seconds(curve.group, None) or 0.0) - (seconds(curve.group, form) or 0.0) if form else 0.0

    ranked = sorted(plan.rewritten, key=saves, reverse=True)
    kept = ranked[: len(ranked) // 2]
    if not kept:
        return dense_plan(
            problem, f"no form was measured to make the engine {problem.margin:g} times as fast"
        )
    covered = {s for d in kept for s in d.sites}
    gone = {s for d in ranked[len(kept) :] for s in d.sites}
    decisions = [
        *kept,
        *(
            dense_of(
                c.group,
                "dense: it pays least, and with it the engine was not fast enough"
                if s.name in gone
                else c.reason or "dense",
            )
            for c in problem.curves
            if (s := c.group.sites[0]).name not in covered
        ),
    ]
    return _plan(problem, decisions)


def _is(candidate: Candidate, decision: Decision) -> bool:
    return (candidate.method, candidate.rank, candidate.structure, candidate.storage, candidate.activations) == (
        decision.method, decision.rank, decision.structure, decision.storage, decision.activations,
    )  # fmt: skip


def _searched(problem: Problem, trials: Sequence[Trial]) -> Plan | None:
    """Bisection over the share that is kept. Only an error limit alone makes a search."""
    budget = problem.budget
    if not budget.max_error or budget.bounds_size or not trials or trials[-1].plan.ratio is None:
        return None
    ratios = [(t.plan.ratio or 1.0, t.evidence.verdict != "failed") for t in trials]
    passed, failed = [r for r, ok in ratios if ok], [r for r, ok in ratios if not ok]
    high, low = min(passed, default=1.0), max(failed, default=0.0)
    known = {_forms(t.plan): t.evidence.verdict != "failed" for t in trials}
    while high - low > _RATIO_STEP:
        following = _at_share(problem, (high + low) / 2)
        if (verdict := known.get(_forms(following))) is None:
            return following
        low, high = (
            (low, (high + low) / 2) if verdict else ((high + low) / 2, high)
        )  # the same ranks: it need not be tried again
    return None


def _forms(plan: Plan) -> tuple[object, ...]:
    """What a plan does, whatever its reasons say."""
    return tuple((d.group, d.method, d.rank, d.structure, d.storage, d.activations) for d in plan.decisions)


def dense_plan(problem: Problem, reason: str) -> Plan:
    """Everything as it is."""
    made = _assemble(problem, lambda curve: None)
    decisions = tuple(replace(d, reason=reason) if d.reason == "dense" else d for d in made.decisions)
    return replace(made, decisions=decisions, ratio=1.0, movement=0.0 if problem.predicts else None)


def _at(curve: Curve, ratio: float) -> Candidate | None:
    """The most accurate candidate within the ratio, or the smallest there is."""
    if not curve.candidates:
        return None
    whole = stored_bytes(curve.group)
    within = [
        c
        for c in curve.candidates
        if (c.cost.parameters / curve.group.elements if c.storage is None else c.cost.bytes / whole) <= ratio
    ]
    if within:
        return min(within, key=lambda c: (c.error, c.cost.parameters))
    return min(curve.candidates, key=lambda c: c.cost.bytes)


def _by_energy(curve: Curve, energy: float) -> Choice:
    for candidate in curve.candidates:
        if candidate.error**2 <= 1.0 - energy:
            return candidate, f"smallest rank that holds {energy:g} of the energy"
    return None


def _assemble(problem: Problem, choose: Callable[[Curve], Choice]) -> Plan:
    """Every unit by itself."""
    return _plan(
        problem, [_made(c.group, choose(c), c.reason or _no_room(problem.budget)) for c in problem.curves]
    )


def _made(group: Group, choice: Choice, dense: str) -> Decision:
    if choice is None:
        return dense_of(group, dense)
    candidate, reason = choice
    return decision_of(group, candidate, f"{reason}; {candidate.note}" if candidate.note else reason)


def _plan(problem: Problem, decisions: Iterable[Decision]) -> Plan:
    """The decisions in the order of the model's sites."""
    refused = [refused_of(s) for s in problem.finding.sites if s.refusal is not None]
    place = {s.name: i for i, s in enumerate(problem.finding.sites)}
    ordered = sorted(decisions, key=lambda d: place[d.sites[0]])
    return Plan(problem.target, (*ordered, *refused), eligible=problem.total)


def _no_room(budget: Budget) -> str:
    return (
        f"no rank below break-even holds {budget.energy:g} of the energy"
        if budget.energy is not None
        else "dense"
    )


def group_by_name(finding: Finding) -> Mapping[str, Group]:
    return {g.name: g for g in finding.groups}


def decisions_for(plan: Plan, finding: Finding) -> Iterable[tuple[Decision, Group]]:
    """The decisions that change something, each with its group."""
    groups = group_by_name(finding)
    return ((d, groups[d.group]) for d in plan.decisions if d.rewrites)
