"""READ THIS FIRST: the way a model takes, from a file to a published folder, one call a stage.

    load -> find -> calibrate -> plan -> factorize -> rewrite -> lower -> build -> verify -> race -> publish
                                  ^-------------------- revise(problem, trials) ----------------|

Every stage is a module of its name; between two stages stands a frozen value of `records`. What touches the disk, the clock or
another process (cache, staging, child) is opened in `study` and handed in. `race` is the speed gate: where speed was asked for, what is
not measured to be faster than the dense engine goes back to `revise`, and the original is published where nothing pays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx_ir as ir

from lrcompile.activations import kinds_of
from lrcompile.bench import Race
from lrcompile.build import REFERENCE, build, places_for, set_limits
from lrcompile.calibrate import calibrate
from lrcompile.child import Child
from lrcompile.edited import check_plan
from lrcompile.encoding import OPSET
from lrcompile.errors import BuildError, UsageError, VerificationError
from lrcompile.factorize import annotate, factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import Feeds, calibration_and_held_out, inputs_of
from lrcompile.fused import Nodes, fewer
from lrcompile.interfaces import StatisticsSource
from lrcompile.load import load
from lrcompile.lower import lower
from lrcompile.opsets import raisable
from lrcompile.options import Options
from lrcompile.plan import (
    Problem,
    Trial,
    choose,
    dense_plan,
    fast_enough,
    group_by_name,
    prepare,
    revise,
)
from lrcompile.progress import Progress, silent
from lrcompile.proof import prove
from lrcompile.publish import Package, publish, result_of, save_lowered
from lrcompile.reactions import reacting
from lrcompile.records import STORED, Decision, Evidence, Plan, Refusal, Result, Tradeoff, TradeoffPoint
from lrcompile.refit import refit
from lrcompile.registry import methods_of, runtime_of
from lrcompile.report import render
from lrcompile.rewrite import rewrite
from lrcompile.sensitivity import predicted
from lrcompile.sites import find
from lrcompile.speed import speed_feeds, speed_of, speedup, timed_problem
from lrcompile.store import check_out, copy_folder, remove_folder, staging
from lrcompile.storing import types_of
from lrcompile.study import (
    Study,
    Workshop,
    at_hand,
    dense_file,
    factored_table,
    fused,
    judged_file,
    load_metric,
    lowered_file,
    nodes_in,
    typed,
    whole_of,
    workshop,
    write_engine,
)
from lrcompile.surgeon import scripted
from lrcompile.tradeoff import check_pareto, point_of, write_tradeoff
from lrcompile.tradeoff import predicted as predicted_curve
from lrcompile.verify import Metric, judge, measure, score
from lrcompile.weights import ModelWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Job(Study):
    """What every plan of one compile has in common: the study, and what the plans are measured with.

    original: a file of it that runs. dense: the same in the precision that was asked for, which engines are raced against. nodes: what runs
    of it.
    """

    original: Path
    dense: Path
    nodes: Nodes
    drawn: Feeds
    judged_on: Feeds
    metric: tuple[Metric, float] | None


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """A plan carried out. model: the lowered graph, None where nothing was changed; path: its file, in a folder to publish.

    judged: the file that was judged, another one where the place of judging lacks the precision's kernels. races: against the dense
    engine, where speed was asked for.
    """

    plan: Plan
    sets: tuple[FactorSet, ...]
    neutral: ir.Model | None
    model: ir.Model | None
    path: Path
    judged: Path
    evidence: Evidence
    races: tuple[Race, ...] = ()

    @property
    def speedup(self) -> float | None:
        """Time of the original over its own; of several shapes the least."""
        return min((r.ratio.median for r in self.races), default=None)


def compile(  # noqa: A001 - the verb of this tool
    model: str | Path | ir.Model,
    out: str | Path,
    options: Options | None = None,
    *,
    child: Child | None = None,
    progress: Progress = silent,
) -> Result:
    """Compile a model into the folder `out`, and say how far its outputs moved.

    child: the process to build and run in, started and ended here when none is given. Raises the errors of `lrcompile.errors`;
    nothing is left at `out` then.
    """
    options = (options or Options()).completed()
    check_out(out, options.force)
    check_pareto(options.pareto, out)
    with (
        workshop(options, child) as shop,
        staging(out, force=options.force, locks=shop.cache.locks) as folder,
    ):
        job = job_of(study(model, options, shop, progress))
        best, tradeoff = search(problem_of(job), job)
        result = _publish(best, _prove(best, job), tradeoff, job, folder, Path(out))
    if options.pareto is not None:
        write_tradeoff(options.pareto, tradeoff)
    return result


def study(
    model: str | Path | ir.Model,
    options: Options,
    shop: Workshop,
    progress: Progress,
    *,
    building: bool = True,
) -> Study:
    """load, find, calibrate. building: whether the target must be there; see `places_for`."""
    runtime = runtime_of(options.target)
    places = places_for(runtime, options.target, shop.child, building=building)
    planned = {d.method for d in options.plan.rewritten} if options.plan else ()  # a plan names its methods
    methods = methods_of((*options.methods, *sorted(planned)))
    progress("load", 0, 1)
    source = scripted(load(model, allow_hardlinks=options.allow_hardlinks), options.gs_script)
    finding = find(source.model)
    if options.precision is not None:
        finding = finding.stored_as(STORED[options.precision])
    progress("load", 1, 1)
    inputs = inputs_of(source.model)
    calibration, held_out = calibration_and_held_out(options.data, options.verify_data, inputs, options.batch)
    set_limits(shop.child, options, source.model, len(calibration or ()) + len(held_out or ()))
    weights = ModelWeights(shop.cache, source.opset)
    statistics: StatisticsSource | None = None
    if calibration is not None and options.budget.rank != "full":
        statistics = calibrate(
            source.model, finding, calibration, source.key, target=places.lab, child=shop.child, cache=shop.cache,
            progress=progress,
        )  # fmt: skip
        if options.gradients:
            statistics, why_not = reacting(
                source, finding, statistics, calibration, child=shop.child, cache=shop.cache, seed=options.seed,
                progress=progress,
            )  # fmt: skip
            source = replace(source, notes=(*source.notes, *filter(None, [why_not])))
    return Study(
        options, runtime, methods, source, finding, weights, statistics, calibration, held_out, places, shop.child, shop.cache,
        shop.scratch, progress,
    )  # fmt: skip


def job_of(known: Study) -> Job:
    """The original, ready to be compared with: its file, feeds that it accepts, and what the user's metric says of it."""
    original, drawn = at_hand(known)
    dense = dense_file(known, original)
    judged_on = known.held_out or drawn
    metric = None
    if (function := load_metric(known.options.metric)) is not None:
        with build(known.child, known.places.judge, original) as engine:
            metric = function, score(function, engine, judged_on)
    nodes = nodes_in(known, lowered_file(known, dense)) if known.runtime.fusions(known.options.target) else {}
    shared = {f.name: getattr(known, f.name) for f in fields(known)}
    return Job(
        **shared, original=original, dense=dense, nodes=nodes, drawn=drawn, judged_on=judged_on, metric=metric
    )


