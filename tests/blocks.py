"""Attention and feed-forward blocks as exporters write them, in many spellings, from one small builder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from lrcompile.graph import shapes_of
from lrcompile.grouping import groups_of
from lrcompile.records import Group, InputStatistics, Site
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal

HEADS, SIZE = 4, 6
WIDTH = HEADS * SIZE
BATCH, ROWS = 3, 5


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


@dataclass
class Block:
    """Collects nodes and constants. Names of values are made up; names of sites are those of their weights."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    inputs: dict[str, object] = field(default_factory=lambda: {"x": ("b", "s", WIDTH)})
    outputs: list[str] = field(default_factory=list)

    def const(self, array: Array | float | int) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, None if isinstance(array, np.ndarray) else np.float32)
        return name

    def op(self, kind: str, *inputs: str | Array, name: str = "", **attributes: object) -> str:
        names = [v if isinstance(v, str) else self.const(v) for v in inputs]
        out = f"v{len(self.nodes)}"
        self.nodes.append(node(kind, names, [out], name=name or f"{kind}_{len(self.nodes)}", **attributes))
        return out

    def linear(self, x: str, name: str, K: int, N: int, *, bias: bool = True, seed: int = 0) -> str:
        self.constants[name] = normal(K, N, seed=seed) / np.float32(np.sqrt(K))
        y = self.op("MatMul", x, name, name=name)
        return self.op("Add", y, normal(N, seed=seed + 50)) if bias else y

    def dim(self, value: str, axis: int) -> str:
        """(1,): the length of an axis, as TorchScript's exporter asks for it."""
        one = self.op("Gather", self.op("Shape", value), np.array(axis, np.int64))
        return self.op("Unsqueeze", one, ints(0))

    def made(self, y: str, opset: int = 18) -> ir.Model:
        self.nodes.append(node("Identity", [y], ["y"], name="end"))
        return model(self.nodes, self.inputs, ["y", *self.outputs], self.constants, opset=opset)  # type: ignore[arg-type]


