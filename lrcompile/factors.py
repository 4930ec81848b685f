"""Factors between the stages: what factorize makes, rewrite puts into the graph, and publish reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from lrcompile.activations import SMOOTH, STEP
from lrcompile.interfaces import Array, Factorization, Factors
from lrcompile.quantize import Coded
from lrcompile.records import Candidate, Cost, Decision, Group, Site


@dataclass(frozen=True, slots=True, eq=False)
class FactorSet:
    """The factors of one decision. load: reads them, as stored. storage: their type, but for `indices` and `coded`. shapes: of each array.

    indices: names of those that hold integers (int32). coded: names of those that are stored in the decision's storage type, which
    `codes` reads; `load` gives what they mean. measured: the group's relative error with these very arrays, by the calibration's statistics.
    """

    decision: Decision
    group: Group
    method: Factorization
    storage: ir.DataType
    shapes: Mapping[str, tuple[int, ...]]
    measured: float
    load: Callable[[], Factors] = field(repr=False)
    indices: frozenset[str] = frozenset()
    coded: frozenset[str] = frozenset()
    codes: Callable[[], Mapping[str, Coded]] = field(repr=False, default=dict)

    @property
    def unrounded(self) -> FactorSet:
        """The same of the same weight, whose input stays as it is: codes back in its own basis are numbers."""
        if self.decision.activations is None:
            return self
        decision = replace(self.decision, activations=None, storage=None)
        shapes = {n: s for n, s in self.shapes.items() if n not in (SMOOTH, STEP)}

        def load() -> Factors:
            return {
                n: a if n.startswith("bias") else a.astype(self.storage.numpy())
                for n, a in self.load().items()
            }

        return replace(self, decision=decision, shapes=shapes, load=load, coded=frozenset(), codes=dict)

    def type_of(self, name: str) -> ir.DataType:
        return ir.DataType.INT32 if name in self.indices else self.storage


def candidate_of(decision: Decision) -> Candidate:
    """The form that was decided on, as its factorization knows it."""
    return Candidate(
        method=decision.method, rank=decision.rank,
        cost=Cost(decision.parameters_after, decision.bytes_after, decision.flops_after),
        error=decision.claimed_error or 0.0, bound=decision.bound, structure=decision.structure, storage=decision.storage,
        activations=decision.activations,
    )  # fmt: skip


def bias_in_place(site: Site, corrected: Array) -> Array:
    """A corrected b of y = scale (x W + b), back in the constant that the graph adds."""
    assert site.bias is not None and site.wiring is not None
    return (corrected * (site.wiring.scale / site.bias.scale)).reshape((*site.bias.shape[:-1], -1))
