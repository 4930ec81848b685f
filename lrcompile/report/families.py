"""The error against the parameters of every factorization at a weight, as a picture: a panel a weight, a line a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrcompile.report.canvas import INK, MUTED, defaults, panels_of, standalone, svg_of
from lrcompile.report.text import tail

TITLE = "Relative error against the parameters that are kept"
# Told apart by those who see no red or no green too (Okabe and Ito), and in print by their marks.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5c00", "#5d3a9b", "#404040")
_MARKS = "osD^vPX<>"
_PANEL, _LEGEND, _HEIGHT = 4.2, 1.5, 3.6  # inches
_LOG = 0.03  # from here on down errors are told apart by their magnitude
_TITLE_COLUMNS = 52
_MARKED = 10  # points of a line that get a mark
Group = Mapping[str, Any]


def families_file(groups: Sequence[Group]) -> str:
    """An SVG file. groups: as `Inspection.to_json` has them, with the points of their curves."""
    methods = sorted({c["method"] for g in groups for c in g["curves"] if c["points"]})
    marks = {f"§{i}§": name for i, name in enumerate(methods)}
    with defaults():
        width = _PANEL * len(groups) + _LEGEND
        canvas, panels = panels_of(
            len(groups), width, _HEIGHT, left=0.6 / width, right=1 - _LEGEND / width, bottom=0.14, top=0.88, wspace=0.22
        )  # fmt: skip
        for i, (axes, group) in enumerate(zip(panels, groups, strict=True)):
            mark = f"§{len(methods) + i}§"
            marks[mark] = tail(group["name"], _TITLE_COLUMNS)
            axes.set_title(mark, loc="left", fontsize=9, color=INK)
            _panel(axes, group, {name: m for m, name in marks.items() if name in methods})
        _legend(panels[-1], list(marks)[: len(methods)])
        return standalone(str(svg_of(canvas, "families", TITLE, _words(groups), marks)))


def _panel(axes: Any, group: Group, labels: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.spines["top"].set_visible(False)
    axes.set_xlabel("share of the weight's parameters")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    errors = []
    for place, name in enumerate(labels):
        curve = next((c for c in group["curves"] if c["method"] == name), None)
        points = [p for p in curve["points"] if p["error"] <= 1.0] if curve is not None else []
        if not points:
            continue
        errors += [p["error"] for p in points]
        colour, mark = _COLOURS[place % len(_COLOURS)], _MARKS[place % len(_MARKS)]
        axes.plot([p["share"] for p in points], [p["error"] for p in points], color=colour, linewidth=1.3)
        some = points[:: max(1, len(points) // _MARKED)]
        for slow in (False, True):  # hollow: slower than the weight itself
            shown = [p for p in some if (p["flops"] > group["flops"]) == slow]
            axes.plot(
                [p["share"] for p in shown], [p["error"] for p in shown], color=colour, linestyle="none", marker=mark,
                markersize=4.5, markerfacecolor="#ffffff" if slow else colour,
            )  # fmt: skip
    axes.set_xlim(0, 1.02)
    if errors and min(errors) < _LOG:
        axes.set_yscale("log")
        axes.set_ylim(max(min(errors) / 2, 1e-8), 1.5)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axes.set_ylim(0, 1.02)


def _legend(axes: Any, labels: Sequence[str]) -> None:
    """Beside the last panel. It knows the marks that stand for names, and so not how long these are."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_COLOURS[i % len(_COLOURS)], marker=_MARKS[i % len(_MARKS)], markersize=4, linewidth=1.3)
        for i in range(len(labels))
    ]  # fmt: skip
    axes.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1.02), frameon=False, fontsize=8.5, labelcolor=INK,
        borderaxespad=0.2,
    )  # fmt: skip
    axes.text(
        1.03, 0.0, "hollow: takes more\nmultiplications than\nthe weight", transform=axes.transAxes, fontsize=7.5,
        color=MUTED, va="bottom",
    )  # fmt: skip


def _words(groups: Sequence[Group]) -> str:
    """The picture in words: the least error of each panel at half of the parameters, and whose it is."""
    said = []
    for group in groups:
        halves = [
            (min(p["error"] for p in c["points"] if p["share"] <= 0.5), c["method"])
            for c in group["curves"]
            if any(p["share"] <= 0.5 for p in c["points"])
        ]
        if halves:
            error, method = min(halves)
            said.append(f"{group['name']}: with half of the parameters {method} errs least, by {error:.3g}.")
    return " ".join(said)
