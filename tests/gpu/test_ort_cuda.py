"""ONNX Runtime on a GPU: run by hand, ``pytest -m gpu tests/gpu``. Each test is skipped where its provider is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from lrcompile import fused
from lrcompile.errors import BuildError, UsageError
from lrcompile.interfaces import BuildOptions, Engine
from lrcompile.records import EngineOptions, ShapeRange
from lrcompile.registry import runtime_of
from tests.graphs import Array, node, normal, proto

pytestmark = pytest.mark.gpu

K, N = 64, 48
# float32 sums of 64 products, in another order; TensorFloat-32 would be off by 1e-3
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def needs(target: str) -> None:
    if not (there := runtime_of(target).availability(target)).ok:
        pytest.skip(there.reason)


@pytest.fixture(autouse=True)
def _cuda() -> None:
    needs("ort-cuda")


def saved(folder: Path, made: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(made, path)
    return path


def pair(dtype: type = np.float32, dynamic: bool = True) -> onnx.ModelProto:
    """Relu(x A B + c), and a reshape by x's own shape where that is open."""
    constants = {
        "a": (normal(K, 8) / 8).astype(dtype), "b": (normal(8, N) / 3).astype(dtype), "c": normal(N).astype(dtype),
        "width": np.array([N]),
    }  # fmt: skip
    nodes = [
        node("MatMul", ["x", "a"], ["h"], name="first"),
        node("MatMul", ["h", "b"], ["s"], name="second"),
        node("Add", ["s", "c"], ["t"], name="bias"),
        node("Relu", ["t"], ["r" if dynamic else "y"], name="relu"),
    ]
    if dynamic:
        nodes += [
            node("Shape", ["x"], ["all"], name="shape", end=1),
            node("Concat", ["all", "width"], ["flat"], name="concat", axis=0),
            node("Reshape", ["r", "flat"], ["y"], name="reshape"),
        ]
    return proto(nodes, {"x": (("rows" if dynamic else 16, K), dtype)}, {"y": dtype}, constants, opset=20)


def on(target: str, path: Path, **engine: object) -> Engine:
    return runtime_of(target).build(path, BuildOptions(target, engine=EngineOptions(**engine)))  # type: ignore[arg-type]


def reference(path: Path, x: Array) -> Array:
    with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu")) as engine:
        return np.asarray(engine.run({"x": x})["y"])


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_runs_on_the_gpu_and_agrees_with_the_cpu(cuda_graph: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, pair())
    with on("ort-cuda", path, cuda_graph=cuda_graph) as engine:
        assert engine.describe()["provider"] == "CUDAExecutionProvider"
        for rows in (1, 16, 300):
            x = normal(rows, K)
            np.testing.assert_allclose(engine.run({"x": x})["y"], reference(path, x), **CLOSE)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_bound_runs_at_several_shapes(cuda_graph: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, pair())
    with on("ort-cuda", path, cuda_graph=cuda_graph) as engine:
        bound = {rows: engine.bound({"x": normal(rows, K)}) for rows in (1, 16, 300)}
        for _ in range(2):
            for times in bound.values():
                times(10)
        x = normal(5, K, seed=1)  # and in between feeds from the host
        np.testing.assert_allclose(engine.run({"x": x})["y"], reference(path, x), **CLOSE)
        bound[16](3)


def test_what_is_bound_is_computed(tmp_path: Path) -> None:
    """Outputs of bound runs, with a graph that is replayed, are those of a plain run."""
    path = saved(tmp_path, pair(dynamic=False))
    x = normal(16, K)
    for cuda_graph in (False, True):
        with on("ort-cuda", path, cuda_graph=cuda_graph) as engine:
            times = engine.bound({"x": x})
            times(3)
            cells = [c.cell_contents for c in times.__closure__ or ()]  # type: ignore[attr-defined]
            (binding,) = [c for c in cells if hasattr(c, "copy_outputs_to_cpu")]
            (output,) = binding.copy_outputs_to_cpu()
            np.testing.assert_allclose(output, reference(path, x), **CLOSE)


def test_fixed_shapes_leave_nothing_on_the_cpu(tmp_path: Path) -> None:
    """A graph is recorded only where every node is on the GPU; a reshape by an open shape is not."""
    path, shapes = saved(tmp_path, pair()), (ShapeRange("x", (16, K), (16, K), (16, K)),)
    x = normal(16, K)
    with on("ort-cuda", path, cuda_graph=True, shapes=shapes) as engine:
        engine.bound({"x": x})(3)
        np.testing.assert_allclose(engine.run({"x": x})["y"], reference(path, x), **CLOSE)
        assert not any("CPUExecutionProvider" in key for key in engine.nodes())


