"""Graphs in 16 bits: legal, the same interface, close in value, with float32 where it is needed and nothing done twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lrcompile.load import load
from lrcompile.precision import HALVES, convert, notes_of, widened
from lrcompile.records import Precision
from tests.graphs import Array, node, normal, proto
from tests.odd_graphs import corpus

ort = pytest.importorskip("onnxruntime")

HALF_RANGE = 65504.0
# What 11 bits make of a chain of a few products of size one; a wrong Cast or constant is off by more than 0.1.
LOSS = {"fp16": 1e-2, "bf16": 8e-2}
BOTH: tuple[Precision, ...] = ("fp16", "bf16")


def converted(model: onnx.ModelProto, precision: Precision = "fp16") -> ir.Model:
    """What `convert` makes, checked in every way that needs no run."""
    source = ir.from_proto(model)
    made = convert(source, precision)
    assert ir.to_proto(source) == ir.to_proto(ir.from_proto(model)), "the model itself has changed"
    legal(made)
    assert convert(made, precision) is made
    return made


def legal(model: ir.Model) -> None:
    """Checked, and with types inferred strictly from the inputs alone."""
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    onnx.checker.check_model(inferred)


def run(model: onnx.ModelProto | ir.Model, feed: Mapping[str, Array]) -> list[Array]:
    """ONNX Runtime without its optimizations: with them it runs a DequantizeLinear of float16 in a body wrongly (1.31.1)."""
    written = ir.to_proto(model) if isinstance(model, ir.Model) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    outputs: list[Array] = ort.InferenceSession(written.SerializeToString(), options).run(None, dict(feed))
    return outputs


def types(model: ir.Model) -> dict[str, str]:
    """Operator and the type that it computes in, by node name; made nodes left out."""
    made = {}
    for n in ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model))).graph:
        if "lrcompile.precision" not in n.metadata_props:
            assert n.outputs[0].dtype is not None
            made[n.name or n.op_type] = n.outputs[0].dtype.numpy().name
    return made


def casts(model: ir.Model) -> int:
    return sum(n.op_type == "Cast" for n in model.graph)


def distance(a: Array, b: Array) -> float:
    """Relative, over what is finite; the same places must be NaN."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if a.dtype.kind != "f":
        return 0.0
    assert np.array_equal(np.isnan(a), np.isnan(b))
    fits = np.isfinite(a) & (np.abs(a) < HALF_RANGE)
    return float(np.linalg.norm(a[fits] - b[fits]) / (np.linalg.norm(a[fits]) + 1e-6))


# --- any graph -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", BOTH)
def test_odd_graphs(precision: Precision) -> None:
    changed: Counter[bool] = Counter()
    for graph in corpus(3, 90):
        model = load(ir.from_proto(graph.model)).model
        made = convert(model, precision)
        changed[made is not model] += 1
        if made is model:
            continue
        assert convert(made, precision) is made, graph
        wide = widened(model, precision)
        if graph.passes_checker:
            legal(made)
            legal(wide)
        feed = graph.feeds[0]
        if graph.runs_on_ort:
            expected = run(model, feed)
            for candidate in (wide, made) if precision == "fp16" else (wide,):
                for a, b in zip(expected, run(candidate, feed), strict=True):
                    assert distance(a, b) < LOSS[precision], graph
    assert min(changed[True], changed[False]) > 20  # float64, float16 and integer graphs stay what they are


def mlp(opset: int = 18) -> onnx.ModelProto:
    return proto(
        [
            node("MatMul", ["x", "w"], ["h"], name="first"),
            node("Relu", ["h"], ["r"], name="relu"),
            node("MatMul", ["r", "v"], ["y"], name="second"),
        ],
        {"x": ("batch", 64)},
        ["y"],
        {"w": normal(64, 48) / 8, "v": normal(48, 32) / 7},
        opset=opset,
    )


@pytest.mark.parametrize("precision", BOTH)
def test_a_chain_has_two_casts_and_half_the_bytes(precision: Precision) -> None:
    made = converted(mlp(), precision)
    assert casts(made) == 2
    assert {v.dtype for v in made.graph.initializers.values()} == {HALVES[precision]}
    assert [(v.name, v.dtype) for v in (*made.graph.inputs, *made.graph.outputs)] == [
        ("x", ir.DataType.FLOAT), ("y", ir.DataType.FLOAT)
    ]  # fmt: skip
    assert [n.name for n in made.graph if n.op_type != "Cast"] == ["first", "relu", "second"]


def test_values_are_those_of_float16() -> None:
    model, x = mlp(), normal(5, 64, seed=2)
    made, wide = run(converted(model), {"x": x})[0], run(widened(ir.from_proto(model), "fp16"), {"x": x})[0]
    exact = run(model, {"x": x})[0]
    assert 1e-5 < distance(exact, made) < 2e-3  # rounded, and only rounded
    assert 1e-5 < distance(exact, wide) < 2e-3


