"""The runtime ``trt``: real TensorRT-RTX builds, without a GPU; running engines, with a stand-in for library and GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lrcompile.child import Child
from lrcompile.errors import BuildError, LrcompileError, UsageError
from lrcompile.interfaces import BuildOptions
from lrcompile.records import Built, Decision, EngineOptions, ShapeRange
from lrcompile_runtimes import _cuda
from lrcompile_runtimes._trt import layers
from lrcompile_runtimes._trt.engine import RunOptions, TrtEngine, dtype_of
from lrcompile_runtimes._trt.layers import Layer
from lrcompile_runtimes._trt.log import log_of
from lrcompile_runtimes.trt import TrtRuntime
from tests import fake_trt, weight_forms
from tests.graphs import node as make
from tests.graphs import normal, proto

RUNTIME = TrtRuntime()
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
X = ShapeRange("x", (1, 64), (8, 64), (32, 64))


def halves(folder: Path, *, opset: int = 21, external: bool = False, dtype: Any = np.float16) -> Path:
    """x W, relu, times W again."""
    nodes = [
        make("MatMul", ["x", "w"], ["h"], name="first"),
        make("Relu", ["h"], ["r"], name="bend"),
        make("MatMul", ["r", "w"], ["y"], name="second"),
    ]
    version = 10 if opset < 25 else 13
    made = proto(
        nodes, {"x": (("n", 64), dtype)}, {"y": dtype}, {"w": normal(64, 64, dtype=dtype)}, opset=opset,
        ir_version=version,
    )  # fmt: skip
    path = folder / "model.onnx"
    onnx.save(made, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def serialize(
    path: Path, shapes: tuple[ShapeRange, ...] = (X,), target: str = "trt-rtx", **wanted: Any
) -> Built:
    engine = EngineOptions(shapes=shapes, **{"capabilities": ("8.6", "12.0"), **wanted})
    return RUNTIME.serialize(path, path.with_suffix(".rtx"), BuildOptions(target, engine=engine))


# --- what is there ------------------------------------------------------------------------------------------------


def test_tensorrt_that_is_missing_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (None, types.ModuleType("tensorrt")):  # the second: a folder of that name, with stubs
        monkeypatch.setitem(sys.modules, "tensorrt", missing)
        there = RUNTIME.availability("trt")
        assert not there.ok
        assert "TensorRT is not installed" in there.reason
        assert "pypi.nvidia.com" in there.reason


@needs_rtx
@pytest.mark.parametrize(
    ("capability", "words"),
    [(None, "no NVIDIA GPU is visible"), ("9.0", "compute capability 9.0"), ("8.6", ""), ("12.0", "")],
)
def test_rtx_builds_anywhere_and_runs_where_it_can(
    monkeypatch: pytest.MonkeyPatch, capability: str | None, words: str
) -> None:
    monkeypatch.setattr(_cuda, "capability", lambda: capability)
    there = RUNTIME.availability("trt-rtx")
    assert there.ok
    assert there.versions[0][0] == "tensorrt_rtx"
    assert (words in there.unrunnable) if words else not there.unrunnable


def test_tensorrt_without_a_gpu_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    library = types.ModuleType("tensorrt")
    library.Builder, library.__version__ = object, "10.13"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(_cuda, "capability", lambda: None)
    there = RUNTIME.availability("trt")
    assert not there.ok
    assert "no NVIDIA GPU is visible" in there.reason


def test_names_of_engine_files() -> None:
    assert {t: RUNTIME.engine_file(t) for t in RUNTIME.targets()} == {
        "trt": "engine.plan",
        "trt-rtx": "engine.rtx",
    }


# --- building -----------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("external", [False, True])
def test_an_engine_for_two_gpus_and_what_is_in_it(tmp_path: Path, external: bool) -> None:
    built = serialize(halves(tmp_path, external=external))
    described = dict(built.describe)
    assert built.path.stat().st_size > 64 * 64 * 2
    assert b"accelerators={sm86 sm120 }" in built.path.read_bytes()
    assert described["devices"] == "8.6, 12.0"
    assert "1.7" in described["library"]
    assert (
        64 * 64 * 2 <= int(described["weights"].split()[0]) < 2 * 64 * 64 * 2
    )  # kept once, in half precision
    products = [kind for _, kind in built.layers if kind.startswith("gemm")]
    assert products == ["gemm: float16 -> float16"] * 2
    assert "widened" not in described


@needs_rtx
def test_the_types_are_the_graphs(tmp_path: Path) -> None:
    kinds = [kind for _, kind in serialize(halves(tmp_path, dtype=np.float32)).layers if "gemm" in kind]
    assert kinds == ["gemm: float32 -> float32"] * 2


@needs_rtx
def test_an_opset_above_the_parsers_is_built_if_it_can_be(tmp_path: Path) -> None:
    assert serialize(halves(tmp_path, opset=26)).path.is_file()
    nodes = [make("BitShift", ["x", "x"], ["y"], direction="LEFT", name="shift")]
    path = tmp_path / "shift.onnx"
    for opset, told in ((26, True), (21, False)):
        made = proto(nodes, {"x": ((4,), np.uint8)}, {"y": np.uint8}, opset=opset, ir_version=10)
        onnx.save(made, path)
        with pytest.raises(BuildError, match=r"shift\.onnx.*'shift'") as caught:
            serialize(path, ())
        assert ("opset 26" in str(caught.value)) == told
        assert str(caught.value).isprintable()


@needs_rtx
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ((), "input 'x' (?x64) is dynamic: give its least, usual and largest shape with --shape"),
        ((X, ShapeRange("z", (1,), (1,), (1,))), "--shape names 'z'; the model's inputs are x"),
        ((ShapeRange("x", (1, 64), (1, 64), (1,)),), "--shape gives 'x' 1; the model has ?x64"),
        ((ShapeRange("x", (1, 32), (1, 64), (1, 64)),), "--shape gives 'x' 1x32; the model has ?x64"),
        ((ShapeRange("x", (4, 64), (2, 64), (8, 64)),), "do not rise"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, shapes: tuple[ShapeRange, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        serialize(halves(tmp_path), shapes)
    assert words in str(caught.value)


@needs_rtx
@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"provider": (("device_id", "0"),)}, "no execution provider that could take the option 'device_id'"),
        ({"cpu_nodes": True}, "every node on the GPU"),
        ({"level": 6}, "optimisation levels 0 to 5, not 6"),
        ({"capabilities": ("9.0",)}, "8.6, 8.9, 12.0, 12.1, not for 9.0"),
        ({"capabilities": ()}, "--compute-capability"),
        ({"refittable": True}, "refittable engines only where they can run"),
        ({"version_compatible": True}, "libnvinfer_lean"),
        ({"workspace": 1}, "within workspace limit"),
    ],
)
def test_options_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(_cuda, "capability", lambda: None)
    with pytest.raises(LrcompileError) as caught:
        serialize(halves(tmp_path), **wanted)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "model.rtx").exists()


@needs_rtx
def test_options_that_are_taken(tmp_path: Path) -> None:
    plain = serialize(halves(tmp_path)).path.read_bytes()
    assert serialize(halves(tmp_path), level=5, workspace=1 << 30, streaming=4096).path.stat().st_size > 0
    exact = BuildOptions("trt-rtx", exact=False, engine=EngineOptions(shapes=(X,), capabilities=("8.6",)))
    RUNTIME.serialize(tmp_path / "model.onnx", tmp_path / "loose.rtx", exact)
    assert b"tf32=0" in plain
    assert b"tf32=1" in (tmp_path / "loose.rtx").read_bytes()


@needs_rtx
@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX")
def test_tensorrts_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RTX in its place: it has the calls, and without a device its default one is built for."""
    import tensorrt_rtx

    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_rtx)
    monkeypatch.setattr(_cuda, "capability", lambda: "8.0")
    engine = EngineOptions(shapes=(X,))
    options = BuildOptions("trt", engine=engine, cache=tmp_path / "cache")
    for _ in range(2):  # the second time with what the first one kept
        built = RUNTIME.serialize(halves(tmp_path), tmp_path / "engine.plan", options)
        assert (tmp_path / "cache" / f"tensorrt-{tensorrt_rtx.__version__}.timings").is_file()
    assert dict(built.describe)["devices"] == "8.0"
    with pytest.raises(UsageError, match="compute capabilities are for target trt-rtx"):
        serialize(halves(tmp_path), target="trt", capabilities=("8.0",))


