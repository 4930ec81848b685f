"""Factorize: the arrays of every decision, rounded to their storage type and kept on disk, and the error they really have.

A set of factors is stored under a key that names all it depends on, so a killed run goes on where it was. One group is in
memory at a time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import onnx_ir as ir

from lrcompile.activations import noise_of
from lrcompile.coding import decoded, rounded, type_of
from lrcompile.errors import PluginError
from lrcompile.factors import FactorSet, candidate_of
from lrcompile.interfaces import Array, Factorization, Factors, StatisticsSource, Weights
from lrcompile.loss import group_loss
from lrcompile.progress import Progress, silent
from lrcompile.quantize import Coded
from lrcompile.records import Decision, Group, Plan
from lrcompile.weights import side_by_side, storage_of

logger = logging.getLogger(__name__)

# A claim that is a bound may be passed by what rounding the factors to their storage type adds.
_ROUNDING = {
    ir.DataType.DOUBLE: 1e-12,
    ir.DataType.FLOAT: 1e-6,
    ir.DataType.FLOAT16: 4e-3,
    ir.DataType.BFLOAT16: 4e-2,
}


def factorize(
    plan: Plan,
    groups: Mapping[str, Group],
    weights: Weights,
    statistics: StatisticsSource | None,
    methods: Mapping[str, Factorization],
    seed: int,
    progress: Progress = silent,
    measured_by: tuple[Weights, StatisticsSource | None] | None = None,
) -> tuple[FactorSet, ...]:
    """Factors of every decision that rewrites. Raises PluginError when a factorization broke its claim.

    measured_by: what the measured error is relative to, when that is not what the factors are fitted to.
    """
    rewritten = tuple(plan.rewritten)

    def work(decision: Decision) -> FactorSet:
        return _one(
            decision, groups[decision.group], methods[decision.method], weights, statistics, seed,
            measured_by or (weights, statistics),
        )  # fmt: skip

    made = []
    for factors in side_by_side(work, rewritten, lambda d: groups[d.group]):
        made.append(factors)
        progress("factorize", len(made), len(rewritten))
    return tuple(made)


def _one(
    decision: Decision,
    group: Group,
    method: Factorization,
    weights: Weights,
    statistics: StatisticsSource | None,
    seed: int,
    measured_by: tuple[Weights, StatisticsSource | None],
) -> FactorSet:
    site = group.sites[0]
    storage = storage_of(site, decision.storage)
    candidate = candidate_of(decision)
    key = (
        "factors-3", decision.method, str(decision.rank), repr(decision.structure), storage.name, str(decision.storage), str(seed),
        *filter(None, [decision.activations]),
        *(weights.key(s) for s in group.sites), *(statistics.key(s) if statistics else "" for s in group.sites),
    )  # fmt: skip

    def compute() -> Factors:
        factors, coded = rounded(method, group, weights, statistics, candidate, seed)
        stored = {
            n: a if n.startswith("bias") or n in coded else _stored(a, storage) for n, a in factors.items()
        }
        if broken := [n for n, a in stored.items() if not np.isfinite(a.astype(np.float64)).all()]:
            raise PluginError(f"{method.name} gave NaN or Inf in factor {broken[0]!r} of {group.name}")
        error = group_loss(group, *measured_by, method.reconstruct(group, stored))
        if decision.activations is not None:
            error = math.hypot(error, math.sqrt(noise_of(decision.activations, group, *measured_by)[0]))
        arrays = {n: a for n, a in stored.items() if n not in coded} | _coded_arrays(coded)
        return {**{_tag(n, a): _raw(a) for n, a in arrays.items()}, "measured": np.array([error])}

    kept = weights.remember(key, compute)
    arrays = [_untag(t) for t in kept if t != "measured"]
    shapes = {n.removeprefix(_CODES): shape for n, _, shape in arrays if not n.startswith(_BESIDE)}
    coded = frozenset(n.removeprefix(_CODES) for n in (a[0] for a in arrays) if n.startswith(_CODES))
    for n, _, levels in arrays:  # of matrices with common codes
        if n.startswith("levels:") and len(levels) > 1:
            shapes[n.removeprefix("levels:")] += levels[1:]
    if group.sites[0].kind == "lookup":  # coded along their rows
        shapes = {n: s[::-1] if n in coded else s for n, s in shapes.items()}
    indices = frozenset(n for n, dtype, _ in arrays if dtype.kind == "i" and not n.startswith(_CODED))

    def codes() -> Mapping[str, Coded]:
        return _coded(_unpack(weights.remember(key, compute)), method, str(decision.storage))

    def load() -> Factors:
        plain = {n: a for n, a in _unpack(weights.remember(key, compute)).items() if not n.startswith(_CODED)}
        return decoded(plain, codes(), group) if coded else plain

    measured = float(kept["measured"][0])
    if (
        decision.bound
        and decision.claimed_error is not None
        and measured > decision.claimed_error + _ROUNDING[storage]
    ):
        raise PluginError(
            f"{method.name} claimed at most {decision.claimed_error:.3e} for {group.name} and its factors have {measured:.3e}"
        )
    return FactorSet(
        decision,
        group,
        method,
        storage,
        shapes,
        measured,
        load,
        indices,
        coded,
        codes,
    )


def annotate(plan: Plan, sets: Sequence[FactorSet]) -> Plan:
    """The plan with estimates replaced by what the factors really have."""
    measured = {s.decision.group: s.measured for s in sets if not s.decision.bound}
    return replace(
        plan,
        decisions=tuple(
            replace(d, claimed_error=measured[d.group], bound=False) if d.group in measured else d
            for d in plan.decisions
        ),
    )


# A coded matrix is several arrays in the cache.
_CODES, _BESIDE = "codes:", ("scales:", "zeros:", "levels:", "factor:")
_CODED = (_CODES, *_BESIDE)


def _coded_arrays(coded: Mapping[str, Coded]) -> dict[str, Array]:
    made: dict[str, Array] = {}
    for name, c in coded.items():
        made |= {f"codes:{name}": c.codes, f"scales:{name}": c.scales, f"factor:{name}": np.array([c.factor])}
        made |= {
            f"{kind}:{name}": a for kind, a in (("zeros", c.zeros), ("levels", c.levels)) if a is not None
        }
    return made


def _coded(arrays: Factors, method: Factorization, storage: str) -> Mapping[str, Coded]:
    names = [n.removeprefix(_CODES) for n in arrays if n.startswith(_CODES)]
    return {
        n: Coded(
            type_of(method, n, storage), arrays[f"codes:{n}"], arrays[f"scales:{n}"], arrays.get(f"zeros:{n}"),
            arrays.get(f"levels:{n}"), float(arrays[f"factor:{n}"][0]),
        )
        for n in names
    }  # fmt: skip


# Cached arrays are raw bytes, because bfloat16 and float16 are no types of the store; the name carries the rest.


def _stored(array: Array, storage: ir.DataType) -> Array:
    if array.dtype.kind == "i":
        return np.ascontiguousarray(array, np.int32)
    with np.errstate(over="ignore"):  # what is too large for the type becomes Inf, which is looked for
        return np.asarray(array.astype(storage.numpy()), order="C")  # a scalar stays one


def _tag(name: str, array: Array) -> str:
    return f"{name}|{array.dtype.name}|{'x'.join(map(str, array.shape))}"


def _untag(tag: str) -> tuple[str, np.dtype[np.generic], tuple[int, ...]]:
    name, dtype, shape = tag.split("|")
    return name, np.dtype(dtype), tuple(int(n) for n in shape.split("x") if n)


def _raw(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unpack(kept: Factors) -> Factors:
    def arrays() -> Iterator[tuple[str, Array]]:
        for tag, raw in kept.items():
            if tag != "measured":
                name, dtype, shape = _untag(tag)
                yield name, raw.view(dtype).reshape(shape)

    return dict(arrays())