def search(problem: Problem, job: Job) -> tuple[Attempt, Tradeoff]:
    """plan, factorize, rewrite, lower, build, verify; and again, as long as `revise` knows a plan worth trying.

    The attempt to publish, and the curve of all that was tried. Raises VerificationError where a budget cannot hold the error limit.
    """
    trials: list[Trial] = []
    points: list[TradeoffPoint] = []
    best: Attempt | None = None
    chosen: Plan | None = first_plan(problem, job)
    while chosen:
        attempt = _attempt(chosen, job, len(trials))
        trials.append(Trial(chosen, attempt.evidence, attempt.speedup))
        best = _better(attempt, best, holds(problem, trials[-1]))
        points.append(point_of(problem, attempt.plan, attempt.evidence, attempt.model or job.source.model))
        chosen = revise(problem, trials)
    assert best is not None
    last = max((i for i, t in enumerate(trials) if holds(problem, t)), default=None)  # what `_better` kept
    found = last is not None
    more = tuple(predicted_curve(problem)) if job.options.pareto is not None else ()
    searched = bool(problem.budget.max_error) and not problem.budget.bounds_size and job.options.plan is None
    tradeoff = Tradeoff(problem.budget, tuple(points), more, last, searched)
    return (best if found else _give_up(tradeoff, problem, job)), tradeoff


