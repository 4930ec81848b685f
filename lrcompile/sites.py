"""Find: every constant weight use of a model, whether it can be taken, and if not, why.

A weight use is an input of one of the operators in `_READERS` that always holds the same float tensor: an initializer or a
Constant node, seen through Transpose, Reshape, Squeeze, Unsqueeze and Identity (its layout) and through Cast,
DequantizeLinear and Mul by a constant (its numbers).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lrcompile import wiring
from lrcompile.graph import (
    FLOATS,
    dims,
    is_overridable,
    mark_constants,
    nodes,
    reached_from,
    shapes_of,
    tensor_of,
)
from lrcompile.grouping import groups_of
from lrcompile.records import Bias, Finding, Kind, Layout, Site

logger = logging.getLogger(__name__)

# Operator -> which inputs may hold a weight. Everything here is found; what `wiring` cannot express is listed with a reason.
_READERS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "MatMul"): (0, 1),
    ("", "Gemm"): (0, 1),
    ("", "Gather"): (0,),
    ("", "Einsum"): (0, 1, 2, 3),
    ("", "Conv"): (1,),
    ("", "ConvTranspose"): (1,),
    ("", "LSTM"): (1, 2),
    ("", "GRU"): (1, 2),
    ("", "RNN"): (1, 2),
    ("", "MatMulInteger"): (0, 1),
    ("", "QLinearMatMul"): (0, 3),
    ("", "ConvInteger"): (1,),
    ("", "QLinearConv"): (3,),
    ("com.microsoft", "FusedMatMul"): (0, 1),
    ("com.microsoft", "MatMulNBits"): (1,),
    ("com.microsoft", "Attention"): (1,),
    ("com.microsoft", "GatherBlockQuantized"): (0,),
    ("com.microsoft", "EmbedLayerNormalization"): (2, 3, 4),
}
_LAYOUT_OPS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
_NUMBER_OPS = frozenset({"Cast", "DequantizeLinear", "Mul"})

_NOT_FINITE = "the weight holds NaN or Inf"
_SPOILED = "it computes with what a weight of NaN or Inf gave: factors would turn an Inf into NaN"


def find(model: ir.Model) -> Finding:
    """All sites of the model and their groups. Pure: the model is not changed (IR 3 constants are marked in `meta`)."""
    mark_constants(model)
    shapes = shapes_of(model)
    ranks = {value: len(shape) for value, shape in shapes.items()}
    finite: dict[int, bool] = {}
    sites: list[Site] = []
    spoiling: list[ir.Node] = []
    used: set[str] = set()
    weights: dict[ir.Value, str] = {}  # both branches of an If may have a constant of the same name
    for body, node in nodes(model):
        for operand in _READERS.get((node.domain, node.op_type), ()):
            if operand >= len(node.inputs):
                continue
            traced = _site(node, operand, ranks, body.path)
            if traced is None:
                continue
            site, stored = traced
            if stored not in weights:
                weights[stored] = _unique(site.weight, set(weights.values()))
            site = replace(site, weight=weights[stored])
            if site.refusal is None and body.function is not None:
                site = replace(site, refusal="stands in a local function that could not be inlined")
            if not _is_finite(site, finite):
                spoiling.append(node)
                if site.refusal is None:
                    logger.warning(
                        "%s: the weight %s holds NaN or Inf and is left as it is", site.name, site.weight
                    )
                    site = replace(site, refusal=_NOT_FINITE)
            sites.append(replace(site, name=_unique(site.name, used)))
    spoiled = reached_from(model, spoiling)
    sites = [replace(s, refusal=_SPOILED) if s.refusal is None and s.node in spoiled else s for s in sites]
    return Finding(tuple(sites), groups_of(sites, shapes))


def _site(node: ir.Node, operand: int, ranks: dict[ir.Value, int], path: str) -> tuple[Site, ir.Value] | None:
    """The site at this input and the constant behind it, None when there is no constant."""
    value = node.inputs[operand]
    if value is None:
        return None
    origin = _trace(value)
    if origin is None:
        return None
    stored_value, root, layout, refusal = origin
    tensor = stored_value.const_value if stored_value.producer() is None else tensor_of(stored_value)
    if tensor is None:
        return None
    shape = dims(tensor)
    dtype = _dtype(value) or _dtype(root) or tensor.dtype
    kind: Kind = "other"
    wired = None
    matrix = layout
    if refusal is None and dtype not in FLOATS:
        refusal = f"computes in {dtype.name.lower()}, not in a float type"
    if refusal is None and layout is None:
        refusal = "the weight is reshaped to a shape that is not constant"
    if refusal is None and math.prod(shape) == 0:
        refusal = "the weight is empty"
    if refusal is None and layout is not None:
        answer = wiring.wire(node, operand, layout, ranks)
        if isinstance(answer, str):
            refusal = answer
        else:
            kind, wired, matrix = answer
    if node.op_type in ("Conv", "ConvTranspose"):
        kind = "conv"
    elif node.op_type == "Gather":
        kind = "lookup"
    label = node.name or (node.outputs[0].name or "" if node.outputs else "") or node.op_type
    site = Site(
        name=label,
        op=node.op_type,
        kind=kind,
        node=node,
        operand=operand,
        weight=stored_value.name or label,
        weight_shape=shape,
        stored=tensor.dtype.name.lower(),
        root=root,
        layout=matrix or Layout(shape),
        operand_layout=layout or Layout(shape),
        dtype=dtype.name.lower(),
        wiring=wired,
        refusal=refusal,
        path=path,
    )
    if refusal is None and kind == "conv" and layout is not None:
        site = replace(site, window=wiring.window_of(node, layout.shape))
    return (replace(site, bias=_bias(site)) if refusal is None and kind != "lookup" else site), stored_value


def _dtype(value: ir.Value) -> ir.DataType | None:
    tensor = tensor_of(value)
    if tensor is not None:
        return tensor.dtype
    node = value.producer()
    if node is None:
        return value.dtype
    if node.op_type == "Cast" and "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in _LAYOUT_OPS or node.op_type == "Mul":
        first = node.inputs[0]
        return _dtype(first) if first is not None else None
    if node.op_type == "DequantizeLinear":
        if "output_dtype" in node.attributes and node.attributes["output_dtype"].as_int():
            return ir.DataType(node.attributes["output_dtype"].as_int())
        return _dtype(node.inputs[1]) if node.inputs[1] is not None else None
    return value.dtype


def _trace(value: ir.Value) -> tuple[ir.Value, ir.Value, Layout | None, str | None] | None:
    """Walk back from an operand to the constant behind it.

    Returns (the stored constant, the value where its numbers are final, the layout from there on, why not), or None when
    the operand is not constant. The layout is None when a Reshape's shape is not constant.
    """
    steps: list[ir.Node] = []
    numbers: list[ir.Node] = []
    root: ir.Value | None = None
    at = value
    refusal = None
    while True:
        if at.is_graph_output():
            refusal = refusal or "the weight is an output of the graph"
        if at.is_initializer() and is_overridable(at):
            refusal = "a caller may override the weight: it is a graph input with a default"
            break
        if tensor_of(at) is not None:
            break
        node = at.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type in _LAYOUT_OPS:
            (numbers if root is not None else steps).append(node)
        elif node.op_type in _NUMBER_OPS:
            if node.op_type == "Mul" and not _is_scaling(node):
                return None
            root = root if root is not None else at
            numbers.append(node)
        else:
            return None
        source = node.inputs[0]
        if node.op_type == "Mul" and _extent(node.inputs[0]) < _extent(
            node.inputs[1]
        ):  # the other one is the scale
            source = node.inputs[1]
        if source is None:
            return None
        at = source
    for node in numbers:
        if not all(v is None or _is_constant(v, or_default=True) for v in node.inputs):
            return None
        if refusal is None and not all(v is None or _is_constant(v) for v in node.inputs):
            refusal = f"a caller may override what {node.op_type} makes the weight with: it is a graph input with a default"
    tensor = at.const_value if at.producer() is None else tensor_of(at)
    assert tensor is not None
    shape = dims(tensor)
    if root is not None:
        known = _shape_through(list(reversed(numbers)), shape)
        if known is None:
            return at, root, None, refusal
        shape = known
    layout: Layout | None = Layout(shape)
    for node in reversed(steps):
        layout = _step(layout, node) if layout is not None else None
    return at, root if root is not None else at, layout, refusal


def _is_constant(value: ir.Value | None, depth: int = 0, *, or_default: bool = False) -> bool:
    """Whether a value never changes: a constant seen through the operators that `_trace` follows.

    or_default: also what a caller may override but need not.
    """
    if value is None or depth > 64:
        return False
    if tensor_of(value) is not None or (or_default and value.is_initializer()):
        return True
    node = value.producer()
    return (
        node is not None
        and node.domain == ""
        and node.op_type in _LAYOUT_OPS | _NUMBER_OPS
        and all(v is None or _is_constant(v, depth + 1, or_default=or_default) for v in node.inputs)
    )


def _is_scaling(node: ir.Node) -> bool:
    return all(_is_constant(v, or_default=True) for v in node.inputs)


def _extent(value: ir.Value | None) -> tuple[int, int, bool]:
    """Elements and axes of the constant behind a value, and whether it is quantized: a weight is told from its scale by these."""
    while value is not None and not value.is_initializer() and tensor_of(value) is None:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.inputs else None
    tensor = value.const_value if value is not None and value.is_initializer() else tensor_of(value)
    return (
        (int(tensor.size), len(tensor.shape), tensor.dtype not in FLOATS)
        if tensor is not None
        else (0, 0, False)
    )


def _shape_through(chain: list[ir.Node], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape after a chain of number and layout operators, None when a scale would broadcast the weight."""
    layout: Layout | None = Layout(shape)
    for node in chain:
        if node.op_type in _LAYOUT_OPS:
            layout = _step(layout, node) if layout is not None else None
        elif (
            node.op_type == "Mul"
            and layout is not None
            and max(_extent(v)[0] for v in node.inputs) > math.prod(layout.shape)
        ):
            return None
    return layout.shape if layout is not None else None


