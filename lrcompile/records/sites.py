"""Of load and find: the checked model, its constant weight uses, and what is best taken together."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `lrcompile --help` imports neither
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, np.dtype[Any]]

# What a site asks of its weight: x @ W, rows W[ids], a convolution, or something that we only list.
Kind = Literal["linear", "lookup", "conv", "other"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A "no" with its sentence. Falsy, so that ``if refusal := check(...)`` would never hide it: compare with None."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Source:
    """A checked model.

    path: the ``.onnx`` file. model: its graph, weights mapped on disk, local functions inlined.
    sha256: of the ``.onnx`` file. weights: each external file (relative name) with its SHA-256.
    opset: version of the default domain. notes: sentences for the report (what was changed on the way in).
    """

    path: Path
    model: ir.Model
    sha256: str
    weights: tuple[tuple[str, str], ...]
    opset: int
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names model and weights in caches."""
        return "|".join((self.sha256, *(f"{name}:{sha}" for name, sha in self.weights)))


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stored constant is read as a matrix: steps of (permutation or None, shape afterwards)."""

    stored: tuple[int, ...]
    steps: tuple[tuple[tuple[int, ...] | None, tuple[int, ...]], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.steps[-1][1] if self.steps else self.stored

    def transpose(self, perm: tuple[int, ...]) -> Layout:
        if perm == tuple(range(len(perm))):
            return self
        if self.steps and self.steps[-1][0] is not None:  # two permutations in a row are one, or none
            last, _ = self.steps[-1]
            assert last is not None
            return Layout(self.stored, self.steps[:-1]).transpose(tuple(last[p] for p in perm))
        return Layout(self.stored, (*self.steps, (perm, tuple(self.shape[p] for p in perm))))

    def reshape(self, shape: tuple[int, ...]) -> Layout:
        if shape == self.shape:
            return self
        return Layout(self.stored, (*self.steps, (None, shape)))

    def over(self, stored: tuple[int, ...]) -> Layout:
        """The same reading of a constant of another size. Only permutations can be carried over."""
        layout = Layout(stored)
        for perm, _ in self.steps:
            if perm is None:
                raise ValueError("a reshaped weight has no other size")
            layout = layout.transpose(perm)
        return layout

    def stored_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the constant that this reading makes `shape` of; permutations only, as in `over`."""
        for perm, _ in reversed(self.steps):
            if perm is None:
                raise ValueError("a reshaped weight has no other size")
            shape = tuple(shape[perm.index(axis)] for axis in range(len(perm)))
        return shape

    def apply(self, array: Array) -> Array:
        """The constant as the matrix that a factorization sees."""
        for perm, shape in self.steps:
            array = array.transpose(perm) if perm is not None else array.reshape(shape)
        return array

    def invert(self, array: Array) -> Array:
        """A matrix back in the shape of the stored constant."""
        shapes = [self.stored, *(shape for _, shape in self.steps)]
        for (perm, _), before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            if perm is None:
                array = array.reshape(before)
            else:
                inverse = sorted(range(len(perm)), key=perm.__getitem__)
                array = array.transpose(inverse)
        return array


