"""TT-matrix: the weight as a tensor whose modes are digits of K and N, and that tensor as a train of small cores.

    paired    core_j [s_j, k_j, n_j, s_j+1]          the TT-matrix: one core for a digit of x and the same digit of y
    crossed   core_j [s_j, k_j, n_m-1-j, s_j+1]      digits of y in the opposite order
    split     core_j [s_j, k_j, s_j+1] .. core [s, n_j, s']   first all digits of x, then those of y

TT-SVD: split off one core after the other by truncated singular value decompositions of the unfoldings. With the singular values
of each unfolding of the weight itself  error^2 <= sum over cuts of the energy that is cut, and what is nearly a train comes out
within sqrt(cuts) of the best. Other moments than C = I commute with the one cut that parts x from y, in `split`: there
the truncation is whitened. Elsewhere the train is the start of a fit (`fitting`). `rounded` truncates a train that is there.

K and N are split into digits as even as their divisors allow. Where they allow little (primes) the weight is padded with zeros to a
larger K or N, if that makes the largest digit smaller by a quarter and the weight larger by at most 1/32.

Three paired cores at half the parameters of a trained weight take 24 to 32 times its multiplications: then a train is a file format,
and is offered folded (`networks`). At full rank it is exact.

Sources: Oseledets 2011 (TT-SVD, rounding); Novikov et al., Tensorizing Neural Networks, 2015 (TT-matrix).
Refuses tables, transposes, and groups of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg

from lrcompile.blocks import block_energy, divisors, fix_signs
from lrcompile.contraction import Axes, Network
from lrcompile.interfaces import Array, Factorization, Factors
from lrcompile.networks import NetworkFactorization, Structure
from lrcompile.weighing import Weighing, root

_CORES = (3, 4)  # that are offered; two paired cores are a sum of Kronecker products
_LARGEST_SMALLER, _MOST_ZEROS = 0.75, 1 / 32


class TensorTrain:
    """Structure k, n: digits; order."""

    name = "tt"
    exact_at_full_rank = True

    def structures(self, K: int, N: int) -> Sequence[Structure]:
        three, four = ((_digits(modes(K, d)), _digits(modes(N, d))) for d in _CORES)
        two = _digits(modes(K, 2)), _digits(modes(N, 2))
        found = [(three, "paired"), (three, "crossed"), (four, "paired"), (two, "split")]
        return [(("k", k), ("n", n), ("order", order)) for (k, n), order in found]

    def largest(self, K: int, N: int, structure: Structure) -> int:
        return max(_bonds(_shape(structure), K * N))

    def network(self, K: int, N: int, structure: Structure, rank: int) -> Network:
        groups, sizes = _groups(structure)
        bonds = _bonds(_shape(structure), rank)
        cores: list[Axes] = []
        for i, group in enumerate(groups):
            cores.append((*((f"s{i}",) if i else ()), *group, *((f"s{i + 1}",) if i < len(bonds) else ())))
        inputs, outputs = (tuple(a for a in sizes if a[0] == letter) for letter in "kn")
        sizes |= {f"s{i + 1}": s for i, s in enumerate(bonds)}
        made = Network(inputs, outputs, tuple(cores), sizes)
        larger = made.size(inputs), made.size(outputs)
        return made if larger == (K, N) else Network(inputs, outputs, tuple(cores), sizes, cropped=(K, N))

    def energy(self, W: Array, structure: Structure) -> Array:
        """The bound of TT-SVD: the sum over cuts of what each cuts off the weight itself."""
        tensor = _tensor(W, structure)
        energy = np.zeros(self.largest(W.shape[0], W.shape[1], structure) + 1)
        for cut in range(1, tensor.ndim):
            lost = block_energy(tensor.reshape(math.prod(tensor.shape[:cut]), -1), 1, 1)
            energy[: len(lost)] += lost
        return energy

    def decompose(self, W: Array, weighing: Weighing, structure: Structure) -> Factors:
        left, right = weighing.fitted
        found = {"energy": self.energy(W, structure)}
        if dict(structure)["order"] != "split" or left is None:
            return found
        return {**found, **_whitened(W, left, right)}

    def cores(self, W: Array, found: Factors, structure: Structure, rank: int) -> Sequence[Array]:
        if "a" in found:
            W = found["a"][:, :rank] @ found["b"][:rank]
        tensor = _tensor(W, structure)
        made = tt_svd(tensor, _bonds(tensor.shape, rank))
        _, sizes = _groups(structure)
        network = self.network(W.shape[0], W.shape[1], structure, rank)
        all_sizes = {**sizes, **network.sizes}
        return [
            core.reshape([all_sizes[a] for a in axes]) for core, axes in zip(made, network.cores, strict=True)
        ]


def tt_svd(tensor: Array, bonds: Sequence[int]) -> list[Array]:
    """Cores (s_j, m_j, s_j+1) of a tensor (m_0, m_1, ..), bonds s_1, s_2, ..; all but the last are orthogonal."""
    cores = []
    rest, before = tensor, 1
    for size, bond in zip(tensor.shape, bonds, strict=False):
        U, values, Vt = scipy.linalg.svd(
            rest.reshape(before * size, -1), full_matrices=False, check_finite=False
        )
        U, V = fix_signs(U[:, :bond], values[:bond, None] * Vt[:bond])
        cores.append(U.reshape(before, size, -1))
        rest, before = V, U.shape[1]
    cores.append(rest.reshape(before, tensor.shape[-1], 1))
    return cores


def rounded(cores: Sequence[Array], bonds: Sequence[int]) -> list[Array]:
    """The train with bonds no larger than these: orthogonalized from the right, then truncated from the left."""
    made = [core.copy() for core in cores]
    for i in range(len(made) - 1, 0, -1):
        s, m, t = made[i].shape
        q, r = scipy.linalg.qr(made[i].reshape(s, m * t).T, mode="economic", check_finite=False)
        made[i] = q.T.reshape(-1, m, t)
        made[i - 1] = np.tensordot(made[i - 1], r.T, axes=1)
    for i, bond in enumerate(bonds):
        s, m, t = made[i].shape
        U, values, Vt = scipy.linalg.svd(made[i].reshape(s * m, t), full_matrices=False, check_finite=False)
        U, V = fix_signs(U[:, :bond], values[:bond, None] * Vt[:bond])
        made[i] = U.reshape(s, m, -1)
        made[i + 1] = np.tensordot(V, made[i + 1], axes=1)
    return made


def modes(n: int, count: int) -> tuple[int, ...]:
    """Digits whose product is n, or a little more where that pays (see the header): as even as can be, the largest in the middle."""
    best = _even(n, count)
    if max(best) > 2 * n ** (1 / count):
        for larger in range(n + 1, n + int(n * _MOST_ZEROS) + 1):
            digits = _even(larger, count)
            if max(digits) < _LARGEST_SMALLER * max(best):
                best = digits
    return best


def _even(n: int, count: int) -> tuple[int, ...]:
    """Digits of n with the least sum, rising, but the largest one in the middle, where bonds on both sides share it."""

    def split(n: int, count: int) -> tuple[int, ...]:
        if count == 1:
            return (n,)
        near = sorted(divisors(n), key=lambda d: abs(math.log(d) - math.log(n) / count))[:3]
        found = [tuple(sorted((d, *split(n // d, count - 1)))) for d in near]
        return min(found, key=lambda digits: (sum(digits), digits))

    digits = sorted(split(n, count))
    return tuple(digits[i] for i in (*range(0, count, 2), *range(count - 1 - count % 2, 0, -2)))


def _whitened(W: Array, left: Array, right: Array | None) -> Factors:
    """a (K, m), b (m, N) whose leading parts are the best approximations of W under these moments."""
    S, R = root(left), root(right)
    assert S is not None
    felt = S.T @ W
    felt = felt if R is None else felt @ R
    _, _, Vt = np.linalg.svd(felt, full_matrices=False)
    V = Vt.T
    if R is None:
        return {"a": W @ V, "b": Vt}
    return {
        "a": W @ R @ V,
        "b": scipy.linalg.solve_triangular(R, V, lower=True, trans="T", check_finite=False).T,
    }


def _bonds(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """s_1, s_2, ..: at most the rank, and what a tensor of this shape can have at each cut."""
    found: list[int] = []
    before = 1
    for cut in range(1, len(shape)):
        before = min(rank, before * shape[cut - 1], math.prod(shape[cut:]))
        found.append(before)
    return tuple(found)


def _groups(structure: Structure) -> tuple[list[Axes], dict[str, int]]:
    """Which axes each core has beside its bonds, and their sizes."""
    named = dict(structure)
    k, n = (str(named[side]).split("x") for side in "kn")
    sizes = {f"k{i}": int(size) for i, size in enumerate(k)} | {
        f"n{i}": int(size) for i, size in enumerate(n)
    }
    ks, ns = ([a for a in sizes if a[0] == letter] for letter in "kn")
    if named["order"] == "split":
        return [(a,) for a in (*ks, *ns)], sizes
    return [
        (a, b) for a, b in zip(ks, ns if named["order"] == "paired" else reversed(ns), strict=True)
    ], sizes


def _shape(structure: Structure) -> tuple[int, ...]:
    groups, sizes = _groups(structure)
    return tuple(math.prod(sizes[a] for a in group) for group in groups)


def _tensor(W: Array, structure: Structure) -> Array:
    """The weight with one mode a core."""
    groups, sizes = _groups(structure)
    inputs, outputs = (math.prod(s for a, s in sizes.items() if a[0] == letter) for letter in "kn")
    padded = np.pad(W, ((0, inputs - W.shape[0]), (0, outputs - W.shape[1])))
    axes = list(sizes)
    order = [axes.index(a) for group in groups for a in group]
    return padded.reshape(list(sizes.values())).transpose(order).reshape(_shape(structure))


def _digits(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


factorizations: tuple[Factorization, ...] = (NetworkFactorization(TensorTrain()),)
