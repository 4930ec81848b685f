"""Factors in a storage type: what their arrays become, rounded with what is known of the inputs that meet them.

A factor that multiplies the site's input (`w`, `a`, `p`) is rounded with error feedback by the input's second moment C; one behind it
(`b`, `c`) by A^T C A, what the first one makes of the input; all others by a search over scales alone. Where a bias can absorb it, the mean of
what rounding changed goes there. Tables are coded along their rows. What a factorization has coded by itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lrcompile.activations import quantizer, restored
from lrcompile.interfaces import Array, Factorization, Factors, StatisticsSource, Weights
from lrcompile.quantize import Coded, Storage, rounded_by, searched, storage
from lrcompile.records import Candidate, Group, Site

# Types that hold numbers as they are, rounded: there are no codes.
FLOATS = ("double", "float", "float16", "bfloat16")
_SWEEPS = 2
_FIRST, _SECOND = ("w", "a", "p"), ("b", "c")


def coded_factors(
    factors: Factors,
    kind: Storage,
    group: Group,
    statistics: StatisticsSource | None,
    *,
    sweeps: int = _SWEEPS,
) -> dict[str, Coded]:
    """Every matrix among the factors in this storage type; vectors, indices, biases and ``orthogonal.i`` are left out."""
    moment = _moment(group, statistics)
    made: dict[str, Coded] = {}
    for name, array in factors.items():
        if array.dtype.kind == "i" or array.ndim != 2 or name.startswith(("bias", "orthogonal")):
            continue
        if group.sites[0].kind == "lookup":
            made[name] = searched(array.T, kind)
            continue
        C = None
        if moment is not None and name in _FIRST and len(array) == len(moment):
            C = moment
        elif moment is not None and name.split(".")[0] in _SECOND:
            first = next((made[n].values for n in _FIRST if n in made), None)
            C = first.T @ moment @ first if first is not None else None
        made[name] = rounded_by(array, C, kind, sweeps)
    return made


def type_of(method: Factorization, factor: str, name: str) -> Storage:
    """What a factor is coded in where the decision's storage type is `name`."""
    stored_as: Callable[[str, str], str] | None = getattr(method, "stored_as", None)
    return storage(name if stored_as is None else stored_as(factor, name))


def decoded(factors: Factors, coded: Mapping[str, Coded], group: Group) -> dict[str, Array]:
    """The factors with what their codes mean."""
    by_row = group.sites[0].kind == "lookup"
    values = {n: c.values.T if by_row else c.values for n, c in coded.items()}
    return {**factors, **{n: restored(v, factors) for n, v in values.items()}}


def rounded(
    method: Factorization,
    group: Group,
    weights: Weights,
    statistics: StatisticsSource | None,
    form: Candidate,
    seed: int,
    sweeps: int = _SWEEPS,
) -> tuple[Factors, Mapping[str, Coded]]:
    """The factors of a form, as its storage type leaves them, biases corrected; and the codes."""
    given = method.factorize(group, weights, statistics, form, seed)
    own = {n: f for n, f in given.items() if isinstance(f, Coded)}
    factors: Factors = {n: f for n, f in given.items() if isinstance(f, np.ndarray)}
    if own:  # biases are its own too
        return decoded(factors, own, group), own
    if form.storage is None or form.storage in FLOATS:
        return factors, {}
    if form.activations is not None:
        return _under_rounded_input(method, group, weights, statistics, form, factors, sweeps)
    coded = coded_factors(factors, storage(form.storage), group, statistics, sweeps=sweeps)
    made = decoded(factors, coded, group)
    return _with_biases(method, group, weights, statistics, factors, made), coded


def _under_rounded_input(
    method: Factorization,
    group: Group,
    weights: Weights,
    statistics: StatisticsSource | None,
    form: Candidate,
    factors: Factors,
    sweeps: int,
) -> tuple[Factors, Mapping[str, Coded]]:
    known = statistics.of(group.sites[0]) if statistics is not None else None
    rounding = quantizer(str(form.activations), known, len(factors["w"]))
    coded = {"w": rounding.coded(factors["w"], _moment(group, statistics), sweeps)}
    made = decoded({**factors, **rounding.factors}, coded, group)
    return _with_biases(method, group, weights, statistics, factors, made), coded


def _with_biases(
    method: Factorization,
    group: Group,
    weights: Weights,
    statistics: StatisticsSource | None,
    factors: Factors,
    made: dict[str, Array],
) -> Factors:
    """The changed factors, and biases that absorb the mean of what they change."""
    if not corrects(group, statistics):
        return made
    before, after = method.reconstruct(group, factors), method.reconstruct(group, made)
    for i, site in enumerate(group.sites):
        known = statistics.of(site) if statistics is not None else None
        bias = factors.get(f"bias.{i}", weights.bias(site))
        assert known is not None and known.mean is not None and bias is not None
        made[f"bias.{i}"] = bias + known.mean @ (before[site.name, "weight"] - after[site.name, "weight"])
    return made


def corrects(group: Group, statistics: StatisticsSource | None) -> bool:
    """Whether biases absorb the mean of what rounding changes: every site has one of its own, and its mean input is known."""
    return group.kind in ("alone", "qkv", "gate_up") and all(_has_mean(s, statistics) for s in group.sites)


def _has_mean(site: Site, statistics: StatisticsSource | None) -> bool:
    known = statistics.of(site) if statistics is not None else None
    return (
        known is not None and known.mean is not None and site.bias is not None and site.wiring is not None
        and site.wiring.scale != 0.0
    )  # fmt: skip


def _moment(group: Group, statistics: StatisticsSource | None) -> Array | None:
    """(K, K) of the input that the group's first factor meets; of several readers of one weight the mean."""
    if statistics is None or any(group.transposed):
        return None
    centred = corrects(group, statistics)
    known = [statistics.of(s) for s in (group.sites if group.shares_weight else group.sites[:1])]
    moments = [k.weighing(centred) for k in known if k is not None and k.second is not None]
    if not moments:
        return None
    mean: Array = np.mean(moments, axis=0)
    return mean
