"""Pivoting factorization: a matrix of rank r kept as r of its own columns and what makes the others of them.

    What = A B,  B (r, N)      J: r pivot columns,  P = What[:, J] (K, r),  C = B[:, J]^-1 B[:, rest] (r, N - r)
    y_p = x P,   y_r = y_p C,   y = Gather([y_p y_r], order),   order = argsort([J rest])

r (K + N - r) parameters, r^2 fewer than the pair A, B, and as many multiplications: never more than the dense matrix, which full
rank is. `Weights.low_rank` gives A, B and the corrected biases (the whitened truncation, see `interfaces`); this is a lossless way
to write it down. For r = N (a tall matrix at full rank) P is the matrix itself, and nothing is gathered. The index costs 4 bytes a
column, unless what follows can be stored in the order of the pivots: then the core folds the Gather away. Weights that read one
value (q, k, v; gate, up) stand side by side, W = [W1 W2 ..], one rank for all; each site gathers its own columns.

Stability: how exact P C is depends on max |C| alone. B is first made orthonormal (B = T^T Q^T, A <- A T^T: also where What has
a lower rank than r there are then r independent columns to choose from), J comes from QR with column pivoting, and while any
|C_ij| > 2 column i of the pivots and column j of the rest change places. Each such swap multiplies |det B[:, J]| <= 1 by
|C_ij|, so it ends, after at most -log2 |det| of them, and with |C_ij| <= 2 it is a strong rank-revealing factorization: every
matrix has such a form, and no other encoding is needed as a fallback. Real weights need no swap (|C| <= 1.3).

Sources: Zhao et al., PIFA, 2025 (pivoting factorization); Gu and Eisenstat 1996 (strong RRQR); Goreinov et al. 2010 (maxvol swaps).
Refuses tied tables and heads and weights that somebody reads as the transpose: there the other side would be permuted too. Refuses
groups whose sites read different values, and side by side sites of different types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
# No coefficient is larger: what is rounded in P comes out multiplied by the coefficients.
_LARGEST = 2.0
_FULL = (("form", "full"),)
# Before it, Gather and Concat count axes from the front only, and how many there are is not known here.
_OPSET = 11
_INDEX_BYTES = 4
# Rows a dimension from which a second moment is called well known (algorithms: 4 is the least, the field uses hundreds).
_ENOUGH = 4


class Pivoted:
    """Pivot columns P and coefficients C."""

    name = "pivoted"
    needs_data = True
    only_by_name = False
    exact_at_full_rank = True
    least_opset = _OPSET

    def serves(self, group: Group) -> Refusal | None:
        if group.kind == "tied" or any(group.transposed):
            return Refusal("pivoted chooses columns, and a reader of the transpose would need them as rows")
        if not group.shares_weight and group.kind not in ("qkv", "gate_up"):
            return Refusal(f"pivoted factorizes weights that read one value, not a {group.kind} group")
        if len({(s.stored, s.dtype) for s in group.sites}) > 1:
            return Refusal("the sites store or compute in different types and cannot share pivot columns")
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if weights.opset < self.least_opset:
            return
        site = group.sites[0]
        N = _columns(group)
        full = min(site.K, N)
        itemsize = weights.itemsize(site)

        def cost(rank: int) -> Cost:
            parameters = rank * (site.K + N - rank)
            index = _INDEX_BYTES * N if rank < N or not group.shares_weight else 0
            flops = 2 * parameters
            if group.shares_weight:  # each reader computes for itself; a lookup takes a row of P
                flops = sum(flops if s.kind == "linear" else 2 * rank * (N - rank) for s in group.sites)
            return Cost(parameters, parameters * itemsize + index, flops)

        if options.full:
            if group.shares_weight:
                yield Candidate(self.name, full, cost(full), 0.0, bound=False, structure=_FULL)
            return
        errors = weights.low_rank_errors(group, statistics)
        movements = weights.low_rank_movements(group, statistics)
        bound = (
            group.kind != "shared"
        )  # there the error is the mean over the readers, which is not what is minimised
        note = _note(group, statistics)
        steps = range(options.multiple, full + 1, options.multiple)
        for rank in options.ranks if options.ranks is not None else steps:
            if 1 <= rank <= full:
                error = float(errors[rank]) + _CLAIM_SLACK
                yield Candidate(
                    self.name, rank, cost(rank), error, bound, note=note,
                    movement=float(movements[rank]) if movements is not None else None,
                    index_bytes=_INDEX_BYTES * N if group.shares_weight and rank < N else 0,
                )  # fmt: skip

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        assert candidate.rank is not None
        N, rank = _columns(group), candidate.rank
        found: dict[str, tuple[int, ...] | Array] = {"p": (group.sites[0].K, rank)}
        if rank < N:
            found["c"] = (rank, N - rank)
        place = np.arange(N, dtype=np.int32)[::-1]
        if not group.shares_weight:
            ends = np.cumsum([s.N for s in group.sites])[:-1]
            return {**found, **{f"order.{i}": o for i, o in enumerate(np.split(place, ends))}}
        return {**found, "order": place} if rank < N else found

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        assert candidate.rank is not None
        N = _columns(group)
        if candidate.structure == _FULL:
            W = weights.matrix(group.sites[0])
            return {"p": W} if candidate.rank == N else _factors(group, np.eye(len(W)), W)
        found = weights.low_rank(group, statistics, candidate.rank)
        biases = {n: f for n, f in found.items() if n.startswith("bias.")}
        return {**_factors(group, found["a"], found["b"]), **biases}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        w = factors["p"].astype(np.float64)
        if "c" in factors:
            w = np.concatenate([w, w @ factors["c"].astype(np.float64)], axis=1)
        changed: dict[Constant, Array] = {}
        for i, site in enumerate(group.sites):
            order = factors.get("order" if group.shares_weight else f"order.{i}")
            changed[site.name, "weight"] = w if order is None else w[:, order]
        return {**changed, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        if call.kind == "lookup":
            y = op("Gather", call.factors["p"], call.x, name="p", axis=0)
        else:
            y = op("MatMul", call.x, call.factors["p"], name="p")
        if "c" in call.shapes:
            rest = op("MatMul", y, call.factors["c"], name="c")
            y = op("Concat", y, rest, name="columns", axis=-1)
        for order in ("order", f"order.{call.index}"):
            if order in call.shapes:
                y = op("Gather", y, call.factors[order], name="order", axis=-1)
        return y

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return bias_edits(group, factors)


def _columns(group: Group) -> int:
    """N of the one weight, or of the weights side by side."""
    return group.sites[0].N if group.shares_weight else sum(s.N for s in group.sites)


def _note(group: Group, statistics: StatisticsSource | None) -> str:
    """What a reader of the plan should know about the data behind a rank."""
    site = group.sites[0]
    known = statistics.of(site) if statistics is not None else None
    if known is None or known.count >= _ENOUGH * site.K:
        return ""
    return f"few samples: {known.count} rows for {site.K} inputs, shrunk by {known.shrinkage:.2g}"


def _factors(group: Group, a: Array, b: Array) -> Factors:
    """p (K, r), c (r, N - r), and where each column stands: order (N,), or order.i (N_i,) of each of several sites."""
    rank, N = b.shape
    found: dict[str, Array] = {}
    if rank == N:
        found["p"], place = a @ b, np.arange(N)
    else:
        q, t = scipy.linalg.qr(b.T, mode="economic")
        pivots, rest, c = _pivot(q.T)
        found["p"], found["c"] = (a @ t.T) @ q.T[:, pivots], c
        place = np.argsort(np.concatenate([pivots, rest]))
    if group.shares_weight:
        return found if rank == N else {**found, "order": place.astype(np.int32)}
    ends = np.cumsum([s.N for s in group.sites])[:-1]
    return {**found, **{f"order.{i}": o.astype(np.int32) for i, o in enumerate(np.split(place, ends))}}


def _pivot(b: Array) -> tuple[Array, Array, Array]:
    """Pivots (r,) and rest (N - r,), both rising, of b (r, N) with orthonormal rows, and c = b[:, pivots]^-1 b[:, rest]."""
    rank = len(b)
    triangle, chosen = scipy.linalg.qr(b, mode="r", pivoting=True)
    c = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:])
    return _bounded(b, chosen[:rank], chosen[rank:], c)


def _bounded(b: Array, pivots: Array, rest: Array, c: Array) -> tuple[Array, Array, Array]:
    """The same with pivots and rest swapped until no coefficient is larger than `_LARGEST`; see the header why it ends."""
    pivots, rest, c = pivots.copy(), rest.copy(), c.copy()
    while np.abs(c).max() > _LARGEST:
        while abs(c[at := np.unravel_index(np.abs(c).argmax(), c.shape)]) > _LARGEST:
            i, j = int(at[0]), int(at[1])
            # the simplex step: column j of the rest becomes pivot i
            row, column = c[i] / c[i, j], c[:, j].copy()
            inverse = 1.0 / c[i, j]
            c -= np.outer(column, row)
            c[:, j] = -column * inverse
            c[i] = row
            c[i, j] = inverse
            pivots[i], rest[j] = rest[j], pivots[i]
        c = np.linalg.solve(b[:, pivots], b[:, rest])  # free of what the steps rounded
    first, second = np.argsort(pivots), np.argsort(rest)
    return pivots[first], rest[second], c[first][:, second]


factorizations: tuple[Factorization, ...] = (Pivoted(),)
