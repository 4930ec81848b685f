"""Rewrite: the model in its neutral form, each rewritten site one call of a model-local function.

A function (domain ``lrcompile``, named after its site) takes the site's data, the factors, and what a Gemm adds; its body is
what the factorization emits between the site's wiring. Factors are initializers of the main graph, named ``SITE/METHOD/FACTOR``;
sites of a group share them. Corrected biases and weights that are cut are edited in place, and what lies between the sites of a
cut group follows. The model given is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from lrcompile.activations import SMOOTH, STEP, product
from lrcompile.coding import type_of
from lrcompile.encoding import OPSET, Part, decode, decode_rows, parts_of
from lrcompile.factors import FactorSet, bias_in_place
from lrcompile.graph import (
    DOMAIN,
    Builder,
    Names,
    dims,
    drop,
    mark_constants,
    nodes,
    opset_of,
    tensor_of,
)
from lrcompile.interfaces import Array, Call, Constant
from lrcompile.opsets import raise_opset
from lrcompile.quantize import Storage
from lrcompile.records import Group, Site, Step

_ROWS = 256  # of a matrix, moved at a time


def rewrite(model: ir.Model, sets: Sequence[FactorSet]) -> ir.Model:
    """A copy of the model in neutral form."""
    copy, twins = _copy(model)
    names = Names(copy)
    shared: dict[bytes, ir.Value] = {}
    if any(factors.coded for factors in sets):
        raise_opset(copy, OPSET)
    for factors in sets:
        edits = factors.method.edits(factors.group, factors.load())
        given = _Initializers(copy, factors, names, shared)
        for index, site in enumerate(factors.group.sites):
            _edit_bias(copy, site, twins, edits, names)
            if (smaller := edits.get((site.name, "weight"))) is not None:
                _replace_weight(
                    copy,
                    site,
                    twins[site.node],
                    names,
                    smaller.shape,
                    partial(_same, smaller),
                    factors.storage,
                )
                twins[site.node].metadata_props.update(_metadata(factors, site))
            else:
                _call(copy, index, twins[site.node], factors, given, names)
        if (kept := edits.get((factors.group.name, "kept"))) is not None:
            _follow(copy, factors.group, twins, edits, kept, names)
            _forget_shapes(factors.group, twins)
    return copy


def reconstructed(model: ir.Model, sets: Sequence[FactorSet], jitter: int | None = None) -> ir.Model:
    """A copy of the model in which every changed constant is its reconstruction, rounded to its type: the oracle.

    jitter: a seed by which its weights are moved as `jittered` moves the original's.
    """
    oracle = Reconstruction(model)
    oracle.put(sets, jitter)
    return oracle.model


class Reconstruction:
    """A copy of a model that takes reconstructed constants, group by group. model: the copy as it stands."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self._twins = _copy(model)
        self._names = Names(self.model)

    def put(self, sets: Sequence[FactorSet], jitter: int | None = None) -> None:
        for factors in sets:
            changed = factors.method.reconstruct(factors.group, factors.load())
            for site in factors.group.sites:
                node = self._twins[site.node]
                if (site.name, "weight") in changed:
                    made = _reconstruction(factors, site)
                    if jitter is not None:
                        made = _jitter(made, site, _coarser(site, factors.storage), jitter)
                    _replace_weight(self.model, site, node, self._names, site.layout.shape, made)
                _edit_bias(self.model, site, self._twins, changed, self._names)

    def free(self, site: Site, matrix: Callable[[], Array]) -> dict[str, ir.Value]:
        """Give a site a weight (and a bias) that a caller may override, and keep its value as the default."""
        node = self._twins[site.node]
        _replace_weight(self.model, site, node, self._names, site.layout.shape, matrix)
        weight = node.inputs[site.operand]
        assert weight is not None
        freed = {"weight": weight}
        if site.bias is not None:
            reader = self._twins[site.bias.node]
            old = reader.inputs[site.bias.index]
            tensor = tensor_of(old)
            assert old is not None and tensor is not None
            name = self._names.value(f"{site.name}/bias")
            value = _initializer(self.model, name, tensor.dtype, dims(tensor), tensor.numpy)
            reader.replace_input_with(site.bias.index, value)
            freed["bias"] = value
        return freed


def as_operands(site: Site, changed: Mapping[Constant, Array]) -> dict[str, Array]:
    """A site's changed weight and bias in the shapes and types in which its nodes read them."""
    made: dict[str, Array] = {}
    dtype = ir.DataType[site.dtype.upper()].numpy()
    if (matrix := changed.get((site.name, "weight"))) is not None:
        made["weight"] = site.operand_layout.apply(site.layout.invert(matrix)).astype(dtype)
    if (bias := changed.get((site.name, "bias"))) is not None and site.bias is not None:
        assert site.bias.value.dtype is not None
        made["bias"] = bias_in_place(site, bias).astype(site.bias.value.dtype.numpy())
    return made


