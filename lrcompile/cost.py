"""Pure: what weights and forms of them cost. Parameters, bytes and FLOPs; a measured table comes with the engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.graph import FLOATS, dims, shapes_of, tensors
from lrcompile.interfaces import Array
from lrcompile.records import Finding, Group, Site


def parameters_of(model: ir.Model) -> int:
    """Elements of all float and all at most 8-bit constants, each tensor once."""
    return sum(math.prod(dims(t)) for t in _distinct(model) if t.dtype in FLOATS or t.dtype.bitwidth <= 8)


def bytes_of(model: ir.Model) -> int:
    """Bytes of all constants, each tensor once."""
    return sum(
        math.ceil(math.prod(dims(t)) * t.dtype.bitwidth / 8)
        for t in _distinct(model)
        if t.dtype != ir.DataType.STRING
    )


def is_large(model: ir.Model) -> bool:
    """Whether copies of ours keep their weights in a file of their own: a runtime maps such a file, others it reads into memory."""
    return bytes_of(model) > 256 << 20


def _distinct(model: ir.Model) -> Sequence[ir.TensorProtocol]:
    return tuple({id(u.tensor): u.tensor for u in tensors(model)}.values())


def dense_flops(site: Site) -> int:
    """2 MACs a row of input, of a Conv a position of the output; a lookup multiplies nothing."""
    return 2 * site.K * site.N if site.kind in ("linear", "conv") else 0


def stored_bytes(group: Group) -> int:
    """Bytes of the group's weights as the file stores them, each once."""
    weights = {s.weight: s for s in group.sites}
    return sum(math.ceil(s.elements * ir.DataType[s.stored.upper()].bitwidth / 8) for s in weights.values())


def rows_of(model: ir.Model, finding: Finding, feed: Mapping[str, Array]) -> dict[str, int]:
    """Rows of x that each site multiplies at this feed (a Conv: positions of its output); one where shapes depend on values."""
    shapes = shapes_of(model, {n: np.shape(a) for n, a in feed.items()})
    rows = {}
    for site in finding.sites:
        if site.refusal is None:
            conv = site.kind == "conv"
            shape, width = shapes.get(site.node.outputs[0] if conv else site.data), site.N if conv else site.K
            size = math.prod(shape.numpy()) if shape is not None and shape.is_static() else width
            rows[site.name] = size if site.kind == "lookup" else max(size // max(width, 1), 0)
    return rows
