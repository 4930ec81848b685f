"""What the model and its weights took before and take now. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrcompile.report.text import change

Site = Mapping[str, Any]


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


def totals_of(totals: Mapping[str, int]) -> Iterator[tuple[str, str, str, str, str]]:
    """name, before, after, change, what it counts."""
    words = {
        "parameters": "elements of all constants of a float type or of at most 8 bits, biases, norms, scales and tables included; codes that share a byte count once",
        "bytes": "all constants of the model as they are stored; the files hold a little more, the graph itself",
        "flops": "2 for each multiply-accumulate of the weights listed below, on the first feed of inputs.json; nothing else of the graph",
    }
    for name, what in words.items():
        before, after = totals[f"{name}_before"], totals[f"{name}_after"]
        exact = [f"{v:,}" for v in (before, after)]
        yield (
            "FLOPs" if name == "flops" else name.capitalize(),
            exact[0],
            exact[1],
            change(before, after),
            what,
        )


def shares_of(document: Mapping[str, Any], changed: Sequence[Site]) -> Iterator[Share]:
    """What “kept” is of: the manifest says which weights were eligible only where its totals have them."""
    totals = document["totals"]
    sums = [("the rewritten weights", changed)] if changed else []
    if "eligible_before" not in totals:
        sums.append(
            ("all MatMul and Gemm weights", [s for s in document["sites"] if s["op"] in ("MatMul", "Gemm")])
        )
    for name, some in sums:
        yield Share(name, sum(s["parameters_before"] for s in some), sum(s["parameters_after"] for s in some))
    if "eligible_before" in totals:
        yield Share(
            "the eligible weights, which --keep counts", totals["eligible_before"], totals["eligible_after"]
        )
    yield Share("all parameters of the model", totals["parameters_before"], totals["parameters_after"])


def stored(site: Site) -> str | None:
    """The type of a weight, and of its input where that is rounded too."""
    rounded = site.get("activations")
    return f"{site['storage']}, input {rounded}" if rounded else site["storage"]


def families_of(sites: Sequence[Site]) -> list[Family]:
    """Sites by fate and reason; those with most parameters first."""
    found: dict[tuple[str, str | None, str], list[Site]] = {}
    for s in sites:
        found.setdefault((s["method"], stored(s), s["reason"]), []).append(s)
    made = [
        Family(
            *key, len(some), sum(s["parameters_before"] for s in some), sum(s["parameters_after"] for s in some),
            max((s["measured_error"] for s in some if s["measured_error"] is not None), default=None),
        )
        for key, some in found.items()
    ]  # fmt: skip
    return sorted(made, key=lambda f: -f.before)
