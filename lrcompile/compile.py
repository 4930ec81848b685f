"""READ THIS FIRST: the way a model takes, from a file to a published folder, one call a stage.

    load -> find -> calibrate -> plan -> factorize -> rewrite -> lower -> build -> verify -> publish
                                  ^---------------- revise(problem, trials) --------------|

Every stage is a module of its name; between two stages stands a frozen value of `records`. What touches the disk, the clock or
another process (cache, staging, child) is opened here and handed in.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from lrcompile.bench import Race
from lrcompile.build import (
    REFERENCE,
    Places,
    build,
    engine_options,
    feeds_for,
    original_of,
    places_for,
    ranges_of,
    set_limits,
    started,
)
from lrcompile.calibrate import calibrate
from lrcompile.child import Child
from lrcompile.cost import bytes_of, is_large, rows_of
from lrcompile.errors import BuildError, VerificationError
from lrcompile.factorize import annotate, factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import STYLES, Feed, Feeds, calibration_and_held_out, draw, inputs_of
from lrcompile.fused import Nodes, fuse
from lrcompile.interfaces import BuildOptions, Factorization, Runtime, StatisticsSource
from lrcompile.load import load
from lrcompile.lower import lower
from lrcompile.options import Options
from lrcompile.plan import (
    Problem,
    Trial,
    Whole,
    check_plan,
    choose,
    dense_plan,
    fast_enough,
    group_by_name,
    prepare,
    revise,
)
from lrcompile.precision import convert, widened
from lrcompile.progress import Progress, silent
from lrcompile.publish import Package, publish, result_of, save_lowered
from lrcompile.reactions import reacting
from lrcompile.records import STORED, Evidence, Finding, Plan, Result, Source, Tradeoff, TradeoffPoint
from lrcompile.refit import refit
from lrcompile.registry import methods_of, runtime_of
from lrcompile.report import render
from lrcompile.rewrite import jittered, reconstructed, rewrite
from lrcompile.sensitivity import predicted
from lrcompile.shapes import dims_of
from lrcompile.sites import find
from lrcompile.speed import speed_of, speedup, timed_problem
from lrcompile.store import (
    Cache,
    check_out,
    copy_folder,
    default_cache,
    load_function,
    new_folder,
    remove_folder,
    staging,
)
from lrcompile.surgeon import scripted
from lrcompile.tradeoff import check_pareto, point_of, write_tradeoff
from lrcompile.tradeoff import predicted as predicted_curve
from lrcompile.verify import Metric, Noise, check_rewrite, judge, measure, noise_of, score
from lrcompile.weights import ModelWeights

logger = logging.getLogger(__name__)

_LOOKED_AT, _RACED = 32, 3  # feeds among which shapes are looked for, and how many shapes are raced


@dataclass(frozen=True, slots=True, eq=False)
class Workshop:
    """What touches the disk or another process: opened once for a command. builders: what engine builders keep between runs."""

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
    places: Places
    child: Child
    cache: Cache
    scratch: Path
    progress: Progress


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
    places = places_for(runtime, options.target, shop.child)
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
    set_limits(shop.child, options, source, len(calibration or ()) + len(held_out or ()))
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
    options, source, child = known.options, known.source, known.child
    original, drawn = at_hand(known)
    dense = original
    if options.precision is not None:
        dense = save_lowered(
            typed(source.model, known), source, known.scratch / "dense", is_large(source.model) or None
        )
    judged_on = known.held_out or drawn
    if known.runtime.engine_file(options.target) is not None:  # a builder must know which shapes will come
        child.engines[options.target] = engine_options(
            options, ranges_of((*drawn, *(known.calibration or ()), *(known.held_out or ())))
        )
    metric = None
    if (function := load_metric(options.metric)) is not None:
        with build(child, known.places.judge, original) as engine:
            metric = function, score(function, engine, judged_on)
    nodes = nodes_in(known, dense) if known.runtime.fusions(options.target) else {}
    shared = {f.name: getattr(known, f.name) for f in fields(known)}
    return Job(
        **shared, original=original, dense=dense, nodes=nodes, drawn=drawn, judged_on=judged_on, metric=metric
    )


def nodes_in(known: Study, path: Path) -> Nodes:
    """The operators that really run of a model file, after the runtime's own optimisations, with where each runs."""
    with build(known.child, known.places.judge, path) as engine:
        return engine.nodes()


