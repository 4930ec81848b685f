"""What can be cut between sites: axes as products of parts, followers, and a sentence for everything that is not understood.

Whether a cut graph computes the right thing is tested with the factorization that cuts, in test_slicing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile.axes import Axes, Axis, Part, innermost, is_cut, length, number, regroup
from lrcompile.records import Group, Width
from tests import blocks
from tests.blocks import BATCH, HEADS, HIDDEN, ROWS, SIZE, WIDTH, Block, Turn, ints
from tests.graphs import normal

B, S = (Part("b"),), (Part("s"),)
W = Part(12, "width", 1)  # 3 heads of 4
H3, D4 = Part(3, "width", 4), Part(4, "width", 1)
MINUS, ZERO = (Part(-1),), (Part(0),)


# --- axes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "entries", "wanted"),
    [
        ((B, S, (W,)), (B, S, length(3), length(4)), (B, S, (H3,), (D4,))),
        ((B, S, (W,)), (B, S, MINUS, length(4)), (B, S, (H3,), (D4,))),
        ((B, S, (W,)), (B, S, length(3), MINUS), (B, S, (H3,), (D4,))),
        ((B, S, (W,)), (MINUS, S, length(3), length(4)), (B, S, (H3,), (D4,))),
        # leading lengths that cannot be matched, one by one or at all, hold nothing of ours
        ((B, S, (W,)), (B, (Part("t"),), length(3), length(4)), (B, S, (H3,), (D4,))),
        (((Part("bs"),), (W,)), (B, S, length(3), length(4)), (B, S, (H3,), (D4,))),
        ((B, S, (W,)), (S, B, length(12)), (S, B, (W,))),
        # together again, and with other axes
        ((B, S, (H3,), (D4,)), (B, S, length(12)), (B, S, (H3, D4))),
        ((B, S, (H3,), (D4,)), (B, S, MINUS), (B, S, (H3, D4))),
        ((B, (H3,), S, (D4,)), (MINUS, S, length(4)), ((*B, H3), S, (D4,))),
        ((B, (H3,), S, (D4,)), ((*B, Part(3)), S, length(4)), ((*B, H3), S, (D4,))),
        (((*B, H3), S, (D4,)), (B, length(3), S, (D4,)), (B, (H3,), S, (D4,))),
        # another split than the first one: of a head's numbers, or across heads
        ((B, (H3, D4)), (B, length(6), length(2)), (B, (H3, Part(2, "width", 2)), (Part(2, "width", 1),))),
        ((B, (W,)), (B, length(4), length(3)), (B, (Part(4, "width", 3),), (Part(3, "width", 1),))),
        # in numbers
        ((length(1), length(5), (W,)), (length(5), length(3), length(4)), (length(5), (H3,), (D4,))),
        (((), (), (W,)), (length(12),), ((W,),)),
        ((), (), ()),
    ],
)  # fmt: skip
def test_regroup(axes: Axes, entries: tuple[Axis, ...], wanted: Axes) -> None:
    assert regroup(axes, entries) == wanted


@pytest.mark.parametrize(
    ("axes", "entries"),
    [
        ((B, S, (W,)), (S, B, MINUS, length(4))),  # where do the heads end?
        ((B, S, (W,)), ((Part("t"),), (Part("u"),), MINUS)),
        ((B, (W,)), (B, length(5), length(3))),  # no legal graph
        ((B, (W,)), (B, length(12), length(2))),
        (((W,), B), (length(8), MINUS, (Part("t"),))),
    ],
)
def test_regroup_does_not_tell(axes: Axes, entries: tuple[Axis, ...]) -> None:
    assert regroup(axes, entries) is None


def test_parts_of_an_axis() -> None:
    assert number((H3, D4)) == 12 and number((*B, D4)) is None and number(()) == 1
    assert (innermost((H3, D4)), innermost((*B, D4)), innermost((H3,)), innermost((D4, H3))) == (12, 4, 1, 1)
    assert is_cut((H3, D4)) and not is_cut((H3,)) and not is_cut(length(4))


# --- what follows ---------------------------------------------------------------------------------------------------


def width(made: ir.Model, kind: str) -> Width:
    group = blocks.groups(made)[kind]
    assert group.width is not None, group.refusal
    return group.width


def shapes(found: Width) -> list[tuple[str, tuple[int | None, ...]]]:
    assert all(f.index == 1 and f.axis is None for f in found.followers)
    return [(f.node.op_type, f.shape) for f in found.followers]


SPLIT, MERGE = ("Reshape", (0, 0, HEADS, None)), ("Reshape", (0, 0, -1))
NUMBERS = ("Reshape", (-1, ROWS, HEADS, None))  # the rows are a number, where the graph has a symbol


@pytest.mark.parametrize(
    ("options", "values", "scores"),
    [
        ({}, [SPLIT, MERGE], [SPLIT, SPLIT]),
        ({"split": "last", "merge": "shared"}, [], []),  # -1 follows by itself
        ({"split": "shared", "merge": "shared", "keys": "flattened"}, [SPLIT], [SPLIT, SPLIT]),
        ({"split": "computed", "merge": "computed", "opset": 14}, [SPLIT, MERGE], [SPLIT, SPLIT]),
        ({"split": "numbers"}, [NUMBERS, MERGE], [NUMBERS, NUMBERS]),
    ],
)
def test_shapes_that_follow(options: dict[str, Any], values: list[Any], scores: list[Any]) -> None:
    made = blocks.attention(**options)
    assert shapes(width(made, "value_output")) == values
    assert shapes(width(made, "query_key")) == scores


def test_copies_of_a_head_follow() -> None:
    made = blocks.attention(repeat=2)
    few = ("Reshape", (0, 0, 2, None))
    copied, joined = ("Expand", (1, 1, 2, 1, 1)), ("Reshape", (0, HEADS, -1, None))
    found = width(made, "value_output")
    assert (found.size, found.heads, found.repeat) == (SIZE, 2, 2)
    assert shapes(found) == [few, copied, joined, MERGE]
    found = width(made, "query_key")
    assert (found.size, found.heads, found.repeat) == (SIZE, 2, 2)
    assert sorted(shapes(found), key=str) == sorted([SPLIT, few, copied, joined], key=str)


@pytest.mark.parametrize(
    ("form", "bounds"),
    [
        ("slices", [("Slice", 2), ("Slice", 1)]),
        ("table", [("Slice", 2), ("Slice", 1)]),
        ("split", []),
        ("sizes", [("Split", 1)]),
    ],
)
def test_planes_of_a_rotary_embedding(form: str, bounds: list[Any]) -> None:
    """Of queries and of keys: cos and sin, and the bounds of the halves."""
    found = width(blocks.attention(turn=form, repeat=2), "query_key")
    assert (found.size, found.heads, found.repeat, found.planes) == (SIZE, HEADS // 2, 2, True)
    factors = [(f.node.op_type, f.axis) for f in found.followers if f.axis is not None]
    assert factors == 4 * [("Mul", 3)]
    assert [(f.node.op_type, f.index) for f in found.followers if f.half] == 2 * bounds
    assert not width(blocks.attention(), "query_key").planes


@pytest.mark.parametrize(("act", "axes"), [("Gelu", []), ("prelu", [2]), ("channels", [1, 0])])
def test_constants_with_an_entry_a_channel_follow(act: str, axes: list[int]) -> None:
    """Biases are the sites' own and no followers."""
    found = width(blocks.ffn(act, gated=True), "up_down")
    assert (found.size, found.heads, found.repeat) == (HIDDEN, 1, 1)
    assert [f.axis for f in found.followers] == axes


