"""Tune: measure what the cost table of a target lacks, inside the real runtime, and keep it.

A table belongs to a device, a version of its library and a number of threads; it lies in the cache folder as JSON. Where a target cannot
run here a table that is shipped with us stands in, and says so.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.build import ranges_of
from lrcompile.curves import Curve, Problem
from lrcompile.errors import BuildError, LrcompileError
from lrcompile.interfaces import Array, BuildOptions, Engine, Factorization, Rewrite
from lrcompile.micro import copies_of, feed_of, micro
from lrcompile.progress import Progress, silent
from lrcompile.records import Candidate
from lrcompile.registry import runtime_of
from lrcompile.store import new_folder, read_json, read_text, remove_folder, save_model, write_json
from lrcompile.timing import CostTable, Form, Timing, by_form, can_be_timed, forms_of, gaps, ranks_to_measure

if TYPE_CHECKING:
    from lrcompile.child import Child

logger = logging.getLogger(__name__)

RANKS = 5  # of each kind of form that are measured; what lies between is interpolated
_STRUCTURES = 2  # of each method that are measured; others stay unknown, and so unused
_FEW_ROWS = 64
_WARM_UP = 1  # passes that fill caches and arenas, and record graphs
_SAMPLES, _SAMPLE = 7, 8e-3  # of a timing, and seconds that each lasts at least
_LONGEST = 2.0  # seconds for all samples of a timing, of which there are three at least
_STEADY = 0.15  # spread of a timing above which somebody else was at work
_LIMIT = 120.0  # seconds for one build or one timing


def tune(
    table: CostTable,
    wanted: Iterable[tuple[Form, int]],
    *,
    methods: Mapping[str, Factorization],
    lowering: Sequence[Rewrite],
    build: BuildOptions,
    opset: int,
    seed: int,
    child: Child,
    scratch: Path,
    progress: Progress = silent,
    save: Callable[[CostTable], object] = lambda table: None,
) -> CostTable:
    """The table with every wanted (form, rows) measured. A form that the target cannot build is left out, with a line in the log.

    What was disturbed is measured once more when all the others are done, and the quicker of both is kept. save: keeps the table after
    every form, so that a run that is ended goes on where it was.
    """
    missing = by_form(gaps(table, wanted))
    disturbed: dict[tuple[Form, int], Timing] = {}

    def timed(form: Form, rows: Sequence[int]) -> Iterator[Timing]:
        folder = new_folder(scratch / "micro")
        try:
            # few rows want many copies, so that weights are cold; many rows would take long with as many
            for some in ([r for r in rows if r <= _FEW_ROWS], [r for r in rows if r > _FEW_ROWS]):
                if some:
                    yield from _measured(form, some, methods, lowering, build, opset, seed, child, folder)
        except BuildError as error:
            logger.warning("%s is not timed: %s", form, error)
        finally:
            remove_folder(folder)

    for done, (form, rows) in enumerate(missing.items()):
        progress("tune", done, len(missing))
        for timing in timed(form, rows):
            table = table.with_timings([timing])
            if timing.spread > _STEADY:
                disturbed[form, timing.rows] = timing
        save(table)
    for form, rows in by_form(disturbed).items():
        quicker = [t for t in timed(form, rows) if t.seconds < disturbed[form, t.rows].seconds]
        table = table.with_timings(quicker)
        save(table)
    progress("tune", len(missing), len(missing))
    return table


def _measured(
    form: Form, rows: Sequence[int], methods: Mapping[str, Factorization], lowering: Sequence[Rewrite], build: BuildOptions,
    opset: int, seed: int, child: Child, folder: Path,
) -> Iterator[Timing]:  # fmt: skip
    copies = copies_of(form, max(rows))
    model = micro(form, copies, methods[form.method], lowering, opset, seed)
    path = save_model(model, folder, external=True)
    # what the user says of shapes is said of his model's inputs
    shapes = ranges_of(feed_of(form, copies, count, seed) for count in rows)
    builds = runtime_of(build.target).engine_file(build.target) is not None
    build = replace(build, engine=replace(build.engine, shapes=shapes if builds else ()))
    with child.build(build.target, path, build, timeout=_LIMIT) as engine:
        for count in rows:
            feed = feed_of(form, copies, count, seed)
            seconds, spread = child.call(
                "lrcompile.tune:time_engine",
                engine,
                feed,
                threads=build.threads,
                timeout=_LIMIT,
                what="timing",
            )
            yield Timing(form, count, seconds / copies, spread)


def time_engine(engine: Engine, feed: Mapping[str, Array]) -> tuple[float, float]:
    """Seconds of one run, the median of several samples, and their interquartile range over it. Called in the child."""
    run = engine.bound(feed)
    run(_WARM_UP)
    quickest = _time(run, 1)
    repeats = max(1, round(_SAMPLE / max(quickest, 1e-7)))
    count = max(3, min(_SAMPLES, int(_LONGEST / max(quickest * repeats, 1e-9))))
    samples = [_time(run, repeats) / repeats for _ in range(count)]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, (high - low) / middle


def _time(run: Callable[[int], None], times: int) -> float:
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start


# --- which forms a plan asks about --------------------------------------------------------------------------------


def wanted_of(
    problem: Problem, methods: Mapping[str, Factorization], rows: Mapping[str, int], dtype: str | None = None
) -> tuple[tuple[Form, int], ...]:
    """Every open weight as it is, and a few ranks of each form that it could have, at the rows that its reader meets."""
    pairs: dict[tuple[Form, int], None] = {}
    for curve in filter(lambda c: can_be_timed(c.group), problem.open):
        for candidate in (None, *_few(curve)):
            method = methods[candidate.method] if candidate is not None else None
            for form, site in forms_of(curve.group, candidate, method, dtype):
                pairs[form, rows.get(site, 0)] = None
    return tuple(pairs)


def _few(curve: Curve) -> Iterator[Candidate]:
    """Of each method the structures that err least at half the parameters, and of each of these a few ranks; every type of a dense weight.

    Factors in few bits are left out: they are many, and their product is the slower part twice.
    """
    kinds: dict[tuple[str | None, ...], dict[object, list[Candidate]]] = {}
    for c in (c for c in curve.candidates if c.storage is None or c.method == "dense"):
        kinds.setdefault((c.method, c.permutes, c.storage, c.activations), {}).setdefault(
            c.structure, []
        ).append(c)
    for structures in kinds.values():
        for several in sorted(structures.values(), key=lambda s: _half(curve, s).error)[:_STRUCTURES]:
            ranks = ranks_to_measure([c.rank or 0 for c in several], RANKS)
            yield from (c for c in several if (c.rank or 0) in ranks)


def _half(curve: Curve, candidates: Sequence[Candidate]) -> Candidate:
    """The one that comes nearest to half the parameters."""
    return min(candidates, key=lambda c: abs(2 * c.cost.parameters - curve.group.elements))


# --- where tables lie ---------------------------------------------------------------------------------------------


def table_of(target: str, described: Mapping[str, str], threads: int, costs: Path) -> CostTable:
    """What was measured before of this target on this device; an empty table where nothing was. described: an engine's own words."""
    empty = CostTable(target, _device(described), described.get("version", ""), threads)
    path = _path(empty, costs)
    if not path.is_file():
        return empty
    try:
        return CostTable.from_json(read_json(path))
    except (LrcompileError, KeyError, TypeError, ValueError) as error:
        logger.warning("measuring again: %s is no cost table: %s", path, error)
        return empty


