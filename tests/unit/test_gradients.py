"""Derivatives against central differences, values against ONNX Runtime, probes against what they promise; refusals are sentences."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lrcompile.feeds import inputs_of, open_feeds
from lrcompile.gradients import Differentiable, default_cotangents, refusal
from lrcompile.load import load
from lrcompile.records import Refusal
from lrcompile.sites import find
from tests.graphs import FLOAT32, Array, kind_of, model, node, normal, proto, run
from tests.odd_graphs import corpus
from tests.recipes import exported

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

# Central differences in float64 with steps of 1e-4: the square of the step, and rounding by the step.
DIFFERENCE = 1e-6
Case = tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def case(op: str, shape: Sequence[int], *others: Any, **attributes: Any) -> Any:
    """One operator: the shape of its first input, the others (floats take the type of the run), attributes.

    opset: by default 18. outputs: how many it has, by default 1. positive: its input is made to lie between 0 and 1 (Acosh: above 1).
    """
    words = [f"{k}={v}" for k, v in attributes.items() if not isinstance(v, TensorProto)]
    return pytest.param((op, tuple(shape), others, attributes), id=" ".join([op, str(list(shape)), *words]))


# What needs no attribute.
PLAIN = """Sqrt Reciprocal Neg Abs Exp Log Erf Tanh Sigmoid Relu Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh
    Floor Ceil Round Sign IsNaN Softplus Softsign Mish HardSwish Identity IsInf LeakyRelu ThresholdedRelu Elu Celu Selu Shrink
    HardSigmoid Shape Size Transpose Flatten ArgMax ArgMin Softmax LogSoftmax Hardmax NonZero""".split()
REDUCTIONS = "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp".split()
STEPS = (ints(-1, 0), ints(-100, 3), ints(2, 1), ints(-2, 1))
IMAGE = (2, 4, 7, 6)
CASES = [
    *(case(op, (3, 4), positive=op in "Sqrt Log Reciprocal Acosh Atanh Asin Acos", opset=18) for op in PLAIN),
    *(case(op, (3, 4), b) for op in ("Add", "Sub", "Mul", "Div") for b in (normal(2, 1, 4) + 3,)),
    *(case(op, (3, 4), normal(3, 1), np.array(0.1)) for op in ("Max", "Min", "Sum", "Mean")),
    *(case(op, (3, 4), normal(4)) for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(case("Pow", (3, 4), e, positive=True) for e in (np.array(2.0), np.array([0.5]), normal(3, 1), ints(3))),
    case("Mod", (3, 4), normal(4) + 3, fmod=1),
    case("PRelu", (3, 4), normal(4)),
    case("Clip", (3, 4), np.array(-0.5), np.array(0.6)),
    case("Clip", (3, 4), None, np.array(0.6)),
    case("Clip", (3, 4), opset=10, min=-0.5, max=0.6),
    case("Gelu", (3, 4), opset=20),
    case("Gelu", (3, 4), opset=20, approximate="tanh"),
    case("Elu", (3, 4), alpha=0.3),
    case("HardSigmoid", (3, 4), alpha=0.3, beta=0.4),
    case("IsInf", (3, 4), detect_negative=0),
    case("Cast", (3, 4), to=TensorProto.INT64),
    case("Cast", (3, 4), to=TensorProto.BOOL),
    case("Dropout", (3, 4)),
    *(case(op, (2, 3, 4), opset=11) for op in ("Softmax", "LogSoftmax")),
    *(case(op, (2, 3, 4), axis=1) for op in ("Softmax", "LogSoftmax")),
    *(case(op, (2, 3, 4), ints(0, -1), positive=True) for op in REDUCTIONS),
    *(case(op, (2, 3, 4), positive=True, keepdims=0) for op in REDUCTIONS),
    *(case(op, (2, 3, 4), axes=[1], opset=12, positive=True) for op in (*REDUCTIONS, "ReduceLogSum")),
    case("ReduceSum", (2, 3), noop_with_empty_axes=1),
    case("ReduceSum", (2, 3), ints(), noop_with_empty_axes=0),
    case("ReduceMax", (), keepdims=0),
    case("ArgMax", (3, 4), axis=-1, keepdims=0, select_last_index=1),
    case("TopK", (3, 4), ints(2), axis=0, largest=0, outputs=2),
    case("TopK", (3, 4), k=2, opset=9, outputs=2),
    *(case("CumSum", (3, 4), np.array(1), exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)),
    case("LpNormalization", (3, 4), axis=1),
    case("LpNormalization", (3, 4), p=1, axis=0),
    # data moved
    *(case("Reshape", (2, 3, 4), ints(*s)) for s in ((0, -1), (4, 6), (-1,))),
    case("Reshape", (0, 3), ints(0, 3, 2), allowzero=1),
    case("Reshape", (0, 3), ints(3, -1)),
    case("Transpose", (2, 3, 4), perm=[2, 0, 1]),
    case("Squeeze", (1, 3, 1, 2), ints(0, -2)),
    case("Squeeze", (1, 3, 1)),
    case("Squeeze", (1, 3, 1), axes=[2], opset=11),
    case("Unsqueeze", (3, 4), ints(-1, 0)),
    case("Unsqueeze", (3, 4), axes=[1, 0], opset=11),
    case("Flatten", (2, 3, 4), axis=0),
    case("Flatten", (2, 3, 4), axis=-1),
    case("Expand", (3, 1), ints(2, 1, 4)),
    case("Tile", (2, 3), ints(2, 3)),
    case("Concat", (2, 3), normal(2, 1), axis=-1),
    case("Slice", (4, 5), ints(1, -3), ints(9, -1)),
    case("Slice", (4, 5), *STEPS[:2], ints(0, 1), ints(-2, 1)),
    case("Slice", (4, 5), ints(1), ints(-1), ints(-1), ints(2)),
    case("Slice", (4, 5), ints(3), ints(1)),
    case("Slice", (4, 5), starts=[1], ends=[2], axes=[1], opset=9),
    case("Split", (5, 2), ints(2, 3), outputs=2),
    case("Split", (5, 2), num_outputs=2, outputs=2),
    case("Split", (6, 2), split=[1, 5], opset=11, outputs=2),
    case("Split", (6, 2), opset=13, axis=-1, outputs=2),
    case("Gather", (4, 3), ints(-1, 0, 2, 2)),
    case("Gather", (4, 3), np.array(-2, np.int32), axis=1),
    case("Gather", (4, 3), ints(0, 1, 2, 0).reshape(2, 2), axis=-1),
    case("GatherElements", (2, 3), ints(-1, 0, 1, 1).reshape(2, 2), axis=1),
    case("GatherND", (2, 3, 4), ints(-1, 0, 1, 2).reshape(2, 2)),
    case("GatherND", (2, 3, 4), ints(-1, 1).reshape(2, 1), batch_dims=1),
    case("ScatterND", (4, 3), ints(-1, 0).reshape(2, 1), normal(2, 3)),
    case("ScatterND", (4, 3), ints(1, 1).reshape(2, 1), normal(2, 3), reduction="add"),
    case("ScatterElements", (2, 3), ints(-1, 0).reshape(1, 2), normal(1, 2), axis=0),
    *(
        case("ScatterElements", (2, 3), ints(-1, 0).reshape(1, 2), normal(1, 2), reduction=r)
        for r in ("add", "mul", "max", "min")
    ),
    case("Pad", (3, 4), ints(1, 0, -1, 2), np.array(0.5)),
    case("Pad", (3, 4), ints(1, 2), None, ints(-1)),
    case("Pad", (3, 4), pads=[1, 0, 0, 2], value=0.5, opset=10),
    *(case("Pad", (3, 4), ints(1, 2, 2, 1), opset=19, mode=m) for m in ("reflect", "edge", "wrap")),
    *(case("Trilu", (2, 3, 4), *k, upper=u) for k in ((), (np.array(-1),)) for u in (0, 1)),
    case("Compress", (3, 4), np.array([True, False, True]), axis=0),
    case("DepthToSpace", (2, 8, 2, 3), blocksize=2),
    case("DepthToSpace", (2, 8, 2, 3), blocksize=2, mode="CRD"),
    case("SpaceToDepth", (2, 2, 4, 6), blocksize=2),
    case("EyeLike", (3, 4), k=1, dtype=TensorProto.INT64),
    # products
    case("MatMul", (2, 3, 4), normal(4, 5)),
    case("MatMul", (2, 3, 4), normal(4)),
    case("Gemm", (4, 3), normal(5, 4), normal(5), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm", (3, 4), normal(4, 5), normal(3, 1)),
    case("Einsum", (2, 3, 4), normal(5, 4), equation="b ... k, n k -> b ... n"),
    case("Einsum", (3, 4), normal(4, 2), equation="ij,jk"),
    # layers
    case("Conv", IMAGE, normal(6, 2, 3, 2), normal(6), group=2, strides=[2, 1], pads=[1, 0, 2, 1]),
    case("Conv", IMAGE, normal(3, 4, 3, 3), dilations=[2, 1], pads=[1, 1, 1, 1]),
    *(
        case("Conv", IMAGE, normal(3, 4, 3, 2), auto_pad=a, strides=[2, 2])
        for a in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    case("Conv", (2, 3, 8), normal(4, 3, 3), pads=[2, 0]),
    case("Conv", (1, 2, 4, 4, 4), normal(2, 2, 3, 3, 3)),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 2), normal(6), group=2, strides=[2, 3], pads=[1, 0, 2, 1]),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), normal(3), strides=[2, 2], output_padding=[1, 1]),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), strides=[2, 2], output_shape=[14, 12]),
    case("ConvTranspose", IMAGE, normal(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", (2, 3, 5), normal(3, 2, 3), dilations=[2], strides=[2]),
    case("BatchNormalization", IMAGE, normal(4), normal(4), normal(4), abs(normal(4)) + 1, epsilon=1e-3),
    case("InstanceNormalization", IMAGE, normal(4), normal(4)),
    case("LayerNormalization", (2, 3, 4), normal(4), normal(4)),
    case("LayerNormalization", (2, 3, 4), normal(3, 4), axis=1, epsilon=1e-3),
    case("LayerNormalization", (2, 3, 4), normal(4), normal(4), outputs=3),
    case("RMSNormalization", (2, 3, 4), normal(4), opset=23),
    case("GroupNormalization", IMAGE, normal(4), normal(4), num_groups=2, opset=21),
    case("GroupNormalization", IMAGE, normal(2), normal(2), num_groups=2, opset=18),
    case("MeanVarianceNormalization", IMAGE),
    case("LRN", IMAGE, size=3, alpha=0.1, bias=2.0),
    *(
        case(op, IMAGE, **({"kernel_shape": [3, 2], "strides": [2, 2]} | a))
        for op in ("MaxPool", "AveragePool")
        for a in (
            {},
            {"pads": [1, 0, 1, 1]},
            {"ceil_mode": 1},
            {"pads": [1, 1, 1, 1], "ceil_mode": 1},
            {"pads": [1, 1, 1, 1], "ceil_mode": 1, "kernel_shape": [2, 2], "strides": [3, 2]},
            {"auto_pad": "SAME_UPPER"},
            {"auto_pad": "SAME_LOWER"},
        )
    ),
    case("AveragePool", IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1, strides=[2, 2]),
    case("AveragePool", IMAGE, kernel_shape=[3, 2], dilations=[2, 1], opset=19),
    case("MaxPool", IMAGE, kernel_shape=[3, 2], dilations=[2, 1]),
    case("MaxPool", (2, 3, 9), kernel_shape=[4], strides=[3]),
    *(case(op, IMAGE) for op in ("GlobalAveragePool", "GlobalMaxPool")),
]


def build(made: Case, dtype: Any) -> ir.Model:
    """y = x W, watched, then a Reshape to the case's shape (a square first where it must be positive), then the operator."""
    op, shape, others, attributes = made
    options = {k: v for k, v in attributes.items() if k not in ("opset", "outputs", "positive")}
    opset, count = attributes.get("opset", 18), attributes.get("outputs", 1)
    constants = {"W": normal(5, math.prod(shape), dtype=dtype), "shape": ints(*shape)}
    names = ["h"]
    for n, array in enumerate(others):
        names.append("" if array is None else f"c{n}")
        if array is not None:
            constants[f"c{n}"] = array.astype(dtype) if array.dtype.kind == "f" else array
    nodes = [node("MatMul", ["x", "W"], ["y"]), node("Reshape", ["y", "shape"], ["r"])]
    if not all(shape):
        nodes[-1] = node("Reshape", ["y", "shape"], ["r"], allowzero=1)
    if attributes.get("positive"):
        constants |= {"scale": np.array(0.02, dtype), "shift": np.array(0.3 if op != "Acosh" else 1.3, dtype)}
        nodes += [node("Mul", ["r", "r"], ["q"]), node("Mul", ["q", "scale"], ["s"])]
        nodes += [node("Add", ["s", "shift"], ["t"]), node("Tanh", ["t"], ["h"])]
        if op == "Acosh":
            nodes[-1] = node("Identity", ["t"], ["h"])
    else:
        nodes.append(node("Identity", ["r"], ["h"]))
    outputs = [f"z{n}" for n in range(count)]
    nodes.append(node(op, names, outputs, **options))
    types: dict[str, Any] = {}
    for n, name in enumerate(outputs):
        types[name] = dtype
        if op in ("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "EyeLike") or (op == "TopK" and n == 1):
            types[name] = np.int64
        elif op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf"):
            types[name] = np.bool_
        elif op == "Cast":
            types[name] = helper.tensor_dtype_to_np_dtype(options["to"])
    return model(nodes, {"x": (("n", 5), dtype)}, types, constants, opset=opset, ir_version=10)


Pulled = list[list[tuple[Array, Array]]]


def pulled(
    made: ir.Model,
    watched: Sequence[tuple[str, str]],
    feed: Mapping[str, Array],
    cotangents: Any,
    outputs: Sequence[str] | None = None,
) -> tuple[dict[str, Array], Pulled]:
    """The outputs' values, and x and g of each site for each set of cotangents."""
    outputs = outputs or [v.name or "" for v in made.graph.outputs]
    values: dict[str, Array] = {}
    passes: Pulled = []

    def probed(found: Mapping[str, Array]) -> Any:
        values.update({n: z.copy() for n, z in found.items()})
        return cotangents(found)

    def consume(number: int, pairs: Sequence[tuple[Array, Array]]) -> None:
        assert number == len(passes)
        passes.append([(x.copy(), g.copy()) for x, g in pairs])

    answer = Differentiable(made, watched).pull(feed, outputs, probed, consume)
    assert answer is None, answer
    return values, passes


def ones_like(seed: int, outputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    return [
        {n: normal(*z.shape, seed=seed, dtype=np.float64) for n, z in outputs.items() if z.dtype.kind == "f"}
    ]


def session(made: ir.Model) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(
        ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def close(got: Array, wanted: Array, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got.dtype.kind == "f") == (wanted.dtype.kind == "f")
    scale = float(np.abs(wanted).max(initial=0, where=np.isfinite(wanted))) or 1.0
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("made", CASES)
def test_values_are_those_of_the_runtime(made: Case) -> None:
    built = build(made, np.float32)
    feed = {"x": normal(1, 5, seed=3)}
    values, _ = pulled(built, [("x", "y")], feed, lambda _: [])
    names = [v.name or "" for v in built.graph.outputs]
    try:
        wanted = dict(zip(names, session(built).run(None, feed), strict=True))
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        wanted = run(built, feed)
    for name in names:
        close(values[name], wanted[name], FLOAT32)


@pytest.mark.parametrize("made", CASES)
def test_derivatives_are_those_of_central_differences(made: Case) -> None:
    built = build(made, np.float64)
    x, d, step = normal(1, 5, seed=3, dtype=np.float64), normal(1, 5, seed=4, dtype=np.float64), 1e-5
    probe = partial(ones_like, 5)
    values, [[(seen, g)]] = pulled(built, [("x", "y")], {"x": x}, probe)
    np.testing.assert_array_equal(seen, x.astype(np.float32))
    (v,) = probe(values)
    (up, _), (down, _) = (pulled(built, [("x", "y")], {"x": x + s * d}, lambda _: []) for s in (step, -step))
    wanted = sum(float(np.sum(v[n] * (up[n] - down[n]))) / (2 * step) for n in v)
    terms = g * (d @ normal(5, g.shape[-1], dtype=np.float64))
    assert terms.sum() == pytest.approx(wanted, abs=DIFFERENCE * (np.abs(terms).sum() + 1))


FLAGS, OTHERS = np.array([[True], [False]]), np.array([True, False, True])
IDS = ints(5, -7, 2)
FILL = helper.make_tensor("v", TensorProto.INT32, [1], [7])
WITHOUT_FLOATS: list[tuple[str, list[Array], dict[str, Any]]] = [
    *((op, [FLAGS, OTHERS], {}) for op in ("And", "Or", "Xor", "Equal")),
    *(
        (op, [IDS, ints(3)], {})
        for op in "Add Sub Mul Div Mod BitwiseAnd BitwiseOr BitwiseXor Max Min Less".split()
    ),
    ("Mod", [IDS, ints(3)], {"fmod": 1}),
    ("Not", [FLAGS], {}),
    ("BitwiseNot", [IDS], {}),
    ("Where", [FLAGS, IDS, ints(1)], {}),
    ("Cast", [IDS], {"to": TensorProto.FLOAT}),
    ("CastLike", [normal(3), IDS], {}),
    ("Range", [np.array(7), np.array(-2), np.array(-3)], {}),
    ("Range", [np.float32(0.5), np.float32(2), np.float32(0.25)], {}),
    ("ConstantOfShape", [ints(2, 0, 3)], {}),
    ("ConstantOfShape", [ints(2, 3)], {"value": FILL}),
    ("Constant", [], {"value_floats": [1.0, 2.0]}),
    ("OneHot", [ints(0, -1, 2), np.array(3), normal(2)], {}),
    ("OneHot", [ints(1, 2), np.array(3), normal(2)], {"axis": 0}),
    ("ReduceSum", [IDS], {}),
    ("ReduceMax", [IDS], {}),
    ("CumSum", [IDS, np.array(0)], {}),
    (
        "DequantizeLinear",
        [np.arange(6, dtype=np.uint8).reshape(2, 3), normal(3), np.arange(3, dtype=np.uint8)],
        {"axis": 1},
    ),
    ("DequantizeLinear", [np.arange(6, dtype=np.int8), np.float32(0.5)], {}),
]


@pytest.mark.parametrize("made", [pytest.param(m, id=f"{m[0]} {n}") for n, m in enumerate(WITHOUT_FLOATS)])
def test_values_of_integers_and_booleans(made: tuple[str, list[Array], dict[str, Any]]) -> None:
    op, inputs, attributes = made
    feed = {f"i{n}": np.asarray(a) for n, a in enumerate(inputs)}
    given = {n: (a.shape, a.dtype) for n, a in feed.items()}
    built = proto([node(op, list(feed), ["z"], **attributes)], given, ["z"], opset=19)
    built.graph.output[0].type.Clear()  # the runtime knows
    wanted = run(built, feed)["z"]
    values, _ = pulled(ir.from_proto(built), [], feed, lambda _: [])
    assert values["z"].dtype == wanted.dtype
    close(values["z"], wanted, FLOAT32)


def test_total_derivatives_of_a_chain_with_branches() -> None:
    """Sites in a row, one on a branch that nobody reads, one output left out, and a value that is an output as well."""
    constants = {"w1": normal(4, 5), "w2": normal(5, 3, seed=1), "w3": normal(5, 2, seed=2)}
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Tanh", ["a"], ["h"]),
        node("MatMul", ["h", "w2"], ["b"]),
        node("Sigmoid", ["b"], ["z"]),
        node("MatMul", ["h", "w3"], ["c"]),
        node("Resize", ["c", "", "scales"], ["e"]),
    ]
    constants["scales"] = np.ones(2, np.float32)
    made = model(nodes, {"x": ("n", 4)}, ["z", "a", "e"], constants)
    feed = {"x": normal(3, 4)}
    v = {"z": normal(3, 3, seed=7), "a": normal(3, 5, seed=8)}
    sets = [v, {"a": v["a"]}, {}]
    watched = [("x", "a"), ("h", "b"), ("h", "c")]
    values, passes = pulled(made, watched, feed, lambda _: sets, ["z", "a"])
    assert set(values) == {"z", "a"}
    h, s = np.tanh(values["a"]), values["z"]
    gb = v["z"] * s * (1 - s)
    ga = (gb @ constants["w2"].T) * (1 - h**2) + v["a"]
    for got, (a, b) in zip(passes, [(ga, gb), (v["a"], 0 * gb), (0 * ga, 0 * gb)], strict=True):
        close(got[0][0], feed["x"], FLOAT32)
        close(got[0][1], a, FLOAT32)
        close(got[1][0], h, FLOAT32)
        close(got[1][1], b, FLOAT32)
        assert got[2][1].shape == (3, 2)
        assert not got[2][1].any()
    assert all(g.dtype == np.float32 for pairs in passes for pair in pairs for g in pair)


def attention(hidden: int = 8) -> ir.Model:
    """Softmax rows that the mask empties come out as NaN and are replaced behind it, as exporters write it."""
    constants = {n: normal(hidden, hidden, seed=i) / 3 for i, n in enumerate(("wq", "wk", "wv", "wo"))}
    constants["zero"], constants["low"] = np.zeros((), np.float32), np.array(-np.inf, np.float32)
    nodes = [
        *(node("MatMul", ["x", f"w{n}"], [n]) for n in "qkv"),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"]),
        node("Where", ["mask", "zero", "low"], ["bias"]),
        node("Add", ["s", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["p"], axis=-1),
        node("IsNaN", ["p"], ["dead"]),
        node("Where", ["dead", "zero", "p"], ["alive"]),
        node("MatMul", ["alive", "v"], ["m"]),
        node("MatMul", ["m", "wo"], ["logits"]),
    ]
    inputs = {"x": ("b", "s", hidden), "mask": (("b", "s", "s"), np.bool_)}
    return model(nodes, inputs, ["logits"], constants)


WATCHED = [("x", "q"), ("x", "k"), ("x", "v"), ("m", "logits")]


def test_rows_that_a_mask_empties() -> None:
    mask = np.tril(np.ones((2, 4, 4), bool))
    mask[1, 2] = False
    feed = {"x": normal(2, 4, 8), "mask": mask}
    probes = partial(default_cotangents, count=2, seed=0)
    values, passes = pulled(attention(), WATCHED, feed, probes)
    (wanted,) = session(attention()).run(None, feed)  # onnx's evaluator warns of the NaN
    close(values["logits"], wanted, FLOAT32)
    assert all(np.isfinite(g).all() and g.any() for pairs in passes for _, g in pairs)
    assert not passes[0][0][1][1, 2].any()  # its query asks nobody


def test_shared_memory_of_values_is_no_shared_derivative() -> None:
    """An Identity gives the same tensor: the derivative of each name is that of its own readers."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Identity", ["a"], ["b"]),
        node("Add", ["a", "b"], ["z"]),
    ]
    made = model(nodes, {"x": (2, 3)}, ["z"], {"w": normal(3, 4)})
    _, [pairs] = pulled(
        made, [("x", "a"), ("a", "b")], {"x": normal(2, 3)}, lambda o: [{"z": 0 * o["z"] + 1}]
    )
    assert [float(g.max()) for _, g in pairs] == [2.0, 1.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_floats_are_widened(dtype: str) -> None:
    import ml_dtypes  # registers bfloat16 with NumPy

    kind = np.dtype(getattr(ml_dtypes, dtype, np.float16))
    w = normal(5, 4).astype(kind)
    made = model(
        [node("MatMul", ["x", "w"], ["y"]), node("Relu", ["y"], ["z"])],
        {"x": ((2, 5), kind)},
        {"z": kind},
        {"w": w},
        opset=14,
    )
    x = normal(2, 5).astype(kind)
    values, [[(seen, g)]] = pulled(made, [("x", "y")], {"x": x}, partial(ones_like, 1))
    assert seen.dtype == g.dtype == values["z"].dtype == np.float32
    close(values["z"], np.maximum(x.astype(np.float32) @ w.astype(np.float32), 0), FLOAT32)


def test_weights_are_not_copied() -> None:
    from lrcompile.gradients.operators import to_torch

    weight = normal(64, 8)
    weight.flags.writeable = False
    for given in (weight, weight.T, weight[::2]):
        assert np.shares_memory(to_torch(given).numpy(), weight)
    assert to_torch(weight[::-1]).numpy().tolist() == weight[::-1].tolist()


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(made: ir.Model, feed: Mapping[str, Array], watched: Sequence[tuple[str, str]] = ()) -> str:
    outputs = [v.name or "" for v in made.graph.outputs]
    answer = Differentiable(made, watched).pull(
        feed, outputs, lambda o: default_cotangents(o, 1, 0), lambda *_: None
    )
    assert isinstance(answer, Refusal)
    assert "\n" not in answer.reason
    return answer.reason


def test_operators_that_are_not_covered() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Resize", ["a", "", "s"], ["z"], name="up"),
        node("Neg", ["a"], ["n"]),
    ]
    made = model(nodes, {"x": (1, 2)}, ["z", "n"], {"s": np.ones(2, np.float32)})
    reason = "derivatives of Resize (node 'up') are not covered"
    assert str(refusal(made)) == reason
    assert refusal(made, ["n"]) is None
    assert refused(made, {"x": normal(1, 2)}) == reason
    foreign = proto([node("FusedGemm", ["x"], ["z"], domain="com.microsoft")], {"x": (1, 2)}, ["z"])
    foreign.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "com.microsoft::FusedGemm" in str(refusal(ir.from_proto(foreign)))
    assert "opset 7" in str(refusal(model([node("Relu", ["x"], ["z"])], {"x": (1,)}, ["z"], opset=6)))


def test_forms_that_are_not_covered() -> None:
    image = {"x": normal(1, 2, 4, 4)}
    pool = model(
        [node("MaxPool", ["x"], ["z", "i"], name="pool", kernel_shape=[2, 2])],
        {"x": (1, 2, 4, 4)},
        {"z": np.float32, "i": np.int64},
    )
    assert refused(pool, image) == "MaxPool node 'pool' could not be computed: it gives indices"
    constants = {c: normal(2, seed=i) for i, c in enumerate("sbmv")}
    norm = node("BatchNormalization", ["x", *"sbmv"], ["z"], name="bn", training_mode=1)
    assert "training" in refused(model([norm], {"x": (1, 2, 4, 4)}, ["z"], constants), image)
    texts = model([node("Identity", ["x"], ["z"])], {"x": ((2,), np.object_)}, {"z": np.object_})
    assert "no tensors of" in refused(texts, {"x": np.array(["a", "b"], object)})


def test_a_feed_that_does_not_fit_and_a_derivative_that_is_not_finite() -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["y"]), node("Sqrt", ["y"], ["z"])],
        {"x": ("n", 3)},
        ["z"],
        {"w": normal(3, 2)},
    )
    watched = [("x", "y")]
    assert "MatMul node" in refused(made, {"x": normal(2, 4)}, watched)
    assert "'x' has no value" in refused(made, {}, watched)
    assert refused(made, {"x": np.zeros((1, 3), np.float32)}, watched).endswith("'y' is not finite")


def test_without_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from lrcompile.gradients import Differentiable, refusal\n"
        "from tests.graphs import model, node\n"
        "made = model([node('Relu', ['x'], ['z'])], {'x': (1,)}, ['z'])\n"
        "answer = Differentiable(made, []).pull({}, ['z'], None, None)\n"
        "assert str(answer) == str(refusal(made)), answer\n"
        "assert 'pip install' in answer.reason"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr


# --- generated graphs ---------------------------------------------------------------------------------------------


def test_odd_graphs() -> None:
    """Of the family of legal but odd models: values where all is float32 or float64, never an exception, refusals with a reason."""
    reasons: dict[str, int] = {}
    compared = 0
    for graph in corpus(0, 200):
        made = load(ir.from_proto(graph.model)).model
        watched = [
            (str(n.inputs[0].name), str(n.outputs[0].name))
            for n in made.graph
            if n.op_type in ("MatMul", "Gemm", "Conv") and n.inputs[0] is not None
        ]
        outputs = [v.name or "" for v in made.graph.outputs]
        values: dict[str, Array] = {}

        def probed(found: Mapping[str, Array], values: dict[str, Array] = values) -> Any:
            values.update(found)
            return default_cotangents(found, 1, 0)

        answer = Differentiable(made, watched).pull(graph.feeds[0], outputs, probed, lambda *_: None)
        if answer is not None:
            assert len(answer.reason.split()) > 4, answer
            kind = answer.reason.split(" (")[0] if "not covered" in answer.reason else answer.reason[-13:]
            reasons[kind] = reasons.get(kind, 0) + 1
        elif (
            graph.runs_on_ort
            and "float16" not in str(graph.model) + graph.label
            and "cast" not in graph.label
        ):
            for name, wanted in zip(outputs, session(made).run(None, graph.feeds[0]), strict=True):
                close(values[name], wanted, 1e-4)
            compared += 1
    operators = "If Loop Scan GRU RNN LSTM MatMulInteger QLinearMatMul ConvInteger".split()
    known = {*(f"derivatives of {op}" for op in operators), "is not finite"}
    assert set(reasons) <= known, reasons
    assert sum(reasons.values()) < 70
    assert compared > 60


# --- probes -------------------------------------------------------------------------------------------------------


def test_probes_measure_relative_squared_movement() -> None:
    """E (v^T dz)^2 over many probes, and the same through the derivatives of a site: <g, dy>^2."""
    z = {"hidden": normal(2, 3, 5), "pooled": normal(2, 4, seed=1), "ids": ints(1, 2)}
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    dz = {n: 0.1 * normal(*a.shape, seed=2) for n, a in z.items()}
    probes = default_cotangents(z, 4000, 0, mask)
    assert all(set(v) == {"hidden", "pooled"} and not v["hidden"][mask == 0].any() for v in probes[:3])
    found = np.mean([sum(float(np.vdot(v[n], dz[n])) for n in v) ** 2 for v in probes])
    kept = mask.astype(bool)
    wanted = float(np.sum(dz["hidden"][kept] ** 2) / np.sum(z["hidden"][kept] ** 2))
    wanted += float(np.sum(dz["pooled"] ** 2) / np.sum(z["pooled"] ** 2))
    assert found == pytest.approx(wanted, rel=5 * math.sqrt(2 / 4000))  # five deviations of a chi^2


def test_probes_of_logits_have_the_fisher_information() -> None:
    z = {"my_Logits": 2 * normal(2, 3, 6)}
    probes = default_cotangents(z, 6000, 1)
    p = np.exp(z["my_Logits"]) / np.exp(z["my_Logits"]).sum(-1, keepdims=True)
    row, rows = p[1, 2], 6
    found = np.mean([np.outer(v["my_Logits"][1, 2], v["my_Logits"][1, 2]) for v in probes], axis=0)
    np.testing.assert_allclose(
        found, (np.diag(row) - np.outer(row, row)) / rows, rtol=0, atol=5 * math.sqrt(2 / 6000) / rows
    )
    dz = 1e-2 * normal(2, 3, 6, seed=3)
    moved = z["my_Logits"].astype(np.float64) + dz
    q = np.exp(moved) / np.exp(moved).sum(-1, keepdims=True)
    kl = np.mean(np.sum(p * np.log(p / q), axis=-1))
    squares = np.mean([float(np.vdot(v["my_Logits"], dz)) ** 2 for v in probes])
    assert squares / 2 == pytest.approx(kl, rel=0.15)


def test_derivatives_with_probes_predict_a_small_change_of_a_weight() -> None:
    made = attention()
    feed = {"x": normal(2, 4, 8), "mask": np.tril(np.ones((2, 4, 4), bool))}
    made.graph.outputs[0].name = "z"
    E = 1e-3 * normal(8, 8, seed=9)
    watched = [(x, "z" if y == "logits" else y) for x, y in WATCHED]
    values, passes = pulled(made, watched, feed, lambda o: default_cotangents(o, 1000, 2))
    changed = attention()
    value = changed.graph.initializers["wv"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() + E, name="wv")
    moved = run(changed, feed)["logits"].astype(np.float64) - values["z"]
    wanted = float(np.sum(moved**2) / np.sum(values["z"] ** 2))
    found = np.mean([float(np.vdot(pairs[2][1], pairs[2][0] @ E)) ** 2 for pairs in passes])
    assert found == pytest.approx(wanted, rel=5 * math.sqrt(2 / 1000))


@pytest.mark.parametrize(
    "z", [np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32), np.full((2, 3), -np.inf, np.float32)]
)
@pytest.mark.parametrize("name", ["logits", "z"])
def test_probes_of_nothing(name: str, z: Array) -> None:
    for v in default_cotangents({name: z}, 2, 0):
        assert all(a.shape == z.shape and np.isfinite(a).all() for a in v.values())
    again = default_cotangents({name: z}, 2, 0)
    assert all(
        np.array_equal(v[n], w[n])
        for v, w in zip(again, default_cotangents({name: z}, 2, 0), strict=True)
        for n in v
    )


# --- real models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["minilm", "tiny_llama", "tiny_vlm", "open_nsfw", pytest.param("smollm2", marks=pytest.mark.slow)]
)
def test_real_models(name: str) -> None:
    """Every site has a derivative, and the values are the runtime's."""
    pytest.importorskip("torch")
    folder = exported(name)
    made = load(folder / "model.onnx").model
    data = folder / "calib.npz" if (folder / "calib.npz").is_file() else folder / "calib"
    feed = dict(next(iter(open_feeds(data, inputs_of(made), batch=2))))
    if name == "smollm2":
        feed |= {n: feed[n][:1, :64] for n in ("input_ids", "attention_mask", "position_ids")}
        feed |= {n: a[:1] for n, a in feed.items() if n.startswith("past")}
    sites = [s for s in find(made).sites if s.path == "" and s.op in ("MatMul", "Gemm", "Conv", "Gather")]
    watched = [(s.node.inputs[0 if s.operand else 1].name or "", s.node.outputs[0].name or "") for s in sites]
    outputs = [v.name or "" for v in made.graph.outputs if not (v.name or "").startswith("present")]
    probes = partial(default_cotangents, count=1, seed=0, mask=feed.get("attention_mask"))
    values, [pairs] = pulled(made, watched, feed, probes, outputs)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    runtime = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    for output, wanted in zip(outputs, runtime.run(outputs, feed), strict=True):
        close(values[output], wanted, FLOAT32)
    assert len(pairs) == len(sites) > 10
    assert all(np.isfinite(g).all() and g.any() for _, g in pairs)
    assert kind_of(pairs[0][1].dtype) == TensorProto.FLOAT
