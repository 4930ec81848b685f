"""Permutations of columns that need no node: what follows is stored in the permuted order instead.

A pivoted weight gives its columns in the order of its pivots, and a Gather puts them back: y = z[.., p], p a permutation of N. Let
every value between here and the next products stand in z's order. With q = p^-1 a value v becomes v[.., q], and so do the constants:

    element-wise, v op c      constants with N entries a channel become c[.., q]; scalars stay; other operands are permuted as well
    normalisation of v        its scale and bias become c[.., q]; means and the like over the last axis do not change
    y = v W (MatMul, Gemm)    W becomes W[q, :], and y is what it was
    w = x W, asked for by an element-wise neighbour (act(x Wg) * (x Wu))      W becomes W[:, q], its addend c[.., q]
    w = Gather(z, i), likewise (the neighbour is pivoted too)                 i becomes i[q]: one of two Gathers goes, the other stays

The walker, `spread`, goes both ways from the Gather until constants end it everywhere. Where it meets anything else (a graph
output, a Reshape that splits heads, a value that both feeds the permuted product and is added to it: a residual stream, which one
layer alone must not reorder) the Gather stays. Nothing grows: a constant that others read too stops the walk, unless what is copied
is no larger than the index that goes.
`absorbed` asks the same walker of the original graph, before anything is rewritten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.graph import Names, dims, mark_constants, nodes
from lrcompile.interfaces import Array
from lrcompile.records import Site
from lrcompile.spread import Change, Spread, array_of, columns_of, constant_of, takes_columns


def fold(model: ir.Model) -> int:
    """Remove the Gathers of ours that only permute, wherever their neighbours can be stored permuted. In place; gives the number."""
    mark_constants(model)
    names = Names(model)
    removed = 0
    for alike in _by_index(model):
        # layers that share one weight share the index: together they need no copies of the constants behind them
        for some in (alike, *([g] for g in alike)) if len(alike) > 1 else (alike,):
            removed += _fold([g for g in some if g.graph is not None], names, model)
    return removed


def absorbed(site: Site, pivoted: Container[ir.Node] = ()) -> bool:
    """Whether a permutation of this site's columns would be folded away, asked of the original graph.

    pivoted: nodes of sites that are known to keep a Gather of their own, and so cannot be permuted for another one's sake.
    """
    if site.wiring is None or site.wiring.after:
        return False
    weight = site.node.inputs[site.operand]
    assert weight is not None
    readers = [u.node for u in weight.uses() if u.idx == site.operand and u.node.op_type == site.op]
    return any(_absorbed(some, site, pivoted) for some in (readers, [site.node]))


def _absorbed(starts: Sequence[ir.Node], site: Site, pivoted: Container[ir.Node]) -> bool:
    spread = Spread(site.N, [n.outputs[0] for n in starts], pivoted)
    assert site.wiring is not None
    data = [v for n in starts if (v := n.inputs[site.wiring.data]) is not None]
    more: list[ir.Value] = []
    for node in starts:
        operands = spread.operand(node, site.wiring.addend) if site.wiring.addend is not None else []
        if operands is None:
            return False
        more += operands
    return spread.ends(more, data) is not None


def _by_index(model: ir.Model) -> list[list[ir.Node]]:
    """Our Gathers of all columns of what they read, those with one index together, in the order of the graph."""
    found: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for body, node in nodes(model):
        if (
            body.function is not None
            or "lrcompile.method" not in node.metadata_props
            or not takes_columns(node)
        ):
            continue
        index = constant_of(node.inputs[1])
        if index is not None and index.shape == (columns_of(node.inputs[0]),):
            found[index.value].append(node)
    return list(found.values())


def _fold(gathers: Sequence[ir.Node], names: Names, model: ir.Model) -> int:
    """Fold Gathers that read one index, all or none."""
    index = gathers[0].inputs[1] if gathers else None
    order = array_of(index)
    if index is None or order is None or any(g.inputs[1] is not index for g in gathers):
        return 0  # none is left, or another one's fold changed some
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        return 0
    starts, data = [g.outputs[0] for g in gathers], [v for g in gathers if (v := g.inputs[0]) is not None]
    if any(v.is_graph_output() for v in starts):
        return 0
    if not np.array_equal(order, np.arange(len(order))):
        spread = Spread(len(order), starts)
        if (changes := spread.ends((), data)) is None:
            return 0
        for change in changes:
            _permute(change, _inverse(order), names, model)
    for gather, source in zip(gathers, data, strict=True):
        out = gather.outputs[0]
        source.shape, source.type = source.shape or out.shape, source.type or out.type
        ir.convenience.replace_all_uses_with(out, source)
        assert gather.graph is not None
        gather.graph.remove(gather, safe=True)
    _discard(index)
    return len(gathers)


def _permute(change: Change, order: Array, names: Names, model: ir.Model) -> None:
    """Give a constant's readers the permuted one, which is made when it is read."""
    old = change.constant.tensor

    def permuted() -> ir.TensorProtocol:
        array = old.numpy()
        for axis in change.axes:
            array = np.take(array, order, axis=axis)
        return ir.Tensor(np.ascontiguousarray(array), dtype=old.dtype, name=old.name)

    tensor = ir.LazyTensor(permuted, dtype=old.dtype, shape=ir.Shape(dims(old)), name=old.name)
    value = change.constant.value
    if change.copied_for:
        name = names.value(f"{value.name}/permuted")
        copy = ir.Value(
            name=name, type=ir.TensorType(old.dtype), shape=ir.Shape(dims(old)), const_value=tensor
        )
        model.graph.register_initializer(copy)
        if (model.ir_version or 0) < 4:  # there an initializer is an input as well
            copy.meta["lrcompile.constant"] = True
            model.graph.inputs.append(copy)
        for node, index in change.copied_for:
            node.replace_input_with(index, copy)
    elif (made := value.producer()) is not None:  # a Constant
        made.meta.pop("lrcompile.tensor", None)
        made.attributes.clear()
        made.attributes["value"] = ir.AttrTensor("value", tensor)
    else:
        value.const_value = tensor


def _inverse(order: Array) -> Array:
    inverse: Array = np.argsort(order)
    return inverse


def _discard(value: ir.Value) -> None:
    """Remove an initializer that nobody reads any more."""
    if value.uses() or value.graph is None or not value.is_initializer():
        return
    if value.is_graph_input():  # before IR 4
        value.graph.inputs.remove(value)
    value.graph.initializers.pop(value.name or "", None)