def test_half_precision(tmp_path: Path) -> None:
    path = saved(tmp_path, pair(np.float16))
    x = normal(16, K, dtype=np.float16)
    with on("ort-cuda", path) as engine:
        got = engine.run({"x": x})["y"]
        assert got.dtype == np.float16
        # sums rounded to 11 bits, of numbers of size 3
        np.testing.assert_allclose(got.astype(np.float32), reference(path, x).astype(np.float32), atol=2e-2)


def test_which_nodes_ran_where(tmp_path: Path) -> None:
    path = saved(tmp_path, pair())
    with on("ort-cuda", path) as engine:
        ran = engine.nodes()
    providers = {fused.Ran.of(key).op: fused.Ran.of(key).provider for key in ran}
    assert providers["MatMul"] == "CUDAExecutionProvider" or providers["Gemm"] == "CUDAExecutionProvider"
    # ONNX Runtime computes shapes on the CPU, and nothing else
    on_cpu = {op for op, provider in providers.items() if provider == "CPUExecutionProvider"}
    assert on_cpu <= {"Shape", "Concat"}


def test_a_node_that_would_compute_on_the_cpu_is_refused(tmp_path: Path) -> None:
    """CUDA has no kernel for DFT."""
    nodes = [node("Relu", ["x"], ["r"], name="relu"), node("DFT", ["r", "", "axis"], ["y"], name="transform")]
    made = proto(nodes, {"x": (2, 16, 1)}, ["y"], {"axis": np.array(1)}, opset=20)
    path = saved(tmp_path, made)
    with pytest.raises(BuildError, match=r"ort-cuda has no kernel for DFT 'transform' .*cpu_nodes"):
        on("ort-cuda", path)
    with on("ort-cuda", path, cpu_nodes=True) as engine:
        x = normal(2, 16, 1)
        np.testing.assert_allclose(engine.run({"x": x})["y"], reference(path, np.asarray(x)), **CLOSE)
        assert "DFT (ai.onnx) on CPUExecutionProvider" in engine.nodes()


def test_provider_options(tmp_path: Path) -> None:
    path = saved(tmp_path, pair())
    with on("ort-cuda", path, provider=(("gpu_mem_limit", str(1 << 30)),)) as engine:
        assert engine.run({"x": normal(1, K)})["y"].shape == (1, N)
        session = engine._session  # type: ignore[attr-defined]
        given = session.get_provider_options()["CUDAExecutionProvider"]
        assert given["gpu_mem_limit"] == str(1 << 30)
        assert given["use_tf32"] == "0"
    with pytest.raises(BuildError, match="no_such_option"):
        on("ort-cuda", path, provider=(("no_such_option", "1"),))
    with pytest.raises(UsageError, match="--weight-streaming: target ort-cuda has no use for it"):
        on("ort-cuda", path, streaming=1)


def test_fused_attention_agrees(tmp_path: Path) -> None:
    """What `Runtime.fusions` makes has kernels here, on float32 and float16."""
    pytest.importorskip("onnxscript")
    import onnx_ir as ir

    from tests.unit.test_fused import WIDTH, attention

    (apply,) = runtime_of("ort-cuda").fusions("ort-cuda")
    made = attention()
    plain = tmp_path / "plain.onnx"
    ir.save(made, plain)
    assert apply(made)
    path = tmp_path / "fused.onnx"
    ir.save(made, path)
    with on("ort-cuda", path) as engine:
        x = normal(2, 7, WIDTH)
        np.testing.assert_allclose(engine.run({"x": x})["y"], reference(plain, x), rtol=0, atol=1e-4)
        assert fused.kinds(engine.nodes())["attention"] == 1


def test_tensorrt_keeps_its_engines(tmp_path: Path) -> None:
    needs("ort-tensorrt")
    path, cache = saved(tmp_path, pair()), tmp_path / "cache"
    shapes = (ShapeRange("x", (1, K), (16, K), (300, K)),)
    options = BuildOptions("ort-tensorrt", engine=EngineOptions(shapes=shapes), cache=cache)
    with runtime_of("ort-tensorrt").build(path, options) as engine:
        assert engine.describe()["provider"] == "TensorrtExecutionProvider"
        x = normal(16, K)
        np.testing.assert_allclose(engine.run({"x": x})["y"], reference(path, x), rtol=1e-3, atol=1e-3)
        assert any(fused.Ran.of(key).provider == "TensorrtExecutionProvider" for key in engine.nodes())
    assert any(cache.iterdir())


def test_a_missing_provider_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path, pair())
    for target in ("ort-tensorrt", "ort-trt-rtx"):
        if not runtime_of(target).availability(target).ok:
            with pytest.raises(BuildError):
                on(target, path)
