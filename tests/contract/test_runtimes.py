"""What holds for every registered runtime that works here, found through the registry."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile import registry
from lrcompile.errors import BuildError, LrcompileError, UsageError
from lrcompile.interfaces import BuildOptions, Engine

TARGETS = [
    pytest.param(
        target,
        marks=pytest.mark.skipif(
            not (there := runtime.availability(target)).ok or bool(there.unrunnable),
            reason=there.reason or there.unrunnable or "available",
        ),
    )
    for runtime in registry.runtimes().values()
    for target in runtime.targets()
]
pytestmark = pytest.mark.parametrize("target", TARGETS)

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
Port = tuple[str, int, list[int | str | None] | None]
W = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


def save(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[Port],
    outputs: list[Port],
    weights: dict[str, np.ndarray] | None = None,
    *,
    functions: Iterable[onnx.FunctionProto] = (),
    external: bool = False,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*port) for port in inputs],
        [helper.make_tensor_value_info(*port) for port in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lrcompile", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def matmul(folder: Path, external: bool = False) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mul")
    return save(
        folder, [node], [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 3])], {"w": W}, external=external
    )


def identity(folder: Path, kind: int, shape: list[int | str | None] | None) -> Path:
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    return save(folder, [node], [("x", kind, shape)], [("y", kind, shape)])


def build(target: str, path: Path, **options: bool) -> Engine:
    return registry.runtime_of(target).build(path, BuildOptions(target, **options))  # type: ignore[arg-type]


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("external", [False, True])
def test_matmul_is_numpys(target: str, tmp_path: Path, external: bool, optimize: bool) -> None:
    with build(target, matmul(tmp_path, external), optimize=optimize) as engine:
        for rows in (2, 5, 0):  # "n" is dynamic, and nothing at all is legal
            x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
            y = engine.run({"x": x})["y"]
            assert y.dtype == np.float32
            assert y.shape == (rows, 3)
            np.testing.assert_allclose(y, x @ W, rtol=1e-5, atol=1e-6)
        assert engine.describe()["version"]


def test_outputs_come_in_the_models_order(target: str, tmp_path: Path) -> None:
    nodes = [helper.make_node(op, ["x"], [op]) for op in ("Neg", "Abs", "Sqrt")]
    outputs: list[Port] = [(name, FLOAT, [2]) for name in ("Sqrt", "Neg", "Abs")]
    with build(target, save(tmp_path, nodes, [("x", FLOAT, [2])], outputs)) as engine:
        assert list(engine.run({"x": np.ones(2, np.float32)})) == ["Sqrt", "Neg", "Abs"]


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1, 2]], np.float64),
        np.array([[1, 2]], np.float16),
        np.array([[1, 2]], ml_dtypes.bfloat16),
        np.zeros((0, 2), ml_dtypes.bfloat16),
        np.array([[1, 2]], ml_dtypes.float8_e4m3fn),
        np.array([[1, -2]], np.int8),
        np.array([[True, False]]),
        np.array([["a", "héllo"]], dtype=object),
        np.zeros((0, 2), dtype=object),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_every_type_goes_in_and_comes_out(target: str, tmp_path: Path, array: np.ndarray) -> None:
    kind = STRING if array.dtype == object else helper.np_dtype_to_tensor_dtype(array.dtype)
    with build(target, identity(tmp_path, kind, ["n", 2])) as engine:
        out = engine.run({"x": array})["y"]
    assert out.dtype == array.dtype
    assert out.shape == array.shape
    assert out.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scalars_and_unknown_ranks(target: str, tmp_path: Path, dtype: type) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    with build(target, identity(tmp_path, kind, None)) as engine:
        for shape in ((), (3,), (1, 2, 1)):
            assert engine.run({"x": np.ones(shape, dtype)})["y"].shape == shape


def test_an_input_with_a_default_may_be_left_out(target: str, tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "b"], ["y"])
    one = np.ones(2, np.float32)
    path = save(tmp_path, [node], [("x", FLOAT, [2]), ("b", FLOAT, [2])], [("y", FLOAT, [2])], {"b": one})
    with build(target, path) as engine:
        assert engine.run({"x": one})["y"].tolist() == [2, 2]
        assert engine.run({"x": one, "b": 3 * one})["y"].tolist() == [4, 4]


def test_local_functions_in_any_order(target: str, tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("lrcompile", 1)]
    inner = [helper.make_node("inner", ["x", "w"], ["y"], domain="lrcompile")]
    functions = [
        helper.make_function("lrcompile", "outer", ["x", "w"], ["y"], inner, opsets),
        helper.make_function(
            "lrcompile", "inner", ["x", "w"], ["y"], [helper.make_node("MatMul", ["x", "w"], ["y"])], opsets
        ),
    ]
    node = helper.make_node("outer", ["x", "w"], ["y"], domain="lrcompile", name="call")
    path = save(
        tmp_path, [node], [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 3])], {"w": W}, functions=functions
    )
    with build(target, path) as engine:
        np.testing.assert_allclose(engine.run({"x": np.eye(4, dtype=np.float32)})["y"], W, rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, "no array was given for input 'x' (float32, nx4)"),
        ({"x": np.ones((2, 4), np.float32), "z": np.ones(1)}, "the model has no input 'z'; its inputs: 'x'"),
        ({"x": np.ones((2, 4))}, "input 'x' (float32, nx4) was given float64"),
        ({"x": np.ones(4, np.float32)}, "was given shape (4,)"),
        ({"x": np.ones((2, 5), np.float32)}, "was given shape (2, 5)"),
    ],
)
def test_wrong_feeds_are_told_in_one_sentence(
    target: str, tmp_path: Path, feeds: dict[str, np.ndarray], words: str
) -> None:
    with build(target, matmul(tmp_path)) as engine:
        with pytest.raises(UsageError) as caught:
            engine.run(feeds)
        assert words in str(caught.value)
        assert engine.run({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 3)


def test_a_file_that_is_no_model(target: str, tmp_path: Path) -> None:
    with pytest.raises(LrcompileError, match=r"missing\.onnx"):
        build(target, tmp_path / "missing.onnx")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"This is prose, not protobuf. " * 9)
    with pytest.raises(BuildError, match=r"junk\.onnx"):
        build(target, junk)


def test_an_unknown_operator_is_named(target: str, tmp_path: Path) -> None:
    path = save(tmp_path, [helper.make_node("Nope", ["x"], ["y"])], [("x", FLOAT, [2])], [("y", FLOAT, [2])])
    with pytest.raises(BuildError, match="Nope") as caught:
        build(target, path)
    assert str(caught.value).isprintable()


def test_a_run_that_fails_is_told_in_the_runtimes_words(target: str, tmp_path: Path) -> None:
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], name="bend")
    path = save(tmp_path, [node], [("x", FLOAT, [6]), ("shape", INT64, [1])], [("y", FLOAT, None)])
    with build(target, path) as engine, pytest.raises(BuildError, match=r"cannot run the model: .*reshape"):
        engine.run({"x": np.ones(6, np.float32), "shape": np.array([4])})


def test_what_a_runtime_refuses_is_told_in_its_words(target: str, tmp_path: Path) -> None:
    """Two nodes of one name are legal ONNX, and too much for ONNX Runtime."""
    nodes = [helper.make_node("Relu", [a], [b], name="twin") for a, b in ("xh", "hy")]
    path = save(tmp_path, nodes, [("x", FLOAT, [2])], [("y", FLOAT, [2])])
    x = np.ones(2, np.float32)
    try:
        with build(target, path) as engine:
            np.testing.assert_array_equal(engine.run({"x": x})["y"], x)
    except BuildError as error:
        assert "two nodes with same node name (twin)" in str(error)
        assert str(error).isprintable()


def test_availability_names_versions(target: str) -> None:
    assert registry.runtime_of(target).availability(target).versions
