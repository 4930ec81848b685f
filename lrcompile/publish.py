"""Publish: everything a user takes away, written into a staged folder; the manifest last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import yaml
from polygraphy.comparator import RunResults
from polygraphy.json import to_json

from lrcompile.cost import bytes_of, dense_flops, parameters_of, rows_of
from lrcompile.errors import ModelError
from lrcompile.factors import FactorSet
from lrcompile.feeds import Feed
from lrcompile.interfaces import Array
from lrcompile.lean import without_torch
from lrcompile.options import Options
from lrcompile.records import (
    Amount,
    EngineOptions,
    Evidence,
    Finding,
    Plan,
    Result,
    SiteReport,
    Source,
    Speed,
    Totals,
    Tradeoff,
)  # fmt: skip
from lrcompile.store import MANIFEST, copy_file, fingerprints, new_folder, save_model, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = 1
_OURS = frozenset(
    {
        "model.onnx",
        "model.onnx.data",
        "neutral.onnx",
        "engine.plan",
        "engine.rtx",
        "inputs.json",
        "outputs.json",
        "config.yaml",
        "report.html",
        MANIFEST,
    }
)
_FEEDS, _FEED_BYTES = 8, 16_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Package:
    """What is published: the chosen plan, the model file and what is known of it.

    model: the lowered model; None when the original is published as it is. neutral: with its functions, when they are kept.
    tradeoff: what else was tried, for the report. speed: what was measured of it, which no file holds.
    """

    source: Source
    finding: Finding
    plan: Plan
    sets: tuple[FactorSet, ...]
    model: ir.Model | None
    neutral: ir.Model | None
    evidence: Evidence
    options: Options
    notes: tuple[str, ...]
    tradeoff: Tradeoff | None = None
    speed: tuple[Speed, ...] = ()


def save_lowered(model: ir.Model | None, source: Source, folder: Path, external: bool | None = None) -> Path:
    """Write the model to publish: the lowered one, or (None) the original byte for byte with its external files."""
    new_folder(folder)
    if model is not None:
        return save_model(model, folder, external=external)
    if source.path == Path():  # given in memory: there are no bytes to keep
        return save_model(source.model, folder, external=external)
    for name, _ in source.weights:
        if name in _OURS:
            raise ModelError(
                f"{source.path}: its external file {name!r} has the name of one that is published; rename it"
            )
        copy_file(source.path.parent / name, folder / name)
    copy_file(source.path, folder / "model.onnx")
    return folder / "model.onnx"


def publish(
    package: Package,
    folder: Path,
    drawn: Iterable[Feed],
    run: Callable[[Feed], Mapping[str, Array]],
    report: Callable[[Mapping[str, Any], Sequence[str]], str],
) -> Mapping[str, Any]:
    """Write all files but the model, which lies in `folder` already. Returns the manifest.

    drawn: seeded feeds, never the user's data. run: the published file in ONNX Runtime on the CPU. report: the page's text from
    the manifest and notes.
    """
    feeds = small_enough(drawn)
    outputs = [dict(run(f)) for f in feeds]
    with without_torch():
        results = RunResults()
        results.add(outputs, runtime=0.0, runner_name="lrcompile")
        write_text(folder / "inputs.json", to_json([dict(f) for f in feeds]))
        write_text(folder / "outputs.json", results.to_json())
    if package.neutral is not None:
        # functions came with IR 8; model.onnx, which has none, keeps the original's version
        package.neutral.ir_version = max(package.neutral.ir_version or 0, 8)
        save_model(package.neutral, folder, name="neutral.onnx", external=package.options.external_data)
    write_text(
        folder / "config.yaml",
        yaml.safe_dump(configuration(package.options), sort_keys=False, allow_unicode=True),
    )
    document = manifest(package, feeds[0] if feeds else {})
    write_text(folder / "report.html", report(_for_readers(package, document), package.notes))
    document["files"] = fingerprints(folder)
    write_json(folder / MANIFEST, document)
    return document


def _for_readers(package: Package, document: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with what only the report says: the options, and what of the budget's parameters was kept."""
    saved = sum(d.parameters_before - d.parameters_after for d in package.plan.rewritten)
    eligible = package.plan.eligible
    counted = {} if eligible is None else {"eligible_before": eligible, "eligible_after": eligible - saved}
    # what is only predicted is left out: it hangs on --pareto, which config.yaml does not name
    curve = package.tradeoff
    tried = {"tradeoff": {**_plain(curve.to_json()), "predicted": []}} if curve is not None else {}
    totals = {**document["totals"], **counted}
    return {**document, "totals": totals, "config": configuration(package.options), **tried}


def small_enough(feeds: Iterable[Feed]) -> list[Feed]:
    """As many feeds as may be published: eight at most, and 16 MB."""
    kept: list[Feed] = []
    size = 0
    for feed in feeds:
        size += sum(np.asarray(a).nbytes for a in feed.values())
        if kept and (len(kept) == _FEEDS or size > _FEED_BYTES):
            break
        kept.append(feed)
    return kept


