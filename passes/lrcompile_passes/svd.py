"""Truncated singular value decomposition of a weight, weighted by what its input really is.

    y = x W + b ~ (x A) B + b',   A (K, r),  B (r, N),   r (K + N) parameters,  2 r (K + N) FLOPs a row

`svd` minimises E |x W - x What|^2 over rank r by the core's spectra (`interfaces.Weights.low_rank`, with algebra and sources): the
mean input goes into the bias where there is one, tables weigh their rows by how often each is asked for, tied heads count too.
Weights that read one value (q, k, v; gate, up) may share A: W = [W1 W2 ..], one rank r for all, r (K + N1 + N2 + ..) parameters.

`svd-plain` is the same with C = I and b' = b. It ignores the data, is far worse on real models, and is used only by name.
At full rank both are an orthogonal factorization W = Q R, exact to rounding: no data is needed, whitening changes nothing.

Sources: Eckart and Young 1936; Wang et al., SVD-LLM, 2024; Wang et al., Basis Sharing, 2024.
Refuses groups whose sites read different values (an FFN's two layers, value and output).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import scipy.linalg

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
from lrcompile.records import Candidate, Cost, Group, Refusal
from lrcompile.weighing import bias_edits

# A claim covers the rounding of float64 in the eigenproblem, whose error is relative to the largest eigenvalue.
_CLAIM_SLACK = 1e-7
_FULL = (("form", "full"),)
# Rows a dimension from which a second moment is called well known (algorithms: 4 is the least, the field uses hundreds).
_ENOUGH = 4


@dataclass(frozen=True)
class Svd:
    """`svd` (whitened) and `svd-plain`."""

    name: str
    needs_data: bool
    only_by_name: bool
    exact_at_full_rank: bool = True

    def serves(self, group: Group) -> Refusal | None:
        if group.shares_weight or group.kind in ("qkv", "gate_up"):
            return None
        return Refusal(f"{self.name} factorizes weights that read one value, not a {group.kind} group")

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        site = group.sites[0]
        N = site.N if group.shares_weight else sum(s.N for s in group.sites)
        full = min(site.K, N)
        itemsize = weights.itemsize(site)

        def cost(rank: int) -> Cost:
            # a product meets both factors; a lookup takes a row of the first one (the second, when it reads the transpose)
            flops = 2 * rank * (site.K + N)
            if group.shares_weight:
                flops = sum(
                    2 * rank * (site.K + N if s.kind == "linear" else site.K if t else N)
                    for s, t in zip(group.sites, group.transposed, strict=True)
                )
            return Cost(rank * (site.K + N), rank * (site.K + N) * itemsize, flops)

        if options.full:
            if group.shares_weight:
                yield Candidate(self.name, full, cost(full), 0.0, bound=False, structure=_FULL)
            return
        errors = weights.low_rank_errors(group, self._seen(statistics))
        movements = weights.low_rank_movements(group, self._seen(statistics))
        # the plain form bounds the error of the weight, not that of what the data makes of it
        bound = group.kind not in ("shared", "tied") and (self.needs_data or statistics is None)
        note = self._note(group, statistics)
        ranks = (
            options.ranks
            if options.ranks is not None
            else range(options.multiple, full + 1, options.multiple)
        )
        for rank in ranks:
            if 1 <= rank <= full:
                error = float(errors[rank]) + _CLAIM_SLACK
                movement = float(movements[rank]) if movements is not None else None
                yield Candidate(self.name, rank, cost(rank), error, bound, note=note, movement=movement)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        assert candidate.rank is not None
        K, rank = group.sites[0].K, candidate.rank
        if group.shares_weight:
            return {"a": (K, rank), "b": (rank, group.sites[0].N)}
        return {"a": (K, rank), **{f"b.{i}": (rank, s.N) for i, s in enumerate(group.sites)}}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        assert candidate.rank is not None
        if candidate.structure == _FULL:
            return _full_rank(weights.matrix(group.sites[0]))
        found = weights.low_rank(group, self._seen(statistics), candidate.rank)
        if group.shares_weight:
            return found
        kept = {n: f for n, f in found.items() if n != "b"}
        ends = np.cumsum([s.N for s in group.sites])[:-1]
        return {**kept, **{f"b.{i}": b for i, b in enumerate(np.split(found["b"], ends, axis=1))}}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        changed: dict[Constant, Array] = {}
        a = factors["a"].astype(np.float64)
        for i, (site, transposed) in enumerate(zip(group.sites, group.transposed, strict=True)):
            w = a @ factors["b" if group.shares_weight else f"b.{i}"].astype(np.float64)
            changed[site.name, "weight"] = w.T if transposed else w
        return {**changed, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        a, b = call.factors["a"], call.factors["b" if "b" in call.factors else f"b.{call.index}"]
        if call.transposed:
            a, b = op("Transpose", b, name="b_t", perm=(1, 0)), op("Transpose", a, name="a_t", perm=(1, 0))
        if call.kind == "lookup":
            low = op("Gather", a, call.x, name="a", axis=0)
        else:
            low = op("MatMul", call.x, a, name="a")
        return op("MatMul", low, b, name="b")

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return bias_edits(group, factors)

    def _seen(self, statistics: StatisticsSource | None) -> StatisticsSource | None:
        return statistics if self.name == "svd" else None

    def _note(self, group: Group, statistics: StatisticsSource | None) -> str:
        """What a reader of the plan should know about the data behind a rank."""
        if self.name == "svd-plain":
            return "the data was not looked at"
        known = statistics.of(group.sites[0]) if statistics is not None else None
        if known is None or known.count >= _ENOUGH * group.sites[0].K:
            return ""
        return (
            f"few samples: {known.count} rows for {group.sites[0].K} inputs, shrunk by {known.shrinkage:.2g}"
        )


def _full_rank(W: Array) -> Factors:
    """W = A B exactly, the inner dimension min(K, N): an orthogonal and a triangular factor."""
    if W.shape[0] >= W.shape[1]:
        q, r = scipy.linalg.qr(W, mode="economic", check_finite=False)
        return {"a": q, "b": r}
    q, r = scipy.linalg.qr(W.T, mode="economic", check_finite=False)
    return {"a": r.T, "b": q.T}


factorizations: tuple[Factorization, ...] = (
    Svd("svd", needs_data=True, only_by_name=False),
    Svd("svd-plain", needs_data=False, only_by_name=True),
)
