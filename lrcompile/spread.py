"""The walker behind `permutations`: which constants must be stored in another order for a value's columns to be.

From the starts it goes both ways through element-wise operators, normalisations, products and Gathers of columns, until constants
end it everywhere, or something that cannot be permuted does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lrcompile.graph import dims, tensor_of
from lrcompile.interfaces import Array

_ELEMENTWISE = {
    "com.microsoft": frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"}),
    "": frozenset(
        "Abs Add And Cast Ceil Celu Clip Cos Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid "
        "HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal "
        "Relu Round Selu Shrink Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu Where Xor".split()
    ),
}
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_REDUCTIONS = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare".split()
)
_LAYOUT = frozenset({"Transpose", "Cast", "Identity"})
_INDEX_BYTES = 4

Reader = tuple[ir.Node, int]


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant as a node reads it. value holds the tensor; axes: which axis of it each axis of what is read is."""

    value: ir.Value
    tensor: ir.TensorProtocol
    axes: tuple[int, ...]
    direct: bool  # nothing stands between it and the node

    @property
    def shape(self) -> tuple[int, ...]:
        stored = dims(self.tensor)
        return tuple(stored[a] for a in self.axes)


@dataclass(frozen=True, slots=True)
class Change:
    """A constant to be permuted along some axes: in place, or as a copy for these readers because it has others too."""

    constant: Constant
    axes: frozenset[int]
    copied_for: tuple[Reader, ...] = ()


