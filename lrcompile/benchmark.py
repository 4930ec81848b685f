"""What `bench` gives back: a race for each workload, with throughput, memory and the roofline; as a table, JSON or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrcompile.bench import Race
from lrcompile.report.canvas import ACCENT, INK, MUTED, REST, defaults, panels_of, standalone, svg_of
from lrcompile.roofline import Ceilings
from lrcompile.store import write_text

Two = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """A workload that was raced. count: units (``row``, ``token``, ``run``) in one run.

    memory: bytes that loading and running add at the peak, of the original and the compiled model; roofline: seconds that they take at
    least; None where it is not known.
    """

    name: str
    race: Race
    unit: str = "run"
    count: int = 1
    memory: tuple[int | None, int | None] = (None, None)
    roofline: Two | None = None

    @property
    def throughput(self) -> Two:
        """Units a second, at the median."""
        return self.count / self.race.original.median, self.count / self.race.compiled.median

    @property
    def shares(self) -> Two | None:
        """How much of the roofline is reached: 1 is all."""
        if self.roofline is None:
            return None
        return self.roofline[0] / self.race.original.median, self.roofline[1] / self.race.compiled.median

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, **self.race.to_json(), "unit": self.unit, "count": self.count, "units_per_second": self.throughput,
            "memory_bytes": self.memory, "roofline_seconds": self.roofline, "roofline_share": self.shares,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.name}" if self.name else "; ".join(self.race.shapes), str(self.race)]
        what = [f"{f'{self.unit}s/s':20} {_two(self.throughput, ',.1f')}"]
        if self.memory != (None, None):
            mega = ["?" if m is None else f"{m / 1e6:,.1f}" for m in self.memory]
            what.append(f"{'peak memory MB':20} {mega[0]} -> {mega[1]}")
        if self.roofline is not None and self.shares is not None:
            first, second = (
                f"{1e3 * t:.3f} ({s:.0%} reached)" for t, s in zip(self.roofline, self.shares, strict=True)
            )
            what.append(f"{'roofline ms':20} {first} -> {second}")
        return "\n".join([*lines, *what])


def _two(values: Two, form: str) -> str:
    return f"{values[0]:{form}} -> {values[1]:{form}}"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What `lrcompile.bench` gives back. ceilings: what the roofline is made of, None where the device could not be measured."""

    target: str
    threads: int
    rows: tuple[Row, ...]
    ceilings: Ceilings | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target, "threads": self.threads, "rows": [row.to_json() for row in self.rows],
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
        }  # fmt: skip

    def __str__(self) -> str:
        words = []
        if c := self.ceilings:
            words = [
                f"ceilings measured here: {c.bandwidth / 1e9:,.1f} GB/s, {c.peak / 1e9:,.1f} GFLOP/s in {c.dtype}"
            ]
        return "\n\n".join([*map(str, self.rows), *words])


# --- the picture ---------------------------------------------------------------------------------------------------


def write_plot(path: Path, benchmark: Benchmark) -> None:
    """Bars of the median with the 10th and 90th percentile, original above compiled, and the roofline as a mark, as SVG."""
    rows = benchmark.rows
    title = f"Time of a run on {benchmark.target}"
    words = "; ".join(f"{_name(r)}: {r.race.ratio.median:.2f}" for r in rows)
    marks = {f"§{i}§": _name(r) for i, r in enumerate(rows)}
    with defaults():
        height = 1.0 + 0.75 * len(rows)
        canvas, (axes,) = panels_of(
            1, 7.2, height, left=0.30, right=0.93, bottom=0.55 / height, top=1 - 0.42 / height
        )
        largest = max(max(r.race.original.p90, r.race.compiled.p90) for r in rows)
        smallest = min(min(r.race.original.p10, r.race.compiled.p10, *(r.roofline or ())) for r in rows)
        wide = largest > 30 * smallest > 0
        for i, row in enumerate(rows):
            _bars(axes, i, row)
            longest = max(row.race.original.p90, row.race.compiled.p90)
            axes.text(
                1e3 * longest * 1.06 if wide else 1e3 * (longest + 0.015 * largest), i,
                f"{row.race.ratio.median:.2f}x", va="center", fontsize=9, color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), list(marks))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines.top.set_visible(False)
        if wide:
            axes.set_xscale("log")
            axes.set_xlim(1e3 * smallest / 1.5, 1e3 * largest * 1.9)
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            axes.set_xlim(0, 1e3 * largest * 1.15)
        axes.set_xlabel("ms a run: median, 10% to 90%")
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8, labelcolor=MUTED,
            borderaxespad=0.2, handlelength=1.2,
        )  # fmt: skip
        drawing = svg_of(canvas, "bench", title, f"Original over compiled, {words}.", marks)
    write_text(path, standalone(str(drawing)))


def _bars(axes: Any, at: int, row: Row) -> None:
    sides = ((row.race.original, REST, "original", -0.19), (row.race.compiled, ACCENT, "compiled", 0.19))
    for i, (times, colour, name, shift) in enumerate(sides):
        middle = 1e3 * times.median
        around: Sequence[Sequence[float]] = [[middle - 1e3 * times.p10], [1e3 * times.p90 - middle]]
        axes.barh(at + shift, middle, 0.34, color=colour, label=name if at == 0 else None)
        axes.errorbar(middle, at + shift, xerr=around, color=INK, elinewidth=0.8, capsize=2, capthick=0.8)
        if row.roofline is not None:
            label = "roofline" if at == 0 and i == 0 else None
            axes.plot(
                [1e3 * row.roofline[i]] * 2,
                [at + shift - 0.17, at + shift + 0.17],
                color=INK,
                linewidth=2,
                label=label,
            )


def _name(row: Row) -> str:
    return row.name or "; ".join(row.race.shapes)
