"""Tuning: what is missing is measured once and kept by device, version and threads; tables that come with us say so."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompile.child import Child
from lrcompile.interfaces import BuildOptions
from lrcompile.registry import factorizations
from lrcompile.speed import common_forms
from lrcompile.timing import CostTable, Form, Timing

tuning: Any = importlib.import_module("lrcompile.tune")  # the package's `tune` is the command

DENSE, PAIR = Form("dense", "linear", 32, (24,), None, "float"), Form("svd", "linear", 32, (24,), 4, "float")
DESCRIBED = {"device": "Some GPU", "version": "1.2.3"}


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(timeout=120) as made:
        yield made


def tuned(
    table: CostTable,
    wanted: list[tuple[Form, int]],
    child: Any,
    scratch: Path,
    saved: list[CostTable] | None = None,
) -> CostTable:
    made: CostTable = tuning.tune(
        table, wanted, methods=factorizations(), lowering=(), build=BuildOptions("ort-cpu", exact=False), opset=18, seed=0,
        child=child, scratch=scratch, save=(saved if saved is not None else []).append,
    )  # fmt: skip
    return made


def test_what_is_missing_is_measured_once(child: Child, tmp_path: Path) -> None:
    wanted = [(DENSE, 4), (DENSE, 64), (PAIR, 4)]
    saved: list[CostTable] = []
    table = tuned(CostTable("ort-cpu", "here", "1", 1), wanted, child, tmp_path, saved)
    # after each form: a run that is ended goes on where it was; what was disturbed is measured again at the end
    assert [len(t.timings) for t in saved][:2] == [2, 3]
    assert {(t.form, t.rows) for t in table.timings} == set(wanted)
    assert all(0 < t.seconds < 10 and t.spread >= 0 for t in table.timings)
    assert tuned(table, wanted, None, tmp_path) == table  # without a process to measure in
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("again", "kept"), [(0.5, 0.5), (3.0, 1.0)])
def test_what_was_disturbed_is_measured_once_more(
    again: float, kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quicker of both is kept; what was not disturbed is not measured again."""
    asked: list[tuple[Form, tuple[int, ...]]] = []

    def measured(form: Form, rows: list[int], *_: object) -> Iterator[Timing]:
        second = (form, tuple(rows)) in asked or any(f == form for f, _ in asked)
        asked.append((form, tuple(rows)))
        for count in rows:
            yield Timing(form, count, again if second else 1.0, 0.5 if (form, count) == (PAIR, 8) else 0.01)

    monkeypatch.setattr(tuning, "_measured", measured)
    wanted = [(DENSE, 4), (PAIR, 4), (PAIR, 8)]
    table = tuned(CostTable("ort-cpu", "here", "1", 1), wanted, None, tmp_path)
    assert asked == [(DENSE, (4,)), (PAIR, (4, 8)), (PAIR, (8,))]
    assert {(t.form, t.rows): t.seconds for t in table.timings} == {
        (DENSE, 4): 1.0,
        (PAIR, 4): 1.0,
        (PAIR, 8): kept,
    }


def test_what_a_target_refuses_is_left_out_and_said(
    child: Child, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = Form("dense", "linear", 32, (24,), None, "bfloat16")  # no such kernel on the CPU
    with caplog.at_level(logging.WARNING):
        table = tuned(CostTable("ort-cpu", "here", "1", 1), [(odd, 4), (DENSE, 4)], child, tmp_path)
    assert [t.form for t in table.timings] == [DENSE]
    assert "is not timed" in caplog.text and "bfloat16" in caplog.text


def test_the_clock_is_not_stopped_by_a_first_slow_run() -> None:
    """The first runs fill caches; the median of the later ones counts."""

    class Engine:
        def __init__(self) -> None:
            self.runs = 0

        def bound(self, feeds: object) -> Any:
            def run(times: int) -> None:
                self.runs += times
                np.linalg.svd(np.eye(20 if self.runs > 1 else 200))

            return run

    engine = Engine()
    seconds, spread = tuning.time_engine(engine, {})
    assert engine.runs >= 1 + 1 + 3 and 0 < seconds < 1 and spread >= 0


def test_a_table_is_found_again_by_device_version_and_threads(tmp_path: Path) -> None:
    table = tuning.table_of("ort-cuda", DESCRIBED, 1, tmp_path)
    assert not table.timings and table.device == "Some GPU"
    path = tuning.keep(table.with_timings([Timing(DENSE, 4, 1e-5)]), tmp_path)
    assert tuning.table_of("ort-cuda", DESCRIBED, 1, tmp_path).timings == (Timing(DENSE, 4, 1e-5),)
    for other in ({"version": "2"}, {"device": "Another"}):
        assert not tuning.table_of("ort-cuda", {**DESCRIBED, **other}, 1, tmp_path).timings
    assert not tuning.table_of("ort-cuda", DESCRIBED, 2, tmp_path).timings
    assert not tuning.table_of("trt", DESCRIBED, 1, tmp_path).timings
    path.write_text("{")
    assert not tuning.table_of("ort-cuda", DESCRIBED, 1, tmp_path).timings


def test_a_processor_has_the_name_of_its_model(tmp_path: Path) -> None:
    device = tuning.table_of("ort-cpu", {"device": "CPU", "version": "1"}, 1, tmp_path).device
    assert device and device != "CPU"


def test_tables_that_come_with_us() -> None:
    table = tuning.shipped("ort-cuda", 3)
    assert table is not None and table.fallback and table.threads == 3 and table.device == "NVIDIA H200"
    assert {"dense", "svd"} <= {t.form.method for t in table.timings}
    assert tuning.shipped("no-such-target", 1) is None
    folder = Path(importlib.import_module("lrcompile").__file__ or "").parent / "costs"
    for path in folder.glob("*.json"):  # all of them can be read
        assert CostTable.from_json(json.loads(path.read_text())).timings


def test_common_forms_are_of_few_sizes() -> None:
    for target, dtype in (("ort-cpu", "float"), ("ort-cuda", "float16")):
        forms = common_forms(target, None)
        assert {f.dtype for f, _ in forms} == {dtype} and len({f for f, _ in forms}) <= 90
    assert {f.dtype for f, _ in common_forms("ort-cuda", "bfloat16")} == {"bfloat16"}
