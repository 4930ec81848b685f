"""How an operator is passed by a value whose axes are followed: a rule each, which gives the axes behind it or a sentence.

Of an FFN every column is by itself (`elementwise`); the numbers of a head must be treated alike (`linear`), because a matrix mixes
them before they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lrcompile.axes import Axes, Axis, Part, innermost, is_cut, is_given, length, number, ours, regroup
from lrcompile.extents import Extents
from lrcompile.graph import FLOATS, dims, tensor_of
from lrcompile.records import Follower, Site
from lrcompile.rotations import rotation_of

_PLAIN = frozenset({"Identity", "Cast", "Dropout"})
ELEMENTWISE = _PLAIN | frozenset(
    "Add Sub Mul Div Pow Sqrt Erf Exp Log Tanh Sigmoid Relu LeakyRelu Elu Selu Celu Gelu Swish HardSigmoid HardSwish Mish Softplus "
    "Softsign Clip Abs Neg Min Max PRelu ThresholdedRelu Shrink Reciprocal Sin Cos Sign Round Floor Ceil Where Greater Less "
    "GreaterOrEqual LessOrEqual Equal And Or Not FastGelu QuickGelu BiasGelu".split()
)
# Whole attention in one operator: query, key and value are its first inputs.
FUSED = frozenset(
    "Attention MultiHeadAttention GroupQueryAttention DecoderMaskedMultiHeadAttention PackedMultiHeadAttention SparseAttention".split()
)
_ROTATIONS = frozenset({"RotaryEmbedding", "GemmaRotaryEmbedding"})
_PIECES = frozenset({"Slice", "Split", "Gather", "GatherElements", "GatherND"})
_SHAPE_OPS = frozenset("Gather Slice Concat Squeeze Unsqueeze Cast Identity Mul Reshape".split())


def label(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or (node.outputs[0].name if node.outputs else '')!r}"


def fused(node: ir.Node) -> str:
    return f"{label(node)} is attention in one operator: its heads cannot differ in size"


@dataclass(slots=True)
class Reshaped:
    """A Reshape or Expand on the way: what it was given, and the axes before and after."""

    node: ir.Node
    entries: tuple[Axis, ...]
    before: Axes
    after: Axes


@dataclass(slots=True)
class Way:
    """Values on the way and their axes. carriers: values that hold the size of something on the way as a number.

    turning: nodes of rotary embeddings, and which value each of them turns; turned: how many numbers each embedding turns.
    """

    kind: str
    sites: tuple[Site, ...]
    extents: Extents
    axes: dict[ir.Value, Axes] = field(default_factory=dict)
    carriers: set[ir.Value] = field(default_factory=set)
    reshaped: list[Reshaped] = field(default_factory=list)
    followers: list[Follower] = field(default_factory=list)
    turning: dict[ir.Node, ir.Value] = field(default_factory=dict)
    turned: list[int] = field(default_factory=list)

    @property
    def firsts(self) -> tuple[Site, ...]:
        return self.sites if self.kind == "query_key" else self.sites[:-1]

    @property
    def heads(self) -> bool:
        return self.kind != "up_down"

    @property
    def narrower(self) -> set[ir.Value]:
        """All values that a cut makes smaller."""
        return {*self.axes, *(value for node in self.turning for value in node.outputs)}

    # --- one node --------------------------------------------------------------------------------------------------

    def step(self, node: ir.Node) -> list[ir.Value] | str:
        """The values that a node adds to the way, or why it cannot be passed."""
        tracked = [i for i, v in enumerate(node.inputs) if v in self.axes]
        carried = [i for i, v in enumerate(node.inputs) if v in self.carriers]
        name = label(node)
        if not tracked:
            return self._carry(node)
        if node.op_type in FUSED:
            return fused(node)
        if carried and not (carried == [1] and node.op_type in ("Reshape", "Expand")):
            return f"{name} computes with the size that would be cut"
        if node.op_type in _ROTATIONS:
            return _rotary(name)
        if self.kind == "query_key" and (passed := self._turn(node, tracked)) is not None:
            return passed
        if node.op_type == "Shape":
            axes = self.axes[node.inputs[0]]  # type: ignore[index]
            start, end = node.attributes.get("start"), node.attributes.get("end")
            read = axes[start.as_int() if start else 0 : end.as_int() if end else None]
            if not any(map(is_cut, read)):
                return []
            self.carriers.add(node.outputs[0])
            return [node.outputs[0]]
        rule = {
            "Reshape": self._reshape,
            "Expand": self._expand,
            "Transpose": self._transpose,
            "Squeeze": self._squeeze,
            "Unsqueeze": self._unsqueeze,
            "MatMul": self._matmul,
            "Concat": self._concat,
        }.get(node.op_type) if not node.domain else None  # fmt: skip
        if rule is not None and (
            self.heads or node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Transpose")
        ):
            made = rule(node, tracked)
        elif node.op_type in ELEMENTWISE and node.domain in ("", "com.microsoft"):
            made = self._linear(node, tracked) if self.heads else self._elementwise(node, tracked)
        elif node.op_type in _PIECES and self.heads:
            made = self._piece(node)
        else:
            made = f"{name} is not understood on the way from {self.sites[0].name}"
        if isinstance(made, str):
            return made
        if len(node.outputs) > 1 and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            return f"{name} has several outputs that are read"
        self.axes[node.outputs[0]] = made
        return [node.outputs[0]]

    def _turn(self, node: ir.Node, tracked: list[int]) -> list[ir.Value] | str | None:
        """A rotary embedding, passed as a whole where its first node is met; None when the node belongs to none that can be cut."""
        value = node.inputs[tracked[0]]
        assert value is not None
        if node in self.turning:
            alone = all(node.inputs[i] is self.turning[node] for i in tracked)
            return [] if alone else _rotary(label(node))
        axes = self.axes[value]
        size = innermost(axes[-1]) if axes else 1
        if size % 2 or number(axes[-1]) != size:
            return None
        found = rotation_of(value, len(axes), size, self.extents)
        if (
            found is None
            or node not in found.nodes
            or any(v in self.axes or v in self.carriers for v in found.angles)
        ):
            return None
        for angle in found.angles:
            theirs = self.extents.axes(angle)
            assert theirs is not None  # its last axis is known
            axes = self._broadcast(found.output, axes, theirs)
        self.axes[found.output] = axes
        self.turning.update(dict.fromkeys(found.nodes, value))
        self.turned.append(size)
        self.followers.extend(found.followers)
        return [found.output]

    def _carry(self, node: ir.Node) -> list[ir.Value] | str:
        """A node that only meets the size as a number: part of the way a shape is computed."""
        refusal = f"{label(node)} computes with the size that would be cut"
        if node.op_type not in _SHAPE_OPS or node.domain or node.inputs[0] is None:
            return refusal
        if node.op_type == "Reshape" and node.inputs[0] not in self.carriers:
            return f"{label(node)} reshapes something else by the size that would be cut"
        if node.op_type == "Cast" and node.attributes["to"].as_int() not in (
            ir.DataType.INT64,
            ir.DataType.INT32,
        ):
            return refusal
        output = node.outputs[0]
        entries = self.extents.entries(output, self.axes_of)
        if entries is None:
            return refusal
        if not any(map(is_cut, entries)):
            return []
        self.carriers.add(output)
        return [output]

    def axes_of(self, value: ir.Value) -> Axes | None:
        return self.axes.get(value) or self.extents.axes(value)

    # --- rules: the axes of the first output, or a sentence ---------------------------------------------------------

    def _reshape(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        before = self.axes[node.inputs[0]]  # type: ignore[index]
        output = node.outputs[0]
        given = self.extents.entries(node.inputs[1], self.axes_of)
        known = self.extents.axes(output)
        if given is None:
            if known is None:
                return f"the shape that {label(node)} is given is not known"
            given = tuple((Part((output, i)),) for i in range(len(known)))
        keeps = not ("allowzero" in node.attributes and node.attributes["allowzero"].as_int())
        entries = []
        for i, entry in enumerate(given):
            if is_given(entry, 0) and keeps and i < len(before):
                entries.append(before[i])
            elif (
                number(entry) in (None, -1)
                and known is not None
                and len(known) == len(given)
                and number(known[i])
            ):
                entries.append(known[i])
            elif number(entry) is None and known is not None and len(known) == len(given) and not ours(entry):
                entries.append(entry if _is_symbol(entry) else known[i])
            else:
                entries.append(entry)
        after = regroup(before, entries)
        if after is None:
            return f"{label(node)} has a shape that does not tell where the heads go"
        if not self.heads and number(after[-1] if after else ()) is None:
            return f"{label(node)} mixes the hidden width with another axis"
        self.reshaped.append(Reshaped(node, given, before, after))
        return after

    def _expand(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        before = self.axes[node.inputs[0]]  # type: ignore[index]
        given = self.extents.entries(node.inputs[1], self.axes_of)
        if tracked != [0] or given is None:
            return f"the shape that {label(node)} is given is not known"
        rank = max(len(before), len(given))
        entries = ((),) * (rank - len(given)) + given
        axes = ((),) * (rank - len(before)) + before
        after = tuple(a or copies(e) for a, e in zip(axes, entries, strict=True))
        self.reshaped.append(Reshaped(node, entries, axes, after))
        return after

    def _transpose(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        before = self.axes[node.inputs[0]]  # type: ignore[index]
        perm = node.attributes.get("perm")
        order = perm.as_ints() if perm is not None else range(len(before))[::-1]
        if len(order) != len(before):
            return f"the rank of the input of {label(node)} is not known"
        return tuple(before[p] for p in order)

    def _squeeze(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        before = self.axes[node.inputs[0]]  # type: ignore[index]
        given = self._axes_argument(node)
        if given is None:
            return f"{label(node)} does not say which axes"
        drop = {a % len(before) for a in given}
        if any(ours(before[a]) for a in drop):
            return f"{label(node)} drops the axis that would be cut"
        return tuple(a for i, a in enumerate(before) if i not in drop)

    def _unsqueeze(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        before = self.axes[node.inputs[0]]  # type: ignore[index]
        given = self._axes_argument(node)
        if given is None:
            return f"{label(node)} does not say which axes"
        rank = len(before) + len(given)
        new = {a % rank for a in given}
        old = iter(before)
        return tuple(() if i in new else next(old) for i in range(rank))

    def _axes_argument(self, node: ir.Node) -> list[int] | None:
        if "axes" in node.attributes:
            return list(node.attributes["axes"].as_ints())
        tensor = tensor_of(node.inputs[1]) if len(node.inputs) > 1 else None
        return None if tensor is None else [int(n) for n in tensor.numpy().reshape(-1)]

    def _concat(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        others = [v for v in node.inputs if v is not None and v not in self.axes]
        if others:
            if node.outputs[0].is_graph_output() or others[0].is_graph_input():
                return (
                    f"{label(node)} joins a cache of keys or values ({others[0].name!r}): the size of a head is part of what the model's "
                    "caller gives and gets"
                )
            return f"{label(node)} joins something else ({others[0].name!r}) to it"
        all_axes = [self.axes[v] for v in node.inputs if v is not None]
        at = node.attributes["axis"].as_int() % len(all_axes[0])
        if any(ours(axes[at]) for axes in all_axes):
            return (
                _rotary(label(node))
                if self.kind == "query_key"
                else f"{label(node)} joins along the axis that would be cut"
            )
        if len({(*axes[:at], *axes[at + 1 :]) for axes in all_axes}) != 1:
            return f"{label(node)} joins what differs in its other axes"
        return (*all_axes[0][:at], self.extents.axis(node.outputs[0], at), *all_axes[0][at + 1 :])

    def _piece(self, node: ir.Node) -> Axes | str:
        """A part of the positions may be taken; a part of a head is what a rotary embedding takes."""
        name, before = label(node), self.axes.get(node.inputs[0]) if node.inputs[0] is not None else None
        along: list[int] | None = None
        if before is not None and node.op_type == "Slice" and len(node.inputs) > 3:
            tensor = tensor_of(node.inputs[3])
            along = None if tensor is None else [int(a) % len(before) for a in tensor.numpy().reshape(-1)]
        if before is None or along is None or any(ours(before[a]) for a in along):
            return (
                _rotary(name)
                if self.kind == "query_key"
                else f"{name} takes a part of the axis that would be cut"
            )
        return tuple(self.extents.axis(node.outputs[0], i) if i in along else a for i, a in enumerate(before))

    def _matmul(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        """Probabilities times values: a mixture of positions, the same for every number of a head."""
        name = label(node)
        if len(tracked) != 1:
            return f"{name} multiplies it with itself"
        if self.kind == "query_key":
            return f"{name} reads the {'queries' if self._axes_site(node, tracked[0]) == 0 else 'keys'} too"
        (at,) = tracked
        other = node.inputs[1 - at]
        axes = self.axes[node.inputs[at]]  # type: ignore[index]
        mine = self.extents.axes(other) if other is not None else None
        if mine is None or len(mine) < 2 or len(axes) < 2:
            return f"the rank of what {name} multiplies is not known"
        kept, contracted = (-1, -2) if at == 1 else (-2, -1)
        if ours(axes[contracted]) or not is_cut(axes[kept]):
            return f"{name} does not mix positions alone: it contracts or spreads the numbers of a head"
        lead = self._broadcast(node.outputs[0], axes[:-2], mine[:-2])
        row = mine[-2] if at == 1 else mine[-1]
        return (*lead, row, axes[-1]) if at == 1 else (*lead, axes[-2], row)

    def _axes_site(self, node: ir.Node, at: int) -> int:
        value = node.inputs[at]
        return next((p.site for axis in self.axes[value] for p in axis if p.role == "width"), 0)  # type: ignore[index]

    def _broadcast(self, output: ir.Value, axes: Axes, other: Axes) -> Axes:
        """Axes of ours against those of something else, aligned at the end; where ours has length one it is copied."""
        rank = max(len(axes), len(other))
        known = self.extents.axes(output)
        axes = ((),) * (rank - len(axes)) + axes
        other = ((),) * (rank - len(other)) + other
        made = []
        for i, (mine, theirs) in enumerate(zip(axes, other, strict=True)):
            inferred = known[i] if known is not None and len(known) >= rank else theirs
            n = number(theirs) or number(inferred)
            made.append(mine or (copies(length(n)) if n is not None else theirs))
        return tuple(made)

    def _linear(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        """Element-wise operators that treat all numbers of a head alike, and add nothing."""
        name, kind = label(node), node.op_type
        if len(tracked) > 1:
            return f"{name} combines it with itself" if self.kind != "query_key" else _rotary(name)
        (at,) = tracked
        axes = self.axes[node.inputs[at]]  # type: ignore[index]
        if kind in _PLAIN:
            to = node.attributes["to"].as_int() if kind == "Cast" else ir.DataType.FLOAT
            return axes if to in FLOATS else f"{name} leaves the float types"
        if any(
            site.bias is not None and (node, 1 - at) == (site.bias.node, site.bias.index)
            for site in self.firsts
        ):
            return axes
        if kind == "Neg":
            return axes
        if kind == "Where":
            other = tensor_of(node.inputs[3 - at]) if at in (1, 2) else None
            if other is None or np.any(other.numpy()):
                return f"{name} puts something else than zeros in its place"
            others = [node.inputs[0], node.inputs[3 - at]]
        elif kind == "Mul" or (kind == "Div" and at == 0):
            others = [node.inputs[1 - at]]
        elif kind in ("Add", "Sub"):
            return f"{name} adds to the numbers of a head, and is no bias of {self._site_of(axes).name}"
        else:
            return f"{name} is not linear: it cannot be moved past the matrix that mixes a head"
        for value in others:
            theirs = self.extents.axes(value) if value is not None else None
            if theirs is None:
                return f"the shape of what {name} reads is not known"
            spans = min(len(axes), len(theirs))
            if any(
                is_cut(a) and t
                for a, t in zip(axes[len(axes) - spans :], theirs[len(theirs) - spans :], strict=True)
            ):
                if self.kind == "query_key" and tensor_of(value) is None:
                    return _rotary(name)
                return f"{name} scales each number of a head by its own factor"
            axes = self._broadcast(node.outputs[0], axes, theirs)
        return axes

    def _elementwise(self, node: ir.Node, tracked: list[int]) -> Axes | str:
        """Operators that treat every column of an FFN by itself."""
        name = label(node)
        shapes = {self.axes[v] for v in node.inputs if v in self.axes}
        if len(shapes) > 1:
            return f"{name} combines columns of different shapes"
        axes = shapes.pop()
        spots = [i for i, a in enumerate(axes) if ours(a)]
        if len(spots) != 1:
            return f"the hidden width is spread over several axes before {name}"
        back = spots[0] - len(axes)  # counted from the end, as broadcasting does
        width = number(axes[back])
        for index, value in enumerate(node.inputs):
            if value is None or index in tracked:
                continue
            bias = next((s.bias for s in self.firsts if s.bias is not None and s.bias.node is node), None)
            if bias is not None and bias.index == index:
                continue
            tensor = tensor_of(value)
            theirs = self.extents.axes(value) if tensor is None else tuple(length(n) for n in dims(tensor))
            if theirs is None:
                return f"the shape of {value.name!r} is not known, which {name} reads"
            if len(theirs) >= -back and theirs[back]:
                if tensor is None or number(theirs[back]) != width:
                    return f"{name} combines the hidden columns with {value.name!r}, which is no constant"
                self.followers.append(Follower(node, index, len(theirs) + back))
            if len(theirs) > len(axes) and self.extents.rank(node.outputs[0]) is not None:
                axes = self._broadcast(node.outputs[0], axes, theirs)
        return axes

    def _site_of(self, axes: Axes) -> Site:
        return self.firsts[next((p.site for axis in axes for p in axis if p.role == "width"), 0)]


def _rotary(name: str) -> str:
    return (
        f"rotary embedding: {name} turns a head's numbers by their position, and not as x * cos + rotate_half(x) * sin, of which whole "
        "planes could be cut"
    )


def _is_symbol(entry: Axis) -> bool:
    """Whether an entry is a length of the graph, and not only the place where it was computed."""
    return all(not (isinstance(p.size, tuple) and len(p.size) == 3) for p in entry)


def copies(entry: Axis) -> Axis:
    """What Expand or broadcasting makes of an axis of length one."""
    n = number(entry)
    return entry if n is None else () if n in (1, -1) else (Part(n, "repeat"),)
