"""Blocks of a weight, each by itself of low rank under its own share of what counts: batched closed forms. Pure.

x index (g, d), y index (a, beta): c input blocks of d neighbours, b output blocks of every b-th column. Of block M (d, a):

    S^T M R = U s V^T,  S S^T = C[g, g],  R R^T = G[beta, beta]      left = S^-T U (d, m),  right = s V^T R^-1 (m, a)

Truncated to r it is the best under these blocks of C and G; what blocks lose together stands outside of them.
"""

from __future__ import annotations

import math

import numpy as np

from lrcompile.interfaces import Array, Factors
from lrcompile.weighing import Weighing


def block_svd(W: Array, weighing: Weighing, c: int, b: int) -> Factors:
    """left (c, b, d, m), right (c, b, m, a), and energy (m + 1,): what is lost at rank 0, 1, .., m of each, in all."""
    (K, N), (C, G) = W.shape, weighing.fitted
    d, a = K // c, N // b
    M = _blocks(W, c, b)
    felt, back, forth = M, None, None
    if C is not None:
        at = np.arange(c)
        S = np.linalg.cholesky(C.reshape(c, d, c, d)[at, :, at])
        felt, back = np.swapaxes(S, 1, 2)[:, None] @ felt, np.swapaxes(np.linalg.inv(S), 1, 2)[:, None]
    if G is not None:
        at = np.arange(b)
        R = np.linalg.cholesky(G.reshape(a, b, a, b)[:, at, :, at])
        felt, forth = felt @ R, np.linalg.inv(R)
    U, values, Vt = np.linalg.svd(felt, full_matrices=False)
    left, right = fix_signs(U, values[..., None] * Vt)
    return {
        "left": left if back is None else back @ left,
        "right": right if forth is None else right @ forth,
        "energy": tails(np.sum(values**2, axis=(0, 1))),
    }


def block_energy(W: Array, c: int, b: int) -> Array:
    """The energy of `block_svd` for C = G = I, from Gram matrices: exact to about 1e-16 of all of it."""
    M = _blocks(W, c, b)
    T = np.swapaxes(M, 2, 3)
    gram = M @ T if M.shape[2] <= M.shape[3] else T @ M
    return tails(np.maximum(np.linalg.eigvalsh(gram), 0.0).sum(axis=(0, 1))[::-1])


def _blocks(W: Array, c: int, b: int) -> Array:
    """(c, b, d, a)."""
    K, N = W.shape
    return W.reshape(c, K // c, N // b, b).transpose(0, 3, 1, 2)


def fix_signs(U: Array, V: Array) -> tuple[Array, Array]:
    """U (.., d, m) with the largest entry of each column positive, V (.., m, a) to match: LAPACK leaves signs to chance."""
    at = np.abs(U).argmax(axis=-2)[..., None, :]
    signs = np.where(np.take_along_axis(U, at, axis=-2) < 0, -1.0, 1.0)
    return U * signs, V * np.swapaxes(signs, -1, -2)


def tails(energy: Array) -> Array:
    """(m + 1,): what is lost at rank 0, 1, .., m of squared singular values (m,)."""
    found: Array = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
    return found


def divisors(n: int) -> list[int]:
    """All of them, rising."""
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *(n // i for i in low)})


def nearest_divisor(n: int, wanted: float) -> int:
    """The divisor closest to `wanted` in ratio, the smaller of two."""
    return min(divisors(n), key=lambda i: (abs(math.log(i / wanted)), i))