def attention(
    *,
    bias: bool = True,
    repeat: int = 1,
    split: str = "zeros",
    merge: str = "number",
    keys: str = "two transposes",
    scale: str = "div",
    form: str = "4d",
    mask: bool = False,
    turn: str = "",
    opset: int = 18,
) -> ir.Model:
    """x + attention(x). split, merge, keys, scale, form: how heads are told apart and together, and how scores are made; see the code.

    turn: a rotary embedding of queries and keys, see `Turn`.
    """
    b = Block()
    turned = Turn(b, turn) if turn else None
    few = HEADS // repeat
    q, k, v = (
        b.linear("x", f"w{name}", WIDTH, n * SIZE, bias=bias, seed=i)
        for i, (name, n) in enumerate((("q", HEADS), ("k", few), ("v", few)))
    )
    lead = b.op("Shape", "x", start=0, end=2) if opset >= 15 else ""
    shared = (
        b.op("Concat", lead, ints(-1, SIZE), axis=0) if split == "shared" else ""
    )  # one shape for q, k and v

    def heads(value: str, n: int) -> str:
        if split == "zeros":
            return b.op("Reshape", value, ints(0, 0, n, SIZE))
        if split == "numbers":
            return b.op("Reshape", value, ints(-1, ROWS, n, SIZE))
        if split == "last":  # the size by itself
            return b.op("Reshape", value, ints(0, 0, n, -1))
        if split == "shared":
            return b.op("Reshape", value, shared, allowzero=1)
        pieces = [b.dim(value, 0), b.dim(value, 1), ints(n), ints(SIZE)]
        return b.op("Reshape", value, b.op("Concat", *pieces, axis=0))

    def repeated(value: str) -> str:
        """(b, few, s, size) -> (b, HEADS, s, size)."""
        if repeat == 1:
            return value
        wide = b.op("Unsqueeze", value, ints(2))
        wide = b.op(
            "Expand",
            wide,
            b.op("Concat", b.dim(value, 0), ints(few, repeat), b.dim(value, 2), ints(SIZE), axis=0),
        )
        return b.op("Reshape", wide, ints(0, HEADS, -1, SIZE))

    if form == "3d":  # fairseq: heads join the batch
        flat = [b.op("Transpose", value, perm=[1, 0, 2]) for value in (q, k, v)]  # (s, b, width)
        many = b.op("Mul", b.op("Squeeze", b.dim("x", 0), ints(0)), np.array(HEADS, np.int64))
        shape = b.op("Concat", b.dim("x", 1), b.op("Unsqueeze", many, ints(0)), ints(SIZE), axis=0)
        q, k, v = (b.op("Transpose", b.op("Reshape", f, shape), perm=[1, 0, 2]) for f in flat)
        kt = b.op("Transpose", k, perm=[0, 2, 1])
    else:
        q, k, v = heads(q, HEADS), heads(k, few), heads(v, few)
        q, v = b.op("Transpose", q, perm=[0, 2, 1, 3]), repeated(b.op("Transpose", v, perm=[0, 2, 1, 3]))
        if turned is not None:
            q, k = turned(q), repeated(turned(b.op("Transpose", k, perm=[0, 2, 1, 3])))
            kt = b.op("Transpose", k, perm=[0, 1, 3, 2])
        elif keys == "one transpose":
            kt = b.op("Transpose", k, perm=[0, 2, 3, 1])
        else:
            k = repeated(b.op("Transpose", k, perm=[0, 2, 1, 3]))
            if keys == "flattened":  # torch.onnx.export(dynamo=True) of scaled_dot_product_attention
                shape = b.op("Shape", k)
                last, row = (b.op("Slice", shape, ints(i), ints(j)) for i, j in ((-1, 2**63 - 1), (-2, -1)))
                front = b.op("Slice", shape, ints(-(2**63)), ints(-2))
                flat3 = b.op("Reshape", k, b.op("Concat", ints(-1), row, last, axis=0))
                turned = b.op("Transpose", flat3, perm=[0, 2, 1])
                kt = b.op("Reshape", turned, b.op("Concat", front, last, row, axis=0))
            else:
                kt = b.op("Transpose", k, perm=[0, 1, 3, 2])
    factor = np.array(np.sqrt(SIZE), np.float32)
    if scale == "both":
        q, kt = (b.op("Mul", value, np.array(SIZE**-0.25, np.float32)) for value in (q, kt))
    scores = b.op("MatMul", q, kt, name="scores")
    if scale == "div":
        scores = b.op("Div", scores, factor)
    if mask:
        b.inputs["mask"] = ("b", 1, 1, "s")
        scores = b.op("Add", scores, "mask")
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v, name="mix")
    if mask:
        b.inputs["dead"] = (("b", 1, "s", 1), np.bool_)
        mixed = b.op("Where", "dead", np.array(0, np.float32), mixed)
    if form == "3d":
        back = b.op("Transpose", mixed, perm=[1, 0, 2])
        together = b.op("Reshape", back, b.op("Concat", b.dim("x", 1), b.dim("x", 0), ints(WIDTH), axis=0))
        together = b.op("Transpose", together, perm=[1, 0, 2])
    else:
        back = b.op("Transpose", mixed, perm=[0, 2, 1, 3])
        if merge == "number":
            together = b.op("Reshape", back, ints(0, 0, WIDTH))
        elif merge == "shared":
            together = b.op("Reshape", back, b.op("Concat", lead, ints(-1), axis=0), allowzero=1)
        else:
            together = b.op(
                "Reshape", back, b.op("Concat", b.dim(back, 0), b.dim(back, 1), ints(WIDTH), axis=0)
            )
    return b.made(b.op("Add", b.linear(together, "wo", WIDTH, WIDTH, bias=bias, seed=3), "x"), opset)


