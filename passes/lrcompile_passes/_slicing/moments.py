"""What all cuts are computed from: moments of inputs, and how far an error moves the model's outputs."""

from __future__ import annotations

import hashlib

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, Factors, StatisticsSource, Weights
from lrcompile.records import Group, InputStatistics, Site

# Added to a moment's diagonal before it is inverted, relative to its mean: far below what a loss is measured to.
_RIDGE = 1e-9


def reaction_of(site: Site, weights: Weights, statistics: StatisticsSource) -> tuple[Array, Array] | None:
    """C' (K, K) and G (N, N) by which an error of the site's weight moves the model's outputs; None where that is not known."""
    known = known_of(site, statistics)
    if known.reaction is None:
        return None
    return known.weighing(weights.bias(site) is not None), known.reaction.output


def moves(E: Array, C: Array, G: Array) -> float:
    return float(np.vdot(C @ E, E @ G))


def seen(group: Group, weights: Weights, statistics: StatisticsSource) -> tuple[str, ...]:
    """All that a cut depends on."""
    width, sites = group.width, group.sites
    assert width is not None
    sizes = hashlib.sha256(repr((width.size, width.heads, width.repeat)).encode())
    for site in sites:
        bias = weights.bias(site)
        sizes.update(b"none" if bias is None else bias.tobytes())
    return (*(weights.key(s) for s in sites), *(statistics.key(s) for s in sites), sizes.hexdigest())


def known_of(site: Site, statistics: StatisticsSource) -> InputStatistics:
    known = statistics.of(site)
    assert known is not None and known.second is not None and known.mean is not None
    return known


def ridged(moment: Array) -> Array:
    ridge = _RIDGE * max(float(np.trace(moment)) / len(moment), np.finfo(np.float64).tiny)
    return moment + ridge * np.eye(len(moment))


def solve(moment: Array, right: Array) -> Array:
    solution: Array = scipy.linalg.cho_solve(scipy.linalg.cho_factor(moment), right)
    return solution


def total(W: Array, second: Array) -> float:
    """What a relative loss is relative to."""
    return max(float(np.vdot(W, second @ W)), np.finfo(np.float64).tiny)


def claim(found: Factors, at: int) -> tuple[float, float | None]:
    """The relative error, and how far it is predicted to move the model's outputs, of tables of squared losses."""
    movement = float(found["movement"][at]) if "movement" in found else None
    return float(np.sqrt(max(float(found["lost"][at]), 0.0))), movement


def mix(W: Array, A: Array) -> Array:
    """W (K, heads * s) times the block diagonal of A (heads, s, r)."""
    made: Array = np.einsum("khs,hsr->khr", W.reshape(len(W), *A.shape[:2]), A, optimize=True)
    return made.reshape(len(W), -1)