def jittered(
    model: ir.Model, sets: Sequence[FactorSet], read: Callable[[Site], Array], seed: int
) -> ir.Model:
    """A copy in which every rewritten weight (N, K) is moved by half a unit in the last place, up or down by chance."""
    copy, twins = _copy(model)
    names = Names(copy)
    for factors in sets:
        for site in factors.group.sites:
            moved = _jitter(partial(read, site), site, _coarser(site, factors.storage), seed)
            _replace_weight(copy, site, twins[site.node], names, site.layout.shape, moved)
    return copy


def _reconstruction(factors: FactorSet, site: Site) -> Callable[[], Array]:
    return lambda: factors.method.reconstruct(factors.group, factors.load())[site.name, "weight"]


def _jitter(read: Callable[[], Array], site: Site, storage: ir.DataType, seed: int) -> Callable[[], Array]:
    """W moved by half a unit in the last place of each entry, or of a typical one where the entry is smaller.

    Factors are as exact as the whole matrix allows, not each entry: beside an outlier a small entry has no digits of its own.
    """

    def weight() -> Array:
        W = read()
        typical = np.linalg.norm(W) / np.sqrt(max(W.size, 1))
        # half a unit of float64 is nothing, because it is what we compute in
        half = 1.0 if storage == ir.DataType.DOUBLE else 0.5
        rng = np.random.default_rng((seed, site.elements))
        moved = np.empty_like(W)
        for start in range(0, len(W), _ROWS):  # a large matrix would be copied six times
            part = W[start : start + _ROWS]
            ulp = np.spacing(np.maximum(np.abs(part), typical).astype(storage.numpy())).astype(np.float64)
            moved[start : start + _ROWS] = (
                part + half * (2.0 * rng.integers(2, size=part.shape, dtype=np.int8) - 1.0) * ulp
            )
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


def _metadata(factors: FactorSet, site: Site) -> dict[str, str]:
    """Who made a node, from which weight, at which plan entry."""
    return {
        "lrcompile.method": factors.decision.method,
        "lrcompile.weight": site.weight,
        "lrcompile.group": factors.group.name,
    }


def _same(array: Array) -> Array:
    return array


class _Initializers:
    """Factors as constants of the main graph, each made when the first call asks for it.

    shared: what inputs are smoothed by, which sites that read one value have in common, by its bytes.
    """

    def __init__(
        self, model: ir.Model, factors: FactorSet, names: Names, shared: dict[bytes, ir.Value]
    ) -> None:
        self._model, self._factors, self._names, self._shared = model, factors, names, shared
        self._made: dict[str, ir.Value] = {}
        self._prefix = f"{factors.group.sites[0].name}/{factors.decision.method}"
        self._parts = parts_by_name(factors)

    def __getitem__(self, name: str) -> ir.Value:
        if name not in self._made and (part := self._parts.get(name)) is not None:
            self._made[name] = _initializer(
                self._model, self._names.value(f"{self._prefix}/{name}"), part.dtype, part.array.shape,
                partial(_same, part.array),
            )  # fmt: skip
        elif name not in self._made and name == SMOOTH:
            array = self._factors.load()[name]
            if (key := array.tobytes()) not in self._shared:
                self._shared[key] = _initializer(
                    self._model, self._names.value(f"{self._prefix}/{name}"), self._factors.type_of(name), array.shape,
                    partial(_same, array),
                )  # fmt: skip
            self._made[name] = self._shared[key]
        elif name not in self._made:
            factors = self._factors
            self._made[name] = _initializer(
                self._model, self._names.value(f"{self._prefix}/{name}"), factors.type_of(name), factors.shapes[name],
                lambda: factors.load()[name],
            )  # fmt: skip
        return self._made[name]


def parts_by_name(factors: FactorSet) -> dict[str, Part]:
    """The constants of coded factors: ``w``, ``w.scale``, ``w.zero``."""
    by_row = factors.group.sites[0].kind == "lookup"
    return {
        f"{name}.{suffix}" if suffix else name: part
        for name, coded in (factors.codes().items() if factors.coded else ())
        for suffix, part in parts_of(coded, by_row=by_row).items()
    }


