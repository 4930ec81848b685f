"""Rewrite: the model in its neutral form, each rewritten site one call of a model-local function.

A function (domain ``lrcompile``, named after its site) takes the site's data, the factors, and what a Gemm adds; its body is
what the factorization emits between the site's wiring. Factors are initializers of the main graph, named ``SITE/METHOD/FACTOR``;
sites of a group share them. Corrected biases are edited in place. The model given is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.factors import FactorSet, bias_in_place
from lrcompile.graph import DOMAIN, Builder, Names, mark_constants, nodes, opset_of
from lrcompile.interfaces import Array, Call, Constant
from lrcompile.records import Site, Step


def rewrite(model: ir.Model, sets: Sequence[FactorSet]) -> ir.Model:
    """A copy of the model in neutral form."""
    copy, twins = _copy(model)
    names = Names(copy)
    for factors in sets:
        prefixes = [names.node(f"{site.name}/{factors.decision.method}") for site in factors.group.sites]
        values = {
            name: _initializer(
                copy, names.value(f"{prefixes[0]}/{name}"), factors.storage, shape, _loader(factors, name)
            )
            for name, shape in factors.shapes.items()
            if not name.startswith("bias")
        }
        edits = factors.method.edits(factors.group, factors.load())
        for site, transposed, prefix in zip(
            factors.group.sites, factors.group.transposed, prefixes, strict=True
        ):
            _edit_bias(copy, site, twins, edits, names)
            _call(copy, site, twins[site.node], transposed, factors, values, prefix)
    return copy


def reconstructed(model: ir.Model, sets: Sequence[FactorSet]) -> ir.Model:
    """A copy of the model in which every changed constant is its reconstruction, rounded to its type: the oracle."""
    copy, twins = _copy(model)
    names = Names(copy)
    for factors in sets:
        edits = factors.method.edits(factors.group, factors.load())
        for site in factors.group.sites:
            _replace_weight(copy, site, twins[site.node], names, _reconstruction(factors, site))
            _edit_bias(copy, site, twins, edits, names)
    return copy


def jittered(
    model: ir.Model, sets: Sequence[FactorSet], read: Callable[[Site], Array], seed: int
) -> ir.Model:
    """A copy in which every rewritten weight (N, K) is moved by half a unit in the last place, up or down by chance."""
    copy, twins = _copy(model)
    names = Names(copy)
    for factors in sets:
        for site in factors.group.sites:
            _replace_weight(
                copy,
                site,
                twins[site.node],
                names,
                _jitter(read, site, _coarser(site, factors.storage), seed),
            )
    return copy


def _reconstruction(factors: FactorSet, site: Site) -> Callable[[], Array]:
    return lambda: factors.method.reconstruct(factors.group, factors.load())[site.name, "weight"]


def _jitter(
    read: Callable[[Site], Array], site: Site, storage: ir.DataType, seed: int
) -> Callable[[], Array]:
    """W moved by half a unit in the last place of each entry, or of a typical one where the entry is smaller.

    Factors are as exact as the whole matrix allows, not each entry: beside an outlier a small entry has no digits of its own.
    """

    def weight() -> Array:
        W = read(site)
        size = np.maximum(np.abs(W), np.sqrt(np.mean(np.square(W))))
        ulp = np.spacing(size.astype(storage.numpy())).astype(np.float64)
        # half a unit of float64 is nothing, because it is what we compute in
        half = 1.0 if storage == ir.DataType.DOUBLE else 0.5
        sign = half * np.random.default_rng((seed, site.elements)).choice((-1.0, 1.0), W.shape)
        moved: Array = W + sign * ulp
        return moved

    return weight


def _coarser(site: Site, storage: ir.DataType) -> ir.DataType:
    """Of the stored and the computing type the one with fewer digits: factors pass through both."""
    by_digits = (ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return max(storage, ir.DataType[site.dtype.upper()], key=by_digits.index)


def _copy(model: ir.Model) -> tuple[ir.Model, dict[ir.Node, ir.Node]]:
    """A copy that shares the tensors, and which of its nodes stands for which."""
    copy = model.clone()
    mark_constants(copy)
    return copy, {a: b for (_, a), (_, b) in zip(nodes(model), nodes(copy), strict=True)}


def _loader(factors: FactorSet, name: str) -> Callable[[], Array]:
    return lambda: factors.load()[name]


def _initializer(
    model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...], load: Callable[[], Array]
) -> ir.Value:
    """A constant of the main graph whose array is read when the file is written."""
    tensor = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(load()), name=name),
        dtype=dtype, shape=ir.Shape(shape), name=name,
    )  # fmt: skip
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    model.graph.register_initializer(value)
    if (model.ir_version or 0) < 4:  # there an initializer is an input as well
        value.meta["lrcompile.constant"] = True
        model.graph.inputs.append(value)
    return value


def _call(
    model: ir.Model,
    site: Site,
    node: ir.Node,
    transposed: bool,
    factors: FactorSet,
    values: Mapping[str, ir.Value],
    prefix: str,
) -> None:
    """Put a call of a new function, named prefix, in the place of a site's node."""
    assert site.wiring is not None and node.graph is not None
    metadata = {
        "lrcompile.method": factors.decision.method,
        "lrcompile.weight": site.weight,
        "lrcompile.group": factors.group.name,
    }
    op = Builder(prefix, metadata)
    data = ir.Value(name=f"{prefix}/x")
    parameters = {name: ir.Value(name=f"{prefix}/{name}_in") for name in values}
    addend = ir.Value(name=f"{prefix}/c") if site.wiring.addend is not None else None
    compute = ir.DataType[site.dtype.upper()]
    typed = parameters
    if factors.storage != compute:
        typed = {n: op("Cast", v, name=f"{n}_cast", to=compute) for n, v in parameters.items()}
    shapes = {n: factors.shapes[n] for n in values}
    x = _steps(op, data, site.wiring.before)
    y = factors.method.emit(op, Call(site.kind, transposed, x, typed, shapes, opset_of(model)))
    if site.wiring.scale != 1.0:
        y = op("Mul", y, op.constant(np.asarray(site.wiring.scale, compute.numpy()), "scale"), name="scaled")
    y = _steps(op, y, site.wiring.after)
    if addend is not None:
        term = addend
        if site.wiring.addend_scale != 1.0:
            term = op(
                "Mul",
                addend,
                op.constant(np.asarray(site.wiring.addend_scale, compute.numpy()), "beta"),
                name="scaled_c",
            )
        y = op("Add", y, term, name="sum")
    inputs = [data, *parameters.values(), *([addend] if addend is not None else [])]
    body = ir.Graph(inputs, [y], nodes=op.nodes, opset_imports={"": opset_of(model)}, name=prefix)
    function = ir.Function(DOMAIN, prefix, graph=body, attributes=())
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)

    arguments: list[ir.Value | None] = [node.inputs[site.wiring.data], *values.values()]
    if site.wiring.addend is not None:
        arguments.append(node.inputs[site.wiring.addend])
    old = node.outputs[0]
    result = ir.Value(name=old.name, type=old.type, shape=old.shape)
    call = ir.Node(DOMAIN, prefix, arguments, outputs=[result], name=prefix)
    call.metadata_props.update({**node.metadata_props, **metadata})
    operands = list(node.inputs)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [call], [old], [result])
    for operand in operands:
        if operand is not None and operand not in arguments:
            _drop(model, operand)


