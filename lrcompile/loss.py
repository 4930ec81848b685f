"""How much of what a group computes its changed weights lose: the one meaning of "error".

For a lone weight ||S (W - What)|| / ||S W||, S S^T the second moment of its input (identity without data). Where a bias was
corrected the mean's share is gone, so the covariance stands above. For a group it is the error of what leaves it:

    shared, tied     root mean square of the readers' errors
    qkv, gate_up     of all outputs side by side
    up_down          of what the last weight makes of the hidden layer
    value_output     of z Wo, z the mixed values: with Wv' = Wv A a head, z' Wo' = z A Wo'
    query_key        of the scores q k^T before the softmax, which does not see what is the same for all keys: k is centred;
                     behind a rotary embedding of the scores q R k^T, on average over its angles, as if each of a head's planes were
                     turned by any angle alike and by itself: then planes do not mix, and k counts as it is, for its mean is turned too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lrcompile.interfaces import Array, Constant, StatisticsSource, Weights
from lrcompile.records import Group, InputStatistics, Site, Width

Changed = Mapping[Constant, Array]


def group_loss(
    group: Group, weights: Weights, statistics: StatisticsSource | None, changed: Changed
) -> float:
    """Relative error of the group with `changed` (what a factorization's `reconstruct` gives) in place of its constants."""
    if group.kind == "value_output":
        return _value_output(group, weights, statistics, changed)
    if group.kind == "query_key":
        return _query_key(group, weights, statistics, changed)
    sites = group.sites[-1:] if group.kind == "up_down" else group.sites
    pairs = [_site_loss(s, weights, statistics, changed) for s in sites]
    if group.shares_weight:
        return float(np.sqrt(np.mean([_ratio(lost, all_) ** 2 for lost, all_ in pairs])))
    return _ratio(sum(lost for lost, _ in pairs), sum(all_ for _, all_ in pairs))


def _ratio(lost: float, all_: float) -> float:
    return float(np.sqrt(max(lost, 0.0) / all_)) if all_ > 0 else 0.0


def _site_loss(
    site: Site, weights: Weights, statistics: StatisticsSource | None, changed: Changed
) -> tuple[float, float]:
    """What is lost of a site's output and all of it, both squared."""
    known = statistics.of(site) if statistics is not None else None
    W = weights.matrix(site)
    D = W - changed[site.name, "weight"] if (site.name, "weight") in changed else np.zeros_like(W)
    corrected = (site.name, "bias") in changed
    if site.window is None or site.window.group == 1:
        return _lost(D, W, known, corrected)
    return _lost_by_group(D, W, known, corrected, site.window.group)


def _lost(D: Array, W: Array, known: InputStatistics | None, corrected: bool) -> tuple[float, float]:
    if known is None:
        return float(np.vdot(D, D)), float(np.vdot(W, W))
    if known.frequencies is not None:
        return (
            float(known.frequencies @ np.einsum("ij,ij->i", D, D)),
            float(known.frequencies @ np.einsum("ij,ij->i", W, W)),
        )
    assert known.second is not None
    above = known.centred if corrected else known.second
    return float(np.vdot(D, above @ D)), float(np.vdot(W, known.second @ W))


def _lost_by_group(
    D: Array, W: Array, known: InputStatistics | None, corrected: bool, groups: int
) -> tuple[float, float]:
    """Of a Conv with groups: each has its own columns and its own moment."""
    if known is None:
        return _lost(D, W, None, corrected)
    assert known.second is not None and known.mean is not None
    lost = all_ = 0.0
    for i, (d, w) in enumerate(zip(np.split(D, groups, axis=1), np.split(W, groups, axis=1), strict=True)):
        part = replace(known, second=known.second[i], mean=known.mean[i])
        a, b = _lost(d, w, part, corrected)
        lost, all_ = lost + a, all_ + b
    return lost, all_


def _value_output(
    group: Group, weights: Weights, statistics: StatisticsSource | None, changed: Changed
) -> float:
    value, out = group.sites
    width = group.width
    assert width is not None
    Wv, cut, Wo = weights.matrix(value), changed[value.name, "weight"], weights.matrix(out)
    kept = changed[out.name, "weight"]
    effective = np.empty_like(Wo)
    s = width.size
    for head in range(width.heads):
        columns = slice(head * s, (head + 1) * s)
        A = np.linalg.lstsq(Wv[:, columns], cut[:, columns], rcond=None)[0]
        for reader in range(head * width.repeat, (head + 1) * width.repeat):
            rows = slice(reader * s, (reader + 1) * s)
            effective[rows] = A @ kept[rows]
    known = statistics.of(out) if statistics is not None else None
    return _ratio(*_lost(Wo - effective, Wo, known, (out.name, "bias") in changed))


def _query_key(
    group: Group, weights: Weights, statistics: StatisticsSource | None, changed: Changed
) -> float:
    query, key = group.sites
    width = group.width
    assert width is not None
    if width.planes:
        return _turned_scores(group, width, weights, statistics, changed)
    known = statistics.of(query) if statistics is not None else None
    heard = statistics.of(key) if statistics is not None else None
    Wq, Wk = weights.matrix(query), weights.matrix(key)
    cut_q, cut_k = changed[query.name, "weight"], changed[key.name, "weight"]
    Sq, Sk = second_of_output(Wq, weights.bias(query), known), covariance_of_output(Wk, heard)
    lost = all_ = 0.0
    s = width.size
    for head in range(width.heads):
        rows = slice(head * s, (head + 1) * s)
        B = np.linalg.lstsq(Wk[:, rows], cut_k[:, rows], rcond=None)[0]
        for reader in range(head * width.repeat, (head + 1) * width.repeat):
            columns = slice(reader * s, (reader + 1) * s)
            A = np.linalg.lstsq(Wq[:, columns], cut_q[:, columns], rcond=None)[0]
            E = np.eye(s) - A @ B.T
            lost += float(np.sum((Sq[columns, columns] @ E) * (E @ Sk[rows, rows])))
            all_ += float(np.sum(Sq[columns, columns] * Sk[rows, rows]))
    return _ratio(lost, all_)


def _turned_scores(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource | None, changed: Changed
) -> float:
    """Of a plane's q, k and changed q', k' (2,): E |q R k^T - q' R k'^T|^2, R any rotation, is half of

    tr X^T X' + tr X^T J X' J^T,  X, X' (4, 4) the moments of (q, -q') and (k, k'),  J two quarter turns
    """
    query, key = group.sites
    J = np.kron(np.eye(2), np.array([[0.0, 1.0], [-1.0, 0.0]]))
    signs = np.array([1.0, 1.0, -1.0, -1.0])
    lost = all_ = 0.0
    for head in range(width.heads):
        K = _moments_of_planes(key, head, width, weights, statistics, changed)
        for reader in range(head * width.repeat, (head + 1) * width.repeat):
            Q = _moments_of_planes(query, reader, width, weights, statistics, changed)
            lost += float(np.sum(Q * np.outer(signs, signs) * (K + J @ K @ J.T)))
            all_ += float(np.sum(_trace_of_first(Q) * _trace_of_first(K)))
    return _ratio(lost, all_)


def _moments_of_planes(
    site: Site,
    head: int,
    width: Width,
    weights: Weights,
    statistics: StatisticsSource | None,
    changed: Changed,
) -> Array:
    """(planes, 4, 4): of a head's numbers in a plane, before and after the change."""
    columns = slice(head * width.size, (head + 1) * width.size)
    W, b = weights.matrix(site), weights.bias(site)
    both = np.hstack([W[:, columns], changed[site.name, "weight"][:, columns]])
    shifts = None
    if b is not None:
        shifts = np.concatenate([b[columns], changed.get((site.name, "bias"), b)[columns]])
    known = statistics.of(site) if statistics is not None else None
    half = width.size // 2
    at = np.arange(half)[:, None] + half * np.arange(4)
    moments: Array = second_of_output(both, shifts, known)[at[:, :, None], at[:, None, :]]
    return moments


def _trace_of_first(moments: Array) -> Array:
    found: Array = np.trace(moments[:, :2, :2], axis1=1, axis2=2)
    return found


def second_of_output(W: Array, bias: Array | None, known: InputStatistics | None) -> Array:
    """E[y y^T] (N, N) of y = x W + b."""
    if known is None or known.second is None:
        return W.T @ W
    moment: Array = W.T @ known.second @ W
    if bias is not None and known.mean is not None:
        mixed = np.outer(known.mean @ W, bias)
        moment = moment + mixed + mixed.T + np.outer(bias, bias)
    return moment


def covariance_of_output(W: Array, known: InputStatistics | None) -> Array:
    """Covariance (N, N) of y = x W + b: the bias has no part in it."""
    moment: Array = W.T @ W if known is None or known.second is None else W.T @ known.centred @ W
    return moment
