"""Find: every way to hide a weight, every operator, every refusal with its sentence; W is held against the graph run on unit vectors."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lrcompile.load import load
from lrcompile.records import Finding, Site
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal, proto, run
from tests.odd_graphs import OddGraph, corpus

K, N = 6, 4
W = normal(K, N)
Q = np.random.default_rng(1).integers(-127, 127, (K, N)).astype(np.int8)
BF16 = ml_dtypes.bfloat16


def the_site(finding: Finding) -> Site:
    assert len(finding.sites) == 1, [s.name for s in finding.sites]
    return finding.sites[0]


def constant(name: str, array: Array) -> onnx.NodeProto:
    return node("Constant", [], [name], value=onnx.numpy_helper.from_array(array))


def int4(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    values = np.random.default_rng(2).integers(-8, 8, shape)
    return helper.make_tensor(name, TensorProto.INT4, shape, values.flatten())


# --- how a weight may hide: nodes that make "v" (K, N) of the constant "w", and the constants ----------------------

axes0 = np.array([0], np.int64)
HIDINGS: dict[str, tuple[list[onnx.NodeProto], dict[str, Array | onnx.TensorProto]]] = {
    "initializer": ([node("Identity", ["w"], ["v"])], {"w": W}),
    "constant node": ([constant("w", W), node("Identity", ["w"], ["v"])], {}),
    "constant of floats": (
        [
            node("Constant", [], ["w"], value_floats=W.reshape(-1).tolist()),
            node("Constant", [], ["s"], value_ints=[K, N]),
            node("Reshape", ["w", "s"], ["v"]),
        ],
        {},
    ),
    "transpose": ([node("Transpose", ["w"], ["v"], perm=[1, 0])], {"w": W.T.copy()}),
    "transpose, default": ([node("Transpose", ["w"], ["v"])], {"w": W.T.copy()}),
    "transpose twice": (
        [node("Transpose", ["w"], ["t"]), node("Transpose", ["t"], ["v"])],
        {"w": W},
    ),
    "reshape -1": ([node("Reshape", ["w", "s"], ["v"])], {"w": W.reshape(-1), "s": np.array([-1, N], np.int64)}),
    "reshape 0": ([node("Reshape", ["w", "s"], ["v"])], {"w": W[:, :, None], "s": np.array([0, 0], np.int64)}),
    "transpose then reshape": (
        [node("Transpose", ["w"], ["t"], perm=[2, 0, 1]), node("Reshape", ["t", "s"], ["v"])],
        {"w": normal(2, 4, 3), "s": np.array([K, N], np.int64)},
    ),
    "squeeze": ([node("Squeeze", ["w", "a"], ["v"])], {"w": W[None], "a": axes0}),
    "squeeze, no axes": ([node("Squeeze", ["w"], ["v"])], {"w": W[None, :, None]}),
    "unsqueeze": (
        [node("Unsqueeze", ["w", "a"], ["u"]), node("Squeeze", ["u", "a"], ["v"])],
        {"w": W, "a": axes0},
    ),
    "cast from float16": ([node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], {"w": W.astype(np.float16)}),
    "cast from bfloat16": ([node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], {"w": W.astype(BF16)}),
    "cast from float64": ([node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], {"w": W.astype(np.float64)}),
    "cast from int8": ([node("Cast", ["w"], ["v"], to=TensorProto.FLOAT)], {"w": Q}),
    "cast, scale": (
        [node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), node("Mul", ["c", "s"], ["v"])],
        {"w": Q, "s": np.float32(0.01)},
    ),
    "scale, cast": (
        [node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), node("Mul", ["s", "c"], ["v"])],
        {"w": Q, "s": normal(K, 1)},
    ),
    "cast, a scale for each number": (
        [node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), node("Mul", ["s", "c"], ["v"])],
        {"w": Q, "s": normal(K, N)},
    ),
    "cast, scale of a Constant that holds a float": (
        [
            node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
            node("Constant", [], ["s"], value_float=0.25),
            node("Mul", ["c", "s"], ["v"]),
        ],
        {"w": Q},
    ),
    "cast, scale, transpose": (
        [
            node("Cast", ["w"], ["c"], to=TensorProto.FLOAT),
            node("Mul", ["c", "s"], ["m"]),
            node("Transpose", ["m"], ["v"]),
        ],
        {"w": Q.T.copy(), "s": normal(N, 1)},
    ),
    "dequantize": ([node("DequantizeLinear", ["w", "s"], ["v"])], {"w": Q, "s": np.float32(0.02)}),
    "dequantize by column": (
        [node("DequantizeLinear", ["w", "s", "z"], ["v"], axis=1)],
        {"w": Q, "s": np.abs(normal(N)) + 0.01, "z": np.arange(N, dtype=np.int8)},
    ),
    "dequantize blocks of int4": (
        [node("DequantizeLinear", ["w", "s"], ["v"], axis=0, block_size=3)],
        {"w": int4("w", (K, N)), "s": np.abs(normal(2, N)) + 0.01},
    ),
    "dequantize, transpose, reshape": (
        [
            node("DequantizeLinear", ["w", "s"], ["d"]),
            node("Transpose", ["d"], ["t"]),
            node("Reshape", ["t", "n"], ["v"]),
        ],
        {"w": Q.T.copy().reshape(N, K), "s": np.float32(0.02), "n": np.array([K, N], np.int64)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDINGS)
def test_hidden_weights(name: str, tmp_path: Path) -> None:
    nodes, constants = HIDINGS[name]
    made = model(
        [*nodes, node("MatMul", ["x", "v"], ["y"], name="layer")],
        {"x": ("n", K)},
        ["y"],
        constants,
        opset=21,
        ir_version=10,
    )
    site = the_site(find(made))
    held = made.graph.initializers.get("w")
    stored = held.const_value if held is not None else next(n for n in made.graph if n.outputs[0].name == "w")
    shape = tuple(stored.shape.numpy()) if held is not None else ((K * N,) if "floats" in name else (K, N))
    assert (site.name, site.op, site.kind, site.refusal) == ("layer", "MatMul", "linear", None)
    assert (site.weight, site.weight_shape) == ("w", shape)
    assert (site.dtype, site.K, site.N) == ("float", K, N)
    if held is not None:
        assert site.stored == held.const_value.dtype.name.lower()
    seen = run(made, {"x": np.eye(K, dtype=np.float32)})["y"]  # the graph itself says what W is
    # exact: unit vectors select, and the evaluator computes the very same constants
    np.testing.assert_array_equal(ModelWeights(Cache(tmp_path), 21).matrix(site), seen)
    # and back: what `reconstructed` will put in the operand's place
    np.testing.assert_array_equal(site.operand_layout.apply(site.layout.invert(seen)), seen)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(np.float16, "float16"), (np.float64, "double"), (BF16, "bfloat16"), (np.float32, "float")],
)
def test_float_types(dtype: type, kind: str) -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["y"])], {"x": (("n", K), dtype)}, {"y": dtype}, {"w": W.astype(dtype)}
    )
    site = the_site(find(made))
    assert (site.stored, site.dtype, site.refusal) == (kind, kind, None)


# --- which uses are taken, and what is said of the others ---------------------------------------------------------

X2, X3 = {"x": ("n", K)}, {"x": ("n", "m", K)}
IDS = {"ids": (("n", "m"), np.int64)}
F = TensorProto.FLOAT
# name -> (nodes, inputs, constants, kind, the sentence or None when it is taken)
USES = {
    "matmul": ([node("MatMul", ["x", "w"], ["y"])], X3, {"w": W}, "linear", None),
    "matmul left": ([node("MatMul", ["w", "x"], ["y"])], X2, {"w": normal(4, 3)}, "linear", None),
    "matmul left, rank unknown": ([node("MatMul", ["w", "x"], ["y"])], {"x": (None, np.float32)}, {"w": W}, "other",
                                  "the weight is the left operand and the data's rank is unknown"),
    "matmul of rank 3": ([node("MatMul", ["x", "w"], ["y"])], X3, {"w": W[None]}, "linear", None),
    "matmul left of rank 3": ([node("MatMul", ["w", "x"], ["y"])], {"x": ("n", K, 2)}, {"w": normal(1, 3, K)}, "linear", None),
    "matmul of rank 3 on rank 2": ([node("MatMul", ["x", "w"], ["y"])], X2, {"w": W[None]}, "other",
                                   "the weight has more axes than the data"),
    "matmul of a stack": ([node("MatMul", ["x", "w"], ["y"])], X3, {"w": normal(3, K, N)}, "other",
                          "the weight is a stack of 3 matrices"),
    "matmul of a vector": ([node("MatMul", ["x", "w"], ["y"])], X2, {"w": normal(K)}, "other", "the weight is a vector"),
    "matmul of constants": ([node("MatMul", ["v", "w"], ["c"]), node("Mul", ["x", "c"], ["y"])], {"x": (3, N)},
                            {"v": normal(3, K), "w": W}, "other", "both operands are constant"),
    "matmul of integers": ([node("MatMul", ["x", "w"], ["y"])], {"x": (("n", K), np.int32)}, {"w": Q.astype(np.int32)}, "other",
                           "computes in int32, not in a float type"),
    "empty weight": ([node("MatMul", ["x", "w"], ["y"])], X2, {"w": np.zeros((K, 0), np.float32)}, "other", "the weight is empty"),
    "gemm": ([node("Gemm", ["x", "w"], ["y"])], X2, {"w": W}, "linear", None),
    "gemm, A": ([node("Gemm", ["w", "x"], ["y"])], {"x": (N, "n")}, {"w": W}, "linear", None),
    "gather": ([node("Gather", ["w", "ids"], ["y"])], IDS, {"w": W}, "lookup", None),
    "gather axis -1": ([node("Gather", ["w", "ids"], ["y"], axis=-1)], IDS, {"w": W}, "lookup", None),
    "gather axis 1, rank unknown": ([node("Gather", ["w", "ids"], ["y"], axis=1)], {"ids": (None, np.int64)}, {"w": W}, "lookup",
                                    "the table is read along axis 1 and the rank of the ids is unknown"),
    "gather constant ids": ([node("Gather", ["w", "i"], ["c"]), node("Add", ["x", "c"], ["y"])], {"x": (2, N)},
                            {"w": W, "i": np.array([1, 2])}, "lookup", "the ids are constant"),
    "gather of rank 3": ([node("Gather", ["w", "ids"], ["y"])], IDS, {"w": W[None]}, "lookup", "the table is not a matrix"),
    "einsum": ([node("Einsum", ["x", "w"], ["y"], equation="bsk,kn->bsn")], X3, {"w": W}, "linear", None),
    "einsum batched": ([node("Einsum", ["x", "w"], ["y"], equation="bsk,skn->bsn")], {"x": ("b", 3, K)}, {"w": normal(3, K, N)}, "other",
                       "the weight shares a batch axis with the data"),
    "einsum elementwise": ([node("Einsum", ["x", "w"], ["y"], equation="bk,kn->bkn")], X2, {"w": W}, "other",
                           "the weight shares a batch axis with the data"),
    "einsum diagonal": ([node("Einsum", ["x", "w"], ["y"], equation="bk,kk->b")], X2, {"w": normal(K, K)}, "other",
                        "the equation repeats a label within an operand"),
    "einsum to a vector": ([node("Einsum", ["x", "w"], ["y"], equation="bk,k->b")], X2, {"w": normal(K)}, "other",
                           "the equation sums the weight alone, or contracts nothing"),
    "einsum sums": ([node("Einsum", ["x", "w"], ["y"], equation="bk,kn->b")], X2, {"w": W}, "other",
                    "the equation sums the weight alone, or contracts nothing"),
    "einsum sums data": ([node("Einsum", ["x", "w"], ["y"], equation="bk,kn->n")], X2, {"w": W}, "other",
                         "the equation sums the data alone"),
    "einsum ellipsis": ([node("Einsum", ["x", "w"], ["y"], equation="...k,kn->...n")], X3, {"w": W}, "other",
                        "the equation has an ellipsis"),
    "einsum of three": ([node("Einsum", ["x", "w", "x"], ["y"], equation="bk,kn,bk->bn")], X2, {"w": W}, "other",
                        "the equation has not two operands"),
    "conv 1x1": ([node("Conv", ["x", "w"], ["y"])], {"x": ("n", K, 5, 5)}, {"w": normal(3, K, 1, 1)}, "conv",
                 None),
    "conv grouped": ([node("Conv", ["x", "w"], ["y"], group=2)], {"x": ("n", K, 5, 5)}, {"w": normal(4, K // 2, 3, 3)}, "conv",
                     None),
    "conv of a constant": ([node("Conv", ["i", "w"], ["c"]), node("Add", ["c", "x"], ["y"])], {"x": (1, 3, 5, 5)},
                           {"w": normal(3, K, 1, 1), "i": normal(1, K, 5, 5)}, "conv", "both operands are constant"),
    "conv transpose": ([node("ConvTranspose", ["x", "w"], ["y"])], {"x": ("n", K, 5, 5)}, {"w": normal(K, 2, 3, 3)}, "conv",
                       "ConvTranspose is found but not factorized"),
    "matmul integer": ([node("MatMulInteger", ["x", "w"], ["i"]), node("Cast", ["i"], ["y"], to=F)],
                       {"x": (("n", K), np.int8)}, {"w": Q}, "other", "computes in int8, not in a float type"),
    "shape not constant": ([node("Reshape", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"])],
                           {**X2, "s": ((2,), np.int64)}, {"w": W}, "other", "the weight is reshaped to a shape that is not constant"),
    "weight is an output": ([node("MatMul", ["x", "w"], ["y"])], X2, {"w": W}, "linear", "the weight is an output of the graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    nodes, inputs, constants, kind, sentence = USES[name]
    outputs = {"y": np.float32} | ({"w": np.float32} if name == "weight is an output" else {})
    if name == "matmul of integers":
        outputs = {"y": np.int32}
    finding = find(model(nodes, inputs, outputs, constants))
    site = next(s for s in finding.sites if s.weight == "w")
    assert site.refusal == sentence
    assert site.kind == kind or sentence is not None
    assert (site.wiring is not None) >= (sentence is None)
    # what is refused is in no group, what is taken is in exactly one unit
    assert [site.name in {s.name for s in g.sites} for g in finding.units].count(True) == (sentence is None)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent_weights_are_listed(op: str) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    constants = {"w": normal(1, gates * 5, K), "r": normal(1, gates * 5, 5), "b": normal(1, 2 * gates * 5)}
    made = model([node(op, ["x", "w", "r", "b"], ["y"], hidden_size=5)], {"x": (3, "n", K)}, ["y"], constants)
    found = find(made)
    assert [(s.weight, s.refusal) for s in found.sites] == [
        (n, f"{op} is found but not factorized") for n in "wr"
    ]
    assert not found.groups


def test_nothing_without_a_constant() -> None:
    made = model([node("MatMul", ["x", "z"], ["y"])], {"x": ("n", K), "z": (K, "m")}, ["y"])
    assert find(made).sites == ()


# --- what a caller may replace ------------------------------------------------------------------------------------

MATMUL = [node("MatMul", ["x", "w"], ["y"])]
BY_CAST = [node("Cast", ["w"], ["c"], to=F), node("MatMul", ["x", "c"], ["y"])]
SCALED = [node("Cast", ["w"], ["c"], to=F), node("Mul", ["c", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"])]


@pytest.mark.parametrize(
    ("nodes", "constants", "default", "sentence"),
    [
        (MATMUL, {"w": W}, "w", "a caller may override the weight: it is a graph input with a default"),
        (
            BY_CAST,
            {"w": W.astype(np.float16)},
            "w",
            "a caller may override the weight: it is a graph input with a default",
        ),
        (
            SCALED,
            {"w": Q, "s": normal(N)},
            "w",
            "a caller may override the weight: it is a graph input with a default",
        ),
        (
            SCALED,
            {"w": Q, "s": normal(N)},
            "s",
            "a caller may override what Mul makes the weight with: it is a graph input with a default",
        ),
    ],
)
def test_overridable(
    nodes: list[onnx.NodeProto], constants: dict[str, Array], default: str, sentence: str
) -> None:
    site = the_site(find(model(nodes, X2, ["y"], constants, ir_version=4, opset=13, defaults=[default])))
    assert (site.weight, site.weight_shape, site.refusal) == ("w", (K, N), sentence)
    site = the_site(
        find(model(nodes, X2, ["y"], constants, ir_version=3, opset=13))
    )  # all are inputs, and constants all the same
    assert (site.weight, site.refusal) == ("w", None)


# --- numbers that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, BF16])
def test_not_finite(bad: float, dtype: type, caplog: pytest.LogCaptureFixture) -> None:
    spoiled = W.astype(dtype)
    spoiled[2, 1] = bad
    nodes = [
        node("MatMul", ["x", "w"], ["y"], name="bad"),
        node("MatMul", ["y", "after"], ["z"], name="downstream"),
        node("MatMul", ["x", "beside"], ["u"], name="beside"),
    ]
    constants = {"w": spoiled, "after": normal(N, 3).astype(dtype), "beside": normal(K, 3).astype(dtype)}
    with caplog.at_level(logging.WARNING):
        finding = find(model(nodes, {"x": (("n", K), dtype)}, {"z": dtype, "u": dtype}, constants))
    reasons = {s.name: s.refusal for s in finding.sites}
    assert reasons["bad"] == "the weight holds NaN or Inf"
    assert reasons["downstream"] is not None and "NaN or Inf gave" in reasons["downstream"]
    assert reasons["beside"] is None
    assert "bad" in caplog.text and "beside" not in caplog.text


def test_a_weight_that_is_left_anyway_spoils_what_follows() -> None:
    """An Inf meets factors as Inf - Inf, whatever the reason why its weight is not rewritten."""
    spoiled = W.copy()
    spoiled[2, 1] = np.inf
    nodes = [
        node("MatMul", ["x", "w"], ["y"], name="bad"),
        node("MatMul", ["y", "after"], ["z"], name="downstream"),
    ]
    made = model(nodes, X2, ["z", "w"], {"w": spoiled, "after": normal(N, 3)})
    reasons = {s.name: s.refusal for s in find(made).sites}
    assert reasons["bad"] == "the weight is an output of the graph"
    assert reasons["downstream"] is not None and "NaN or Inf gave" in reasons["downstream"]


@pytest.mark.parametrize("where", ["before", "inside"])
def test_not_finite_through_a_loop(where: str) -> None:
    """What enters a Loop, and what it carries round, spoils the sites of its body too."""
    info = helper.make_tensor_value_info
    spoiled = normal(K, K, seed=3)
    spoiled[0, 0] = np.inf
    steps = [node("MatMul", ["h", "good"], ["h1"], name="in_loop")]
    steps.append(
        node("MatMul", ["h1", "bad"], ["h2"], name="bad")
        if where == "inside"
        else node("Identity", ["h1"], ["h2"])
    )
    body = helper.make_graph(
        [*steps, node("Identity", ["go"], ["go2"])],
        "loop",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("h", F, None)],
        [info("go2", TensorProto.BOOL, []), info("h2", F, None)],
    )
    first = (
        node("MatMul", ["x", "bad"], ["s"], name="bad")
        if where == "before"
        else node("Identity", ["x"], ["s"])
    )
    nodes = [first, node("Loop", ["trips", "", "s"], ["y"], name="loop", body=body)]
    made = model(nodes, {"x": (3, K)}, ["y"], {"good": normal(K, K), "bad": spoiled, "trips": np.int64(2)})
    reasons = {s.name: s.refusal for s in find(made).sites}
    assert reasons["bad"] == "the weight holds NaN or Inf"
    assert reasons["in_loop"] is not None and "NaN or Inf gave" in reasons["in_loop"]


def test_a_scale_that_is_not_finite() -> None:
    nodes = [node("DequantizeLinear", ["w", "s"], ["v"], axis=1), node("MatMul", ["x", "v"], ["y"])]
    scale = np.array([1, 2, np.inf, 1], np.float32)
    assert (
        the_site(find(model(nodes, X2, ["y"], {"w": Q, "s": scale}))).refusal == "the weight holds NaN or Inf"
    )


# --- names, bodies, functions -------------------------------------------------------------------------------------


def test_names_are_unique_and_readable() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="same"),
        node("MatMul", ["x", "w"], ["b"], name="same"),
        node("MatMul", ["x", "w"], ["out"]),
    ]
    finding = find(model(nodes, X2, ["a", "b", "out"], {"w": W}))
    assert [s.name for s in finding.sites] == ["same", "same#2", "out"]
    assert [s.node.outputs[0].name for s in finding.sites] == ["a", "b", "out"]
    (group,) = finding.groups
    assert (group.kind, group.elements) == ("shared", K * N)


def branches(same: bool) -> ir.Model:
    """An If whose branches have a weight each, under one name when `same`."""
    bodies = {}
    for i, branch in enumerate(("then", "else")):
        name = "w" if same else f"w_{branch}"
        tensor = onnx.numpy_helper.from_array(normal(K, N, seed=i), name)
        output = helper.make_tensor_value_info(f"{branch}_y", F, None)
        body = node("MatMul", ["x", name], [f"{branch}_y"], name=f"{branch}_matmul")
        bodies[f"{branch}_branch"] = helper.make_graph([body], branch, [], [output], [tensor])
    return model([node("If", ["c"], ["y"], name="if", **bodies)], {**X2, "c": ((), np.bool_)}, ["y"])


@pytest.mark.parametrize("same", [False, True])
def test_bodies_of_if(same: bool, tmp_path: Path) -> None:
    finding = find(branches(same))
    sites = sorted(finding.sites, key=lambda s: s.name)
    assert [(s.name, s.path, s.refusal) for s in sites] == [
        ("else_matmul", "else_branch of if", None),
        ("then_matmul", "then_branch of if", None),
    ]
    assert len({s.weight for s in finding.sites}) == 2  # two constants, even when they share a name
    assert [g.kind for g in finding.groups] == ["alone", "alone"]
    weights = ModelWeights(Cache(tmp_path), 18)
    for seed, site in zip((1, 0), sites, strict=True):
        np.testing.assert_array_equal(weights.matrix(site), normal(K, N, seed=seed))


def test_bodies_of_loop_and_scan() -> None:
    """A weight of the outer graph, read in a Loop's body and in a Scan's."""
    info = helper.make_tensor_value_info
    loop = helper.make_graph(
        [node("MatMul", ["h", "w"], ["h2"], name="in_loop"), node("Identity", ["go"], ["go2"])],
        "loop",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("h", F, None)],
        [info("go2", TensorProto.BOOL, []), info("h2", F, None)],
    )
    scan = helper.make_graph(
        [node("MatMul", ["row", "w"], ["row2"], name="in_scan")],
        "scan",
        [info("row", F, [K])],
        [info("row2", F, [K])],
    )
    nodes = [
        node("Loop", ["trips", "", "x"], ["y"], name="loop", body=loop),
        node("Scan", ["x"], ["z"], name="scan", body=scan, num_scan_inputs=1),
    ]
    finding = find(model(nodes, {"x": (3, K)}, ["y", "z"], {"w": normal(K, K), "trips": np.int64(2)}))
    assert [(s.name, s.path, s.refusal) for s in finding.sites] == [
        ("in_loop", "body of loop", None),
        ("in_scan", "body of scan", None),
    ]
    (group,) = finding.groups
    assert group.kind == "shared"


def test_functions(tmp_path: Path) -> None:
    """Loaded, they are inlined; a graph that still has one lists what stands there."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    inside = [constant("w", W), node("MatMul", ["a", "w"], ["b"], name="inner")]
    made = proto([node("Dense", ["x"], ["y"], domain="f")], X2, ["y"])
    made.functions.append(helper.make_function("f", "Dense", ["a"], ["b"], inside, imports))
    made.opset_import.append(imports[1])
    site = the_site(find(ir.from_proto(made)))
    assert site.refusal == "stands in a local function that could not be inlined"
    onnx.save(made, tmp_path / "m.onnx")
    site = the_site(find(load(tmp_path / "m.onnx").model))
    assert site.refusal is None and site.path == ""


