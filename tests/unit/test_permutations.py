"""Permutations fold into their neighbours, or stay: by graphs around one or two pivoted layers, run before and after in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.graph import tensor_of
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.permutations import absorbed, fold
from lrcompile.records import Decision, Finding, Plan, Site
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal, weights

K, N, M = 6, 8, 5
# float32 sums of a dozen products of size one, a few layers deep
ROUNDING = 5e-5


def sets_of(finding: Finding, methods: Mapping[str, str], rank: int = 3) -> tuple[FactorSet, ...]:
    """Factors of the groups named, by the methods named, without data."""
    groups = {g.name: g for g in finding.groups}
    decisions = tuple(
        Decision(g, tuple(s.name for s in groups[g].sites), m, rank, None, None, False, 0, 0, 0, 0, 0, 0, "")
        for g, m in methods.items()
    )
    made = {m: factorization(m) for m in methods.values()}
    return factorize(Plan("reference", decisions), groups, weights(), None, made, 0)


def gathers(made: ir.Model) -> list[ir.Node]:
    """The Gathers of ours that put columns back."""
    ours = [n for n in made.graph.all_nodes() if n.metadata_props.get("lrcompile.method") == "pivoted"]
    return [n for n in ours if n.op_type == "Gather" and n.attributes["axis"].as_int() == -1]


def outputs(made: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    results: list[Array] = session.run(None, dict(feeds))
    return results


def feeds_of(made: ir.Model) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for i, value in enumerate(v for v in made.graph.inputs if tensor_of(v) is None):
        assert value.shape is not None
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        array = normal(*shape, seed=9 + i)
        if value.dtype == ir.DataType.INT64:
            array = np.random.default_rng(i).integers(0, K, shape)
        feeds[value.name or ""] = np.asarray(array > 0) if value.dtype == ir.DataType.BOOL else array
    return feeds


def compiled(made: ir.Model, methods: Mapping[str, str], rank: int = 3) -> ir.Model:
    """The lowered model, checked: it is legal, and computes what the reconstructed original does."""
    sets = sets_of(find(made), methods, rank)
    lowered = lower(rewrite(made, sets), ())
    onnx.checker.check_model(
        onnx.shape_inference.infer_shapes(ir.to_proto(lowered), check_type=True, strict_mode=True)
    )
    feeds = feeds_of(made)
    for ours, oracle in zip(outputs(lowered, feeds), outputs(reconstructed(made, sets), feeds), strict=True):
        np.testing.assert_allclose(
            ours, oracle, atol=ROUNDING * max(1.0, float(np.abs(oracle).max())), rtol=0
        )
    return lowered


def size(made: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in made.graph.initializers.values() if v.const_value is not None)


@dataclass(frozen=True)
class Case:
    """Nodes between ``h`` (3, 4, N), what the layer "up" gives, and ``y``. folds: whether its permutation does."""

    nodes: Sequence[onnx.NodeProto]
    folds: bool
    constants: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[str] = ("y",)
    up: Sequence[onnx.NodeProto] = (node("MatMul", ["x", "wu"], ["h"], name="up"),)
    flat: bool = False
    opset: int = 18

    def model(self, **options: Any) -> ir.Model:
        constants = {
            "wu": normal(K, N),
            "wd": normal(N, M, seed=1),
            "b": normal(N, seed=2),
            "c": normal(N, seed=3),
        }
        constants.update(
            half=np.float32(0.5),
            two=np.float32(2),
            three=np.float32(3),
            eps=np.float32(1e-3),
            last=np.array([-1]),
        )
        constants.update(self.constants)
        nodes = [*self.up, *self.nodes]
        read = {i for n in nodes for i in n.input} | {
            i for n in nodes for a in n.attribute for m in a.g.node for i in m.input
        }
        shape = ("n", K) if self.flat else ("n", 4, K)
        used = {n: v for n, v in constants.items() if n in read}
        return model(nodes, {"x": shape, **self.inputs}, self.outputs, used, opset=self.opset, **options)


def down(value: str, name: str = "down") -> onnx.NodeProto:
    return node("MatMul", [value, "wd"], ["y"], name=name)


def constant(name: str, array: Array) -> onnx.NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(array))


def gelu(x: str, y: str) -> list[onnx.NodeProto]:
    return [
        node("Div", [x, "two"], ["g1"]), node("Erf", ["g1"], ["g2"]), node("Add", ["g2", "half"], ["g3"]),
        node("Mul", [x, "g3"], ["g4"]), node("Mul", ["g4", "half"], [y]),
    ]  # fmt: skip


RMS = [
    node("Pow", ["h", "two"], ["sq"]), node("ReduceMean", ["sq", "last"], ["ms"]), node("Add", ["ms", "eps"], ["me"]),
    node("Sqrt", ["me"], ["r"]), node("Reciprocal", ["r"], ["rr"]), node("Mul", ["h", "rr"], ["n1"]),
    node("Mul", ["b", "n1"], ["n2"]),
]  # fmt: skip
STANDARDISED = [
    node("ReduceMean", ["h", "last"], ["m"]), node("Sub", ["h", "m"], ["d"]), node("Mul", ["d", "d"], ["dd"]),
    node("ReduceMean", ["dd", "last"], ["v"]), node("Add", ["v", "eps"], ["ve"]), node("Sqrt", ["ve"], ["s"]),
    node("Div", ["d", "s"], ["n1"]), node("Mul", ["n1", "b"], ["n2"]), node("Add", ["n2", "c"], ["n3"]),
]  # fmt: skip
GEMM = node("Gemm", ["x", "wu", "b"], ["h"], name="up", alpha=0.5, beta=2.0)
BRANCHES = {
    f"{name}_branch": helper.make_graph(
        [node(op, ["h"], [f"in_{name}"])] , name, [], [helper.make_tensor_value_info(f"in_{name}", 1, None)]
    )
    for name, op in (("then", "Relu"), ("else", "Neg"))
}  # fmt: skip
INSIDE = {
    f"{name}_branch": helper.make_graph(
        [node("MatMul", ["h", "wd"], [f"in_{name}"])], name, [], [helper.make_tensor_value_info(f"in_{name}", 1, None)]
    )
    for name in ("then", "else")
}  # fmt: skip

CASES = {
    # what absorbs
    "at once": Case([down("h")], True),
    "bias, activation": Case([node("Add", ["b", "h"], ["a"]), node("Relu", ["a"], ["r"]), down("r")], True),
    "gelu spelled out": Case([node("Add", ["h", "b"], ["a"]), *gelu("a", "g"), down("g")], True),
    "gelu fused": Case([node("Gelu", ["h"], ["g"]), down("g")], True, opset=20),
    "casts": Case(
        [node("Cast", ["h"], ["d"], to=11), node("Abs", ["d"], ["e"]), node("Cast", ["e"], ["f"], to=1), down("f")], True
    ),
    "scalars and broadcast constants": Case(
        [node("Clip", ["h", "half", "three"], ["a"]), node("Mul", ["a", "t"], ["m"]), node("Add", ["m", "u"], ["v"]), down("v")],
        True, {"t": normal(4, 1, seed=5), "u": normal(4, N, seed=6)},
    ),
    "per-channel slopes": Case([node("PRelu", ["h", "b"], ["a"]), node("Dropout", ["a"], ["d"]), down("d")], True),
    "a choice": Case(
        [node("Greater", ["h", "b"], ["g"]), node("Where", ["g", "h", "c"], ["w"]), down("w")], True
    ),
    "layer norm": Case([node("LayerNormalization", ["h", "b", "c"], ["n"]), down("n")], True),
    "layer norm without bias": Case([node("LayerNormalization", ["h", "b"], ["n"], axis=2), down("n")], True),
    "rms norm spelled out": Case([*RMS, down("n2")], True),
    "layer norm spelled out": Case([*STANDARDISED, down("n3")], True),
    "a mean over all axes": Case([node("ReduceMean", ["h"], ["m"]), node("Sub", ["h", "m"], ["s"]), down("s")], True),
    "rows regrouped": Case(
        [node("Relu", ["h"], ["r"]), node("Reshape", ["r", "s"], ["f"]), node("Gemm", ["f", "wd"], ["y"], name="down")],
        True, {"s": np.array([-1, N])},
    ),
    "gemm to gemm": Case(
        [node("Relu", ["h"], ["r"]), node("Gemm", ["r", "wt", "z"], ["y"], name="down", transB=1, beta=0.5)],
        True, {"wt": normal(M, N), "z": normal(M)}, up=[GEMM], flat=True,
    ),
    "gemm as an addend": Case(
        [node("Gemm", ["x2", "w2", "h"], ["g"], name="second"), node("MatMul", ["g", "wd"], ["y"], name="down")],
        True, {"w2": normal(K, N, seed=4)}, {"x2": ("n", K)}, flat=True,
    ),
    "a vector": Case([node("MatMul", ["h", "v"], ["y"])], True, {"v": normal(N)}),
    "weight behind Transpose": Case(
        [node("Transpose", ["wt"], ["w"], perm=[1, 0]), node("MatMul", ["h", "w"], ["y"], name="down")], True, {"wt": normal(M, N)}
    ),
    "weight behind Cast": Case(
        [node("Cast", ["wh"], ["w"], to=1), node("MatMul", ["h", "w"], ["y"], name="down")], True,
        {"wh": normal(N, M, dtype=np.float16)},
    ),
    "stacked weight": Case([node("MatMul", ["h", "w"], ["y"])], True, {"w": normal(3, N, M)}),
    "Constant nodes": Case(
        [constant("k", normal(N, seed=8)), constant("w", normal(N, M)), node("Add", ["h", "k"], ["a"]),
         node("Constant", [], ["kf"], value_floats=[float(i) for i in range(N)]), node("Mul", ["a", "kf"], ["m"]),
         node("MatMul", ["m", "w"], ["y"])], True,
    ),
    "two readers": Case(
        [node("MatMul", ["h", "wd"], ["p"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "w2"], ["q"]),
         node("Add", ["p", "q"], ["y"])], True, {"w2": normal(N, M, seed=4)},
    ),
    "one weight, two readers of this": Case(
        [node("MatMul", ["h", "wd"], ["p"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "wd"], ["q"]), node("Add", ["p", "q"], ["y"])], True
    ),
    "gated": Case(
        [node("MatMul", ["x", "wg"], ["g0"], name="gate"), node("Add", ["g0", "b"], ["g"]), node("Sigmoid", ["g"], ["s"]),
         node("Mul", ["g", "s"], ["a"]), node("Mul", ["a", "h"], ["m"]), down("m")], True, {"wg": normal(K, N, seed=4)},
    ),
    "gated by a gemm": Case(
        [node("Gemm", ["x", "wg", "b"], ["g"], name="gate", transB=1), node("Tanh", ["g"], ["a"]), node("Mul", ["h", "a"], ["m"]), down("m")],
        True, {"wg": normal(N, K, seed=4)}, flat=True,
    ),
    "gated by one number a row": Case(
        [node("MatMul", ["x", "w1"], ["g"], name="gate"), node("Sigmoid", ["g"], ["s"]), node("Mul", ["h", "s"], ["m"]), down("m")],
        True, {"w1": normal(K, 1, seed=4)},
    ),
    "inside both branches": Case([node("If", ["flag"], ["y"], **INSIDE)], True, inputs={"flag": ((), np.bool_)}),
    "a small constant that others read too": Case(
        [node("Add", ["h", "b"], ["a"]), node("Identity", ["b"], ["z"]), node("Add", ["z", "z"], ["zz"]), down("a")], True,
        outputs=("y", "zz"),
    ),
    "stored in half precision": Case(
        [node("Mul", ["h", "b"], ["m"]), down("m")], True, {"wh": normal(K, N, dtype=np.float16)},
        up=[node("Cast", ["wh"], ["wf"], to=1), node("MatMul", ["x", "wf"], ["h"], name="up")],
    ),
    "many squares of one number a row": Case(
        [node("ReduceSum", ["x", "last"], ["s0"]), *(node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(60)),
         node("Sign", ["s60"], ["sign"]), node("Mul", ["sign", "h"], ["m"]), down("m")], True,
    ),
    # what does not
    "at opset 7": Case([node("Reshape", ["h", "s"], ["y"])], False, {"s": np.array([0, 0, 2, N // 2])}, opset=7),
    "residual": Case([down("h"), node("Add", ["y", "x"], ["z"])], False, {"wd": normal(N, K), "wu": normal(K, N)}, outputs=("z", "h")),
    "residual around the layer": Case(
        [node("Relu", ["h"], ["r"]), node("Add", ["r", "x"], ["s"]), node("MatMul", ["s", "w"], ["y"])], False,
        {"wu": normal(K, K), "w": normal(K, M)},
    ),
    "residual from a product": Case(
        [node("Add", ["x0", "h"], ["s"]), node("MatMul", ["s", "w"], ["y"])], False,
        {"w0": normal(K, K, seed=4), "wu": normal(K, K), "w": normal(K, M)},
        up=[node("MatMul", ["x", "w0"], ["x0"], name="zero"), node("MatMul", ["x0", "wu"], ["h"], name="up")],
    ),
    "residual from this": Case(
        [node("MatMul", ["h", "w"], ["f"], name="f"), node("Add", ["h", "f"], ["s"]), node("MatMul", ["s", "wd"], ["y"])], False,
        {"w": normal(N, N, seed=4)},
    ),
    "a graph output on the way": Case([node("Relu", ["h"], ["r"]), down("r")], False, outputs=("y", "r")),
    "the output itself": Case([down("h")], False, outputs=("y", "h")),
    "heads": Case([node("Reshape", ["h", "s"], ["y"])], False, {"s": np.array([0, 0, 2, N // 2])}),
    "softmax": Case([node("Softmax", ["h"], ["s"]), down("s")], False),
    "another reader that cannot": Case([down("h"), node("Transpose", ["h"], ["z"])], False, outputs=("y", "z")),
    "a weight that others read too": Case(
        [node("Relu", ["h"], ["r"]), down("r"), node("MatMul", ["e", "wd"], ["z"], name="other")], False,
        inputs={"e": ("n", N)}, outputs=("y", "z"),
    ),
    "a weight that the caller may give": Case([down("h")], False),
    "a product of two values": Case([node("MatMul", ["h", "e"], ["y"])], False, inputs={"e": (N, 2)}),
    "added to an input": Case([node("Add", ["h", "e"], ["s"]), down("s")], False, inputs={"e": ("n", 4, N)}),
    "a mean over rows": Case([node("ReduceMean", ["h", "ax"], ["y"])], False, {"ax": np.array([1])}),
    "into branches": Case([node("If", ["flag"], ["r"], **BRANCHES), down("r")], False, inputs={"flag": ((), np.bool_)}),
    "beside another": Case([node("Concat", ["h", "h"], ["y"], axis=-1)], False),
}  # fmt: skip


def made_of(name: str) -> ir.Model:
    options: dict[str, Any] = {"defaults": ["wd"]} if "caller" in name else {}
    return CASES[name].model(**options)


def site_of(finding: Finding, name: str) -> Site:
    return next(s for s in finding.sites if s.name == name)


@pytest.mark.parametrize("name", CASES)
def test_it_folds_where_it_can(name: str) -> None:
    made = made_of(name)
    lowered = compiled(made, {"up": "pivoted"})
    left = gathers(lowered)
    assert (len(left) == 0) == CASES[name].folds
    assert absorbed(site_of(find(made), "up")) == CASES[name].folds
    assert any(n.op_type == "Concat" and "lrcompile.method" in n.metadata_props for n in lowered.graph)
    assert any(v.endswith("order") for v in lowered.graph.initializers) == (not CASES[name].folds)


@pytest.mark.parametrize("name", CASES)
def test_the_given_model_is_not_changed(name: str) -> None:
    made = made_of(name)
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    compiled(made, {"up": "pivoted"})
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.folds])
def test_nothing_grows(name: str) -> None:
    made = made_of(name)
    neutral = rewrite(made, sets_of(find(made), {"up": "pivoted"}))
    before = size(neutral)
    assert size(lower(neutral, ())) <= before


GATED = CASES["gated"]
BOTH = [
    ({"up": "pivoted"}, 0),
    ({"gate": "pivoted"}, 0),
    ({"up": "pivoted", "gate": "svd-plain"}, 0),
    ({"gate": "pivoted", "up": "svd-plain", "down": "svd-plain"}, 0),
    ({"gate": "pivoted", "down": "pivoted"}, 1),  # the one of down: what it gives is the output
    ({"gate": "pivoted", "up": "pivoted"}, 1),  # one of two orders can be the other's
    ({"gate": "pivoted", "up": "pivoted", "down": "svd-plain"}, 1),
    ({"gate_up:up": "pivoted"}, 2),  # each takes its columns from one product: these are no permutations
]


@pytest.mark.parametrize(("methods", "left"), BOTH)
def test_gated(methods: Mapping[str, str], left: int) -> None:
    lowered = compiled(GATED.model(), methods)
    assert len(gathers(lowered)) == left
    assert sum(n.op_type == "Concat" for n in lowered.graph) == sum(m == "pivoted" for m in methods.values())


def test_of_two_pivoted_ones_one_is_said_to_keep_its_gather() -> None:
    finding = find(GATED.model())
    up, gate = (site_of(finding, n) for n in ("up", "gate"))
    assert absorbed(up) and absorbed(gate)
    assert not absorbed(gate, {up.node}) and not absorbed(up, {gate.node})
    assert not absorbed(site_of(finding, "down"))


def test_the_remaining_order_is_composed() -> None:
    """The second Gather is left with q after p: what it had, permuted as the first one's neighbours were."""
    made = GATED.model()
    neutral = rewrite(made, sets_of(find(made), {"gate": "pivoted", "up": "pivoted"}))
    first, second = (neutral.graph.initializers[f"{n}/pivoted/order"].const_value for n in ("up", "gate"))
    assert first is not None and second is not None
    p, q = first.numpy(), second.numpy()
    (left,) = gathers(lower(neutral, ()))
    tensor = tensor_of(left.inputs[1])
    assert tensor is not None and tensor.dtype == ir.DataType.INT32
    np.testing.assert_array_equal(tensor.numpy(), q[np.argsort(p)])