def _steps(op: Builder, value: ir.Value, steps: Sequence[Step]) -> ir.Value:
    for kind, argument in steps:
        if kind == "transpose":
            value = op("Transpose", value, perm=argument)
        else:
            value = op("Reshape", value, op.constant(np.asarray(argument, np.int64)))
    return value


def _drop(model: ir.Model, value: ir.Value) -> None:
    """Remove what made a constant that nobody reads any more."""
    pending = [value]
    while pending:
        at = pending.pop()
        if at.uses() or at.is_graph_output():
            continue
        node = at.producer()
        if node is not None:
            if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            pending.extend(v for v in node.inputs if v is not None)
            node.graph.remove(node, safe=True)
        elif at.is_initializer() and at.graph is not None and at.name is not None:
            graph = at.graph
            if at.is_graph_input():
                if (model.ir_version or 0) >= 4:
                    continue
                graph.inputs.remove(at)
            del graph.initializers[at.name]


def _edit_bias(
    model: ir.Model,
    site: Site,
    twins: Mapping[ir.Node, ir.Node],
    edits: Mapping[Constant, Array],
    names: Names,
) -> None:
    corrected = edits.get((site.name, "bias"))
    if corrected is None or site.bias is None:
        return
    node = twins[site.bias.node]
    old = node.inputs[site.bias.index]
    assert old is not None and old.dtype is not None
    array = bias_in_place(site, corrected).astype(old.dtype.numpy())
    value = _initializer(model, names.value(f"{site.name}/bias"), old.dtype, array.shape, lambda: array)
    node.replace_input_with(site.bias.index, value)
    _drop(model, old)


def _replace_weight(
    model: ir.Model, site: Site, node: ir.Node, names: Names, matrix: Callable[[], Array]
) -> None:
    """Let a node read another matrix (K, N): a constant in the shape in which the node reads its operand."""
    old = node.inputs[site.operand]
    assert old is not None
    dtype = ir.DataType[site.dtype.upper()]

    def operand() -> Array:
        made: Array = site.operand_layout.apply(site.layout.invert(matrix())).astype(dtype.numpy())
        return made

    value = _initializer(model, names.value(f"{site.name}/weight"), dtype, site.operand_layout.shape, operand)
    node.replace_input_with(site.operand, value)
    _drop(model, old)
