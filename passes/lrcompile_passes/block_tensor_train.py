"""Block tensor train: each block of the weight is of low rank, and what blocks have in common is none of the bonds' business.

    x (g, d),  y (a, beta):   What[g d, a beta] = sum_s R[g, d, beta, s] L[beta, g, s, a]      r (K b + N c) parameters and products

c input blocks of d = K / c, b output blocks, strided, of a = N / b; low rank is c = b = 1. Two cores in closed form: every block
(d, a) truncated under its own moments (`blocks`). More cores: L is, for each beta, a smaller weight that is taken apart alike,

    x (k_0 .. k_d-1),  y (n_0 .. n_d-1):   core_j [n_>j, k_<j | k_j s_j+1 | n_j s_j],   j = d - 1 .. 0

and all cores are then fitted to the whole moments by alternating least squares (`fitting`). At full rank it is exact.

Sources: Qiu et al., Compute Better Spent, 2024 (BTT, two cores); Dao et al., Monarch, 2022 (rank 1).
Refuses tables, transposes, and groups of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lrcompile.blocks import block_energy, block_svd, divisors, fix_signs, nearest_divisor
from lrcompile.contraction import Network
from lrcompile.interfaces import Array, Factorization, Factors
from lrcompile.networks import NetworkFactorization, Structure
from lrcompile.weighing import Weighing

# More blocks are slow: what is multiplied gets too small (docs/families.md).
_MOST_BLOCKS = 8


class BlockTensorTrain:
    """Cores over blocks of K and N; structure k=4x96, n=96x4: sizes of k_0 k_1 and n_0 n_1."""

    name = "btt"
    exact_at_full_rank = True

    def structures(self, K: int, N: int) -> Sequence[Structure]:
        few, fewer = _few(K), _few(N)
        pairs = [*zip(few, fewer, strict=False), (1, fewer[0]), (few[0], 1)]
        pairs.append((nearest_divisor(K, math.sqrt(K)), nearest_divisor(N, math.sqrt(N))))
        distinct = dict.fromkeys(pair for pair in pairs if pair != (1, 1)) or {(1, 1): None}
        two = [_structure((c, K // c), (N // b, b)) for c, b in distinct]
        c, b = few[0], fewer[0]
        three = K % (c * c) == 0 and N % (b * b) == 0 and c > 1 and b > 1
        return [*two, _structure((c, c, K // c**2), (N // b**2, b, b))] if three else two

    def largest(self, K: int, N: int, structure: Structure) -> int:
        return max(_bonds(*_sizes(structure), max(K, N)))

    def network(self, K: int, N: int, structure: Structure, rank: int) -> Network:
        k, n = _sizes(structure)
        bonds = _bonds(k, n, rank)
        last = len(k) - 1
        ks, ns = (tuple(f"{letter}{i}" for i in range(last + 1)) for letter in "kn")
        cores = []
        for j in range(last, -1, -1):
            before = (f"s{j + 1}",) if j < last else ()
            after = (f"s{j}",) if j else ()
            cores.append((*ns[j + 1 :], *ks[: j + 1], *before, ns[j], *after))
        sizes = {**dict(zip(ks, k, strict=True)), **dict(zip(ns, n, strict=True))}
        return Network(ks, ns, tuple(cores), {**sizes, **{f"s{j + 1}": s for j, s in enumerate(bonds)}})

    def energy(self, W: Array, structure: Structure) -> Array:
        """Two cores: exact. More: the sum over bonds of what each cuts off the weight itself, a bound as of TT-SVD."""
        k, n = _sizes(structure)
        return _summed([block_energy(W, math.prod(k[:j]), math.prod(n[j:])) for j in range(1, len(k))])

    def decompose(self, W: Array, weighing: Weighing, structure: Structure) -> Factors:
        k, n = _sizes(structure)
        found = block_svd(W, weighing, math.prod(k[:-1]), n[-1])
        more = [block_energy(W, math.prod(k[:j]), math.prod(n[j:])) for j in range(1, len(k) - 1)]
        return {**found, "energy": _summed([found["energy"], *more])}

    def cores(self, W: Array, found: Factors, structure: Structure, rank: int) -> Sequence[Array]:
        return _peeled(found, *_sizes(structure), rank)


def _peeled(found: Factors, k: tuple[int, ...], n: tuple[int, ...], rank: int) -> list[Array]:
    """The cores from the last to the first."""
    last = len(k) - 1
    bonds = _bonds(k, n, rank)
    s = bonds[last - 1]
    left = found["left"][..., :s]  # (k_<last, n_last, k_last, s)
    cores = [np.moveaxis(left, 1, 2).reshape(*k, n[last], s)]
    # rest: n_>j, k_0 .. k_j, s, n_0 .. n_j with j one less
    rest = np.moveaxis(found["right"][:, :, :s], 1, 0)
    for j in range(last - 1, 0, -1):
        outer, before, bond = n[j + 1 :], bonds[j], bonds[j - 1]
        grouped = rest.reshape(math.prod(outer), math.prod(k[:j]), k[j] * before, math.prod(n[:j]), n[j])
        U, values, Vt = np.linalg.svd(np.moveaxis(grouped, 4, 2), full_matrices=False)
        U, V = fix_signs(
            U, values[..., None] * Vt
        )  # (outer, k_<j, n_j, k_j s, m), (outer, k_<j, n_j, m, n_<j)
        core = np.moveaxis(U[..., :bond], 2, 3)
        cores.append(core.reshape(*outer, *k[: j + 1], before, n[j], bond))
        rest = np.moveaxis(V[..., :bond, :], 2, 0)  # n_j joins the outer axes, in front of them
    cores.append(rest.reshape(*n[1:], k[0], bonds[0], n[0]))
    return cores


def _few(n: int) -> list[int]:
    """At most three small divisors: the least, one about 4, the largest up to 8; [1] where there is none."""
    small = [i for i in divisors(n) if 1 < i <= _MOST_BLOCKS]
    if not small:
        return [1]
    return sorted({small[0], min(small, key=lambda i: (abs(i - 4), i)), small[-1]})


def _bonds(k: tuple[int, ...], n: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """s_1, s_2, ..: at most the rank, and what the matrix that each splits can have."""
    found: list[int] = []
    below = 1
    for j in range(len(k) - 1, 0, -1):
        below = min(rank, k[j] * below, math.prod(n[:j]))
        found.append(below)
    return tuple(reversed(found))


def _summed(curves: Sequence[Array]) -> Array:
    size = max(map(len, curves))
    found: Array = np.sum([np.pad(curve, (0, size - len(curve))) for curve in curves], axis=0)
    return found


def _structure(k: tuple[int, ...], n: tuple[int, ...]) -> Structure:
    return ("k", "x".join(map(str, k))), ("n", "x".join(map(str, n)))


def _sizes(structure: Structure) -> tuple[tuple[int, ...], tuple[int, ...]]:
    named = dict(structure)
    k, n = (tuple(int(i) for i in str(named[side]).split("x")) for side in "kn")
    return k, n


factorizations: tuple[Factorization, ...] = (NetworkFactorization(BlockTensorTrain()),)
