"""`--objective disk`: the published file holds cores, ONNX Runtime and TensorRT-RTX multiply them out before anything runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import lrcompile
from lrcompile import Options
from lrcompile.contraction import Network
from lrcompile.cores import product
from lrcompile.interfaces import Array, BuildOptions
from lrcompile.networks import NetworkFactorization
from lrcompile.records import Budget, EngineOptions, ShapeRange
from lrcompile.registry import factorization, runtime_of
from lrcompile.store import save_model
from tests.graphs import model, node, normal

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
WIDTH, RANK = 128, 8


def train() -> tuple[Network, Array]:
    """A weight that is a tensor train of three cores exactly: fewer numbers than it has, more multiplications than it takes."""
    method = factorization("tt")
    assert isinstance(method, NetworkFactorization)
    structure = next(s for s in method.family.structures(WIDTH, WIDTH) if dict(s)["order"] == "paired")
    network = method.family.network(WIDTH, WIDTH, structure, RANK)
    rng = np.random.default_rng(0)
    W = product(network, [rng.standard_normal(network.shape(axes)) for axes in network.cores])
    return network, W / np.sqrt(np.mean(W**2) * WIDTH)


def layer(folder: Path) -> Path:
    made = [node("MatMul", ["x", "w"], ["p"], name="layer"), node("Tanh", ["p"], ["y"], name="bend")]
    weights = {"w": train()[1].astype(np.float32)}
    return save_model(model(made, {"x": (("n", WIDTH), np.float32)}, {"y": np.float32}, weights), folder)


def options(folder: Path, **more: object) -> Options:
    budget = Budget(keep=0.3, objective="disk")
    return Options(budget=budget, methods=("tt",), cache=folder / "cache", threads=1, **more)  # type: ignore[arg-type]


def run(path: Path, x: Array) -> Array:
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    made: Array = np.asarray(y)
    return made


def stored(path: Path) -> int:
    return sum(
        v.const_value.nbytes for v in ir.load(path).graph.initializers.values() if v.const_value is not None
    )


def test_the_file_is_smaller_and_computes_the_same(tmp_path: Path) -> None:
    original = layer(tmp_path)
    result = lrcompile.compile(original, tmp_path / "out", options(tmp_path))
    (decision,) = result.plan.rewritten
    assert decision.method == "tt" and decision.folds
    assert decision.flops_after == decision.flops_before == 2 * WIDTH * WIDTH  # it saves no time
    published = tmp_path / "out" / "model.onnx"
    network, _ = train()
    assert stored(published) == decision.bytes_after == 4 * network.parameters
    # what is not a weight: nodes, shapes, names
    assert published.stat().st_size < decision.bytes_after + 8192 < 0.5 * original.stat().st_size
    x = normal(7, WIDTH, seed=3)
    wanted = run(original, x)
    # float32 cores: three roundings an entry instead of one
    np.testing.assert_allclose(run(published, x), wanted, atol=2e-5)
    assert np.abs(wanted).max() > 0.5
    assert lrcompile.verify(tmp_path / "out", original=original).checks


def test_other_objectives_refuse_it_with_the_reason(tmp_path: Path) -> None:
    asked = Options(budget=Budget(rank=RANK), methods=("tt",), cache=tmp_path / "cache", threads=1)
    plan = lrcompile.plan(layer(tmp_path), asked)
    assert not any(d.method == "tt" and d.folds for d in plan.decisions)
    if not plan.rewritten:
        assert "--objective disk" in plan.decisions[0].reason


@needs_rtx
def test_an_engine_is_built_of_the_dense_weight(tmp_path: Path) -> None:
    original = layer(tmp_path)
    engine = EngineOptions(capabilities=("8.6",))
    result = lrcompile.compile(original, tmp_path / "out", options(tmp_path, target="trt-rtx", engine=engine))
    (decision,) = result.plan.rewritten
    assert decision.folds
    published = tmp_path / "out" / "model.onnx"
    assert stored(published) == decision.bytes_after < 0.5 * 4 * WIDTH * WIDTH
    assert (tmp_path / "out" / "engine.rtx").stat().st_size > 4 * WIDTH * WIDTH
    # built again, to be asked: one product with a weight of the true size, not the chain of cores
    shapes = (ShapeRange("x", (1, WIDTH), (4, WIDTH), (8, WIDTH)),)
    again = BuildOptions("trt-rtx", engine=EngineOptions(capabilities=("8.6",), shapes=shapes))
    built = runtime_of("trt-rtx").serialize(published, tmp_path / "again.rtx", again)
    weights = int(dict(built.describe)["weights"].split()[0])
    assert 4 * WIDTH * WIDTH <= weights < 4 * WIDTH * WIDTH + decision.bytes_after
    x = normal(3, WIDTH, seed=4)
    np.testing.assert_allclose(run(published, x), run(original, x), atol=2e-5)


@needs_rtx
def test_cores_beside_external_data_are_multiplied_out(tmp_path: Path) -> None:
    """The file of weights beside the graph is found although the builder gets the graph from memory."""
    original = layer(tmp_path)
    lrcompile.compile(original, tmp_path / "out", options(tmp_path, external_data=True))
    published = tmp_path / "out" / "model.onnx"
    assert published.with_name("model.onnx.data").is_file()
    shapes = (ShapeRange("x", (1, WIDTH), (4, WIDTH), (8, WIDTH)),)
    asked = BuildOptions("trt-rtx", engine=EngineOptions(capabilities=("8.6",), shapes=shapes))
    built = runtime_of("trt-rtx").serialize(published, tmp_path / "engine.rtx", asked)
    assert int(dict(built.describe)["weights"].split()[0]) >= 4 * WIDTH * WIDTH
