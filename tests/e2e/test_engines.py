"""TensorRT-RTX through every command, on a machine that has no GPU to run the engine: built, judged elsewhere, and said so.

The models are tiny; the library is the real one.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lrcompile
from lrcompile import Budget, Child, Options
from lrcompile.config import options_from
from lrcompile.errors import BuildError, UsageError, VerificationError
from lrcompile.interfaces import BuildOptions
from lrcompile.recheck import Published, stored_feeds
from lrcompile.records import ShapeRange
from tests import weight_forms
from tests.graphs import node, normal, proto

SHAPES = ["x:1x8,4x8,16x8"]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child() as child:
        yield child


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx: y = relu(x A) B, A (8, 32), of opset 21."""
    folder = tmp_path_factory.mktemp("engines")
    nodes = [
        node("MatMul", ["x", "a"], ["h"], name="up"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "b"], ["y"], name="down"),
    ]
    weights = {"a": normal(8, 32), "b": normal(32, 8)}
    onnx.save(proto(nodes, {"x": ("n", 8)}, ["y"], weights, opset=21, ir_version=10), folder / "model.onnx")
    return folder


def asked(home: Path, **options: Any) -> Options:
    said = {"methods": "svd-plain", "rank": 4, "timeout": 300.0, "cache": str(home / "cache"), **options}
    return options_from(said)


def compiled(home: Path, child: Child, precision: str, target: str = "trt-rtx") -> Path:
    """A published folder, made once."""
    out = home / f"{target}-{precision}"
    if not out.exists():
        engine = {"capabilities": "8.6,12.0", "shape": SHAPES} if target == "trt-rtx" else {}
        options = asked(home, target=target, precision=precision, **engine)
        lrcompile.compile(home / "model.onnx", out, options, child=child)
    return out


def again(home: Path, out: Path, child: Child) -> lrcompile.Verification:
    options = Options(timeout=300.0, cache=home / "cache")
    return lrcompile.verify(out, original=home / "model.onnx", options=options, child=child)