def manifest(package: Package, first: Feed) -> dict[str, Any]:
    """``lrcompile.json`` but for its ``files``. Holds no time, no host and no path."""
    totals = totals_of(package, first)
    before_after = {
        f"{n}_{w}": getattr(totals, f"{n}_{w}")
        for n in ("parameters", "bytes", "flops")
        for w in ("before", "after")
    }
    document = {
        "format": FORMAT,
        "source": {"sha256": package.source.sha256, "weights_sha256": dict(package.source.weights)},
        "target": package.options.target,
        "plan": package.plan.to_json(),
        "sites": [asdict(s) for s in site_reports(package.finding, package.plan, package.sets)],
        "totals": before_after,
        "evidence": package.evidence.to_json(),
    }
    return dict(_plain(document))


def configuration(options: Options) -> dict[str, Any]:
    """What reproduces this run, without paths: data is named by its hash in the manifest's evidence."""
    b = options.budget
    document = {
        "target": options.target, "methods": list(options.methods), "storage": list(options.storage) or None,
        "activations": list(options.activations) or None, "bits": b.bits, "keep": b.keep, "size": _amount(b.size), "flops": _amount(b.flops),
        "latency": None if b.latency is None else f"{b.latency.value:g}x" if b.latency.relative else b.latency.value, "energy": b.energy, "rank": b.rank,
        "max_error": ",".join(map(str, b.max_error)) or None, "objective": b.objective, "include": options.include,
        "exclude": options.exclude, "batch": options.batch, "dims": dict(options.dims), "seed": options.seed,
        "refit": options.refit, "gradients": options.gradients, "threads": options.threads, "precision": options.precision,
        "margin": options.margin if b.asks_speed else None, **_engine(options.engine),
    }  # fmt: skip
    return {k: v for k, v in document.items() if v is not None}


def _engine(engine: EngineOptions) -> dict[str, Any]:
    """What was said of how the engine is built, in the words of a configuration."""
    said: dict[str, Any] = {name: getattr(engine, name) for name in engine.said if name != "shapes"}
    if engine.provider:
        said["provider"] = dict(engine.provider)
    if engine.capabilities:
        said["capabilities"] = list(engine.capabilities)
    if engine.shapes:
        said["shapes"] = [str(r) for r in engine.shapes]
    return said


def _amount(given: Amount | None) -> str | float | None:
    """As a configuration says it, exactly."""
    if given is None:
        return None
    value = int(given.value) if given.value == int(given.value) else given.value
    return f"{value!r}x" if given.relative else value


def site_reports(finding: Finding, plan: Plan, sets: Sequence[FactorSet]) -> tuple[SiteReport, ...]:
    """A line for every constant weight use. A weight with several readers counts at its first one."""
    decisions = {name: d for d in plan.decisions for name in d.sites}
    measured = {s.decision.group: s.measured for s in sets}
    seen: set[str] = set()
    lines = []
    for site in finding.sites:
        decision = decisions.get(site.name)
        before = 0 if site.weight in seen else site.elements
        after = before
        if decision is not None and decision.rewrites:
            after = decision.parameters_after if decision.sites[0] == site.name else 0
        seen.add(site.weight)
        rewrites = decision is not None and decision.rewrites
        lines.append(
            SiteReport(
                name=site.name,
                op=site.op,
                weight_shape=site.weight_shape,
                method=decision.method if decision is not None and rewrites else "dense",
                rank=decision.rank if decision is not None and rewrites else None,
                storage=(decision.storage or _stored(sets, decision.group))
                if decision is not None and rewrites
                else None,
                activations=decision.activations if decision is not None else None,
                parameters_before=before,
                parameters_after=after,
                claimed_error=decision.claimed_error if decision is not None and rewrites else None,
                measured_error=measured.get(decision.group) if decision is not None else None,
                reason=decision.reason if decision is not None else site.refusal or "",
            )
        )
    return tuple(lines)


def _stored(sets: Sequence[FactorSet], group: str) -> str | None:
    return next((s.storage.name.lower() for s in sets if s.decision.group == group), None)


def totals_of(package: Package, first: Feed) -> Totals:
    before = package.source.model
    after = package.model if package.model is not None else before
    rows = rows_of(before, package.finding, first)
    flops = sum(rows[s.name] * dense_flops(s) for s in package.finding.sites if s.refusal is None)
    saved = 0
    for decision in package.plan.rewritten:
        per_row = (decision.flops_before - decision.flops_after) // max(len(decision.sites), 1)
        saved += sum(rows[name] * per_row for name in decision.sites)
    return Totals(
        parameters_of(before), parameters_of(after), bytes_of(before), bytes_of(after), flops, flops - saved
    )


def result_of(package: Package, document: Mapping[str, Any], out: Path) -> Result:
    """What the Python API gives back."""
    return Result(
        out,
        package.plan,
        package.evidence,
        Totals(**document["totals"]),
        document,
        package.tradeoff,
        package.speed,
    )


def _plain(value: Any) -> Any:
    """JSON's types only; numbers that JSON cannot say become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
