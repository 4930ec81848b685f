"""The trade-off of size and error as a picture: what was measured against the first limit, and what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lrcompile.report.canvas import ACCENT, INK, MUTED, WARN, defaults, panels_of, standalone, svg_of
from lrcompile.report.text import cosine, figure, in_bytes

TITLE = "Size against error of the plans that were tried"
_WORDS = {
    "snr": "SNR, dB",
    "kl": "KL, nats",
    "relative_l2": "relative L2",
    "max_abs": "max abs",
    "top1": "top-1 kept",
}
Point = Mapping[str, Any]
Limit = Mapping[str, Any]


def figure_of(point: Point, limit: Limit) -> float | None:
    """What a limit is about."""
    name = limit["name"]
    value = point["snr_db" if name == "snr" else name]
    if name == "metric" and value is not None:
        before, after = value
        value = after / before if limit["relative"] and before else after
    return None if value is None else float(value)


def figure_words(value: float | None, limit: Limit) -> str:
    """The figure with as many digits as it needs."""
    return cosine(value) if limit["name"] == "cosine" else figure(value)


def limits_of(curve: Mapping[str, Any]) -> Sequence[Limit]:
    """The limits that were asked for; without any the cosine is shown, held against nothing."""
    return curve["limits"] or [{"name": "cosine", "value": None, "relative": False}]


def describe(curve: Mapping[str, Any]) -> str:
    """The picture in words."""
    points, predicted = curve["points"], curve["predicted"]
    held = sum(p["verdict"] != "failed" for p in points)
    words = []
    if points:
        limits = ", ".join(_name(x) for x in curve["limits"])
        judged = f"; {held} held {limits} (filled), {len(points) - held} did not (hollow)" if limits else ""
        words.append(f"Dots are plans that were compiled and verified, {len(points)} in all{judged}.")
        if curve["chosen"] is not None:
            words.append("The ringed one is published.")
    if predicted:
        words.append(
            "The dashed line is what the planner predicts for other sizes: nothing on it was compiled."
        )
    return " ".join(words)


def tradeoff_picture(curve: Mapping[str, Any]) -> Markup:
    """Left: the figure that the first limit is about. Right, where anything is predicted: predicted movement against measured."""
    points, predicted = curve["points"], curve["predicted"]
    moves = any(p["movement"] for p in (*points, *predicted))
    with defaults():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        count = bool(points) + moves
        width = 4.6 * max(count, 1)
        canvas, panels = panels_of(
            max(count, 1),
            width,
            3.6,
            left=0.62 / width,
            right=1 - 0.2 / width,
            bottom=0.14,
            top=0.9,
            wspace=0.24,
        )
        for axes in panels:
            axes.spines["top"].set_visible(False)
            axes.set_xlabel("share of the eligible parameters kept")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        if points:
            _measured(panels[0], curve)
        if moves:
            axes = panels[-1]
            axes.set_yscale("log")
            axes.set_title(f"movement of the outputs ({_unit(points)})", loc="left", fontsize=9, color=INK)
            line = [(p["kept"], p["movement"]) for p in predicted if p["movement"]]
            axes.plot(*_columns(line), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            _dots(axes, [(p["kept"], p["movement"]) for p in points if p["movement"]], MUTED, "none", "D")
            _dots(axes, [(p["kept"], p["moved"]) for p in points if p["moved"]], ACCENT, ACCENT, "o")
            axes.yaxis.set_major_locator(LogLocator(numticks=6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            said = "dots: measured; diamonds and line: predicted" if points else "predicted, not compiled"
            axes.text(0.03, 0.04, said, transform=axes.transAxes, color=MUTED, fontsize=8, va="bottom")
        return svg_of(canvas, "tradeoff", TITLE, f"{describe(curve)} {curve['outcome']}", {})


def tradeoff_file(curve: Mapping[str, Any]) -> str:
    """The same as an SVG file of its own."""
    return standalone(str(tradeoff_picture(curve)))


def _measured(axes: Any, curve: Mapping[str, Any]) -> None:
    limit = limits_of(curve)[0]
    axes.set_title(f"{_WORDS.get(limit['name'], limit['name'])}, measured", loc="left", fontsize=9, color=INK)
    for failed in (False, True):
        some = [
            (p["kept"], v)
            for p in curve["points"]
            if (p["verdict"] == "failed") == failed and (v := figure_of(p, limit)) is not None
        ]
        colour = WARN if failed else ACCENT
        _dots(axes, some, colour, "none" if failed else colour, "o")
    if limit["value"] is not None and not (limit["relative"] and limit["name"] != "metric"):
        axes.axhline(limit["value"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    if (chosen := curve["chosen"]) is not None:
        point = curve["points"][chosen]
        if (value := figure_of(point, limit)) is not None:
            axes.plot(
                [point["kept"]], [value], linestyle="none", marker="o", markersize=10, markeredgewidth=1.2,
                markeredgecolor=INK, markerfacecolor="none",
            )  # fmt: skip
            words = f"{in_bytes(point['bytes'])}, {figure_words(value, limit)}"
            axes.annotate(
                words, (point["kept"], value), (0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=8, color=INK
            )  # fmt: skip
    axes.margins(x=0.14, y=0.22)


def _dots(axes: Any, points: Sequence[tuple[float, float]], edge: str, face: str, marker: str) -> None:
    axes.plot(
        *_columns(points), linestyle="none", marker=marker, markersize=5, markeredgewidth=1, markeredgecolor=edge,
        markerfacecolor=face,
    )  # fmt: skip


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _unit(points: Sequence[Point]) -> str:
    if not points:
        return "relative squared; KL of logits"
    return "KL, nats" if any(p["kl"] is not None for p in points) else "relative squared"


def _name(limit: Limit) -> str:
    return f"{limit['name']}={limit['value']:g}{'x' if limit['relative'] else ''}"