def test_layers_that_share_their_weights() -> None:
    """One up and one down for three layers: the index is one, so is the change, and nothing is copied."""
    nodes = []
    for i in range(3):
        nodes += [
            node("MatMul", [f"x{i}", "wu"], [f"h{i}"], name=f"up{i}"),
            node("Add", [f"h{i}", "b"], [f"a{i}"]),
            node("Relu", [f"a{i}"], [f"r{i}"]),
            node("MatMul", [f"r{i}", "wd"], [f"d{i}"], name=f"down{i}"),
            node("Add", [f"x{i}", f"d{i}"], [f"x{i + 1}"]),
        ]
    made = model(nodes, {"x0": ("n", K)}, ["x3"], {"wu": normal(K, N), "wd": normal(N, K), "b": normal(N)})
    finding = find(made)
    assert all(absorbed(s) == s.name.startswith("up") for s in finding.sites)
    lowered = compiled(made, {"up0": "pivoted", "down0": "svd-plain"})
    assert not gathers(lowered) and sum(n.op_type == "Concat" for n in lowered.graph) == 3
    assert len(lowered.graph.initializers) == 5  # p, c, a, b of the weights, and the bias
    assert len(gathers(compiled(made, {"down0": "pivoted"}))) == 3  # a residual stream


def test_a_table_and_its_norm() -> None:
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="table"),
        node("LayerNormalization", ["e", "s", "b"], ["n"]),
        node("MatMul", ["n", "w"], ["y"], name="head"),
    ]
    constants = {"table": normal(K, N), "s": normal(N), "b": normal(N, seed=1), "w": normal(N, M)}
    made = model(nodes, {"ids": (("n", 4), np.int64)}, ["y"], constants)
    assert absorbed(site_of(find(made), "table"))
    assert not gathers(compiled(made, {"table": "pivoted"}))


