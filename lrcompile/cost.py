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
    """Rows of x that each site multiplies at this feed (a Conv: positions of its output); one where shapes depend on values.

    A free dimension of one may be stretched later, so inference forgets it. What it does not know then follows from the counts at two,
    three and four, f(1) = 3 f(2) - 3 f(3) + f(4), which is exact where rows are a product of up to two such dimensions.
    """
    given = {n: np.shape(a) for n, a in feed.items()}
    rows = _inferred(model, finding, given)
    free = {
        v.name: [not isinstance(d, int) for d in v.shape] for v in model.graph.inputs if v.shape is not None
    }
    ones = {
        n
        for n, shape in given.items()
        if any(d == 1 and f for d, f in zip(shape, free.get(n, ()), strict=False))
    }
    if ones and None in rows.values():

        def at(size: int) -> dict[str, int | None]:
            shapes = {
                n: tuple(size if d == 1 and f else d for d, f in zip(shape, free[n], strict=True))
                if n in ones
                else shape
                for n, shape in given.items()
            }
            return _inferred(model, finding, shapes)

        two, three, four = at(2), at(3), at(4)
        for name, known in rows.items():
            a, b, c = two[name], three[name], four[name]
            if known is None and a is not None and b is not None and c is not None:
                rows[name] = max(3 * a - 3 * b + c, 1)
    return {name: 1 if count is None else count for name, count in rows.items()}


def _inferred(
    model: ir.Model, finding: Finding, inputs: Mapping[str, tuple[int, ...]]
) -> dict[str, int | None]:
    shapes = shapes_of(model, inputs)
    rows: dict[str, int | None] = {}
    for site in finding.sites:
        if site.refusal is None:
            conv = site.kind == "conv"
            shape, width = shapes.get(site.node.outputs[0] if conv else site.data), site.N if conv else site.K
            if shape is None or not shape.is_static():
                rows[site.name] = None
            else:
                size = math.prod(shape.numpy())
                rows[site.name] = size if site.kind == "lookup" else max(size // max(width, 1), 0)
    return rows
