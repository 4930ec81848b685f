"""Best approximations of a given rank, weighted by what the input really is: what several factorizations build on.

For y = x W with C = E[x x^T] the rank-r What that minimises E |x W - x What|^2 needs no inverse (projection form):

    V = leading r eigenvectors of W^T C W (N, N),    A = W V (K, r),   B = V^T (r, N),   lost = sum of the other eigenvalues

For N > K the same V comes from the K x K side: with C = S S^T and M = S^T W, V is an orthonormal basis of M^T U, U the leading
eigenvectors of M M^T. Where every reader has a bias C is the covariance, and b' = b + m (W - A B), m the mean input: the mean
costs no rank. Weights that read one value stand side by side, W = [W1 W2 ..].
A table W (V, D) is the same with one-hot x, so C is diagonal: how often each row is asked for. A tied head reads W^T: then the
columns are weighted too, by the head's own second moment R R^T: V from R^T W^T C W R, A = W R V, B = V^T R^-1.
Where it is known how the model's outputs react, an error E counts as tr(E^T C' E G): then V comes from R^T W^T C' W R, G = R R^T,
A = W R V, B = V^T R^-1, and the other eigenvalues are the predicted movement of the outputs (Kronecker-factored curvature).
Without statistics C = I. Sources: Eckart and Young 1936; Wang et al., SVD-LLM, 2024; Chen et al., DRONE, 2021; Yu and Wu, AFM, 2023;
Martens and Grosse, K-FAC, 2015; Gupta et al., Shampoo, 2018.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, Factors, StatisticsSource, Weights
from lrcompile.records import Group, InputStatistics

# Eigenvalues of a second moment below this share of the largest are raised to it before a root is taken or inverted.
_FLOOR = 1e-10
_FLOOR_INVERTED = 1e-6
# Of the mean eigenvalue of the weighing: what few sequences do not show of it is not free.
_RIDGE_INPUT = 1e-3
_TINY = np.finfo(np.float64).tiny


def spectrum(group: Group, weights: Weights, statistics: StatisticsSource | None) -> Factors:
    """right, rows (N, n): A = W right_r and B = rows_r^T for every rank r up to n = min(K, N).

    errors (n + 1,): relative, of what the group computes, at rank 0, 1, .., n. movements (n + 1,): of the model's outputs, where known.
    """
    W = matrix(group, weights)
    known = _known(group, statistics)
    centred = centres(group, statistics)
    reacts = reactions(group, statistics, centred)
    if reacts is not None:
        C, R = reacts
        right, rows, energy = _two_sided(W, C, R)
        assert known is not None and known.second is not None
        return {
            "right": right,
            "rows": rows,
            "errors": _errors(W, right, rows, known.centred if centred else known.second, known.second),
            "movements": _tails(energy),
        }
    moment = known.centred if centred and known is not None else left_moment(group, statistics)
    tied = _right_root(group, statistics)
    found = _decompose(W if tied is None else W @ tied[0], moment)
    V, energy = found["basis"], found["energy"]
    total = float(energy.sum())
    if centred and known is not None and known.second is not None:
        total = float(
            np.vdot(W, known.second @ W)
        )  # the mean costs no rank, but is part of what the product is
    right, rows = (V, V) if tied is None else (tied[0] @ V, tied[1].T @ V)
    return {"right": right, "rows": rows, "errors": np.sqrt(_tails(energy) / max(total, _TINY))}


def low_rank(
    group: Group, weights: Weights, statistics: StatisticsSource | None, found: Factors, rank: int
) -> Factors:
    """a (K, r), b (r, N), and bias.i (N_i,) of each site whose bias absorbs the mean of what is left out."""
    W = matrix(group, weights)
    a, b = W @ found["right"][:, :rank], found["rows"][:, :rank].T
    if not centres(group, statistics):
        return {"a": a, "b": b}
    known = _known(group, statistics)
    assert known is not None and known.mean is not None
    moved = known.mean @ W - (known.mean @ a) @ b
    biases = {}
    for i, (site, columns) in enumerate(zip(group.sites, columns_of(group), strict=True)):
        bias = weights.bias(site)
        assert bias is not None
        biases[f"bias.{i}"] = bias + moved[columns]
    return {"a": a, "b": b, **biases}


def _tails(energy: Array) -> Array:
    """What is lost at rank 0, 1, .., n."""
    tails: Array = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    return tails


def reactions(
    group: Group, statistics: StatisticsSource | None, centred: bool
) -> tuple[Array, list[Array]] | None:
    """The weighing of the input (K, K), and of each site's output (N_i, N_i); None unless all of them are known."""
    if statistics is None or group.kind in ("shared", "tied"):
        return None
    found = [statistics.of(s) for s in group.sites]
    known = [s for s in found if s is not None and s.reaction is not None and s.second is not None]
    if len(known) < len(found):
        return None
    weighing: Array = np.mean([s.weighing(centred) for s in known], axis=0)
    return weighing, [s.reaction.output for s in known if s.reaction is not None]


