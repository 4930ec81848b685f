"""The two pictures of weights, as SVG that lies inside the page: drawn by matplotlib, coloured by the page (light, dark, paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lrcompile.report.canvas import ACCENT, INK, MUTED, REST, WARN, axes_of, defaults, svg_of
from lrcompile.report.text import in_short, tail

_NAMED, _MOST = 60, 400  # up to so many bars have a name; more than so many are taken together
_NAME_COLUMNS = 46


@dataclass(frozen=True, slots=True)
class Point:
    """A rewritten site. bound: whether its claim is an upper bound (else an estimate); above: whether it broke it."""

    number: int
    claimed: float
    measured: float
    bound: bool
    above: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """What is kept of a site's weight, as a share and as numbers before and after."""

    number: int
    name: str
    before: int
    after: int
    kept: float
    rewritten: bool


def errors_picture(points: Sequence[Point], title: str, description: str) -> Markup:
    """Claimed against measured error, the three worst with their numbers."""
    with defaults():
        from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

        canvas, axes = axes_of(5.6, 4.3, left=0.13, right=0.97, bottom=0.13, top=0.97)
        values = [v for p in points for v in (p.claimed, p.measured)]
        positive = [v for v in values if v > 0]
        wide = bool(positive) and max(positive) > 20 * min(positive)
        if wide:
            low, high = min(positive) / 1.6, max(positive) * 1.6
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            low, high = 0.0, 1.12 * max(positive, default=1.0)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), clip_on=False)
        for above, bound in ((False, True), (False, False), (True, True), (True, False)):
            some = [p for p in points if (p.above, p.bound) == (above, bound)]
            colour = WARN if above else ACCENT
            axes.plot(
                [max(p.claimed, low) for p in some], [max(p.measured, low) for p in some], linestyle="none", marker="o",
                markersize=4.5, markeredgewidth=1, markeredgecolor=colour, markerfacecolor=colour if bound else "none",
                alpha=0.75, clip_on=False,
            )  # fmt: skip
        axes.set(
            xlim=(low, high),
            ylim=(low, high),
            xlabel="claimed by the plan",
            ylabel="measured from the stored factors",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())
            axis.set_minor_locator(NullLocator())
        axes.text(
            0.03,
            0.96,
            "above the line: worse than claimed",
            transform=axes.transAxes,
            color=MUTED,
            fontsize=8,
            va="top",
        )
        _label(axes, worst(points), low)
        return svg_of(canvas, "errors", title, description, {})


def worst(points: Sequence[Point], most: int = 3) -> list[Point]:
    """Those that lost most, the worst first."""
    return sorted(points, key=lambda p: (-p.measured, p.number))[:most]


def _label(axes: Any, points: Sequence[Point], low: float) -> None:
    """Numbers right of points (the diagonal and most others lie to their left), kept a line apart."""
    floor = float("inf")
    for p in points:
        x, y = axes.transData.transform((max(p.claimed, low), max(p.measured, low))) * 72 / axes.figure.dpi
        at = min(y, floor - 10)
        floor = at
        axes.annotate(
            f"#{p.number}", (x, y), (x + 6, at), xycoords="figure points", textcoords="figure points", ha="left", va="center",
            fontsize=8, color=INK,
        )  # fmt: skip


def kept_picture(bars: Sequence[Bar], title: str, description: str) -> Markup:
    """The share of parameters kept, a bar a weight in model order; names beside up to 60 bars."""
    with defaults():
        named = len(bars) <= _NAMED
        step = per_bar(len(bars))
        rows = _together(bars, step)
        pitch = 13.0 if named else max(1.8, min(7.0, 720 / len(rows)))
        height = pitch * len(rows) + 40
        left = 232 / 648 if named else 44 / 648
        canvas, axes = axes_of(
            9.0,
            height / 72,
            left=left,
            right=1 - 104 / 648 if named else 0.97,
            bottom=8 / height,
            top=1 - 32 / height,
        )
        limit = max(1.0, *(r.kept for r in rows))
        for rewritten, colour in ((False, REST), (True, ACCENT)):
            _bars(
                axes,
                [(i, r.kept) for i, r in enumerate(rows) if r.rewritten == rewritten],
                colour,
                0.72 if pitch > 4 else 0.86,
            )
        axes.set(xlim=(0, limit), ylim=(len(rows) - 0.4, -0.6), yticks=[])
        axes.axvline(1.0, color=MUTED, linewidth=0.8)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("share of the weight's parameters that is kept", labelpad=4)
        axes.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        axes.spines[["top", "left"]].set_visible(False)
        marks = {}
        side = axes.get_yaxis_transform()
        for i, r in enumerate(rows) if named else ():
            marks[f"§{i}§"] = f"{r.number}  {tail(r.name, _NAME_COLUMNS - len(str(r.number)) - 2)}"
            axes.text(
                -0.012, i, f"§{i}§", transform=side, ha="right", va="center_baseline", fontsize=8, color=INK
            )
            size = f"{in_short(r.before)} → {in_short(r.after)}" if r.rewritten else in_short(r.before)
            axes.text(
                1.015,
                i,
                size if r.before else "shared",
                transform=side,
                va="center_baseline",
                fontsize=8,
                color=MUTED,
            )
        every = 25 * math.ceil(14 * step / (25 * pitch))
        for i, r in () if named else enumerate(rows):
            if i == 0 or (r.number - 1) // every != (rows[i - 1].number - 1) // every:
                axes.text(
                    -0.008,
                    i,
                    f"{r.number}",
                    transform=side,
                    ha="right",
                    va="center_baseline",
                    fontsize=8,
                    color=MUTED,
                )
        return svg_of(canvas, "kept", title, description, marks)


def per_bar(sites: int) -> int:
    """How many weights in a row share a bar."""
    return -(-sites // _MOST)


def _together(bars: Sequence[Bar], step: int) -> list[Bar]:
    if step == 1:
        return list(bars)
    made = []
    for start in range(0, len(bars), step):
        some = bars[start : start + step]
        before, after = sum(b.before for b in some), sum(b.after for b in some)
        kept = after / before if before else 1.0
        made.append(Bar(some[0].number, "", before, after, kept, any(b.rewritten for b in some)))
    return made


def _bars(axes: Any, lengths: Sequence[tuple[int, float]], colour: str, thick: float) -> None:
    """All bars of one colour as one path: 300 of them stay small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    boxes = [
        [(0, i - thick / 2), (x, i - thick / 2), (x, i + thick / 2), (0, i + thick / 2), (0, 0)]
        for i, x in lengths
    ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    if boxes:
        path = Path([corner for box in boxes for corner in box], codes)
        axes.add_patch(PathPatch(path, facecolor=colour, edgecolor="none", snap=False, clip_on=False))
