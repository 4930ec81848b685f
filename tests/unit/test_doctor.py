"""What the doctor says of a target that runs, that computes wrongly, and that can only build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from lrcompile.doctor import Check, _devices, _target, write_model
from lrcompile.errors import BuildError
from lrcompile.interfaces import Availability


@dataclass
class Engine:
    """Gives the right answer, moved."""

    answer: np.ndarray[Any, Any]

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert feeds["ids"].dtype == np.int64
        return {"y": self.answer}

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@dataclass
class Fake:
    """A runtime and the child in which it lives, in one."""

    answer: np.ndarray[Any, Any]
    available: Availability = field(default_factory=lambda: Availability(True, versions=(("fake", "1"),)))
    broken: str = ""

    def engine_file(self, target: str) -> str | None:
        return "engine.plan" if self.available.unrunnable else None

    def build(self, *_: object) -> Engine:
        if self.broken:
            raise BuildError(self.broken)
        return Engine(self.answer)

    def call(self, function: str, *_: object, what: str) -> int | Availability:
        if function == "lrcompile.build:availability_of":
            return self.available
        assert function == "lrcompile.doctor:serialize"
        if self.broken:
            raise BuildError(self.broken)
        return 1234


@pytest.fixture
def expected(tmp_path: Path) -> Iterator[np.ndarray[Any, Any]]:
    yield write_model(tmp_path / "model.onnx")


def said(fake: Fake, tmp_path: Path, expected: np.ndarray[Any, Any]) -> Check:
    return _target(fake, "fake", fake, tmp_path / "model.onnx", expected)  # type: ignore[arg-type]


def test_the_model_has_ten_layers_and_computes_what_is_expected(
    tmp_path: Path, expected: np.ndarray[Any, Any]
) -> None:
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.node) == 10
    (y,) = ReferenceEvaluator(model).run(None, {"ids": np.array([0, 5, 31, 7])})
    assert np.abs(y - expected).max() < 1e-5  # float32 against float64


def test_a_target_that_runs(tmp_path: Path, expected: np.ndarray[Any, Any]) -> None:
    check = said(Fake(expected), tmp_path, expected)
    assert (check.ok, check.detail) == (True, "ran a model of ten layers (fake 1)")


@pytest.mark.parametrize("wrong", [0.1, np.nan])
def test_a_target_that_computes_wrongly(wrong: float, tmp_path: Path, expected: np.ndarray[Any, Any]) -> None:
    check = said(Fake(expected + wrong), tmp_path, expected)
    assert not check.ok
    assert "wrong by" in check.detail


def test_a_target_that_only_builds(tmp_path: Path, expected: np.ndarray[Any, Any]) -> None:
    away = Availability(True, versions=(("fake", "1"),), unrunnable="no such GPU")
    check = said(Fake(expected, away), tmp_path, expected)
    assert (check.ok, check.detail) == (
        True,
        "built a model of ten layers (1,234 bytes), not run: no such GPU (fake 1)",
    )
    check = said(Fake(expected, away, broken="it crashed"), tmp_path, expected)
    assert (check.ok, check.detail) == (False, "it crashed")


def test_a_target_that_is_missing(tmp_path: Path, expected: np.ndarray[Any, Any]) -> None:
    check = said(Fake(expected, Availability(False, "pip install it")), tmp_path, expected)
    assert (check.ok, check.remedy) == (False, "pip install it")


def test_the_gpu_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_devices.__globals__, "nvidia_smi", lambda fields: "NVIDIA H200, 570.1, 143771")
    (check,) = _devices()
    assert (check.name, check.detail) == ("NVIDIA H200", "driver 570.1, 140 GiB of memory")
    monkeypatch.setitem(_devices.__globals__, "nvidia_smi", lambda fields: "")
    assert list(_devices()) == []