def at_hand(known: Study) -> tuple[Path, Feeds]:
    """A file of the original that runs, and feeds that it accepts: of an engine that is built for its shapes in these."""
    options, source = known.options, known.source
    known.child.engines[options.target] = engine_options(options)
    original = original_of(source, known.places.lab, known.child, known.scratch)
    shaped = known.runtime.engine_file(options.target) is not None
    return original, _drawn(known, original, shaped_dims(known) if shaped else options.dims)


def _drawn(known: Study, original: Path, dims: Mapping[str, int]) -> Feeds:
    first = next(iter(known.calibration or known.held_out or ()), None)
    return feeds_for(
        known.source.model,
        original,
        known.child,
        known.places.lab,
        seed=known.options.seed,
        dims=dims,
        like=first,
    )


def shaped_dims(known: Study) -> dict[str, int]:
    """The free dimensions of the inputs, with what ``--shape`` says of them."""
    usual = {r.input: r.usual for r in known.options.engine.shapes}
    return {**known.options.dims, **dims_of(usual, inputs_of(known.source.model))}


def typed(model: ir.Model, known: Study, widen: bool = False) -> ir.Model:
    """The model in the precision that was asked for; widen: its weights rounded to it, but computed in float32."""
    if known.options.precision is None:
        return model
    return widened(model, known.options.precision) if widen else convert(model, known.options.precision)


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
    return check_plan(
        given,
        known.finding,
        known.methods,
        known.weights,
        known.statistics,
        known.options.target,
        known.options.budget.objective,
    )


def load_metric(given: str | Metric | None) -> Metric | None:
    """The function that ``--metric f.py:func`` names."""
    if not isinstance(given, str):
        return given
    path, _, name = given.rpartition(":")
    return load_function(path or name, name if path else "metric")


def problem_of(known: Study) -> Problem:
    """The candidates of every group, from which all plans choose: which are faster, where speed is asked for, and where there is data how
    far each would move the outputs.
    """
    options = known.options
    problem = prepare(
        known.finding, known.weights, known.statistics, tuple(known.methods.values()), options.budget,
        target=options.target, supports=lambda d: known.runtime.supports(d, options.target),
        include=options.include, exclude=options.exclude, whole=whole_of(known), progress=known.progress,
    )  # fmt: skip
    if options.budget.asks_speed:
        problem = _timed(problem, known)
    if known.statistics is None or known.calibration is None or not options.searches:
        return problem
    set_limits(known.child, options, known.source, 12 * len(known.calibration))
    return predicted(
        problem, known.source, known.weights, known.statistics, known.methods, known.calibration, child=known.child,
        target=known.places.lab, scratch=known.scratch, seed=options.seed, progress=known.progress,
    )  # fmt: skip


def _timed(problem: Problem, known: Study) -> Problem:
    """Only the forms that are expected to be faster than the weight as it is, at the first of the shapes that count."""
    original, drawn = at_hand(known)
    source = known.source
    dense = original
    if known.options.precision is not None:
        dense = save_lowered(
            typed(source.model, known), source, known.scratch / "timed", is_large(source.model) or None
        )
    made, where = timed_problem(
        problem, source, known.finding, known.methods, known.runtime.lowering(known.options.target), dense,
        speed_feeds(known, original, drawn)[0], known.options, child=known.child, costs=known.cache.costs, scratch=known.scratch,
        runs=not known.places.unrunnable, progress=known.progress,
    )  # fmt: skip
    logger.info("%s", where)
    return made


