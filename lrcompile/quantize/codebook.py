"""Codebooks fitted to numbers: k-means in one dimension (Lloyd), and the pairs of Kashin's two factors in two.

Lloyd's steps fall monotonically. In one dimension they start at quantiles; sorting makes a step one searchsorted and two cumulative sums.
"""

from __future__ import annotations

import numpy as np

from lrcompile.interfaces import Array
from lrcompile.quantize.formats import Storage
from lrcompile.quantize.rounding import Coded

_STEPS = 60


def kmeans(values: Array, count: int, weights: Array | None = None, steps: int = _STEPS) -> Array:
    """`count` ascending centroids of numbers, each counted by its weight; fewer different numbers repeat the last one."""
    flat = values.reshape(-1)
    order = np.argsort(flat, kind="stable")
    x = flat[order]
    w = np.ones(len(x)) if weights is None else np.broadcast_to(weights, values.shape).reshape(-1)[order]
    mass, moment = np.concatenate([[0.0], np.cumsum(w)]), np.concatenate([[0.0], np.cumsum(w * x)])
    centroids = np.quantile(x, (np.arange(count) + 0.5) / count)
    for _ in range(steps):
        ends = np.concatenate([[0], np.searchsorted(x, (centroids[1:] + centroids[:-1]) / 2), [len(x)]])
        within = np.diff(mass[ends])
        moved = np.where(within > 0, np.diff(moment[ends]) / np.where(within > 0, within, 1.0), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids


def kmeans_coded(W: Array, storage: Storage, rows: Array | None = None) -> Coded:
    """A matrix by its own centroids, in float32; scale 1."""
    levels = kmeans(W, 1 << storage.bits, None if rows is None else rows[:, None])
    levels = levels.astype(np.float32).astype(np.float64)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, W).astype(np.int16)
    return Coded(storage, codes, np.ones((1, W.shape[1])), None, levels)


def kmeans_pairs(U: Array, V: Array, count: int, seed: int, steps: int = _STEPS) -> tuple[Array, Array]:
    """Centroids (count, 2) of the pairs (U_ij, V_ij), and each pair's place (codes of U's shape)."""
    points = np.stack([U.reshape(-1), V.reshape(-1)], axis=1)
    side = round(count**0.5)
    # a product of two scalar codebooks is the start: it holds a spread-out pair for every place
    grid = [(a, b) for a in kmeans(U, side) for b in kmeans(V, count // side)]
    rng = np.random.default_rng(seed)
    while len(grid) < count:
        grid.append(tuple(points[rng.integers(len(points))]))
    centroids = np.array(grid)
    codes = _closest(points, centroids)
    for _ in range(steps):
        mass = np.bincount(codes, minlength=count)
        sums = np.stack([np.bincount(codes, points[:, i], minlength=count) for i in (0, 1)], axis=1)
        centroids = np.where(mass[:, None] > 0, sums / np.maximum(mass, 1)[:, None], centroids)
        moved = _closest(points, centroids)
        if np.array_equal(moved, codes):
            break
        codes = moved
    return centroids, codes.reshape(U.shape)


def _closest(points: Array, centroids: Array) -> Array:
    best = np.full(len(points), np.inf)
    codes = np.zeros(len(points), np.int64)
    for i, (a, b) in enumerate(centroids):
        d = np.square(points[:, 0] - a) + np.square(points[:, 1] - b)
        closer = d < best
        best[closer], codes[closer] = d[closer], i
    return codes