def test_the_model_is_left_as_it_was() -> None:
    made = branches(same=True)
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    find(made)
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


# --- biases -------------------------------------------------------------------------------------------------------

B = normal(N)
GEMM_A = normal(4, K)  # (M, K) as Gemm's A: the product's rows are the site's N
# name -> (nodes, inputs, constants, whether the bias is ours)
BIASES = {
    "after": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])], X2, {"b": B}, True),
    "before": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["b", "p"], ["y"])], X3, {"b": B[None]}, True),
    "gemm": ([node("Gemm", ["x", "w", "b"], ["y"], beta=2.0)], X2, {"b": B}, True),
    "product read twice": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["q"]), node("Add", ["p", "q"], ["y"])], X2,
                           {"b": B}, False),
    "a scalar": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])], X2, {"b": np.float32(1)}, False),
    "by row": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])], X2, {"b": B[:, None]}, False),
    "three axes": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])], X2, {"b": B[None, None]}, False),
    "not finite": ([node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])], X2, {"b": B * np.nan}, False),
    "beta 0": ([node("Gemm", ["x", "w", "b"], ["y"], beta=0.0)], X2, {"b": B}, False),
    # C (4,) runs along the last axis of (M, n), the site's columns along the first: equal lengths are chance
    "gemm, A": ([node("Gemm", ["v", "x", "b"], ["y"])], {"x": (K, 4)}, {"v": GEMM_A, "b": B}, False),
    "left": ([node("MatMul", ["v", "x"], ["p"]), node("Add", ["p", "b"], ["y"])], {"x": (K, 4)}, {"v": GEMM_A, "b": B}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_biases(name: str) -> None:
    nodes, inputs, constants, ours = BIASES[name]
    used = {v for n in nodes for v in n.input}
    constants = {n: a for n, a in {"w": W, **constants}.items() if n in used}
    site = the_site(find(model(nodes, inputs, ["y"], constants)))
    assert site.refusal is None
    assert (site.bias is not None) == ours
    if site.bias is not None:
        assert site.bias.node.inputs[site.bias.index] is site.bias.value
        assert site.bias.value.name == "b" and site.bias.shape == constants["b"].shape
        assert site.bias.scale == (2.0 if name == "gemm" else 1.0)


def test_a_bias_that_is_an_output_or_a_default_is_not_edited() -> None:
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])]
    made = model(nodes, X2, ["y"], {"w": W, "b": B}, defaults=["b"])
    assert the_site(find(made)).bias is None
    made = model(
        nodes, X2, ["y", "p"], {"w": W, "b": B}
    )  # the product is an output: somebody sees it without the bias
    assert the_site(find(made)).bias is None


