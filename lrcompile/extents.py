"""Lengths of axes, in numbers or symbols, and what the entries of a computed shape are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lrcompile.axes import Axes, Axis, Part, is_given, length
from lrcompile.graph import tensor_of

# The first input decides the length of every axis.
_SAME = frozenset(
    "Identity Cast Dropout Softmax LayerNormalization RMSNormalization Neg Tanh Sigmoid Erf Gelu Relu Exp Sqrt Reciprocal".split()
)
_BROADCAST = frozenset("Add Sub Mul Div Pow Where And Or MatMul".split())
_MADE_UP = "unk__"  # what onnx's inference calls a length that it does not know
_DEEP = 32  # operators back
_LONGEST = 8  # entries of a shape: more are no shape


@dataclass(slots=True)
class Extents:
    """What is known of the lengths in one model. shapes: by shape inference."""

    shapes: Mapping[ir.Value, ir.Shape]
    _orders: dict[ir.Graph, dict[ir.Node, int]] = field(default_factory=dict)
    _found: dict[tuple[ir.Value, int], Axis] = field(default_factory=dict)

    def order(self, graph: ir.Graph) -> dict[ir.Node, int]:
        """Where each node stands in its graph."""
        if graph not in self._orders:
            self._orders[graph] = {node: i for i, node in enumerate(graph)}
        return self._orders[graph]

    def shape(self, value: ir.Value) -> ir.Shape | None:
        return self.shapes.get(value, value.shape)

    def rank(self, value: ir.Value) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def axes(self, value: ir.Value) -> Axes | None:
        """The axes of a value that is not ours to cut; None when not even its rank is known."""
        rank = self.rank(value)
        return None if rank is None else tuple(self.axis(value, i) for i in range(rank))

    def axis(self, value: ir.Value, index: int, depth: int = _DEEP) -> Axis:
        """One axis of it: equal symbols are equal lengths."""
        shape = self.shape(value)
        if shape is None or not -len(shape) <= index < len(shape):
            return (Part(object()),)
        index %= len(shape)
        known = shape[index]
        if isinstance(known, int):
            return length(known)
        if known.value is not None and not known.value.startswith(_MADE_UP):
            return (Part(known.value),)
        if (value, index) not in self._found:
            found = self._through(value, index, len(shape), depth) if depth else None
            self._found[value, index] = (Part((value, index)),) if found is None else found
        return self._found[value, index]

    def _through(self, value: ir.Value, index: int, rank: int, depth: int) -> Axis | None:
        """The length of an axis by what its operator does with lengths, where inference lost it (at a Reshape to a computed shape)."""
        node = value.producer()
        if node is None or node.domain or not node.inputs or value is not node.outputs[0]:
            return None
        first = node.inputs[0]
        if first is None:
            return None
        if node.op_type in _SAME:
            return self.axis(first, index, depth - 1)
        if node.op_type == "Transpose" and "perm" in node.attributes:
            return self.axis(first, node.attributes["perm"].as_ints()[index], depth - 1)
        if node.op_type == "Reshape":
            entries = self.entries(node.inputs[1], self.axes)
            entry = None if entries is None or len(entries) != rank else entries[index]
            if entry is not None and is_given(entry, 0) and "allowzero" not in node.attributes:
                return self.axis(first, index, depth - 1)
            return None if entry is None or is_given(entry, -1) or is_given(entry, 0) else entry
        operands = [v for v in node.inputs if v is not None]
        if node.op_type == "MatMul" and index >= rank - 2 > -1:
            left = index == rank - 2
            return self.axis(operands[1 - left], -2 if left else -1, depth - 1)
        if node.op_type not in _BROADCAST:
            return None
        ranks = [self.rank(v) for v in operands]
        if None in ranks:
            return None
        spans = [v for v, n in zip(operands, ranks, strict=True) if n is not None and index - rank >= -n]
        found = {self.axis(v, index - rank, depth - 1) for v in spans} - {()}
        return found.pop() if len(found) == 1 else None

    def entries(
        self, value: ir.Value | None, axes_of: Callable[[ir.Value], Axes | None]
    ) -> tuple[Axis, ...] | None:
        """The numbers that a value of one axis (or none) holds, as products; None where they cannot be told.

        axes_of: the axes of a value, ours or not. -1 and 0 stand as they are written.
        """
        if value is None:
            return None
        tensor = tensor_of(value)
        if tensor is not None:
            if tensor.size > _LONGEST or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
                return None
            return tuple(length(int(n)) for n in tensor.numpy().reshape(-1))
        node = value.producer()
        if node is None or node.domain:
            return self._opaque(value)
        found = self._computed(node, axes_of)
        return found if found is not None else self._opaque(value)

    def _opaque(self, value: ir.Value) -> tuple[Axis, ...] | None:
        """Entries of which only the count is known."""
        shape = self.shape(value)
        if shape is None or len(shape) > 1 or value.dtype not in (None, ir.DataType.INT64, ir.DataType.INT32):
            return None
        count = shape[0] if len(shape) else 1
        if not isinstance(count, int) or count > _LONGEST:
            return None
        return tuple((Part((value, "entry", i)),) for i in range(count))

    def _computed(self, node: ir.Node, axes_of: Callable[[ir.Value], Axes | None]) -> tuple[Axis, ...] | None:
        kind, first = node.op_type, node.inputs[0] if node.inputs else None
        if first is None:
            return None
        if kind == "Shape":
            axes = axes_of(first)
            start, end = node.attributes.get("start"), node.attributes.get("end")
            return (
                None if axes is None else axes[start.as_int() if start else 0 : end.as_int() if end else None]
            )
        if kind == "Concat":
            pieces = [self.entries(v, axes_of) for v in node.inputs]
            return (
                None if None in pieces else tuple(e for piece in pieces if piece is not None for e in piece)
            )
        if kind == "Mul":
            a, b = (self.entries(v, axes_of) for v in node.inputs[:2])
            return (a[0] + b[0],) if a is not None and b is not None and len(a) == len(b) == 1 else None
        if kind not in ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity", "Reshape"):
            return None
        entries = self.entries(first, axes_of)
        if entries is None or kind not in ("Gather", "Slice"):
            return entries
        picked = [tensor_of(v) for v in node.inputs[1:] if v is not None]
        if any(t is None or t.size != 1 for t in picked) and kind == "Slice":
            return None
        numbers = [np.atleast_1d(t.numpy()).reshape(-1).astype(int).tolist() for t in picked if t is not None]
        if kind == "Gather":
            return (
                tuple(entries[i] for i in numbers[0] if -len(entries) <= i < len(entries))
                if numbers
                else None
            )
        bounds = [n[0] for n in numbers]
        return entries[slice(bounds[0], bounds[1], bounds[3] if len(bounds) > 3 else None)]
