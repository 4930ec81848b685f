"""Speed: what forms take on the target before anything is planned, and whether an engine really is faster once it is built.

Both ask the runtime itself: `timed_problem` fills the cost table where it lacks something and leaves only forms that are expected to pay,
`speedup` races the compiled model against the original, interleaved, on the shapes that count.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.bench import Race, race
from lrcompile.build import build, engine_options, ranges_of
from lrcompile.cost import rows_of
from lrcompile.curves import Problem, timed
from lrcompile.errors import UsageError
from lrcompile.interfaces import BuildOptions
from lrcompile.micro import feed_of, micro
from lrcompile.options import Options
from lrcompile.progress import Progress
from lrcompile.records import STORED, Finding, Speed
from lrcompile.registry import factorization, factorizations, runtime_of
from lrcompile.store import new_folder, save_model
from lrcompile.study import Study, at_hand, dense_file, drawn_for, shaped_dims
from lrcompile.timing import Clock, CostTable, Form, standard_forms
from lrcompile.tune import RANKS, keep, shipped, table_of, tune, wanted_of

if TYPE_CHECKING:
    from lrcompile.child import Child, RemoteEngine
    from lrcompile.feeds import Feed, Feeds

logger = logging.getLogger(__name__)

# Widths of layers, rows and type that are measured where no model is given.
_ON_CPU = ((384, 768), (1, 16, 128, 512), "float")
_ON_GPU = ((1024, 4096), (1, 16, 128, 1024, 4096), "float16")
_PROBE = Form("dense", "linear", 8, (8,), None, "float")
_RACE = 3.0  # seconds for each shape
_LIMIT = 120.0  # seconds for the timing of one engine
_LOOKED_AT, _RACED = 32, 3  # feeds among which shapes are looked for, and how many shapes are raced


def fast(options: Options, feeds: Iterable[Feed] = ()) -> BuildOptions:
    """How an engine is built that is timed: with the kernels that users get, not with the most accurate ones, for these feeds."""
    engine = options.engine
    if (
        runtime_of(options.target).engine_file(options.target) is not None
    ):  # a builder must know which shapes will come
        engine = replace(engine, shapes=engine_options(options, ranges_of(feeds)).shapes)
    return BuildOptions(options.target, threads=options.threads, exact=False, engine=engine)


def speed_feeds(known: Study, original: Path, drawn: Feeds) -> list[Feed]:
    """One feed of each shape at which speed counts: what ``--shape`` names, or the user's data has, or what was drawn."""
    if known.options.engine.shapes:
        return [next(iter(drawn_for(known, original, shaped_dims(known))))]
    given = known.held_out or known.calibration or drawn
    by_shape = {tuple(a.shape for a in feed.values()): feed for feed in itertools.islice(given, _LOOKED_AT)}
    return list(by_shape.values())[:_RACED]


def timed_problem(problem: Problem, known: Study) -> tuple[Problem, str]:
    """The problem with only those forms that are expected to be faster, and where the times come from, in a sentence.

    At the first of the shapes that count. Where the target's engines do not run here, a table that is shipped stands in. Raises
    UsageError where there is none.
    """
    options, methods = known.options, known.methods
    original, drawn = at_hand(known)
    feed = speed_feeds(known, original, drawn)[0]
    rows = rows_of(known.source.model, known.finding, feed)
    dtype = STORED[options.precision] if options.precision else None
    assert problem.whole is not None
    if known.places.unrunnable:
        table = shipped(options.target, options.threads)
        if table is None:
            raise UsageError(
                f"nothing is known of the speed of {options.target}, whose engines do not run here ({known.places.unrunnable}): compile "
                "where they do, or ask for --objective size or flops"
            )
        clock = Clock(table, dtype)
        dense = [clock.of(c.group, None, None, rows) for c in problem.curves if c.group.shares_weight]
        seconds = sum(s for s in dense if s is not None)
        words = f"times are those of {table.device}, {table.version}, which come with lrcompile: nothing was measured here"
    else:
        table, seconds = _measured(problem, known, dense_file(known, original), feed, rows, dtype)
        clock = Clock(table, dtype)
        words = f"times were measured on {table.device}, {table.version}"
    whole = replace(problem.whole, rows=rows, seconds=seconds)
    paying = timed(
        problem, lambda g, c: clock.of(g, c, methods[c.method] if c else None, rows), whole, options.margin
    )
    return paying, words


