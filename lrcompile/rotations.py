"""Rotary embeddings as Hugging Face's exporters write them: x cos + turned sin, turned = (-second half of x, first half of x).

Plane i of a head are its numbers i and i + size / 2, which are turned together and with no others. So whole planes can be cut: of cos and
sin the same numbers are taken, and the bounds of the halves follow. What cos and sin hold does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lrcompile.axes import number
from lrcompile.extents import Extents
from lrcompile.graph import tensor_of
from lrcompile.records import Follower


@dataclass(frozen=True, slots=True)
class Rotation:
    """nodes: all of it, from what reads the value to the sum. angles: cos and sin."""

    nodes: frozenset[ir.Node]
    angles: tuple[ir.Value, ir.Value]
    output: ir.Value
    followers: tuple[Follower, ...]


def rotation_of(value: ir.Value, rank: int, size: int, extents: Extents) -> Rotation | None:
    """How a value, whose last axis are the numbers of a head, is turned; None where it is not, or in another form."""
    for straight in value.uses():
        if straight.node.op_type != "Mul" or straight.node.domain:
            continue
        for use in straight.node.outputs[0].uses():
            if use.node.op_type == "Add" and not use.node.domain:
                factor = (straight.node, 1 - straight.idx)
                found = _rotation(value, factor, use.node, 1 - use.idx, rank, size, extents)
                if found is not None:
                    return found
    return None


def _rotation(
    value: ir.Value,
    straight: tuple[ir.Node, int],
    added: ir.Node,
    other: int,
    rank: int,
    size: int,
    extents: Extents,
) -> Rotation | None:
    """straight: x * cos, and where cos stands. other: which of the two that are added should be the other product."""
    across = _made_by(added.inputs[other], "Mul")
    for at in (0, 1) if across is not None else ():
        assert across is not None
        turned = _made_by(across.inputs[at], "Concat")
        if turned is None or len(turned.inputs) != 2 or not _is_last(turned, rank):
            continue
        negated = _made_by(turned.inputs[0], "Neg")
        if negated is None:
            continue
        second = _half(negated.inputs[0], value, rank, size, second=True)
        first = _half(turned.inputs[1], value, rank, size, second=False)
        factors = [straight, (across, 1 - at)]
        angles = [_angle(node, index, size, extents) for node, index in factors]
        if first is None or second is None or angles[0] is None or angles[1] is None:
            continue
        inner = {straight[0], across, turned, negated, first[0], second[0]}
        nodes = frozenset({*inner, added})
        outputs = [v for node in inner for v in node.outputs]
        if any(v.is_graph_output() or any(u.node not in nodes for u in v.uses()) for v in outputs):
            continue
        spans = [
            Follower(node, index, _rank(angle, extents) - 1)
            for (node, index), angle in zip(factors, angles, strict=True)
            if angle is not None
        ]
        bounds = {(f.node, f.index): f for _, f in (first, second) if f is not None}
        return Rotation(nodes, (angles[0], angles[1]), added.outputs[0], (*spans, *bounds.values()))
    return None


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind and not node.domain else None


def _is_last(node: ir.Node, rank: int) -> bool:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis % rank == rank - 1


def _rank(value: ir.Value, extents: Extents) -> int:
    return extents.rank(value) or 1


def _angle(node: ir.Node, index: int, size: int, extents: Extents) -> ir.Value | None:
    """A factor with an entry for each number of a head."""
    value = node.inputs[index]
    axes = extents.axes(value) if value is not None else None
    return value if axes and number(axes[-1]) == size else None


def _half(
    piece: ir.Value | None, value: ir.Value, rank: int, size: int, *, second: bool
) -> tuple[ir.Node, Follower | None] | None:
    """Who takes a half of the value, and which of its bounds follows; None where the piece is not this half."""
    half = size // 2
    node = _made_by(piece, "Slice")
    if node is not None and node.inputs[0] is value:
        tensors = [tensor_of(v) for v in node.inputs[1:] if v is not None]
        numbers = [int(t.numpy().reshape(-1)[0]) for t in tensors if t is not None and t.size == 1]
        if not 3 <= len(numbers) == len(node.inputs) - 1:
            return None
        start, end, axis, step = (*numbers, 1)[:4]
        wanted = range(half, size) if second else range(half)
        if axis % rank != rank - 1 or range(size)[start:end:step] != wanted:
            return None
        return node, Follower(node, 1 if second else 2, shape=(None,), half=True)
    node = _made_by(piece, "Split")
    if node is None or node.inputs[0] is not value or len(node.outputs) != 2 or not _is_last(node, rank):
        return None
    if piece is not node.outputs[second] or "split" in node.attributes:
        return None
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return node, None  # equal parts, whatever the size
    sizes = tensor_of(node.inputs[1])
    if sizes is None or sizes.numpy().tolist() != [half, half]:
        return None
    return node, Follower(node, 1, shape=(None, None), half=True)
