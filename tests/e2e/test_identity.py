"""Under ``--rank full`` every odd but legal graph comes out computing what it computed, with the same interface.

Verification's first question is part of `compile`: what fails it raises. The published file is held against the original once more here,
by numpy on the graph's own feeds, because a verifier that never says no would pass this test otherwise.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

import lrcompile
from lrcompile.interfaces import BuildOptions
from lrcompile.records import Budget
from tests.odd_graphs import FEATURES, OddGraph, corpus, odd_graphs

# Relative L2 of an output: rounding of factors and of sums over two dozen terms, through at most four sites in a row.
ROOM = {1: 1e-4, 11: 1e-9, 10: 5e-2, 16: 3e-1}  # float, double, float16, bfloat16, by ONNX's numbers


@pytest.fixture(scope="module")
def child() -> Iterator[lrcompile.Child]:
    """One long-lived process for all graphs; it starts anew by itself after a crash."""
    with lrcompile.Child() as child:
        yield child


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


PARTS = 6  # of the corpus: two processes share the tests


@pytest.mark.parametrize("part", range(PARTS))
def test_identity(part: int, child: lrcompile.Child, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for every odd feature that there is. Pictures have tests of their own, and take half the time of a small compile."""
    page = importlib.import_module("lrcompile.report.view")  # the package has a function of that name
    monkeypatch.setattr(page, "_pictures", lambda document: iter(()))
    for graph in corpus(1, len(FEATURES))[part::PARTS]:
        compiled(graph, child, cache)


@pytest.mark.slow
@settings(
    max_examples=300, derandomize=True, deadline=None, database=None, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(graph=odd_graphs())
def test_identity_of_many(graph: OddGraph, child: lrcompile.Child, cache: Path) -> None:
    compiled(graph, child, cache)


def compiled(graph: OddGraph, child: lrcompile.Child, cache: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "model.onnx", Path(folder) / "out"
        onnx.save(graph.model, path)
        options = lrcompile.Options(
            target=target_of(graph),
            budget=Budget(rank="full"),
            data=graph.feeds,
            verify_data=graph.feeds,
            cache=cache,
        )
        result = lrcompile.compile(path, out, options, child=child)
        check(graph, path, out, result, child)


def check(graph: OddGraph, path: Path, out: Path, result: lrcompile.Result, child: lrcompile.Child) -> None:
    rewritten = [s for s in result.manifest["sites"] if s["method"] != "dense"]
    assert result.evidence.verdict == ("passed" if rewritten else "unchanged"), graph.label
    # behind a weight of NaN or Inf nothing is taken, which the expectation does not know
    if all(s.certain and s.reason != "finite" for s in graph.sites):
        assert len(rewritten) == sum(s.taken for s in graph.sites), (graph.label, str(result.plan))
    assert all(s["reason"] for s in result.manifest["sites"]), graph.label
    made = onnx.load(out / "model.onnx")
    assert interface(made) == interface(graph.model), graph.label
    if not any(s.reason == "finite" for s in graph.sites):
        with child.build(target_of(graph), out / "model.onnx", BuildOptions("")) as engine:
            for feed in graph.feeds:
                expected = original_of(graph, path, child, feed)
                for (name, a), (other, b) in zip(expected.items(), engine.run(feed).items(), strict=True):
                    assert name == other
                    assert close(a, b, room_for(graph)), (graph.label, name, a, b)


def original_of(
    graph: OddGraph, path: Path, child: lrcompile.Child, feed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    with child.build(target_of(graph), path, BuildOptions("")) as engine:
        return engine.run(feed)


def close(a: np.ndarray, b: np.ndarray, room: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind not in "fV" and not a.dtype.name.startswith(("float", "bfloat")):
        return bool((a == b).all())
    x, y = a.astype(np.float64), b.astype(np.float64)
    return bool(np.linalg.norm(x - y) <= room * np.linalg.norm(x) + 1e-6)


def room_for(graph: OddGraph) -> float:
    """Room for the coarsest float type anywhere in the model; an entry a thousand times the others takes three digits from them."""
    model = graph.model
    types = {1} | {t.data_type for t in model.graph.initializer}
    types |= {
        v.type.tensor_type.elem_type
        for v in (*model.graph.input, *model.graph.output, *model.graph.value_info)
    }
    types |= {a.t.data_type for n in model.graph.node for a in n.attribute if a.HasField("t")}
    types |= {a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"}
    room = max(ROOM[t] for t in types if t in ROOM)
    return min(1e3 * room, 0.5) if "outlier" in graph.features else room


def target_of(graph: OddGraph) -> str:
    return "ort-cpu" if graph.runs_on_ort else "reference"


def interface(model: onnx.ModelProto) -> object:
    """What a caller sees. In IR 3 the constants stand among the inputs: those may change."""
    constants = {i.name for i in model.graph.initializer} if model.ir_version < 4 else set()
    return (
        model.ir_version,
        sorted(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        [v.SerializeToString(deterministic=True) for v in model.graph.input if v.name not in constants],
        [(v.name, v.type.SerializeToString(deterministic=True)) for v in model.graph.output],
        sorted((p.key, p.value) for p in model.metadata_props),
        model.graph.name,
        model.doc_string,
        model.producer_name,
    )


# the reference runtime has tests enough, and reading files of bfloat16 has its own
ON_THE_COMMAND_LINE = [graph for graph in corpus(5, 40) if graph.runs_on_ort][:20]


# each is two cold processes: three of them in every run, all twenty in `make test-all`
@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(graph, id=str(i), marks=[pytest.mark.slow] if i >= 3 else [])
        for i, graph in enumerate(ON_THE_COMMAND_LINE)
    ],
)
def test_identity_from_the_command_line(graph: OddGraph, tmp_path: Path, child: lrcompile.Child) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out"
    onnx.save(graph.model, path)
    (tmp_path / "data").mkdir()
    for i, feed in enumerate(graph.feeds):
        np.savez(tmp_path / "data" / f"{i}.npz", **feed)
    command = [
        sys.executable, "-m", "lrcompile", "compile", str(path), "-o", str(out), "--rank", "full", "--target", target_of(graph),
        "--data", str(tmp_path / "data"), "--verify-data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert interface(onnx.load(out / "model.onnx")) == interface(graph.model)
    for feed in graph.feeds:
        if not any(s.reason == "finite" for s in graph.sites):
            with child.build(target_of(graph), out / "model.onnx", BuildOptions("")) as engine:
                ours = engine.run(feed)
            for name, a in original_of(graph, path, child, feed).items():
                assert close(a, ours[name], room_for(graph)), (graph.label, name)
