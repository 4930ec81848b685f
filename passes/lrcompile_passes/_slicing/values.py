"""Values, y = z Wo + b, z the mixed values, per head z_h = p x Wv_h of size s: Wv_h' = Wv_h A_h, A_h (s, r). With C_h = S S^T the moment of
z_h and W_h = [Wo_j ..] (s, D) the rows of all heads that read it, A_h spans the best rank-r part A_h B = W_h V V^T of S^T W_h, which
needs no inverse: A_h = W_h W_h^T S U, U the leading eigenvectors of S^T W_h W_h^T S. Then all heads are refitted together,

    Wo' = (A^T C A)^-1 A^T C Wo,  A the block diagonal of the A_h,  b' = b + m (Wo - A Wo')
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, Factors, StatisticsSource, Weights
from lrcompile.records import Group, Width
from lrcompile.spectra import eigh, fix_signs
from lrcompile_passes._slicing.moments import (
    claim,
    known_of,
    mix,
    moves,
    reaction_of,
    ridged,
    seen,
    solve,
    total,
)


def claims(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> tuple[float, float | None]:
    """The relative error at this width, and how far it is predicted to move the model's outputs, where that is known."""
    key = ("slicing", f"values-2-{rank}", *seen(group, weights, statistics))
    return claim(weights.remember(key, lambda: _losses(group, width, weights, statistics, rank)), 0)


def _losses(group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int) -> Factors:
    cut, lost = _refit(group, width, weights, statistics, rank)
    site = group.sites[1]
    reaction = reaction_of(site, weights, statistics)
    if reaction is None:
        return {"lost": np.array([lost])}
    A = np.repeat(_bases(group, width, weights, statistics)[:, :, :rank], width.repeat, axis=0)
    rows = np.einsum("hsr,hrn->hsn", A, cut.reshape(len(A), rank, -1), optimize=True)
    gone = weights.matrix(site) - rows.reshape(-1, cut.shape[1])
    return {"lost": np.array([lost]), "movement": np.array([moves(gone, *reaction)])}


def _bases(group: Group, width: Width, weights: Weights, statistics: StatisticsSource) -> Array:
    """A (heads, s, s) with orthonormal columns: the leading r of each are A_h of rank r."""

    def compute() -> Factors:
        out, s = group.sites[1], width.size
        C, W = _mixed(group, weights, statistics), weights.matrix(out)
        made = []
        for head in range(width.heads):
            moment, gram = np.zeros((s, s)), np.zeros((s, s))
            for reader in range(head * width.repeat, (head + 1) * width.repeat):
                rows = slice(reader * s, (reader + 1) * s)
                moment += C[rows, rows]
                gram += W[rows] @ W[rows].T
            values, vectors = eigh(moment)
            S = vectors * np.sqrt(values)
            _, U = eigh(S.T @ gram @ S)
            made.append(fix_signs(scipy.linalg.qr(gram @ S @ U)[0]))
        return {"bases": np.array(made)}

    return weights.remember(("slicing", "bases-1", *seen(group, weights, statistics)), compute)["bases"]


def _mixed(group: Group, weights: Weights, statistics: StatisticsSource) -> Array:
    """C (heads * repeat * s,) squared: the moment of what the output weight reads."""
    known = known_of(group.sites[1], statistics)
    assert known.second is not None
    return known.second if weights.bias(group.sites[1]) is None else known.centred


def _refit(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> tuple[Array, float]:
    """Wo' (heads * repeat * r, D), all heads fitted together, and the relative squared loss that it leaves."""
    out = group.sites[1]
    C, W = _mixed(group, weights, statistics), weights.matrix(out)
    A = np.repeat(_bases(group, width, weights, statistics)[:, :, :rank], width.repeat, axis=0)
    right = np.concatenate([C[:, i * width.size : (i + 1) * width.size] @ a for i, a in enumerate(A)], axis=1)
    moment = _gather(A, right)
    wanted = right.T @ W
    cut = solve(ridged(moment), wanted)
    second = known_of(out, statistics).second
    assert second is not None
    lost = float(np.vdot(W, C @ W)) - 2.0 * float(np.vdot(wanted, cut)) + float(np.vdot(cut, moment @ cut))
    return cut, lost / total(W, second)


def _gather(A: Array, X: Array) -> Array:
    """A^T X for the block diagonal of A (heads, s, r)."""
    made: Array = np.einsum("hsr,hsn->hrn", A, X.reshape(*A.shape[:2], -1), optimize=True)
    return made.reshape(-1, X.shape[-1])


def cut(group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int) -> Factors:
    value, out = group.sites
    A = _bases(group, width, weights, statistics)[:, :, :rank]
    factors = {"kept": np.arange(rank, dtype=np.int32), "weight.0": mix(weights.matrix(value), A)}
    if (bias := weights.bias(value)) is not None:
        factors["bias.0"] = mix(bias[None], A)[0]
    cut, _ = _refit(group, width, weights, statistics, rank)
    factors["weight.1"] = cut
    if (bias := weights.bias(out)) is not None:
        mean = known_of(out, statistics).mean
        assert mean is not None
        short = mix(mean[None], np.repeat(A, width.repeat, axis=0))[0]
        factors["bias.1"] = bias + mean @ weights.matrix(out) - short @ cut
    return factors
