"""By what an error of a weight counts, for any factorization: the relative error of the site, and the movement of the model's outputs.

    error^2 = tr(E^T C E) / tr(W^T M W),   movement = tr(E^T C' E G),   E = W - What (K, N)

M is the second moment of the input; C is M, or the covariance where a bias absorbs the mean m: b' = b + m E. C' and G come from
derivatives of the outputs (`records.Reaction`), and are not always known. Without data all of them are identities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lrcompile import spectra
from lrcompile.interfaces import Array, Constant, Factors, StatisticsSource, Weights
from lrcompile.records import Group

# Of the mean eigenvalue: what few samples do not show of a moment is not free.
_RIDGE = 1e-3
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, slots=True, eq=False)
class Weighing:
    """Of one weight (K, N). lost: C, None for an identity. total: tr(W^T M W). reacts: (C', G) where known; mean: what a bias absorbs."""

    lost: Array | None
    total: float
    reacts: tuple[Array, Array] | None = None
    mean: Array | None = None

    def error(self, E: Array) -> float:
        """Relative."""
        weighed = E if self.lost is None else self.lost @ E
        return float(np.sqrt(max(float(np.vdot(E, weighed)), 0.0) / max(self.total, _TINY)))

    def movement(self, E: Array) -> float | None:
        if self.reacts is None:
            return None
        C, G = self.reacts
        return max(float(np.vdot(C @ E, E @ G)), 0.0)

    @property
    def fitted(self) -> tuple[Array | None, Array | None]:
        """Left and right of what a fit makes small, tr(E^T left E right): the movement where it is known, else the error.

        Raised by a ridge, so that both have Cholesky factors. None: an identity.
        """
        if self.reacts is not None:
            return _ridged(self.reacts[0]), _ridged(self.reacts[1])
        return (None if self.lost is None else _ridged(self.lost)), None


def weighing_of(group: Group, weights: Weights, statistics: StatisticsSource | None) -> Weighing:
    """Of a group of one weight whose readers multiply by it as it is."""
    W = spectra.matrix(group, weights)
    moment = spectra.left_moment(group, statistics)
    if moment is None:
        return Weighing(None, float(np.vdot(W, W)))
    total = float(np.vdot(W, moment @ W))
    centred = spectra.centres(group, statistics)
    mean, lost = None, moment
    if centred:
        assert statistics is not None
        known = statistics.of(group.sites[0])
        assert known is not None
        mean, lost = known.mean, known.centred
    found = spectra.reactions(group, statistics, centred)
    return Weighing(lost, total, None if found is None else (found[0], found[1][0]), mean)


def corrected_biases(group: Group, weights: Weights, weighing: Weighing, E: Array) -> Factors:
    """bias.i of each site whose bias absorbs the mean of what is left out, m E (N,)."""
    if weighing.mean is None:
        return {}
    moved = weighing.mean @ E
    found = {}
    for i, site in enumerate(group.sites):
        bias = weights.bias(site)
        assert bias is not None
        found[f"bias.{i}"] = bias + moved
    return found


def bias_edits(group: Group, factors: Factors) -> Mapping[Constant, Array]:
    """The biases among the factors, as what `Factorization.edits` gives: ``bias.0`` is that of the first site."""
    return {
        (s.name, "bias"): factors[f"bias.{i}"].astype(np.float64)
        for i, s in enumerate(group.sites)
        if f"bias.{i}" in factors
    }


def frequencies(group: Group, statistics: StatisticsSource | None) -> Array:
    """(V,): the share of lookups that ask for each row, of all that look it up together; equal ones where it is not known."""
    V = group.sites[0].K
    known = [statistics.of(s) for s in group.sites if s.kind == "lookup"] if statistics is not None else []
    counted = [(s.count, s.frequencies) for s in known if s is not None and s.frequencies is not None]
    total = sum(n for n, _ in counted)
    if not total:
        return np.full(V, 1.0 / V)
    shares: Array = np.sum([(n / total) * f for n, f in counted], axis=0)
    return shares


def known_by(group: Group, weights: Weights, statistics: StatisticsSource | None) -> tuple[str, ...]:
    """What the weights of a group and their use are known by in the cache."""
    seen = [statistics.key(s) for s in group.sites] if statistics is not None else []
    return (*(weights.key(s) for s in group.sites), *seen)


def root(moment: Array | None) -> Array | None:
    """S, lower triangular, S S^T = moment."""
    if moment is None:
        return None
    found: Array = scipy.linalg.cholesky(moment, lower=True)
    return found


def scaled(proxy: Array, ranks: Sequence[int], measure: Callable[[int], float]) -> Array:
    """A curve over ranks 0, 1, .. that has the shape of `proxy` and the values of `measure` at these ranks.

    Between them the ratio of the two is interpolated: a proxy leaves out how blocks or cores err together, which changes slowly.
    """
    if not ranks:
        return proxy
    floor = max(float(proxy[0]), _TINY) * 1e-15
    ratios = [np.log(max(measure(r), floor) / max(float(proxy[r]), floor)) for r in ranks]
    at = np.arange(len(proxy))
    curve: Array = proxy * np.exp(np.interp(at, ranks, ratios))
    return curve


def _ridged(moment: Array) -> Array:
    ridge = _RIDGE * (float(np.trace(moment)) / len(moment) or 1.0)
    return moment + ridge * np.eye(len(moment))
