"""A plan that a user gives, edited or not, held against the model: what it may not ask for, and what its forms cost and err."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lrcompile.activations import legal as rounds
from lrcompile.coding import FLOATS
from lrcompile.curves import decision_of, folded, knows
from lrcompile.errors import UsageError
from lrcompile.interfaces import CandidateOptions, Factorization, StatisticsSource, Weights
from lrcompile.records import Decision, Finding, Group, Plan
from lrcompile.storing import known, legal, stored


def check_plan(
    given: Plan,
    finding: Finding,
    methods: Mapping[str, Factorization],
    weights: Weights,
    statistics: StatisticsSource | None,
    target: str,
    objective: str = "size",
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
        if not knows(methods[decision.method], group):
            what = f"that method is not for {group.sites[0].op}"
            raise UsageError(f"the plan asks for {decision.method!r} at {decision.group!r}: {what}")
        if refusal := methods[decision.method].serves(group):
            raise UsageError(f"the plan asks for {decision.method!r} at {decision.group!r}: {refusal.reason}")
        site = group.sites[0]
        matrix = site.kind != "conv"  # unfolded in another way a kernel may have a higher rank
        if matrix and decision.rank is not None and not 1 <= decision.rank <= min(site.K, site.N):
            raise UsageError(
                f"the plan's rank {decision.rank} at {decision.group!r} is not between 1 and {min(site.K, site.N)}"
            )
        if decision.folds and objective != "disk":
            raise UsageError(
                f"the plan's {decision.method} at {decision.group!r} is multiplied out when the file is loaded and saves the file only: "
                "give --objective disk"
            )
        if decision.storage is not None:
            there = known(decision.storage)
            no = legal(decision.storage, group, target, folds=decision.folds) if there else None
            if no is not None or not there:
                reason = no.reason if no is not None else "there is no such type"
                raise UsageError(f"the plan stores {decision.group!r} in {decision.storage!r}: {reason}")
        if (kind := decision.activations) is not None and (no := rounds(kind, decision.storage, group)):
            raise UsageError(f"the plan rounds the input of {decision.group!r}: {no.reason}")
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
    codes = () if decision.storage in (None, *FLOATS) else (str(decision.storage),)
    form = (decision.rank, decision.structure, decision.storage)
    for options in (CandidateOptions(full=True), CandidateOptions(ranks=ranks, storages=codes)):
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
            if decision.permutes == "out" and candidate.index_bytes:
                candidate = folded(candidate)
            if decision.storage is not None and candidate.storage is None:
                candidate = stored(
                    candidate, decision.storage, method, group, weights, statistics, decision.activations
                )
            if (candidate.rank, candidate.structure, candidate.storage) == form:
                return decision_of(group, candidate, decision.reason)
    raise UsageError(
        f"the plan asks for {method.name!r} at {group.name!r} in a form that it does not have: {form}"
    )