def _two_sided(W: Array, C: Array, outputs: Sequence[Array]) -> tuple[Array, Array, Array]:
    """right, rows and energy of min tr(E^T C E G), G block-diagonal: from the decomposition of S^T W R, C = S S^T, G = R R^T."""
    C = C.copy()
    C[np.diag_indices(len(C))] += _RIDGE_INPUT * float(np.trace(C)) / len(C)
    R = scipy.linalg.block_diag(*(scipy.linalg.cholesky(G, lower=True) for G in outputs))
    found = _decompose(W @ R, C)
    V = found["basis"]
    rows = scipy.linalg.solve_triangular(R, V, lower=True, trans="T", check_finite=False)
    return R @ V, rows, found["energy"]


def _errors(W: Array, right: Array, rows: Array, lost: Array, total: Array) -> Array:
    """Relative errors in the plain moments at every rank, of directions that were chosen by others.

    W - A B is the sum over i > r of u_i rows_i^T, u = W right, so its squared norm is the sum of what (u^T C u) * (rows^T rows) holds
    beyond r on both axes.
    """
    U = W @ right
    P = (U.T @ lost @ U) * (rows.T @ rows)
    beyond = np.diagonal(P[::-1, ::-1].cumsum(axis=0).cumsum(axis=1))[::-1]
    whole = max(float(np.vdot(W, total @ W)), _TINY)
    errors: Array = np.sqrt(np.maximum(np.concatenate([beyond, [0.0]]), 0.0) / whole)
    return errors


def matrix(group: Group, weights: Weights) -> Array:
    """W (K, N): the group's one weight, or the weights that read one value, side by side."""
    if group.shares_weight:
        return weights.matrix(group.sites[0])
    return np.concatenate([weights.matrix(s) for s in group.sites], axis=1)


def columns_of(group: Group) -> tuple[slice, ...]:
    """Which columns of the group's matrix each site's own are."""
    if group.shares_weight:
        return (slice(None),) * len(group.sites)
    ends = [0, *itertools.accumulate(s.N for s in group.sites)]
    return tuple(slice(a, b) for a, b in itertools.pairwise(ends))


def centres(group: Group, statistics: StatisticsSource | None) -> bool:
    """Whether the mean input is left to biases: every reader of the one input has one."""
    known = _known(group, statistics)
    return (
        known is not None
        and known.mean is not None
        and group.kind not in ("shared", "tied")
        and all(s.bias is not None and s.wiring is not None and s.wiring.scale != 0.0 for s in group.sites)
    )


def _known(group: Group, statistics: StatisticsSource | None) -> InputStatistics | None:
    """Of the value that the first site reads: the only one unless a weight is shared."""
    return statistics.of(group.sites[0]) if statistics is not None else None


def _decompose(W: Array, C: Array | None) -> Factors:
    K, N = W.shape
    if N <= K or (C is not None and C.ndim == 1):
        weighted = W if C is None else C[:, None] * W if C.ndim == 1 else C @ W
        energy, V = eigh(W.T @ weighted)
        return {"basis": V[:, : min(K, N)], "energy": energy[: min(K, N)]}
    M = W if C is None else root(C).T @ W
    energy, U = eigh(M @ M.T)
    V, _ = scipy.linalg.qr(M.T @ U, mode="economic")
    return {"basis": fix_signs(V), "energy": energy}


def left_moment(group: Group, statistics: StatisticsSource | None) -> Array | None:
    """Weight of the input side: (K, K) for linear readers, (K,) for lookups, None without data.

    Several readers of one weight add up, each by the share of rows that it sees.
    """
    if statistics is None:
        return None
    if not group.shares_weight:
        known_first = _known(group, statistics)
        return None if known_first is None else known_first.second
    found = [statistics.of(s) for s, t in zip(group.sites, group.transposed, strict=True) if not t]
    known = [s for s in found if s is not None]
    total = sum(s.count for s in known) or 1
    parts = [
        (s.count / total if len(known) > 1 else 1.0) * m
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
    values, vectors = eigh(np.mean(moments, axis=0))
    values = np.sqrt(np.maximum(values, max(values[0], _TINY) * _FLOOR_INVERTED))
    return vectors * values, (vectors / values).T


def root(C: Array) -> Array:
    """S with S S^T = C, eigenvalues floored: defined for every symmetric C."""
    values, vectors = eigh(C)
    floor = max(float(values[0]), _TINY) * _FLOOR
    return vectors * np.sqrt(np.maximum(values, floor))


def eigh(G: Array) -> tuple[Array, Array]:
    """Eigenvalues (falling, never negative) and eigenvectors (signs fixed) of a symmetric matrix."""
    values, vectors = np.linalg.eigh(0.5 * (G + G.T))  # as quick as SciPy's, and lets other threads run
    return np.maximum(values[::-1], 0.0), fix_signs(vectors[:, ::-1])


def fix_signs(V: Array) -> Array:
    """Columns with their largest entry positive: LAPACK leaves the sign to chance."""
    largest = V[np.abs(V).argmax(axis=0), np.arange(V.shape[1])]
    return V * np.where(largest < 0, -1.0, 1.0)