def test_before_ir_4() -> None:
    """There every constant is listed as an input too: the index goes from there as well, a copied one comes."""
    made = CASES["a small constant that others read too"].model(ir_version=3)
    lowered = compiled(made, {"up": "pivoted"})
    assert not gathers(lowered) and "b/permuted" in lowered.graph.initializers
    names = {v.name for v in lowered.graph.inputs}
    assert names == {"x", *lowered.graph.initializers}


def test_a_small_constant_is_copied_for_us_alone() -> None:
    lowered = compiled(CASES["a small constant that others read too"].model(), {"up": "pivoted"})
    before, after = (lowered.graph.initializers[n].const_value for n in ("b", "b/permuted"))
    assert before is not None and after is not None
    np.testing.assert_array_equal(before.numpy(), normal(N, seed=2))
    assert not np.array_equal(after.numpy(), before.numpy())
    np.testing.assert_array_equal(np.sort(after.numpy()), np.sort(before.numpy()))


def test_copies_are_not_larger_than_the_index() -> None:
    """Two constants that others read too: their copies would take more than the index gives back."""
    nodes = [
        node("LayerNormalization", ["h", "b", "c"], ["n"]),
        node("Add", ["b", "c"], ["z"]),
        down("n"),
    ]
    case = Case(nodes, False, outputs=("y", "z"))
    assert len(gathers(compiled(case.model(), {"up": "pivoted"}))) == 1
    assert not absorbed(site_of(find(case.model()), "up"))


