"""Limits of the child process: by default, as asked for, and put back afterwards."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

import lrcompile
from lrcompile.build import feeds_for, set_limits, started
from lrcompile.child import Child
from lrcompile.errors import BuildError
from lrcompile.options import Options
from lrcompile.records import EngineOptions
from lrcompile.store import save_model
from tests.graphs import model, node, normal


def product(K: int) -> ir.Model:
    return model([node("MatMul", ["x", "w"], ["y"])], {"x": ("n", K)}, ["y"], {"w": normal(K, 8)})


def test_limits_grow_with_weights_and_feeds() -> None:
    child = Child()
    left, memory = [], []
    for K, feeds in ((16, 0), (16, 100), (2_000_000, 100)):
        set_limits(child, Options(), product(K), feeds)
        assert child.deadline is not None and child.memory is not None
        left.append(child.deadline - time.monotonic())
        memory.append(child.memory)
    assert left[0] == pytest.approx(20, abs=1)  # a model below 10 MB
    assert left[0] < left[1] < left[2]
    assert memory[0] == memory[1] == 4_000_000_000 + 8 * 16 * 8 * 4
    assert memory[2] == 4_000_000_000 + 8 * 2_000_000 * 8 * 4


def test_limits_as_asked_for() -> None:
    child = Child()
    set_limits(child, replace(Options(), timeout=3.0, memory=5), product(16), 100)
    assert child.deadline is not None
    assert child.deadline - time.monotonic() == pytest.approx(3, abs=0.5)
    assert child.memory == 5


def test_a_child_of_the_caller_gets_its_own_limits_back() -> None:
    child = Child(memory=7)
    with pytest.raises(ZeroDivisionError), started(child) as same:
        assert same is child
        set_limits(child, Options(), product(16), 0)
        child.engines["trt-rtx"] = EngineOptions(level=1)
        raise ZeroDivisionError
    assert (child.deadline, child.memory, child.engines) == (None, 7, {})


def test_memory_beyond_the_limit_is_one_line(tmp_path: Path) -> None:
    made = model(
        [
            node("MatMul", ["x", "w"], ["m"]),
            node("ReduceSum", ["m"], ["s"], keepdims=0),
            node("Mul", ["s", "zero"], ["z"]),
            node("Cast", ["z"], ["n"], to=7),
            node("Add", ["n", "size"], ["shape"]),  # known only when it runs: nothing can be folded
            node("ConstantOfShape", ["shape"], ["big"]),
            node("ReduceSum", ["big"], ["sum"], keepdims=0),
            node("Add", ["m", "sum"], ["y"]),
        ],
        {"x": ("n", 16)},
        ["y"],
        {"w": normal(16, 8), "zero": normal(1) * 0, "size": (normal(1) * 0 + 600_000_000).astype("int64")},
    )
    options = Options(
        budget=lrcompile.Budget(rank="full"), memory=500_000_000, cache=tmp_path / "cache", timeout=300
    )  # a busy machine must not end it first
    with pytest.raises(BuildError, match="memory"):
        lrcompile.compile(made, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_no_guess_is_legal(tmp_path: Path) -> None:
    made = model(
        [node("Reshape", ["x", "shape"], ["r"]), node("MatMul", ["r", "w"], ["y"])],
        {"x": ("n", 16)},
        ["y"],
        {"w": normal(16, 8), "shape": (normal(2) * 0 + (1237, 16)).astype("int64")},
    )
    path = save_model(made, tmp_path)
    with Child() as child, pytest.raises(BuildError, match="give --data or --dim"):
        feeds_for(made, path, child, "ort-cpu", seed=0, dims={}, like=None)
    with Child() as child:
        assert len(feeds_for(made, path, child, "ort-cpu", seed=0, dims={"n": 1237}, like=None)) == 3
