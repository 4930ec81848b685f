"""What is known of a model before anything is compiled, and the files, feeds and engines that are made of it on the way.

Every command opens a `Workshop` and fills a `Study` (`compile.study`: load, find, calibrate). What has no stage of its own stands here:
the original as a file that runs, the precision that was asked for, where a file is judged, and the serialized engine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from lrcompile.build import (
    Places,
    build,
    engine_options,
    feeds_for,
    original_of,
    ranges_of,
    set_limits,
    started,
)
from lrcompile.child import Child
from lrcompile.cost import bytes_of, is_large, rows_of
from lrcompile.curves import Whole
from lrcompile.errors import BuildError
from lrcompile.factors import FactorSet
from lrcompile.feeds import STYLES, Feeds, draw, inputs_of
from lrcompile.fused import Nodes, fuse
from lrcompile.interfaces import BuildOptions, Factorization, Runtime, StatisticsSource
from lrcompile.lower import lower
from lrcompile.options import Options
from lrcompile.precision import convert, widened
from lrcompile.progress import Progress
from lrcompile.publish import save_lowered
from lrcompile.records import Built, Finding, Source
from lrcompile.shapes import dims_of
from lrcompile.store import Cache, default_cache, load_function, new_folder, remove_folder
from lrcompile.verify import Metric
from lrcompile.weights import ModelWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Workshop:
    """What touches the disk or another process: opened once for a command."""

    child: Child
    cache: Cache
    scratch: Path


@contextlib.contextmanager
def workshop(options: Options, child: Child | None = None) -> Iterator[Workshop]:
    """The cache, a scratch folder, and the given child or one of our own; BLAS has as many threads as the options say."""
    with contextlib.ExitStack() as stack:
        cache = Cache(options.cache or default_cache())
        scratch = stack.enter_context(cache.scratch())
        stack.enter_context(threadpool_limits(options.threads))
        yield Workshop(stack.enter_context(started(child)), cache, scratch)


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

    @property
    def large(self) -> bool | None:
        """Whether files of the model have their weights beside them, where only we read them; None: `save_model` decides."""
        return is_large(self.source.model) or None


def whole_of(known: Study) -> Whole:
    """What relative budgets are relative to, at the first feed that is known, or where FLOPs are asked for at one that is drawn."""
    options, source = known.options, known.source
    feed = next(iter(known.calibration or known.held_out or ()), None)
    if feed is None and (options.budget.flops is not None or options.budget.objective == "flops"):
        feed = next(iter(draw(source.model, STYLES[0], options.seed, 1, options.dims)))
    rows = rows_of(source.model, known.finding, feed) if feed is not None else {}
    return Whole(bytes_of(typed(source.model, known)), rows)


# --- the original and its feeds -----------------------------------------------------------------------------------


def at_hand(known: Study) -> tuple[Path, Feeds]:
    """A file of the original that runs, and feeds that it accepts.

    An engine that is built for its shapes takes what ``--shape`` says, and all that is fed here.
    """
    options, child = known.options, known.child
    child.engines[options.target] = engine_options(options)
    original = original_of(known.source, known.places.lab, child, known.scratch)
    built = known.runtime.engine_file(options.target) is not None
    if (
        options.engine.cuda_graph and not built
    ):  # only engines that are timed have one: here it is refused where there is none
        recorded = replace(engine_options(options), cuda_graph=True)
        build(child, options.target, original, BuildOptions(options.target, engine=recorded)).close()
    drawn = drawn_for(known, original, shaped_dims(known) if built else options.dims)
    if built:
        fed = (*drawn, *(known.calibration or ()), *(known.held_out or ()))
        child.engines[options.target] = engine_options(options, ranges_of(fed))
    return original, drawn


def drawn_for(known: Study, original: Path, dims: Mapping[str, int]) -> Feeds:
    """Seeded feeds that the original runs, with these values of its free dimensions."""
    first = next(iter(known.calibration or known.held_out or ()), None)
    return feeds_for(
        known.source.model, original, known.child, known.places.lab, seed=known.options.seed, dims=dims, like=first
    )  # fmt: skip


def shaped_dims(known: Study) -> dict[str, int]:
    """The free dimensions of the inputs, with what ``--shape`` says of them."""
    usual = {r.input: r.usual for r in known.options.engine.shapes}
    return {**known.options.dims, **dims_of(usual, inputs_of(known.source.model))}


# --- the precision ------------------------------------------------------------------------------------------------


def typed(model: ir.Model, known: Study, widen: bool = False) -> ir.Model:
    """The model in the precision that was asked for; widen: its weights rounded to it, but computed in float32."""
    if known.options.precision is None:
        return model
    return widened(model, known.options.precision) if widen else convert(model, known.options.precision)


def dense_file(known: Study, original: Path) -> Path:
    """The original in the precision that was asked for: what compiled engines are raced against."""
    if known.options.precision is None:
        return original
    folder = known.scratch / "dense"
    if folder.is_dir():  # made before
        return folder / "model.onnx"
    return save_lowered(typed(known.source.model, known), known.source, folder, known.large)


def lowered_file(known: Study, dense: Path) -> Path:
    """The original under the target's lowering: with its fused operators those of compiled models are compared."""
    rewrites = known.runtime.lowering(known.options.target)
    if not rewrites:
        return dense
    model = lower(typed(known.source.model, known).clone(), rewrites)
    return save_lowered(model, known.source, new_folder(known.scratch / "lowered"), known.large)


