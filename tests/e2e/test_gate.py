"""The speed gate through a whole compile: what is published is faster by measurement, or it is the original byte for byte.

Times of forms and races are made up where a test needs a certain answer; one test lets the machine answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lrcompile
from lrcompile.bench import Race, Spread
from lrcompile.errors import VerificationError
from lrcompile.records import Amount, Budget
from lrcompile.timing import Form, Timing
from tests.graphs import node, normal, proto

K = 64


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx: four MatMul 64x64 with Tanh between; rows.npz to judge by."""
    folder = tmp_path_factory.mktemp("gate")
    nodes, x = [], "x"
    for i in range(4):
        nodes.append(node("MatMul", [x, f"w{i}"], [f"m{i}"], name=f"layer{i}"))
        x = f"t{i}" if i < 3 else "y"
        nodes.append(node("Tanh", [f"m{i}"], [x], name=f"tanh{i}"))
    weights = {f"w{i}": normal(K, K, seed=i) / np.float32(8) for i in range(4)}
    onnx.save(proto(nodes, {"x": ("n", K)}, ["y"], weights), folder / "model.onnx")
    np.savez(folder / "rows.npz", x=normal(32, K))
    return folder


@pytest.fixture
def by_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form takes a microsecond for 1000 numbers of its factors."""

    def measured(form: Form, rows: Sequence[int], *rest: object) -> Iterator[Timing]:
        N = sum(form.widths)
        numbers = form.K * N if form.rank is None else form.rank * (form.K + N)
        return (Timing(form, m, 1e-9 * numbers) for m in rows)

    monkeypatch.setattr(import_module("lrcompile.tune"), "_measured", measured)


def racing(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], float]) -> list[int]:
    """Races end as `answer` says of how many weights were rewritten; which those were is written down."""
    seen: list[int] = []

    def speedup(
        child: object, dense: Path, compiled: Path, feeds: Sequence[Any], *rest: object
    ) -> tuple[Race, ...]:
        count = sum(len(t.dims) > 1 for t in onnx.load(compiled).graph.initializer) - 4
        seen.append(count)
        ratio, one = answer(count), Spread.of([1e-3, 1e-3])
        return (
            Race(
                "ort-cpu",
                1,
                ("x:8x64",),
                20,
                one,
                one,
                Spread.of([ratio] * 2),
                Spread.of([1.0] * 2),
                (0.99, 1.01),
            ),
        )

    monkeypatch.setattr(import_module("lrcompile.compile"), "speedup", speedup)
    return seen


def compiled(home: Path, out: Path, budget: Budget, **options: Any) -> lrcompile.Result:
    given = lrcompile.Options(
        budget=budget,
        methods=("svd-plain",),
        verify_data=str(home / "rows.npz"),
        cache=home / "cache",
        **options,
    )
    return lrcompile.compile(home / "model.onnx", out, given)


FAST = Budget(keep=0.5, objective="latency")


@pytest.mark.usefixtures("by_parameters")
def test_nothing_slower_is_published(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = racing(monkeypatch, lambda count: 1.01)
    result = compiled(home, tmp_path / "out", FAST)
    assert seen == [4, 2, 1]
    assert result.evidence.verdict == "unchanged" and not result.speed
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (home / "model.onnx").read_bytes()
    manifest = json.loads((tmp_path / "out" / "lrcompile.json").read_text())
    assert manifest["evidence"]["verdict"] == "unchanged"
    assert {s["reason"] for s in manifest["sites"]} == {
        "no form was measured to make the engine 1.02 times as fast"
    }


@pytest.mark.usefixtures("by_parameters")
def test_what_pays_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = racing(monkeypatch, lambda count: 1.5 if count <= 2 else 1.0)
    result = compiled(home, tmp_path / "out", FAST)
    assert seen == [4, 2]
    assert result.evidence.verdict == "passed" and len(result.plan.rewritten) == 2
    assert result.speed[0].ratio == 1.5 and "1.500 x the original's speed" in str(result)
    text = (tmp_path / "out" / "lrcompile.json").read_text() + (tmp_path / "out" / "report.html").read_text()
    assert "1.500" not in text  # no file holds what a clock said


@pytest.mark.usefixtures("by_parameters")
def test_a_margin_that_is_asked_for_holds(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    racing(monkeypatch, lambda count: 1.3)
    assert compiled(home, tmp_path / "a", FAST, margin=1.25).evidence.verdict == "passed"
    assert compiled(home, tmp_path / "b", FAST, margin=1.35).evidence.verdict == "unchanged"


@pytest.mark.usefixtures("by_parameters")
def test_a_latency_budget_is_measured(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("lrcompile.speed"), "seconds_of", lambda *given: 1e-9 * 4 * K * K)
    seen = racing(monkeypatch, lambda count: 1.5)
    result = compiled(home, tmp_path / "out", Budget(latency=Amount(0.7, relative=True)))
    assert seen and result.evidence.verdict == "passed"
    assert result.plan.kept <= 0.7
    racing(monkeypatch, lambda count: 1.1)
    with pytest.raises(VerificationError, match=r"--latency 0\.7x was not reached"):
        compiled(home, tmp_path / "missed", Budget(latency=Amount(0.7, relative=True)))
    assert not (tmp_path / "missed").exists()


def test_the_machine_may_answer(home: Path, tmp_path: Path) -> None:
    """Whatever it says: what is published was measured to be faster, or it is the original."""
    result = compiled(home, tmp_path / "out", FAST)
    if result.evidence.verdict == "unchanged":
        assert (tmp_path / "out" / "model.onnx").read_bytes() == (home / "model.onnx").read_bytes()
    else:
        assert min(s.ratio for s in result.speed) >= 1.02
    tables = list((home / "cache" / "costs").glob("ort-cpu-*.json"))
    assert len(tables) == 1 and json.loads(tables[0].read_text())["timings"]
