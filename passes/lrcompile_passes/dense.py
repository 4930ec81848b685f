"""Dense: the weight as it is. A factorization like the others, so that a plan can name it and price it.

    y = x W,   parameters K N,   2 K N FLOPs a row,   error 0

Of a Conv the columns of W are turned back into its kernel.

Refuses nothing. It is the answer wherever no other form pays, and the one every budget may fall back to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from lrcompile.interfaces import (
    Array,
    Call,
    CandidateOptions,
    Constant,
    Factorization,
    Factors,
    Op,
    StatisticsSource,
    Weights,
)
from lrcompile.records import Candidate, Cost, Group, Kind, Refusal
from lrcompile.weighing import bias_edits


class Dense:
    """Keeps the matrix."""

    name = "dense"
    kinds: tuple[Kind, ...] = ("linear", "lookup", "conv")
    exact_at_full_rank = True
    needs_data = False
    only_by_name = False

    def serves(self, group: Group) -> Refusal | None:
        return None if group.shares_weight else Refusal("a dense weight is a matter of one weight")

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        site = group.sites[0]
        flops = 2 * site.K * site.N * sum(s.kind == "linear" for s in group.sites)
        cost = Cost(group.elements, group.elements * weights.itemsize(site), flops)
        yield Candidate("dense", min(site.K, site.N), cost, 0.0)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        return {"w": group.sites[0].layout.shape}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        return {"w": weights.matrix(group.sites[0])}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        w = factors["w"].astype(np.float64)
        changed = {
            (s.name, "weight"): w.T if t else w for s, t in zip(group.sites, group.transposed, strict=True)
        }
        return {**changed, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        w = call.factors["w"]
        if call.transposed:
            w = op("Transpose", w, name="w_t", perm=(1, 0))
        if call.kind == "lookup":
            return op("Gather", w, call.x, name="rows", axis=0)
        if call.window is not None:
            columns = op("Transpose", w, name="columns", perm=(1, 0))
            shape = np.array([call.shapes["w"][1], -1, *call.window.kernel], np.int64)
            kernel = op("Reshape", columns, op.constant(shape, "kernel_shape"), name="kernel")
            bias = [call.bias] if call.bias is not None else []
            return op(
                "Conv", call.x, kernel, *bias, name="product", **call.window.attributes(call.window.group)
            )
        return op("MatMul", call.x, w, name="product")

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        # of a weight in fewer bits the core corrects the bias
        return bias_edits(group, factors)


factorizations: tuple[Factorization, ...] = (Dense(),)
