"""Low-rank corrections of a rounded weight: W ~ What + A B.

    plain        A B the leading part of E = W - What                                        (LQER)
    scaled       the same of diag(sqrt C_ii) E, scaled back                                   (L2QER)
    exact        argmin tr((E - A B)^T C (E - A B)):  B^T the leading eigenvectors of E^T C E, A = E B^T    (QERA, EoRA)
    two-sided    argmin tr((E - A B)^T C (E - A B) G):  the exact one of E R for G = R R^T, B turned back by R^-1
    alternating  What <- round(W - A B), A B <- exact of the rest                              (CALDERA, LPLR)

Sources: Zhang et al., LQER and QERA, 2024; Liu et al., EoRA, 2024; Saha et al., CALDERA, 2024.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array

KINDS = ("plain", "scaled", "exact")


def correction(
    E: Array, C: Array, rank: int, kind: str = "exact", G: Array | None = None
) -> tuple[Array, Array]:
    """A (K, r), B (r, N); B with orthonormal rows, or B R with G, which needs a Cholesky factor. Raises KeyError on an unknown kind."""
    if kind not in KINDS:
        raise KeyError(kind)
    R = None if G is None else scipy.linalg.cholesky(G, lower=True)
    M = E if R is None else E @ R
    if kind == "exact":
        V = _leading(M, C, rank)
    else:
        scales = np.sqrt(np.maximum(np.diagonal(C), 0.0)) if kind == "scaled" else np.ones(len(E))
        V = np.linalg.svd(scales[:, None] * M, full_matrices=False)[2][:rank].T
    V = V * np.where(V[np.abs(V).argmax(axis=0), np.arange(V.shape[1])] < 0, -1.0, 1.0)
    # A = M V is the best A for these rows whatever C is (projection form)
    return M @ V, V.T if R is None else scipy.linalg.solve_triangular(R, V, lower=True, trans="T").T


def _leading(E: Array, C: Array, rank: int) -> Array:
    """(N, r): the leading eigenvectors of E^T C E, by the smaller of two eigenproblems."""
    K, N = E.shape
    if N <= K:
        found: Array = _top(_inner(E, C), rank)
        return found
    outer, M = _outer(E, C)
    basis: Array = np.linalg.qr(M.T @ _top(outer, rank))[0]
    return basis


def _inner(E: Array, C: Array) -> Array:
    made: Array = E.T @ (C @ E)
    return 0.5 * (made + made.T)


def _outer(E: Array, C: Array) -> tuple[Array, Array]:
    """M M^T and M = C^(1/2) E."""
    values, Q = np.linalg.eigh(0.5 * (C + C.T))
    M: Array = np.sqrt(np.maximum(values, 0.0))[:, None] * (Q.T @ E)
    return M @ M.T, M


def _top(symmetric: Array, rank: int) -> Array:
    n = len(symmetric)
    _, V = scipy.linalg.eigh(symmetric, subset_by_index=(max(n - rank, 0), n - 1), check_finite=False)
    found: Array = V[:, ::-1]
    return found


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
