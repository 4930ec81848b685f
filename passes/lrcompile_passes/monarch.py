"""Monarch matrices: two block-diagonal matrices with a permutation between them.

    x (g, d),  y (a, beta):   What[g d, a beta] = R[g, d, beta] L[beta, g, a]      K b + N c parameters and products

c input blocks of d = K / c, b output blocks, strided, of a = N / b. Every block (d, a) of the weight is of rank one, so the
projection is a batch of best rank-one approximations, each under its own moments (`blocks`), then fitted to the whole ones
(`fitting`). There is no rank: more blocks are a finer form. It is the block tensor train of rank 1.

Source: Dao et al., Monarch, 2022.
Refuses tables, transposes, and groups of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrcompile.blocks import block_energy, block_svd, divisors, nearest_divisor
from lrcompile.contraction import Network
from lrcompile.interfaces import Array, Factorization, Factors
from lrcompile.networks import NetworkFactorization, Structure
from lrcompile.weighing import Weighing

_MOST = 5  # structures of a weight


class Monarch:
    """Two block-diagonal matrices; structure c, b: how many blocks each has."""

    name = "monarch"
    exact_at_full_rank = False

    def structures(self, K: int, N: int) -> Sequence[Structure]:
        """From near-square blocks on ever more of them, as long as they save something."""
        first = nearest_divisor(K, math.sqrt(K)), nearest_divisor(N, math.sqrt(N))
        alike = [(i, i) for i in divisors(math.gcd(K, N)) if i > first[0] and 2 * i * (K + N) < 2 * K * N]
        found = [p for p in dict.fromkeys([first, *alike]) if p != (1, 1)]
        step = max(1, math.ceil(len(found) / _MOST))
        return [(("c", c), ("b", b)) for c, b in found[::step]]

    def largest(self, K: int, N: int, structure: Structure) -> int:
        return 1

    def network(self, K: int, N: int, structure: Structure, rank: int) -> Network:
        c, b = _blocks(structure)
        sizes = {"k0": c, "k1": K // c, "n0": N // b, "n1": b}
        return Network(("k0", "k1"), ("n0", "n1"), (("k0", "k1", "n1"), ("n1", "k0", "n0")), sizes)

    def energy(self, W: Array, structure: Structure) -> Array:
        return block_energy(W, *_blocks(structure))[:2]

    def decompose(self, W: Array, weighing: Weighing, structure: Structure) -> Factors:
        found = block_svd(W, weighing, *_blocks(structure))
        return {
            "left": found["left"][..., 0],
            "right": found["right"][..., 0, :],
            "energy": found["energy"][:2],
        }

    def cores(self, W: Array, found: Factors, structure: Structure, rank: int) -> Sequence[Array]:
        return found["left"].transpose(0, 2, 1), found["right"].transpose(1, 0, 2)


def _blocks(structure: Structure) -> tuple[int, int]:
    named = dict(structure)
    return int(named["c"]), int(named["b"])


factorizations: tuple[Factorization, ...] = (NetworkFactorization(Monarch()),)
