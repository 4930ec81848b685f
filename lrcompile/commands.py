"""The commands beside `compile`, as functions of the same names: inspect, plan, verify, tune, bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lrcompile.benchmark import Benchmark
from lrcompile.build import build, feeds_for, original_of, set_limits
from lrcompile.child import Child
from lrcompile.compile import (
    Workshop,
    at_hand,
    first_plan,
    job_of,
    load_metric,
    problem_of,
    search,
    study,
    workshop,
)
from lrcompile.config import published_options
from lrcompile.contests import Entrant, contests
from lrcompile.cost import rows_of
from lrcompile.errors import ModelError, UsageError, VerificationError
from lrcompile.feeds import Data, Feed, Feeds, inputs_of, open_feeds
from lrcompile.inspection import Inspection, inspection
from lrcompile.interfaces import BuildOptions
from lrcompile.load import load
from lrcompile.options import Options
from lrcompile.plan import group_by_name
from lrcompile.progress import Progress, silent
from lrcompile.publish import save_lowered
from lrcompile.recheck import check_stored, published_factors, stored_feeds
from lrcompile.records import STORED, Evidence, Plan, Source, Tradeoff
from lrcompile.registry import factorizations, methods_of
from lrcompile.rewrite import jittered, reconstructed
from lrcompile.sites import find
from lrcompile.speed import common_forms, forms_in, tuned
from lrcompile.store import check_folder
from lrcompile.surgeon import scripted
from lrcompile.tables import figures
from lrcompile.timing import CostTable
from lrcompile.tradeoff import predicted, write_tradeoff
from lrcompile.verify import Noise, check_rewrite, judge, measure, noise_of, score
from lrcompile.weights import ModelWeights
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
    options = options or published_options(out, {})
    with workshop(options, child) as shop:
        published = _load_published(out, options)
        set_limits(shop.child, options, published, 8 * len(stored_feeds(out)))
        count = check_stored(out, published.model, document["target"], shop.child)
        checks.append(f"model.onnx computes the outputs of {count} feeds that outputs.json holds")
        if original is None:
            if data is not None or options.data is not None:
                raise UsageError("data is for comparing with the original: give --original as well")
            return Verification(out, tuple(checks))
        evidence = _with_original(out, document, published, original, data, options, shop, checks, progress)
    if evidence.verdict == "failed":
        raise VerificationError(
            f"{out}: the outputs moved further than asked for: {'; '.join(evidence.failures)}"
        )
    return Verification(out, tuple(checks), evidence)


def _load_published(out: Path, options: Options) -> Source:
    try:
        return load(out / "model.onnx", allow_hardlinks=options.allow_hardlinks)
    except ModelError as error:
        raise VerificationError(f"{out} is damaged: {error}") from error


def _with_original(
    out: Path, document: Mapping[str, Any], published: Source, original: str | Path | ir.Model, data: Data | None,
    options: Options, shop: Workshop, checks: list[str], progress: Progress,
) -> Evidence:  # fmt: skip
    source = scripted(load(original, allow_hardlinks=options.allow_hardlinks), options.gs_script)
    check_source(source, original, document, out)
    checks.append("the original is the model that it was compiled from")
    target, child = document["target"], shop.child
    given = (
        data if data is not None else options.verify_data if options.verify_data is not None else options.data
    )
    feeds = open_feeds(given, inputs_of(source.model), options.batch) if given is not None else None
    set_limits(child, options, source, 16 + len(feeds or ()))
    path = original_of(source, target, child, shop.scratch)
    first = next(iter(feeds or ()), None)
    drawn = feeds_for(source.model, path, child, target, seed=options.seed, dims=options.dims, like=first)
    sentence, noise = _first_question(out, document, published, source, path, drawn, options.seed, shop)
    checks.append(sentence)

    judged_on = feeds or drawn
    with build(child, target, path) as dense, build(child, target, out / "model.onnx") as engine:
        function = load_metric(options.metric)
        metric = (function, score(function, dense, judged_on)) if function is not None else None
        evidence = measure(dense, engine, judged_on.watched("verify", progress), metric)
    limits = [limit for limit in options.budget.max_error if limit.name != "metric" or metric is not None]
    if feeds is None and document["evidence"]["held_out"] != drawn.origin:
        limits = []  # they were asked for of the user's data
    unchanged = document["evidence"]["verdict"] == "unchanged"
    evidence = judge(evidence, limits, unchanged).with_noise(noise.relative)
    words = "within " + ", ".join(map(str, limits)) if limits else "judged by no limit"
    checks.append(f"the outputs moved as above on {judged_on.origin}, {words}")
    return evidence


def check_source(source: Source, given: object, document: Mapping[str, Any], out: Path) -> None:
    """Whether a model is the one that a folder was compiled from. Raises VerificationError."""
    was = document["source"]
    if source.sha256 != was["sha256"] or dict(source.weights) != was["weights_sha256"]:
        name = given if isinstance(given, (str, Path)) else "the given model"
        raise VerificationError(f"{name} is not the model that {out} was compiled from: its SHA-256 differs")


def _first_question(
    out: Path, document: Mapping[str, Any], published: Source, source: Source, original: Path, drawn: Feeds, seed: int,
    shop: Workshop,
) -> tuple[str, Noise]:  # fmt: skip
    """Whether the published graph computes what the factors in it say: a sentence, and the original's noise."""
    target, child = document["target"], shop.child
    decisions = Plan.from_json(document["plan"]).rewritten
    groups = group_by_name(find(source.model))
    if unknown := [d.group for d in decisions if d.group not in groups]:
        raise VerificationError(f"{out}: its plan rewrites {unknown[0]!r}, which the original has not")
    sets = published_factors(decisions, groups, methods_of([d.method for d in decisions]), published.model)
    if not sets:
        why = (
            "no weight was rewritten"
            if sets is not None
            else "the published graph holds its factors in another form"
        )
        return f"the rewrite was not asked again: {why}", noise_of(child, target, original, None, drawn)
    matrix = ModelWeights(shop.cache, source.opset).matrix
    shaken = save_lowered(jittered(source.model, sets, matrix, seed), source, shop.scratch / "jittered")
    noise = noise_of(child, target, original, shaken, drawn)
    oracle = save_lowered(reconstructed(source.model, sets), source, shop.scratch / "oracle")
    if wrong := check_rewrite(child, target, oracle, out / "model.onnx", noise, drawn):
        raise VerificationError(
            f"{out}: the published graph does not compute what its factors say: {'; '.join(wrong)}"
        )
    return f"the published graph computes what its {len(sets)} sets of factors say", noise


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
    """Race a published folder's model against the original, both in one process, on the folder's target.

    Feeds: drawn in the `shapes` (``x:1x64`` or ``x:[1,64]``; an input that is named again begins another workload), at the `batches`,
    for decoders of `prefill` tokens or one token after `decode`; else options.data, else the folder's own. seconds: for each workload;
    at 0 memory and roofline are left out. Raises UsageError.
    """
    out = Path(out)
    document = check_folder(out)
    options = options or Options(target=document["target"])
    options.check()
    target = document["target"]
    with workshop(options, child) as shop:
        source = scripted(load(original, allow_hardlinks=options.allow_hardlinks), options.gs_script)
        check_source(source, original, document, out)
        set_limits(shop.child, options, source, 0)
        path = original_of(source, target, shop.child, shop.scratch)
        inputs = inputs_of(source.model)
        wanted = workloads_of(inputs, shapes=shapes, batches=batches, prefill=prefill, decode=decode)

        def drawn(dims: Mapping[str, int]) -> list[Feed]:
            both = {**options.dims, **dims}
            return list(
                feeds_for(source.model, path, shop.child, target, seed=options.seed, dims=both, like=None)
            )

        if wanted:
            work = [(w, drawn(w.dims)) for w in wanted]
        elif options.data is not None:
            work = [(Workload("", {}), list(open_feeds(options.data, inputs, options.batch)))]
        else:
            work = [(Workload("", {}), stored_feeds(out))]
        shop.child.deadline = (
            None  # from here on each request is a few rounds, which have a limit of their own
        )
        return contests(
            Entrant(path, source.model), Entrant(out / "model.onnx", _load_published(out, options).model), work,
            BuildOptions(target, threads=options.threads, exact=False), child=shop.child, seconds=seconds,
            timeout=options.timeout, cache=shop.cache.root / "ceilings" if seconds else None, scratch=shop.scratch,
            progress=progress,
        )  # fmt: skip
