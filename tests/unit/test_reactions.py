"""Reactions: predicted movements against those of the model itself, and what happens where derivatives cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import lrcompile
from lrcompile.calibrate import calibrate
from lrcompile.feeds import inputs_of, open_feeds
from lrcompile.load import load
from lrcompile.reactions import reacting
from lrcompile.sites import find
from lrcompile.store import Cache
from tests.graphs import Array, model, node, normal

pytest.importorskip("torch")

ROWS = 24
FEEDS = [{"x": np.random.default_rng(i).standard_normal((ROWS, 5, 12)).astype(np.float32)} for i in range(8)]


@pytest.fixture(scope="module")
def child() -> Iterator[lrcompile.Child]:
    with lrcompile.Child() as child:
        yield child


def network(activation: str = "Tanh", dead: bool = False) -> ir.Model:
    """Two layers with biases, and a third one whose output nobody asks for (dead)."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="first"),
        node("Add", ["p", "b"], ["h"]),
        node(activation, ["h"], ["t"]),
        node("MatMul", ["t", "v"], ["y"], name="second"),
    ]
    held = {"w": normal(12, 16, seed=1) / 3, "b": normal(16, seed=2), "v": normal(16, 6, seed=3) / 4}
    outputs = ["y"]
    if dead:
        nodes += [node("MatMul", ["t", "u"], ["z"], name="third"), node("Sign", ["z"], ["s"])]
        held["u"], outputs = normal(16, 4, seed=4), ["y", "s"]
    return model(nodes, {"x": ("batch", "sequence", 12)}, outputs, held)


def studied(
    made: ir.Model, folder: Path, child: lrcompile.Child
) -> tuple[lrcompile.records.Finding, object, str]:
    source = load(made)
    finding, feeds = find(source.model), open_feeds(FEEDS, inputs_of(source.model))
    cache = Cache(folder)
    stored = calibrate(source.model, finding, feeds, source.key, target="ort-cpu", child=child, cache=cache)
    statistics, told = reacting(source, finding, stored, feeds, child=child, cache=cache, seed=0)
    return finding, statistics, told


def outputs(w: Array, v: Array, b: Array) -> Array:
    X = np.concatenate([f["x"].astype(np.float64) for f in FEEDS])
    made: Array = np.tanh(X @ w + b) @ v
    return made


def test_predicted_movements_are_those_of_the_model(tmp_path: Path, child: lrcompile.Child) -> None:
    """tr(E^T C' E G) of small random errors against what they do: within a factor, and nearly in the same order."""
    made = network()
    finding, statistics, told = studied(made, tmp_path, child)
    assert told == ""
    constants = {
        n: v.const_value.numpy().astype(np.float64)
        for n, v in made.graph.initializers.items()
        if v.const_value
    }
    w, v, b = constants["w"], constants["v"], constants["b"]
    want = outputs(w, v, b)
    predicted, measured = [], []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        site = finding.sites[seed % 2]
        W = w if site.name == "first" else v
        E = np.outer(rng.standard_normal(W.shape[0]), rng.standard_normal(W.shape[1])) * 10 ** rng.uniform(
            -4, -2.5
        )
        known = statistics.of(site)  # type: ignore[attr-defined]
        assert known.reaction is not None
        C, G = known.weighing(False), known.reaction.output
        predicted.append(float(np.vdot(C @ E, E @ G)))
        got = outputs(w + E, v, b) if site.name == "first" else outputs(w, v + E, b)
        measured.append(float(np.sum((got - want) ** 2) / np.sum(want**2)) * len(FEEDS))
    ranks = np.corrcoef(np.argsort(np.argsort(predicted)), np.argsort(np.argsort(measured)))[0, 1]
    assert ranks > 0.95
    spread = np.log(np.array(predicted) / np.array(measured))
    assert np.std(spread) < 0.7, spread


def test_cached(tmp_path: Path, child: lrcompile.Child, monkeypatch: pytest.MonkeyPatch) -> None:
    first = studied(network(), tmp_path, child)
    asked: list[str] = []
    call = lrcompile.Child.call
    monkeypatch.setattr(
        lrcompile.Child, "call", lambda self, f, *a, **k: (asked.append(f), call(self, f, *a, **k))[1]
    )
    again = studied(network(), tmp_path, child)
    assert not asked
    for a, b in zip(first[0].sites, again[0].sites, strict=True):
        one, two = first[1].of(a), again[1].of(b)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(one.reaction.output, two.reaction.output)


def test_what_no_output_feels_has_no_reaction(tmp_path: Path, child: lrcompile.Child) -> None:
    """The derivative of a sign is zero everywhere."""
    finding, statistics, told = studied(network(dead=True), tmp_path, child)
    assert told == ""
    by_name = {s.name: statistics.of(s) for s in finding.sites}  # type: ignore[attr-defined]
    assert by_name["third"].reaction is None and by_name["first"].reaction is not None


def test_an_operator_without_derivative_is_told(tmp_path: Path, child: lrcompile.Child) -> None:
    """And the compile goes on by sensitivity alone, and says so."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="first"),
        node("If", ["yes"], ["y"], then_branch=branch("Relu"), else_branch=branch("Tanh")),
    ]
    made = model(nodes, {"x": ("batch", "sequence", 12)}, ["y"], {"w": normal(12, 16), "yes": np.array(True)})
    told = studied(made, tmp_path / "a", child)[2]
    assert told.startswith("plans go by measured sensitivity alone: derivatives of If")
    options = lrcompile.Options(budget=lrcompile.Budget(keep=0.8), data=FEEDS, cache=tmp_path / "b")
    result = lrcompile.compile(made, tmp_path / "out", options, child=child)
    assert result.plan.movement is not None and result.plan.rewritten
    assert "measured sensitivity alone" in (tmp_path / "out" / "report.html").read_text()


def branch(op: str):  # type: ignore[no-untyped-def]
    from onnx import TensorProto, helper

    out = helper.make_tensor_value_info("branch", TensorProto.FLOAT, ["batch", "sequence", 16])
    return helper.make_graph([helper.make_node(op, ["p"], ["branch"])], op, [], [out])