def test_bfloat16_is_what_the_reference_evaluator_says() -> None:
    model, x = mlp(), normal(5, 64, seed=2)
    exact = run(model, {"x": x})[0]
    made = ReferenceEvaluator(ir.to_proto(converted(model, "bf16"))).run(None, {"x": x})[0]
    assert made.dtype == np.float32
    assert 1e-4 < distance(exact, made) < 2e-2


def test_widened_weights_are_rounded_to_nearest() -> None:
    model = ir.from_proto(mlp())
    for precision, dtype in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        made = widened(model, precision)  # type: ignore[arg-type]
        for name, value in made.graph.initializers.items():
            original = model.graph.initializers[name].const_value.numpy()
            assert np.array_equal(value.const_value.numpy(), original.astype(dtype).astype(np.float32))


def test_weights_are_read_when_they_are_written() -> None:
    model, reads = ir.from_proto(mlp()), Counter[str]()
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy()

        def load_it(name: str = name, array: Array = array) -> ir.Tensor:
            reads[name] += 1
            return ir.Tensor(array)

        value.const_value = ir.LazyTensor(
            load_it, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name
        )
    made = convert(model, "fp16")
    before = dict(reads)  # read once, to see what exceeds the range, and not kept
    assert all(isinstance(v.const_value, ir.LazyTensor) for v in made.graph.initializers.values())
    ir.to_proto(made)
    assert all(reads[name] > before[name] for name in before)


def test_nothing_to_do_gives_the_model_back() -> None:
    for dtype in (np.float16, np.float64):
        model = ir.from_proto(
            proto(
                [node("MatMul", ["x", "w"], ["y"])],
                {"x": ((2, 8), dtype)},
                {"y": dtype},
                {"w": normal(8, 4, dtype=dtype)},
            )
        )
        assert convert(model, "fp16") is model
        assert widened(model, "fp16") is model
    single = ir.from_proto(mlp())
    assert convert(single, "fp32") is single


# --- islands -------------------------------------------------------------------------------------------------------


def rms_norm() -> onnx.ModelProto:
    """As exporters write it, behind a projection."""
    return proto(
        [
            node("MatMul", ["x", "w"], ["h"], name="before"),
            node("Pow", ["h", "two"], ["square"], name="pow"),
            node("ReduceMean", ["square"], ["mean"], name="mean", axes=[-1]),
            node("Add", ["mean", "eps"], ["safe"], name="add"),
            node("Sqrt", ["safe"], ["root"], name="sqrt"),
            node("Reciprocal", ["root"], ["inverse"], name="reciprocal"),
            node("Mul", ["h", "inverse"], ["normal"], name="mul"),
            node("Mul", ["normal", "gain"], ["scaled"], name="gain"),
            node("MatMul", ["scaled", "v"], ["y"], name="after"),
        ],
        {"x": (4, 64)},
        ["y"],
        {
            "w": normal(64, 64),
            "two": np.float32(2),
            "eps": np.float32(1e-12),
            "gain": normal(64),
            "v": normal(64, 8),
        },
        opset=17,
    )


def test_a_norm_is_one_island() -> None:
    made = converted(rms_norm())
    inside = {"pow", "mean", "add", "sqrt", "reciprocal", "mul"}
    assert {n for n, t in types(made).items() if t == "float32"} == inside
    assert casts(made) == 4  # x, into the island once, out of it, y
    # rows of zeros and rows whose squares leave half's range
    x = np.concatenate([np.zeros((1, 64)), np.full((1, 64), 40.0), normal(2, 64)]).astype(np.float32)
    assert distance(run(rms_norm(), {"x": x})[0], run(made, {"x": x})[0]) < LOSS["fp16"]


def test_without_the_island_the_norm_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    monkeypatch.setattr("lrcompile.islands._fixed", lambda *_: set())
    made, x = convert(ir.from_proto(rms_norm()), "fp16"), np.zeros((4, 64), np.float32)
    assert np.isnan(run(made, {"x": x})[0]).all()


def masked_softmax(fill: float, opset: int = 18) -> onnx.ModelProto:
    return proto(
        [
            node("MatMul", ["q", "w"], ["scores"], name="scores"),
            node("Where", ["keep", "zero", "fill"], ["mask"], name="mask"),
            node("Unsqueeze", ["mask", "first"], ["masks"], name="unsqueeze"),
            node("Add", ["scores", "masks"], ["masked"], name="add"),
            node("Softmax", ["masked"], ["weights"], name="softmax"),
            node("MatMul", ["weights", "v"], ["y"], name="out"),
        ],
        {"q": (1, 3, 16), "keep": ((3, 5), np.bool_)},
        ["y"],
        {"w": -10 * np.abs(normal(16, 5)), "zero": np.float32(0), "fill": np.float32(fill), "v": normal(5, 4), "first": np.array([0])},
        opset=opset,
    )  # fmt: skip


