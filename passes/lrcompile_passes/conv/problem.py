"""What every form of a kernel minimises, and the two steps that forms are made of.

With W (K, n) the kernel of one group of channels, K = (c, *window), C the second moment of what the window sees (the covariance, where a
bias absorbs the mean), and G = R R^T how the model's outputs react to what comes out (I, where that is not known), What is sought with

    tr (W - What)^T C (W - What) G  least;   the relative error that is claimed is of G = I.

*Regression*. Let What = P M, P (K, q) given: what the first stage makes of the window. With P^T C P = L L^T the best M is L^-T B,
B = L^-1 P^T C W, whatever G is; ||B R||^2 is held of tr W^T C W G. L is lower triangular, so the first columns of P have the first rows
of B: one Cholesky factorization answers for all ranks.
*Truncation*. Let M have rank r: with B R = X S V^T, M -> M (R V_r)(V_r^T R^-1), and of that the squares of S beyond r are lost.

The P of a first stage that mixes a part a of the window's numbers alike at all points s of the rest is P = U (x) I. U is taken from the
leading left singular vectors of the kernel unfolded to (a, (s, n)), weighed by the mean over s of C's blocks, S S^T, and by R:
U = S^-T [S^T W (I (x) R)]_r. That is HOSVD in the measure of the data; the regression then uses all of C.

Sources: Kim et al. 2016 (Tucker-2 of kernels); Jaderberg et al. 2014; Zhang et al. 2016 (least squares on responses);
De Lathauwer et al. 2000 (HOSVD, HOOI).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, StatisticsSource, Weights
from lrcompile.records import Group, InputStatistics, Window

# A claim covers the rounding of float64 in sums of squares whose difference is taken.
CLAIM_SLACK = 1e-6
_RIDGE = 1e-9  # of the mean diagonal: a pivot of Cholesky must not be rounded to zero
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One group of channels. W (K, n). C (K, K); None: the identity, without data. R (n, n), lower, or None. mean (K,): of its bias."""

    W: Array
    C: Array | None
    R: Array | None
    mean: Array | None

    def weighed(self) -> Array:
        """C W."""
        return self.W if self.C is None else self.C @ self.W

    def reacting(self, B: Array) -> Array:
        """B R."""
        return B if self.R is None else B @ self.R


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """All groups of channels of a Conv. whole: tr W^T E[x x^T] W, which errors are relative to. key: names it in caches."""

    window: Window
    channels: int
    outputs: int
    parts: tuple[Part, ...]
    whole: float
    key: tuple[str, ...]

    @property
    def reacts(self) -> bool:
        return all(p.R is not None for p in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the rows of a W."""
        return (self.channels, *self.window.kernel)

    def error(self, lost: float) -> float:
        return float(np.sqrt(max(lost, 0.0) / max(self.whole, _TINY))) + CLAIM_SLACK


def problem_of(group: Group, weights: Weights, statistics: StatisticsSource | None) -> Problem:
    """Read the kernel and what is known of its input. Several readers of one kernel see the mean of their moments."""
    site = group.sites[0]
    window = site.window
    assert window is not None
    groups = window.group
    W = weights.matrix(site)
    known = [
        k for s in group.sites if (k := statistics.of(s) if statistics is not None else None) is not None
    ]
    centred = bool(known) and len(group.sites) == 1 and site.bias is not None
    parts, whole = [], 0.0
    for i, columns in enumerate(np.split(W, groups, axis=1)):
        seconds = [_of_group(k, i, groups, centred) for k in known]
        C = np.mean(seconds, axis=0) if seconds else None
        reaction = known[0].reaction if len(known) == 1 else None
        n = columns.shape[1]
        rows = slice(i * n, (i + 1) * n)
        R = scipy.linalg.cholesky(reaction.output[rows, rows], lower=True) if reaction is not None else None
        mean = known[0].mean if centred else None
        parts.append(Part(columns, C, R, mean if mean is None or groups == 1 else mean[i]))
        plain = np.mean([_of_group(k, i, groups, False) for k in known], axis=0) if centred else C
        whole += float(np.vdot(columns, columns if plain is None else plain @ columns))
    key = (
        *(weights.key(s) for s in group.sites),
        *(statistics.key(s) if statistics else "" for s in group.sites),
    )
    return Problem(window, site.K // window.size, site.N // groups, tuple(parts), whole, (*key, str(centred)))


def _of_group(known: InputStatistics, index: int, groups: int, centred: bool) -> Array:
    moment = known.centred if centred else known.second
    assert moment is not None
    return moment if groups == 1 else moment[index]


def bias_of(group: Group, weights: Weights, problem: Problem, made: Sequence[Array]) -> dict[str, Array]:
    """b + m (W - What) over all groups of channels, where the data has a mean to be absorbed. made: each group's What (K, n)."""
    if problem.parts[0].mean is None:
        return {}
    b = weights.bias(group.sites[0])
    assert b is not None
    moved = [p.mean @ (p.W - What) for p, What in zip(problem.parts, made, strict=True) if p.mean is not None]
    return {"bias.0": b + np.concatenate(moved)}


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The numbers that a window sees, (channels, *kernel), as (a, s): a is what a first stage mixes, s what it leaves. axes: those of a."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return (*self.axes, *(i for i in range(len(self.shape)) if i not in self.axes))

    @property
    def mixed(self) -> int:
        return int(np.prod([self.shape[i] for i in self.axes]))

    @property
    def index(self) -> Array:
        """Where each number of (a, s) stands among the rows of W."""
        return np.arange(int(np.prod(self.shape))).reshape(self.shape).transpose(self.order).reshape(-1)


def leading(part: Part, split: Split) -> Array:
    """U (a, a) by falling weight: E[z z^T] = I of z = x U, on average over s."""
    index, a = split.index, split.mixed
    W = part.reacting(part.W[index]).reshape(a, -1)
    return basis(W @ W.T, mean_block(part, split))


def basis(Q: Array, S: Array) -> Array:
    """S^-T times the eigenvectors of S^T Q S by falling eigenvalue, S lower triangular: columns orthonormal in S S^T."""
    values, vectors = np.linalg.eigh(S.T @ Q @ S)
    order = np.argsort(-values, kind="stable")
    vectors = vectors[:, order]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    made: Array = scipy.linalg.solve_triangular(
        S, vectors * np.where(largest < 0, -1.0, 1.0), lower=True, trans="T"
    )
    return made


def mean_block(part: Part, split: Split) -> Array:
    """S (a, a), lower: S S^T the mean over s of the blocks of C at (., s), (., s)."""
    a = split.mixed
    if part.C is None:
        return np.eye(a)
    index = split.index.reshape(a, -1)
    return root(np.mean([part.C[np.ix_(rows, rows)] for rows in index.T], axis=0))


def root(C: Array) -> Array:
    """L, lower triangular, L L^T = C but for a ridge."""
    C = 0.5 * (C + C.T)
    C[np.diag_indices(len(C))] += _RIDGE * max(float(np.trace(C)) / len(C), _TINY)
    L: Array = scipy.linalg.cholesky(C, lower=True, check_finite=False)
    return L


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """L (q s, q s) and B (q s, n) of P = U (x) I, U (a, q): rows are (column of U, s)."""

    L: Array
    B: Array

    def first(self, count: int) -> Regression:
        """Of the first columns of P alone."""
        return Regression(self.L[:count, :count], self.B[:count])

    def coefficients(self) -> Array:
        """M = L^-T B."""
        M: Array = scipy.linalg.solve_triangular(self.L, self.B, lower=True, trans="T", check_finite=False)
        return M


def regression(part: Part, split: Split, U: Array) -> Regression:
    a, q = U.shape
    index = split.index
    s = len(index) // a
    C = np.eye(len(index)) if part.C is None else part.C[np.ix_(index, index)]
    PC = (U.T @ C.reshape(a, -1)).reshape(q * s, -1)
    H = (PC.reshape(q * s, a, s).transpose(0, 2, 1) @ U).transpose(0, 2, 1).reshape(q * s, q * s)
    L = root(H)
    B: Array = scipy.linalg.solve_triangular(L, PC @ part.W[index], lower=True, check_finite=False)
    return Regression(L, B)


def product(split: Split, U: Array, M: Array) -> Array:
    """What (K, n) = (U (x) I) M, rows in W's own order."""
    made = np.empty((len(split.index), M.shape[1]))
    made[split.index] = (U @ M.reshape(U.shape[1], -1)).reshape(len(split.index), -1)
    return made


@dataclass(frozen=True, slots=True, eq=False)
class Truncation:
    """right, rows (n, n): M -> (M right_r) rows_r^T. kept: of tr .. G, at rank 0 .. n. lost: of tr .. at G = I, beside what B has not."""

    right: Array
    rows: Array
    kept: Array
    lost: Array


def truncation(part: Part, gram: Array) -> Truncation:
    """gram: B^T B (n, n)."""
    inner = gram if part.R is None else part.R.T @ gram @ part.R
    values, V = np.linalg.eigh(0.5 * (inner + inner.T))
    values, V = np.maximum(values[::-1], 0.0), V[:, ::-1]
    largest = V[np.abs(V).argmax(axis=0), np.arange(V.shape[1])]
    V = V * np.where(largest < 0, -1.0, 1.0)
    right, rows = V, V
    if part.R is not None:
        right, rows = part.R @ V, scipy.linalg.solve_triangular(part.R, V, lower=True, trans="T")
    each = values * np.sum(rows * rows, axis=0)
    kept = np.concatenate([[0.0], np.cumsum(values)])
    lost = np.concatenate([np.cumsum(each[::-1])[::-1], [0.0]])
    return Truncation(right, rows, kept, lost)


def energy(part: Part, reacting: bool) -> float:
    """tr W^T C W, or tr W^T C W G."""
    gram = part.W.T @ part.weighed()
    if reacting and part.R is not None:
        return float(np.vdot(part.R, gram @ part.R))
    return float(np.trace(gram))
