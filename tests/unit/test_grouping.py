"""Groups on hand-built blocks: shared, tied and separate weights; q/k/v, gate/up, up/down, value/output as exporters write them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile.graph import shapes_of
from lrcompile.grouping import groups_of
from lrcompile.records import Group
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal

H, D = 2, 4  # heads, numbers in each
WIDTH = H * D
X = {"x": ("b", "s", WIDTH)}


def groups(made: ir.Model, kind: str) -> list[tuple[str, ...]]:
    return [tuple(s.name for s in g.sites) for g in find(made).groups if g.kind == kind]


def only(made: ir.Model, kind: str) -> Group:
    (group,) = [g for g in find(made).groups if g.kind == kind]
    return group


def matmul(x: str, w: str, y: str) -> onnx.NodeProto:
    return node("MatMul", [x, w], [y], name=w)


# --- one weight, several readers ----------------------------------------------------------------------------------


def readers(*nodes: onnx.NodeProto, **constants: Array) -> ir.Model:
    inputs = {"x": ("b", 6), "z": ("b", 4), "ids": (("b",), np.int64)}
    used = {v for n in nodes for v in n.input}
    outputs = [o for n in nodes for o in n.output if o not in used]
    return model(nodes, {n: i for n, i in inputs.items() if n in used}, outputs, constants)


W = normal(6, 4)


def test_separate_weights_of_equal_numbers() -> None:
    made = readers(matmul("x", "w", "y"), matmul("x", "v", "u"), w=W, v=W)
    assert [g.kind for g in find(made).groups] == ["alone", "alone"]


def test_shared() -> None:
    group = only(readers(matmul("x", "w", "y"), node("Gemm", ["x", "w"], ["u"]), w=W), "shared")
    assert (group.transposed, group.elements, group.keeper) == ((False, False), 24, "")


def test_shared_and_transposed() -> None:
    nodes = [
        matmul("x", "w", "y"),
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["z", "t"], ["u"], name="back"),
    ]
    group = only(readers(*nodes, w=W), "shared")
    assert (group.transposed, group.elements, group.keeper) == ((False, True), 24, "")


@pytest.mark.parametrize(
    "head",
    [
        [node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["z", "t"], ["u"], name="head")],
        [node("Gemm", ["z", "w"], ["u"], transB=1, name="head")],
        [node("Einsum", ["z", "w"], ["u"], equation="bk,nk->bn", name="head")],
    ],
)
def test_tied(head: list[onnx.NodeProto]) -> None:
    group = only(readers(node("Gather", ["w", "ids"], ["y"], name="table"), *head, w=W), "tied")
    assert [s.name for s in group.sites] == ["table", "head"]
    assert (group.transposed, group.elements) == ((False, True), 24)


def test_tied_through_casts_of_their_own() -> None:
    """Each reader has its own Cast of the one constant: the same numbers for the same reason."""
    casts = [node("Cast", ["w"], [n], to=1) for n in ("c", "d")]
    made = readers(
        *casts,
        node("Gather", ["c", "ids"], ["y"]),
        node("Gemm", ["z", "d"], ["u"], transB=1),
        w=W.astype(np.float16),
    )
    assert only(made, "tied").elements == 24


def test_one_constant_read_as_two_matrices() -> None:
    """Reshaped for one reader: neither the same matrix nor a transpose. Each keeps the constant in the file for the other."""
    nodes = [
        matmul("x", "w", "y"),
        node("Reshape", ["w", "s"], ["r"]),
        node("MatMul", ["z", "r"], ["u"], name="reshaped"),
    ]
    found = find(readers(*nodes, w=W, s=np.array([4, 6])))
    assert [(g.kind, g.keeper) for g in found.units] == [("alone", "Reshape"), ("alone", "w")]


def test_who_keeps_a_weight() -> None:
    relu = node("Relu", ["w"], ["r"], name="other")
    assert only(readers(matmul("x", "w", "y"), relu, w=W), "alone").keeper == "other"
    through = [
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["z", "t"], ["y"]),
        node("Relu", ["t"], ["r"], name="other"),
    ]
    assert only(readers(*through, w=W), "alone").keeper == "other"
    # the same tensor once more as the data of its own reader's sibling: a weight times itself is nobody's activation
    assert only(readers(matmul("x", "w", "y"), w=W), "alone").keeper == ""


# --- attention ----------------------------------------------------------------------------------------------------


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def attention(
    *,
    bias: bool = True,
    mask: bool = False,
    cache: bool = False,
    repeat: int = 1,
    dynamic: bool = False,
    stray: bool = False,
) -> ir.Model:
    """x -> q, k, v -> heads -> probabilities @ values -> heads together -> Wo.

    mask: rows without any allowed key become zeros (Where), as torch's exporter writes it. cache: past values are joined on.
    repeat: queries that share a value head (Expand). dynamic: shapes are computed from x. stray: Wo reads something else too.
    """
    few = WIDTH // repeat
    constants: dict[str, Array] = {
        "wq": normal(WIDTH, WIDTH), "wk": normal(WIDTH, few, seed=1), "wv": normal(WIDTH, few, seed=2), "wo": normal(WIDTH, WIDTH, seed=3),
        "zero": np.float32(0), "axis": ints(2), "split": ints(0, 0, H, D), "few": ints(0, 0, H // repeat, D),
        "repeated": ints(1, H // repeat, repeat, 1, 1), "together": ints(0, 0, WIDTH), "eight": ints(WIDTH),
    }  # fmt: skip
    nodes, inputs = [], dict(X)
    for name, shape in (("q", "split"), ("k", "few"), ("v", "few")):
        nodes.append(matmul("x", f"w{name}", f"{name}0"))
        if bias:
            constants[f"b{name}"] = normal(constants[f"w{name}"].shape[1])
            nodes.append(node("Add", [f"{name}0", f"b{name}"], [f"{name}1"]))
        nodes.append(node("Reshape", [f"{name}{int(bias)}", shape], [f"{name}2"]))
        nodes.append(node("Transpose", [f"{name}2"], [f"{name}3"], perm=[0, 2, 1, 3]))
        current = f"{name}3"
        if cache and name != "q":
            inputs[f"past_{name}"] = ("b", H // repeat, "p", D)
            nodes.append(node("Concat", [f"past_{name}", current], [f"{name}4"], axis=2))
            current = f"{name}4"
        if repeat > 1 and name != "q":
            nodes += [
                node("Unsqueeze", [current, "axis"], [f"{name}5"]),
                node("Expand", [f"{name}5", "repeated"], [f"{name}6"]),
                node("Shape", ["q3"], [f"{name}_shape"]),
                node("Constant", [], [f"{name}_new"], value_ints=[0, H, -1, D]),
                node("Reshape", [f"{name}6", f"{name}_new"], [f"{name}7"]),
            ]
            current = f"{name}7"
        nodes.append(node("Identity", [current], [f"{name}_heads"]))
    nodes += [
        node("Transpose", ["k_heads"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q_heads", "kt"], ["scores"]),
        node("Softmax", ["scores"], ["probabilities"], axis=-1),
        node("MatMul", ["probabilities", "v_heads"], ["mixed"], name="mix"),
    ]
    current = "mixed"
    if mask:
        inputs["masked"] = (("b", 1, "s", 1), np.bool_)
        nodes.append(node("Where", ["masked", "zero", current], ["where"]))
        current = "where"
    nodes.append(node("Transpose", [current], ["back"], perm=[0, 2, 1, 3]))
    if dynamic:
        nodes += [
            node("Shape", ["x"], ["first"], start=0, end=2),
            node("Concat", ["first", "eight"], ["target"], axis=0),
            node("Reshape", ["back", "target"], ["all"]),
        ]
    else:
        nodes.append(node("Reshape", ["back", "together"], ["all"]))
    if stray:
        nodes.append(node("Add", ["all", "x"], ["sum"]))
    nodes.append(matmul("sum" if stray else "all", "wo", "y"))
    used = {v for n in nodes for v in n.input}
    return model(nodes, inputs, ["y"], {n: c for n, c in constants.items() if n in used}, opset=18)


VARIANTS = {
    "plain": {},
    "without biases": {"bias": False},
    "rows masked (torch)": {"mask": True, "dynamic": True},
    "cache": {"cache": True, "bias": False},
    "grouped queries": {"repeat": 2, "bias": False},
    "grouped queries, cache, mask": {
        "repeat": 2,
        "bias": False,
        "cache": True,
        "mask": True,
        "dynamic": True,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_attention(name: str) -> None:
    made = attention(**VARIANTS[name])
    assert groups(made, "qkv") == [("wq", "wk", "wv")]
    assert groups(made, "value_output") == [("wv", "wo")]
    assert groups(made, "query_key") == [("wq", "wk")]
    assert groups(made, "up_down") == [] and groups(made, "gate_up") == []
    group = only(made, "value_output")
    assert not group.shares_weight and group.transposed == (False, False)
    assert group.name == "value_output:wv"
    assert [len(g.sites) for g in find(made).units] == [
        1,
        1,
        1,
        1,
    ]  # overlapping groups do not take sites away


@pytest.mark.parametrize("name", VARIANTS)
def test_what_can_be_cut(name: str) -> None:
    """A cache is what the caller gives: its size stays. See test_widths for all that is passed and refused."""
    made = attention(**VARIANTS[name])
    found = {g.kind: g for g in groups_of(find(made).sites, shapes_of(made))}
    repeat = VARIANTS[name].get("repeat", 1)
    for kind in ("value_output", "query_key"):
        group = found[kind]
        if VARIANTS[name].get("cache"):
            assert group.width is None and "joins a cache of keys or values" in group.refusal
        else:
            assert group.width is not None and group.refusal == ""
            assert (group.width.size, group.width.heads, group.width.repeat) == (D, H // repeat, repeat)


def test_queries_and_keys_meet_in_scores() -> None:
    """One group for each product of two projections; which is the query is told by the softmax, or else by the order."""

    def scores(*nodes: onnx.NodeProto) -> ir.Model:
        constants = {"wq": normal(WIDTH, WIDTH), "wk": normal(WIDTH, WIDTH, seed=1)}
        return model([matmul("x", "wq", "q"), matmul("x", "wk", "k"), *nodes], X, ["p"], constants)

    turned = node("Transpose", ["k"], ["t"], perm=[0, 2, 1])
    product = node("MatMul", ["q", "t"], ["s"])
    assert groups(scores(turned, product, node("Softmax", ["s"], ["p"])), "query_key") == [("wq", "wk")]
    rows = [node("Transpose", ["q"], ["t"], perm=[0, 2, 1]), node("MatMul", ["k", "t"], ["s"])]
    assert groups(scores(*rows, node("Softmax", ["s"], ["p"], axis=-2)), "query_key") == [("wq", "wk")]
    # without a softmax over the keys a shift of all scores would be seen
    (bare,) = [
        g for g in find(scores(turned, product, node("Relu", ["s"], ["p"]))).groups if g.kind == "query_key"
    ]
    assert bare.width is None and bare.refusal.startswith("Relu 'p' reads the scores")
    (wrong,) = [
        g
        for g in find(scores(turned, product, node("Softmax", ["s"], ["p"], axis=0))).groups
        if g.kind == "query_key"
    ]
    assert "does not go over the keys" in wrong.refusal


def test_a_product_of_one_projection_with_itself() -> None:
    nodes = [
        matmul("x", "wq", "q"),
        node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["q", "t"], ["y"]),
    ]
    assert groups(model(nodes, X, ["y"], {"wq": normal(WIDTH, WIDTH)}), "query_key") == []


def test_attention_with_something_else_mixed_in() -> None:
    assert groups(attention(stray=True), "value_output") == []


def test_no_attention_without_two_projections() -> None:
    """probabilities @ x itself: there is no Wv."""
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["x", "t"], ["scores"]),
        node("MatMul", ["scores", "x"], ["mixed"]),
        matmul("mixed", "wo", "y"),
    ]
    assert groups(model(nodes, X, ["y"], {"wo": normal(WIDTH, 3)}), "value_output") == []


# --- feed-forward networks ----------------------------------------------------------------------------------------


def ffn(*between: onnx.NodeProto, gated: bool = False, outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    """u = x Wu (g = x Wg), h by the nodes between, y = h Wd."""
    constants = {
        "wu": normal(WIDTH, 12),
        "wg": normal(WIDTH, 12, seed=1),
        "wd": normal(12, WIDTH),
        "b": normal(12),
        "two": np.float32(2),
    }
    nodes = [
        matmul("x", "wu", "u"),
        *([matmul("x", "wg", "g")] if gated else []),
        *between,
        matmul("h", "wd", "y"),
    ]
    used = {v for n in nodes for v in n.input}
    return model(nodes, X, outputs, {n: c for n, c in constants.items() if n in used}, opset=20)


GELU = [
    node("Add", ["u", "b"], ["a"]), node("Div", ["a", "two"], ["d"]), node("Erf", ["d"], ["e"]), node("Add", ["e", "two"], ["f"]),
    node("Mul", ["a", "f"], ["h"]),
]  # fmt: skip
SWIGLU = [node("Sigmoid", ["g"], ["s"]), node("Mul", ["g", "s"], ["silu"]), node("Mul", ["silu", "u"], ["h"])]


@pytest.mark.parametrize("between", [[node("Relu", ["u"], ["h"])], GELU, [node("Gelu", ["u"], ["h"])]])
def test_up_and_down(between: list[onnx.NodeProto]) -> None:
    assert groups(ffn(*between), "up_down") == [("wu", "wd")]


def test_gate_and_up() -> None:
    made = ffn(*SWIGLU, gated=True)
    assert groups(made, "gate_up") == [("wu", "wg")]
    assert groups(made, "up_down") == [("wg", "wu", "wd")]
    assert groups(made, "qkv") == []


def test_two_readers_that_do_not_meet() -> None:
    made = ffn(node("Relu", ["u"], ["h"]), gated=True, outputs=("y", "g"))
    assert groups(made, "gate_up") == []
    assert groups(made, "up_down") == [("wu", "wd")]


def test_the_hidden_activation_goes_elsewhere() -> None:
    """Cutting the hidden width would change what somebody else sees."""
    assert groups(ffn(node("Relu", ["u"], ["h"]), outputs=("y", "h")), "up_down") == []
    assert (
        groups(
            ffn(node("Relu", ["u"], ["h"]), node("ReduceSum", ["u"], ["r"]), outputs=("y", "r")), "up_down"
        )
        == []
    )


def test_the_hidden_activation_is_no_longer_element_wise() -> None:
    assert groups(ffn(node("Softmax", ["u"], ["h"])), "up_down") == []


def test_something_else_is_mixed_into_the_hidden_activation() -> None:
    made = model(
        [matmul("x", "wu", "u"), node("Mul", ["u", "z"], ["h"]), matmul("h", "wd", "y")],
        {**X, "z": ("b", "s", 12)}, ["y"], {"wu": normal(WIDTH, 12), "wd": normal(12, WIDTH)},
    )  # fmt: skip
    assert groups(made, "up_down") == []


def test_one_weight_for_q_and_k_is_not_a_trio() -> None:
    nodes = [matmul("x", "w", "a"), node("MatMul", ["x", "w"], ["b"]), matmul("x", "v", "c")]
    made = model(nodes, X, ["a", "b", "c"], {"w": normal(WIDTH, 3), "v": normal(WIDTH, 5)})
    assert groups(made, "qkv") == [] and groups(made, "shared") == [("w", "b")]
