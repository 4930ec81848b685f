"""Rounding a matrix to a storage type: plain, or with scales that a search over clipping and a least-squares fit make best.

    loss = sum over a group of  v_i (w_i - scale (level_i - zero))^2,     v_i how much row i counts

Plain scales reach the largest number of a group. The search tries smaller ones, which clip it and step finer, takes the best for
each group, and then fits the scale to the codes: scale = sum v w l / sum v l^2. Groups are runs of rows of one column; the last
one may be shorter. Sources: the clipping search of AWQ and GPTQ implementations; the fit is one step of Lloyd's algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lrcompile.interfaces import Array
from lrcompile.quantize.formats import SMALLEST, Storage, factor_of, round_scales

_SHRINKS = np.linspace(1.0, 0.45, 23)
_SIGNS = (1.0, -1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A matrix (K, N) in a storage type. codes: integers, or places in `levels`. scales, zeros: (groups, N).

    factor: what scales are stored in units of. Of matrices with common codes levels are (count, matrices), and values (K, N, matrices).
    """

    storage: Storage
    codes: Array
    scales: Array
    zeros: Array | None = None
    levels: Array | None = None
    factor: float = 1.0

    @property
    def normal(self) -> Array:
        """(K, N): the levels, zero points subtracted, before the scale."""
        u = self.codes.astype(np.float64) if self.levels is None else self.levels[self.codes]
        return u if self.zeros is None else u - self._spread(self.zeros)

    @property
    def values(self) -> Array:
        """(K, N) float64: what the codes mean."""
        scales = self._spread(self.scales)
        made: Array = self.normal * (scales if self.storage.together == 1 else scales[..., None])
        return made

    @property
    def bits(self) -> int:
        return self.storage.size(*self.codes.shape)

    def row(self, i: int, w: Array) -> tuple[Array, Array]:
        """The nearest codes of another row i (N,), and what they mean."""
        group = 0 if len(self.scales) == 1 else i // self.storage.group
        scale, zero = self.scales[group], 0.0 if self.zeros is None else self.zeros[group]
        codes = nearest(w / scale + zero, self.storage, self.levels)
        level = codes if self.levels is None else self.levels[codes]
        return codes, scale * (level - zero)

    def _spread(self, per_group: Array) -> Array:
        """(groups, N) to (K, N)."""
        K, N = self.codes.shape
        if len(per_group) == 1:
            return np.broadcast_to(per_group, (K, N))
        spread: Array = np.repeat(per_group, self.storage.group, axis=0)[:K]
        return spread


def plain(W: Array, storage: Storage) -> Coded:
    """Round to nearest: the scale reaches the largest number of each group."""
    if storage.fitted:
        from lrcompile.quantize.codebook import kmeans_coded

        return kmeans_coded(W, storage)
    scales, zeros = _reaching(_grouped(W, storage), storage)
    factor = factor_of(scales, storage.scale)
    return encode(W, storage, round_scales(scales, storage.scale, factor), zeros, factor)


def searched(W: Array, storage: Storage, rows: Array | None = None) -> Coded:
    """The scales that lose least. rows: (K,), how much each row counts."""
    if storage.fitted:
        from lrcompile.quantize.codebook import kmeans_coded

        return kmeans_coded(W, storage, rows)
    scales, zeros, factor = _best_scales(W, storage, rows)
    return encode(W, storage, scales, zeros, factor)


