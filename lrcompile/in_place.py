"""Constants of a copied model in place: new ones, weights and biases that a site reads, and what follows where channels were cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from lrcompile.factors import bias_in_place
from lrcompile.graph import Names, drop, mark_constants, nodes, tensor_of
from lrcompile.interfaces import Array, Constant
from lrcompile.records import Group, Site


def copied(model: ir.Model) -> tuple[ir.Model, dict[ir.Node, ir.Node]]:
    """A copy that shares the tensors, and which of its nodes stands for which."""
    copy = model.clone()
    mark_constants(copy)
    return copy, {a: b for (_, a), (_, b) in zip(nodes(model), nodes(copy), strict=True)}


def same(array: Array) -> Array:
    return array


def constant(
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


def replace_weight(
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

    value = constant(model, names.value(f"{site.name}/weight"), dtype, read.shape, operand)
    if dtype != compute:
        cast = ir.node("Cast", [value], {"to": compute}, name=names.node(f"{site.name}/weight_cast"))
        cast.outputs[0].name = names.value(f"{site.name}/weight_cast")
        node.graph.insert_before(node, cast)
        value = cast.outputs[0]
    node.replace_input_with(site.operand, value)
    drop(model, old)


def edit_bias(
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
    value = constant(model, names.value(f"{site.name}/bias"), old.dtype, array.shape, lambda: array)
    node.replace_input_with(site.bias.index, value)
    drop(model, old)


def follow(
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
                index = index or constant(
                    model,
                    names.value(f"{group.name}/kept"),
                    ir.DataType.INT32,
                    kept.shape,
                    partial(same, kept),
                )
                gathered[old] = _gather(group, node, old, follower.axis, index, names)
            node.replace_input_with(follower.index, gathered[old])
            continue
        else:
            array, dtype = np.take(tensor.numpy(), kept, axis=follower.axis), tensor.dtype
        value = constant(
            model, names.value(f"{group.name}/follower"), dtype, array.shape, partial(same, array)
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


def forget_shapes(group: Group, twins: Mapping[ir.Node, ir.Node]) -> None:
    """What the file says of the shapes of narrower values is no longer true; a runtime finds them anew."""
    assert group.width is not None
    for value in group.width.values:
        maker, index = value.producer(), value.index()
        assert maker is not None and index is not None
        twins[maker].outputs[index].shape = None
