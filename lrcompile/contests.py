"""The races of a benchmark: engines are built once, run in every workload, and each workload is set beside what is possible there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from lrcompile.bench import contest, shapes_of
from lrcompile.benchmark import Benchmark, Row
from lrcompile.child import Child
from lrcompile.errors import BuildError
from lrcompile.feeds import Feed
from lrcompile.footprint import peak_memory
from lrcompile.interfaces import BuildOptions
from lrcompile.progress import Progress
from lrcompile.records import Finding
from lrcompile.roofline import Ceilings, ceilings_of, computing_type, roofline
from lrcompile.sites import find
from lrcompile.workloads import Workload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Entrant:
    """A model that is raced: its file, the same as a graph, and how its engine is built or loaded."""

    path: Path
    model: ir.Model
    building: BuildOptions


def contests(
    original: Entrant,
    compiled: Entrant,
    workloads: Sequence[tuple[Workload, Sequence[Feed]]],
    *,
    child: Child,
    seconds: float,
    timeout: float | None,
    cache: Path | None,
    scratch: Path,
    progress: Progress,
) -> Benchmark:
    """All workloads. cache: where ceilings are kept; None: memory and roofline are left out. Raises BuildError as the engines do."""
    target, threads = original.building.target, original.building.threads
    rows, described = [], dict[str, str]()
    with (
        child.build(target, original.path, original.building) as a,
        child.build(target, compiled.path, compiled.building) as b,
    ):
        described = a.describe()
        for workload, feeds in workloads:
            run = contest(
                child,
                target,
                a,
                b,
                feeds,
                threads=threads,
                seconds=seconds,
                timeout=timeout,
                progress=progress,
            )
            rows.append(
                Row(
                    workload.name or "; ".join(shapes_of(feeds)), run, workload.unit, workload.count(feeds[0])
                )
            )
    if cache is None:
        return Benchmark(target, threads, tuple(rows))
    findings = find(original.model), find(compiled.model)
    dtypes = tuple(map(computing_type, findings))
    ceilings = [_ceilings(child, original.building, described, t, cache, scratch) for t in dtypes]
    for i, (_, feeds) in enumerate(workloads):
        used = [peak_memory(e.path, e.building, feeds[0], timeout) for e in (original, compiled)]
        rows[i] = replace(
            rows[i],
            memory=(used[0], used[1]),
            roofline=_rooflines((original, compiled), findings, feeds[0], ceilings),
        )
        progress("memory", i + 1, len(workloads))
    return Benchmark(target, threads, tuple(rows), ceilings[1])


def _ceilings(
    child: Child, building: BuildOptions, described: dict[str, str], dtype: str, cache: Path, scratch: Path
) -> Ceilings | None:
    """None where the runtime has no such product, and says so."""
    try:
        return ceilings_of(child, building, described, dtype, cache=cache, scratch=scratch / "ceilings")
    except BuildError as error:
        logger.warning("there is no roofline: %s", error)
        return None


def _rooflines(
    entrants: tuple[Entrant, Entrant], findings: tuple[Finding, Finding], feed: Feed, ceilings: Sequence[Ceilings | None]
) -> tuple[float, float] | None:  # fmt: skip
    found = [
        roofline(e.model, f, feed, c)
        for e, f, c in zip(entrants, findings, ceilings, strict=True)
        if c is not None
    ]
    return (found[0], found[1]) if len(found) == 2 else None
