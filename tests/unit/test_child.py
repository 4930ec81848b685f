"""The child process: what crashes, hangs, grows or breaks in it costs one line of error and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lrcompile.child import Child
from lrcompile.errors import BuildError, LrcompileError, ModelError
from lrcompile.interfaces import BuildOptions

# What runs in the child: a module on sys.path, as the core's own functions are.
TRICKS = """
import ctypes, os, subprocess, sys, time
import numpy as np
from lrcompile.errors import ModelError

def crash():
    print("about to read address zero", file=sys.stderr)
    ctypes.string_at(0)

def abort_like_cpp():
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\\n  what():  std::bad_alloc\\n")
    os.abort()

def hang(): time.sleep(1000)
def hang_with_the_gil(): ctypes.PyDLL(None).sleep(1000)
def grow():
    held = []
    while True:
        held.append(np.ones(2_000_000)); time.sleep(0.01)
def ask_for_too_much(): return np.empty(1 << 60, np.uint8)
def exit_with(code): os._exit(code)
def refuse(): raise ModelError("the model\\nis bad")
def break_down(): return {}["a key"]
def give_a_lambda(): return lambda: None
def chatter():
    for _ in range(100): os.write(1, b"x" * 100_000)
    time.sleep(0.3)
    os.write(2, b"\\x1b[31mthe\\x07 end\\x1b[0m\\n")
    os.abort()
def write_into(array): array += 1; return array
def start_another():
    return subprocess.Popen(["sleep", "1000"]).pid
def read_stdin(): return sys.stdin.read()
def blas_threads():
    import threadpoolctl
    return [lib["num_threads"] for lib in threadpoolctl.threadpool_info()]
def core_limit():
    import resource
    return resource.getrlimit(resource.RLIMIT_CORE)