def speed_feeds(known: Study, original: Path, drawn: Feeds) -> list[Feed]:
    """One feed of each shape at which speed counts: what ``--shape`` names, or the user's data has, or what was drawn."""
    if known.options.engine.shapes:
        return [next(iter(_drawn(known, original, shaped_dims(known))))]
    given = known.held_out or known.calibration or drawn
    by_shape = {tuple(a.shape for a in feed.values()): feed for feed in itertools.islice(given, _LOOKED_AT)}
    return list(by_shape.values())[:_RACED]


def whole_of(known: Study) -> Whole:
    """What relative budgets are relative to, at the first feed that is known, or where FLOPs are asked for at one that is drawn."""
    options, source = known.options, known.source
    feed = next(iter(known.calibration or known.held_out or ()), None)
    if feed is None and (options.budget.flops is not None or options.budget.objective == "flops"):
        feed = next(iter(draw(source.model, STYLES[0], options.seed, 1, options.dims)))
    rows = rows_of(source.model, known.finding, feed) if feed is not None else {}
    return Whole(bytes_of(typed(source.model, known)), rows)


def _attempt(chosen: Plan, job: Job, number: int) -> Attempt:
    """factorize, rewrite, lower, build, verify: one plan, carried out and measured on held-out data."""
    options, child, judge_in = job.options, job.child, job.places.judge
    sets = factors_of(chosen, job)
    set_limits(child, options, job.source, len(job.judged_on))
    neutral = rewrite(job.source.model, sets) if sets else None
    lowered = lower(neutral.clone(), job.runtime.lowering(options.target)) if neutral is not None else None
    model = lowered
    if options.precision is not None:
        model = typed(lowered or job.source.model, job)
    if sets and model is not None and job.nodes:
        model = _fused(model, sets, job)
    path = save_lowered(model, job.source, job.scratch / f"trial-{number}", options.external_data)
    judged = _judged(path, lowered or job.source.model, job)
    with build(child, judge_in, job.original) as dense, build(child, judge_in, judged) as engine:
        evidence = measure(dense, engine, job.judged_on.watched("verify", job.progress), job.metric)
    evidence = judge(evidence, options.budget.max_error, unchanged=model is None)
    races: tuple[Race, ...] = ()
    if sets and options.budget.asks_speed and evidence.verdict != "failed" and not job.places.unrunnable:
        races = speedup(
            child, job.dense, path, speed_feeds(job, job.original, job.drawn), options, job.progress
        )
    return Attempt(annotate(chosen, sets), sets, neutral, model, path, judged, evidence, races)


def _fused(model: ir.Model, sets: Sequence[FactorSet], job: Job) -> ir.Model:
    """The model with fusions of our own where the runtime's would be fewer than in the original."""

    def nodes_of(made: ir.Model) -> Nodes:
        folder = new_folder(job.scratch / "fused")
        try:
            return nodes_in(job, save_lowered(made, job.source, folder, is_large(made) or None))
        finally:
            remove_folder(folder)

    table = any(s.kind == "lookup" for f in sets for s in f.group.sites)
    found = fuse(model, job.runtime.fusions(job.options.target), job.nodes, nodes_of, factored_table=table)
    for lost in found.lost:
        logger.warning("fewer fused operators run than in the original: %s", lost)
    return found.model


def _judged(path: Path, lowered: ir.Model, job: Job) -> Path:
    """The file that is run to be judged: what is published, or where that has no kernels its weights computed with in float32."""
    if job.options.precision is None:
        return path
    try:
        build(job.child, job.places.judge, path).close()
        return path
    except BuildError as error:
        logger.info("%s; it is judged with float32 kernels", error)
    folder = job.scratch / f"{path.parent.name}-widened"
    return save_lowered(typed(lowered, job, widen=True), job.source, folder, is_large(lowered) or None)


