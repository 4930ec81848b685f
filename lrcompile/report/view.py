"""What the manifest says, in the order and the words in which a reader asks. Pure; the template only sets it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lrcompile.report.pictures import Bar, Point, errors_picture, kept_picture, per_bar, worst
from lrcompile.report.text import change, figure, in_bytes, percent, short
from lrcompile.report.warnings import Warning_, broken, rewrites, warnings_of

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
class Share:
    """Parameters of some weights, before and after."""

    name: str
    before: int
    after: int

    @property
    def kept(self) -> str:
        return f"{self.after / self.before:.3f}" if self.before else "–"

    @property
    def change(self) -> str:
        return change(self.before, self.after)


@dataclass(frozen=True, slots=True)
class Family:
    """Sites with one fate and one reason."""

    method: str
    storage: str | None
    reason: str
    sites: int
    before: int
    after: int
    error: float | None  # the largest measured


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
    warnings: tuple[Warning_, ...]
    notes: tuple[str, ...]
    totals: tuple[tuple[str, str, str, str, str], ...]
    shares: tuple[Share, ...]
    rewritten: tuple[Family, ...]
    left: tuple[Family, ...]
    more: tuple[int, int]
    pictures: tuple[Picture, ...]
    config: tuple[tuple[str, Any], ...]
    logits: bool


def view(document: Mapping[str, Any], notes: Sequence[str]) -> View:
    sites: Sequence[Site] = document["sites"]
    evidence = document["evidence"]
    changed = [s for s in sites if rewrites(s)]
    families = _families(sites)
    rewritten = [f for f in families if f.method != "dense" or f.storage]
    left = [f for f in families if f not in rewritten]
    plan = document["plan"]
    return View(
        verdict=_verdict(document, len(changed)),
        asked=_asked(document),
        moved=_moved(evidence["outputs"]),
        judged=_judged(document),
        warnings=warnings_of(document),
        notes=tuple(dict.fromkeys((*notes, *plan.get("notes", ())))),
        totals=tuple(_totals(document["totals"])),
        shares=tuple(_shares(document, changed)),
        rewritten=tuple(rewritten[:_MOST_FAMILIES]),
        left=tuple(left[:_MOST_FAMILIES]),
        more=(max(0, len(rewritten) - _MOST_FAMILIES), max(0, len(left) - _MOST_FAMILIES)),
        pictures=tuple(_pictures(document)),
        config=tuple((k, v) for k, v in document.get("config", {}).items() if v not in (None, {}, [])),
        logits=any(o.get("kl") is not None or o.get("top1") is not None for o in evidence["outputs"].values()),
    )


# --- the verdict --------------------------------------------------------------------------------------------------


def _verdict(document: Mapping[str, Any], changed: int) -> Verdict:
    evidence, totals, sites = document["evidence"], document["totals"], document["sites"]
    size = f"{changed} of {_weights(len(sites))} rewritten; constants {in_bytes(totals['bytes_before'])} → {in_bytes(totals['bytes_after'])}"
    if evidence["verdict"] == "unchanged":
        why = _why_unchanged(document)
        return Verdict("same", "Unchanged", f"none of {_weights(len(sites))} was rewritten, and model.onnx is the original itself: {why}")
    moved = f"{size}; {_moved(evidence['outputs'])}"
    if evidence["verdict"] == "failed":
        return Verdict("bad", "Failed", f"{moved}. {'; '.join(evidence.get('failures', ()))}")
    limit = document.get("config", {}).get("max_error")
    if limit:
        return Verdict("good", "Passed", f"{moved}; judged by --max-error {limit}, which holds.")
    return Verdict("open", "Passed", f"{moved}; {_no_limit(document)}.")


def _no_limit(document: Mapping[str, Any]) -> str:
    return "no limit was set" if "config" in document else "config.yaml says whether a limit (max_error) was set"


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
    which = f"output {short(name, 80)} moved" if len(outputs) == 1 else f"outputs moved by at most {percent(o['relative_l2'])}"
    if len(outputs) == 1:
        return f"{which} by {percent(o['relative_l2'])} (relative L2)"
    return f"{which} (relative L2, {short(name, 80)})"


# --- the two questions --------------------------------------------------------------------------------------------


def _asked(document: Mapping[str, Any]) -> str:
    """The answer to the first question."""
    if document["evidence"]["verdict"] == "unchanged":
        return "Nothing was rewritten, so there is nothing to ask: the file is the original."
    return (
        "Yes, for every output, on seeded random feeds. Had one differed by more than ten times the noise floor (or 1e-5 of its "
        "largest value, where that is more), nothing would have been published."
    )


def _judged(document: Mapping[str, Any]) -> str:
    """The answer to the second question: what the figures were held against."""
    evidence = document["evidence"]
    limit = document.get("config", {}).get("max_error")
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


# --- sizes --------------------------------------------------------------------------------------------------------


def _totals(totals: Mapping[str, int]) -> Iterator[tuple[str, str, str, str, str]]:
    """name, before, after, change, what it counts."""
    words = {
        "parameters": "elements of all constants of a float type or of at most 8 bits, biases, norms, scales and tables included",
        "bytes": "all constants of the model as they are stored; the files hold a little more, the graph itself",
        "flops": "2 for each multiply-accumulate of the weights listed below, on the first feed of inputs.json; nothing else of the graph",
    }
    for name, what in words.items():
        before, after = totals[f"{name}_before"], totals[f"{name}_after"]
        exact = [f"{v:,}" for v in (before, after)]
        yield "FLOPs" if name == "flops" else name.capitalize(), exact[0], exact[1], change(before, after), what


def _shares(document: Mapping[str, Any], changed: Sequence[Site]) -> Iterator[Share]:
    """What “kept” is of: the manifest says which weights were eligible only where its totals have them."""
    totals = document["totals"]
    sums = [("the rewritten weights", changed)]
    if "eligible_before" not in totals:
        sums.append(("all MatMul and Gemm weights", [s for s in document["sites"] if s["op"] in ("MatMul", "Gemm")]))
    for name, some in sums:
        yield Share(name, sum(s["parameters_before"] for s in some), sum(s["parameters_after"] for s in some))
    if "eligible_before" in totals:
        yield Share("the eligible weights, which --keep counts", totals["eligible_before"], totals["eligible_after"])
    yield Share("all parameters of the model", totals["parameters_before"], totals["parameters_after"])


def _families(sites: Sequence[Site]) -> list[Family]:
    """Sites by fate and reason; those with most parameters first."""
    found: dict[tuple[str, str | None, str], list[Site]] = {}
    for s in sites:
        found.setdefault((s["method"], s["storage"], s["reason"]), []).append(s)
    made = [
        Family(
            *key, len(some), sum(s["parameters_before"] for s in some), sum(s["parameters_after"] for s in some),
            max((s["measured_error"] for s in some if s["measured_error"] is not None), default=None),
        )
        for key, some in found.items()
    ]  # fmt: skip
    return sorted(made, key=lambda f: -f.before)


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
        caption += f"{above} of {len(points)} lie above it by more than rounding. " if above else "None lies above it by more than rounding. "
        caption += "Hollow points are claims that were estimates. " if not all(p.bound for p in points) else ""
        named = tuple((p.number, sites[p.number - 1]["name"], p.measured) for p in worst(points))
        title = "Claimed against measured error of each rewritten weight"
        yield Picture(errors_picture(points, title, f"{caption}The largest measured error is {figure(named[0][2])}."), caption, named)
    if sites:
        bars = _kept(document)
        caption = "Each bar is a weight, in model order, with its number in the table below" if per_bar(len(bars)) == 1 else (
            f"Each bar is {per_bar(len(bars))} weights in a row, in model order, with the number of the first one in the table below"
        )  # fmt: skip
        caption += "; coloured ones were rewritten, grey ones left as they were. Weights that are factorized together share one figure."
        title = "Parameters kept of each weight, in model order"
        lowest = min(b.kept for b in bars)
        yield Picture(kept_picture(bars, title, f"{caption} The smallest share kept is {percent(lowest)}."), caption)


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
