"""Real and tiny models in 16 bits: how far their outputs move, and that TensorRT-RTX takes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lrcompile
from lrcompile.precision import convert, widened
from lrcompile.records import Precision
from lrcompile.store import save_model
from tests.recipes import exported

pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

# Parses, and when asked builds for a GPU that need not be here. In a process of its own: builders crash.
BUILD = """
import sys
import tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
if not parser.parse_from_file(sys.argv[1]):
    sys.exit("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
if sys.argv[2] == "build":
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in map(network.get_input, range(network.num_inputs)):
        usual = [8 if size == -1 and axis else 1 if size == -1 else size for axis, size in enumerate(tensor.shape)]
        profile.set_shape(tensor.name, [1 if s == -1 else s for s in tensor.shape], usual, usual)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if builder.build_serialized_network(network, config) is None:
        sys.exit("not built")
"""


@pytest.fixture(scope="module")
def tiny() -> dict[str, Path]:
    """Folders of the models that need no download."""
    return {name: exported(name) for name in ("tiny_llama", "tiny_vlm")}


def feeds(folder: Path) -> list[dict[str, np.ndarray]]:
    """Two feeds of what was held out."""
    found = sorted((folder / "heldout").glob("*.npz")) or [folder / "heldout.npz"]
    loaded = [dict(np.load(path)) for path in found[:2]]
    return loaded if len(found) > 1 else [{n: a[i : i + 4] for n, a in loaded[0].items()} for i in (0, 4)]


def write(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    path = save_model(model, folder)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    return path


def cosine(first: Path, second: Path, given: list[dict[str, np.ndarray]]) -> float:
    """The least over outputs of the mean over rows."""
    sessions = [ort.InferenceSession(path) for path in (first, second)]
    ports = [[(p.name, p.type, p.shape) for p in (*s.get_inputs(), *s.get_outputs())] for s in sessions]
    assert ports[0] == ports[1]
    least = 1.0
    for feed in given:
        for a, b in zip(*(s.run(None, feed) for s in sessions), strict=True):
            u, v = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
            norms = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
            least = min(least, float(np.mean((u * v).sum(1)[norms > 0] / norms[norms > 0])))
    return least


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_vlm"])
def test_tiny_models(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    original = tiny[name] / "model.onnx"
    model = lrcompile.load(original).model
    half = write(convert(model, "fp16"), tmp_path / "half")
    wide = write(widened(model, "bf16"), tmp_path / "wide")
    assert 1e-9 < 1 - cosine(original, half, feeds(tiny[name])) < 1e-4  # measured 2e-7
    assert 1e-7 < 1 - cosine(original, wide, feeds(tiny[name])) < 1e-3  # measured 1e-5
    assert half.stat().st_size < 0.6 * original.stat().st_size


def test_minilm_embeddings_keep_a_cosine_of_0_9999(minilm: Path, tmp_path: Path) -> None:
    original = minilm / "model.onnx"
    half = write(convert(lrcompile.load(original).model, "fp16"), tmp_path / "half")
    assert 1 - cosine(original, half, feeds(minilm)) < 1e-4  # measured 6e-7


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("what", ["parse", pytest.param("build", marks=pytest.mark.slow)])
def test_tensorrt_rtx_takes_it(
    what: str, precision: Precision, tiny: dict[str, Path], tmp_path: Path
) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    path = write(
        convert(lrcompile.load(tiny["tiny_llama"] / "model.onnx").model, precision), tmp_path / "half"
    )
    command = [sys.executable, "-c", BUILD, str(path), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tensorrt_rtx_refuses_types_that_do_not_agree(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The negative control: one weight in float16 among float32 ones, without a Cast."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    model = lrcompile.load(tiny["tiny_llama"] / "model.onnx").model
    weight = next(v for n, v in model.graph.initializers.items() if n.endswith("embed_tokens.weight"))
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float16), name=weight.name)
    for info in model.graph.all_nodes():
        for value in info.outputs:
            value.type = value.shape = None
    broken = tmp_path / "model.onnx"
    ir.save(model, broken)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(broken), "parse"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "type" in done.stderr, done.stderr