def is_engine(engine): return type(engine).__name__
def are_engines(nested): return [hasattr(nested[0], "run"), hasattr(nested[1]["second"], "run")]
"""


@pytest.fixture(scope="module")
def tricks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tricks")
    (folder / "child_tricks.py").write_text(TRICKS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def child(tricks: Path) -> Iterator[Child]:
    """One long-lived child for the whole file: each test leaves it to the next, dead or alive."""
    with Child(timeout=30) as child:
        yield child


def works(child: Child) -> bool:
    return bool(child.call("operator:add", 1, 2) == 3)


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.01)
                continue
        return True
    return False


def add_model(folder: Path) -> Path:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"], name="double")], "g", value[:1], value[1:]
    )
    path = folder / "add.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# --- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("crash", ["crashed with SIGSEGV", "about to read address zero"]),
        ("abort_like_cpp", ["crashed with SIGABRT", "out of memory", "std::bad_alloc"]),
        ("chatter", ["crashed with SIGABRT", "the end"]),
    ],
)
def test_a_crash_is_one_line_that_names_signal_and_last_words(
    child: Child, function: str, words: list[str]
) -> None:
    with pytest.raises(BuildError) as caught:
        child.call(f"child_tricks:{function}")
    message = str(caught.value)
    assert all(word in message for word in [f"child_tricks:{function}", *words])
    assert message.isprintable()
    assert len(message) < 700
    assert works(child)


def test_an_exit_is_reported(child: Child) -> None:
    with pytest.raises(BuildError, match="ended with exit code 3"):
        child.call("child_tricks:exit_with", 3)
    assert works(child)


def test_a_kill_by_the_system_is_told_as_want_of_memory(child: Child) -> None:
    pid = child.call("os:getpid")
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(BuildError, match=r"SIGKILL.*memory"):
        child.call("child_tricks:hang")
    timer.join()
    assert works(child)


@pytest.mark.parametrize("function", ["hang", "hang_with_the_gil"])
def test_beyond_the_time_limit_it_is_killed(child: Child, function: str) -> None:
    pid = child.call("os:getpid")
    started = time.monotonic()
    with pytest.raises(BuildError, match=rf"^child_tricks:{function}: time limit of 0\.4 s"):
        child.call(f"child_tricks:{function}", timeout=0.4)
    assert time.monotonic() - started < 2
    assert gone(pid, 1)
    assert works(child)


def test_no_request_lasts_beyond_the_deadline(tricks: Path) -> None:
    with Child(timeout=30) as child:
        child.deadline = time.monotonic() + 0.6
        assert works(child)
        with pytest.raises(
            BuildError, match=r"hang: time limit of 0\.6 s reached; --timeout"
        ):  # all of it, not the rest
            child.call("child_tricks:hang")
        assert time.monotonic() < child.deadline + 5  # a start on a busy machine included
        child.deadline = None
        assert works(child)


def test_starting_up_does_not_count_against_the_limit(tricks: Path) -> None:
    with Child(timeout=0.05) as child:
        assert works(child)


def test_beyond_the_memory_limit_it_is_killed(child: Child) -> None:
    with pytest.raises(BuildError, match=r"child_tricks:grow: memory limit of 300 MB reached"):
        child.call("child_tricks:grow", memory=300 << 20)
    assert works(child)


def test_an_allocation_that_fails_is_told_as_memory_and_kills_nothing(child: Child) -> None:
    pid = child.call("os:getpid")
    with pytest.raises(BuildError, match="out of memory"):
        child.call("child_tricks:ask_for_too_much")
    assert child.call("os:getpid") == pid


def test_our_own_errors_keep_their_class_and_others_become_build_errors(child: Child) -> None:
    pid = child.call("os:getpid")
    with pytest.raises(ModelError, match=r"^the model is bad$"):
        child.call("child_tricks:refuse")
    with pytest.raises(BuildError, match=r"^breaking down: KeyError: 'a key'$"):
        child.call("child_tricks:break_down", what="breaking down")
    with pytest.raises(BuildError, match="ModuleNotFoundError"):
        child.call("no_such_module_anywhere:function")
    with pytest.raises(BuildError, match="give_a_lambda"):  # the reply cannot be pickled
        child.call("child_tricks:give_a_lambda")
    assert child.call("os:getpid") == pid


def test_an_argument_that_cannot_be_sent_is_the_callers_error(child: Child) -> None:
    with pytest.raises(Exception, match=r"pickle|local object"):
        child.call("builtins:repr", lambda: None)
    assert works(child)


def test_what_a_builder_started_dies_with_it(child: Child) -> None:
    grandchild = child.call("child_tricks:start_another")
    with pytest.raises(BuildError):
        child.call("child_tricks:crash")
    assert gone(grandchild, 1)


def test_interrupting_the_parent_kills_the_child(child: Child) -> None:
    pid = child.call("os:getpid")
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        child.call("child_tricks:hang")
    timer.join()
    assert gone(pid, 1)
    assert works(child)


def test_the_child_itself_ignores_the_interrupt(child: Child) -> None:
    pid = child.call("os:getpid")
    os.kill(pid, signal.SIGINT)
    assert child.call("os:getpid") == pid


@pytest.mark.parametrize(
    "then", ["time.sleep(1000)", "child.call('child_tricks:hang_with_the_gil')"], ids=["idle", "busy"]
)
def test_the_child_dies_with_its_parent(tricks: Path, then: str) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(tricks)!r})
        from lrcompile.child import Child
        child = Child()
        print(child.call("os:getpid"), child.call("child_tricks:start_another"), flush=True)
        {then}
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.2)
        assert len(pids) == 2
        assert not any(gone(pid, 0.05) for pid in pids)
        parent.kill()
    assert all(gone(pid, 1) for pid in pids)


def test_the_child_outlives_the_thread_that_started_it(tricks: Path) -> None:
    with Child() as child:
        thread = threading.Thread(target=works, args=(child,))
        thread.start()
        thread.join()
        time.sleep(0.1)
        assert child._process is not None
        assert child._process.poll() is None
        assert works(child)


# --- what it can do -----------------------------------------------------------------------------------------------

ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(24).reshape(4, 6)[::2, ::3],
    np.array(1.5, np.float16),
    np.zeros((0, 4), np.float64),
    np.array([True, False]),
    np.array([1 + 2j], np.complex64),
    np.array(["a", "héllo", ""], dtype=object),
    np.array(["a", "bc"]),
    *(
        np.array(values, np.float32).astype(kind)
        for kind in (
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e5m2,
            ml_dtypes.int4,
            ml_dtypes.uint4,
            ml_dtypes.float4_e2m1fn,
        )
        for values in ([[1, 2], [3, 0]], 2, [])
    ),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_survive_both_ways(child: Child, array: np.ndarray) -> None:
    back = child.call("copy:deepcopy", {"array": array})["array"]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tolist() == array.tolist()
    assert back.flags.writeable


def test_arrays_are_writable_there_and_not_shared(child: Child) -> None:
    array = np.zeros(3)
    np.testing.assert_array_equal(child.call("child_tricks:write_into", array), np.ones(3))
    assert array.sum() == 0


def test_a_large_array_is_not_limited_by_the_socket(child: Child) -> None:
    array = np.arange(5_000_000, dtype=np.float64)
    assert np.array_equal(child.call("copy:copy", array), array)


def test_the_request_decides_on_blas_threads(child: Child) -> None:
    assert set(child.call("child_tricks:blas_threads", threads=1)) == {1}
    assert set(child.call("child_tricks:blas_threads", threads=2)) == {min(2, os.cpu_count() or 1)}


def test_it_starts_late_and_is_one_process(tricks: Path) -> None:
    with Child() as child:
        assert child._process is None
        assert child.call("os:getpid") == child.call("os:getpid") != os.getpid()
    child.close()  # twice is as good as once


def test_its_surroundings(child: Child) -> None:
    assert child.call("child_tricks:read_stdin") == ""
    assert child.call("child_tricks:core_limit") == (0, 0)
    assert child.call("os:getcwd") == os.getcwd()  # noqa: PTH109


def test_nothing_is_left_open(tricks: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(2):
        with Child() as child:
            assert works(child)
            with pytest.raises(BuildError):
                child.call("child_tricks:crash")
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- engines ------------------------------------------------------------------------------------------------------


def test_an_engine_lives_in_the_child(child: Child, tmp_path: Path) -> None:
    path = add_model(tmp_path)
    with child.build("reference", path, BuildOptions("reference")) as engine:
        np.testing.assert_array_equal(engine.run({"x": np.ones(2, np.float32)})["y"], [2, 2])
        assert engine.describe()["runtime"] == "reference"
        assert child.call("child_tricks:is_engine", engine) == "ReferenceEngine"
        with child.build("reference", path, BuildOptions("reference")) as second:
            assert child.call("child_tricks:are_engines", [engine, {"second": second}]) == [True, True]
        assert engine.run({"x": np.zeros(0, np.float32)})["y"].shape == (0,)
    engine.close()
    with pytest.raises(BuildError, match="build it again"):
        engine.run({"x": np.ones(2, np.float32)})


def test_an_engine_is_lost_with_its_process(child: Child, tmp_path: Path) -> None:
    with child.build("reference", add_model(tmp_path), BuildOptions("reference")) as engine:
        with pytest.raises(BuildError, match="SIGSEGV"):
            child.call("child_tricks:crash")
        with pytest.raises(BuildError, match=r"add\.onnx on reference .* build it again"):
            engine.run({"x": np.ones(2, np.float32)})
    assert works(child)


def test_an_engine_belongs_to_one_child(child: Child, tmp_path: Path) -> None:
    with child.build("reference", add_model(tmp_path), BuildOptions("reference")) as engine, Child() as other:
        assert works(other)
        with pytest.raises(LrcompileError, match="build it again"):
            other.call("child_tricks:is_engine", engine)


def test_a_build_that_fails_names_what_it_was(child: Child, tmp_path: Path) -> None:
    with pytest.raises(LrcompileError, match="missing"):
        child.build("reference", tmp_path / "missing.onnx", BuildOptions("reference"))
    with pytest.raises(LrcompileError, match="unknown target 'refrence'; did you mean 'reference'"):
        child.build("refrence", add_model(tmp_path), BuildOptions("reference"))
    assert works(child)
