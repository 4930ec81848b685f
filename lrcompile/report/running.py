"""What runs of the published model: operators after the runtime's own optimisations, where each runs, and in which precision. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrcompile.fused import Ran, kinds
from lrcompile.report.text import count, short

_MOST = 30
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Running:
    """sentences: what a reader should know first. operators: name, domain, place and how often; more: so many kinds are left out."""

    sentences: tuple[str, ...]
    operators: tuple[tuple[str, str, str, int], ...]
    more: int


def running_of(document: Mapping[str, Any]) -> Running | None:
    """None where the manifest holds no operators, as those of earlier versions."""
    evidence = document["evidence"]
    nodes: Mapping[str, int] = evidence.get("nodes") or {}
    if not nodes:
        return None
    ran = sorted(((Ran.of(key), n) for key, n in nodes.items()), key=lambda pair: (-pair[1], str(pair[0])))
    return Running(
        tuple(_sentences(document, nodes)),
        tuple((r.op, r.domain, r.provider, n) for r, n in ran[:_MOST]),
        max(0, len(ran) - _MOST),
    )


def _sentences(document: Mapping[str, Any], nodes: Mapping[str, int]) -> list[str]:
    engine = document["evidence"]["engine"]
    places: dict[str, int] = {}
    for key, n in nodes.items():
        place = Ran.of(key).provider
        places[place] = places.get(place, 0) + n
    where = ", ".join(f"{count(n)} on {short(place, 80)}" for place, n in sorted(places.items()))
    said = [
        f"{count(sum(nodes.values()))} operators are left after the runtime's own optimisations: {where}."
    ]
    if engine != "ran":
        said = [
            f"The engine was {short(engine)}. What was judged is its graph in ONNX Runtime on the CPU. {said[0]}"
        ]
    if (precision := document.get("config", {}).get("precision")) in _PRECISIONS:
        said.append(
            f"The graph was brought to {_PRECISIONS[precision]} (--precision {precision}), its inputs and outputs as they were."
        )
    fused = kinds(nodes)
    words = ", ".join(f"{kind} {count(n)}" for kind, n in fused.items())
    said.append(f"Fused operators among them: {words}." if fused else "None of them is a fused operator.")
    return said
