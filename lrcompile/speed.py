"""Speed: what forms take on the target before anything is planned, and whether an engine really is faster once it is built.

Both ask the runtime itself: `timed_problem` fills the cost table where it lacks something and leaves only forms that are expected to pay,
`speedup` races the compiled model against the original, interleaved, on the shapes that count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.bench import Race, race
from lrcompile.build import build
from lrcompile.cost import rows_of
from lrcompile.curves import Problem, timed
from lrcompile.errors import UsageError
from lrcompile.interfaces import BuildOptions, Factorization, Rewrite
from lrcompile.micro import micro
from lrcompile.options import Options
from lrcompile.progress import Progress
from lrcompile.records import STORED, Finding, Source, Speed
from lrcompile.registry import factorization, factorizations, runtime_of
from lrcompile.store import new_folder, save_model
from lrcompile.timing import Clock, CostTable, Form, standard_forms
from lrcompile.tune import RANKS, keep, shipped, table_of, tune, wanted_of

if TYPE_CHECKING:
    from lrcompile.child import Child, RemoteEngine
    from lrcompile.feeds import Feed

logger = logging.getLogger(__name__)

# Widths of layers, rows and type that are measured where no model is given.
_ON_CPU = ((384, 768, 1536), (1, 16, 128, 1024), "float")
_ON_GPU = ((1024, 4096), (1, 16, 128, 1024, 4096), "float16")
_PROBE = Form("dense", "linear", 8, (8,), None, "float")
_RACE = 3.0  # seconds for each shape
_LIMIT = 120.0  # seconds for the timing of one engine


def fast(options: Options) -> BuildOptions:
    """How an engine is built that is timed: with the kernels that users get, not with the most accurate ones."""
    return BuildOptions(options.target, threads=options.threads, exact=False, engine=options.engine)


def timed_problem(
    problem: Problem, source: Source, finding: Finding, methods: Mapping[str, Factorization], lowering: Sequence[Rewrite],
    dense: Path, feed: Feed, options: Options, *, child: Child, costs: Path, scratch: Path, runs: bool, progress: Progress,
) -> tuple[Problem, str]:  # fmt: skip
    """The problem with only those forms that are expected to be faster at this feed, and where the times come from, in a sentence.

    dense: the original, in the precision that was asked for. runs: whether the target's engines run here; where they do not, a table that
    is shipped stands in. Raises UsageError where there is none.
    """
    rows, dtype = (
        rows_of(source.model, finding, feed),
        STORED[options.precision] if options.precision else None,
    )
    assert problem.whole is not None
    if not runs:
        table = shipped(options.target, options.threads)
        if table is None:
            raise UsageError(
                f"nothing is known of the speed of {options.target}, whose engines do not run here: compile where they do, or ask for "
                "--objective size or flops"
            )
        clock = Clock(table, dtype)
        known = [clock.of(c.group, None, None, rows) for c in problem.curves if c.group.shares_weight]
        seconds = sum(s for s in known if s is not None)
        whole = replace(problem.whole, rows=rows, seconds=seconds)
        source_of_times = f"times are those of {table.device}, {table.version}, which come with lrcompile: nothing was measured here"
    else:
        table, seconds = _measured(
            problem, source, methods, lowering, dense, feed, rows, options, child, costs, scratch, progress
        )
        clock = Clock(table, dtype)
        whole = replace(problem.whole, rows=rows, seconds=seconds)
        source_of_times = f"times were measured on {table.device}, {table.version}"
    return timed(
        problem, lambda g, c: clock.of(g, c, methods[c.method] if c else None, rows), whole, options.margin
    ), source_of_times


def _measured(
    problem: Problem, source: Source, methods: Mapping[str, Factorization], lowering: Sequence[Rewrite], dense: Path, feed: Feed,
    rows: Mapping[str, int], options: Options, child: Child, costs: Path, scratch: Path, progress: Progress,
) -> tuple[CostTable, float]:  # fmt: skip
    """The target's table with all that the problem asks about, and seconds of a run of the original."""
    deadline, child.deadline = child.deadline, None  # each build and timing has a limit of its own
    try:
        with build(child, options.target, dense, fast(options)) as engine:
            described, seconds = engine.describe(), seconds_of(engine, feed, options, child)
        table = tune(
            table_of(options.target, described, options.threads, costs),
            wanted_of(problem, methods, rows, STORED[options.precision] if options.precision else None), methods=methods,
            lowering=lowering, build=fast(options), opset=source.opset, seed=options.seed, child=child, scratch=scratch,
            progress=progress,
        )  # fmt: skip
    finally:
        child.deadline = deadline
    keep(table, costs)
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
    with build(child, options.target, probe, fast(options)) as engine:
        described = engine.describe()
    table = tune(
        table_of(options.target, described, options.threads, costs), wanted, methods=factorizations(),
        lowering=runtime.lowering(options.target), build=fast(options), opset=opset, seed=options.seed, child=child, scratch=scratch,
        progress=progress,
    )  # fmt: skip
    keep(table, costs)
    return table


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
                timeout=options.timeout, progress=progress, options=fast(options),
            )
            for feed in feeds
        )  # fmt: skip
    finally:
        child.deadline = deadline


def speed_of(run: Race) -> Speed:
    return Speed(
        "; ".join(run.shapes) or "no input", run.ratio.median, run.ratio.p10, run.ratio.p90, run.same
    )
