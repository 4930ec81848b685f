"""Build: a model file becomes an engine in the child process; and feeds that the original really accepts."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from lrcompile.child import Child, RemoteEngine
from lrcompile.cost import bytes_of, is_large
from lrcompile.errors import BuildError, PluginError
from lrcompile.feeds import STYLES, Feed, Feeds, draw
from lrcompile.interfaces import Availability, BuildOptions, Runtime
from lrcompile.options import Options
from lrcompile.records import Built, EngineOptions, ShapeRange, Source
from lrcompile.registry import runtime_of
from lrcompile.store import new_folder, save_model

logger = logging.getLogger(__name__)

# Small models get this long in all; big ones and many feeds get more.
_SECONDS, _SMALL_BYTES = 20.0, 10_000_000
_MEMORY = 4_000_000_000  # what a runtime may hold beside weights: activations above all
REFERENCE = "ort-cpu"  # where all that a target cannot run is run
_DRAWN = 3  # feeds that the first question is asked on and that are published


def build(child: Child, target: str, path: Path, options: BuildOptions | None = None) -> RemoteEngine:
    """An engine of a model file, ready to run. Raises BuildError in the builder's own words."""
    return child.build(target, path, options or BuildOptions(target))


@dataclass(frozen=True, slots=True)
class Places:
    """Where a model runs. target: what is compiled for. lab: where the original runs for statistics. judge: where answers are judged.

    unrunnable: why that is not the target itself, empty where it is.
    """

    target: str
    lab: str
    judge: str
    unrunnable: str = ""


def places_for(runtime: Runtime, target: str, child: Child, *, building: bool = True) -> Places:
    """The target itself where it loads ``.onnx`` files; builders of engines are asked whether these can run here.

    building: raise PluginError where the target cannot be built for; else ONNX Runtime on the CPU takes its place.
    """
    builds = runtime.engine_file(target) is not None
    if building and not builds:
        return Places(target, target, target)
    there: Availability = child.call("lrcompile.build:availability_of", target, what=f"looking for {target}")
    if building and not there.ok:
        raise PluginError(there.reason)
    missing = there.unrunnable if there.ok else there.reason
    judge = REFERENCE if missing else target
    return Places(target, REFERENCE if builds else judge, judge, missing)


def availability_of(target: str) -> Availability:
    """Of a target; called in the child, where its libraries are loaded."""
    return runtime_of(target).availability(target)


def serialize_there(target: str, model: Path, out: Path, options: BuildOptions) -> Built:
    """Build an engine file; called in the child."""
    return runtime_of(target).serialize(model, out, options)


def engine_options(options: Options, ranges: Sequence[ShapeRange] = ()) -> EngineOptions:
    """What the user said of engines, and shapes of the feeds for inputs of which nothing was said. Graphs are for engines that are timed."""
    said = {r.input for r in options.engine.shapes}
    shapes = (*options.engine.shapes, *(r for r in ranges if r.input not in said))
    return replace(options.engine, shapes=shapes, cuda_graph=False)


def ranges_of(feeds: Iterable[Feed]) -> tuple[ShapeRange, ...]:
    """The smallest and largest shape of each input over all feeds; the usual one is that of the first feed."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for feed in feeds:
        for name, array in feed.items():
            found.setdefault(name, []).append(array.shape)
    return tuple(
        ShapeRange(n, tuple(map(min, *s, s[0])), s[0], tuple(map(max, *s, s[0])))
        for n, s in found.items()
        if len({len(shape) for shape in s}) == 1
    )


@contextlib.contextmanager
def started(child: Child | None) -> Iterator[Child]:
    """The given child, its limits and engine options put back afterwards, or one of our own."""
    if child is None:
        with Child() as own:
            yield own
        return
    before = child.deadline, child.memory, child.engines
    child.engines = dict(child.engines)
    try:
        yield child
    finally:
        child.deadline, child.memory, child.engines = before


def set_limits(child: Child, options: Options, model: ir.Model, feeds: int) -> None:
    """How long all that is built and run from now on may take together, and how much memory it may hold.

    Without limits of the user's: 20 seconds for a model below 10 MB, growing with weights and feeds; 4 GB and eight times the weights.
    """
    size = bytes_of(model)
    over = max(0, size - _SMALL_BYTES) / 1e6
    seconds = _SECONDS + 3.0 * over + feeds * (0.5 + 0.1 * over)
    child.deadline = time.monotonic() + (options.timeout if options.timeout is not None else seconds)
    child.memory = options.memory if options.memory is not None else _MEMORY + 8 * size


def original_of(source: Source, target: str, child: Child, scratch: Path) -> Path:
    """A file of the original that the runtime takes: the user's own, or where it will not have that one, a copy.

    ONNX Runtime refuses legal files: two nodes of one name, external data behind a link. Raises BuildError in its words.
    Weights in a large ``.onnx`` itself would be in memory, in each session anew: of these the copy has a file of its own.
    """
    mapped = is_large(source.model)
    if source.path != Path() and not (mapped and not source.weights):
        try:
            build(child, target, source.path).close()
            return source.path
        except BuildError as error:
            logger.info("%s; trying a copy of it", error)
    copy = save_model(source.model, new_folder(scratch / "original"), external=mapped or None)
    build(child, target, copy).close()
    return copy


def feeds_for(
    model: ir.Model,
    path: Path,
    child: Child,
    target: str,
    *,
    seed: int,
    dims: Mapping[str, int],
    like: Feed | None,
) -> Feeds:
    """Seeded feeds drawn from the graph's inputs that the original runs. Raises BuildError when none of the guesses is legal.

    like: a feed of the user's; where integers steer shapes or loops these alone are copied from it.
    """
    engine = build(child, target, path)
    failure = ""
    for style in STYLES:
        if style.needs_data and like is None:
            continue
        feeds = draw(model, style, seed, _DRAWN, dims, like)
        try:
            for feed in feeds:
                engine.run(feed)
            engine.close()
            return feeds
        except BuildError as error:
            failure = str(error)
            logger.info("feeds drawn as %s are not legal: %s", style, failure)
            engine.close()
            engine = build(child, target, path)
    engine.close()
    raise BuildError(
        f"{path.name} runs on none of the inputs drawn for it; give --data or --dim NAME=VALUE. The last failure: {failure}"
    )
