"""Sums of Kronecker products.

    What = sum_s A_s (x) B_s,   A (k_0, n_0), B (k_1, n_1),   K = k_0 k_1, N = n_0 n_1      r (k_0 n_0 + k_1 n_1) parameters

Van Loan: the rearranged weight W[(k_0 n_0), (k_1 n_1)] has rank r exactly when W is such a sum, so its truncated singular value
decomposition is the best one for C = I. Under other moments there is no closed form: it is the start of a fit (`fitting`).
Cheap in parameters, dear in multiplications: r (k_0 k_1 n_1 + n_1 k_0 n_0) a row in the better order, so with near-square cores
of a d x d weight break-even is at r = d / 2 in parameters, at sqrt(d) / 2 in products. It is the tensor train of two cores.

Source: Van Loan and Pitsianis 1993.
Refuses tables, transposes, and groups of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lrcompile.blocks import block_energy, fix_signs, nearest_divisor, tails
from lrcompile.contraction import Network
from lrcompile.interfaces import Array, Factorization, Factors
from lrcompile.networks import NetworkFactorization, Structure
from lrcompile.weighing import Weighing

_SMALL = 4


class Kronecker:
    """Structure k0, n0: the size of A."""

    name = "kronecker"
    exact_at_full_rank = False  # the rank may have to be larger than that of a matrix

    def structures(self, K: int, N: int) -> Sequence[Structure]:
        """Near-square A and B; one of them small."""
        k, n = nearest_divisor(K, math.sqrt(K)), nearest_divisor(N, math.sqrt(N))
        few, fewer = nearest_divisor(K, _SMALL), nearest_divisor(N, _SMALL)
        sizes = dict.fromkeys([(k, n), (few, fewer), (K // few, N // fewer)])
        return [(("k0", a), ("n0", b)) for a, b in sizes if 1 < a * b < K * N]

    def largest(self, K: int, N: int, structure: Structure) -> int:
        k0, n0 = _first(structure)
        return min(k0 * n0, K * N // (k0 * n0))

    def network(self, K: int, N: int, structure: Structure, rank: int) -> Network:
        k0, n0 = _first(structure)
        sizes = {"k0": k0, "k1": K // k0, "n0": n0, "n1": N // n0, "s": rank}
        return Network(("k0", "k1"), ("n0", "n1"), (("k0", "n0", "s"), ("s", "k1", "n1")), sizes)

    def energy(self, W: Array, structure: Structure) -> Array:
        return block_energy(_rearranged(W, structure), 1, 1)

    def decompose(self, W: Array, weighing: Weighing, structure: Structure) -> Factors:
        U, values, Vt = np.linalg.svd(_rearranged(W, structure), full_matrices=False)
        half = np.sqrt(values)
        left, right = fix_signs(U * half, half[:, None] * Vt)
        return {"left": left, "right": right, "energy": tails(values**2)}

    def cores(self, W: Array, found: Factors, structure: Structure, rank: int) -> Sequence[Array]:
        (K, N), (k0, n0) = W.shape, _first(structure)
        a, b = found["left"][:, :rank], found["right"][:rank]
        return a.reshape(k0, n0, rank), b.reshape(rank, K // k0, N // n0)


def _rearranged(W: Array, structure: Structure) -> Array:
    """W[(k_0 n_0), (k_1 n_1)]."""
    (K, N), (k0, n0) = W.shape, _first(structure)
    return W.reshape(k0, K // k0, n0, N // n0).transpose(0, 2, 1, 3).reshape(k0 * n0, -1)


def _first(structure: Structure) -> tuple[int, int]:
    named = dict(structure)
    return int(named["k0"]), int(named["n0"])


factorizations: tuple[Factorization, ...] = (NetworkFactorization(Kronecker()),)
