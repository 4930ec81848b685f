"""Shapes that hold the size that is cut as a number, and what they become.

The whole shape becomes a constant where every other entry keeps a dimension (0), is a number, or is the one that -1 can stand for.
Else, where a Concat puts the shape together, only its piece with the number is replaced; then all who read this Concat must be on the way
and need the same change.
"""

from __future__ import annotations

import onnx_ir as ir

from lrcompile.axes import innermost, is_cut, is_given, number
from lrcompile.crossings import Reshaped, Way, label
from lrcompile.graph import tensor_of
from lrcompile.records import Follower

Shape = tuple[int | None, ...]


def shape_followers(way: Way, size: int) -> list[Follower] | str:
    """One for each shape, or each piece of one, that must change with the size of a head; or why that cannot be."""
    found: dict[tuple[ir.Node, int], Follower] = {}
    for step in way.reshaped:
        late = _late(step)
        if isinstance(late, str):
            return late
        if not late:
            continue
        shape = _whole(step, size)
        made = [Follower(step.node, 1, shape=shape)] if shape is not None else _pieces(way, step, size)
        if made is None:
            return f"{label(step.node)} has a computed shape beside the size that would be cut, which no constant can hold"
        for follower in made:
            known = found.setdefault((follower.node, follower.index), follower)
            if known.shape != follower.shape:
                return f"{label(follower.node)} makes shapes that would have to change in two ways"
    return list(found.values())


def _late(step: Reshaped) -> list[int] | str:
    """The entries that would not follow by themselves."""
    late = []
    for i, (entry, axis) in enumerate(zip(step.entries, step.after, strict=True)):
        if step.node.op_type == "Expand":
            if is_cut(axis) and not is_cut(entry) and entry:
                late.append(i)
        elif not (is_given(entry, -1) or is_given(entry, 0)) and is_cut(entry) != is_cut(axis):
            if is_cut(entry):
                return f"{label(step.node)} is given the size that would be cut for another axis"
            late.append(i)
    return late


def _whole(step: Reshaped, size: int) -> Shape | None:
    """The shape from now on: None for the new size, 0 (Reshape) or 1 (Expand) where nothing changes."""
    shape: list[int | None] = []
    for i, axis in enumerate(step.after):
        n = number(axis)
        unchanged = i < len(step.before) and axis == step.before[i]
        if step.node.op_type == "Expand":
            if not unchanged and n is None:
                return None
            shape.append(1 if unchanged else n)
        elif is_cut(axis):
            shape.append(_entry(step, i, size))
        elif unchanged:
            shape.append(0)
        else:
            shape.append(n if n is not None else -1)
    return tuple(shape) if shape.count(-1) <= 1 else None


def _entry(step: Reshaped, i: int, size: int) -> int | None:
    """What stands for an axis that is cut: the size alone, or whatever is left."""
    axis = step.after[i]
    return None if number(axis) == size and innermost(axis) == size else -1


def _ends(step: Reshaped, late: list[int], size: int) -> Shape:
    return tuple(_entry(step, i, size) for i in late)


def _pieces(way: Way, step: Reshaped, size: int) -> list[Follower] | None:
    """The numbers among what a Concat makes the shape of."""
    value = step.node.inputs[1]
    concat = value.producer() if value is not None else None
    if value is None or concat is None or concat.op_type != "Concat" or concat.domain:
        return None
    late = _late(step)
    assert isinstance(late, list)
    alike = {
        s.node for s in way.reshaped if _late(s) == late and _ends(s, late, size) == _ends(step, late, size)
    }
    if value.is_graph_output() or any(u.node not in alike or u.idx != 1 for u in value.uses()):
        return None
    found, start = [], 0
    for index, piece in enumerate(concat.inputs):
        entries = way.extents.entries(piece, way.axes_of)
        if entries is None:
            return None
        inside = [i for i in late if start <= i < start + len(entries)]
        if inside:
            tensor = tensor_of(piece)
            if tensor is None:
                return None
            shape: list[int | None] = [int(n) for n in tensor.numpy().reshape(-1)]
            for i in inside:
                shape[i - start] = _entry(step, i, size)
            found.append(Follower(concat, index, shape=tuple(shape)))
        start += len(entries)
    given = sum(is_given(e, -1) for i, e in enumerate(step.entries) if i not in late)
    return found if given + _ends(step, late, size).count(-1) <= 1 else None
