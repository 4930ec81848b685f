"""Fused operators of real models: never fewer after factorization than before, with ONNX Runtime's own fusions and with ours.

``python tests/e2e/test_fusions.py`` prints the table of docs/fusions.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lrcompile import Budget, Options, fused
from lrcompile.compile import factors_of, first_plan, problem_of, study
from lrcompile.interfaces import BuildOptions, CandidateOptions
from lrcompile.lower import lower
from lrcompile.progress import silent
from lrcompile.records import Decision, Plan
from lrcompile.registry import runtime_of
from lrcompile.rewrite import rewrite
from lrcompile.store import save_model
from lrcompile.study import Study, workshop

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).resolve().parents[2]
TARGET = "ort-cpu"
ATTENTIONS = {"minilm": 6, "tiny_vlm": 2, "tiny_llama": 2}  # that onnxscript fuses
# Without data where that will do: the graph of a form is the same at every rank below the full one.
BUDGETS = {"svd-plain": Budget(rank=8), "pivoted": Budget(rank="full"), "slicing": Budget(keep=0.7)}


def exported(name: str) -> Path:
    """The recipe's folder in `build/models`, made when it is not there."""
    folder = ROOT / "build" / "models" / name
    if not (folder / "model.onnx").is_file():
        command = [sys.executable, str(ROOT / "models" / f"{name}.py"), "-o", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def calibration(folder: Path, work: Path) -> Path:
    """Few rows: what is counted depends on the graph alone."""
    small = work / "calib.npz"
    if (folder / "calib").is_dir():
        first = next(iter(sorted((folder / "calib").glob("*.npz"))))
        with np.load(first) as arrays:
            np.savez(
                small, **{name: array[:, :64] if array.ndim == 2 else array for name, array in arrays.items()}
            )
    else:
        with np.load(folder / "calib.npz") as arrays:
            np.savez(small, **{name: array[:8] for name, array in arrays.items()})
    return small


def rewritten(folder: Path, method: str, work: Path, include: str | None = None) -> tuple[ir.Model, int]:
    """The lowered model with every site rewritten that the method takes, and how many these are."""
    options = Options(
        methods=(method,), budget=BUDGETS[method], include=include, batch=2, refit=False, gradients=False,
        data=calibration(folder, work) if method == "slicing" else None, cache=work / "cache", timeout=600,
    ).completed()  # fmt: skip
    with workshop(options) as shop:
        known = study(folder / "model.onnx", options, shop, silent)
        plan = shared(known) if method == "svd-plain" else first_plan(problem_of(known), known)
        sets = factors_of(plan, known)
        model = lower(rewrite(known.source.model, sets), runtime_of(TARGET).lowering(TARGET))
        path = save_model(model, work, external=None)  # the factors are in the cache, which goes
    if method == "svd-plain":
        assert any(len(s.group.sites) == 3 for s in sets), "no queries, keys and values share a factor"
    return ir.load(path), sum(len(s.group.sites) for s in sets)


def shared(known: Study) -> Plan:
    """Pairs of rank 8, queries, keys and values on one input (gates and ups too) with one shared factor."""
    method, chosen, taken = known.methods["svd-plain"], [], set[str]()
    pattern = re.compile(known.options.include or "")
    for group in sorted(known.finding.groups, key=lambda g: -len(g.sites)):
        names = {site.name for site in group.sites}
        fits = method.serves(group) is None and all(
            s.kind == "linear" and pattern.search(s.name) for s in group.sites
        )
        if not fits or names & taken:
            continue
        taken |= names
        (found,) = method.candidates(group, known.weights, None, CandidateOptions(ranks=(8,)))
        chosen.append(
            Decision(
                group.name, tuple(site.name for site in group.sites), method.name, found.rank, None, found.error, found.bound,
                group.elements, found.cost.parameters, 0, found.cost.bytes, 0, found.cost.flops, "planned by the test",
            )
        )  # fmt: skip
    return Plan(TARGET, tuple(chosen))


def nodes_of(model: ir.Model) -> Mapping[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        with runtime_of(TARGET).build(path, BuildOptions(TARGET)) as engine:
            return dict(engine.nodes())


def counted(name: str, method: str, work: Path, include: str | None = None) -> dict[str, Mapping[str, int]]:
    """What runs of the original and of the rewritten model, each as it is and fused by `Runtime.fusions`."""
    folder = exported(name)
    model, sites = rewritten(folder, method, work, include)
    assert sites
    fusions = runtime_of(TARGET).fusions(TARGET)
    original = ir.load(folder / "model.onnx")
    before = nodes_of(original)
    dense = fused.fuse(original, fusions, before, nodes_of, always=True)
    ours = fused.fuse(model, fusions, before, nodes_of, always=True)
    return {"dense": before, "dense fused": dense.nodes, "ours": nodes_of(model), "ours fused": ours.nodes}


def check(name: str, method: str, work: Path, include: str | None = None) -> None:
    found = counted(name, method, work, include)
    assert fused.fewer(found["dense"], found["ours"]) == ()
    assert fused.fewer(found["dense"], found["ours fused"]) == ()
    assert fused.fewer(found["dense fused"], found["ours fused"]) == ()
    assert fused.kinds(found["ours fused"])["attention"] >= ATTENTIONS.get(name, 1)
    # the comparison can fail: without its fusions the model has fewer than with them
    assert fused.fewer(found["ours fused"], found["ours"])


@pytest.mark.parametrize("method", ["svd-plain", "pivoted"])
@pytest.mark.parametrize("name", ["tiny_vlm", "tiny_llama"])
def test_tiny_models(name: str, method: str, tmp_path: Path) -> None:
    check(name, method, tmp_path)


@pytest.mark.parametrize("method", ["svd-plain", "pivoted"])
def test_two_layers_of_minilm(method: str, tmp_path: Path) -> None:
    check("minilm", method, tmp_path, r"encoder\.layer\.[03]\.")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svd-plain", "pivoted", "slicing"])
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_real_models(name: str, method: str, tmp_path: Path) -> None:
    check(name, method, tmp_path)


def main() -> None:
    for name in sys.argv[1:] or ATTENTIONS:
        for method in ("svd-plain", "pivoted", "slicing"):
            with tempfile.TemporaryDirectory() as work:
                found = counted(name, method, Path(work))
            for what, nodes in found.items():
                sys.stdout.write(f"{name} {method} | {what} | {sum(nodes.values())} | {fused.kinds(nodes)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
