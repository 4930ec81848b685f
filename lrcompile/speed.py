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
from lrcompile.options import Options
from lrcompile.progress import Progress
from lrcompile.records import STORED, Finding, Source, Speed
from lrcompile.timing import Clock, CostTable
from lrcompile.tune import keep, shipped, table_of, tune, wanted_of

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feed

logger = logging.getLogger(__name__)

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
    with build(child, options.target, dense, fast(options)) as engine:
        described = engine.describe()
        seconds, _ = child.call(
            "lrcompile.tune:time_engine",
            engine,
            feed,
            threads=options.threads,
            timeout=_LIMIT,
            what="timing the original",
        )
    deadline, child.deadline = child.deadline, None  # each build and timing has a limit of its own
    try:
        table = tune(
            table_of(options.target, described, options.threads, costs), wanted_of(problem, methods, rows, STORED[options.precision] if options.precision else None), methods=methods,
            lowering=lowering, build=fast(options), opset=source.opset, seed=options.seed, child=child, scratch=scratch,
            progress=progress,
        )  # fmt: skip
    finally:
        child.deadline = deadline
    keep(table, costs)
    return table, seconds


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