def test_weights_are_read_when_the_file_is_written() -> None:
    made = CASES["bias, activation"].model()
    neutral = rewrite(made, sets_of(find(made), {"up": "pivoted"}))
    read = []

    def load() -> ir.Tensor:
        read.append("wd")
        return ir.Tensor(normal(N, M, seed=1), name="wd")

    neutral.graph.initializers["wd"].const_value = ir.LazyTensor(
        load, dtype=ir.DataType.FLOAT, shape=ir.Shape((N, M)), name="wd"
    )
    lowered = lower(neutral, ())
    assert not gathers(lowered) and not read
    found = lowered.graph.initializers["wd"].const_value
    assert (
        found is not None
        and sorted(found.numpy()[:, 0]) == sorted(normal(N, M, seed=1)[:, 0])
        and read == ["wd"]
    )


def test_an_order_that_is_none_needs_no_neighbour() -> None:
    """At full rank a site of several keeps its columns in place; alone it has no index at all."""
    made = model([node("MatMul", ["x", "w"], ["y"], name="up")], {"x": ("n", N)}, ["y"], {"w": normal(N, K)})
    lowered = compiled(made, {"up": "pivoted"}, rank=K)
    assert [n.op_type for n in lowered.graph] == ["MatMul"]
    graph = CASES["heads"].model()
    compiled_ = rewrite(graph, sets_of(find(graph), {"up": "pivoted"}))
    order = compiled_.graph.initializers["up/pivoted/order"]
    order.const_value = ir.Tensor(np.arange(N, dtype=np.int32), name=order.name)
    assert not gathers(lower(compiled_, ()))


