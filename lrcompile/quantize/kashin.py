"""Kashin's decomposition: W = U + Q V with both factors spread out (no entry far above the others), so that few levels hold each.

Greedy steps on the residual X, from X = W: where ||X||_1 is larger than ||Q^T X||_1, U takes (||X||_1 / n) sign(X), else V takes the
same of Q^T X; n the number of entries. Each step is the best multiple of a matrix of signs, so it lowers ||X||_F^2 by
||X||_1^2 / n: by the factor 1 - max(||X||_1, ||Q^T X||_1)^2 / (n ||X||_F^2), about 1 - 2/pi where entries are like Gaussian ones. The residual falls
geometrically with the rate that is returned; it stalls where X and Q^T X are both spiky, for which `steps` bounds the run.
Two-sided: W = U + Q V Q2^T. By column: each with its own norms; that converges where columns differ in size, and has no levels in common.

Per column (`four_steps`): two sign steps into u, two into v give each column four peaks +-c1 +-c2, a codebook in closed form, of 2 bits a
factor. Levels: of k-means (16, 4, 3), uniform, or these; both factors of 2 bits are one code of 4 bits. `refitted`: alternately
U <- round(W - Q V), V <- round(Q^T (W - U)). `refitted_codes`: the same in a storage type, each rounding with error feedback for the loss
tr(E^T C E), E = W - U - Q V: of U by C, of V by Q^T C Q. `pairs` does so for one code of both.
Sources: Kashin, 1977; Lyubarskii and Vershynin, 2010; Merkulov et al., Quantization of large language models with Kashin, UAI
2024; Cherniuk et al., 2026 (the column form).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lrcompile.interfaces import Array
from lrcompile.quantize.codebook import kmeans, kmeans_pairs
from lrcompile.quantize.feedback import rounded_by
from lrcompile.quantize.formats import Storage
from lrcompile.quantize.orthogonal import Orthogonal
from lrcompile.quantize.rounding import Coded

TOLERANCE, STEPS = 1e-6, 600

Rounds = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, eq=False)
class Kashin:
    """W ~ U + Q V (right: U + Q V Q2^T). residual: ||W - ..||_F / ||W||_F; rate: of its fall a step, geometric mean."""

    U: Array
    V: Array
    left: Orthogonal
    right: Orthogonal | None = None
    residual: float = 0.0
    rate: float = 1.0
    steps: int = 0

    @property
    def values(self) -> Array:
        made: Array = self.U + rotated_back(self.V, self.left, self.right)
        return made

    @property
    def peaks(self) -> tuple[float, float]:
        """max |U| and max |V| times sqrt n / ||W||_F: the infinity norms, 1 for a matrix of signs. The theorem says O(1)."""
        size = float(np.linalg.norm(self.values)) / np.sqrt(self.U.size)
        return (
            (float(np.abs(self.U).max()) / size, float(np.abs(self.V).max()) / size)
            if size > 0
            else (0.0, 0.0)
        )


def rotated(X: Array, left: Orthogonal, right: Orthogonal | None) -> Array:
    """Q^T X Q2."""
    Y = left.apply(X.T).T
    return Y if right is None else right.apply(Y)


def rotated_back(Y: Array, left: Orthogonal, right: Orthogonal | None) -> Array:
    """Q Y Q2^T."""
    X = left.apply_transposed(Y.T).T
    return X if right is None else right.apply_transposed(X)


def decompose(
    W: Array,
    left: Orthogonal,
    right: Orthogonal | None = None,
    *,
    by_column: bool = False,
    tolerance: float = TOLERANCE,
    steps: int = STEPS,
) -> Kashin:
    """The greedy steps, until the residual is below the tolerance or there were so many. by_column: needs right None."""
    assert right is None or not by_column
    size, X = float(np.linalg.norm(W)), W.copy()
    U, V = np.zeros_like(W), np.zeros_like(W)
    done, residual = 0, 1.0 if size > 0 else 0.0
    while done < steps and residual > tolerance:
        Y = rotated(X, left, right)
        axis = 0 if by_column else None
        here, there = np.abs(X).mean(axis=axis), np.abs(Y).mean(axis=axis)
        step_u = np.where(here >= there, here, 0.0) * np.sign(X)
        step_v = np.where(here >= there, 0.0, there) * np.sign(Y)
        U += step_u
        V += step_v
        X -= step_u + rotated_back(step_v, left, right)
        residual = float(np.linalg.norm(X)) / size
        done += 1
    rate = residual ** (1.0 / done) if done and residual > 0 else 0.0
    return Kashin(U, V, left, right, residual, rate, done)


def four_steps(W: Array, left: Orthogonal) -> tuple[Kashin, Array, Array]:
    """Two sign steps of each column into u, two into v. And the sizes c of the steps, (2, N) for each: levels +-c1 +-c2."""
    X, sizes, made = W.copy(), [], [np.zeros_like(W), np.zeros_like(W)]
    for factor in (0, 0, 1, 1):
        Y = X if factor == 0 else rotated(X, left, None)
        c = np.abs(Y).mean(axis=0)
        step = c * np.where(Y < 0, -1.0, 1.0)
        made[factor] += step
        sizes.append(c)
        X = X - (step if factor == 0 else rotated_back(step, left, None))
    whole = float(np.linalg.norm(W))
    residual = float(np.linalg.norm(X)) / whole if whole > 0 else 0.0
    return (
        Kashin(made[0], made[1], left, None, residual, residual**0.25, 4),
        np.array(sizes[:2]),
        np.array(sizes[2:]),
    )


def column_levels(X: Array, steps: int = 8) -> Array:
    """The nearest of each column's own four levels +-c1 +-c2, found by Lloyd's steps on its absolute values."""
    size, sign = np.abs(X), np.where(X < 0, -1.0, 1.0)
    middle = size.mean(axis=0)
    for _ in range(steps):
        top = size >= middle
        high = np.sum(size * top, axis=0) / np.maximum(np.sum(top, axis=0), 1)
        low = np.sum(size * ~top, axis=0) / np.maximum(np.sum(~top, axis=0), 1)
        middle = (high + low) / 2
    made: Array = sign * np.where(size >= middle, high, low)
    return made


def refitted(W: Array, start: Kashin, rounds_u: Rounds, rounds_v: Rounds, times: int) -> Kashin:
    """U <- round(W - Q V), V <- round(Q^T (W - U)), so many times, from V rounded; the best of all."""
    left, right = start.left, start.right
    size = float(np.linalg.norm(W)) or 1.0
    U, V = rounds_u(start.U), rounds_v(start.V)
    best = (float(np.linalg.norm(W - U - rotated_back(V, left, right))) / size, U, V)
    for _ in range(times):
        U = rounds_u(W - rotated_back(V, left, right))
        V = rounds_v(rotated(W - U, left, right))
        residual = float(np.linalg.norm(W - U - rotated_back(V, left, right))) / size
        if residual < best[0]:
            best = (residual, U, V)
    return Kashin(best[1], best[2], left, right, best[0], start.rate, start.steps)


def refitted_codes(
    W: Array, start: Kashin, kind: Storage, C: Array | None, times: int
) -> tuple[Coded, Coded]:
    """U and V in a storage type, refitted so many times to what C (None: an identity) weighs; the best of all."""
    left = start.left
    D = None if C is None else rotated(left.apply(C), left, None)
    u, v = rounded_by(start.U, C, kind, 0), rounded_by(start.V, D, kind, 0)

    def lost() -> float:
        E = W - u.values - rotated_back(v.values, left, None)
        return float(np.vdot(E, E if C is None else C @ E))

    best, kept = lost(), (u, v)
    for _ in range(times):
        u = rounded_by(W - rotated_back(v.values, left, None), C, kind, 1)
        v = rounded_by(rotated(W - u.values, left, None), D, kind, 1)
        if (now := lost()) < best:
            best, kept = now, (u, v)
    return kept


def joint(W: Array, start: Kashin, count: int, seed: int) -> tuple[Kashin, Array, Array]:
    """The authors' form: one index into `count` pairs of levels for both factors. And the centroids (count, 2) and codes."""
    centroids, codes = kmeans_pairs(start.U, start.V, count, seed)
    U, V = centroids[codes, 0], centroids[codes, 1]
    size = float(np.linalg.norm(W)) or 1.0
    residual = float(np.linalg.norm(W - U - rotated_back(V, start.left, start.right))) / size
    return Kashin(U, V, start.left, start.right, residual, start.rate, start.steps), centroids, codes


def to_kmeans(count: int) -> Rounds:
    """Rounding to `count` centroids of the matrix itself."""

    def rounds(X: Array) -> Array:
        levels = kmeans(X, count)
        made: Array = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, X)]
        return made

    return rounds


def to_uniform(count: int) -> Rounds:
    """Rounding each column to `count` levels a step apart, centred; the step that loses least of 24 tried."""
    offset = (count - 1) / 2

    def rounds(X: Array) -> Array:
        top = np.maximum(np.abs(X).max(axis=0), np.finfo(np.float64).tiny)
        best, made = np.full(X.shape[1], np.inf), X
        for share in np.linspace(1.0, 0.2, 24):
            step = 2 * top * share / max(count - 1, 1)
            tried = (np.clip(np.rint(X / step + offset), 0, count - 1) - offset) * step
            lost = np.sum(np.square(X - tried), axis=0)
            made = np.where(lost < best, tried, made)
            best = np.minimum(lost, best)
        return made

    return rounds
