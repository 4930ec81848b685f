"""READ THIS FIRST: the way a model takes, from a file to a published folder, one call a stage.

    load -> find -> calibrate -> plan -> factorize -> rewrite -> lower -> build -> verify -> publish
                                  ^---------------- revise(problem, trials) --------------|

Every stage is a module of its name; between two stages stands a frozen value of `records`. What touches the disk, the clock or
another process (cache, staging, child) is opened here and handed in.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from lrcompile.build import build, feeds_for, original_of, set_limits, started
from lrcompile.calibrate import calibrate
from lrcompile.child import Child
from lrcompile.cost import bytes_of, is_large, rows_of
from lrcompile.encoding import OPSET
from lrcompile.errors import BuildError, VerificationError
from lrcompile.factorize import annotate, factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import STYLES, Feeds, calibration_and_held_out, draw, inputs_of
from lrcompile.interfaces import Factorization, Runtime, StatisticsSource
from lrcompile.load import load
from lrcompile.lower import lower
from lrcompile.opsets import raisable
from lrcompile.options import Options
from lrcompile.plan import (
    Problem,
    Trial,
    Whole,
    check_plan,
    choose,
    dense_plan,
    group_by_name,
    prepare,
    revise,
)
from lrcompile.progress import Progress, silent
from lrcompile.publish import Package, publish, result_of, save_lowered
from lrcompile.reactions import reacting
from lrcompile.records import (
    Decision,
    Evidence,
    Finding,
    Plan,
    Refusal,
    Result,
    Source,
    Tradeoff,
    TradeoffPoint,
)
from lrcompile.refit import refit
from lrcompile.registry import methods_of, runtime_of
from lrcompile.report import render
from lrcompile.rewrite import jittered, reconstructed, rewrite
from lrcompile.sensitivity import predicted
from lrcompile.sites import find
from lrcompile.store import (
    Cache,
    check_out,
    copy_folder,
    default_cache,
    load_function,
    remove_folder,
    staging,
)
from lrcompile.storing import types_of
from lrcompile.surgeon import scripted
from lrcompile.tradeoff import check_pareto, point_of, write_tradeoff
from lrcompile.tradeoff import predicted as predicted_curve
from lrcompile.verify import Metric, Noise, check_rewrite, judge, measure, noise_of, score
from lrcompile.weights import ModelWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Workshop:
    """What touches the disk or another process: opened once for a command."""

    child: Child
    cache: Cache
    scratch: Path


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What is known of a model before anything is compiled: all that a plan within a budget needs."""

    options: Options
    runtime: Runtime
    methods: Mapping[str, Factorization]
    source: Source
    finding: Finding
    weights: ModelWeights
    statistics: StatisticsSource | None
    calibration: Feeds | None
    held_out: Feeds | None
    child: Child
    scratch: Path
    progress: Progress


@dataclass(frozen=True, slots=True, eq=False)
class Job(Study):
    """What every plan of one compile has in common: the study, and what the plans are measured with."""

    original: Path
    drawn: Feeds
    judged_on: Feeds
    metric: tuple[Metric, float] | None


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """A plan carried out. model: the lowered graph, None where nothing was rewritten; path: its file."""

    plan: Plan
    sets: tuple[FactorSet, ...]
    neutral: ir.Model | None
    model: ir.Model | None
    path: Path
    evidence: Evidence


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


@contextlib.contextmanager
def workshop(options: Options, child: Child | None = None) -> Iterator[Workshop]:
    """The cache, a scratch folder, and the given child or one of our own; BLAS has as many threads as the options say."""
    with contextlib.ExitStack() as stack:
        cache = Cache(options.cache or default_cache())
        scratch = stack.enter_context(cache.scratch())
        stack.enter_context(threadpool_limits(options.threads))
        yield Workshop(stack.enter_context(started(child)), cache, scratch)