def test_without_any_shape() -> None:
    """A feed-forward network needs no ranks; heads do."""
    made = blocks.ffn("silu", gated=True)
    for value in (v for node in made.graph for v in node.outputs):
        value.shape = None
    made.graph.inputs[0].shape = None
    assert width(made, "up_down").size == HIDDEN


# --- what is refused ------------------------------------------------------------------------------------------------


def hooked(
    where: str, change: Callable[[Block, str], str], *, opset: int = 18, ways: str = "separate"
) -> ir.Model:
    """Attention in which `change` stands at one place: on q, k or v (.., s, size) per head, on the scores or on the mixed values."""
    b = Block()

    def hook(place: str, value: str) -> str:
        return change(b, value) if place == where else value

    def heads(name: str, seed: int) -> str:
        flat = hook(f"{name} flat", b.linear("x", f"w{name}", WIDTH, WIDTH, seed=seed))
        split = b.op("Reshape", flat, ints(0, 0, HEADS, SIZE))
        return hook(name, b.op("Transpose", split, perm=[0, 2, 1, 3]))

    q, k, v = (heads(name, i) for i, name in enumerate("qkv"))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    probabilities = b.op("Softmax", hook("scores", scores), axis=-1)
    mixed = hook("mixed", b.op("MatMul", probabilities, v, name="mix"))
    together = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), ints(0, 0, WIDTH))
    return b.made(b.linear(together, "wo", WIDTH, WIDTH, seed=3), opset)


