"""Forms in storage types: which a target takes, and what the candidates of a group cost and err in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lrcompile.activations import legal as rounds
from lrcompile.activations import noise_of, storage_under
from lrcompile.coding import FLOATS, rounded
from lrcompile.encoding import size_of
from lrcompile.errors import UsageError
from lrcompile.interfaces import Array, CandidateOptions, Factorization, StatisticsSource, Weights
from lrcompile.loss import group_loss
from lrcompile.quantize import names, storage
from lrcompile.records import Candidate, Cost, Group, Refusal

# What ``--storage auto`` tries. Of fewer bits larger groups are better: a scale costs as much as in four bits and is worth less (docs/bits.md).
AUTO = ("int8", "uint4", "uint4-64", "uint3-128", "uint2-128")
AUTO_TENSORRT = ("int8", "int4-32s32+", "int4-64s32+", "int4-128s32+")
_FACTORED = ("svd", "svd-plain", "pivoted")
# Relative error that rounding alone adds to a factor; of forms that are tried it is measured.
_NOISE = {64: 1e-12, 32: 1e-6, 16: 4e-3, 8: 0.008, 4: 0.075, 3: 0.16, 2: 0.35, 1: 0.6}


@dataclass(frozen=True, slots=True)
class Legality:
    """What DequantizeLinear may hold on a runtime (facts measured; a test builds each). blocks: None: any.

    signs: scales may be negative. planes: codes of less than four bits, unpacked by constant folding.
    """

    zero_points: bool
    signs: bool
    planes: bool
    tables: bool
    divides: bool
    scales: tuple[str, ...]
    groups: tuple[int, ...] | None


_ANY = Legality(True, True, True, True, False, ("float8", "float16", "float32"), None)
# TensorRT-RTX 1.7.1 builds negative scales, but its documents ask for positive ones and other TensorRTs refuse the rest
_TENSORRT = Legality(False, False, False, False, True, ("float16", "float32"), (0, 32, 64, 128))
LEGAL = {"reference": _ANY, "ort": _ANY, "trt": _TENSORRT}


def legal(name: str, group: Group, target: str, *, folds: bool = False) -> Refusal | None:
    """None, or why a target does not take this storage type for this group. folds: it is decoded when the file is loaded."""
    if name in FLOATS or (folds and storage(name).together > 1):
        return None
    rules, kind, site = LEGAL[target.partition("-")[0]], storage(name), group.sites[0]
    if kind.whole or kind.fitted or (kind.levels and kind.bits == 4):
        return Refusal(f"{name} is a type for comparisons: no runtime keeps its codes small")
    if any(s.kind == "conv" for s in group.sites) and target.startswith("trt"):
        return Refusal(f"{name}: TensorRT takes no kernel of a Conv that is turned after it is decoded")
    if any(group.transposed):
        return Refusal(
            f"{name}: a head tied to a table reads the transpose, which runtimes decode as a whole"
        )
    if any(
        s.wiring is not None and s.wiring.data == 1 and s.op == "MatMul" for s in group.sites
    ) and target.startswith("trt"):
        return Refusal(f"{name}: TensorRT takes a coded weight on the right of a MatMul only")
    lookup = [s.kind == "lookup" for s in group.sites]
    if any(lookup) and not (all(lookup) and rules.tables and kind.bits in (4, 8) and not kind.levels):
        return Refusal(f"{name}: tables are coded in 8 or 4 bits where the target gathers codes")
    if any(lookup) and kind.scale == "float8":
        return Refusal(
            f"{name}: scales of a table's rows are gathered, which runtimes cannot with float8: use {name}s16"
        )
    K = site.N if all(lookup) else site.K
    if all(lookup) and kind.group and K % kind.group:
        return Refusal(f"{name}: rows of {K} numbers are not whole groups of {kind.group}")
    if kind.levels and kind.bits == 8 and not target.startswith("trt"):
        return Refusal(f"{name} is for TensorRT")
    if kind.bits < 4 and not rules.planes:
        return Refusal(f"{target} takes no codes of {kind.bits} bits")
    if kind.zero_points and not rules.zero_points:
        return Refusal(f"{target} takes no zero points: use {name.removeprefix('u')}")
    if kind.scale not in rules.scales:
        return Refusal(f"{target} takes no scales of {kind.scale}")
    if rules.groups is not None and kind.group not in rules.groups:
        return Refusal(f"{target} takes groups of {', '.join(map(str, rules.groups[1:]))}")
    if rules.divides and kind.group and K % kind.group:
        return Refusal(f"{target} takes whole groups only, and {K} is not divisible by {kind.group}")
    if kind.signed and not rules.signs:
        return Refusal(f"{target} takes no negative scales: use {name}+")
    return None


def known(name: str) -> bool:
    """Whether there is such a storage type."""
    try:
        return name in FLOATS or bool(storage(name))
    except KeyError:
        return False


def types_of(given: Sequence[str], target: str) -> tuple[str, ...]:
    """The storage types that ``--storage`` names, with positive scales for TensorRT. Raises UsageError."""
    found: list[str] = []
    for name in given:
        if name == "auto":
            found += AUTO_TENSORRT if target.startswith("trt") else AUTO
            continue
        if not known(name):
            raise UsageError(
                f"--storage {name}: no such type; there are auto, {', '.join((*FLOATS, *names()))}, and with groups and scales of their "
                "own such as int4-64 or uint4-32s16"
            )
        signed = name not in FLOATS and storage(name).signed
        found.append(f"{name}+" if signed and target.startswith("trt") else name)
    return tuple(dict.fromkeys(found))


def stored(
    candidate: Candidate,
    name: str,
    method: Factorization,
    group: Group,
    weights: Weights,
    statistics: StatisticsSource | None,
    activations: str | None = None,
) -> Candidate:
    """The form in a storage type: its bytes, and its error, measured for a weight left dense, estimated for factors.

    activations: the type that its input is rounded to; what that adds to the error of a dense weight is expected, not measured.
    """
    bits, by_row = 0, group.sites[0].kind == "lookup"
    for shape in method.shapes(group, candidate).values():
        size = shape if isinstance(shape, tuple) else shape.shape
        bits += _bits(size[::-1] if by_row else size, name, by_row)
    cost = Cost(candidate.cost.parameters, math.ceil(bits / 8) + candidate.index_bytes, candidate.cost.flops)
    form = replace(
        candidate,
        storage=name,
        cost=cost,
        bound=False,
        rank=None if method.name == "dense" else candidate.rank,
        activations=activations,
    )
    if method.name == "dense":
        error, movement = _measured(form, method, group, weights, statistics)
        if activations is not None:
            lost, moved = noise_of(activations, group, weights, statistics)
            error, movement = (
                math.hypot(error, math.sqrt(lost)),
                None if movement is None else movement + moved,
            )
        return replace(form, error=error, movement=movement)
    noise = _NOISE[_width(name)] * math.sqrt(2.0)
    movements = weights.low_rank_movements(group, statistics) if candidate.movement is not None else None
    movement = candidate.movement
    if movements is not None and movement is not None:
        movement += noise**2 * float(movements[0])
    return replace(form, error=math.hypot(candidate.error, noise), movement=movement)


def _width(name: str) -> int:
    return ir.DataType[name.upper()].bitwidth if name in FLOATS else storage(name).bits


def _bits(size: tuple[int, ...], name: str, by_row: bool) -> int:
    """What an array takes: all but matrices stay in float32 where numbers are coded."""
    if name in FLOATS:
        return _width(name) * math.prod(size)
    return size_of(storage(name), *size, by_row=by_row) if len(size) == 2 else 32 * math.prod(size)


def _measured(
    form: Candidate,
    method: Factorization,
    group: Group,
    weights: Weights,
    statistics: StatisticsSource | None,
) -> tuple[float, float | None]:
    """Error and predicted movement of a dense weight in its codes, without the last sweeps."""
    seen = tuple(statistics.key(s) for s in group.sites) if statistics is not None else ()
    key = (
        "coded-1",
        str(form.storage),
        *filter(None, [form.activations]),
        *(weights.key(s) for s in group.sites),
        *seen,
    )

    def compute() -> dict[str, Array]:
        made, _ = rounded(method, group, weights, statistics, form, 0, sweeps=0)
        changed = method.reconstruct(group, made)
        site = group.sites[0]
        found = {"error": np.array([group_loss(group, weights, statistics, changed)])}
        known = statistics.of(site) if statistics is not None else None
        if known is not None and known.reaction is not None and known.second is not None:
            E = weights.matrix(site) - changed[site.name, "weight"]
            C = known.weighing((site.name, "bias") in changed)
            found["movement"] = np.array([float(np.sum((E.T @ C @ E) * known.reaction.output))])
        return found

    kept = weights.remember(key, compute)
    return float(kept["error"][0]), float(kept["movement"][0]) if "movement" in kept else None


def forms(
    group: Group,
    methods: Sequence[Factorization],
    found: Sequence[Candidate],
    types: Sequence[str],
    target: str,
    weights: Weights,
    statistics: StatisticsSource | None,
    activations: Sequence[str] = (),
) -> Iterator[Candidate | Refusal]:
    """Every candidate, dense among them, in every storage type that is legal; and why the others are not.

    activations: the types that the input of a dense weight may be rounded to.
    """
    if all(s.kind == "lookup" for s in group.sites):
        types = [f"{n}s16" if n not in FLOATS and storage(n).scale == "float8" else n for n in types]
    dense = next((m for m in methods if m.name == "dense"), None)
    for rounded_to in activations if dense is not None and dense.serves(group) is None else ():
        name = storage_under(rounded_to)
        if (no := rounds(rounded_to, name, group) or legal(name, group, target)) is not None:
            yield no
            continue
        assert dense is not None
        made = dense.candidates(group, weights, statistics, CandidateOptions())
        yield from (stored(c, name, dense, group, weights, statistics, rounded_to) for c in made)
    # taken now: who asks may add to `found` as we go
    of = {m.name: tuple(c for c in found if c.method == m.name) for m in methods}
    for name in types:
        if (no := legal(name, group, target)) is not None:
            yield no
            continue
        for method in methods:
            if method.name == "dense" and method.serves(group) is None:
                made = method.candidates(group, weights, statistics, CandidateOptions())
                yield from (stored(c, name, method, group, weights, statistics) for c in made)
            elif group.sites[0].kind == "linear" and method.name in _FACTORED:
                whole = (c for c in of[method.name] if _divides(method.shapes(group, c), name, target))
                yield from (stored(c, name, method, group, weights, statistics) for c in whole)


def _divides(shapes: Mapping[str, tuple[int, ...] | Array], name: str, target: str) -> bool:
    """Whether every matrix among the factors is whole groups, where a target asks for them."""
    if name in FLOATS or not LEGAL[target.partition("-")[0]].divides or not (size := storage(name).group):
        return True
    sizes = (s if isinstance(s, tuple) else s.shape for s in shapes.values())
    return all(s[0] % size == 0 for s in sizes if len(s) == 2)
