"""Queries and keys, scores q k^T: per key head q' = q A, k' = k B, both (s, r). With Q = sum of E[q q^T] over the queries that share the key
and cov(k) = T T^T: A = T V, B = T^-T V, V the leading eigenvectors of T^T Q T; lost is the sum of the others. The covariance, because
a softmax does not see what is the same for all keys. Each pair of columns is scaled so that q' and k' vary alike.

Behind a rotary embedding, scores q R k^T, R of planes turned by their position: r/2 whole planes are kept, the same of all heads of a
layer, because cos and sin, which all layers and heads share, are cut by one Gather each (the only nodes that slicing adds). Averaged over
angles planes do not mix, and what a plane p adds to the squared scores is sum over the heads of E|q_p|^2 E|k_p|^2 / 2: those that add
least go. Where the reaction is known they go one by one, each time the one whose loss from the queries moves the outputs least.
"""

from __future__ import annotations

import numpy as np

from lrcompile.interfaces import Array, Factors, StatisticsSource, Weights
from lrcompile.records import Group, InputStatistics, Width
from lrcompile.spectra import eigh
from lrcompile_passes._slicing.moments import claim, known_of, mix, moves, reaction_of, seen

# Eigenvalues of the keys' covariance below this share of the largest are raised to it before the root is inverted.
_FLOOR = 1e-10


