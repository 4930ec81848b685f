"""Every example runs by itself and says what its README promises. A new file in `examples/` needs a line here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# What each must print; nothing else of its output is looked at.
WANTED = {
    "onnx_ir_pass": (
        "2 of 2 groups rewritten",
        "nodes: Mul MatMul Add Relu MatMul -> Mul MatMul MatMul Concat Add Relu MatMul MatMul Concat Gather",
        "a second time: nothing left to do",
    ),
    "graphsurgeon_pass": (
        "-> Mul MatMul MatMul Concat Gather Add Relu MatMul MatMul Concat Gather",
        "outputs: y hidden",
    ),
    "gs_script": (
        "nodes: Mul MatMul Add Relu MatMul -> MatMul MatMul Concat Add Relu MatMul MatMul Concat Gather",
        "passed: cosine 0.99",
    ),
    "polygraphy_compare": (
        "stored outputs: reproduced on 3 feeds",
        "original and compiled: within cosine 0.99",
    ),
    "deploy": ("ok: model.onnx computes the outputs", "y: cosine 0.99", "deployed: config.yaml"),
}
HELPERS = {"tiny_model"}

Ran = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def ran(folder: Path) -> Mapping[str, Future[Ran]]:
    """All of them, two at a time, in an empty folder and with an empty cache."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
    }

    def run(name: str) -> Ran:
        command = [sys.executable, str(EXAMPLES / f"{name}.py")]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    with ThreadPoolExecutor(2) as pool:
        return {name: pool.submit(run, name) for name in WANTED}


def test_every_example_is_here() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == {*WANTED, *HELPERS}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"{name}.py" in readme for name in {*WANTED, *HELPERS})


@pytest.mark.parametrize("name", WANTED)
def test_example(name: str, ran: Mapping[str, Future[Ran]]) -> None:
    result = ran[name].result()
    assert result.returncode == 0, result.stderr
    for words in WANTED[name]:
        assert words in result.stdout, result.stdout


def test_examples_leave_nothing_behind(ran: Mapping[str, Future[Ran]], folder: Path) -> None:
    for future in ran.values():
        future.result()
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == ["cache"]