def factors_of(chosen: Plan, job: Study) -> tuple[FactorSet, ...]:
    """factorize: by the stored statistics, or each group by what the compressed part before it gives."""
    groups, options = group_by_name(job.finding), job.options
    if job.statistics is None or job.calibration is None or not options.refits or not chosen.rewritten:
        return factorize(chosen, groups, job.weights, job.statistics, job.methods, options.seed, job.progress)
    set_limits(job.child, options, job.source, 6 * len(job.calibration))
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
    if not best.sets:  # no weight was rewritten: there is nothing to prove
        set_limits(job.child, job.options, job.source, 8 * len(job.drawn))
        noise = noise_of(job.child, job.places.judge, job.original, None, job.drawn)
    else:
        noise = prove(best.judged, best.sets, job, widen=best.judged != best.path)
    nodes = tuple(sorted(nodes_in(job, best.judged).items()))
    return replace(best.evidence.with_noise(noise.relative), nodes=nodes)


def prove(path: Path, sets: Sequence[FactorSet], job: Job, widen: bool = False) -> Noise:
    """Verification's first question, asked of a rewritten model's file. Raises VerificationError: a failure is our bug."""
    judge_in, child, source = job.places.judge, job.child, job.source
    set_limits(child, job.options, source, 8 * len(job.drawn))
    mapped = is_large(source.model) or None

    def saved(model: ir.Model, name: str) -> Path:
        return save_lowered(typed(model, job, widen), source, job.scratch / name, mapped)

    job.progress("prove", 0, 2)
    plain = job.original if job.options.precision is None else saved(source.model, "plain")
    moved = saved(jittered(source.model, sets, job.weights.matrix, job.options.seed), "jittered")
    noise = noise_of(child, judge_in, plain, moved, job.drawn)
    job.progress("prove", 1, 2)
    oracle = saved(reconstructed(source.model, sets), "oracle")
    if wrong := check_rewrite(child, judge_in, oracle, path, noise, job.drawn):
        raise VerificationError(
            f"the rewritten graph does not compute what its factors say: {'; '.join(wrong)}"
        )
    return noise


def _engine(job: Job, folder: Path) -> str:
    """Write the serialized engine beside the model, where the target has one. What the evidence says of it."""
    name = job.runtime.engine_file(job.options.target)
    if name is None:
        return "ran"
    set_limits(job.child, job.options, job.source, len(job.drawn))
    shapes = ranges_of((*job.drawn, *(job.calibration or ()), *(job.held_out or ())))
    made = BuildOptions(
        job.options.target,
        threads=job.options.threads,
        engine=engine_options(job.options, shapes),
        cache=job.cache.builders,
    )
    job.child.call(
        "lrcompile.build:serialize_there", job.options.target, folder / "model.onnx", folder / name, made,
        what=f"building {name}",
    )  # fmt: skip
    return f"built, not run: {job.places.unrunnable}" if job.places.unrunnable else "ran"


def _publish(
    best: Attempt, evidence: Evidence, tradeoff: Tradeoff, job: Job, folder: Path, out: Path
) -> Result:
    """Everything into the staged folder; the file that was verified is the file that is published."""
    job.progress("publish", 0, 1)
    copy_folder(best.path.parent, folder)
    evidence = replace(evidence, engine=_engine(job, folder))
    package = Package(
        job.source, job.finding, best.plan, best.sets, best.model, best.neutral if job.options.keep_functions else None, evidence,
        job.options, (*job.source.notes, *filter(None, [job.drawn.note])), tradeoff, tuple(map(speed_of, best.races)),
    )  # fmt: skip
    try:
        engine = build(job.child, REFERENCE, best.path)
    except BuildError:  # a type without a kernel there: then where it was judged
        engine = build(job.child, job.places.judge, best.judged)
    with engine:
        return result_of(package, publish(package, folder, job.drawn, engine.run, render), out)
