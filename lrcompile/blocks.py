"""Blocks of a weight, each by itself of low rank under its own share of what counts: batched closed forms. Pure.

x index (g, d), y index (a, beta): c input blocks of d neighbours, b output blocks of every b-th column. Of block M (d, a):

    S^T M R = U s V^T,  S S^T = C[g, g],  R R^T = G[beta, beta]      left = S^-T U (d, m),  right = s V^T R^-1 (m, a)

Truncated to r it is the best under these blocks of C and G; what blocks lose together stands outside of them.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, Factors
from lrcompile.weighing import Weighing, root


def block_svd(W: Array, weighing: Weighing, c: int, b: int) -> Factors:
    """left (c, b, d, m), right (c, b, m, a), and energy (m + 1,): what is lost at rank 0, 1, .., m of each, in all."""
    (K, N), (C, G) = W.shape, weighing.fitted
    d, a = K // c, N // b
    M = W.reshape(c, d, a, b).transpose(0, 3, 1, 2)
    S = [root(None if C is None else C[g * d : (g + 1) * d, g * d : (g + 1) * d]) for g in range(c)]
    R = [root(None if G is None else G[beta::b, beta::b]) for beta in range(b)]
    felt = np.empty_like(M)
    for g in range(c):
        for beta in range(b):
            block = M[g, beta] if (s := S[g]) is None else s.T @ M[g, beta]
            felt[g, beta] = block if (r := R[beta]) is None else block @ r
    U, values, Vt = np.linalg.svd(felt, full_matrices=False)
    left, right = fix_signs(U, values[..., None] * Vt)
    for g in range(c):
        for beta in range(b):
            if (s := S[g]) is not None:
                left[g, beta] = scipy.linalg.solve_triangular(s, left[g, beta], lower=True, trans="T")
            if (r := R[beta]) is not None:
                right[g, beta] = scipy.linalg.solve_triangular(r, right[g, beta].T, lower=True, trans="T").T
    return {"left": left, "right": right, "energy": tails(np.sum(values**2, axis=(0, 1)))}


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