def refusal(made: ir.Model, kind: str) -> str:
    group: Group = blocks.groups(made)[kind]
    assert group.width is None and group.refusal and "\n" not in group.refusal
    return group.refusal


def interleaved(b: Block, value: str) -> str:
    return Turn(b, "interleaved")(value)


def of_a_part(b: Block, value: str) -> str:
    """A rotary embedding of the first numbers of a head only."""
    first, rest = (b.op("Slice", value, ints(i), ints(j), ints(3)) for i, j in ((0, 4), (4, SIZE)))
    return b.op("Concat", Turn(b, "slices", 4)(first), rest, axis=-1)


def of_two_heads(b: Block, value: str) -> str:
    """Numbers of two heads are a plane."""
    flat = b.op("Transpose", value, perm=[0, 2, 1, 3])
    wide = b.op("Transpose", b.op("Reshape", flat, ints(0, 0, HEADS // 2, 2 * SIZE)), perm=[0, 2, 1, 3])
    turned = b.op("Transpose", Turn(b, "slices", 2 * SIZE)(wide), perm=[0, 2, 1, 3])
    return b.op("Transpose", b.op("Reshape", turned, ints(0, 0, HEADS, SIZE)), perm=[0, 2, 1, 3])


def with_a_reader_inside(b: Block, value: str) -> str:
    turned = Turn(b, "slices")(value)
    b.outputs.append(next(n.output[0] for n in b.nodes if n.op_type == "Neg"))
    return turned


def by_its_own_angles(b: Block, value: str) -> str:
    """What multiplies the numbers is made of them."""
    turn = Turn(b, "slices")
    turn.cos = b.op("Neg", value)
    return turn(value)


def by_one_angle(b: Block, value: str) -> str:
    """One cosine for all planes: no entry a number that could be taken."""
    turn = Turn(b, "slices")
    turn.cos = b.op("ReduceMean", turn.cos, ints(-1))
    return turn(value)


def cached(b: Block, value: str) -> str:
    b.inputs["past"] = ("b", HEADS, "p", SIZE)
    present = b.op("Concat", "past", value, axis=2)
    b.outputs.append(present)
    return present


def given_out(b: Block, value: str) -> str:
    b.outputs.append(value)
    return value


def normalised(b: Block, value: str) -> str:
    square = b.op("ReduceMean", b.op("Mul", value, value), ints(-1))
    return b.op("Div", value, b.op("Sqrt", square))


def root_of_size(b: Block, value: str) -> str:
    """torch's scaled_dot_product_attention in TorchScript: the scale is computed from a shape."""
    size = b.op("Slice", b.op("Shape", value), ints(-1), ints(2**31))
    return b.op("Div", value, b.op("Sqrt", b.op("Cast", size, to=onnx.TensorProto.FLOAT, name="to_float")))


def flattened(b: Block, value: str) -> str:
    """Heads join the batch, and leave it again."""
    rows = b.dim(value, 2)
    flat = b.op("Reshape", value, b.op("Concat", ints(-1), rows, ints(SIZE), axis=0))
    return b.op("Reshape", flat, b.op("Concat", ints(-1, HEADS), rows, ints(SIZE), axis=0))


def zeros_of_size(b: Block, value: str) -> str:
    """Something else is made as wide."""
    return b.op("Add", value, b.op("ConstantOfShape", b.op("Shape", value)))


REFUSED: list[tuple[str, str, Callable[[Block, str], str], str]] = [
    ("query_key", "q", interleaved, "rotary embedding: "),
    ("query_key", "k", interleaved, "rotary embedding: "),
    ("query_key", "k", of_a_part, "rotary embedding: "),
    ("query_key", "k", of_two_heads, "rotary embedding: it turns the numbers of several heads"),
    ("query_key", "k", with_a_reader_inside, "rotary embedding: "),
    ("query_key", "k", by_its_own_angles, "rotary embedding: "),
    ("query_key", "k", by_one_angle, "rotary embedding: "),
    ("query_key", "k", lambda b, v: cached(b, Turn(b, "slices")(v)), "joins a cache of keys or values"),
    ("query_key", "k", cached, "joins a cache of keys or values"),
    ("query_key", "k", given_out, "is an output of the graph"),
    ("query_key", "q", normalised, "Mul 'Mul_"),
    ("query_key", "q", root_of_size, "Cast 'to_float' computes with the size that would be cut"),
    ("query_key", "q", lambda b, v: b.op("Add", v, normal(SIZE)), "is no bias of wq"),
    ("query_key", "q", lambda b, v: b.op("Mul", v, normal(SIZE)), "its own factor"),
    ("query_key", "q", lambda b, v: b.op("Pow", v, np.array(3, np.float32)), "is not linear"),
    ("query_key", "q", lambda b, v: b.op("Split", v, num_outputs=1, axis=1), "rotary embedding: Split"),
    ("query_key", "scores", given_out, "reads the scores, and not a softmax"),
    ("query_key", "scores", lambda b, v: b.op("Tanh", v, name="cap"), "Tanh 'cap' reads the scores"),
    ("value_output", "v", cached, "joins a cache of keys or values"),
    ("value_output", "v", given_out, "is an output of the graph"),
    ("value_output", "v flat", lambda b, v: b.op("Add", v, normal(WIDTH, seed=5)), "is no bias of wv"),
    ("query_key", "q", zeros_of_size, "ConstantOfShape 'ConstantOfShape_"),
    ("value_output", "mixed", lambda b, v: b.op("Where", b.op("Less", v, np.float32(0)), np.float32(0), v), "Less 'Less_"),
    ("value_output", "mixed", lambda b, v: b.op("Where", np.array(True), np.array(1, np.float32), v), "something else than zeros"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "where", "change", "why"), REFUSED)
def test_refused(kind: str, where: str, change: Callable[[Block, str], str], why: str) -> None:
    assert why in refusal(hooked(where, change), kind)


@pytest.mark.parametrize("kind", ["query_key", "value_output"])
def test_what_may_stand_on_the_way(kind: str) -> None:
    """Scalars, masks of whole rows, one factor a head, and operators that change nothing."""
    passes: list[Callable[[Block, str], str]] = [
        lambda b, v: b.op("Mul", np.array(2, np.float32), v),
        lambda b, v: b.op("Div", v, np.array([[3]], np.float32)),
        lambda b, v: b.op("Mul", v, normal(HEADS, 1, 1)),
        lambda b, v: b.op("Neg", b.op("Identity", b.op("Dropout", v))),
        lambda b, v: b.op("Squeeze", b.op("Unsqueeze", v, ints(0)), ints(0)),
        lambda b, v: b.op("Slice", v, ints(0), ints(2), ints(2)),
        lambda b, v: b.op("Concat", v, v, axis=2),
        flattened,
    ]
    for change in passes:
        found = width(hooked(kind[0] if kind == "value_output" else "k", change), kind)
        assert (found.size, found.heads, found.repeat) == (SIZE, HEADS, 1)


def test_a_shape_of_the_keys_that_the_values_use() -> None:
    """Cutting the keys would cut the values' shape; the values can be cut, their shape becomes a constant."""
    b = Block()
    q, k, v = (b.linear("x", f"w{n}", WIDTH, WIDTH, seed=i) for i, n in enumerate("qkv"))
    q, k = (b.op("Reshape", value, ints(0, 0, HEADS, SIZE)) for value in (q, k))
    v = b.op("Reshape", v, b.op("Shape", k), name="like keys")
    q, v = (b.op("Transpose", value, perm=[0, 2, 1, 3]) for value in (q, v))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 3, 1]))
    mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    made = b.made(b.linear(b.op("Reshape", mixed, ints(0, 0, WIDTH)), "wo", WIDTH, WIDTH, seed=3))
    assert "Reshape 'like keys' reshapes something else by the size" in refusal(made, "query_key")
    assert shapes(width(made, "value_output")) == [SPLIT, MERGE]