def first_plan(problem: Problem, known: Study) -> Plan:
    """The user's plan, held against the model, or the one that the budget asks for."""
    if (given := known.options.plan) is None:
        return choose(problem)
    checked = check_plan(
        given,
        known.finding,
        known.methods,
        known.weights,
        known.statistics,
        known.options.target,
        known.options.budget.objective,
    )
    for decision in checked.rewritten:
        if (no := _supports(decision, known)) is not None:
            raise UsageError(f"the plan's {decision.method} at {decision.group!r} is refused: {no.reason}")
    return checked


def problem_of(known: Study) -> Problem:
    """The candidates of every group, from which all plans choose: which are faster, where speed is asked for, and where there is data how
    far each would move the outputs.
    """
    options = known.options
    problem = prepare(
        known.finding, known.weights, known.statistics, tuple(known.methods.values()), options.budget,
        target=options.target, supports=lambda d: _supports(d, known),
        include=options.include, exclude=options.exclude, whole=whole_of(known), progress=known.progress,
        storages=storages_of(known), activations=activations_of(known),
    )  # fmt: skip
    if options.budget.asks_speed:
        problem, where = timed_problem(problem, known)
        logger.info("%s", where)
    if known.statistics is None or known.calibration is None or not options.searches:
        return problem
    set_limits(known.child, options, known.source.model, 12 * len(known.calibration))
    return predicted(
        problem, known.source, known.weights, known.statistics, known.methods, known.calibration, child=known.child,
        target=known.places.lab, scratch=known.scratch, seed=options.seed, progress=known.progress,
    )  # fmt: skip


def _supports(decision: Decision, known: Study) -> Refusal | None:
    """The runtime's word, and the graph's: codes need operators of an opset that it may not be raised to."""
    if decision.storage is not None and (no := raisable(known.source.model, OPSET)) is not None:
        return no
    return known.runtime.supports(decision, known.options.target)


def storages_of(known: Study) -> tuple[str, ...]:
    """The storage types that weights may take; none where the graph cannot take their operators, which is said."""
    types = types_of(known.options.storages, known.options.target)
    if types and (no := raisable(known.source.model, OPSET)) is not None:
        logger.warning("no weight is stored in fewer bits: %s", no.reason)
        return ()
    return types


def activations_of(known: Study) -> tuple[str, ...]:
    """The types that inputs may be rounded to; none where the graph cannot take their operators, which is said."""
    kinds = kinds_of(known.options.activations, known.options.target)
    if kinds and (no := raisable(known.source.model, OPSET)) is not None:
        logger.warning("no input is rounded: %s", no.reason)
        return ()
    return kinds


def _attempt(chosen: Plan, job: Job, number: int) -> Attempt:
    """factorize, rewrite, lower, build, verify: one plan, carried out and measured on held-out data."""
    options, child, judge_in = job.options, job.child, job.places.judge
    sets = factors_of(chosen, job)
    set_limits(child, options, job.source.model, len(job.judged_on))
    neutral = rewrite(job.source.model, sets) if sets else None
    lowered = lower(neutral.clone(), job.runtime.lowering(options.target)) if neutral is not None else None
    model = lowered
    if options.precision is not None:
        model = typed(lowered or job.source.model, job)
    if sets and model is not None and job.nodes:
        model = fused(model, sets, job, job.nodes)
    path = save_lowered(model, job.source, job.scratch / f"trial-{number}", options.external_data)
    judged = judged_file(path, lowered or job.source.model, job)
    with build(child, judge_in, job.original) as dense, build(child, judge_in, judged) as engine:
        evidence = measure(dense, engine, job.judged_on.watched("verify", job.progress), job.metric)
    evidence = judge(evidence, options.budget.max_error, unchanged=model is None)
    races: tuple[Race, ...] = ()
    if sets and options.budget.asks_speed and evidence.verdict != "failed" and not job.places.unrunnable:
        feeds = speed_feeds(job, job.original, job.drawn)
        races = speedup(child, job.dense, path, feeds, options, job.progress)
    return Attempt(annotate(chosen, sets), sets, neutral, model, path, judged, evidence, races)