def _best_scales(W: Array, storage: Storage, rows: Array | None) -> tuple[Array, Array | None, float]:
    """Scales and zero points (groups, N) of `searched`, and the factor."""
    blocks = _grouped(W, storage)
    v = np.ones(len(W)) if rows is None else rows / max(float(rows.mean()), SMALLEST)
    weights = _grouped(v[:, None], storage)
    if storage.whole:
        weights = np.broadcast_to(_grouped(np.repeat(v[:, None], W.shape[1], axis=1), storage), blocks.shape)
    scales0, zeros0 = _reaching(blocks, storage)
    factor = factor_of(scales0, storage.scale)
    best = np.full(scales0.shape, np.inf)
    scales, zeros = scales0.copy(), None if zeros0 is None else zeros0.copy()
    signs = _SIGNS if storage.signed else (1.0,)
    for shrink in _SHRINKS if storage.bits < 8 else _SHRINKS[:1]:
        for sign in signs:
            trial = round_scales(scales0 * (sign * shrink), storage.scale, factor)
            if zeros0 is not None:  # where the range lies moves with it
                zero = np.clip(np.rint(-_low(blocks) * shrink / trial), 0, storage.high)
            else:
                zero = None
            lost = _lost(blocks, weights, storage, trial, zero)
            better = lost < best
            best = np.where(better, lost, best)
            scales = np.where(better, trial, scales)
            if zero is not None and zeros is not None:
                zeros = np.where(better, zero, zeros)
    fitted = round_scales(_fitted(blocks, weights, storage, scales, zeros), storage.scale, factor)
    lost = _lost(blocks, weights, storage, fitted, zeros)
    return np.where(lost < best, fitted, scales), zeros, factor


def encode(W: Array, storage: Storage, scales: Array, zeros: Array | None, factor: float = 1.0) -> Coded:
    """The nearest codes for given scales and zero points."""
    made = Coded(storage, np.zeros(W.shape, np.int16), scales, zeros, _levels(storage), factor)
    u = W / made._spread(scales)
    if zeros is not None:
        u = u + made._spread(zeros)
    return replace(made, codes=nearest(u, storage, made.levels))


def nearest(u: Array, storage: Storage, levels: Array | None) -> Array:
    """Codes of numbers that are divided by their scale already."""
    if levels is None:
        return np.clip(np.rint(u), storage.low, storage.high).astype(np.int16)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, u).astype(np.int16)


def _snapped(u: Array, storage: Storage) -> Array:
    """The levels themselves."""
    levels = _levels(storage)
    codes = nearest(u, storage, levels)
    return codes if levels is None else levels[codes]


def _levels(storage: Storage) -> Array | None:
    return np.array(storage.levels) if storage.levels else None


def _grouped(W: Array, storage: Storage) -> Array:
    """(groups, rows of a group, N), padded by zeros, which every type codes without loss or which count nothing."""
    if storage.whole:
        return W.reshape(1, -1, 1)
    K, N = W.shape
    size = storage.group or K
    short = -K % size
    if short:
        W = np.concatenate([W, np.zeros((short, N))])
    return W.reshape(-1, size, N)


def _low(blocks: Array) -> Array:
    low: Array = np.minimum(blocks.min(axis=1), 0.0)
    return low


def _reaching(blocks: Array, storage: Storage) -> tuple[Array, Array | None]:
    if storage.zero_points:
        low, high = _low(blocks), np.maximum(blocks.max(axis=1), 0.0)
        scales = np.maximum((high - low) / storage.reach, SMALLEST)
        return scales, np.clip(np.rint(-low / scales), 0, storage.high)
    if len(storage.levels) == 2:  # of signs the mean loses least
        return np.maximum(np.abs(blocks).mean(axis=1), SMALLEST), None
    return np.maximum(np.abs(blocks).max(axis=1) / storage.reach, SMALLEST), None


def _lost(blocks: Array, weights: Array, storage: Storage, scales: Array, zeros: Array | None) -> Array:
    zero = 0.0 if zeros is None else zeros[:, None]
    levels = _snapped(blocks / scales[:, None] + zero, storage) - zero
    lost: Array = np.sum(weights * np.square(blocks - scales[:, None] * levels), axis=1)
    return lost


def _fitted(blocks: Array, weights: Array, storage: Storage, scales: Array, zeros: Array | None) -> Array:
    zero = 0.0 if zeros is None else zeros[:, None]
    levels = _snapped(blocks / scales[:, None] + zero, storage) - zero
    above, below = np.sum(weights * blocks * levels, axis=1), np.sum(weights * levels * levels, axis=1)
    return np.where((below > 0) & (above != 0), above / np.where(below > 0, below, 1.0), scales)