def _step(layout: Layout, node: ir.Node) -> Layout | None:
    """The layout after one of the layout operators, None when its argument is not constant."""
    shape = layout.shape
    if node.op_type == "Identity":
        return layout
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return layout.transpose(
            tuple(perm.as_ints()) if perm is not None else tuple(reversed(range(len(shape))))
        )
    axes = node.attributes.get("axes")
    argument = node.inputs[1] if len(node.inputs) > 1 else None
    given: list[int] | None = list(axes.as_ints()) if axes is not None else None
    if argument is not None:
        tensor = tensor_of(argument)
        if tensor is None:
            return None
        given = [int(n) for n in tensor.numpy().reshape(-1)]
    if node.op_type == "Reshape":
        if given is None:
            return None
        allow_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
        wanted = [shape[i] if n == 0 and not allow_zero else n for i, n in enumerate(given)]
        if -1 in wanted:
            rest = math.prod(n for n in wanted if n != -1)
            wanted[wanted.index(-1)] = math.prod(shape) // rest if rest else 0
        return layout.reshape(tuple(wanted))
    if node.op_type == "Squeeze":
        drop = (
            {a % len(shape) for a in given}
            if given is not None
            else {i for i, n in enumerate(shape) if n == 1}
        )
        return layout.reshape(tuple(n for i, n in enumerate(shape) if i not in drop))
    if given is None:  # Unsqueeze
        return None
    rank = len(shape) + len(given)
    new = {a % rank for a in given}
    old = iter(shape)
    return layout.reshape(tuple(1 if i in new else next(old) for i in range(rank)))