def test_heads_that_are_interleaved() -> None:
    """(.., size, heads): a head's numbers do not lie together in the weight."""
    b = Block()
    q, k, v = (b.linear("x", f"w{n}", WIDTH, WIDTH, seed=i) for i, n in enumerate("qkv"))
    q, k, v = (b.op("Reshape", value, ints(0, 0, SIZE, HEADS)) for value in (q, k, v))
    q, v = (b.op("Transpose", value, perm=[0, 3, 1, 2]) for value in (q, v))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 3, 2, 1]))
    mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 3, 1])
    made = b.made(b.linear(b.op("Reshape", mixed, ints(0, 0, WIDTH)), "wo", WIDTH, WIDTH, seed=3))
    assert "does not mix positions alone" in refusal(made, "value_output")
    assert "does not contract whole heads" in refusal(made, "query_key")


def test_copies_that_go_round() -> None:
    """The key heads as a whole repeated, 0 1 0 1: query heads of a group do not lie together."""
    b = Block()
    q = b.op("Reshape", b.linear("x", "wq", WIDTH, WIDTH), ints(0, 0, HEADS, SIZE))
    k = b.op("Reshape", b.linear("x", "wk", WIDTH, WIDTH // 2, seed=1), ints(0, 0, 1, HEADS // 2, SIZE))
    k = b.op("Expand", k, ints(1, 1, 2, HEADS // 2, SIZE))
    k = b.op("Reshape", k, ints(0, 0, HEADS, SIZE))
    scores = b.op("MatMul", b.op("Transpose", q, perm=[0, 2, 1, 3]), b.op("Transpose", k, perm=[0, 2, 3, 1]))
    made = b.made(b.op("Softmax", scores, axis=-1))
    assert "does not pair each query head with the key head of its group" in refusal(made, "query_key")


def test_attention_in_one_operator() -> None:
    b = Block()
    q, k, v = (
        b.op("Transpose", b.op("Reshape", b.linear("x", f"w{n}", WIDTH, WIDTH, seed=i), ints(0, 0, HEADS, SIZE)), perm=[0, 2, 1, 3])
        for i, n in enumerate("qkv")
    )  # fmt: skip
    mixed = b.op("Transpose", b.op("Attention", q, k, v, name="fused"), perm=[0, 2, 1, 3])
    y = b.linear(b.op("Reshape", mixed, ints(0, 0, WIDTH)), "wo", WIDTH, WIDTH, seed=3)
    made = b.made(y, opset=23)
    for kind in ("value_output", "query_key"):
        assert "Attention 'fused' is attention in one operator" in refusal(made, kind)


# --- sites that cannot be cut ---------------------------------------------------------------------------------------


def test_a_weight_that_somebody_else_reads() -> None:
    b = Block()
    up = b.linear("x", "up", WIDTH, HIDDEN)
    b.outputs.append(b.op("ReduceSum", "up", name="norm"))
    made = b.made(b.linear(b.op("Relu", up), "down", HIDDEN, WIDTH))
    assert refusal(made, "up_down") == "'norm' reads the weight of up too, and needs it whole"


def test_one_weight_for_up_and_down() -> None:
    b = Block()
    up = b.linear("x", "up", WIDTH, HIDDEN)
    made = b.made(b.op("MatMul", b.op("Relu", up), b.op("Transpose", "up", perm=[1, 0]), name="down"))
    assert refusal(made, "up_down") == "'down' reads the weight of up too, and needs it whole"


@pytest.mark.parametrize(
    ("node", "weight", "why"),
    [
        ({"kind": "Einsum", "equation": "bsk,kn->bsn"}, (WIDTH, HIDDEN), "is an Einsum: only MatMul and Gemm are cut"),
        ({"kind": "MatMul"}, (1, WIDTH, HIDDEN), "reads its weight through a Reshape"),
    ],
)  # fmt: skip
def test_sites_that_are_no_plain_product(node: dict[str, str], weight: tuple[int, ...], why: str) -> None:
    b = Block()
    up = b.op(node["kind"], "x", normal(*weight), name="up", **{k: v for k, v in node.items() if k != "kind"})
    assert why in refusal(b.made(b.linear(b.op("Relu", up), "down", HIDDEN, WIDTH)), "up_down")


def test_a_product_of_transposed_data() -> None:
    b = Block()
    b.inputs["x"] = (WIDTH, "b")
    up = b.op("Gemm", "x", normal(WIDTH, HIDDEN), transA=1, name="up")
    made = b.made(b.op("Gemm", b.op("Relu", up), normal(HIDDEN, WIDTH), name="down"))
    assert "up multiplies from the left or transposes its input" in refusal(made, "up_down")


def test_a_gemm_that_adds_a_matrix() -> None:
    b = Block()
    b.inputs["x"] = (BATCH, WIDTH)
    up = b.op("Gemm", "x", normal(WIDTH, HIDDEN), normal(BATCH, HIDDEN), name="up")
    made = b.made(b.op("Gemm", b.op("Relu", up), normal(HIDDEN, WIDTH), name="down"))
    assert refusal(made, "up_down") == "up adds a C that is no vector of constants"


def test_read_inside_a_body() -> None:
    b = Block()
    b.inputs["flag"] = ((), np.bool_)
    v = b.linear("x", "wv", WIDTH, WIDTH)
    b.inputs["p"] = ("b", "s", "s")
    mixed = b.op("MatMul", "p", v, name="mix")
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", [v], ["inner"], name="inside")], "body", [],
        [onnx.helper.make_tensor_value_info("inner", 1, None)],
    )  # fmt: skip
    b.outputs.append(b.op("If", "flag", then_branch=body, else_branch=body))
    made = b.made(b.linear(mixed, "wo", WIDTH, WIDTH, seed=3))
    assert "is read inside a body by Neg 'inside'" in refusal(made, "value_output")


def test_one_head_without_a_split() -> None:
    b = Block()
    q, k, v = (b.linear("x", f"w{n}", WIDTH, WIDTH, seed=i) for i, n in enumerate("qkv"))
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    made = b.made(b.linear(mixed, "wo", WIDTH, WIDTH, seed=3))
    for kind in ("value_output", "query_key"):
        found = width(made, kind)
        assert (found.size, found.heads, found.repeat, found.followers) == (WIDTH, 1, 1, ())