def claims(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> tuple[float, float | None]:
    """The relative error at this width, and how far it is predicted to move the model's outputs, where that is known."""
    if width.planes:
        return claim(_turned(group, width, weights, statistics), rank // 2)
    return claim(_planes(group, width, weights, statistics), rank)


def _planes(group: Group, width: Width, weights: Weights, statistics: StatisticsSource) -> Factors:
    """a, b (heads, s, s), whose leading r columns are A and B of rank r; lost (s + 1,), the relative squared loss of rank r."""

    def compute() -> Factors:
        query, key = group.sites
        s, asked = width.size, known_of(query, statistics)
        Q = _second_of_output(weights.matrix(query), weights.bias(query), asked)
        Wk = weights.matrix(key)
        K = Wk.T @ known_of(key, statistics).centred @ Wk
        made: list[tuple[Array, Array]] = []
        lost, total = np.zeros(s + 1), 0.0
        for head in range(width.heads):
            rows = slice(head * s, (head + 1) * s)
            shared = np.zeros((s, s))
            for reader in range(head * width.repeat, (head + 1) * width.repeat):
                columns = slice(reader * s, (reader + 1) * s)
                shared += Q[columns, columns]
            total += float(np.vdot(shared, K[rows, rows]))
            values, vectors = eigh(K[rows, rows])
            root = np.sqrt(np.maximum(values, _FLOOR * max(values[0], np.finfo(np.float64).tiny)))
            T, inverse = vectors * root, vectors / root
            energy, V = eigh(T.T @ shared @ T)
            lost[:-1] += np.cumsum(energy[::-1])[::-1]
            alike = (
                np.maximum(energy / width.repeat, _FLOOR * max(energy[0], np.finfo(np.float64).tiny)) ** 0.25
            )
            made.append((T @ V / alike, inverse @ V * alike))
        a, b = (np.array(m) for m in zip(*made, strict=True))
        found = {"a": a, "b": b, "lost": lost / max(total, np.finfo(np.float64).tiny)}
        if (reaction := reaction_of(query, weights, statistics)) is None:
            return found
        Wq = weights.matrix(query)
        movement = np.zeros(s + 1)
        for r in range(s):  # q' k'^T = (q A B^T) k^T: as if the queries alone had erred
            gone = np.repeat(np.eye(s) - a[:, :, :r] @ b[:, :, :r].transpose(0, 2, 1), width.repeat, axis=0)
            movement[r] = moves(mix(Wq, gone), *reaction)
        return {**found, "movement": movement}

    return weights.remember(("slicing", "planes-2", *seen(group, weights, statistics)), compute)


def _second_of_output(W: Array, bias: Array | None, known: InputStatistics) -> Array:
    """E[y y^T] (N, N) of y = x W + b."""
    assert known.second is not None and known.mean is not None
    moment: Array = W.T @ known.second @ W
    if bias is None:
        return moment
    mixed = np.outer(known.mean @ W, bias)
    moment += mixed + mixed.T + np.outer(bias, bias)
    return moment


def _turned(group: Group, width: Width, weights: Weights, statistics: StatisticsSource) -> Factors:
    """order (s/2,): the planes, those that go last first; lost (s/2 + 1,), the relative squared loss of keeping the first of them."""

    def compute() -> Factors:
        query = group.sites[0]
        asked, heard = (
            _squares(weights.matrix(s), weights.bias(s), known_of(s, statistics))
            .reshape(width.heads, -1, 2, width.size // 2)
            .sum(axis=2)
            for s in group.sites
        )
        energy = np.einsum("hrp,hp->p", asked, heard[:, 0])
        reaction = reaction_of(query, weights, statistics)
        if reaction is None:
            order, _ = _least(np.diag(energy))
        else:
            (C, G), W = reaction, weights.matrix(query)
            felt = ((W.T @ C @ W) * G.T).reshape(-1, width.size // 2, len(G))
            felt = felt.sum(axis=0).reshape(width.size // 2, -1, width.size // 2).sum(axis=1)
            order, movement = _least(felt)
        lost = np.concatenate([np.cumsum(energy[order][::-1])[::-1], [0.0]])
        found = {"order": order, "lost": lost / max(float(energy.sum()), np.finfo(np.float64).tiny)}
        return found if reaction is None else {**found, "movement": movement}

    return weights.remember(("slicing", "turned-1", *seen(group, weights, statistics)), compute)


def _squares(W: Array, bias: Array | None, known: InputStatistics) -> Array:
    """E[y^2] (N,) of y = x W + b."""
    assert known.second is not None and known.mean is not None
    found: Array = np.einsum("kn,kn->n", W, known.second @ W)
    return found if bias is None else found + bias * (2.0 * (known.mean @ W) + bias)


def _least(T: Array) -> tuple[Array, Array]:
    """Which go last first, and what keeping the first r costs: the sum of T over the rows and columns of those that went."""
    gone: list[int] = []
    costs = [0.0]
    steps = np.diagonal(T).copy()
    for _ in range(len(T)):
        j = int(np.argmin(steps))
        costs.append(costs[-1] + float(steps[j]))
        gone.append(j)
        steps += T[:, j] + T[j]
        steps[j] = np.inf
    return np.array(gone[::-1]), np.array(costs[::-1])


def _cut_planes(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> Factors:
    planes = np.sort(_turned(group, width, weights, statistics)["order"][: rank // 2].astype(np.int64))
    kept = np.concatenate([planes, planes + width.size // 2])
    factors = {"kept": kept.astype(np.int32)}
    for i, site in enumerate(group.sites):
        columns = (np.arange(site.N // width.size)[:, None] * width.size + kept).reshape(-1)
        factors[f"weight.{i}"] = weights.matrix(site)[:, columns]
        if (bias := weights.bias(site)) is not None:
            factors[f"bias.{i}"] = bias[columns]
    return factors


def cut(group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int) -> Factors:
    if width.planes:
        return _cut_planes(group, width, weights, statistics, rank)
    query, key = group.sites
    planes = _planes(group, width, weights, statistics)
    A = np.repeat(planes["a"][:, :, :rank], width.repeat, axis=0)
    B = planes["b"][:, :, :rank]
    factors = {"kept": np.arange(rank, dtype=np.int32)}
    for i, (site, mixing) in enumerate(((query, A), (key, B))):
        factors[f"weight.{i}"] = mix(weights.matrix(site), mixing)
        if (bias := weights.bias(site)) is not None:
            factors[f"bias.{i}"] = mix(bias[None], mixing)[0]
    return factors
