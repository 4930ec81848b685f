"""Low-rank corrections of a rounded weight: W ~ What + A B.

    plain        A B the leading part of E = W - What                                        (LQER)
    scaled       the same of diag(sqrt C_ii) E, scaled back                                   (L2QER)
    exact        argmin tr((E - A B)^T C (E - A B)):  B^T the leading eigenvectors of E^T C E, A = E B^T    (QERA, EoRA)
    alternating  What <- round(W - A B), A B <- exact of the rest                              (CALDERA, LPLR)

Sources: Zhang et al., LQER and QERA, 2024; Liu et al., EoRA, 2024; Saha et al., CALDERA, 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lrcompile.interfaces import Array

KINDS = ("plain", "scaled", "exact")


def correction(E: Array, C: Array, rank: int, kind: str = "exact") -> tuple[Array, Array]:
    """A (K, r), B (r, N), B with orthonormal rows. Raises KeyError on an unknown kind."""
    if kind == "plain":
        weighted = E
    elif kind == "scaled":
        weighted = np.sqrt(np.maximum(np.diagonal(C), 0.0))[:, None] * E
    elif kind == "exact":
        _, V = np.linalg.eigh(E.T @ (C @ E))
        return _projected(E, V[:, ::-1][:, :rank])
    else:
        raise KeyError(kind)
    # A = E B^T is the best A for this B whatever C is (projection form)
    return _projected(E, np.linalg.svd(weighted, full_matrices=False)[2][:rank].T)


def _projected(E: Array, V: Array) -> tuple[Array, Array]:
    V = V * np.where(V[np.abs(V).argmax(axis=0), np.arange(V.shape[1])] < 0, -1.0, 1.0)
    return E @ V, V.T


def alternating(
    W: Array, C: Array, rank: int, rounds: Callable[[Array], Array], times: int = 2
) -> tuple[Array, Array, Array]:
    """What, A, B of the turn that loses least; rounds: what a matrix becomes in its storage type."""
    low, best, kept = np.zeros_like(W), np.inf, None
    for _ in range(times):
        What = rounds(W - low)
        A, B = correction(W - What, C, rank)
        low = A @ B
        E = W - What - low
        if (lost := float(np.vdot(E, C @ E))) < best:
            best, kept = lost, (What, A, B)
    assert kept is not None
    return kept
