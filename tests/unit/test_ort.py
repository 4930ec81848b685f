"""ONNX Runtime's targets, as far as no GPU is needed: options, placement, missing providers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

pytest.importorskip("onnxruntime")

from lrcompile.errors import BuildError, UsageError
from lrcompile.interfaces import BuildOptions
from lrcompile.records import EngineOptions, ShapeRange
from lrcompile.registry import runtime_of
from lrcompile_runtimes._ort_devices import TARGETS, _dimensions, provider_options
from lrcompile_runtimes._ort_nodes import _harmless, _may_stay, _read
from tests.graphs import model, node, normal, proto


def given(target: str, *, cache: Path | None = None, exact: bool = True, **engine: object) -> dict[str, str]:
    options = BuildOptions(target, exact=exact, cache=cache, engine=EngineOptions(**engine))  # type: ignore[arg-type]
    return provider_options(options)


def test_engine_options_become_the_providers_own() -> None:
    assert given("ort-cpu") == {}
    assert given("ort-cuda", cuda_graph=True, workspace=1 << 20)["enable_cuda_graph"] == "1"
    assert given("ort-cuda", workspace=1 << 20)["gpu_mem_limit"] == "1048576"
    assert given("ort-cuda")["use_tf32"] == "0"
    assert "use_tf32" not in given("ort-cuda", exact=False)
    assert given("ort-cuda", provider=(("use_tf32", "1"),))["use_tf32"] == "1"
    shapes = (ShapeRange("x", (1, 8), (4, 8), (16, 8)), ShapeRange("y", (1,), (2,), (3,)))
    made = given("ort-tensorrt", shapes=shapes, level=3, cache=Path("kept"))
    assert made["trt_profile_min_shapes"] == "x:1x8,y:1"
    assert made["trt_profile_opt_shapes"] == "x:4x8,y:2"
    assert made["trt_profile_max_shapes"] == "x:16x8,y:3"
    assert made["trt_builder_optimization_level"] == "3"
    assert (made["trt_engine_cache_enable"], made["trt_engine_cache_path"]) == ("1", "kept")
    assert given("ort-trt-rtx", cache=Path("kept")) == {"nv_runtime_cache_path": "kept"}


@pytest.mark.parametrize(
    ("target", "engine", "flag"),
    [
        ("ort-cpu", {"cuda_graph": True}, "--cuda-graph"),
        ("ort-cpu", {"cpu_nodes": True}, "--cpu-nodes"),
        ("ort-cuda", {"streaming": 1}, "--weight-streaming"),
        ("ort-cuda", {"level": 1}, "--level"),
        ("ort-tensorrt", {"refittable": True}, "--refittable"),
    ],
)
def test_an_option_without_a_use_is_refused_by_name(
    target: str, engine: dict[str, object], flag: str
) -> None:
    with pytest.raises(UsageError, match=f"{flag}: target {target} has no use for it"):
        given(target, **engine)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "ort-cpu"])
def test_a_missing_provider_is_an_error(target: str, tmp_path: Path) -> None:
    there = runtime_of(target).availability(target)
    if there.ok:
        pytest.skip("it is there")
    assert "pip install" in there.reason
    path = tmp_path / "model.onnx"
    onnx.save(proto([node("Relu", ["x"], ["y"])], {"x": (2,)}, ["y"]), path)
    with pytest.raises(BuildError) as caught:
        runtime_of(target).build(path, BuildOptions(target))
    assert str(caught.value) == there.reason


def test_what_may_run_on_the_cpu_beside_a_gpu() -> None:
    """Integers, and numbers that come from shapes alone; not what is computed from data."""
    nodes = [
        node("Shape", ["x"], ["s"], name="shape", end=1),
        node("Concat", ["s", "w"], ["f"], name="concat", axis=0),
        node("Cast", ["s"], ["c"], name="cast", to=1),
        node("Sqrt", ["c"], ["r"], name="root"),
        node("Mul", ["x", "r"], ["m"], name="scaled"),
        node("ArgMax", ["m"], ["i"], name="best", axis=-1),
        node("Reshape", ["m", "f"], ["y"], name="flat"),
    ]
    made = model(nodes, {"x": ("n", 4)}, ["y"], {"w": np.array([4]), "unused": normal(2)}, opset=20)
    named, typed = _harmless(made)
    assert {name for name, fine in named.items() if fine} == {"shape", "concat", "cast", "root", "best"}
    assert typed["Mul"] is False
    assert typed["Sqrt"] is True


def test_nodes_that_onnx_runtime_made_may_stay_on_the_cpu() -> None:
    """By the rest of their type: what has a kernel elsewhere is not there for want of one. Nodes without a name get no such credit."""
    named, typed = {"rows": False, "shape": True}, {"Gather": False, "Shape": True}
    made, unnamed = (
        SimpleNamespace(name="Gather_1", op_type="Gather"),
        SimpleNamespace(name="", op_type="Gather"),
    )
    assert _may_stay(made, named, typed, {"Gather", "MatMul"})
    assert not _may_stay(made, named, typed, {"MatMul"})
    assert not _may_stay(unnamed, named, typed, {"Gather"})
    assert not _may_stay(SimpleNamespace(name="rows", op_type="Gather"), named, typed, {"Gather"})
    assert _may_stay(SimpleNamespace(name="shape", op_type="Shape"), named, typed, set())


def test_dimensions_of_a_fixed_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        proto([node("MatMul", ["x", "w"], ["y"])], {"x": ("n", "m", 4)}, ["y"], {"w": normal(4, 2)}), path
    )
    fixed = ShapeRange("x", (3, 0, 4), (3, 0, 4), (3, 0, 4))
    assert _dimensions(path, [fixed]) == {"n": 3, "m": 0}
    assert _dimensions(path, [ShapeRange("x", (1, 0, 4), (3, 0, 4), (3, 0, 4))]) == {}


def test_an_optimized_model_with_a_constant_twice_is_read(tmp_path: Path) -> None:
    """As ONNX Runtime 1.31.1 writes some bodies: the same constant as initializer and as node."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [])
    nodes = [node("Constant", [], ["one"], name="twice", value=one), node("Neg", ["one"], ["z"], name="neg")]
    body = helper.make_graph(nodes, "body", [], [out], [one])
    choice = node("If", ["x"], ["y"], name="if", then_branch=body, else_branch=body)
    path = tmp_path / "model.onnx"
    onnx.save(proto([choice], {"x": ((), np.bool_)}, ["y"]), path)
    with pytest.raises(ir.serde.SerdeError):
        ir.load(path)
    assert sorted(n.name or "" for n in _read(path).graph.all_nodes()) == ["if", "neg", "neg"]