def judged_file(path: Path, lowered: ir.Model, known: Study) -> Path:
    """The file that is run to be judged: what is published, or where that has no kernels its weights computed with in float32."""
    if known.options.precision is None:
        return path
    try:
        build(known.child, known.places.judge, path).close()
        return path
    except BuildError as error:
        logger.info("%s; it is judged with float32 kernels", error)
    folder = known.scratch / f"{path.parent.name}-widened"
    return save_lowered(typed(lowered, known, widen=True), known.source, folder, known.large)


# --- engines ------------------------------------------------------------------------------------------------------


def nodes_in(known: Study, path: Path) -> Nodes:
    """The operators that really run of a model file, after the runtime's own optimisations, with where each runs."""
    with build(known.child, known.places.judge, path) as engine:
        return engine.nodes()


def fused(model: ir.Model, sets: Sequence[FactorSet], known: Study, before: Nodes) -> ir.Model:
    """The model with fusions of our own where the runtime's would be fewer than in the original, of which `before` run."""

    def nodes_of(made: ir.Model) -> Nodes:
        folder = new_folder(known.scratch / "fused")
        try:
            return nodes_in(known, save_lowered(made, known.source, folder, known.large))
        finally:
            remove_folder(folder)

    fusions = known.runtime.fusions(known.options.target)
    found = fuse(model, fusions, before, nodes_of, factored_table=factored_table(sets))
    for lost in found.lost:
        logger.warning("fewer fused operators run than in the original: %s", lost)
    return found.model


def factored_table(sets: Sequence[FactorSet]) -> bool:
    """Whether a table is factored, so that what embeds and normalizes at once has nothing to read from."""
    return any(s.kind == "lookup" for f in sets for s in f.group.sites)


def write_engine(known: Study, drawn: Feeds, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Write the serialized engine beside the model, where the target has one. What the evidence says of it, and what a reader may know."""
    options, child = known.options, known.child
    name = known.runtime.engine_file(options.target)
    if name is None:
        return "ran", ()
    set_limits(child, options, known.source.model, len(drawn))
    made = BuildOptions(
        options.target,
        threads=options.threads,
        engine=child.engines[options.target],
        cache=known.cache.builders,
    )
    built: Built = child.call(
        "lrcompile.build:serialize_there", options.target, folder / "model.onnx", folder / name, made,
        what=f"building {name}",
    )  # fmt: skip
    ran = f"built, not run: {known.places.unrunnable}" if known.places.unrunnable else "ran"
    return ran, (str(built),)


# --- the user's own ------------------------------------------------------------------------------------------------


def load_metric(given: str | Metric | None) -> Metric | None:
    """The function that ``--metric f.py:func`` names."""
    if not isinstance(given, str):
        return given
    path, _, name = given.rpartition(":")
    return load_function(path or name, name if path else "metric")