class Turn:
    """x cos + rotate_half(x) sin as Hugging Face writes it, x (batch, heads, sequence, size).

    form: "slices" (as torch exports it), "split" (halves by Split, factors on the left), "sizes" (a Split that is given sizes), "table"
    (cos and sin are constants, bounds are int32 and end where the head ends), "interleaved" (numbers 2 i and 2 i + 1 are a plane).
    """

    def __init__(self, b: Block, form: str, size: int = SIZE) -> None:
        self.b, self.form, self.size = b, form, size
        half = size // 2
        speeds = (100.0 ** (-np.arange(half) / half)).astype(np.float32)
        if form == "table":
            angles = np.arange(ROWS, dtype=np.float32)[:, None] * np.tile(speeds, 2)
            self.cos, self.sin = (b.const(f(angles)[None, None]) for f in (np.cos, np.sin))
            return
        b.inputs["positions"] = (("b", "s"), np.int64)
        places = b.op("Cast", b.op("Unsqueeze", "positions", ints(2)), to=onnx.TensorProto.FLOAT)
        by_speed = b.op("Mul", places, speeds)
        angle = b.op("Concat", by_speed, by_speed, axis=-1)
        self.cos, self.sin = (b.op("Unsqueeze", b.op(kind, angle), ints(1)) for kind in ("Cos", "Sin"))

    def __call__(self, x: str) -> str:
        b, half = self.b, self.size // 2
        if self.form == "slices":
            first = b.op("Slice", x, ints(0), ints(half), ints(3), ints(1))
            second = b.op("Slice", x, ints(half), ints(2**63 - 1), ints(3), ints(1))
        elif self.form == "table":
            bounds = [np.array([n], np.int32) for n in (0, half, self.size, -1)]
            first = b.op("Slice", x, bounds[0], bounds[1], bounds[3])
            second = b.op("Slice", x, bounds[1], bounds[2], bounds[3])
        elif self.form == "interleaved":
            first, second = (b.op("Slice", x, ints(i), ints(self.size), ints(3), ints(2)) for i in (0, 1))
        else:
            more = [b.const(ints(half, half))] if self.form == "sizes" else []
            attributes = {} if more else {"num_outputs": 2}
            first, second = f"v{len(b.nodes)}a", f"v{len(b.nodes)}b"
            b.nodes.append(
                node("Split", [x, *more], [first, second], name=f"split_{x}", axis=-1, **attributes)
            )
        turned = b.op("Concat", b.op("Neg", second), first, axis=-1 if self.form == "slices" else 3)
        if self.form in ("split", "sizes"):
            return b.op("Add", b.op("Mul", self.sin, turned), b.op("Mul", self.cos, x))
        return b.op("Add", b.op("Mul", x, self.cos), b.op("Mul", turned, self.sin))


HIDDEN = 40