def test_a_mask_beyond_the_range_takes_its_softmax_along() -> None:
    """A row that is masked everywhere: in float16 all its scores were -inf, and the row NaN."""
    lowest = float(np.finfo(np.float32).min)
    model = masked_softmax(lowest)
    made = converted(model)
    assert {n for n, t in types(made).items() if t == "float32"} == {"mask", "unsqueeze", "add", "softmax"}
    keep = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], np.bool_)
    feed = {"q": 10 * np.abs(normal(1, 3, 16)), "keep": keep}
    assert distance(run(model, feed)[0], run(made, feed)[0]) < LOSS["fp16"]
    assert types(converted(masked_softmax(-1e4)))["softmax"] == "float16"
    assert types(converted(model, "bf16"))["softmax"] == "bfloat16"  # there a score is lost in the mask


@pytest.mark.parametrize("how", ["initializer", "constant", "fill"])
def test_constants_beyond_the_range_are_clipped(how: str) -> None:
    big, made_by = np.float32(-3e38), []
    if how == "constant":
        made_by = [node("Constant", [], ["low"], value=numpy_helper.from_array(big))]
    elif how == "fill":
        value = numpy_helper.from_array(np.array([big]))
        made_by = [node("ConstantOfShape", ["shape"], ["low"], value=value)]
    constants = {"w": normal(8, 8)}
    constants |= (
        {"low": big} if how == "initializer" else {"shape": np.array([], np.int64)} if how == "fill" else {}
    )
    nodes = [*made_by, node("MatMul", ["x", "w"], ["h"]), node("Where", ["c", "h", "low"], ["z"]), node("Relu", ["z"], ["y"]),
             node("Identity", ["z"], ["raw"])]  # fmt: skip
    model = proto(nodes, {"x": (2, 8), "c": ((2, 8), np.bool_)}, ["y", "raw"], constants)
    made = converted(model)
    assert any("clipped to 65504" in note for note in notes_of(made))
    outputs = run(made, {"x": normal(2, 8), "c": np.zeros((2, 8), np.bool_)})
    assert np.all(outputs[1] == -HALF_RANGE)
    assert not any("clipped" in note for note in notes_of(converted(mlp())))


def test_infinity_stays() -> None:
    model = proto(
        [node("MatMul", ["x", "w"], ["h"]), node("Where", ["c", "h", "low"], ["y"])],
        {"x": (2, 8), "c": ((2, 8), np.bool_)}, ["y"], {"w": normal(8, 8), "low": np.float32(-np.inf)},
    )  # fmt: skip
    feed = {"x": normal(2, 8), "c": np.zeros((2, 8), np.bool_)}
    assert np.all(np.isneginf(run(converted(model), feed)[0]))


def test_angles_are_computed_in_float32() -> None:
    """Positions up to 3000: bfloat16 would know only every sixteenth, float16 every second."""
    nodes = [
        node("Cast", ["positions"], ["p"], name="cast", to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["p", "last"], ["column"], name="unsqueeze"),
        node("MatMul", ["column", "frequencies"], ["angle"], name="angles"),
        node("Cos", ["angle"], ["cos"], name="cos"),
        node("MatMul", ["x", "w"], ["h"], name="projection"),
        node("Mul", ["h", "cos"], ["y"], name="turn"),
    ]
    frequencies = (10000.0 ** -np.linspace(0, 0.9, 8)).astype(np.float32)[None]
    model = proto(
        nodes, {"positions": ((6,), np.int64), "x": (6, 16)}, ["y"],
        {"frequencies": frequencies, "w": normal(16, 8), "last": np.array([1])},
    )  # fmt: skip
    made = converted(model)
    assert [n for n, t in types(made).items() if t == "float16"] == ["projection", "turn"]
    feed = {"positions": np.array([0, 1, 257, 2049, 2999, 3000]), "x": normal(6, 16)}
    assert distance(run(model, feed)[0], run(made, feed)[0]) < LOSS["fp16"]


def test_a_guard_against_zero_is_kept() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="h"),
        node("ReduceSum", ["h", "axis"], ["sum"], name="sum"),
        node("Clip", ["sum", "least"], ["safe"], name="clip"),
        node("Div", ["h", "safe"], ["y"], name="div"),
    ]
    constants = {"w": normal(8, 8), "axis": np.array([-1]), "least": np.float32(1e-9)}
    made = converted(proto(nodes, {"x": (2, 8)}, ["y"], constants))
    assert types(made) == {"h": "float16", "sum": "float32", "clip": "float32", "div": "float32"}
    assert np.all(run(made, {"x": np.zeros((2, 8), np.float32)})[0] == 0)


