"""Inputs in 8 bits through a whole compile: planned, published, verified again, given back as a plan, and refused where a target has none."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest

import lrcompile
from lrcompile.errors import UsageError, VerificationError
from lrcompile.records import Amount, Budget, Limit, Plan
from lrcompile.timing import Form, Timing
from tests.graphs import node, normal, proto

K = 64
SMALL = Budget(size=Amount(0.35, relative=True))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx: three MatMul 64x64 with biases, two of which read x; rows.npz, whose channels have ranges of their own."""
    folder = tmp_path_factory.mktemp("activations")
    nodes = []
    for name, source in (("left", "x"), ("right", "x"), ("last", "sum")):
        nodes.append(node("MatMul", [source, f"w.{name}"], [f"m.{name}"], name=name))
        nodes.append(node("Add", [f"m.{name}", f"b.{name}"], [f"a.{name}"], name=f"{name}.bias"))
        if name == "right":
            nodes.append(node("Mul", ["a.left", "a.right"], ["product"], name="times"))
            nodes.append(node("Tanh", ["product"], ["sum"], name="tanh"))
    nodes.append(node("Identity", ["a.last"], ["y"], name="out"))
    weights = {
        f"w.{n}": normal(K, K, seed=i) / np.float32(8) for i, n in enumerate(("left", "right", "last"))
    }
    biases = {f"b.{n}": normal(K, seed=9) for n in ("left", "right", "last")}
    onnx.save(proto(nodes, {"x": ("n", K)}, ["y"], weights | biases), folder / "model.onnx")
    np.savez(folder / "rows.npz", x=normal(96, K) * np.exp(normal(K, seed=5)))
    return folder


def options(home: Path, **more: object) -> lrcompile.Options:
    given = {
        "data": str(home / "rows.npz"),
        "methods": ("dense",),
        "activations": ("auto",),
        "cache": home / "cache",
    }
    return lrcompile.Options(**{"budget": SMALL, "timeout": 200.0, **given, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result(home: Path) -> lrcompile.Result:
    return lrcompile.compile(home / "model.onnx", home / "out", options(home))


def test_what_is_published(home: Path, result: lrcompile.Result) -> None:
    document = json.loads((home / "out" / "lrcompile.json").read_text())
    assert [(s["method"], s["storage"], s["activations"]) for s in document["sites"]] == [
        ("dense", "int8", "int8")
    ] * 3
    kinds = Counter(n.op_type for n in onnx.load(home / "out" / "model.onnx").graph.node)
    assert kinds["MatMulInteger"] == 3 and kinds["DynamicQuantizeLinear"] == 2 and kinds["MatMul"] == 0
    assert result.evidence.verdict == "passed"
    assert (
        0.99 < result.evidence.outputs[0][1].cosine < 0.999999
    )  # judged with its inputs rounded, not without
    assert "int8, input int8" in (home / "out" / "report.html").read_text()


def test_the_folder_verifies_against_the_original(home: Path, result: lrcompile.Result) -> None:
    lrcompile.verify(
        home / "out", original=home / "model.onnx", data=str(home / "rows.npz"), options=options(home)
    )


def test_a_plan_is_read_again(home: Path, result: lrcompile.Result) -> None:
    plan = Plan.from_json(json.loads(json.dumps(result.plan.to_json())))
    again = lrcompile.compile(home / "model.onnx", home / "again", options(home, budget=Budget(), plan=plan))
    assert (home / "again" / "model.onnx").read_bytes() == (home / "out" / "model.onnx").read_bytes()
    assert [d.activations for d in again.plan.rewritten] == ["int8"] * 3


@pytest.mark.parametrize(
    ("kind", "storage", "why"),
    [("int8-static", "int8", "step of each run"), ("int8", "uint4", "beside weights in"), ("int3", "int8", "there are no activations")],
)  # fmt: skip
def test_a_plan_that_asks_for_what_is_not_there_is_refused(
    home: Path, result: lrcompile.Result, kind: str, storage: str, why: str
) -> None:
    edited = tuple(dataclasses.replace(d, activations=kind, storage=storage) for d in result.plan.decisions)
    plan = dataclasses.replace(result.plan, decisions=edited)
    with pytest.raises(UsageError, match=why):
        lrcompile.compile(home / "model.onnx", home / "no", options(home, budget=Budget(), plan=plan))


def test_a_broken_bias_beside_a_rounded_input_is_found(
    home: Path, result: lrcompile.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first question leaves out what rounding an input does, and nothing else."""
    rewrite = import_module("lrcompile.in_place")
    right = rewrite.bias_in_place
    compiling = import_module("lrcompile.compile")
    honest = compiling.rewrite

    def broken(model: object, sets: Sequence[object]) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "bias_in_place", lambda site, bias: right(site, bias) + 0.01)
            return honest(model, sets)

    for stage in (compiling, import_module("lrcompile.proof")):
        monkeypatch.setattr(stage, "rewrite", broken)
    with pytest.raises(VerificationError, match="were no input rounded"):
        lrcompile.compile(home / "model.onnx", home / "broken", options(home))


def test_time_chooses_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are made up here: rounded inputs take half of what the weight takes, codes alone as much as it."""

    def measured(form: Form, rows: Sequence[int], *rest: object) -> Iterator[Timing]:
        return (Timing(form, m, 5e-6 if form.activations else 1e-5) for m in rows)

    monkeypatch.setattr(import_module("lrcompile.tune"), "_measured", measured)
    monkeypatch.setattr(import_module("lrcompile.compile"), "speedup", lambda *rest: ())
    asked = Budget(objective="latency", max_error=(Limit("cosine", 0.9),))
    given = options(home, budget=asked, storage=("auto",), cache=home / "another cache", force=True)
    made = lrcompile.compile(home / "model.onnx", home / "fast", given)
    assert {d.activations for d in made.plan.rewritten} == {"int8"} and made.plan.rewritten
    assert all("expected to take 0.50 of the time" in d.reason for d in made.plan.rewritten)


def test_16_bits_for_the_whole_graph_are_refused_beside_it(home: Path) -> None:
    with pytest.raises(UsageError, match="--activations"):
        lrcompile.compile(home / "model.onnx", home / "no", options(home, precision="fp16"))
