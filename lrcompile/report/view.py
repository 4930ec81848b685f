"""What the manifest says, in the order and the words in which a reader asks. Pure; the template only sets it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lrcompile.report.caveats import Caveat, broken, caveats_of, rewrites
from lrcompile.report.movement import Curve, Movements, curve_of, movements_of
from lrcompile.report.pictures import Bar, Point, errors_picture, kept_picture, per_bar, worst
from lrcompile.report.running import Running, running_of
from lrcompile.report.sizes import Family, Share, families_of, shares_of, totals_of
from lrcompile.report.text import change, figure, in_bytes, percent, short

Site = Mapping[str, Any]
Output = Mapping[str, Any]
_MOST_FAMILIES = 12


@dataclass(frozen=True, slots=True)
class Verdict:
    """tone: ``good``, ``open`` (passed, but nothing was asked for), ``same`` or ``bad``; it is the colour of the box."""

    tone: str
    word: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Picture:
    """svg: the drawing. caption: what it shows and what stands out."""

    svg: Markup
    caption: str
    listed: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """Everything on the page that is not copied from the manifest."""

    verdict: Verdict
    asked: str
    moved: str
    judged: str
    caveats: tuple[Caveat, ...]
    notes: tuple[str, ...]
    totals: tuple[tuple[str, str, str, str, str], ...]
    shares: tuple[Share, ...]
    rewritten: tuple[Family, ...]
    left: tuple[Family, ...]
    more: tuple[int, int]
    pictures: tuple[Picture, ...]
    running: Running | None
    movements: Movements | None
    curve: Curve | None
    config: tuple[tuple[str, Any], ...]
    logits: bool


def view(document: Mapping[str, Any], notes: Sequence[str]) -> View:
    sites: Sequence[Site] = document["sites"]
    evidence = document["evidence"]
    changed = [s for s in sites if rewrites(s)]
    families = families_of(sites)
    rewritten = [f for f in families if f.method != "dense" or f.storage]
    left = [f for f in families if f not in rewritten]
    plan = document["plan"]
    return View(
        verdict=_verdict(document, len(changed)),
        asked=_asked(document),
        moved=_capital(_moved(evidence["outputs"])),
        judged=_judged(document),
        caveats=caveats_of(document),
        notes=tuple(dict.fromkeys((*notes, *plan.get("notes", ())))),
        totals=tuple(totals_of(document["totals"])),
        shares=tuple(shares_of(document, changed)),
        rewritten=tuple(rewritten[:_MOST_FAMILIES]),
        left=tuple(left[:_MOST_FAMILIES]),
        more=(max(0, len(rewritten) - _MOST_FAMILIES), max(0, len(left) - _MOST_FAMILIES)),
        pictures=tuple(_pictures(document)),
        running=running_of(document),
        movements=movements_of(document),
        curve=curve_of(document),
        config=tuple((k, v) for k, v in document.get("config", {}).items() if v not in (None, {}, [])),
        logits=any(
            o.get("kl") is not None or o.get("top1") is not None for o in evidence["outputs"].values()
        ),
    )


# --- the verdict --------------------------------------------------------------------------------------------------


def _verdict(document: Mapping[str, Any], changed: int) -> Verdict:
    evidence, totals, sites = document["evidence"], document["totals"], document["sites"]
    size = f"{changed} of {_weights(len(sites))} rewritten; constants {in_bytes(totals['bytes_before'])} → {in_bytes(totals['bytes_after'])} ({change(totals['bytes_before'], totals['bytes_after'])})"
    if evidence["verdict"] == "unchanged":
        why = _why_unchanged(document)
        return Verdict(
            "same",
            "Unchanged",
            f"none of {_weights(len(sites))} was rewritten, and model.onnx is the original itself: {why}",
        )
    moved = f"{size}; {_moved(evidence['outputs'])}"
    if evidence["verdict"] == "failed":
        return Verdict("bad", "Failed", f"{moved}. {'; '.join(evidence.get('failures', ()))}")
    limit = document.get("config", {}).get("max_error")
    if limit:
        return Verdict("good", "Passed", f"{moved}; judged by --max-error {limit}, which holds.")
    return Verdict("open", "Passed", f"{moved}; {_no_limit(document)}.")


def _no_limit(document: Mapping[str, Any]) -> str:
    return (
        "no limit was set" if "config" in document else "config.yaml says whether a limit (max_error) was set"
    )


def _weights(number: int) -> str:
    return f"{number:,} weight{'' if number == 1 else 's'}"


def _why_unchanged(document: Mapping[str, Any]) -> str:
    """The reason that most products with a weight share: tables and the like are left alone by default, which explains nothing."""
    sites = document["sites"]
    if not sites:
        return "no node multiplies or gathers a constant weight."
    products = [s for s in sites if s["op"] in ("MatMul", "Gemm", "Conv")] or sites
    by_reason: dict[str, int] = {}
    for s in products:
        by_reason[s["reason"]] = by_reason.get(s["reason"], 0) + 1
    reason, number = max(by_reason.items(), key=lambda item: item[1])
    return f"{short(reason or 'no reason was given')} ({_weights(number)})."


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _worst(outputs: Mapping[str, Output]) -> tuple[str, Output] | None:
    """The output that moved most; a movement that JSON cannot say (None) is the largest of all."""

    def size(item: tuple[str, Output]) -> float:
        value = item[1]["relative_l2"]
        return float("inf") if value is None else float(value)

    return max(outputs.items(), key=size, default=None)


def _moved(outputs: Mapping[str, Output]) -> str:
    found = _worst(outputs)
    if found is None:
        return "no output was compared"
    name, o = found
    if o["relative_l2"] is None:
        return f"output {short(name, 80)} moved by up to {figure(o['max_abs'])} (relative L2 has no finite value)"
    which = (
        f"output {short(name, 80)} moved"
        if len(outputs) == 1
        else f"outputs moved by at most {percent(o['relative_l2'])}"
    )
    if len(outputs) == 1:
        return f"{which} by {percent(o['relative_l2'])} (relative L2)"
    return f"{which} (relative L2, {short(name, 80)})"


# --- the two questions --------------------------------------------------------------------------------------------


def _asked(document: Mapping[str, Any]) -> str:
    """The answer to the first question."""
    if document["evidence"]["verdict"] == "unchanged":
        return "Nothing was rewritten, so there is nothing to ask: the file is the original."
    rounded = sum(bool(s.get("activations")) for s in document["sites"])
    apart = (
        f" The inputs of {rounded} weight{'' if rounded == 1 else 's'} are rounded to 8 bits: for this question they were left as they are, "
        "and what rounding them does belongs to the second."
    )
    return (
        "Yes, for every output, on seeded random feeds. Had one differed by more than ten times the noise floor (its own, where the compressed model "
        "amplifies rounding more than the original; or 1e-5 of its largest value, where that is more), nothing would have been published."
        f"{apart if rounded else ''}"
    )


def _judged(document: Mapping[str, Any]) -> str:
    """The answer to the second question: what the figures were held against."""
    evidence = document["evidence"]
    limit = document.get("config", {}).get("max_error")
    if evidence["verdict"] == "unchanged":
        return "Nothing was rewritten: the published file is the original."
    if evidence["verdict"] == "failed":
        return f"They do not hold: {'; '.join(evidence.get('failures', ()))}."
    if limit:
        return f"They were held against --max-error {limit}, and hold."
    if "config" in document:
        return "They were held against nothing: no --max-error was given, so “passed” says that the rewrite is right, not that it is good enough."
    return (
        "“Passed” means that they keep the limit in config.yaml (max_error). If it has none, they were held against nothing, and "
        "“passed” says that the rewrite is right, not that it is good enough."
    )


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(document: Mapping[str, Any]) -> Iterator[Picture]:
    sites = document["sites"]
    bound = {name: d["bound"] for d in document["plan"].get("decisions", ()) for name in d["sites"]}
    points = [
        Point(i, s["claimed_error"], s["measured_error"], bound.get(s["name"], True), broken(s))
        for i, s in enumerate(sites, 1)
        if rewrites(s) and s["claimed_error"] is not None and s["measured_error"] is not None
    ]
    if points:
        above = sum(p.above for p in points)
        caption = "Each point is a rewritten weight. On or below the dashed line the measured error is no larger than the claimed one. "
        caption += (
            f"{above} of {len(points)} lie{'s' if above == 1 else ''} above it by more than rounding. "
            if above
            else "None lies above it by more than rounding. "
        )
        caption += (
            "Hollow points are claims that were estimates. " if not all(p.bound for p in points) else ""
        )
        caption += (
            "Errors of zero stand at the edge. " if any(0 in (p.claimed, p.measured) for p in points) else ""
        )
        named = tuple((p.number, sites[p.number - 1]["name"], p.measured) for p in worst(points))
        title = "Claimed against measured error of each rewritten weight"
        yield Picture(
            errors_picture(points, title, f"{caption}The largest measured error is {figure(named[0][2])}."),
            caption,
            named,
        )
    if any(rewrites(s) for s in sites):
        bars = _kept(document)
        caption = "Each bar is a weight, in model order, with its number in the table below" if per_bar(len(bars)) == 1 else (
            f"Each bar is {per_bar(len(bars))} weights in a row, in model order, with the number of the first one in the table below"
        )  # fmt: skip
        caption += "; coloured ones were rewritten, grey ones left as they were. Weights that are factorized together share one figure."
        title = "Parameters kept of each weight, in model order"
        lowest = min(b.kept for b in bars)
        yield Picture(
            kept_picture(bars, title, f"{caption} The smallest share kept is {percent(lowest)}."), caption
        )


def _kept(document: Mapping[str, Any]) -> list[Bar]:
    """A share for each site: of the whole group where several are factorized together."""
    sites = document["sites"]
    group = {name: i for i, d in enumerate(document["plan"].get("decisions", ())) for name in d["sites"]}
    sums: dict[int | str, tuple[int, int]] = {}
    for s in sites:
        key = group.get(s["name"], s["name"])
        before, after = sums.get(key, (0, 0))
        sums[key] = before + s["parameters_before"], after + s["parameters_after"]
    bars = []
    for i, s in enumerate(sites, 1):
        before, after = sums[group.get(s["name"], s["name"])]
        kept = after / before if before else 1.0
        bars.append(Bar(i, s["name"], s["parameters_before"], s["parameters_after"], kept, rewrites(s)))
    return bars
