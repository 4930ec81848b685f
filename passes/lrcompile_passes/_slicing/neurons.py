"""FFN, y = h Wd + b, h (H,) = act(x Wu) (times x Wg): r of the H neurons are kept, set S. With M = E[h h^T] + eps I

    Wd' = M_SS^-1 M_S: Wd (r, D)          what is lost: tr (Wd - E Wd')^T M (Wd - E Wd'),  E (H, r) the columns S of I

What the others did is written into the rows that stay. S by backward elimination (optimal brain surgeon): with P = M_SS^-1 and the
refitted W' the next to go is the j of least |W'_j|^2 / P_jj, which is exactly what the loss grows by; then W' -= P_:j W'_j / P_jj and
P -= P_:j P_j: / P_jj. One sweep gives the nested order and the loss of every r. Neurons go one by one, chosen among the
cheapest of a block; the whole matrices follow a block at a time, so that the work is in matrix products: O(H^2 (H + D)).
Where down has a bias M is the covariance, and b' = b + m Wd - m_S Wd'. Where it is known how the model's outputs react (tr E^T C' E G,
G = R R^T) S is chosen by C' and Wd R. In the nested order L L^T = M gives what is lost at every r: the rows of L^T Wd beyond it.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, Factors, StatisticsSource, Weights
from lrcompile.records import Group, Width
from lrcompile_passes._slicing.moments import claim, known_of, reaction_of, ridged, seen, solve, total

# Added to the moment that an order is chosen by, of which few sequences tell, relative to its mean.
_WEIGHING_RIDGE = 1e-3
# Neurons that go before the whole matrices follow, at least, and among how many of the cheapest they are chosen.
_BLOCK, _POOL = 32, 256
# So many blocks at most: each copies a matrix of what is left.
_BLOCKS = 128


def claims(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> tuple[float, float | None]:
    """The relative error at this width, and how far it is predicted to move the model's outputs, where that is known."""
    return claim(_order(group, weights, statistics), rank)


def _hidden(group: Group, weights: Weights, statistics: StatisticsSource) -> Array:
    """M (H, H), what the last weight's rows are weighted with."""
    known = known_of(group.sites[-1], statistics)
    assert known.second is not None
    return ridged(known.second if weights.bias(group.sites[-1]) is None else known.centred)


def _order(group: Group, weights: Weights, statistics: StatisticsSource) -> Factors:
    """order (H,): the neurons, those that go last first; lost (H + 1,): the relative squared loss of keeping the first r of them."""

    def compute() -> Factors:
        down = group.sites[-1]
        W = weights.matrix(down)
        M, second = _hidden(group, weights, statistics), known_of(down, statistics).second
        assert second is not None
        reaction = reaction_of(down, weights, statistics)
        if reaction is None:
            order, lost = eliminate(M, W)
            return {"order": order, "lost": lost / total(W, second)}
        C, G = reaction
        C = C + _WEIGHING_RIDGE * float(np.trace(C)) / len(C) * np.eye(len(C))
        felt = W @ scipy.linalg.cholesky(G, lower=True)
        order, _ = eliminate(C, felt)
        return {
            "order": order,
            "lost": beyond(M, W, order) / total(W, second),
            "movement": beyond(C, felt, order),
        }

    return weights.remember(("slicing", "neurons-2", *seen(group, weights, statistics)), compute)


def beyond(M: Array, W: Array, order: Array) -> Array:
    """(H + 1,): what keeping the first r neurons of the order loses once these are refitted, M = L L^T, |rows of L^T W beyond r|^2."""
    L = scipy.linalg.cholesky(M[np.ix_(order, order)], lower=True)
    rows = np.sum((L.T @ W[order]) ** 2, axis=1)
    lost: Array = np.concatenate([np.cumsum(rows[::-1])[::-1], [0.0]])
    return lost


def eliminate(M: Array, W: Array) -> tuple[Array, Array]:
    """Backward elimination of the rows of W (H, D) under the moment M (H, H).

    Returns order (H,), those that go last first, and lost (H + 1,), what keeping the first r loses once the rest is refitted.
    """
    left = np.arange(len(M))
    P = scipy.linalg.lapack.dpotri(scipy.linalg.cholesky(M, lower=True), lower=1)[0]
    P = np.tril(P) + np.tril(P, -1).T
    W = W.copy()
    gone: list[int] = []
    steps: list[float] = []
    block = max(_BLOCK, -(-len(M) // _BLOCKS))
    while len(left):
        scores = np.einsum("ij,ij->i", W, W) / np.diagonal(P)
        pool = np.sort(np.argsort(scores, kind="stable")[: max(_POOL, 4 * block)])
        chosen = _cheapest(P[np.ix_(pool, pool)], W[pool] @ W[pool].T, min(block, len(left)), steps)
        out = pool[chosen]
        gone.extend(left[out])
        stay = np.delete(np.arange(len(left)), out)
        shares = np.linalg.solve(P[np.ix_(out, out)], P[np.ix_(out, stay)])
        W = W[stay] - shares.T @ W[out]
        P = P[np.ix_(stay, stay)] - P[np.ix_(stay, out)] @ shares
        left = left[stay]
    lost = np.concatenate([[0.0], np.cumsum(steps)])[::-1]
    return np.array(gone[::-1]), lost


def _cheapest(P: Array, G: Array, count: int, steps: list[float]) -> list[int]:
    """The next `count` to go, one by one, of a pool with the inverse P and the Gram G = W W^T; appends what each costs to steps."""
    alive = np.ones(len(P), dtype=bool)
    chosen = []
    for _ in range(count):
        diagonal = np.where(alive, np.diagonal(P), 1.0)
        scores = np.where(alive, np.maximum(np.diagonal(G), 0.0) / diagonal, np.inf)
        j = int(np.argmin(scores))
        steps.append(float(scores[j]))
        chosen.append(j)
        alive[j] = False
        u = P[:, j] / P[j, j]
        P = P - np.outer(u, P[j])
        mixed = np.outer(u, G[j])
        G = G - mixed - mixed.T + G[j, j] * np.outer(u, u)
    return chosen


def cut(group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int) -> Factors:
    *ups, down = group.sites
    kept = np.sort(_order(group, weights, statistics)["order"][:rank].astype(np.int64))
    factors: dict[str, Array] = {"kept": kept.astype(np.int32)}
    for i, up in enumerate(ups):
        factors[f"weight.{i}"] = weights.matrix(up)[:, kept]
        if (bias := weights.bias(up)) is not None:
            factors[f"bias.{i}"] = bias[kept]
    M, W = _hidden(group, weights, statistics), weights.matrix(down)
    cut = solve(M[np.ix_(kept, kept)], M[kept] @ W)
    factors[f"weight.{len(ups)}"] = cut
    if (bias := weights.bias(down)) is not None:
        mean = known_of(down, statistics).mean
        assert mean is not None
        factors[f"bias.{len(ups)}"] = bias + mean @ W - mean[kept] @ cut
    return factors