class Spread:
    """All values that have to be permuted together with the starts, and the constants that make it so."""

    def __init__(self, width: int, starts: Sequence[ir.Value], held: Container[ir.Node] = ()) -> None:
        self._width, self._starts, self._held = width, set(starts), held
        self._values: set[ir.Value] = set()
        self._edits: dict[Reader, set[int]] = defaultdict(set)  # (reader, input): axes from the end
        # data of the products whose columns are permuted for a neighbour's sake
        self._pulled: list[ir.Value] = []

    def ends(self, more: Collection[ir.Value], data: Collection[ir.Value]) -> list[Change] | None:
        """The constants that absorb the permutation, None where something cannot.

        more: values that must be permuted with the starts. data: what the starts are products of.
        """
        pending = [*self._starts, *more]
        while pending:
            value = pending.pop()
            if value in self._values:
                continue
            if value.is_graph_output():
                return None
            self._values.add(value)
            around = [u.node for u in value.uses()]
            if value not in self._starts:
                if (producer := value.producer()) is None:
                    return None
                around.append(producer)
            for node in around:
                if (found := self._through(node)) is None:
                    return None
                pending += found
        made_from = {*self._pulled, *data}  # of one value: then nothing here can be what it is made from
        if len(made_from) > 1 and self._pulled and not self._values.isdisjoint(_ancestors(made_from)):
            return None  # a residual stream
        changes = self._changes()
        copied = [c.constant for c in changes if c.copied_for]
        grown = sum(c.tensor.nbytes for c in copied)
        return changes if grown <= _INDEX_BYTES * self._width and all(c.direct for c in copied) else None

    def operand(self, node: ir.Node, index: int) -> list[ir.Value] | None:
        """What must be permuted so that this operand of an element-wise operator is: nothing where it broadcasts; None: it cannot be."""
        value = node.inputs[index] if index < len(node.inputs) else None
        constant = constant_of(value)
        if value is None or (constant is None and _level(value)):
            return []
        if constant is None:
            return [value]
        last = constant.shape[-1] if constant.shape else 1
        if last == self._width != 1:
            self._edits[node, index].add(-1)
        return [] if last in (1, self._width) else None

    def _through(self, node: ir.Node) -> list[ir.Value] | None:
        """What else must be permuted because a value of this node is; None where that cannot be."""
        if node.op_type in _ELEMENTWISE.get(node.domain, ()):
            return self._affine(node, range(len(node.inputs)), node.outputs)
        if node.domain:
            return None
        if node.op_type in _NORMS:
            return self._affine(node, range(1, len(node.inputs)), [*node.inputs[:1], node.outputs[0]])
        if node.op_type in ("MatMul", "Gemm"):
            return self._product(node)
        if takes_columns(node) and not any(map(self._has, node.inputs)):
            return self._columns_of(node, -1)
        if node.op_type in _REDUCTIONS and _reduces_last(node) and not self._has(node.outputs[0]):
            return []
        if node.op_type == "Reshape" and _end(node) == self._width:  # rows stay rows
            return self._affine(node, (), [node.inputs[0], node.outputs[0]])
        return None

    def _affine(
        self, node: ir.Node, operands: Collection[int], values: Sequence[ir.Value | None]
    ) -> list[ir.Value] | None:
        needed = [v for v in values if v is not None]
        for index in operands:
            if (found := self.operand(node, index)) is None:
                return None
            needed += found
        return needed

    def _product(self, node: ir.Node) -> list[ir.Value] | None:
        """y = v W or Gemm's alpha A B + beta C."""
        gemm = node.op_type == "Gemm"
        data, weight = node.inputs[:2]
        transposed = gemm and node.attributes.get_int("transB", 0) == 1
        if self._has(weight):
            return None
        if self._has(data):
            shape = constant.shape if (constant := constant_of(weight)) is not None else ()
            axis = -1 if transposed or len(shape) == 1 else -2
            if (
                not shape
                or shape[axis] != self._width
                or (gemm and node.attributes.get_int("transA", 0) == 1)
            ):
                return None
            self._edits[node, 1].add(axis)
        addend = node.inputs[2] if len(node.inputs) > 2 else None
        if not (self._has(node.outputs[0]) or self._has(addend)):
            return []
        columns = self._columns_of(node, -2 if transposed else -1)
        rest = self.operand(node, 2) if gemm else []
        return None if columns is None or rest is None else [*columns, *rest, node.outputs[0]]

    def _columns_of(self, node: ir.Node, axis: int) -> list[ir.Value] | None:
        """Permute the columns that a product gives, or the index of a Gather of columns."""
        if node.outputs[0] in self._starts:
            return []
        constant = constant_of(node.inputs[1])
        vector = node.op_type == "Gather"
        if constant is None or len(constant.shape) < 2 - vector or constant.shape[axis] != self._width:
            return None
        if node in self._held or (vector and len(constant.shape) != 1):
            return None
        self._edits[node, 1].add(axis)
        self._pulled += [v for v in node.inputs[:1] if v is not None]
        return []

    def _has(self, value: ir.Value | None) -> bool:
        return value is not None and value in self._values

    def _changes(self) -> list[Change]:
        """One a constant and way of permuting it."""
        wanted: dict[ir.Value, dict[frozenset[int], list[Reader]]] = defaultdict(dict)
        read_as: dict[ir.Value, Constant] = {}
        for (node, index), axes in self._edits.items():
            constant = constant_of(node.inputs[index])
            assert constant is not None
            stored = frozenset(constant.axes[a] for a in axes)
            wanted[constant.value].setdefault(stored, []).append((node, index))
            if not constant.direct or constant.value not in read_as:
                read_as[constant.value] = constant
        changes = []
        for value, ways in wanted.items():
            alone = len(ways) == 1 and _readers(value) == {r for readers in ways.values() for r in readers}
            changes += [
                Change(read_as[value], way, () if alone else tuple(readers)) for way, readers in ways.items()
            ]
        return changes


def takes_columns(node: ir.Node) -> bool:
    return node.op_type == "Gather" and not node.domain and node.attributes.get_int("axis", 0) == -1


def constant_of(value: ir.Value | None) -> Constant | None:
    """The constant behind a value, seen through Transpose, Cast and Identity."""
    chain: list[ir.Node] = []
    while value is not None and tensor_of(value) is None:
        node = value.producer()
        if node is None or node.domain or node.op_type not in _LAYOUT:
            return None
        chain.append(node)
        value = node.inputs[0]
    tensor = tensor_of(value)
    if value is None or tensor is None:
        return None
    axes = tuple(range(len(dims(tensor))))
    for node in reversed(chain):
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", range(len(axes))[::-1])
            axes = tuple(axes[p] for p in perm)
    return Constant(value, tensor, axes, not chain)