def _measured(
    problem: Problem, known: Study, dense: Path, feed: Feed, rows: Mapping[str, int], dtype: str | None
) -> tuple[CostTable, float]:
    """The target's table with all that the problem asks about, and seconds of a run of the original."""
    options, child, costs = known.options, known.child, known.cache.costs
    deadline, child.deadline = child.deadline, None  # each build and timing has a limit of its own
    try:
        with build(child, options.target, dense, fast(options, [feed])) as engine:
            described, seconds = engine.describe(), seconds_of(engine, feed, options, child)
        table = tune(
            table_of(options.target, described, options.threads, costs), wanted_of(problem, known.methods, rows, dtype),
            methods=known.methods, lowering=known.runtime.lowering(options.target), build=fast(options), opset=known.source.opset,
            seed=options.seed, child=child, scratch=known.scratch, progress=known.progress, save=partial(keep, costs=costs),
        )  # fmt: skip
    finally:
        child.deadline = deadline
    return table, seconds


def seconds_of(engine: RemoteEngine, feed: Feed, options: Options, child: Child) -> float:
    """Of one run of an engine."""
    seconds: float = child.call(
        "lrcompile.tune:time_engine",
        engine,
        feed,
        threads=options.threads,
        timeout=_LIMIT,
        what="timing the original",
    )[0]
    return seconds


def tuned(
    wanted: Sequence[tuple[Form, int]], opset: int, options: Options, *, child: Child, costs: Path, scratch: Path, progress: Progress
) -> CostTable:  # fmt: skip
    """The target's table with these forms measured, as it is kept from now on."""
    runtime = runtime_of(options.target)
    child.deadline = None
    probe = save_model(micro(_PROBE, 1, factorization("dense"), (), opset, 0), new_folder(scratch / "probe"))
    unshaped = replace(options, engine=replace(options.engine, shapes=()))  # they are of inputs of a model
    with build(child, options.target, probe, fast(unshaped, [feed_of(_PROBE, 1, 8, 0)])) as engine:
        described = engine.describe()
    return tune(
        table_of(options.target, described, options.threads, costs), wanted, methods=factorizations(),
        lowering=runtime.lowering(options.target), build=fast(options), opset=opset, seed=options.seed, child=child, scratch=scratch,
        progress=progress, save=partial(keep, costs=costs),
    )  # fmt: skip


def forms_in(finding: Finding, rows: Mapping[str, int], dtype: str | None) -> tuple[tuple[Form, int], ...]:
    """Forms of every weight of a model that is multiplied, and of those that read one value together, at their rows."""
    pairs: dict[tuple[Form, int], None] = {}
    for group in finding.groups:
        site = group.sites[0]
        together = group.kind in ("qkv", "gate_up")
        if site.kind == "linear" and (together or group.kind in ("alone", "shared")):
            widths = tuple(s.N for s in group.sites) if together else (site.N,)
            for form in standard_forms(site.K, widths, dtype or site.dtype, RANKS):
                pairs[form, rows.get(site.name, 0)] = None
    return tuple(p for p in pairs if p[1] > 0)


def common_forms(target: str, dtype: str | None) -> tuple[tuple[Form, int], ...]:
    """Square weights and those of an FFN, of common widths, at few and many rows; smaller ones in float32 on a CPU."""
    widths, rows, usual = _ON_CPU if target.endswith("cpu") or target == "reference" else _ON_GPU
    sizes = dict.fromkeys(size for d in widths for size in ((d, d), (d, 4 * d), (4 * d, d)))
    return tuple(
        (form, count)
        for K, N in sizes
        for form in standard_forms(K, (N,), dtype or usual, 3)
        for count in rows
    )


def speedup(
    child: Child, dense: Path, compiled: Path, feeds: Sequence[Feed], options: Options, progress: Progress
) -> tuple[Race, ...]:
    """A race for each shape that counts: the original of the same precision against the compiled model."""
    deadline, child.deadline = child.deadline, None  # each round has a limit of its own
    try:
        return tuple(
            race(
                child, options.target, dense, compiled, [feed], threads=options.threads, seconds=_RACE,
                timeout=options.timeout, progress=progress, options=fast(options, feeds),
            )
            for feed in feeds
        )  # fmt: skip
    finally:
        child.deadline = deadline


def speed_of(run: Race) -> Speed:
    return Speed(
        "; ".join(run.shapes) or "no input", run.ratio.median, run.ratio.p10, run.ratio.p90, run.same
    )
