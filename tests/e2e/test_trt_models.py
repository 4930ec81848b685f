"""TensorRT-RTX engines of real models and of every factorization, built without a GPU.

Nothing runs here: that a lowered graph computes the right numbers, other tests show; this one shows that the builder takes it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import onnx_ir as ir
import pytest

from lrcompile import registry
from lrcompile.child import Child
from lrcompile.factorize import factorize
from lrcompile.graph import tensors
from lrcompile.lower import lower
from lrcompile.records import Built, Plan
from lrcompile.rewrite import rewrite
from lrcompile.store import Cache
from lrcompile.storing import legal
from tests.contract import test_factorizations as contract
from tests.recipes import exported

pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engines() -> Iterator[ModuleType]:
    """The benchmark as a module, here and in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("engines")


@pytest.fixture(scope="module")
def child(engines: ModuleType) -> Iterator[Child]:
    with Child(timeout=500) as child:
        yield child


def check(built: Built, model: Path, capabilities: tuple[str, ...]) -> None:
    """The engine is for these GPUs, computes in the graph's types, and stores no weight twice."""
    described = dict(built.describe)
    assert described["devices"] == ", ".join(capabilities)
    assert "widened" not in described
    assert any(layer.endswith("-> float32") for _, layer in built.layers)
    size = sum(use.tensor.nbytes for use in tensors(ir.load(model)))
    assert int(described["weights"].split()[0]) <= 1.05 * size + 4096


FAST, SLOW = ("8.6", "12.0"), [("8.0",), ("8.6",), ("8.9",), ("12.0",)]


@pytest.mark.parametrize("recipe", ["minilm", "tiny_llama", "tiny_vlm"])
def test_models(recipe: str, engines: ModuleType, child: Child, tmp_path: Path) -> None:
    model = exported(recipe) / "model.onnx"
    check(engines.build(model, tmp_path / "engine.rtx", FAST, child), model, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("capabilities", SLOW, ids="".join)
@pytest.mark.parametrize("recipe", ["minilm", "tiny_llama", "tiny_vlm", "open_nsfw"])
def test_models_for_every_gpu(
    recipe: str, capabilities: tuple[str, ...], engines: ModuleType, child: Child, tmp_path: Path
) -> None:
    model = exported(recipe) / "model.onnx"
    check(engines.build(model, tmp_path / "engine.rtx", capabilities, child), model, capabilities)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["smollm2", "generated"])
def test_large_models(recipe: str, engines: ModuleType, child: Child, tmp_path: Path) -> None:
    """generated: weights in an external file."""
    model = exported(recipe) / "model.onnx" if recipe != "generated" else _generated(tmp_path)
    check(engines.build(model, tmp_path / "engine.rtx", FAST, child), model, FAST)


def _generated(folder: Path) -> Path:
    """24 MatMul of 1024 x 1024."""
    command = [sys.executable, str(ROOT / "models" / "generated.py"), "-o", str(folder)]
    command += ["--layers", "24", "--width", "1024"]
    subprocess.run(command, capture_output=True, check=True)
    return folder / "model.onnx"


# those of a Conv have a test of their own
OF_MATRICES = [n for n, f in registry.factorizations().items() if "conv" not in getattr(f, "kinds", ())]


@pytest.mark.parametrize("name", sorted(OF_MATRICES))
def test_every_factorization(name: str, engines: ModuleType, child: Child, tmp_path: Path) -> None:
    """One candidate of each kind of site that it serves; what it stores must be legal there, or is refused in a sentence."""
    method, cache, path = registry.factorization(name), Cache(tmp_path / "cache"), tmp_path / "model.onnx"
    served = 0
    for kind in contract.KINDS:
        case = next(contract.cases(method, cache, kind, 32, 24, 0, with_data=True), None)
        if case is None:
            continue
        model, group, weights, statistics, candidate = case
        if candidate.storage is not None and (no := legal(candidate.storage, group, "trt-rtx")) is not None:
            assert len(no.reason) > 20
            served += 1
            continue
        plan = Plan("trt-rtx", (contract.decision(group, candidate),))
        sets = factorize(plan, {group.name: group}, weights, statistics, {name: method}, 0)
        runtime = registry.runtime_of("trt-rtx")
        ir.save(lower(rewrite(model, tuple(sets)), runtime.lowering("trt-rtx")), path)
        check(engines.build(path, tmp_path / "engine.rtx", FAST, child), path, FAST)
        served += 1
    assert served, f"{name} serves none of {', '.join(contract.KINDS)}"
