"""Micro-graphs: a form by itself, compiled by the same stages as a whole model, to be timed in a target's own runtime.

Several copies of it stand side by side, each with weights and an input of its own, so that no cache holds what a real model would read
from memory; of each result one row is kept, so that hardly anything but the form itself is computed. Numbers are random and of no
meaning: factors have the shapes that the factorization promises, their values are never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.activations import SMOOTH, quantizer
from lrcompile.factors import FactorSet
from lrcompile.graph import FLOATS
from lrcompile.interfaces import Array, Factorization, Factors, Rewrite
from lrcompile.lower import lower
from lrcompile.quantize import Coded
from lrcompile.quantize import storage as storage_type
from lrcompile.records import Candidate, Cost, Decision, Group, Site
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.timing import Form

_COLD = 192 << 20  # bytes of weights that no cache holds
_MOST = 16  # copies
_INPUTS = 1 << 30  # bytes of all inputs together
_FLOPS = 2e10  # of one run; where more are asked for, no cache matters
_TILE = 1 << 20  # random numbers that large arrays repeat


def copies_of(form: Form, rows: int) -> int:
    """How many copies of a form its micro-graph holds."""
    size = ir.DataType[form.dtype.upper()].bitwidth // 8
    weights = max(form.K * sum(form.widths) * size, 1)
    inputs = max(rows * form.K * size, 1)
    most = int(_FLOPS // max(2 * rows * form.K * sum(form.widths), 1))
    return max(1, min(_MOST, math.ceil(_COLD / weights), _INPUTS // inputs, most))


def micro(
    form: Form, copies: int, method: Factorization, lowering: Sequence[Rewrite], opset: int, seed: int
) -> ir.Model:
    """The form so many times, lowered for a target: inputs ``x.0``, .. (rows, K) or ids (rows,), and a row of each result."""
    model = _dense(form, copies, opset, seed)
    if form.method == "dense" and form.storage is None:
        return model
    sites = {s.name: s for s in find(model).sites}
    sets = [_factors(form, _group(form, copy, sites), method, seed + copy) for copy in range(copies)]
    return lower(rewrite(model, sets), lowering)


def feed_of(form: Form, copies: int, rows: int, seed: int) -> dict[str, Array]:
    """Inputs of `micro` of that many rows."""
    rng = np.random.default_rng(seed)
    first = {"first": np.zeros(1, np.int64)}
    if form.kind == "lookup":
        return {**first, **{f"x.{c}": rng.integers(form.K, size=rows) for c in range(copies)}}
    tile = rng.standard_normal(min(rows * form.K, _TILE)).astype(ir.DataType[form.dtype.upper()].numpy())
    return {**first, **{f"x.{c}": np.resize(tile, (rows, form.K)) for c in range(copies)}}


def _dense(form: Form, copies: int, opset: int, seed: int) -> ir.Model:
    """Weights named ``w.COPY.INDEX`` with a reader each, and where a form reads the transpose a Gather beside it."""
    dtype = ir.DataType[form.dtype.upper()]
    tape = ir.tape.Tape()
    first = ir.val(
        "first", ir.DataType.INT64, ir.Shape([1])
    )  # no constant: a runtime would fold what it picks
    inputs, outputs, weights = [first], list[ir.Value](), list[ir.Value]()
    for copy in range(copies):
        ids = ir.val(f"x.{copy}", ir.DataType.INT64, ir.Shape(["rows"]))
        x = ids if form.kind == "lookup" else ir.val(f"x.{copy}", dtype, ir.Shape(["rows", form.K]))
        inputs.append(x)
        for index, N in enumerate(form.widths):
            name = f"{copy}.{index}"
            shape = (N, form.K) if form.transposed else (form.K, N)
            w = _constant(f"w.{name}", dtype, shape, _random(shape, dtype, (seed, copy, index)))
            weights.append(w)
            if form.transposed:
                row = tape.op("Gather", [w, first], name=f"table.{name}")
                outputs.append(_named(row, f"t.{name}", dtype, form.K))
                w = tape.op("Transpose", [w], {"perm": [1, 0]}, name=f"transpose.{name}")
            operands = [w, x] if form.kind == "lookup" else [x, w]
            y = tape.op("Gather" if form.kind == "lookup" else "MatMul", operands, name=f"use.{name}")
            outputs.append(_named(tape.op("Gather", [y, first], name=f"pick.{name}"), f"y.{name}", dtype, N))
    graph = ir.Graph(
        inputs, outputs, nodes=tape.nodes, initializers=weights, opset_imports={"": opset}, name="micro"
    )
    return ir.Model(graph, ir_version=10 if opset >= 21 else 8)


def _named(value: ir.Value, name: str, dtype: ir.DataType, columns: int) -> ir.Value:
    value.name, value.dtype, value.shape = name, dtype, ir.Shape([1, columns])
    return value


def _constant(name: str, dtype: ir.DataType, shape: tuple[int, ...], load: Callable[[], Array]) -> ir.Value:
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(load(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
    )
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)


def _random(shape: tuple[int, ...], dtype: ir.DataType, seed: tuple[int, ...]) -> Callable[[], Array]:
    def load() -> Array:
        size = math.prod(shape)
        tile = np.random.default_rng(seed).standard_normal(min(size, _TILE))
        return np.resize((tile / math.sqrt(max(shape[0], 1))).astype(dtype.numpy()), shape)

    return load


def _group(form: Form, copy: int, sites: Mapping[str, Site]) -> Group:
    names = [f"w.{copy}.{i}" for i in range(len(form.widths))]
    found = [s for s in sites.values() if s.weight in names]
    by_use = sorted(found, key=lambda s: (names.index(s.weight), s.kind != "lookup"))
    kind = "tied" if form.transposed else "alone" if len(by_use) == 1 else "qkv"
    return Group(
        f"copy {copy}", kind, tuple(by_use), tuple(form.transposed and s.kind == "linear" for s in by_use)
    )


def _factors(form: Form, group: Group, method: Factorization, seed: int) -> FactorSet:
    """Factors of the promised shapes; nothing of them is true but their sizes."""
    candidate = Candidate(form.method, form.rank, Cost(0, 0, 0), 1.0, structure=form.structure)
    number = ir.DataType[form.dtype.upper()]
    if form.storage is not None:
        return _coded_factors(form, group, method, number, seed)
    promised = method.shapes(group, candidate)
    storage = number
    shapes = {n: s.shape if isinstance(s, np.ndarray) else s for n, s in promised.items()}

    def load() -> Factors:
        return {n: _example(s, storage, (seed, i)) for i, (n, s) in enumerate(promised.items())}

    def _example(given: tuple[int, ...] | Array, dtype: ir.DataType, seed: tuple[int, ...]) -> Array:
        if not isinstance(given, np.ndarray):
            return _random(given, dtype, seed)()
        # where neighbours absorb the permutation there is none to compute
        return np.arange(given.size, dtype=given.dtype) if form.permutes == "out" else given

    decision = _decision(form, group)
    indices = frozenset(n for n, s in promised.items() if isinstance(s, np.ndarray))
    assert storage in FLOATS
    return FactorSet(decision, group, method, storage, shapes, 0.0, load, indices)


def _decision(form: Form, group: Group) -> Decision:
    n = group.elements
    return Decision(
        group.name, tuple(s.name for s in group.sites), form.method, form.rank, form.storage, None, False, n, n, 0, 0, 0, 0, "",
        form.structure, activations=form.activations,
    )  # fmt: skip


def _coded_factors(
    form: Form, group: Group, method: Factorization, number: ir.DataType, seed: int
) -> FactorSet:
    """A dense weight in a storage type: codes by chance."""
    kind = storage_type(str(form.storage))
    site = group.sites[0]
    by_row = form.kind == "lookup"
    K, N = (site.N, site.K) if by_row else (site.K, site.N)
    shapes: dict[str, tuple[int, ...]] = {"w": (site.K, site.N)}
    plain: dict[str, Array] = {}
    if form.activations is not None:
        plain = {n: a.astype(number.numpy()) for n, a in quantizer(form.activations, None, K).factors.items()}
        plain[SMOOTH] = np.full(K, 0.5, number.numpy())
        shapes |= {n: a.shape for n, a in plain.items()}

    def codes() -> Mapping[str, Coded]:
        rng = np.random.default_rng(seed)
        size = (kind.groups(K), N)
        high = len(kind.levels) if kind.levels else kind.high + 1
        tile = rng.integers(0 if kind.levels else kind.low, high, min(K * N, _TILE))
        zeros = rng.integers(kind.low, kind.high + 1, size) if kind.zero_points else None
        scales = np.full(size, 1.0 / (math.sqrt(K) * kind.reach))
        levels = np.array(kind.levels) if kind.levels else None
        made = np.resize(tile, (K, N)).astype(np.int16)
        return {"w": Coded(kind, made, scales, zeros, levels, factor=float(scales[0, 0]))}

    return FactorSet(
        _decision(form, group), group, method, number, shapes, 0.0, lambda: plain, coded=frozenset({"w"}), codes=codes
    )  # fmt: skip
