"""What moves the outputs: by group as the plan predicts it, and by size as the plans that were tried show it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lrcompile.report.curve import describe, figure_of, figure_words, limits_of, tradeoff_picture
from lrcompile.report.text import figure, in_bytes, percent

_MOST = 12


@dataclass(frozen=True, slots=True)
class Part:
    """A rewritten group. share: of all predicted movement."""

    name: str
    method: str
    rank: int | None
    kept: float | None
    movement: float
    share: float | None


@dataclass(frozen=True, slots=True)
class Movements:
    """The groups that are predicted to move the outputs most, how many more there are, and the sums in a sentence."""

    parts: tuple[Part, ...]
    more: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Curve:
    """What else was tried. heads: names of the figures; rows: a plan each (kept, bytes, predicted, moved, figures, verdict)."""

    svg: Markup
    caption: str
    outcome: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, str, str, str, tuple[str, ...], str, bool], ...]


def movements_of(document: Mapping[str, Any]) -> Movements | None:
    """None where no movement is known: without data, at a rank that was asked for, under a plan that was given."""
    plan = document["plan"]
    known = [d for d in plan.get("decisions", ()) if d.get("movement") is not None]
    if not known:
        return None
    total = sum(d["movement"] for d in known)
    parts = [
        Part(
            d["group"],
            d["method"],
            d["rank"],
            d["parameters_after"] / d["parameters_before"] if d["parameters_before"] else None,
            d["movement"],
            d["movement"] / total if total else None,
        )
        for d in sorted(known, key=lambda d: -d["movement"])
    ]
    sentence = f"Predicted in all: {figure(total)}."
    curve = document.get("tradeoff")
    if (
        curve
        and curve["chosen"] is not None
        and (moved := curve["points"][curve["chosen"]]["moved"]) is not None
    ):
        sentence += f" Measured on the data that was held out: {figure(moved)}."
    return Movements(tuple(parts[:_MOST]), max(0, len(parts) - _MOST), sentence)


def curve_of(document: Mapping[str, Any]) -> Curve | None:
    """None where one plan was tried and nothing else predicted."""
    curve = document.get("tradeoff")
    if not curve or (len(curve["points"]) < 2 and not curve["predicted"]):
        return None
    limits = limits_of(curve)
    rows = []
    for i, p in sorted(enumerate(curve["points"]), key=lambda pair: (pair[1]["kept"], pair[0])):
        figures = tuple(figure_words(figure_of(p, limit), limit) for limit in limits)
        verdict = p["verdict"] + (", published" if i == curve["chosen"] else "")
        rows.append(
            (
                percent(p["kept"]),
                in_bytes(p["bytes"]),
                figure(p["movement"]),
                figure(p["moved"]),
                figures,
                verdict,
                i == curve["chosen"],
            )
        )
    return Curve(
        tradeoff_picture(curve),
        describe(curve),
        curve["outcome"],
        tuple(limit["name"] for limit in limits),
        tuple(rows),
    )