def test_only_our_gathers_are_folded() -> None:
    """The user's own permutation is the user's, and so is one that repeats or leaves out columns."""
    p = np.random.default_rng(0).permutation(N).astype(np.int32)
    for index, ours in ((p, False), (np.maximum(p, 1), True), (p[:4] % 4, True)):
        nodes = [node("MatMul", ["x", "wu"], ["h"]), node("Gather", ["h", "i"], ["g"], axis=-1)]
        nodes.append(node("MatMul", ["g", "wd"], ["y"]))
        made = model(
            nodes, {"x": ("n", K)}, ["y"], {"wu": normal(K, N), "i": index, "wd": normal(len(index), M)}
        )
        if ours:
            made.graph[1].metadata_props["lrcompile.method"] = "pivoted"
        assert fold(made) == 0 and [n.op_type for n in made.graph] == ["MatMul", "Gather", "MatMul"]


def test_a_fold_that_is_wrong_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of these tests is itself tested: permuted the wrong way round, the outputs differ."""
    monkeypatch.setattr("lrcompile.permutations._inverse", lambda order: order)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compiled(CASES["bias, activation"].model(), {"up": "pivoted"})


UNARY = ("Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Softplus", "Identity", "Erf")
STEP = st.one_of(
    st.tuples(st.just("unary"), st.sampled_from(UNARY)),
    st.tuples(st.just("constant"), st.sampled_from(("Add", "Mul", "Sub", "Max"))),
    st.tuples(st.just("self"), st.sampled_from(("Add", "Mul", "Min"))),
    st.tuples(st.just("gate"), st.sampled_from(("Add", "Mul"))),
    st.tuples(st.just("norm"), st.sampled_from(("LayerNormalization", "rms"))),
    st.tuples(st.just("input"), st.just("Add")),
)


@given(
    steps=st.lists(STEP, max_size=6),
    seed=st.integers(0, 99),
    methods=st.sampled_from(("dense", "pair", "pivoted")),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_chain(steps: Sequence[tuple[str, str]], seed: int, methods: str) -> None:
    """Random chains between two products: right whatever happens, folded unless an input is added."""
    nodes, constants = (
        [node("MatMul", ["x", "wu"], ["v0"], name="up")],
        {"wu": normal(K, N, seed=seed), "wd": normal(N, M)},
    )
    inputs: dict[str, Any] = {"x": ("n", K)}
    chosen = {"up": "pivoted"}
    partners = {"dense": None, "pair": "svd-plain", "pivoted": "pivoted"}[methods]
    for i, (kind, op) in enumerate(steps):
        old, new = f"v{i}", f"v{i + 1}"
        other = {"constant": f"c{i}", "self": f"v{max(i - 2, 0)}", "gate": f"g{i}", "input": f"e{i}"}.get(
            kind, ""
        )
        if kind == "unary":
            nodes.append(node(op, [old], [new]))
        elif op == "LayerNormalization":
            constants[f"c{i}"] = normal(N, seed=i)
            nodes.append(node(op, [old, f"c{i}"], [new]))
        elif op == "rms":
            constants["last"] = np.array([-1])  # type: ignore[assignment]
            nodes += [node("ReduceL2", [old, "last"], [f"n{i}"]), node("Div", [old, f"n{i}"], [new])]
        else:
            nodes.append(node(op, [old, other][:: 1 - 2 * (seed % 2)], [new]))
        if kind == "constant":
            constants[other] = normal(*[(N,), (1,), (), (1, N)][(seed + i) % 4], seed=i)
        elif kind == "gate":
            constants[f"w{i}"] = normal(K, N, seed=1000 + i)  # equal weights would have equal orders
            nodes.insert(0, node("MatMul", ["x", f"w{i}"], [other], name=f"gate{i}"))
            if partners is not None:
                chosen[f"gate{i}"] = partners
        elif kind == "input":
            inputs[other] = ("n", N)
    nodes.append(node("MatMul", [f"v{len(steps)}", "wd"], ["y"], name="down"))
    made = model(nodes, inputs, ["y"], constants)
    orders = [s.load()["order"] for s in sets_of(find(made), chosen, 3) if "order" in s.shapes]
    assume(
        not any(np.array_equal(o, np.arange(N)) for o in orders)
    )  # one in 56 puts its columns where they were
    lowered = compiled(made, chosen)
    open_ended = any(kind == "input" for kind, _ in steps)
    pivoted = list(chosen.values()).count("pivoted")
    assert len(gathers(lowered)) == (pivoted if open_ended else pivoted - 1)
    assert absorbed(site_of(find(made), "up")) == (not open_ended)