class _Parameters(Mapping[str, ir.Value]):
    """The factors as values inside a function, in the type that it computes in. Those never asked for do not become parameters."""

    def __init__(self, op: Builder, factors: FactorSet, compute: ir.DataType, prefix: str) -> None:
        self.parameters: dict[str, ir.Value] = {}
        self._typed: dict[str, ir.Value] = {}
        self._op, self._factors, self._compute, self._prefix = op, factors, compute, prefix
        self._names = tuple(parts_by_name(factors))

    def __getitem__(self, name: str) -> ir.Value:
        if name not in self._typed:
            if name not in self._factors.shapes or name.startswith("bias."):
                raise KeyError(name)
            if name in self._factors.coded:
                shape = self._factors.shapes[name]
                self._typed[name] = decode(
                    self._op, self.parts(name), self._kind(name), shape, self._compute, name
                )
                return self._typed[name]
            value = self.parameters[name] = ir.Value(name=f"{self._prefix}/{name}_in")
            if self._factors.type_of(name) not in (self._compute, ir.DataType.INT32):
                value = self._op("Cast", value, name=f"{name}_cast", to=self._compute)
            self._typed[name] = value
        return self._typed[name]

    def rows(self, name: str, ids: ir.Value) -> ir.Value:
        """Rows of a coded table."""
        shape = self._factors.shapes[name]
        return decode_rows(self._op, self.parts(name), self._kind(name), shape, ids, self._compute, name)

    def _kind(self, name: str) -> Storage:
        return type_of(self._factors.method, name, str(self._factors.decision.storage))

    def parts(self, name: str) -> dict[str, ir.Value]:
        """Parameters for the constants of a coded factor, by suffix."""
        found: dict[str, ir.Value] = {}
        for part in self._names:
            head, _, suffix = part.rpartition(".")
            if part == name or (head == name and part not in self._factors.shapes):
                found["" if part == name else suffix] = self.parameters[part] = ir.Value(
                    name=f"{self._prefix}/{part}_in"
                )
        return found

    def __iter__(self) -> Iterator[str]:
        return (n for n in self._factors.shapes if not n.startswith("bias."))

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
    model: ir.Model, index: int, node: ir.Node, factors: FactorSet, given: _Initializers, names: Names
) -> None:
    """Put a call of a new function in the place of the node of the group's site `index`."""
    group, site = factors.group, factors.group.sites[index]
    assert site.wiring is not None and node.graph is not None
    prefix = names.node(f"{site.name}/{factors.decision.method}")
    metadata = _metadata(factors, site)
    op = Builder(prefix, metadata)
    data = ir.Value(name=f"{prefix}/x")
    addend = ir.Value(name=f"{prefix}/c") if site.wiring.addend is not None else None
    compute = ir.DataType[site.dtype.upper()]
    inside = _Parameters(op, factors, compute, prefix)
    shapes = {n: factors.shapes[n] for n in inside}
    x = _steps(op, data, site.wiring.before)
    bias = addend if site.kind == "conv" else None  # a Conv adds it itself
    if site.kind == "lookup" and factors.coded:  # emit would decode the whole table
        y = inside.rows("w", x)
    elif (rounded_to := factors.decision.activations) is not None:
        static = STEP in factors.shapes
        y = product(
            op, x, rounded_to, {} if static else inside.parts("w"), inside[SMOOTH] if SMOOTH in factors.shapes else None,
            inside[STEP] if static else None, inside["w"] if static else None,
        )  # fmt: skip
    else:
        y = factors.method.emit(
            op,
            Call(
                site.kind,
                group.transposed[index],
                x,
                inside,
                shapes,
                opset_of(model),
                index,
                site.window,
                bias,
            ),
        )
    if site.wiring.scale != 1.0:
        y = op("Mul", y, op.constant(np.asarray(site.wiring.scale, compute.numpy()), "scale"), name="scaled")
    y = _steps(op, y, site.wiring.after)
    if addend is not None and bias is None:
        term = addend
        if site.wiring.addend_scale != 1.0:
            term = op(
                "Mul",
                addend,
                op.constant(np.asarray(site.wiring.addend_scale, compute.numpy()), "beta"),
                name="scaled_c",
            )
        y = op("Add", y, term, name="sum")
    inputs = [data, *inside.parameters.values(), *([addend] if addend is not None else [])]
    body = ir.Graph(inputs, [y], nodes=op.nodes, opset_imports={"": opset_of(model)}, name=prefix)
    function = ir.Function(DOMAIN, prefix, graph=body, attributes=())
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)

    arguments: list[ir.Value | None] = [
        node.inputs[site.wiring.data],
        *(given[name] for name in inside.parameters),
    ]
    if site.wiring.addend is not None:
        arguments.append(node.inputs[site.wiring.addend])
    old = node.outputs[0]
    result = ir.Value(name=old.name, type=old.type, shape=old.shape)
    called = ir.Node(DOMAIN, prefix, arguments, outputs=[result], name=prefix)
    called.metadata_props.update({**node.metadata_props, **metadata})
    operands = list(node.inputs)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [called], [old], [result])
    for operand in operands:
        if operand is not None and operand not in arguments:
            drop(model, operand)


