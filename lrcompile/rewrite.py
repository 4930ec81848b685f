"""Rewrite: the model in its neutral form, each rewritten site one call of a model-local function.

A function (domain ``lrcompile``, named after its site) takes the site's data, the factors, and what a Gemm adds; its body is
what the factorization emits between the site's wiring. Factors are initializers of the main graph, named ``SITE/METHOD/FACTOR``;
sites of a group share them. Corrected biases and weights that are cut are edited in place (`in_place`), and what lies between the sites of
a cut group follows. The model given is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from lrcompile.activations import SMOOTH, STEP, product
from lrcompile.coding import type_of
from lrcompile.encoding import OPSET, Part, decode, decode_rows, parts_of
from lrcompile.factors import FactorSet
from lrcompile.graph import (
    DOMAIN,
    Builder,
    Names,
    drop,
    opset_of,
)
from lrcompile.in_place import constant, copied, edit_bias, follow, forget_shapes, replace_weight, same
from lrcompile.interfaces import Call
from lrcompile.opsets import raise_opset
from lrcompile.quantize import Storage
from lrcompile.records import Site, Step


def rewrite(model: ir.Model, sets: Sequence[FactorSet]) -> ir.Model:
    """A copy of the model in neutral form."""
    copy, twins = copied(model)
    names = Names(copy)
    shared: dict[bytes, ir.Value] = {}
    if any(factors.coded for factors in sets):
        raise_opset(copy, OPSET)
    for factors in sets:
        edits = factors.method.edits(factors.group, factors.load())
        given = _Initializers(copy, factors, names, shared)
        for index, site in enumerate(factors.group.sites):
            edit_bias(copy, site, twins, edits, names)
            if (smaller := edits.get((site.name, "weight"))) is not None:
                replace_weight(
                    copy,
                    site,
                    twins[site.node],
                    names,
                    smaller.shape,
                    partial(same, smaller),
                    factors.storage,
                )
                twins[site.node].metadata_props.update(_metadata(factors, site))
            else:
                _call(copy, index, twins[site.node], factors, given, names)
        if (kept := edits.get((factors.group.name, "kept"))) is not None:
            follow(copy, factors.group, twins, edits, kept, names)
            forget_shapes(factors.group, twins)
    return copy


def _metadata(factors: FactorSet, site: Site) -> dict[str, str]:
    """Who made a node, from which weight, at which plan entry."""
    return {
        "lrcompile.method": factors.decision.method,
        "lrcompile.weight": site.weight,
        "lrcompile.group": factors.group.name,
    }


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
            self._made[name] = constant(
                self._model, self._names.value(f"{self._prefix}/{name}"), part.dtype, part.array.shape,
                partial(same, part.array),
            )  # fmt: skip
        elif name not in self._made and name == SMOOTH:
            array = self._factors.load()[name]
            if (key := array.tobytes()) not in self._shared:
                self._shared[key] = constant(
                    self._model, self._names.value(f"{self._prefix}/{name}"), self._factors.type_of(name), array.shape,
                    partial(same, array),
                )  # fmt: skip
            self._made[name] = self._shared[key]
        elif name not in self._made:
            factors = self._factors
            self._made[name] = constant(
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
