"""Truncated singular value decomposition of a weight, weighted by what its input really is.

    y = x W + b ~ (x A) B + b',   A (K, r),  B (r, N),   r (K + N) parameters,  2 r (K + N) FLOPs a row

`svd` minimises E |x W - x What|^2 over rank r. With C = E[x x^T] the optimum needs no inverse (projection form):

    V = leading r eigenvectors of W^T C W (N, N),    A = W V,   B = V^T,   lost = sum of the other eigenvalues

which is SVD-LLM's whitened truncation, DRONE and AFM written once more; it holds for singular C. For N > K the same V comes
from the K x K side: with C = S S^T and M = S^T W, V is an orthonormal basis of M^T U, U the leading eigenvectors of M M^T.
Where a bias exists C is the covariance and b' = b + m (W - A B), m the mean input: the mean costs no rank.
A table W (V, D) is the same with one-hot x, so C is diagonal: how often each row is asked for.
A tied head reads W^T: then also the columns are weighted, by the head's own second moment R R^T, and V comes from
R^T W^T C W R, A = W R V, B = V^T R^-1.

`svd-plain` is the same with C = I and b' = b. It ignores the data, is far worse on real models, and is used only by name.
At full rank both are an orthogonal factorization W = Q R, exact to rounding: no data is needed, whitening changes nothing.

Sources: Eckart and Young 1936; Wang et al., SVD-LLM, 2024; Chen et al., DRONE, 2021; Yu and Wu, AFM, 2023.
Refuses groups of different weights (each weight is served alone).
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

# Eigenvalues of a second moment below this share of the largest are raised to it before a root is taken or inverted.
_FLOOR = 1e-10
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
        return None if group.shares_weight else Refusal(f"{self.name} factorizes one weight at a time")

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        site = group.sites[0]
        full = min(site.K, site.N)
        itemsize = weights.itemsize(site)

        def cost(rank: int) -> Cost:
            # a product meets both factors; a lookup takes a row of the first one (the second, when it reads the transpose)
            flops = sum(
                2 * rank * (site.K + site.N if s.kind == "linear" else site.K if t else site.N)
                for s, t in zip(group.sites, group.transposed, strict=True)
            )
            return Cost(rank * (site.K + site.N), rank * (site.K + site.N) * itemsize, flops)

        if options.full:
            yield Candidate(self.name, full, cost(full), 0.0, bound=False, structure=_FULL)
            return
        spectrum = self._spectrum(group, weights, statistics)
        energy = spectrum["energy"]
        tails = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])  # what is lost at rank 0, 1, ..
        total = max(float(spectrum["total"][0]), np.finfo(np.float64).tiny)
        # the plain form bounds the error of the weight, not that of what the data makes of it
        bound = group.kind == "alone" and (self.needs_data or statistics is None)
        note = self._note(group, statistics)
        ranks = (
            options.ranks
            if options.ranks is not None
            else range(options.multiple, full + 1, options.multiple)
        )
        for rank in ranks:
            if 1 <= rank <= full:
                error = float(np.sqrt(tails[min(rank, len(energy))] / total)) + _CLAIM_SLACK
                yield Candidate(self.name, rank, cost(rank), error, bound, note=note)

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        site = group.sites[0]
        W = weights.matrix(site)
        assert candidate.rank is not None
        if candidate.structure == _FULL:
            return _full_rank(W)
        V = self._spectrum(group, weights, statistics)["basis"][:, : candidate.rank]
        R = None if self.name == "svd-plain" else _right_root(group, statistics)
        if R is None:
            a, b = W @ V, V.T
        else:
            root, inverse = R
            a, b = W @ (root @ V), V.T @ inverse
        bias = weights.bias(site)
        if not self._centres(group, statistics) or bias is None:
            return {"a": a, "b": b}
        assert statistics is not None
        known = statistics.of(site)
        assert known is not None and known.mean is not None
        return {"a": a, "b": b, "bias": bias + known.mean @ W - (known.mean @ a) @ b}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        w = factors["a"].astype(np.float64) @ factors["b"].astype(np.float64)
        changed = {
            (s.name, "weight"): w.T if t else w for s, t in zip(group.sites, group.transposed, strict=True)
        }
        return {**changed, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        a, b = call.factors["a"], call.factors["b"]
        if call.transposed:
            a, b = op("Transpose", b, name="b_t", perm=(1, 0)), op("Transpose", a, name="a_t", perm=(1, 0))
        if call.kind == "lookup":
            low = op("Gather", a, call.x, name="a", axis=0)
        else:
            low = op("MatMul", call.x, a, name="a")
        return op("MatMul", low, b, name="b")

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        if "bias" not in factors:
            return {}
        return {(group.sites[0].name, "bias"): factors["bias"].astype(np.float64)}

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

    def _centres(self, group: Group, statistics: StatisticsSource | None) -> bool:
        return (
            self.name == "svd"
            and group.kind == "alone"
            and group.sites[0].bias is not None
            and statistics is not None
        )

    def _spectrum(self, group: Group, weights: Weights, statistics: StatisticsSource | None) -> Factors:
        """basis (N, min(K, N)) with orthonormal columns, energy (min(K, N),), falling, and the total (1,) that errors are relative to.

        Kept between ranks and runs.
        """
        source = statistics if self.name == "svd" else None
        seen = tuple(source.key(s) for s in group.sites) if source is not None else ()
        key = ("svd", "spectrum-2", weights.key(group.sites[0]), str(self._centres(group, source)), *seen)
        return weights.remember(key, lambda: self._measured(group, weights, source))

    def _measured(self, group: Group, weights: Weights, statistics: StatisticsSource | None) -> Factors:
        found = self._decompose(group, weights, statistics)
        total = float(found["energy"].sum())
        if self._centres(group, statistics):  # the mean costs no rank, but it is part of what the product is
            assert statistics is not None
            known = statistics.of(group.sites[0])
            assert known is not None and known.second is not None
            W = weights.matrix(group.sites[0])
            total = float(np.vdot(W, known.second @ W))
        return {**found, "total": np.array([total])}

    def _decompose(self, group: Group, weights: Weights, statistics: StatisticsSource | None) -> Factors:
        W = weights.matrix(group.sites[0])
        C = _left_moment(group, statistics, self._centres(group, statistics))
        R = _right_root(group, statistics)
        K, N = W.shape
        if R is not None:
            W = W @ R[0]
        if N <= K or (C is not None and C.ndim == 1):
            weighted = W if C is None else C[:, None] * W if C.ndim == 1 else C @ W
            energy, V = _eigh(W.T @ weighted)
            return {"basis": V[:, : min(K, N)], "energy": energy[: min(K, N)]}
        M = W if C is None else _root(C).T @ W
        energy, U = _eigh(M @ M.T)
        V, _ = scipy.linalg.qr(M.T @ U, mode="economic")
        return {"basis": _fix_signs(V), "energy": energy}


def _left_moment(group: Group, statistics: StatisticsSource | None, centred: bool) -> Array | None:
    """Weight of the input side: (K, K) for linear readers, (K,) for lookups, None without data.

    Several readers add up, each by the share of rows that it sees.
    """
    if statistics is None:
        return None
    found = [statistics.of(s) for s, t in zip(group.sites, group.transposed, strict=True) if not t]
    known = [s for s in found if s is not None]
    if not known:
        return None
    if len(known) == 1 and centred:
        return known[0].centred
    total = sum(s.count for s in known) or 1
    parts = [
        (s.count / total) * m
        for s in known
        if (m := s.second if s.second is not None else s.frequencies) is not None
    ]
    if not parts:
        return None
    if len({p.ndim for p in parts}) > 1:  # a lookup and a product read the same orientation: one dense moment
        parts = [np.diag(p) if p.ndim == 1 else p for p in parts]
    moment: Array = np.sum(parts, axis=0)
    return moment


def _right_root(group: Group, statistics: StatisticsSource | None) -> tuple[Array, Array] | None:
    """R and its inverse, (N, N), R R^T the second moment of those who read the transpose; None when nobody does."""
    if statistics is None:
        return None
    found = [statistics.of(s) for s, t in zip(group.sites, group.transposed, strict=True) if t]
    moments = [s.second for s in found if s is not None and s.second is not None]
    if not moments:
        return None
    values, vectors = _eigh(np.mean(moments, axis=0))
    values = np.sqrt(np.maximum(values, max(values[0], np.finfo(np.float64).tiny) * 1e-6))
    return vectors * values, (vectors / values).T


def _root(C: Array) -> Array:
    """S with S S^T = C, eigenvalues floored: defined for every symmetric C."""
    values, vectors = _eigh(C)
    floor = max(float(values[0]), np.finfo(np.float64).tiny) * _FLOOR
    return vectors * np.sqrt(np.maximum(values, floor))


def _eigh(G: Array) -> tuple[Array, Array]:
    """Eigenvalues (falling, never negative) and eigenvectors (signs fixed) of a symmetric matrix."""
    values, vectors = np.linalg.eigh(0.5 * (G + G.T))  # as quick as SciPy's, and lets other threads run
    return np.maximum(values[::-1], 0.0), _fix_signs(vectors[:, ::-1])


def _fix_signs(V: Array) -> Array:
    """Columns with their largest entry positive: LAPACK leaves the sign to chance."""
    largest = V[np.abs(V).argmax(axis=0), np.arange(V.shape[1])]
    return V * np.where(largest < 0, -1.0, 1.0)


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
