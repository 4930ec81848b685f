"""Orthogonal matrices that are products of small ones: Q = Q1 kron Q2 kron .., applied as a chain of small products.

x Q with x (.., K), K = k1 k2 ..: x is read as (.., k1, k2, ..) and each axis is multiplied by its own Q_i: K (k1 + k2 + ..) MACs a row
instead of K^2. Kinds: `hadamard` (+-1/sqrt 2 of order 2^n, the rest of K a random orthogonal matrix), `dct` (orthonormal DCT-II of each
factor), `random` (QR of Gaussians). Random signs before it make any of them typical for any input (randomised transforms).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import scipy.fft
import scipy.linalg

from lrcompile.interfaces import Array

KINDS = ("hadamard", "dct", "random")
_LARGEST = 64  # a factor is split while it is larger and can be


@dataclass(frozen=True, slots=True, eq=False)
class Orthogonal:
    """diag(signs) (Q1 kron Q2 kron ..)."""

    signs: Array
    factors: tuple[Array, ...]

    @property
    def size(self) -> int:
        return len(self.signs)

    @property
    def macs(self) -> int:
        """Of one row."""
        return self.size * sum(len(q) for q in self.factors)

    def apply(self, X: Array) -> Array:
        """X Q for X (.., K)."""
        return self._chain(X * self.signs, self.factors)

    def apply_transposed(self, X: Array) -> Array:
        """X Q^T."""
        made: Array = self._chain(X, [q.T for q in self.factors]) * self.signs
        return made

    def dense(self) -> Array:
        """Q itself, for tests."""
        return self.apply(np.eye(self.size))

    def _chain(self, X: Array, factors: tuple[Array, ...] | list[Array]) -> Array:
        sizes = [len(q) for q in factors]
        Y = X.reshape(-1, *sizes)
        for axis, q in enumerate(factors, start=1):
            Y = np.moveaxis(np.tensordot(Y, q, axes=(axis, 0)), -1, axis)
        return Y.reshape(X.shape)


def sizes_of(K: int) -> tuple[int, ...]:
    """K as a product of few factors near its root, each at most 64 where K allows it; (K,) when it is prime or small."""
    if K <= _LARGEST:
        return (K,)
    near = next((a for a in range(int(K**0.5), 1, -1) if K % a == 0), 1)
    if near == 1:
        return (K,)
    return (*sizes_of(near), *sizes_of(K // near))


def orthogonal(K: int, kind: str, seed: int) -> Orthogonal:
    """A fast orthogonal matrix of order K. Raises KeyError on an unknown kind."""
    rng = np.random.default_rng((seed, K))
    signs = rng.choice((-1.0, 1.0), K)
    if kind == "hadamard":
        two = K & -K
        sizes = [n for n in (K // two,) if n > 1]
        while two > 1:  # Hadamard matrices of order at most 16, whose Kronecker product is the large one
            sizes.append(min(two, 16))
            two //= sizes[-1]
        factors = [
            scipy.linalg.hadamard(n) / np.sqrt(n) if n & (n - 1) == 0 else _random(n, rng) for n in sizes
        ]
    elif kind == "dct":
        factors = [scipy.fft.dct(np.eye(n), axis=1, norm="ortho") for n in sizes_of(K)]
    elif kind == "random":
        factors = [_random(n, rng) for n in sizes_of(K)]
    else:
        raise KeyError(kind)
    made = tuple(f.astype(np.float64) for f in factors) or (np.ones((1, 1)),)
    assert prod(len(f) for f in made) == K
    return Orthogonal(signs, made)


def _random(n: int, rng: np.random.Generator) -> Array:
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
