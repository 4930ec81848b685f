"""What a reader must not overlook: each caveat is a heading and what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrcompile.report.text import change, count, figure, percent, short

# Two products instead of one: below this saving of FLOPs the second call usually costs more than is saved.
_WORTH = 0.7
# How far rounding of the stored factors may lift an error above a claimed bound, by their type; 8 bits and fewer: the last.
_ROUNDING = {"float": 1e-5, "double": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
_COARSE = 0.1
_LARGE = 0.1


@dataclass(frozen=True, slots=True)
class Caveat:
    """grave: the reader should stop here; else he should know."""

    head: str
    text: str
    grave: bool = False


def rewrites(site: Mapping[str, Any]) -> bool:
    return bool(site["method"] != "dense" or site["storage"])


def broken(site: Mapping[str, Any]) -> bool:
    """Whether the measured error is above the claimed one by more than rounding."""
    claimed, measured = site["claimed_error"], site["measured_error"]
    if claimed is None or measured is None:
        return False
    return bool(measured > claimed * 1.001 + _ROUNDING.get(site["storage"] or "float", _COARSE))


def caveats_of(document: Mapping[str, Any]) -> tuple[Caveat, ...]:
    return (*_evidence(document), *_methods(document), *_speed(document))


def _evidence(document: Mapping[str, Any]) -> Iterator[Caveat]:
    evidence = document["evidence"]
    unchanged = evidence["verdict"] == "unchanged"
    for failure in evidence.get("failures", ()):
        yield Caveat("A check did not hold", short(failure), grave=True)
    if evidence["engine"] != "ran":
        yield Caveat(
            f"The engine was {short(evidence['engine'])}",
            "The figures below are those of its lowered graph in ONNX Runtime on the CPU; run lrcompile verify where the engine runs.",
            grave=True,
        )
    if "drawn with seed" in evidence["held_out"] and not unchanged:
        yield Caveat(
            "The outputs were judged on random inputs",
            f"No data was held out ({short(evidence['held_out'])}). Random inputs say little about real ones: give --verify-data.",
        )
    limit = document.get("config", {}).get("max_error")
    moved = [
        (n, o["relative_l2"])
        for n, o in evidence["outputs"].items()
        if o["relative_l2"] is None or o["relative_l2"] > _LARGE
    ]
    if moved and not limit and not unchanged:
        yield Caveat(
            "The outputs moved far",
            f"{'; '.join(f'{short(n, 80)} by {percent(v)}' for n, v in moved[:4])}{' and others' if len(moved) > 4 else ''}. Whether the "
            "model still does its work, only your own measure of quality can say: give it as --metric, and a limit as --max-error.",
        )


def _methods(document: Mapping[str, Any]) -> Iterator[Caveat]:
    sites = document["sites"]
    plain = sum(s["method"] == "svd-plain" for s in sites)
    if plain:
        yield Caveat(
            "svd-plain was used: the data was ignored",
            f"{count(plain)} weight{' was' if plain == 1 else 's were'} cut without regard to what the inputs look like. On real models "
            "that loses far more than svd, which weighs by calibration data (--data), at the same size.",
        )
    above = [(i, s) for i, s in enumerate(sites, 1) if broken(s)]
    if above:
        i, s = max(above, key=lambda pair: pair[1]["measured_error"])
        yield Caveat(
            "Errors larger than claimed",
            f"{len(above)} weight{'' if len(above) == 1 else 's'}; the largest is #{i}, claimed {figure(s['claimed_error'])}, measured "
            f"{figure(s['measured_error'])}. A claim is a promise only where it is a bound; the measured figure is the one that counts.",
        )


def _speed(document: Mapping[str, Any]) -> Iterator[Caveat]:
    totals = document["totals"]
    before, after = totals["flops_before"], totals["flops_after"]
    smaller = totals["bytes_after"] < totals["bytes_before"]
    if totals["bytes_after"] > totals["bytes_before"]:
        yield Caveat(
            "Larger than the original",
            f"The constants take {change(totals['bytes_before'], totals['bytes_after'])} bytes: the ranks are above break-even.",
        )
    if after > before:
        head = "Smaller, but more work" if smaller else "More work than before"
        yield Caveat(
            head,
            f"FLOPs went from {count(before)} to {count(after)} ({change(before, after)}). Expect it to be slower.",
        )
    elif before and after > _WORTH * before and any(rewrites(s) for s in document["sites"]):
        yield Caveat(
            f"{'Smaller' if smaller else 'Rewritten'}, perhaps not faster",
            f"FLOPs: {change(before, after)}. {_why_not_faster(document['sites'])} Times are not in this folder: lrcompile bench measures them.",
        )


def _why_not_faster(sites: Sequence[Mapping[str, Any]]) -> str:
    changed = [s for s in sites if rewrites(s)]
    said = []
    if any(s["method"] != "dense" for s in changed):
        said.append(
            "Each factored weight is two smaller products instead of one, and below a saving of about 30 % the second call often costs more than is "
            "saved."
        )
    coded = [s for s in changed if s["storage"] and s["method"] == "dense"]
    if any(not s.get("activations") for s in coded):
        said.append(
            "Weights in fewer bits save memory; a CPU multiplies by them faster at few rows only, or where inputs have 8 bits too (--activations)."
        )
    elif coded:
        said.append("Products of rounded inputs are faster where the processor has instructions for them.")
    return " ".join(said)
