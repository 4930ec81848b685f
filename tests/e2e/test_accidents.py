"""Accidents during a whole compile: killed, interrupted, out of disk, two at once. OUT is absent or complete, and nothing else.

Each compile is a process of its own, struck at a moment that can be seen from outside: a file that has just appeared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.store import check_folder
from tests import struck

pytestmark = pytest.mark.timeout(180)


class Compile(NamedTuple):
    """A process that compiles, and the file that holds what it says."""

    process: ForkServerProcess
    said: Path

    def result(self) -> tuple[int, str]:
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.said.read_text().strip()


class Place:
    """A model, the folder in which OUT will be (alone), and a cache."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model.onnx"
        self.parent = folder / "place"
        self.out = self.parent / "out"
        self.cache = folder / "cache"
        self.started = 0
        self.parent.mkdir()
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal((384, 384)).astype(np.float32) / 16 for _ in range(2)]
        onnx.save(
            helper.make_model(
                helper.make_graph(
                    [
                        helper.make_node("MatMul", [f"v{i}", f"w{i}"], [f"v{i + 1}"], name=f"layer{i}")
                        for i in range(2)
                    ],
                    "g",
                    [helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["n", 384])],
                    [helper.make_tensor_value_info("v2", TensorProto.FLOAT, ["n", 384])],
                    [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
                ),
                opset_imports=[helper.make_opsetid("", 17)],
                ir_version=8,
            ),
            self.model,
        )

    def start(self, *, force: bool = False) -> Compile:
        self.started += 1
        said = self.cache.with_name(f"said-{self.started}")
        return Compile(struck.start(self.model, self.out, self.cache, said, force), said)

    def run(self, *, force: bool = False) -> tuple[int, str]:
        """Exit code and what was said."""
        return self.start(force=force).result()

    def beside(self) -> list[str]:
        """What is in OUT's parent."""
        return sorted(p.name for p in self.parent.iterdir())

    def kept(self) -> dict[str, int]:
        """Arrays in the cache, and when each was written."""
        return {p.name: p.stat().st_mtime_ns for p in self.cache.glob("arrays/*/*")}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def strike(compiling: Compile, moment: Callable[[], bool], number: int) -> bool:
    """Send a signal at the first moment that the condition holds; False when the process ended before."""
    process = compiling.process
    assert process.pid is not None
    while process.is_alive():
        with contextlib.suppress(OSError):
            if moment():
                children = psutil.Process(process.pid).children(recursive=True)
                os.kill(process.pid, number)
                process.join()
                _, alive = psutil.wait_procs(children, timeout=20)
                assert not alive, "a child outlived its parent"
                return True
        time.sleep(0.002)
    return False


def staged(place: Place, name: str) -> bool:
    return any(place.parent.glob(f".out.lrcompile-*/{name}"))


MOMENTS: tuple[Callable[[Place], bool], ...] = (
    lambda place: len(place.kept()) >= 3,
    lambda place: staged(place, "model.onnx"),
    lambda place: staged(place, "lrcompile.json"),
)


def test_kill_and_run_again(place: Place) -> None:
    """kill -9 at three moments in a row, then to the end: the arrays of the killed runs are taken, not made again."""
    kept: dict[str, int] = {}
    for moment in MOMENTS:
        if strike(place.start(), lambda moment=moment: moment(place), signal.SIGKILL):
            assert not place.out.exists() or check_folder(place.out)
        now = place.kept()
        assert {key: now[key] for key in kept} == kept, "an array was computed twice"
        kept = now
    assert len(kept) >= 3
    assert place.run(force=True) == (0, "")
    assert place.beside() == ["out"]
    check_folder(place.out)
    assert {key: value for key, value in place.kept().items() if key in kept} == kept
    assert list((place.cache / "scratch").iterdir()) == []
    # Killed while it replaces a folder: the old one is still whole.
    before = (place.out / "lrcompile.json").read_bytes()
    assert strike(place.start(force=True), lambda: staged(place, "model.onnx"), signal.SIGKILL)
    assert (place.out / "lrcompile.json").read_bytes() == before
    check_folder(place.out)


def test_interrupt(place: Place) -> None:
    """Ctrl-C leaves nothing at all, at once."""
    assert strike(place.start(), lambda: len(place.kept()) >= 2, signal.SIGINT)
    assert place.beside() == []
    assert list((place.cache / "scratch").iterdir()) == []


def test_two_at_once(place: Place) -> None:
    ended = [compiling.result() for compiling in (place.start(), place.start())]
    assert sorted(code for code, _ in ended) == [0, 2]
    (loser,) = [said for code, said in ended if code]
    assert "another lrcompile is writing" in loser
    assert len(loser.splitlines()) == 1
    assert place.beside() == ["out"]
    check_folder(place.out)


def test_out_exists(place: Place) -> None:
    place.out.mkdir()
    code, said = place.run()
    assert code == 2
    assert "exists" in said
    assert list(place.out.iterdir()) == []


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at a folder. Skips the test where one cannot be mounted."""
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("full", ["place", "cache"])
def test_disk_full(place: Place, full: str) -> None:
    with mounted(getattr(place, "parent" if full == "place" else "cache"), "size=512k"):
        code, said = place.run()
        assert code == 4, said
        assert len(said.splitlines()) == 1
        assert "disk is full" in said
        assert place.beside() == []
        assert not any(place.cache.glob("scratch/*"))


@pytest.mark.parametrize("closed", ["place", "cache"])
def test_read_only(place: Place, closed: str) -> None:
    with mounted(getattr(place, "parent" if closed == "place" else "cache"), "ro"):
        code, said = place.run()
        assert code == 2, said
        assert len(said.splitlines()) == 1
        assert "read-only" in said
        assert place.beside() == []


def test_bad_models(place: Place) -> None:
    """Exit code 3, one line that names the file, no output left."""
    whole = place.model.read_bytes()
    os.mkfifo(place.model.with_name("fifo"))
    place.model.write_bytes(whole[: len(whole) // 2])
    for name in ("model.onnx", "fifo"):
        place.model = place.model.with_name(name)
        code, said = place.run()
        assert code == 3, said
        assert len(said.splitlines()) == 1
        assert str(place.model) in said
        assert place.beside() == []
