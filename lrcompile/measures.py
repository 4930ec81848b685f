"""Measures: what a budget counts of a group's form. Pure.

--keep     parameters of the eligible weights     --size     bytes of all constants
--flops    2 MAC of the sites at the first feed   --latency  seconds of a run at the first feed, by the cost table
--bits     stored bits of the eligible weights, scales, zero points and levels among them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lrcompile.cost import dense_flops, stored_bytes
from lrcompile.curves import Problem, Whole, decision_of, dense_of
from lrcompile.records import Candidate, Decision, Group, Plan


@dataclass(frozen=True, slots=True)
class Measure:
    """What a budget counts. of: of a group's form (None: dense). limit: of all that is open together; words: of what, for messages."""

    of: Callable[[Group, Candidate | None], float]
    whole: float
    limit: float
    words: str

    def sum_of(self, problem: Problem) -> float:
        """All that is open, dense."""
        return sum(self.of(c.group, None) for c in problem.open if c.group.shares_weight)


def measure_of(problem: Problem) -> Measure:
    """By the budget: parameters of eligible weights, bytes of all constants, or FLOPs or seconds at the first feed."""
    budget, whole = problem.budget, problem.whole

    def parameters(group: Group, form: Candidate | None) -> float:
        return form.cost.parameters if form is not None else group.elements

    def size(group: Group, form: Candidate | None) -> float:
        return form.cost.bytes if form is not None else dense_of(group, "").bytes_before

    def flops(group: Group, form: Candidate | None) -> float:
        assert whole is not None
        before = sum(whole.rows.get(s.name, 0) * dense_flops(s) for s in group.sites)
        return before if form is None else before - saved_flops(decision_of(group, form, ""), whole)

    def seconds(group: Group, form: Candidate | None) -> float:
        assert problem.seconds is not None
        taken = problem.seconds(group, form)
        return (
            0.0 if taken is None else taken
        )  # what was not timed stays as it is, and its time is in the rest

    if budget.latency is not None:
        assert whole is not None and whole.seconds is not None
        of, total, words = seconds, whole.seconds, "seconds"
        asked = budget.latency.of(total)
    elif budget.bits is not None:  # of the eligible weights, those left dense too
        of, words = size, "stored bytes"
        total = float(sum(stored_bytes(c.group) for c in problem.open if c.group.shares_weight))
        units = [c.group for c in problem.curves if c.group.shares_weight]
        total += problem.fixed * sum(map(stored_bytes, units)) / max(sum(g.elements for g in units), 1)
        asked = budget.bits / 8.0 * problem.total
    elif budget.size is not None or (budget.keep is None and budget.flops is None):
        assert whole is not None
        of, total, words = size, float(whole.bytes), "bytes"
        asked = budget.size.of(total) if budget.size is not None else total
    elif budget.flops is not None:
        assert whole is not None
        sites = [s for s in problem.finding.sites if s.refusal is None]
        of, words = flops, "FLOPs"
        total = float(sum(whole.rows.get(s.name, 0) * dense_flops(s) for s in sites))
        asked = budget.flops.of(total)
    else:
        assert budget.keep is not None
        of, total, words = parameters, float(problem.total), "eligible parameters"
        asked = budget.keep * total
    measure = Measure(of, total, 0.0, words)
    return replace(measure, limit=asked - (total - measure.sum_of(problem)))


def saved_flops(decision: Decision, whole: Whole) -> int:
    """FLOPs at the first feed that a decision saves, spread over its sites: as the published totals count them."""
    each = (decision.flops_before - decision.flops_after) // max(len(decision.sites), 1)
    return sum(whole.rows.get(name, 0) * each for name in decision.sites)


def flops_after(problem: Problem, plan: Plan) -> int | None:
    """2 MAC of all sites at the first feed under a plan; None where no feed says how many rows there are."""
    if (whole := problem.whole) is None or not whole.rows:
        return None
    before = sum(
        whole.rows.get(s.name, 0) * dense_flops(s) for s in problem.finding.sites if s.refusal is None
    )
    return before - sum(saved_flops(d, whole) for d in plan.rewritten)