def study(model: str | Path | ir.Model, options: Options, shop: Workshop, progress: Progress) -> Study:
    """load, find, calibrate."""
    runtime = runtime_of(options.target)
    planned = {d.method for d in options.plan.rewritten} if options.plan else ()  # a plan names its methods
    methods = methods_of((*options.methods, *sorted(planned)))
    progress("load", 0, 1)
    source = scripted(load(model, allow_hardlinks=options.allow_hardlinks), options.gs_script)
    finding = find(source.model)
    progress("load", 1, 1)
    inputs = inputs_of(source.model)
    calibration, held_out = calibration_and_held_out(options.data, options.verify_data, inputs, options.batch)
    set_limits(shop.child, options, source, len(calibration or ()) + len(held_out or ()))
    weights = ModelWeights(shop.cache, source.opset)
    statistics: StatisticsSource | None = None
    if calibration is not None and options.budget.rank != "full":
        statistics = calibrate(
            source.model, finding, calibration, source.key, target=options.target, child=shop.child, cache=shop.cache,
            progress=progress,
        )  # fmt: skip
        if options.gradients:
            statistics, why_not = reacting(
                source, finding, statistics, calibration, child=shop.child, cache=shop.cache, seed=options.seed,
                progress=progress,
            )  # fmt: skip
            source = replace(source, notes=(*source.notes, *filter(None, [why_not])))
    return Study(
        options, runtime, methods, source, finding, weights, statistics, calibration, held_out, shop.child, shop.scratch,
        progress,
    )  # fmt: skip


def job_of(known: Study) -> Job:
    """The original, ready to be compared with: its file, feeds that it accepts, and what the user's metric says of it."""
    options, source, child = known.options, known.source, known.child
    original = original_of(source, options.target, child, known.scratch)
    first = next(iter(known.calibration or known.held_out or ()), None)
    drawn = feeds_for(
        source.model, original, child, options.target, seed=options.seed, dims=options.dims, like=first
    )
    judged_on = known.held_out or drawn
    metric = None
    if (function := load_metric(options.metric)) is not None:
        with build(child, options.target, original) as engine:
            metric = function, score(function, engine, judged_on)
    shared = {f.name: getattr(known, f.name) for f in fields(known)}
    return Job(**shared, original=original, drawn=drawn, judged_on=judged_on, metric=metric)


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
        best = _better(attempt, best)
        trials.append(Trial(chosen, attempt.evidence))
        points.append(point_of(problem, attempt.plan, attempt.evidence, attempt.model or job.source.model))
        chosen = revise(problem, trials)
    assert best is not None
    found = best.evidence.verdict != "failed"
    last = max(
        (i for i, p in enumerate(points) if p.verdict != "failed"), default=None
    )  # what `_better` kept
    more = tuple(predicted_curve(problem)) if job.options.pareto is not None else ()
    searched = bool(problem.budget.max_error) and not problem.budget.bounds_size and job.options.plan is None
    tradeoff = Tradeoff(problem.budget, tuple(points), more, last, searched)
    return (best if found else _give_up(tradeoff, problem, job)), tradeoff


def first_plan(problem: Problem, known: Study) -> Plan:
    """The user's plan, held against the model, or the one that the budget asks for."""
    if (given := known.options.plan) is None:
        return choose(problem)
    return check_plan(
        given, known.finding, known.methods, known.weights, known.statistics, known.options.target
    )


def load_metric(given: str | Metric | None) -> Metric | None:
    """The function that ``--metric f.py:func`` names."""
    if not isinstance(given, str):
        return given
    path, _, name = given.rpartition(":")
    return load_function(path or name, name if path else "metric")