def keep(table: CostTable, costs: Path) -> Path:
    """Write a table where `table_of` finds it."""
    path = _path(table, costs)
    new_folder(costs)
    write_json(path, table.to_json())
    return path


def shipped(target: str, threads: int) -> CostTable | None:
    """The table that comes with us for a target, measured on another machine; None: there is none."""
    folder = importlib.resources.files("lrcompile") / "costs"
    for entry in sorted(folder.iterdir(), key=lambda e: e.name) if folder.is_dir() else ():
        if entry.name.endswith(".json"):
            table = CostTable.from_json(json.loads(entry.read_text()), fallback=True)
            if table.target == target:
                return replace(table, threads=threads)
    return None


def _path(table: CostTable, costs: Path) -> Path:
    key = json.dumps([table.device, table.version, table.threads])
    return costs / f"{table.target}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _device(described: Mapping[str, str]) -> str:
    """The device that an engine says it runs on, by the name of its model: ``CPU`` and ``GPU`` say nothing of its speed."""
    device = described.get("device", "")
    if device.upper() == "CPU":
        return _read(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$") or platform.machine()
    if device.upper() != "GPU":
        return device
    boards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return next((n for b in boards if (n := _read(b, r"^Model:\s*(.+)$"))), device)


def _read(path: Path, pattern: str) -> str:
    try:
        found = re.search(pattern, read_text(path), re.M)
    except LrcompileError:
        return ""
    return found[1].strip() if found else ""