# --- types that something else fixes -------------------------------------------------------------------------------


def test_a_small_constant_that_both_read_is_stored_twice_and_a_large_one_once() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="h"),
        node("Pow", ["h", "two"], ["p"], name="p"),
        node("Mul", ["h", "two"], ["m"], name="m"),
        node("Exp", ["w"], ["e"], name="e"),
        node("MatMul", ["m", "e"], ["y"], name="y"),
    ]
    model = proto(nodes, {"x": (2, 40)}, ["y", "p"], {"w": normal(40, 40) / 7, "two": np.float32(2)})
    made = converted(model)
    stored = {n: v.dtype for n, v in made.graph.initializers.items()}
    assert stored == {"w": ir.DataType.FLOAT16, "two": ir.DataType.FLOAT, "two/float16": ir.DataType.FLOAT16}
    feed = {"x": normal(2, 40)}
    for a, b in zip(run(model, feed), run(made, feed), strict=True):
        assert distance(a, b) < LOSS["fp16"]


def test_a_body_keeps_its_interface_and_computes_in_halves() -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"], name="inner"), node("Identity", ["go"], ["on"])],
        "body",
        [info("i", onnx.TensorProto.INT64, []), info("go", onnx.TensorProto.BOOL, []), info("state", onnx.TensorProto.FLOAT, [2, 8])],
        [info("on", onnx.TensorProto.BOOL, []), info("next", onnx.TensorProto.FLOAT, [2, 8])],
    )  # fmt: skip
    model = proto(
        [node("Loop", ["count", "", "x"], ["y"], body=body)], {"x": (2, 8)}, ["y"],
        {"count": np.array(3), "w": normal(8, 8) / 3},
    )  # fmt: skip
    model.graph.output[0].CopyFrom(info("y", onnx.TensorProto.FLOAT, [2, 8]))
    made = converted(model)
    inner = next(n for n in made.graph.all_nodes() if n.name == "inner")
    assert inner.inputs[1] is made.graph.initializers["w"]
    assert inner.outputs[0].dtype == ir.DataType.FLOAT16
    feed = {"x": normal(2, 8)}
    assert 0 < distance(run(model, feed)[0], run(made, feed)[0]) < LOSS["fp16"]


def test_what_has_no_form_in_bfloat16_is_named() -> None:
    conv = proto([node("Conv", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])], {"x": (1, 3, 8, 8)}, ["y"],
                 {"w": normal(16, 3, 5, 5)}, opset=17)  # fmt: skip
    made = converted(conv, "bf16")
    assert any("Conv" in note for note in notes_of(made))
    assert made.graph.initializers["w"].dtype == ir.DataType.FLOAT
    assert converted(conv).graph.initializers["w"].dtype == ir.DataType.FLOAT16


def test_small_scales_stay() -> None:
    def quantized(scale: float) -> onnx.ModelProto:
        codes = np.arange(64, dtype=np.int8).reshape(8, 8)
        nodes = [
            node("DequantizeLinear", ["q", "s"], ["w"], name="dq"),
            node("MatMul", ["x", "w"], ["y"], name="mm"),
        ]
        return proto(nodes, {"x": (2, 8)}, ["y"], {"q": codes, "s": np.float32(scale)}, opset=21)

    assert types(converted(quantized(1e-2)))["dq"] == "float16"
    assert types(converted(quantized(1e-6)))["dq"] == "float32"
    assert types(converted(quantized(1e-6), "bf16"))["dq"] == "bfloat16"


def test_casts_of_the_users_that_became_empty_are_gone() -> None:
    nodes = [
        node("Cast", ["w"], ["wide"], to=onnx.TensorProto.FLOAT, name="user"),
        node("MatMul", ["x", "wide"], ["y"], name="mm"),
    ]
    model = proto(nodes, {"x": (2, 8)}, ["y"], {"w": normal(8, 8).astype(np.float16)})
    made = converted(model)
    assert types(made) == {"mm": "float16"}
    assert casts(made) == 2


def test_integers_and_doubles_are_not_touched() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="h"),
        node("Cast", ["h"], ["d"], to=onnx.TensorProto.DOUBLE, name="d"),
        node("MatMul", ["d", "v"], ["y"], name="y"),
        node("ArgMax", ["h"], ["best"], name="best", axis=1),
    ]
    model = proto(
        nodes,
        {"x": (2, 8)},
        {"y": np.float64, "best": np.int64},
        {"w": normal(8, 8), "v": normal(8, 3, dtype=np.float64)},
    )
    made = converted(model)
    assert types(made) == {"h": "float16", "d": "float64", "y": "float64", "best": "int64"}
    assert made.graph.initializers["v"].const_value is not None
    assert made.graph.initializers["v"].dtype == ir.DataType.DOUBLE