def problem_of(known: Study) -> Problem:
    """The candidates of every group, from which all plans choose, and where there is data how far each would move the outputs."""
    problem = prepare(
        known.finding, known.weights, known.statistics, tuple(known.methods.values()), known.options.budget,
        target=known.options.target, supports=lambda d: _supports(d, known),
        include=known.options.include, exclude=known.options.exclude, whole=whole_of(known), progress=known.progress,
        storages=storages_of(known),
    )  # fmt: skip

    if known.statistics is None or known.calibration is None or not known.options.searches:
        return problem
    set_limits(known.child, known.options, known.source, 12 * len(known.calibration))
    return predicted(
        problem, known.source, known.weights, known.statistics, known.methods, known.calibration, child=known.child,
        target=known.options.target, scratch=known.scratch, seed=known.options.seed, progress=known.progress,
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


def whole_of(known: Study) -> Whole:
    """What relative budgets are relative to, at the first feed that is known, or where FLOPs are asked for at one that is drawn."""
    options, source = known.options, known.source
    feed = next(iter(known.calibration or known.held_out or ()), None)
    if feed is None and (options.budget.flops is not None or options.budget.objective == "flops"):
        feed = next(iter(draw(source.model, STYLES[0], options.seed, 1, options.dims)))
    rows = rows_of(source.model, known.finding, feed) if feed is not None else {}
    return Whole(bytes_of(source.model), rows)


def _attempt(chosen: Plan, job: Job, number: int) -> Attempt:
    """factorize, rewrite, lower, build, verify: one plan, carried out and measured on held-out data."""
    sets = factors_of(chosen, job)
    set_limits(job.child, job.options, job.source, len(job.judged_on))
    neutral = rewrite(job.source.model, sets) if sets else None
    model = lower(neutral.clone(), job.runtime.lowering(job.options.target)) if neutral is not None else None
    path = save_lowered(model, job.source, job.scratch / f"trial-{number}", job.options.external_data)
    with (
        build(job.child, job.options.target, job.original) as dense,
        build(job.child, job.options.target, path) as engine,
    ):
        evidence = measure(dense, engine, job.judged_on.watched("verify", job.progress), job.metric)
    evidence = judge(evidence, job.options.budget.max_error, unchanged=not sets)
    return Attempt(annotate(chosen, sets), sets, neutral, model, path, evidence)


def factors_of(chosen: Plan, job: Study) -> tuple[FactorSet, ...]:
    """factorize: by the stored statistics, or each group by what the compressed part before it gives."""
    groups, options = group_by_name(job.finding), job.options
    if job.statistics is None or job.calibration is None or not options.refits or not chosen.rewritten:
        return factorize(chosen, groups, job.weights, job.statistics, job.methods, options.seed, job.progress)
    set_limits(job.child, options, job.source, 6 * len(job.calibration))
    return refit(
        job.source, chosen, groups, job.weights, job.statistics, job.methods, job.calibration, child=job.child,
        target=options.target, scratch=job.scratch, seed=options.seed, progress=job.progress,
    )  # fmt: skip


def _better(attempt: Attempt, best: Attempt | None) -> Attempt:
    """The later of those that hold the limits: a search goes on only to smaller ones. The other's file is removed."""
    if best is None:
        return attempt
    kept, gone = (attempt, best) if attempt.evidence.verdict != "failed" else (best, attempt)
    remove_folder(gone.path.parent)
    return kept


def _give_up(tradeoff: Tradeoff, problem: Problem, job: Job) -> Attempt:
    """No plan held the error limit: a budget makes that an error, without one everything stays dense."""
    best = tradeoff.best
    assert best is not None
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
    if best.model is None:  # the original itself: there is nothing to prove
        set_limits(job.child, job.options, job.source, 8 * len(job.drawn))
        noise = noise_of(job.child, job.options.target, job.original, None, job.drawn)
    else:
        noise = prove(best.path, best.sets, job)
    return best.evidence.with_noise(noise.relative)


def prove(path: Path, sets: Sequence[FactorSet], job: Job) -> Noise:
    """Verification's first question, asked of a rewritten model's file. Raises VerificationError: a failure is our bug."""
    target, child, source = job.options.target, job.child, job.source
    set_limits(child, job.options, source, 8 * len(job.drawn))
    mapped = is_large(source.model) or None
    job.progress("prove", 0, 2)
    shaken = jittered(source.model, sets, job.weights.matrix, job.options.seed)
    moved = save_lowered(shaken, source, job.scratch / "jittered", mapped)
    noise = noise_of(child, target, job.original, moved, job.drawn)
    job.progress("prove", 1, 2)
    oracle = save_lowered(reconstructed(source.model, sets), source, job.scratch / "oracle", mapped)
    if wrong := check_rewrite(child, target, oracle, path, noise, job.drawn):
        raise VerificationError(
            f"the rewritten graph does not compute what its factors say: {'; '.join(wrong)}"
        )
    return noise


def _publish(
    best: Attempt, evidence: Evidence, tradeoff: Tradeoff, job: Job, folder: Path, out: Path
) -> Result:
    """Everything into the staged folder; the file that was verified is the file that is published."""
    job.progress("publish", 0, 1)
    copy_folder(best.path.parent, folder)
    package = Package(
        job.source, job.finding, best.plan, best.sets, best.model, best.neutral if job.options.keep_functions else None, evidence,
        job.options, (*job.source.notes, *filter(None, [job.drawn.note])), tradeoff,
    )  # fmt: skip
    try:
        engine = build(job.child, "ort-cpu", best.path)
    except BuildError:  # a type without a kernel there: then in the runtime that it was compiled for
        engine = build(job.child, job.options.target, best.path)
    with engine:
        return result_of(package, publish(package, folder, job.drawn, engine.run, render), out)
