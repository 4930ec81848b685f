"""What a generated model is, and what its construction promises about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx


@dataclass(frozen=True, slots=True)
class Expected:
    """One use of a constant weight, known because we put it there.

    op, weight, shape: the operator that reads it, and the *stored* constant (below any Transpose, Cast, ...).
    taken: a compiler that rewrites everything it can (``--rank full``) rewrites this use. reason: else one word of REASONS.
    certain: False where the rules leave room (a weight nobody reads may be refused, folded or not listed at all; a left operand, where the other one has no known rank):
    then `taken` is only the likelier answer, and a test must not insist.
    where: "main", or the bodies that lead to it ("Loop/If.then"), or "function NAME": there `weight` is a local name, and
    a function that is called twice has two entries.
    """

    op: str
    weight: str
    shape: tuple[int, ...]
    taken: bool = True
    reason: str = ""
    certain: bool = True
    where: str = "main"

    def __post_init__(self) -> None:
        assert self.taken != bool(self.reason), self
        assert self.reason in REASONS, self.reason


REASONS = {
    "": "taken",
    "overridable": "a graph input with a default: the caller may replace it",
    "output": "the weight is also a graph output",
    "finite": "NaN or Inf inside",
    "batched": "one matrix for each batch entry",
    "rank": "not a matrix (a vector, or a table of rank 3)",
    "equation": "an Einsum that is no matrix product",
    "transposed": "a ConvTranspose: found and listed",
    "recurrent": "found and listed",
    "integer": "integer arithmetic",
    "constant": "both operands constant: folded",
    "unused": "nobody reads the result",
}


@dataclass(frozen=True, slots=True, eq=False)
class OddGraph:
    """A legal model, two feeds, and its weights.

    label: the features in it, separated by spaces, in the order in which they were added.
    runs_on_ort: False where ONNX Runtime's CPU has no kernel: then onnx.reference runs it.
    passes_checker: False where only the checker objects (an input of unknown rank): runtimes take it.
    """

    model: onnx.ModelProto
    feeds: list[dict[str, np.ndarray[Any, Any]]]
    sites: tuple[Expected, ...]
    label: str
    runs_on_ort: bool = True
    passes_checker: bool = True

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self.label.split())

    def __repr__(self) -> str:  # hypothesis prints it; a proto would fill the screen
        opset = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        return (
            f"OddGraph({self.label!r}, opset={opset}, ir={self.model.ir_version}, sites={list(self.sites)})"
        )
