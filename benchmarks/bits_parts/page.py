"""The page: tables, what was promised, and the trade-off as a picture. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bits_parts.row import Figures
from lrcompile.report.canvas import ACCENT, INK, MUTED, WARN, axes_of, defaults, standalone, svg_of

Rows = Mapping[str, Figures]
MB = 1e6
_TITLE = "Size against error: the compiler and stock quantizers"


@dataclass(frozen=True)
class Promise:
    """What was asked of a row: at least `same` and `other`, beside them the goals; size: at most so many bytes."""

    row: str
    other: float
    same: float | None = None
    goals: tuple[float, float] | None = None
    size: float | None = None


def table(rows: Rows, columns: Mapping[str, str], texts: tuple[str, str], bold: str = "--") -> str:
    """Rows down; columns by field of `Figures`, their titles; the compiler's rows as code. Columns of which nothing was measured are left out."""
    titles = {
        field: title
        for field, title in {**columns, "same": texts[0], "other": texts[1]}.items()
        if not all(math.isnan(getattr(f, field)) for f in rows.values())
    }
    lines = ["| " + " | ".join(["", *titles.values()]) + " |", "|---|" + "---:|" * len(titles)]
    for name, figures in rows.items():
        shown = f"`{name}`" if name.startswith(bold) else name
        lines.append("| " + " | ".join([shown, *(number(f, getattr(figures, f)) for f in titles)]) + " |")
    return "\n".join(lines)


def missing(wanted: Sequence[str], rows: Rows) -> list[str]:
    """A sentence about rows that the script has and the page has not; nothing where there are none."""
    names = [n for n in wanted if n not in rows]
    return [f"Not measured for this page: {'; '.join(names)}."] if names else []


def number(field: str, value: float) -> str:
    if math.isnan(value):
        return ""
    if field == "size":
        return f"{value / MB:.2f}"
    return f"{value:.4f}" if field in ("same", "other", "weight", "product") else f"{value:.2f}"


def verdicts(promises: Sequence[Promise], rows: Rows, texts: tuple[str, str]) -> str:
    """Asked and reached, met said of what is printed."""
    lines = ["| what | text | asked | reached | | goal | |", "|---|---|---:|---:|---|---:|---|"]
    for p in promises:
        figures = rows.get(p.row)
        for i, (text, asked) in enumerate(zip(texts, (p.same, p.other), strict=True)):
            if asked is None:
                continue
            value = None if figures is None else (figures.same, figures.other)[i]
            goal = p.goals[i] if p.goals else None
            cells = ["", ""] if goal is None else [f"{goal:g}", _met(value, goal)]
            reached = "not measured" if value is None else f"{value:.4f}"
            lines.append(
                f"| `{p.row}` | {text} | {asked:g} | {reached} | {_met(value, asked)} | {cells[0]} | {cells[1]} |"
            )
        if p.size is not None and figures is not None:
            fits = "met" if figures.size <= p.size else "**not met**"
            lines.append(
                f"| `{p.row}` | MB | {p.size / MB:g} at most | {figures.size / MB:.2f} | {fits} | | |"
            )
    return "\n".join(lines)


def _met(value: float | None, limit: float) -> str:
    return "" if value is None else "met" if value >= limit else "**not met**"


def picture(ours: Rows, parts: Rows, stock: Rows, original: float) -> str:
    """1 - mean cosine on the other text against the file's size, both logarithmic. original: bytes of the file that all were made of."""
    with defaults():
        canvas, axes = axes_of(9.6, 5.6, left=0.08, right=0.99, top=0.97, bottom=0.1)
        line = sorted((f.size / MB, 1 - f.other) for f in ours.values())
        axes.plot(*zip(*line, strict=True), color=ACCENT, marker="o", markersize=4, linewidth=1.4)
        marks: dict[str, str] = {}
        for rows, colour, shape in ((parts, ACCENT, "s"), (stock, WARN, "D")):
            for name, f in rows.items():
                axes.plot(
                    [f.size / MB], [1 - f.other], color=colour, marker=shape, markersize=4, linestyle=""
                )
                marks[f"§{len(marks)}§"] = name
                axes.annotate(
                    f"§{len(marks) - 1}§", (f.size / MB, 1 - f.other), xytext=(6, 3 if colour == WARN else -9),
                    textcoords="offset points", fontsize=7, color=INK if colour == WARN else MUTED,
                )  # fmt: skip
        axes.axvline(original / MB, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [5, 7, 10, 15, 20, 30, 40, 60, 90]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlim(right=2.2 * original / MB)  # room for words
        axes.set_xlabel("size of the files, MB")
        axes.set_ylabel("1 - mean cosine, docstrings")
        words = (
            f"Line: the whole model compiled with --size, {len(ours)} sizes. Squares: compiled with --bits, tables as they were. Diamonds: "
            "stock quantizers of ONNX Runtime. Lower is better. Dotted: the original's size."
        )
        return standalone(str(svg_of(canvas, "bits", _TITLE, words, marks)))
