"""What all pictures share: matplotlib's settings, axes of a size in inches, and the drawing as SVG.

Names never reach matplotlib (it would parse a dollar as mathematics and warn about glyphs): it draws a mark, which is replaced by
the escaped name. Text stays text, so the reader's own font, a search and a screen reader serve it. No clock, no random id.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from markupsafe import Markup

# Stand-ins that matplotlib writes and the page's style sheet gives a colour.
INK, MUTED, GRID, ACCENT, REST, WARN = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06"
COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", REST: "rest", WARN: "warn"}
_DAYLIGHT = {
    "ink": "#1b1f24", "muted": "#5d6673", "grid": "#e3e7ec", "accent": "#1f6fb2", "rest": "#b9c1cb", "warn": "#b3400c",
}  # fmt: skip


def defaults() -> AbstractContextManager[None]:
    """Matplotlib's own settings for as long as we draw, whatever the user's are; imported late, it takes half a second."""
    import matplotlib as mpl

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "lrcompile", "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.labelsize": 9,
        "xtick.labelsize": 8, "ytick.labelsize": 8, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.major.size": 0,
        "ytick.major.size": 0, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.axisbelow": True, "axes.grid": True,
        "grid.color": GRID, "grid.linewidth": 0.6, "axes.unicode_minus": False,
    }  # fmt: skip
    known = {
        k: v
        for k, v in mpl.rcParamsDefault.items()
        if not k.startswith(("backend", "toolbar", "interactive"))
    }
    context: AbstractContextManager[None] = mpl.rc_context({**known, **style})
    return context


def axes_of(width: float, height: float, **margins: float) -> tuple[Any, Any]:
    canvas, (axes,) = panels_of(1, width, height, **margins)
    return canvas, axes


def panels_of(count: int, width: float, height: float, **margins: float) -> tuple[Any, Sequence[Any]]:
    """A canvas and so many axes side by side."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), dpi=72)
    drawing.patch.set_visible(False)
    panels = list(drawing.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.patch.set_visible(False)
    drawing.subplots_adjust(**margins)
    return FigureCanvasSVG(drawing), panels


def svg_of(canvas: Any, key: str, title: str, description: str, marks: dict[str, str]) -> Markup:
    """The figure as an element of the page: its ids made its own, its colours left to the style sheet, its words filled in."""
    target = io.BytesIO()
    canvas.print_svg(target, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = target.getvalue().decode()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    text = text[text.index(">") + 1 :]
    text = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"; font-family: [^;\"]*", "", text).replace("xlink:href", "href")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", text)
    referenced = set(re.findall(r'(?:href="#|url\(#)([^")]*)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referenced else "", text)
    text = re.sub(r"\n\s*", "\n", text)
    for stand_in, name in COLOURS.items():
        text = text.replace(stand_in, f"var(--{name})")
    text = re.sub("§[0-9]+§", lambda found: html.escape(marks.get(found[0], "")), text)
    width = float(box[1].split()[2]) * 4 / 3
    head = (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{key}-title {key}-desc" style="max-width:{width:.0f}px">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(description)}</desc>'
    )
    return Markup(head + text)  # every name in it is escaped above


def standalone(drawing: str) -> str:
    """A drawing of the page as a file of its own, on white, in the page's colours by daylight."""
    for name, colour in _DAYLIGHT.items():
        drawing = drawing.replace(f"var(--{name})", colour)
    head, rest = drawing.split("</desc>", 1)
    head = head.replace(
        "<svg ",
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, DejaVu Sans, sans-serif" ',
        1,
    )
    return f'{head}</desc><rect width="100%" height="100%" fill="#ffffff"/>{rest}'