def ffn(
    act: str = "Gelu", *, bias: bool = True, gated: bool = False, gemm: bool = False, opset: int = 20
) -> ir.Model:
    """down(act(up(x))), or down(act(gate(x)) * up(x)). gemm: two axes, weights stored transposed."""
    b = Block()

    def linear(x: str, name: str, K: int, N: int, seed: int) -> str:
        if not gemm:
            return b.linear(x, name, K, N, bias=bias, seed=seed)
        b.constants[name] = np.ascontiguousarray((normal(K, N, seed=seed) / np.float32(np.sqrt(K))).T)
        more = [normal(N, seed=seed + 50)] if bias else []
        return b.op("Gemm", x, name, *more, transB=1, name=name)

    if gemm:
        b.inputs["x"] = ("b", WIDTH)
    up = linear("x", "up", WIDTH, HIDDEN, 1)
    hidden = linear("x", "gate", WIDTH, HIDDEN, 2) if gated else up
    if act == "erf":
        inner = b.op(
            "Add", b.op("Erf", b.op("Div", hidden, np.array(2**0.5, np.float32))), np.array(1, np.float32)
        )
        hidden = b.op("Mul", b.op("Mul", hidden, inner), np.array(0.5, np.float32))
    elif act == "tanh":
        cube = b.op("Mul", b.op("Pow", hidden, np.array(3, np.float32)), np.array(0.044715, np.float32))
        inner = b.op("Tanh", b.op("Mul", b.op("Add", hidden, cube), np.array(0.79788456, np.float32)))
        hidden = b.op(
            "Mul", b.op("Mul", hidden, np.array(0.5, np.float32)), b.op("Add", inner, np.array(1, np.float32))
        )
    elif act == "silu":
        hidden = b.op("Mul", hidden, b.op("Sigmoid", hidden))
    elif act == "prelu":
        hidden = b.op("PRelu", hidden, np.abs(normal(1, 1, HIDDEN)) if not gemm else np.abs(normal(HIDDEN)))
    elif act == "channels":
        hidden = b.op("Relu", b.op("Mul", b.op("Add", hidden, normal(1, HIDDEN)), normal(HIDDEN, seed=7)))
    elif act == "where":
        positive = b.op("Greater", hidden, np.array(0, np.float32))
        hidden = b.op("Where", positive, hidden, b.op("Mul", hidden, np.array(0.1, np.float32)))
    else:
        hidden = b.op(act, hidden)
    if gated:
        hidden = b.op("Mul", hidden, up)
    return b.made(linear(hidden, "down", HIDDEN, WIDTH, 4), opset)


# --- looking at them -----------------------------------------------------------------------------------------------


def groups(made: ir.Model) -> dict[str, Group]:
    """The overlapping groups by kind, of which there is at most one each."""
    found = groups_of(find(made).sites, shapes_of(made))
    kinds = ("up_down", "value_output", "query_key")
    assert len([g for g in found if g.kind in kinds]) == len({g.kind for g in found if g.kind in kinds})
    return {g.kind: g for g in found if g.kind in kinds}


def feeds(made: ir.Model, seed: int = 0, batch: int = BATCH) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for value in made.graph.inputs:
        assert value.shape is not None and value.name is not None
        shape = tuple(d if isinstance(d, int) else batch if str(d) == "b" else ROWS for d in value.shape)
        if value.name == "positions":
            found[value.name] = np.tile(np.arange(shape[1]), (shape[0], 1))
        elif value.dtype == ir.DataType.BOOL:
            found[value.name] = rng.random(shape) < 0.2
        else:
            # a low-rank part, so that a cut has something to gain
            low = rng.standard_normal((*shape[:-1], 4)) @ normal(4, shape[-1], seed=8)
            found[value.name] = (0.7 * low + 0.3 * rng.standard_normal(shape) + 0.2).astype(np.float32)
    return found


def run(made: ir.Model, given: Mapping[str, Array], more: Sequence[str] = ()) -> list[Array]:
    """Outputs in ONNX Runtime, and values inside the graph."""
    proto = ir.to_proto(made)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run([*(v.name for v in made.graph.outputs), *more], dict(given)))


@dataclass(frozen=True)
class Statistics:
    """Moments of the sites' inputs on 64 drawn batches."""

    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return str(id(self.known.get(site.name)))


def statistics(made: ir.Model, sites: Sequence[Site]) -> Statistics:
    names = sorted({s.data.name or "" for s in sites} - {"x"})
    given = feeds(made, seed=9, batch=64)
    seen = dict(zip(names, run(made, given, names)[len(made.graph.outputs) :], strict=True), x=given["x"])
    known = {}
    for site in sites:
        X = seen[site.data.name or ""].reshape(-1, site.K).astype(np.float64)
        known[site.name] = InputStatistics(len(X), X.T @ X / len(X), X.mean(axis=0))
    return Statistics(known)