# --- the generated family -----------------------------------------------------------------------------------------

CORPUS = corpus(11, 400)


def unexplained(graph: OddGraph, folder: Path) -> list[str]:
    """Certain uses that were not found as promised."""
    onnx.save(graph.model, folder / "m.onnx")
    finding = find(load(folder / "m.onnx").model)
    found = Counter((s.op, s.weight, s.weight_shape, s.refusal is None) for s in finding.sites)
    listed = Counter((s.op, s.weight, s.weight_shape) for s in finding.sites)
    # what computes with the result of a weight of NaN or Inf is refused on purpose; which uses these are, it does not say
    spoiled = any(e.reason == "finite" for e in graph.sites)
    wrong = []
    for use in graph.sites:
        if not use.certain or use.where.startswith("function"):  # inlined: names are new
            continue
        key = (use.op, use.weight, use.shape)
        promised = listed[key] > 0 if spoiled and use.taken else found[*key, use.taken] > 0
        if not promised:
            wrong.append(f"{graph.label}: {use}")
        found[*key, use.taken] -= 1
        listed[key] -= 1
    return wrong


def test_the_family_of_odd_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    wrong = [text for graph in CORPUS for text in unexplained(graph, tmp_path)]
    assert not wrong, "\n".join(wrong)
    certain = [e for g in CORPUS for e in g.sites if e.certain and not e.where.startswith("function")]
    assert (
        len(certain) > 400 and sum(not e.taken for e in certain) > 80
    )  # the family itself must not shrink away