def _readers(value: ir.Value) -> set[tuple[ir.Node, int] | None]:
    """Who reads a constant in the end, behind Transpose, Cast and Identity; None stands for the caller of the graph."""
    found: set[tuple[ir.Node, int] | None] = set()
    pending = [value]
    while pending:
        at = pending.pop()
        if at.is_graph_output():
            found.add(None)
        for use in at.uses():
            if use.node.op_type in _LAYOUT and not use.node.domain:
                pending.append(use.node.outputs[0])
            else:
                found.add((use.node, use.idx))
    return found


def _ancestors(values: Collection[ir.Value]) -> set[ir.Value]:
    """These values and all that they are computed from."""
    found: set[ir.Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value not in found:
            found.add(value)
            if (node := value.producer()) is not None:
                pending.extend(v for v in node.inputs if v is not None)
    return found


def _level(value: ir.Value) -> bool:
    """Whether a value is the same for all channels: its last axis has length one, or it has no axes."""
    pending, seen = [value], {value}
    while pending:
        at = pending.pop()
        node = at.producer()
        if at.shape is not None and (not len(at.shape) or isinstance(at.shape[-1], int)):
            level = not len(at.shape) or at.shape[-1] == 1
        elif node is not None and node.op_type in _ELEMENTWISE.get(node.domain, ()):
            constants = [(v, constant_of(v)) for v in node.inputs if v is not None]
            level = all(c is None or c.shape[-1:] in ((), (1,)) for _, c in constants)
            fresh = [v for v, c in constants if c is None and v not in seen]
            pending += fresh
            seen.update(fresh)
        elif node is not None and node.op_type in _REDUCTIONS:
            level = _reduces_last(node) is True and node.attributes.get_int("keepdims", 1) == 1
        else:
            level = columns_of(at) == 1
        if not level:
            return False
    return True


def columns_of(value: ir.Value | None) -> int | None:
    """Length of the last axis, None where it is not known."""
    if value is None:
        return None
    node = value.producer()
    if node is not None and node.op_type == "Concat" and node.attributes.get_int("axis", 0) == -1:
        parts = [columns_of(v) for v in node.inputs]
        return sum(p for p in parts if p is not None) if None not in parts else None
    if node is not None and node.op_type in ("MatMul", "Gemm"):
        constant = constant_of(node.inputs[1])
        if constant is not None and len(constant.shape) > 1:
            return constant.shape[-2 if node.attributes.get_int("transB", 0) else -1]
    if node is not None and node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
        table = constant_of(node.inputs[0])
        if table is not None and len(table.shape) == 2:
            return table.shape[1]
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _reduces_last(node: ir.Node) -> bool | None:
    """Whether a reduction takes in the last axis; None where that is not known."""
    axes = node.attributes.get_ints("axes", None)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        array = array_of(node.inputs[1])
        if array is None:
            return None
        axes = [int(a) for a in array.reshape(-1)]
    if not axes:
        return None if node.attributes.get_int("noop_with_empty_axes", 0) else True
    data = node.inputs[0]
    rank = len(data.shape) if data is not None and data.shape is not None else None
    if -1 in axes or (rank is not None and rank - 1 in axes):
        return True
    return False if rank is not None or max(axes) < 0 else None


def _end(node: ir.Node) -> int | None:
    """Length of the last axis that a Reshape gives, None where it is not known."""
    shape, out = node.inputs[1], node.outputs[0]
    made = shape.producer() if shape is not None else None
    if made is not None and made.op_type == "Concat":
        shape = made.inputs[-1]
    array = array_of(shape)
    if array is not None and array.size and array.reshape(-1)[-1] > 0:
        return int(array.reshape(-1)[-1])
    last = out.shape[-1] if out.shape is not None and len(out.shape) else None
    return last if isinstance(last, int) else None


def array_of(value: ir.Value | None) -> Array | None:
    tensor = tensor_of(value)
    return None if tensor is None else tensor.numpy()
