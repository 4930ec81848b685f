"""Tables whose rows are tensor trains of their own: each row folded into a small matrix of low rank.

    D = d_1 d_2, as near a square as its divisors allow,    row of id ~ G1[id] G2[id],   G1 (V, d_1, r),  G2 (V, r, d_2)

G1[id] holds the r leading left singular vectors of the folded row, G2[id] = G1[id]^T row: the best of their kind, whatever the data;
how often each row is asked for only weighs the error. r (d_1 + d_2) parameters a row, break-even at r = D / (d_1 + d_2); 2 r D FLOPs an id.
Nothing is shared between rows, so this compresses less than anything else that knows the whole table (docs/embeddings.md).

Source: Xu et al., TensorGPT, 2023 (a train for each row). Refuses what is no table, heads tied to one (each logit would need its row made
anew), and tables read by columns; a prime D folds into 1 x D and saves nothing.
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
from lrcompile.records import Candidate, Cost, Group, Refusal
from lrcompile.weighing import frequencies, known_by

_CHUNK = 4096  # rows that are folded at a time
_OPSET = 14  # before it, Reshape cannot give a dimension of nothing: ids may be none
# A claim covers the rounding of float64 in the eigenproblems, whose error is relative to the largest eigenvalue.
_CLAIM_SLACK = 1e-7


class VectorTrain:
    """Factors: left (V, d_1, r) and right (V, r, d_2)."""

    name = "tt-vector"
    needs_data = False
    only_by_name = False
    exact_at_full_rank = False
    least_opset = _OPSET

    def serves(self, group: Group) -> Refusal | None:
        if not group.shares_weight or any(s.kind != "lookup" for s in group.sites):
            return Refusal(
                "tt-vector is for lookups only: a product with the table would make every row anew"
            )
        if any(group.transposed):
            return Refusal("tt-vector keeps a table by rows, and one of its readers wants the columns")
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if options.full or weights.opset < self.least_opset:
            return
        site = group.sites[0]
        fold = _fold(site.N)
        errors = _errors(group, weights, statistics)
        full = min(*fold, site.K)
        structure = (("fold", f"{fold[0]}x{fold[1]}"),)
        bound = group.kind == "alone"  # of several readers the error is their mean
        for rank in options.ranks if options.ranks is not None else range(1, full + 1):
            if 1 <= rank <= full:
                size = site.K * rank * sum(fold)
                cost = Cost(size, size * weights.itemsize(site), 2 * rank * site.N * len(group.sites))
                error = float(errors[rank]) + _CLAIM_SLACK
                yield Candidate(self.name, rank, cost, error, bound, structure)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        assert candidate.rank is not None
        V, (first, second) = group.sites[0].K, _fold(group.sites[0].N)
        return {"left": (V, first, candidate.rank), "right": (V, candidate.rank, second)}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        left, right = [], []
        for rows in _folded(weights.matrix(group.sites[0])):
            _, vectors = np.linalg.eigh(rows @ rows.swapaxes(1, 2))
            U = _fix_signs(vectors[:, :, ::-1][:, :, : candidate.rank])
            left.append(U)
            right.append(U.swapaxes(1, 2) @ rows)
        return {"left": np.concatenate(left), "right": np.concatenate(right)}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        rows = factors["left"].astype(np.float64) @ factors["right"].astype(np.float64)
        return {(s.name, "weight"): rows.reshape(len(rows), -1) for s in group.sites}

    def emit(self, op: Op, call: Call) -> ir.Value:
        left, right = (op("Gather", call.factors[n], call.x, name=n, axis=0) for n in ("left", "right"))
        folded = op("MatMul", left, right, name="folded")
        columns = call.shapes["left"][1] * call.shapes["right"][2]
        width = op.constant(np.array([columns], np.int64), "width")
        shape = op("Concat", op("Shape", call.x, name="ids"), width, name="shape", axis=0)
        return op("Reshape", folded, shape, name="rows", allowzero=1)

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return {}


def _fold(D: int) -> tuple[int, int]:
    """D as a product of two factors as equal as its divisors allow."""
    first = max(d for d in range(1, D + 1) if d * d <= D and D % d == 0)
    return first, D // first


def _folded(W: Array) -> Iterator[Array]:
    """Rows as matrices (rows, d_1, d_2), some thousand at a time."""
    for start in range(0, len(W), _CHUNK):
        yield W[start : start + _CHUNK].reshape(-1, *_fold(W.shape[1]))


def _errors(group: Group, weights: Weights, statistics: StatisticsSource | None) -> Array:
    """(d_1 + 1,): relative error with so many singular pairs of each row."""
    key = ("tt-vector-1", *known_by(group, weights, statistics))

    def compute() -> Factors:
        W = weights.matrix(group.sites[0])
        energies = [np.linalg.eigvalsh(rows @ rows.swapaxes(1, 2))[:, ::-1] for rows in _folded(W)]
        energy = np.maximum(frequencies(group, statistics) @ np.concatenate(energies), 0.0)
        lost = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
        return {"errors": np.sqrt(lost / max(lost[0], np.finfo(np.float64).tiny))}

    errors: Array = weights.remember(key, compute)["errors"]
    return errors


def _fix_signs(vectors: Array) -> Array:
    """Of stacks of columns: their largest entry positive."""
    at = np.abs(vectors).argmax(axis=1, keepdims=True)
    fixed: Array = vectors * np.where(np.take_along_axis(vectors, at, 1) < 0, -1.0, 1.0)
    return fixed


factorizations: tuple[Factorization, ...] = (VectorTrain(),)
