"""One code for both of Kashin's factors: a place among few pairs of levels, W ~ (a[u(c)] + Q b[v(c)]) diag(s) with c (K, N) the codes.

The pairs are free (the authors' form: u and v count the pairs themselves), or all of a few levels of U with all of a few of V: two
small codes in one. From k-means of U and V both kinds are refitted to the loss tr(E^T C E), E = W - What, by turns:

    codes    row by row each at its best pair given all others (cyclic coordinate descent); a code moves an entry of U and one of V
    levels   all at once, given the codes: the normal equations, by conjugate gradients that need C E once a step
    s        of each column the best, given both

None can make it worse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lrcompile.interfaces import Array
from lrcompile.quantize.codebook import kmeans, kmeans_pairs
from lrcompile.quantize.kashin import Kashin, rotated, rotated_back
from lrcompile.quantize.orthogonal import Orthogonal

_BLOCK = 64
_STEPS = 12  # of conjugate gradients, at most


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """a, b: levels of U and of V. u, v: (count,), which of them each code names. codes: (K, N). scales: (N,)."""

    a: Array
    b: Array
    u: Array
    v: Array
    codes: Array
    scales: Array
    left: Orthogonal

    @property
    def levels(self) -> Array:
        """(count, 2)."""
        return np.stack([self.a[self.u], self.b[self.v]], axis=1)

    @property
    def values(self) -> Array:
        return self._made(self.a, self.b)

    def _made(self, a: Array, b: Array) -> Array:
        made: Array = a[self.u][self.codes] + rotated_back(b[self.v][self.codes], self.left, None)
        return made * self.scales


def scales_of(W: Array) -> Array:
    """(N,): root mean squares of the columns, 1 where there is nothing. What is decomposed is W divided by them."""
    size = np.sqrt(np.mean(np.square(W), axis=0))
    return np.where(size > 0, size, 1.0)


def free_pairs(start: Kashin, scales: Array, count: int, seed: int) -> Pairs:
    """`count` pairs by k-means in two dimensions."""
    centroids, codes = kmeans_pairs(start.U, start.V, count, seed)
    each = np.arange(count)
    return Pairs(centroids[:, 0], centroids[:, 1], each, each, codes, scales, start.left)


def all_pairs(start: Kashin, scales: Array, count: int) -> Pairs:
    """All pairs of `count` levels each, by k-means of each factor."""
    a, b = kmeans(start.U, count), kmeans(start.V, count)
    u, v = (np.searchsorted((c[1:] + c[:-1]) / 2, X) for c, X in ((a, start.U), (b, start.V)))
    each = np.arange(count)
    return Pairs(a, b, np.repeat(each, count), np.tile(each, count), u * count + v, scales, start.left)


def refitted_pairs(W: Array, C: Array, start: Pairs, turns: int) -> Pairs:
    """Codes, levels and scales by turns, so many times."""
    made = start
    both = _stacked(C, start.left)
    for _ in range(turns):
        made = _with_better_scales(W, C, _with_better_levels(W, C, _with_better_codes(W, C, made, both)))
    return made


def _stacked(C: Array, left: Orthogonal) -> tuple[Array, Array, Array]:
    """C, C Q and Q^T C Q: how entries of U and of V meet in the loss."""
    CQ = left.apply(C)
    return C, CQ, rotated(CQ, left, None)


def _with_better_codes(W: Array, C: Array, made: Pairs, both: tuple[Array, Array, Array]) -> Pairs:
    """One pass over the rows, in blocks, so that most of the work is products."""
    uu, uv, vv = both
    levels, codes, K = made.levels, made.codes.copy(), len(W)
    slope_u = C @ (W - made.values)  # minus half the gradient by U, and by V
    slope_v = rotated(slope_u, made.left, None)
    for first in range(0, K, _BLOCK):
        rows = slice(first, min(first + _BLOCK, K))
        moved = np.zeros((2, rows.stop - first, W.shape[1]))
        for i in range(first, rows.stop):
            done = slice(first, i)
            du, dv = moved[0, : i - first], moved[1, : i - first]
            g = slope_u[i] - uu[i, done] @ du - uv[i, done] @ dv
            h = slope_v[i] - uv[done, i] @ du - vv[i, done] @ dv
            now = levels[codes[i]]
            by_u, by_v = ((levels[:, k, None] - now[:, k]) * made.scales for k in (0, 1))  # (count, N)
            change = (
                by_u * (by_u * uu[i, i] - 2 * g)
                + by_v * (by_v * vv[i, i] - 2 * h)
                + 2 * uv[i, i] * by_u * by_v
            )
            codes[i] = change.argmin(axis=0)
            moved[:, i - first] = (levels[codes[i]] - now).T * made.scales
        slope_u -= uu[:, rows] @ moved[0] + uv[:, rows] @ moved[1]
        slope_v -= uv[rows].T @ moved[0] + vv[:, rows] @ moved[1]
    return replace(made, codes=codes)


def _with_better_levels(W: Array, C: Array, made: Pairs) -> Pairs:
    """Conjugate gradients from the levels as they are."""
    u, v = made.u[made.codes], made.v[made.codes]
    split = len(made.a)

    def by_level(slope: Array) -> Array:
        """The sums of a slope over the entries that hold each level."""
        slope = slope * made.scales
        behind = rotated(slope, made.left, None)
        return np.concatenate(
            [
                np.bincount(u.ravel(), slope.ravel(), split),
                np.bincount(v.ravel(), behind.ravel(), len(made.b)),
            ]
        )

    found = np.concatenate([made.a, made.b])
    residual = by_level(C @ (W - made.values))
    way, size = residual, float(residual @ residual)
    enough = 1e-16 * float(np.vdot(W, C @ W)) * max(float(C.trace()), np.finfo(np.float64).tiny)
    for _ in range(_STEPS):
        if size <= enough:
            break
        ahead = by_level(C @ made._made(way[:split], way[split:]))
        step = size / max(float(way @ ahead), np.finfo(np.float64).tiny)
        found = found + step * way
        residual = residual - step * ahead
        way, size = residual + (float(residual @ residual) / size) * way, float(residual @ residual)
    return replace(made, a=found[:split], b=found[split:])


def _with_better_scales(W: Array, C: Array, made: Pairs) -> Pairs:
    plain = replace(made, scales=np.ones(W.shape[1])).values
    seen = C @ plain
    above, below = np.sum(seen * W, axis=0), np.sum(seen * plain, axis=0)
    return replace(made, scales=np.where(below > 0, above / np.where(below > 0, below, 1.0), made.scales))