def factors_of(chosen: Plan, job: Study) -> tuple[FactorSet, ...]:
    """factorize: by the stored statistics, or each group by what the compressed part before it gives."""
    groups, options = group_by_name(job.finding), job.options
    if job.statistics is None or job.calibration is None or not options.refits or not chosen.rewritten:
        return factorize(chosen, groups, job.weights, job.statistics, job.methods, options.seed, job.progress)
    set_limits(job.child, options, job.source.model, 6 * len(job.calibration))
    return refit(
        job.source, chosen, groups, job.weights, job.statistics, job.methods, job.calibration, child=job.child,
        target=job.places.lab, scratch=job.scratch, seed=options.seed, progress=job.progress,
    )  # fmt: skip


def holds(problem: Problem, trial: Trial) -> bool:
    """Whether a plan may be published: within the error limits, and fast enough."""
    return trial.evidence.verdict != "failed" and fast_enough(problem, trial)


def _better(attempt: Attempt, best: Attempt | None, good: bool) -> Attempt:
    """The later of those that hold: a search goes on only to better ones. The other's file is removed."""
    if best is None:
        return attempt
    kept, gone = (attempt, best) if good else (best, attempt)
    remove_folder(gone.path.parent)
    return kept


def _give_up(tradeoff: Tradeoff, problem: Problem, job: Job) -> Attempt:
    """No plan held: a budget makes that an error, without one everything stays dense."""
    best = tradeoff.best
    assert best is not None
    if not best.failures:  # the errors held, the time did not
        raise VerificationError(
            f"{next(iter(problem.budget.bounds), '--latency')} was not reached: see the log for what was measured; allow more time, or a larger "
            "error"
        )
    reached = "; ".join(best.failures)
    if problem.budget.bounds_size or job.options.plan is not None:
        raise VerificationError(
            f"the outputs moved further than --max-error allows: {reached}; that is the best reached within "
            f"{next(iter(problem.budget.bounds), '--plan')}, which kept {best.size}: allow more of either"
        )
    reason = f"no form held the error limit; the best reached, with {best.size}: {reached}"
    return _attempt(dense_plan(problem, reason), job, len(tradeoff.points))


def _prove(best: Attempt, job: Job) -> Evidence:
    """The evidence with every output's noise floor, once verification's first question is answered with yes."""
    noise = prove(best.judged, best.sets, job, job.original, job.drawn, widen=best.judged != best.path)
    nodes = tuple(sorted(nodes_in(job, best.judged).items()))
    return replace(best.evidence.with_noise(noise.relative), nodes=nodes)


def _notes(best: Attempt, evidence: Evidence, engine: Sequence[str], job: Job) -> tuple[str, ...]:
    """What a reader of the report may want to know. engine: what is to be said of that."""
    notes = [*job.source.notes, *filter(None, [job.drawn.note]), *engine]
    if best.judged != best.path:
        place, precision = job.places.judge, job.options.precision
        notes.append(f"{place} has no kernels for {precision}: judged in float32, with the same weights")
    if job.nodes:
        lost = fewer(job.nodes, dict(evidence.nodes), factored_table(best.sets))
        notes += [f"fewer fused operators run than in the original: {kind}" for kind in lost]
    return tuple(notes)


def _publish(
    best: Attempt, evidence: Evidence, tradeoff: Tradeoff, job: Job, folder: Path, out: Path
) -> Result:
    """Everything into the staged folder; the file that was verified is the file that is published."""
    job.progress("publish", 0, 1)
    copy_folder(best.path.parent, folder)
    ran, words = write_engine(job, job.drawn, folder)
    evidence = replace(evidence, engine=ran)
    package = Package(
        job.source, job.finding, best.plan, best.sets, best.model, best.neutral if job.options.keep_functions else None, evidence,
        job.options, _notes(best, evidence, words, job), tradeoff, tuple(map(speed_of, best.races)),
    )  # fmt: skip
    try:
        engine = build(job.child, REFERENCE, best.path)
    except BuildError:  # a type without a kernel there: then where it was judged
        engine = build(job.child, job.places.judge, best.judged)
    with engine:
        return result_of(package, publish(package, folder, job.drawn, engine.run, render), out)
