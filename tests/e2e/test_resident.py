"""What a weight in few bits takes where it runs: memory of ONNX Runtime, engines of TensorRT-RTX that are built without a GPU.

`benchmarks/resident.py` prints the figures, and `docs/resident.md` has them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import lrcompile
from lrcompile import Child
from lrcompile.config import options_from
from tests.graphs import node, normal, proto

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = ("8.9", "12.0")
CODED = ("int8", "float8", "int4-32s32+", "int4-64s32+", "int4-128s32+")  # in TensorRT-RTX


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The benchmark as a module, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("resident")


@pytest.fixture(scope="module")
def child(benchmark: ModuleType) -> Iterator[Child]:
    with Child(timeout=500) as child:
        yield child


# --- ONNX Runtime -------------------------------------------------------------------------------------------------


def test_onnx_runtime_holds_codes(benchmark: ModuleType, tmp_path: Path) -> None:
    """Codes and float32 scales, and a tenth for what the allocator wastes: 3 bits of four are not paid for twice."""
    pytest.importorskip("onnxruntime")
    held, stored = benchmark.held(4, 1024, "int4", tmp_path), benchmark.stored(4, 1024, "int4")
    scales = 3 * 4 * 1024 * 1024 // 32  # of 8 bits in the file, of 32 in memory
    assert stored <= held <= 1.1 * (stored + scales) + (2 << 20)
    assert held <= 0.3 * benchmark.stored(4, 1024, "float")


@pytest.mark.slow
def test_onnx_runtime_holds_a_fifth_of_float32(benchmark: ModuleType, tmp_path: Path) -> None:
    """24 MatMul of 2048 x 2048. Two bits take four there."""
    pytest.importorskip("onnxruntime")
    whole = benchmark.held(24, 2048, "float", tmp_path)
    assert whole >= benchmark.stored(24, 2048, "float")
    for name, most in (("int8", 0.31), ("int4", 0.2), ("uint2", 0.2)):
        assert benchmark.held(24, 2048, name, tmp_path) <= most * whole, name


# --- TensorRT-RTX -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CODED)
def test_engines_hold_codes(
    name: str, capability: str, benchmark: ModuleType, child: Child, tmp_path: Path
) -> None:
    """The weights take what is counted; the rest of the file, kernels and the like, does not grow with them."""
    pytest.importorskip("tensorrt_rtx")
    size, weights = benchmark.engine(4, 512, name, capability, child, tmp_path)
    stored = benchmark.stored(4, 512, name)
    assert stored <= weights <= 1.01 * stored + 4096
    assert weights < size < weights + (1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_engines_hold_a_fifth_of_float32(
    capability: str, benchmark: ModuleType, child: Child, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    size = {
        n: benchmark.engine(24, 2048, n, capability, child, tmp_path)[0] for n in ("float", "float16", *CODED)
    }
    assert size["float"] >= benchmark.stored(24, 2048, "float")
    for name, most in (
        ("float16", 0.51),
        ("int8", 0.26),
        ("float8", 0.26),
        ("int4-32s32+", 0.17),
        ("int4-128s32+", 0.14),
    ):
        assert size[name] <= most * size["float"], name


def test_a_published_engine_holds_int4_with_positive_scales(child: Child, tmp_path: Path) -> None:
    """`--storage int4-32s32` means positive scales there, and the manifest says so."""
    pytest.importorskip("tensorrt_rtx")
    nodes = [
        node("MatMul", ["x", "a"], ["h"], name="up"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "b"], ["y"], name="down"),
    ]
    weights = {"a": normal(256, 512), "b": normal(512, 256)}
    onnx.save(
        proto(nodes, {"x": ("n", 256)}, ["y"], weights, opset=21, ir_version=10), tmp_path / "model.onnx"
    )
    np.savez(tmp_path / "data.npz", x=normal(64, 256, seed=1))
    options = options_from(
        {
            "target": "trt-rtx", "storage": "int4-32s32", "bits": 5.0, "data": str(tmp_path / "data.npz"), "capabilities": ",".join(CAPABILITIES),
            "shape": ["x:1x256,8x256,64x256"], "timeout": 300.0, "cache": str(tmp_path / "cache"),
        }
    )  # fmt: skip
    result = lrcompile.compile(tmp_path / "model.onnx", tmp_path / "out", options, child=child)
    assert result.evidence.verdict == "passed"
    manifest = json.loads((tmp_path / "out" / "lrcompile.json").read_text())
    assert {s["storage"] for s in manifest["sites"]} == {"int4-32s32+"}
    stored = {
        t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    }
    scales = [array for name, array in stored.items() if "scale" in name]
    assert len(scales) == 2 and all((array > 0).all() for array in scales)
    floats = sum(array.nbytes for array in weights.values())
    assert (tmp_path / "out" / "engine.rtx").stat().st_size <= 0.2 * floats + (1 << 20)