@needs_rtx
def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no model file.*missing\.onnx"):
        serialize(tmp_path / "missing.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"This is prose, not protobuf. " * 9)
    with pytest.raises(BuildError, match=r"cannot parse junk\.onnx"):
        serialize(tmp_path / "junk.onnx")


@needs_rtx
def test_every_build_hears_its_own_words(tmp_path: Path) -> None:
    """The library keeps the first logger of the process while anything of it lives."""
    import tensorrt_rtx

    held = tensorrt_rtx.Builder(log_of(tensorrt_rtx))
    for _ in range(2):
        with pytest.raises(BuildError, match="within workspace limit") as caught:
            serialize(halves(tmp_path), workspace=1)
        assert str(caught.value).count("workspace limit") == 1
        assert len(serialize(halves(tmp_path)).layers) >= 2
    assert held.logger is not None


@needs_rtx
def test_an_old_builder_may_be_collected_at_any_time(tmp_path: Path) -> None:
    """Collected while another one logs, it would wait for itself: a hang, told as a time limit."""
    args = (str(halves(tmp_path)), ("8.6",), "x", (0, 64))
    with Child(timeout=60) as child:
        assert child.call("tests.kept:by_rtx_beside_an_old_builder", *args) > 0


@needs_rtx
def test_a_builder_that_dies_costs_one_line(tmp_path: Path) -> None:
    """An int4 constant as left operand of a product: RTX 1.7.1 reads address zero."""
    path = tmp_path / "left.onnx"
    onnx.save(weight_forms.ENCODINGS["int4/32 left"](), path)
    with Child(timeout=60) as child:
        with pytest.raises(BuildError) as caught:
            child.call(
                "tests.kept:by_rtx", str(path), ("8.6",), "x", (256, 0), what="building left.onnx for trt-rtx"
            )
        onnx.save(weight_forms.ENCODINGS["int4/32"](), path)
        assert child.call("tests.kept:by_rtx", str(path), ("8.6",), "x", (0, 256))["devices"] == "8.6"
    message = str(caught.value)
    assert message.startswith(
        "building left.onnx for trt-rtx: the child process crashed with SIGSEGV; last words: "
    )
    assert "ompil" in message.partition("last words: ")[2]  # how far the builder had come
    assert message.isprintable()
    assert caught.value.exit_code == 4


# --- loading ------------------------------------------------------------------------------------------------------


@needs_rtx
def test_only_an_engine_of_ours_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "capability", lambda: None)
    path = serialize(halves(tmp_path)).path
    good = path.read_bytes()
    options = BuildOptions("trt-rtx", serialized=path, sha256=hashlib.sha256(good).hexdigest())
    with pytest.raises(BuildError, match="cannot run here: no NVIDIA GPU is visible"):  # the hash was right
        RUNTIME.build(tmp_path / "model.onnx", options)
    for place in (0, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(BuildError, match=r"model\.rtx is not loaded: its SHA-256"):
            RUNTIME.build(tmp_path / "model.onnx", options)
    path.unlink()
    with pytest.raises(BuildError, match="cannot be read"):
        RUNTIME.build(tmp_path / "model.onnx", options)


# --- running, with a stand-in -------------------------------------------------------------------------------------


@pytest.fixture
def device() -> fake_trt.HostDevice:
    return fake_trt.HostDevice()


@pytest.fixture
def engine(device: fake_trt.HostDevice) -> Iterator[TrtEngine]:
    with start(device, b"engine with positive") as engine:
        yield engine


def start(device: fake_trt.HostDevice, data: bytes, **options: Any) -> TrtEngine:
    return TrtEngine(fake_trt.Library, data, device, {"library": "fake"}, RunOptions(**options))  # type: ignore[arg-type]


def feed(rows: int, seed: int = 0) -> Mapping[str, np.ndarray[Any, np.dtype[Any]]]:
    return {"x": normal(rows, 3, seed=seed)}


@pytest.mark.parametrize("rows", [1, 4, 2, 0])
def test_outputs_of_known_and_of_unknown_shape(engine: TrtEngine, rows: int) -> None:
    for seed in range(3):
        x = feed(rows, seed)["x"]
        outputs = engine.run({"x": x})
        assert list(outputs) == ["double", "positive"]
        np.testing.assert_array_equal(outputs["double"], 2 * x)
        np.testing.assert_array_equal(outputs["positive"], x[x > 0])


def test_a_strided_input(engine: TrtEngine) -> None:
    x = normal(3, 2).T
    np.testing.assert_array_equal(engine.run({"x": x})["double"], 2 * x)


def test_wrong_feeds(engine: TrtEngine) -> None:
    with pytest.raises(UsageError, match="no array was given for input 'x'"):
        engine.run({})
    with pytest.raises(UsageError, match="was given float64"):
        engine.run({"x": np.ones((1, 3))})
    with pytest.raises(BuildError, match=r"shape \(5, 3\); the engine takes \(1, 3\) to \(4, 3\)"):
        engine.run(feed(5))


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_timed_neither_copies_nor_allocates(device: fake_trt.HostDevice, graph: bool) -> None:
    with start(device, b"engine", cuda_graph=graph) as engine:
        times = engine.bound(feed(2))
        launches, allocated = engine._context.launches, len(device.allocated)  # type: ignore[attr-defined]
        times(10)
        assert engine._context.launches == launches + 10  # type: ignore[attr-defined]
        assert len(device.allocated) == allocated
        assert device.recorded == graph


def test_a_graph_cannot_hold_what_depends_on_data(device: fake_trt.HostDevice) -> None:
    with (
        start(device, b"engine with positive", cuda_graph=True) as engine,
        pytest.raises(BuildError) as caught,
    ):
        engine.bound(feed(2))
    assert "'positive'" in str(caught.value)


def test_engines_that_do_not_start(device: fake_trt.HostDevice) -> None:
    for data, words in (
        (b"junk", "cannot load the engine"),
        (b"engine on the host", "decides shapes by its values"),
        (b"engine of int4", "INT4, which NumPy cannot hold"),
    ):
        with pytest.raises(BuildError, match=words):
            start(device, data)
    with start(device, b"engine, broken") as engine, pytest.raises(BuildError, match="cannot run"):
        engine.run(feed(1))


def test_rtx_keeps_its_kernels_and_records_by_itself(device: fake_trt.HostDevice, tmp_path: Path) -> None:
    kernels = tmp_path / "cache" / "kernels"
    options = RunOptions(cuda_graph=True, kernels=kernels)
    for kept in (b"kernels", b"kernels, more"):
        with TrtEngine(fake_trt.RtxLibrary, b"engine", device, {"library": "fake"}, options) as engine:
            engine.bound(feed(2))(3)
            assert engine._engine.config.cuda_graph_strategy == "whole"  # type: ignore[attr-defined]
        assert kernels.read_bytes() == kept
    assert list(kernels.parent.iterdir()) == [kernels]
    assert device.recorded == 0


def test_streaming_and_nodes(device: fake_trt.HostDevice) -> None:
    with start(device, b"engine", streaming=123) as engine:
        assert engine._engine.weight_streaming_budget_v2 == 123
        assert engine.nodes() == {"ElementWise": 2}
        assert engine.describe() == {"library": "fake"}


@needs_rtx
def test_every_type_of_the_library_is_known_or_named() -> None:
    import tensorrt_rtx

    unknown = set()
    for name in tensorrt_rtx.DataType.__members__:
        try:
            dtype_of(name, "x")
        except BuildError:
            unknown.add(name)
    assert unknown == {"INT4", "FP4", "E8M0"}


# --- layers -------------------------------------------------------------------------------------------------------


def test_layers_of_both_generations_of_the_inspector() -> None:
    ten = """{"Layers": [{"Name": "a", "LayerType": "gemm", "Inputs": [{"Name": "x", "Format/Datatype":
        "Row major linear FP16 format"}], "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}]}]}"""
    eleven = """{"Layers": [{"Name": "a", "LayerType": "gemm", "Inputs": [{"Name": "x", "Datatype": "Half",
        "Format": "Row major linear format"}], "Outputs": [{"Name": "y", "Datatype": "Float"}],
        "Metadata": "[ONNX Layer: first][ONNX Layer: second]"}]}"""
    assert layers.from_json(ten) == (Layer("a", "gemm", ("float16",), ("float32",)),)
    assert layers.from_json(eleven)[0].origins == ("first", "second")
    assert layers.from_json('{"Layers": ["a", "b"]}')[1] == Layer("b", "unknown", (), ())


def test_a_silent_float32_is_found() -> None:
    half, full = frozenset({"float16"}), frozenset({"float16", "float32"})
    made = (
        Layer("fused", "gemm", ("float16",), ("float32",), ("a", "b")),
        Layer("norm", "kgen", ("float32",), ("float16",), ("a", "c")),
        Layer("copy", "kgen", ("float32",), ("float32",), ()),
        Layer("fine", "gemm", ("float16",), ("float16",), ("a",)),
    )
    assert layers.widened(made, {"a": half, "b": half, "c": full}) == made[:1]
    assert layers.widened(made, {"a": full, "b": half, "c": full}) == ()
    # of a Pad the integers alone bear its name: the floats beside them are none of its making
    assert layers.widened(made, {"a": frozenset({"int64"}), "b": frozenset({"int64"}), "c": full}) == ()


@needs_rtx
def test_a_silent_float32_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that were to compute in float32: its log is made to say so."""
    from lrcompile_runtimes._trt import build

    told = build.from_log
    monkeypatch.setattr(build, "from_log", lambda text: told(text.replace("Half", "Float")))
    assert "2 layers compute in float32" in dict(serialize(halves(tmp_path)).describe)["widened"]


# --- what a plan may store ----------------------------------------------------------------------------------------


def test_storage_is_judged_by_the_table() -> None:
    def decision(storage: str | None) -> Decision:
        return Decision(
            group="g", sites=("s",), method="dense", rank=None, storage=storage, claimed_error=None, bound=True,
            parameters_before=1, parameters_after=1, bytes_before=1, bytes_after=1, flops_before=1, flops_after=1,
            reason="",
        )  # fmt: skip

    assert RUNTIME.supports(decision(None), "trt-rtx") is None
    assert RUNTIME.supports(decision("float16"), "trt-rtx") is None
    assert (refusal := RUNTIME.supports(decision("uint8"), "trt-rtx")) is not None
    assert "uint8" in refusal.reason