def _steps(op: Builder, value: ir.Value, steps: Sequence[Step]) -> ir.Value:
    for kind, argument in steps:
        if kind == "transpose":
            value = op("Transpose", value, perm=argument)
        else:
            value = op("Reshape", value, op.constant(np.asarray(argument, np.int64)))
    return value


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
    drop(model, old)


def _follow(
    model: ir.Model,
    group: Group,
    twins: Mapping[ir.Node, ir.Node],
    edits: Mapping[Constant, Array],
    kept: Array,
    names: Names,
) -> None:
    """Cut what is read between the sites of a group to the channels that are left, and give Reshapes the new size of a head."""
    width = group.width
    assert width is not None
    size = edits[group.sites[0].name, "weight"].shape[1] // (
        width.heads * (width.repeat if group.kind == "query_key" else 1)
    )
    gathered: dict[ir.Value, ir.Value] = {}
    index: ir.Value | None = None
    for follower in width.followers:
        node = twins[follower.node]
        old = node.inputs[follower.index]
        assert old is not None
        tensor = tensor_of(old)
        if follower.axis is None:
            # bounds of a Slice are of one type, which may be the smaller one
            dtype = ir.DataType.INT64 if tensor is None else tensor.dtype
            new = size // 2 if follower.half else size
            array = np.array([new if n is None else n for n in follower.shape], dtype.numpy())
            node.attributes.pop("allowzero", None)
        elif tensor is None or width.planes:  # a table of cos or sin is read by all layers
            if old not in gathered:
                index = index or _initializer(
                    model,
                    names.value(f"{group.name}/kept"),
                    ir.DataType.INT32,
                    kept.shape,
                    partial(_same, kept),
                )
                gathered[old] = _gather(group, node, old, follower.axis, index, names)
            node.replace_input_with(follower.index, gathered[old])
            continue
        else:
            array, dtype = np.take(tensor.numpy(), kept, axis=follower.axis), tensor.dtype
        value = _initializer(
            model, names.value(f"{group.name}/follower"), dtype, array.shape, partial(_same, array)
        )
        node.replace_input_with(follower.index, value)
        drop(model, old)


def _gather(
    group: Group, reader: ir.Node, old: ir.Value, axis: int, index: ir.Value, names: Names
) -> ir.Value:
    """The kept channels of a value, taken as soon as it is made: others of the group read them too."""
    graph = reader.graph
    assert graph is not None
    gather = ir.node("Gather", [old, index], {"axis": axis}, name=names.node(f"{group.name}/take"))
    made = gather.outputs[0]
    made.name, made.type = names.value(f"{group.name}/taken"), old.type
    gather.metadata_props["lrcompile.group"] = group.name
    maker = old.producer()
    if maker is not None and maker.graph is graph:
        graph.insert_after(maker, gather)
    else:  # an input, or made around a body
        graph.insert_before(graph[0], gather)
    return made


def _forget_shapes(group: Group, twins: Mapping[ir.Node, ir.Node]) -> None:
    """What the file says of the shapes of narrower values is no longer true; a runtime finds them anew."""
    assert group.width is not None
    for value in group.width.values:
        maker, index = value.producer(), value.index()
        assert maker is not None and index is not None
        twins[maker].outputs[index].shape = None


def _replace_weight(
    model: ir.Model,
    site: Site,
    node: ir.Node,
    names: Names,
    shape: tuple[int, ...],
    matrix: Callable[[], Array],
    storage: ir.DataType | None = None,
) -> None:
    """Let a node read another matrix of this shape: a constant in the layout in which the node reads its operand.

    storage: its type in the file; by default the one that the node computes in.
    """
    old = node.inputs[site.operand]
    assert old is not None and node.graph is not None
    compute = ir.DataType[site.dtype.upper()]
    dtype = storage if storage is not None else compute
    whole, read = site.layout, site.operand_layout
    if shape != whole.shape:
        stored = whole.stored_for(shape)
        whole, read = whole.over(stored), read.over(stored)

    def operand() -> Array:
        made: Array = read.apply(whole.invert(matrix())).astype(dtype.numpy())
        return made

    value = _initializer(model, names.value(f"{site.name}/weight"), dtype, read.shape, operand)
    if dtype != compute:
        cast = ir.node("Cast", [value], {"to": compute}, name=names.node(f"{site.name}/weight_cast"))
        cast.outputs[0].name = names.value(f"{site.name}/weight_cast")
        node.graph.insert_before(node, cast)
        value = cast.outputs[0]
    node.replace_input_with(site.operand, value)
    drop(model, old)