@pytest.fixture
def rtx(home: Path, child: Child) -> Path:
    pytest.importorskip("tensorrt_rtx")
    return compiled(home, child, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_is_built_and_judged_elsewhere(precision: str, home: Path, child: Child) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = compiled(home, child, precision)
    manifest = json.loads((out / "lrcompile.json").read_text())
    engine = (out / "engine.rtx").read_bytes()
    assert manifest["files"]["engine.rtx"] == {
        "bytes": len(engine),
        "sha256": hashlib.sha256(engine).hexdigest(),
    }
    assert manifest["evidence"]["engine"].startswith("built, not run: ")
    page = (out / "report.html").read_text()
    assert "The engine was built, not run: " in page
    assert "engine.rtx is an engine of TensorRT-RTX" in page and "for compute capability 8.6, 12.0" in page
    if precision != "fp32":
        kind = {"fp16": "float16", "bf16": "bfloat16"}[precision]
        assert f" x {kind} -&gt; {kind}" in page
        assert f"The graph was brought to {kind}" in page
    assert ("ort-cpu has no kernels for bf16: judged in float32" in page) is (precision == "bf16")
    factors = {
        t.data_type for t in onnx.load(out / "model.onnx").graph.initializer if t.name.startswith("up/")
    }
    assert factors == {
        getattr(onnx.TensorProto, {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision])
    }
    held = again(home, out, child)
    assert any("judged in ort-cpu" in check for check in held.checks)
    assert any("2 sets of factors" in check for check in held.checks)


def test_a_precision_without_an_engine(home: Path, child: Child) -> None:
    out = compiled(home, child, "fp16", "ort-cpu")
    assert any("2 sets of factors" in check for check in again(home, out, child).checks)


def test_a_precision_that_the_target_has_no_kernels_for(home: Path, child: Child) -> None:
    with pytest.raises(BuildError, match=r"ONNX Runtime refuses model\.onnx: .* implementation for MatMul"):
        compiled(home, child, "bf16", "ort-cpu")


@pytest.mark.parametrize(("precision", "target"), [("fp16", "ort-cpu"), ("bf16", "trt-rtx")])
def test_a_factor_that_is_wrong_in_16_bits(
    precision: str, target: str, home: Path, child: Child, tmp_path: Path
) -> None:
    """The negative control: the outputs that are stored, and the factors that another graph holds, give it away."""
    if target == "trt-rtx":
        pytest.importorskip("tensorrt_rtx")
    out = forged(compiled(home, child, precision, target), tmp_path / "forged")
    with pytest.raises(VerificationError, match=r"does not compute what outputs\.json holds"):
        again(home, out, child)


def forged(out: Path, copy: Path) -> Path:
    """The folder with one number of its graph changed, and a manifest that fits."""
    copy.mkdir()
    for file in out.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    model = onnx.load(copy / "model.onnx")
    factor = next(t for t in model.graph.initializer if t.name.startswith("up/"))
    raw = np.frombuffer(factor.raw_data, np.int16).copy()
    raw[0] ^= np.int16(-32768)  # its sign
    factor.raw_data = raw.tobytes()
    onnx.save(model, copy / "model.onnx")
    manifest = json.loads((copy / "lrcompile.json").read_text())
    data = (copy / "model.onnx").read_bytes()
    manifest["files"]["model.onnx"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / "lrcompile.json").write_text(json.dumps(manifest))
    return copy


def test_polygraphy_runs_what_is_published(rtx: Path) -> None:
    polygraphy = Path(sys.executable).with_name("polygraphy")
    command = [str(polygraphy), "run", str(rtx / "model.onnx"), "--onnxrt", "--load-inputs"]
    command += [str(rtx / "inputs.json"), "--load-outputs", str(rtx / "outputs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_shapes_reach_the_engine(rtx: Path, home: Path, child: Child, tmp_path: Path) -> None:
    """What was asked for is what the builder gets: a profile whose shapes do not fit the model it refuses."""
    assert options_from({}, rtx / "config.yaml").engine.shapes == (ShapeRange("x", (1, 8), (4, 8), (16, 8)),)
    assert {feed["x"].shape for feed in stored_feeds(rtx)} == {(4, 8)}
    wrong = asked(home, target="trt-rtx", capabilities="8.6", shape=["x:1x8,4x8,16x9"])
    with pytest.raises(UsageError, match="--shape gives 'x' 16x9; the model has \\?x8"):
        lrcompile.compile(home / "model.onnx", tmp_path / "out", wrong, child=child)
    assert not (tmp_path / "out").exists()


def test_a_byte_of_the_engine_is_flipped(rtx: Path, child: Child, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file in rtx.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    lrcompile.verify(out, child=child)
    data = bytearray((out / "engine.rtx").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "engine.rtx").write_bytes(data)
    with pytest.raises(VerificationError, match=r"engine\.rtx"):
        lrcompile.verify(out, child=child)


def test_the_published_engine_is_loaded_by_its_hash(rtx: Path) -> None:
    manifest = json.loads((rtx / "lrcompile.json").read_text())
    folder = Published(rtx, manifest, lrcompile.load(rtx / "model.onnx").model)
    loading = folder.loading(BuildOptions("trt-rtx"))
    assert loading.serialized == rtx / "engine.rtx"
    assert loading.sha256 == manifest["files"]["engine.rtx"]["sha256"]
    assert folder.loading(BuildOptions("ort-cpu")).serialized is None


def test_bench_says_that_the_engine_does_not_run_here(rtx: Path, home: Path, child: Child) -> None:
    with pytest.raises(BuildError, match="engines of trt-rtx do not run here, so there is nothing to time: "):
        lrcompile.bench(rtx, home / "model.onnx", seconds=0, child=child)


def test_bench_races_models_of_one_precision(home: Path, child: Child) -> None:
    out = compiled(home, child, "fp16", "ort-cpu")
    options = Options(timeout=300.0, cache=home / "cache")
    (row,) = lrcompile.bench(
        out, home / "model.onnx", seconds=0, shapes=["x:4x8"], options=options, child=child
    ).rows
    assert row.race.shapes == ("x:4x8",) and row.race.rounds >= 20


def test_speed_cannot_be_asked_for_where_nothing_is_known(home: Path, child: Child, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = asked(home, target="trt-rtx", capabilities="8.6", objective="latency", shape=SHAPES)
    with pytest.raises(
        UsageError, match="nothing is known of the speed of trt-rtx, whose engines do not run here"
    ):
        lrcompile.compile(home / "model.onnx", tmp_path / "out", options, child=child)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "given", "flag"),
    [
        ("ort-cpu", {"streaming": "1GB"}, "--weight-streaming"),
        ("ort-cpu", {"capabilities": "8.6"}, "--compute-capability"),
        ("ort-cpu", {"cuda_graph": True}, "--cuda-graph"),
        ("reference", {"level": 3}, "--level"),
    ],
)
def test_options_of_another_target_are_refused_by_name(
    target: str, given: dict[str, Any], flag: str, home: Path, child: Child, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{flag}: target {target} has no use for it"):
        lrcompile.compile(
            home / "model.onnx", tmp_path / "out", asked(home, target=target, **given), child=child
        )


def test_a_builder_that_dies_costs_one_line(tmp_path: Path) -> None:
    """An int4 constant as left operand of a product: TensorRT-RTX 1.7.1 reads address zero. Nothing is changed, and all is built."""
    pytest.importorskip("tensorrt_rtx")
    onnx.save(weight_forms.ENCODINGS["int4/32 left"](), tmp_path / "left.onnx")
    command = [sys.executable, "-m", "lrcompile", "compile", "left.onnx", "-o", "out", "--target", "trt-rtx"]
    command += [
        "--compute-capability",
        "8.6",
        "--keep",
        "1.0",
        "--methods",
        "svd-plain",
        "--cache",
        "cache",
        "--timeout",
        "300",
    ]
    done = subprocess.run([*command, "-q"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: building engine.rtx: the child process crashed with SIGSEGV; last words: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "left.onnx"]


def test_keeping_everything_builds_the_engine_of_the_original(
    home: Path, child: Child, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = asked(home, target="trt-rtx", capabilities="8.6", shape=SHAPES, rank=None)
    options = Options(
        target="trt-rtx", methods=options.methods, budget=Budget(keep=1.0), engine=options.engine, timeout=300.0,
        cache=options.cache,
    )  # fmt: skip
    result = lrcompile.compile(home / "model.onnx", tmp_path / "out", options, child=child)
    assert result.evidence.verdict == "unchanged"
    assert (tmp_path / "out" / "engine.rtx").stat().st_size > 0
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (home / "model.onnx").read_bytes()