# A permutation of axes, or a shape in which 0 keeps the dimension as it is.
Step = tuple[Literal["transpose", "reshape"], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a node's other input becomes x (.., K) or ids, and how y (.., N) becomes the node's output.

    data: index of that input. before, after: steps around the product. scale: what the product is multiplied by (Gemm's
    alpha). addend, addend_scale: index of what is added at the end, and its factor (Gemm's C and beta).
    """

    data: int
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    scale: float = 1.0
    addend: int | None = None
    addend_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Window:
    """What a Conv sees of its input at one position of its output: an entry for each axis of the picture.

    pads: zeros before each axis, then after each. auto_pad: ``SAME_UPPER`` or ``SAME_LOWER``, where the input's size says how many
    there are (`pads` are zeros then), else empty. group: the parts of the channels that do not see each other.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = ""
    group: int = 1

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def size(self) -> int:
        """Points in the window."""
        return math.prod(self.kernel)

    def attributes(self, group: int) -> dict[str, Any]:
        """Of a Conv node that sees this, of so many groups."""
        padding: dict[str, Any] = {"auto_pad": self.auto_pad} if self.auto_pad else {"pads": self.pads}
        return {
            "kernel_shape": self.kernel, "strides": self.strides, "dilations": self.dilations, "group": group, **padding,
        }  # fmt: skip

    def along(self, axes: Collection[int]) -> Window:
        """The window along these axes, and a point along the others: what a Conv of these axes alone sees. Padding splits as well."""
        keep = [i in axes for i in range(self.rank)]

        def only(values: tuple[int, ...], other: int) -> tuple[int, ...]:
            return tuple(
                v if k else other for v, k in zip(values, keep * (len(values) // self.rank), strict=True)
            )

        return Window(
            only(self.kernel, 1), only(self.strides, 1), only(self.dilations, 1), only(self.pads, 0), self.auto_pad, self.group
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """A constant added to what a site computes, ours to correct: only this site's output meets it.

    node, index: who reads it. value: the constant. shape: its shape, of N elements. scale: the factor before it (Gemm's beta).
    """

    node: ir.Node
    index: int
    value: ir.Value
    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A constant weight and a node that multiplies or gathers it.

    name: unique and readable; what ``--include`` matches. node, operand: who reads the weight, at which input.
    weight, weight_shape, stored: name, shape and type of the constant in the file; root: the value from which on only
    transposes and reshapes follow (the constant itself, or what Cast or DequantizeLinear make of it).
    layout: how root is read as the matrix W (K, N) with y = x W (linear) or as the table W (V, D) with rows W[ids] (lookup).
    Of a Conv x is what the window sees, (K,) with K = (channels a group, *kernel), and W has a column for each channel that comes out.
    operand_layout: how root is read as the node's operand.
    dtype: what the node computes in. wiring: how the node's data meets W; None when the site is only listed. window: of a Conv.
    refusal: why it is not taken, or None. path: where the node stands (``then_branch of If_3``), empty in the main graph.
    """

    name: str
    op: str
    kind: Kind
    node: ir.Node
    operand: int
    weight: str
    weight_shape: tuple[int, ...]
    stored: str
    root: ir.Value
    layout: Layout
    operand_layout: Layout
    dtype: str
    wiring: Wiring | None = None
    window: Window | None = None
    bias: Bias | None = None
    refusal: str | None = None
    path: str = ""

    @property
    def K(self) -> int:  # noqa: N802
        """Length of what is contracted; rows of a table."""
        return self.layout.shape[0]

    @property
    def N(self) -> int:  # noqa: N802
        """Length of what comes out; columns of a table."""
        return self.layout.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def data(self) -> ir.Value:
        """What the weight is multiplied with, or the ids that it is asked for."""
        assert self.wiring is not None
        value = self.node.inputs[self.wiring.data]
        assert value is not None
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Follower:
    """What must follow when the width between the sites of a group is cut.

    node, index: who reads it. axis: of a value with one entry a channel, the axis that is cut to the kept channels: of a constant in the
    file, of anything else, and of a rotary embedding's cos and sin, by a Gather; None for the shape of a Reshape (or bounds of a Slice,
    sizes of a Split), which becomes `shape`: 0 keeps a dimension, None is the new size of a head. half: None is half of that size.
    """

    node: ir.Node
    index: int
    axis: int | None = None
    shape: tuple[int | None, ...] = ()
    half: bool = False


@dataclass(frozen=True, slots=True)
class Width:
    """What lies between the sites of a group that can be cut narrower, without another node but the Gathers of followers.

    size: of a head (of the whole hidden layer of an FFN, heads being 1). heads: of the first site (of a key: its own). repeat: how
    many heads of the last site read one of the first (grouped queries). followers: what on the way must follow. planes: a rotary
    embedding turns a head's numbers i and i + size / 2 together, so that only such pairs can be cut, the same ones of all heads. values: what
    becomes narrower.
    """

    size: int
    heads: int = 1
    repeat: int = 1
    followers: tuple[Follower, ...] = ()
    planes: bool = False
    values: tuple[ir.Value, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sites that are best taken together, or one site alone.

    kind: ``alone``, ``shared`` (one weight, several nodes), ``tied`` (a table and a head), ``qkv``, ``gate_up``,
    ``up_down`` (the last site is down), ``value_output``, ``query_key``. transposed: for each site whether its matrix is the first
    one's transpose (weights that are shared only; False elsewhere). keeper: a node outside the group that reads the weight too, which
    so stays in the file whatever becomes of the group; empty when there is none (weights that are shared only).
    width: what can be cut between the sites of ``up_down``, ``value_output`` and ``query_key``; refusal: why it cannot be.
    """

    name: str
    kind: str
    sites: tuple[Site, ...]
    transposed: tuple[bool, ...]
    keeper: str = ""
    width: Width | None = None
    refusal: str = ""

    @property
    def shares_weight(self) -> bool:
        return self.kind in ("alone", "shared", "tied")

    @property
    def elements(self) -> int:
        """Numbers in the weights, each counted once."""
        return sum({s.weight: s.elements for s in self.sites}.values())


@dataclass(frozen=True, slots=True)
class Finding:
    """All constant weight uses (also refused ones) and all groups; groups may overlap, ``alone``, ``shared`` and ``tied`` do not."""

    sites: tuple[Site, ...]
    groups: tuple[Group, ...]

    def stored_as(self, dtype: str) -> Finding:
        """The same with every float32 weight stored in another type, as when a whole graph changes its precision."""
        moved = {s: replace(s, stored=dtype) if s.stored == "float" else s for s in self.sites}
        groups = (replace(g, sites=tuple(moved[s] for s in g.sites)) for g in self.groups)
        return Finding(tuple(moved.values()), tuple(groups))

    @property
    def units(self) -> tuple[Group, ...]:
        """The groups that partition the sites which can be taken."""
        return tuple(g for g in self.groups if g.shares_weight)

    @property
    def overlapping(self) -> tuple[Group, ...]:
        """The groups of several weights, which are taken instead of their members."""
        return tuple(g for g in self.groups if not g.shares_weight)