def _bias(site: Site) -> Bias | None:
    """The constant of N elements that is added to this site's output, and to nothing else."""
    assert site.wiring is not None
    if site.wiring.after:  # the site's N is not the last axis of what is added to
        return None
    if site.wiring.addend is not None:
        value = site.node.inputs[site.wiring.addend]
        return _as_bias(site, site.node, site.wiring.addend, value, site.wiring.addend_scale)
    if site.kind == "conv":  # what is added behind it has an axis for channels
        return None
    output = site.node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output():
        return None
    node, index = uses[0].node, uses[0].idx
    if node.op_type != "Add" or node.domain != "" or node.graph is not site.node.graph:
        return None
    return _as_bias(site, node, 1 - index, node.inputs[1 - index], 1.0)


def _as_bias(site: Site, node: ir.Node, index: int, value: ir.Value | None, scale: float) -> Bias | None:
    tensor = tensor_of(value)
    if value is None or tensor is None or scale == 0.0 or tensor.dtype not in FLOATS:
        return None
    shape = dims(tensor)
    # (N,) or (1, .., N); a longer shape than the product's could widen it, so at most the product's two axes count
    if not shape or shape[-1] != site.N or math.prod(shape) != site.N or len(shape) > 2:
        return None
    if not np.isfinite(tensor.numpy().astype(np.float64)).all():
        return None
    return Bias(node, index, value, shape, scale)


def _is_finite(site: Site, known: dict[int, bool]) -> bool:
    """Whether all numbers of the weight are finite; integers always are. Each constant is read once."""
    tensors = [t for t in _tensors_behind(site.root) if t.dtype.is_floating_point()]
    for tensor in tensors:
        if id(tensor) not in known:
            array = tensor.numpy()
            flat = array.reshape(-1)
            block = 1 << 22  # a block at a time: the mask must not cost a weight's memory
            known[id(tensor)] = all(
                bool(np.isfinite(flat[i : i + block].astype(np.float32, copy=False)).all())
                if array.dtype.itemsize < 8
                else bool(np.isfinite(flat[i : i + block]).all())
                for i in range(0, flat.size, block)
            )
    return all(known[id(t)] for t in tensors)


def _tensors_behind(value: ir.Value | None) -> Iterator[ir.TensorProtocol]:
    pending = [value]
    while pending:
        at = pending.pop()
        tensor = tensor_of(at)
        if tensor is not None:
            yield tensor
        elif at is not None and (node := at.producer()) is not None:
            pending.extend(node.inputs)


def _unique(wish: str, used: set[str]) -> str:
    name, i = wish, 1
    while name in used:
        i += 1
        name = f"{wish}#{i}"
    used.add(name)
    return name
