"""The commands beside `compile`, as functions of the same names: inspect, plan, verify, tune, bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lrcompile.benchmark import Benchmark
from lrcompile.build import build, set_limits
from lrcompile.child import Child
from lrcompile.compile import first_plan, job_of, problem_of, search, study
from lrcompile.config import asked_again
from lrcompile.contests import Entrant, contests
from lrcompile.cost import rows_of
from lrcompile.errors import BuildError, ModelError, UsageError, VerificationError
from lrcompile.feeds import Data, Feeds, inputs_of, open_feeds
from lrcompile.inspection import Inspection, inspection
from lrcompile.interfaces import BuildOptions
from lrcompile.load import load
from lrcompile.options import Options
from lrcompile.plan import group_by_name
from lrcompile.progress import Progress, silent
from lrcompile.proof import prove
from lrcompile.recheck import Published, check_stored, published_factors, runnable, stored_feeds
from lrcompile.records import STORED, EngineOptions, Evidence, Plan, Tradeoff
from lrcompile.registry import factorizations, methods_of
from lrcompile.speed import common_forms, fast, forms_in, tuned
from lrcompile.store import check_folder
from lrcompile.study import Study, Workshop, at_hand, dense_file, drawn_for, load_metric, typed, workshop
from lrcompile.tables import figures
from lrcompile.timing import CostTable
from lrcompile.tradeoff import predicted, write_tradeoff
from lrcompile.verify import Noise, judge, measure, score
from lrcompile.workloads import Workload, workloads_of

__all__ = ["Verification", "bench", "inspect", "plan", "tune", "verify"]


# --- inspect and plan ---------------------------------------------------------------------------------------------


def inspect(
    model: str | Path | ir.Model,
    options: Options | None = None,
    *,
    site: str | None = None,
    child: Child | None = None,
    progress: Progress = silent,
) -> Inspection:
    """What a model holds that could be rewritten, and at which cost; no budget is asked for.

    site: a pattern; only weights of such names, with the error against the parameters of every method.
    Without data the curves are those of factorizations that need none, also when these must be named elsewhere.
    """
    options = options or Options()
    options.check()
    with workshop(options, child) as shop:
        known = study(model, options, shop, progress)
        methods = known.methods
        if known.statistics is None and "auto" in options.methods:
            methods = {**methods, **{n: m for n, m in factorizations().items() if not m.needs_data}}
        return inspection(
            known.source, known.finding, known.weights, known.statistics, methods, include=options.include,
            exclude=options.exclude, site=site, data=known.calibration.origin if known.calibration else None, progress=progress,
        )  # fmt: skip


def plan(
    model: str | Path | ir.Model,
    options: Options | None = None,
    *,
    child: Child | None = None,
    progress: Progress = silent,
) -> Plan:
    """The plan that `compile` would carry out with these options. An error limit alone is searched for by compiling."""
    options = (options or Options()).completed()
    with workshop(options, child) as shop:
        known = study(model, options, shop, progress)
        problem = problem_of(known)
        if options.plan is not None or options.budget.bounds_size:
            made = first_plan(problem, known)
            tradeoff = Tradeoff(options.budget, (), tuple(predicted(problem)) if options.pareto else ())
        else:
            best, tradeoff = search(problem, job_of(known))
            made = best.plan
    if options.pareto is not None:
        write_tradeoff(options.pareto, tradeoff)
    return made


# --- verify -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verification:
    """What held. checks: a sentence each. evidence: how far the outputs moved, when the original was given."""

    path: Path
    checks: tuple[str, ...]
    evidence: Evidence | None = None

    def to_json(self) -> dict[str, Any]:
        evidence = self.evidence.to_json() if self.evidence is not None else None
        return {"verdict": "passed", "checks": list(self.checks), "evidence": evidence}

    def __str__(self) -> str:
        moved = [*figures(self.evidence), ""] if self.evidence is not None else []
        return "\n".join([*moved, *(f"ok: {check}" for check in self.checks)])


def verify(
    out: str | Path,
    *,
    original: str | Path | ir.Model | None = None,
    data: Data | None = None,
    options: Options | None = None,
    child: Child | None = None,
    progress: Progress = silent,
) -> Verification:
    """Ask a published folder again. Raises VerificationError with what does not hold.

    Always: every file is as listed, and model.onnx computes what outputs.json holds. With the original: it is the one that was
    compiled; the published graph computes what its factors say (verification's first question); and how far the outputs moved on
    `data`, judged by the error limits that were asked for.
    options: by default those in the folder's config.yaml.
    """
    out = Path(out)
    document = check_folder(out)
    checks = [f"{len(document['files'])} files are as lrcompile.json lists them"]
    options = asked_again(out, options)
    with workshop(options, child) as shop:
        folder = _load_published(out, document, options)
        count = _check_stored(folder, options, shop)
        checks.append(f"model.onnx computes the outputs of {count} feeds that outputs.json holds")
        if original is None:
            if data is not None or options.data is not None:
                raise UsageError("data is for comparing with the original: give --original as well")
            return Verification(out, tuple(checks))
        evidence = _with_original(folder, original, data, options, shop, checks, progress)
    if evidence.verdict == "failed":
        raise VerificationError(
            f"{out}: the outputs moved further than asked for: {'; '.join(evidence.failures)}"
        )
    return Verification(out, tuple(checks), evidence)


def _load_published(out: Path, document: Mapping[str, Any], options: Options) -> Published:
    try:
        return Published(
            out, document, load(out / "model.onnx", allow_hardlinks=options.allow_hardlinks).model
        )
    except ModelError as error:
        raise VerificationError(f"{out} is damaged: {error}") from error


def _check_stored(folder: Published, options: Options, shop: Workshop) -> int:
    set_limits(shop.child, options, folder.model, 8 * len(stored_feeds(folder.path)))
    return check_stored(folder, options.precision, shop.child, shop.scratch)


def _with_original(
    folder: Published, original: str | Path | ir.Model, data: Data | None, options: Options, shop: Workshop,
    checks: list[str], progress: Progress,
) -> Evidence:  # fmt: skip
    given = (
        data if data is not None else options.verify_data if options.verify_data is not None else options.data
    )
    known = _study_again(original, folder, options, shop, progress)
    checks.append("the original is the model that it was compiled from")
    child, judge_in = shop.child, known.places.judge
    feeds = open_feeds(given, inputs_of(known.source.model), options.batch) if given is not None else None
    known = replace(known, held_out=feeds)
    set_limits(child, options, known.source.model, 16 + len(feeds or ()))
    path, drawn = at_hand(known)
    asked = child.engines.get(judge_in, EngineOptions())  # those of the target, where that is the judge
    building = folder.loading(BuildOptions(judge_in, engine=asked))
    if known.places.unrunnable:
        checks.append(f"its engines do not run here ({known.places.unrunnable}): judged in {judge_in}")
    elif building.serialized is not None:
        checks.append(f"{building.serialized.name} is what was run")
    judged = runnable(folder, building, options.precision, child, shop.scratch)
    sentence, noise = _first_question(folder, known, path, drawn, judged, building)
    checks.append(sentence)

    set_limits(child, options, known.source.model, 2 * len(feeds or drawn))
    judged_on = feeds or drawn
    with build(child, judge_in, path) as dense, build(child, judge_in, judged, building) as engine:
        function = load_metric(options.metric)
        metric = (function, score(function, dense, judged_on)) if function is not None else None
        evidence = measure(dense, engine, judged_on.watched("verify", progress), metric)
    limits = [limit for limit in options.budget.max_error if limit.name != "metric" or metric is not None]
    was = folder.document["evidence"]
    if feeds is None and was["held_out"] != drawn.origin:
        limits = []  # they were asked for of the user's data
    evidence = judge(evidence, limits, unchanged=was["verdict"] == "unchanged").with_noise(noise.relative)
    words = "within " + ", ".join(map(str, limits)) if limits else "judged by no limit"
    checks.append(f"the outputs moved as above on {judged_on.origin}, {words}")
    return evidence


def _study_again(
    original: str | Path | ir.Model, folder: Published, options: Options, shop: Workshop, progress: Progress
) -> Study:
    """What is known of the original, which may be asked where the target is not. Raises VerificationError where it is another model."""
    plain = replace(options, data=None, verify_data=None, methods=("auto",))
    known = study(original, plain, shop, progress, building=False)
    was = folder.document["source"]
    if known.source.sha256 != was["sha256"] or dict(known.source.weights) != was["weights_sha256"]:
        name = original if isinstance(original, (str, Path)) else "the given model"
        raise VerificationError(
            f"{name} is not the model that {folder.path} was compiled from: its SHA-256 differs"
        )
    return known


def _first_question(
    folder: Published, known: Study, original: Path, drawn: Feeds, judged: Path, building: BuildOptions
) -> tuple[str, Noise]:
    """Whether the published graph computes what the factors in it say: a sentence, and the original's noise."""
    decisions = Plan.from_json(folder.document["plan"]).rewritten
    groups = group_by_name(known.finding)
    if unknown := [d.group for d in decisions if d.group not in groups]:
        raise VerificationError(
            f"{folder.path}: its plan rewrites {unknown[0]!r}, which the original has not"
        )
    sets = published_factors(decisions, groups, methods_of([d.method for d in decisions]), folder.model)
    widen = judged != folder.file
    noise = prove(
        judged, sets or (), known, original, drawn, widen=widen, building=building, what=f"{folder.path}: the published graph"
    )  # fmt: skip
    if sets:
        return f"the published graph computes what its {len(sets)} sets of factors say", noise
    why = (
        "no weight was rewritten"
        if sets is not None
        else "the published graph holds its factors in another form"
    )
    return f"the rewrite was not asked again: {why}", noise


# --- tune ---------------------------------------------------------------------------------------------------------


def tune(
    model: str | Path | ir.Model | None = None,
    options: Options | None = None,
    *,
    child: Child | None = None,
    progress: Progress = silent,
) -> CostTable:
    """Measure what forms take on a target, and keep it in the cache, where ``--objective latency`` and ``--latency`` look.

    model: measure the sizes of its weights, at the rows that its first feed has (``--shape``, ``--data``, else a drawn one); without one
    a grid of common sizes. Raises BuildError where the target does not run here.
    """
    options = options or Options()
    options.check()
    dtype = STORED[options.precision] if options.precision else None
    with workshop(options, child) as shop:
        if model is not None:
            known = study(model, replace(options, data=None), shop, progress)
            feeds = (
                open_feeds(options.data, inputs_of(known.source.model), options.batch)
                if options.data is not None
                else None
            )
            _, drawn = at_hand(known)
            rows = rows_of(known.source.model, known.finding, next(iter(feeds or drawn)))
            wanted = forms_in(known.finding, rows, dtype)
            opset = known.source.opset
        else:
            wanted, opset = common_forms(options.target, dtype), 18
        return tuned(
            wanted,
            opset,
            options,
            child=shop.child,
            costs=shop.cache.costs,
            scratch=shop.scratch,
            progress=progress,
        )


# --- bench --------------------------------------------------------------------------------------------------------


def bench(
    out: str | Path,
    original: str | Path | ir.Model,
    *,
    shapes: Sequence[str] = (),
    batches: Sequence[int] = (),
    prefill: Sequence[int] = (),
    decode: Sequence[int] = (),
    seconds: float = 5.0,
    options: Options | None = None,
    child: Child | None = None,
    progress: Progress = silent,
) -> Benchmark:
    """Race a published folder's model against the original in the same precision, both in one process, on the folder's target.

    Feeds: drawn in the `shapes` (``x:1x64`` or ``x:[1,64]``; an input that is named again begins another workload), at the `batches`,
    for decoders of `prefill` tokens or one token after `decode`; else options.data, else the folder's own. seconds: for each workload;
    at 0 memory and roofline are left out. Raises UsageError, and BuildError where the target does not run here.
    """
    out = Path(out)
    document = check_folder(out)
    options = asked_again(out, options)
    options.check()
    with workshop(options, child) as shop:
        folder = _load_published(out, document, options)
        known = _study_again(original, folder, options, shop, progress)
        if known.places.unrunnable:
            raise BuildError(
                f"engines of {folder.target} do not run here, so there is nothing to time: {known.places.unrunnable}"
            )
        child, source = shop.child, known.source
        set_limits(child, options, source.model, 0)
        path, _ = at_hand(known)
        inputs = inputs_of(source.model)
        wanted = workloads_of(inputs, shapes=shapes, batches=batches, prefill=prefill, decode=decode)
        if wanted:
            work = [(w, list(drawn_for(known, path, {**options.dims, **w.dims}))) for w in wanted]
        elif options.data is not None:
            work = [(Workload("", {}), list(open_feeds(options.data, inputs, options.batch)))]
        else:
            work = [(Workload("", {}), stored_feeds(out))]
        building = fast(options, [feed for _, feeds in work for feed in feeds])
        loading = folder.loading(building)
        if loading.serialized is not None:  # it was built with the most accurate kernels: both are
            building, loading = replace(building, exact=True), replace(loading, exact=True)
        dense = Entrant(dense_file(known, path), typed(source.model, known), building)
        child.deadline = None  # from here on each request is a few rounds, which have a limit of their own
        return contests(
            dense, Entrant(folder.file, folder.model, loading), work, child=child, seconds=seconds, timeout=options.timeout,
            cache=shop.cache.root / "ceilings" if seconds else None, scratch=shop.scratch, progress=progress,
        )  # fmt: skip
