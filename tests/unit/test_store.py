"""The store: whole or nothing, whatever happens; what a killed run left behind goes; equal models give equal bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile import store
from lrcompile.errors import BuildError, LrcompileError, UsageError, VerificationError
from lrcompile.store import Cache, models, wire
from lrcompile.store.files import explain, open_regular

pytestmark = pytest.mark.timeout(120)


def names(folder: Path) -> list[str]:
    """Everything below a folder, folders excluded."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


# --- single files -------------------------------------------------------------------------------------------------


def test_the_store_is_light() -> None:
    """No protobuf, onnx or sympy comes with it."""
    code = "import lrcompile.store, sys; print(sorted({'onnx', 'onnx_ir', 'sympy', 'google', 'filelock'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_write_and_read(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"größe": [1, 2.5, None]})
    assert store.read_json(tmp_path / "a.json") == {"größe": [1, 2.5, None]}
    store.write_text(tmp_path / "a.txt", "one")
    store.write_text(tmp_path / "a.txt", "two")
    assert store.read_text(tmp_path / "a.txt") == "two"
    store.write_bytes(tmp_path / "b", b"")
    assert store.map_file(tmp_path / "b").size == 0
    assert names(tmp_path) == ["a.json", "a.txt", "b"]
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(tmp_path / "a.json", {"x": float("nan")})


def test_who_has_a_file_mapped_keeps_it(tmp_path: Path) -> None:
    store.write_bytes(tmp_path / "w", b"old" * 1000)
    mapped = store.map_file(tmp_path / "w")
    store.write_bytes(tmp_path / "w", b"")
    assert mapped.tobytes() == b"old" * 1000
    assert not mapped.flags.writeable


def test_failing_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    store.write_bytes(tmp_path / "w", b"old")

    def fail() -> None:
        with store.whole_file(tmp_path / "w") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "w").read_bytes() == b"old"
    assert names(tmp_path) == ["w"]


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(UsageError, match="not a regular file"):
            store.read_bytes(path)
    with pytest.raises(UsageError, match="nowhere: no such file"):
        store.read_text(tmp_path / "nowhere")
    (tmp_path / "bad").write_bytes(b"\xff{")
    with pytest.raises(UsageError, match="UTF-8"):
        store.read_text(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(b"{")
    with pytest.raises(UsageError, match="not JSON"):
        store.read_json(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(b"[" * 100_000)
    with pytest.raises(UsageError, match="not JSON"):
        store.read_json(tmp_path / "bad")


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_a_sentence(number: int) -> None:
    error = explain(OSError(number, os.strerror(number)), "/some/path", "write")
    assert isinstance(error, (UsageError, BuildError))
    assert str(error).startswith("cannot write /some/path: ")


def test_memory_runs_out(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="memory"), store.io_errors(tmp_path, "read"):
        raise MemoryError


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MiB. Skips the test where one cannot be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("no right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full(tmp_path: Path) -> None:
    """One line, nothing half-written: files, arrays, models, published folders."""
    big = np.zeros(1 << 20)
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(BuildError, match="disk is full"):
            store.write_bytes(disk / "f", big.tobytes())
        with pytest.raises(BuildError, match="disk is full"):
            store.write_arrays(disk / "f", {"a": big})
        with pytest.raises(BuildError, match="disk is full"):
            Cache(disk / "cache").remember(("k",), lambda: {"a": big})
        shutil.rmtree(disk / "cache")
        for external in (None, True):
            with pytest.raises(BuildError, match="disk is full"):
                store.save_model(
                    chain(ir.Tensor(big.astype(np.float32).reshape(1024, 1024))), disk, external=external
                )
        with (
            pytest.raises(BuildError, match="disk is full"),
            store.staging(disk / "out", locks=tmp_path / "locks") as stage,
        ):
            store.write_bytes(stage / "a", b"a" * 500_000)
            store.write_bytes(stage / "b", b"a" * 800_000)
        assert names(disk) == []
        assert list(disk.iterdir()) == []


def test_disk_full_without_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where fsync is the first to notice."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="disk is full"):
        store.write_bytes(tmp_path / "f", b"a")
    with (
        pytest.raises(BuildError, match="disk is full"),
        store.staging(tmp_path / "out", locks=tmp_path / "locks"),
    ):
        pass
    assert [n for n in names(tmp_path) if "locks" not in n] == []


# --- arrays -------------------------------------------------------------------------------------------------------


ARRAYS: dict[str, Any] = {
    "double": np.arange(6, dtype=np.float64).reshape(2, 3),
    "single": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "long": np.array([1, -2], np.int64),
    "byte": np.array([[255]], np.uint8),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 4)),
    "größe/1": np.array([True, False]),
}


def test_arrays_come_back_mapped(tmp_path: Path) -> None:
    store.write_arrays(tmp_path / "a.safetensors", ARRAYS, {"who": "me"})
    back = store.read_arrays(tmp_path / "a.safetensors")
    assert list(back) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back[name], array)
        assert not back[name].flags.writeable
        assert not back[name].flags.owndata
    safetensors = pytest.importorskip("safetensors.numpy")
    for name, array in safetensors.load_file(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    with pytest.raises(TypeError, match="'a'"):
        store.write_arrays(tmp_path / "b", {"a": np.array([1j])})
    assert names(tmp_path) == ["a.safetensors"]


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.zeros((0, 2), np.float16))
    assert list(store.read_npz(tmp_path / "a.npz")) == ["x", "y"]
    np.savez(tmp_path / "p.npz", x=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="Python objects"):
        store.read_npz(tmp_path / "p.npz")
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(UsageError, match="no name"):
        store.read_npz(tmp_path / "one.npy")
    whole = (tmp_path / "a.npz").read_bytes()
    for data in (
        b"",
        b"hello",
        whole[:100],
        whole[:-30],
        b"PK\x03\x04" + bytes(50),
        whole.replace(b"NUMPY", b"NUMPI"),
    ):
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(UsageError, match=r"bad\.npz"):
            store.read_npz(tmp_path / "bad.npz")
    with pytest.raises(UsageError, match="no such file"):
        store.read_npz(tmp_path / "gone.npz")


# --- cache --------------------------------------------------------------------------------------------------------


def test_the_cache_computes_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def compute() -> dict[str, Any]:
        calls.append("now")
        return ARRAYS

    for _ in range(2):  # another object, as in another run
        found = Cache(tmp_path / "cache").remember(("svd", "weight"), compute)
        np.testing.assert_array_equal(found["double"], ARRAYS["double"])
        assert not found["double"].flags.writeable
    assert len(calls) == 1
    Cache(tmp_path / "cache").remember(("svdweight",), compute)
    Cache(tmp_path / "cache").remember(("svd", "weight", ""), compute)
    assert len(calls) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "header", "folder"])
def test_a_damaged_entry_is_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path)
    cache.remember(("k",), lambda: ARRAYS)
    path = cache.path(("k",))
    data = bytearray(path.read_bytes())
    if damage == "empty":
        data.clear()
    elif damage == "cut":
        del data[-3:]
    elif damage == "flipped":
        data[-1] ^= 1
    elif damage == "foreign":
        data[:] = b"hello" * 100
    elif damage == "header":
        data[:8] = b"\xff" * 8
    path.unlink()
    if damage == "folder":
        (path / "x").mkdir(parents=True)
        with pytest.raises(LrcompileError):
            cache.remember(("k",), lambda: ARRAYS)
        return
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = cache.remember(("k",), lambda: ARRAYS)
    np.testing.assert_array_equal(found["double"], ARRAYS["double"])
    assert "damaged" in caplog.text
    assert cache.remember(("k",), lambda: pytest.fail("computed again")) is not None  # type: ignore[arg-type, return-value]


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    def compute() -> dict[str, Any]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Cache(tmp_path).remember(("k",), compute)
    assert names(tmp_path) == []


def test_an_unusable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cache folder"):
        Cache(tmp_path / "file" / "cache").remember(("k",), lambda: ARRAYS)
    with pytest.raises(UsageError, match="cache folder"), Cache(tmp_path / "file").scratch():
        pass
    with (
        pytest.raises(UsageError, match="lock folder"),
        store.staging(tmp_path / "out", locks=tmp_path / "file"),
    ):
        pass


def child(code: str, *arguments: Path) -> subprocess.Popen[str]:
    """A Python process that runs code and says "ready" before it waits to be killed."""
    code = "import sys, time, pathlib\nfrom lrcompile import store\n" + textwrap.dedent(code)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_scratch(tmp_path: Path) -> None:
    process = child(
        """
        with store.Cache(sys.argv[1]).scratch() as folder:
            (folder / "left").write_text("behind")
            print("ready", flush=True)
            time.sleep(60)
        """,
        tmp_path,
    )
    with Cache(tmp_path).scratch() as folder:
        (folder / "mine").write_text("x")
        assert len(names(tmp_path)) == 2  # the other one lives, so its folder stays
    kill(process)
    assert len(names(tmp_path)) == 1
    with Cache(tmp_path).scratch():
        assert names(tmp_path) == []
    assert list((tmp_path / "scratch").iterdir()) == []


# --- staging ------------------------------------------------------------------------------------------------------


def publish(out: Path, text: str = "x", **options: Any) -> None:
    """A small published folder, with a manifest."""
    with store.staging(out, locks=out.parent.parent / "locks", **options) as stage:
        store.write_text(stage / "model.onnx", text)
        (stage / "sub").mkdir()
        store.write_text(stage / "sub" / "w.bin", text)
        store.write_json(stage / store.MANIFEST, {"files": store.fingerprints(stage)})


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where OUT will be; its parent holds nothing else."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


WHOLE = ["out/lrcompile.json", "out/model.onnx", "out/sub/w.bin"]


def test_publish(place: Path) -> None:
    publish(place)
    assert names(place.parent) == WHOLE
    assert [p.name for p in place.parent.iterdir()] == ["out"]
    assert set(store.check_folder(place)["files"]) == {"model.onnx", "sub/w.bin"}
    assert place.stat().st_mode & 0o777 == 0o755


def test_out_exists(place: Path) -> None:
    publish(place, "old")
    with pytest.raises(UsageError, match="--force"):
        publish(place, "new")
    assert (place / "model.onnx").read_text() == "old"
    mapped = store.map_file(place / "model.onnx")
    publish(place, "new", force=True)
    assert (place / "model.onnx").read_text() == "new"
    assert mapped.tobytes() == b"old"
    assert names(place.parent) == WHOLE
    assert [p.name for p in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "kind", ["file", "link", "dangling link", "folder", "folder with a manifest of others", "no parent"]
)
def test_what_force_does_not_replace(place: Path, kind: str) -> None:
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        (place.parent / "other").mkdir()
        place.symlink_to("other")
    elif kind == "dangling link":
        place.symlink_to("nowhere")
    elif kind == "no parent":
        place = place / "below" / "out"
    else:
        place.mkdir()
        (place / "mine").write_text("mine")
        if "manifest" in kind:
            (place / store.MANIFEST).write_text("[]")
    before = names(place.parent)
    with pytest.raises(UsageError):
        store.check_out(place, force=True)
    with pytest.raises(UsageError):
        publish(place, force=True)
    assert names(place.parent) == before


def test_odd_names_of_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for name in ("out/", "../a/größe & <b>", "-x"):
        with store.staging(name, locks=tmp_path / "locks") as stage:
            store.write_text(stage / "f", "x")
        assert names(Path(name)) == ["f"]
    for name in (".", "/", ".."):
        with pytest.raises(UsageError, match="exists"):
            store.check_out(name, force=False)
    with pytest.raises(UsageError, match="name too long"), store.staging("x" * 300, locks=tmp_path / "locks"):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, BuildError])
@pytest.mark.parametrize("force", [False, True])
def test_failure_leaves_everything_as_it_was(place: Path, error: type[BaseException], force: bool) -> None:
    if force:
        publish(place, "old")
    before = names(place.parent)
    with (
        pytest.raises(error),
        store.staging(place, force=force, locks=place.parent.parent / "locks") as stage,
    ):
        store.write_text(stage / "model.onnx", "half")
        raise error("no")
    assert names(place.parent) == before
    assert len(list(place.parent.iterdir())) == force


def test_two_writers(place: Path) -> None:
    process = child(
        """
        with store.staging(sys.argv[1], locks=pathlib.Path(sys.argv[2])) as stage:
            store.write_text(stage / "who", "first")
            print("ready", flush=True)
            time.sleep(60)
        """,
        place,
        place.parent.parent / "locks",
    )
    with pytest.raises(UsageError, match="another lrcompile is writing"):
        publish(place)
    # A writer with another cache does not see the lock, but neither removes what the first is writing.
    with store.staging(place, locks=place.parent.parent / "other") as stage:
        store.write_text(stage / "who", "second")
        assert len(list(place.parent.iterdir())) == 2
    assert (place / "who").read_text() == "second"
    kill(process)
    shutil.rmtree(place)
    publish(place)
    assert [p.name for p in place.parent.iterdir()] == ["out"]


def test_out_appears_in_the_meantime(place: Path) -> None:
    with (
        pytest.raises(UsageError, match="exists"),
        store.staging(place, locks=place.parent.parent / "locks") as stage,
    ):
        store.write_text(stage / "f", "x")
        place.mkdir()
        (place / "other").write_text("other")
    assert names(place.parent) == ["out/other"]


def _publish_over_and_over(place: Path) -> None:
    number = 0
    while True:
        number += 1
        publish(place, str(number) * 1000, force=True)


def test_kill_at_any_moment(place: Path) -> None:
    """OUT is absent or complete after kill -9; the next run leaves nothing beside it."""
    seen = set()
    for trial in range(25):
        process = multiprocessing.get_context("fork").Process(target=_publish_over_and_over, args=(place,))
        process.start()
        process.join(0.01 + 0.003 * trial)
        process.kill()
        process.join()
        if place.exists():
            seen.add("complete")
            store.check_folder(place)
        else:
            seen.add("absent")
        if trial % 3 == 0:
            publish(place, force=True)
            assert [p.name for p in place.parent.iterdir()] == ["out"]
            assert names(place.parent) == WHOLE
    assert "complete" in seen


def test_a_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with pytest.raises(UsageError, match="read-only"):
        store.check_out(tmp_path / "out", force=False)
    monkeypatch.undo()
    (tmp_path / "ro").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "ro")], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        with pytest.raises(UsageError, match="read-only"):
            publish(tmp_path / "ro" / "out")
        with pytest.raises(UsageError, match="read-only file system"):
            store.write_text(tmp_path / "ro" / "f", "x")
        with pytest.raises(UsageError, match="read-only file system"):
            Cache(tmp_path / "ro").remember(("k",), lambda: ARRAYS)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "ro")], check=True)


# --- the check of a published folder ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda out: (out / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda out: (out / "model.onnx").write_text("y"), "model.onnx was altered"),
        (lambda out: (out / "model.onnx").write_text("xx"), "model.onnx was altered"),
        (lambda out: (out / "sub" / "extra").write_text(""), "sub/extra is not listed"),
        (lambda out: (out / ".hidden").write_text(""), ".hidden is not listed"),
        (lambda out: (out / "link").symlink_to("/etc/passwd"), "link is not a regular file"),
        (lambda out: (out / "dir").symlink_to("/etc"), "dir is not a regular file"),
        (lambda out: os.mkfifo(out / "fifo"), "fifo is not a regular file"),
        (lambda out: (out / store.MANIFEST).unlink(), "lrcompile.json is missing"),
        (lambda out: (out / store.MANIFEST).write_text("{"), "not readable"),
        (lambda out: (out / store.MANIFEST).write_text("[]"), "not readable"),
        (lambda out: (out / store.MANIFEST).write_text('{"files": {"model.onnx": 3}}'), "not readable"),
        (lambda out: (out / store.MANIFEST).write_bytes(b"\xff"), "not readable"),
        (
            lambda out: (out / store.MANIFEST).write_text(
                '{"files": {"../secret": {"bytes": 1, "sha256": ""}}}'
            ),
            "../secret is missing",
        ),
    ],
)
def test_a_damaged_folder(place: Path, damage: Any, word: str) -> None:
    publish(place)
    (place.parent / "secret").write_text("x")
    damage(place)
    with pytest.raises(VerificationError) as caught:
        store.check_folder(place)
    assert word in str(caught.value)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        store.check_folder(tmp_path / "nowhere")


# --- models -------------------------------------------------------------------------------------------------------


def chain(*tensors: ir.TensorProtocol) -> ir.Model:
    """x @ w0 @ w1 ..., built in memory."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, tensors[0].shape[0]]))
    nodes, weights, value = [], [], x
    for i, tensor in enumerate(tensors):
        weight = ir.Value(
            name=f"w{i}", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape)
        )
        weights.append(weight)
        nodes.append(ir.Node("", "MatMul", [value, weight]))
        value = nodes[-1].outputs[0]
    value.name, value.type, value.shape = "y", x.type, ir.Shape([1, tensors[-1].shape[1]])
    return ir.Model(
        ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g"),
        ir_version=10,
    )


def everywhere() -> onnx.ModelProto:
    """Weights of several types as initializers, in Constant nodes, in branches and in a function; strings; small ones."""
    rng = np.random.default_rng(0)

    def weight(name: str, dtype: Any, *shape: int) -> TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 3).astype(dtype), name)

    info, node = helper.make_tensor_value_info, helper.make_node
    then = helper.make_graph(
        [node("Constant", [], ["k"], value=weight("", np.float32, 40, 40)), node("MatMul", ["x", "k"], ["q"])],
        "t", [], [info("q", 1, [2, 40])],
    )  # fmt: skip
    other = helper.make_graph(
        [node("MatMul", ["x", "v"], ["q"])],
        "e",
        [],
        [info("q", 1, [2, 40])],
        [weight("v", np.float32, 40, 40)],
    )
    body = [
        node("Constant", [], ["k"], value=weight("", np.float32, 40, 40)),
        node("MatMul", ["p", "k"], ["r"]),
    ]
    function = helper.make_function("own", "F", ["p"], ["r"], body, [helper.make_opsetid("", 21)])
    graph = helper.make_graph(
        [
            node("If", ["c"], ["a"], then_branch=then, else_branch=other),
            node("F", ["a"], ["y"], domain="own"),
        ],
        "g",
        [info("x", 1, [2, 40]), info("c", TensorProto.BOOL, [])],
        [info("y", 1, [2, 40])],
        [
            weight("half", np.float16, 30, 30),
            weight("brain", ml_dtypes.bfloat16, 31, 31),
            weight("four", ml_dtypes.int4, 51, 51),
            weight("double", np.float64, 20, 20),
            weight("eight", ml_dtypes.float8_e4m3fn, 40, 40),
            weight("small", np.float32, 3),
            helper.make_tensor(
                "typed", TensorProto.FLOAT, [400], rng.standard_normal(400).astype(np.float32).tolist()
            ),
            helper.make_tensor("text", TensorProto.STRING, [2], ["a", "b" * 2000]),
            helper.make_tensor("nothing", TensorProto.FLOAT, [0, 3], []),
        ],
    )
    graph.initializer[0].doc_string = "half"
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])


def arrays_of(proto: onnx.ModelProto, folder: Path) -> list[Any]:
    from lrcompile.load.tensors import every_tensor

    return [numpy_helper.to_array(tensor, str(folder)) for tensor, _ in every_tensor(proto)]


@pytest.mark.parametrize("external", [None, True, False])
def test_save_and_read_back(tmp_path: Path, external: bool | None) -> None:
    """onnx itself reads what we write, wherever a tensor stands; equal models give equal bytes."""
    proto = everywhere()
    model = ir.from_proto(proto)
    path = store.save_model(model, tmp_path, external=external)
    assert names(tmp_path) == (["model.onnx", "model.onnx.data"] if external else ["model.onnx"])
    onnx.checker.check_model(str(path))
    back = onnx.load(path, load_external_data=False)
    for got, want in zip(arrays_of(back, tmp_path), arrays_of(proto, tmp_path), strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes() if got.dtype != object else got.tolist() == want.tolist()
    assert back.graph.initializer[0].doc_string == "half"
    # The model was not changed, and a second copy is the same, also when it comes from the mapped first.
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))
    first = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    store.save_model(model, tmp_path, external=external)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == first
    from lrcompile.load import load

    (tmp_path / "again").mkdir()
    flat = load(path).model  # functions inlined, weights mapped from what was just written
    again = store.save_model(flat, tmp_path / "again", external=external)
    second = {name: (again.parent / name).read_bytes() for name in names(again.parent)}
    store.save_model(load(again).model, again.parent, external=external)
    assert {name: (again.parent / name).read_bytes() for name in names(again.parent)} == second


def test_saving_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    from lrcompile.load import load

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((200, 200)).astype(np.float32) for _ in range(2)]
    store.save_model(chain(*map(ir.Tensor, arrays)), tmp_path, external=True)
    model = load(tmp_path / "model.onnx").model
    model.graph.initializers["w0"].const_value = ir.Tensor(arrays[0] + 1, name="w0")
    store.save_model(model, tmp_path, external=True)
    model.graph.initializers["w0"].const_value = ir.Tensor(arrays[0] + 2, name="w0")
    store.save_model(model, tmp_path)  # now all in one file
    final = load(tmp_path / "model.onnx").model.graph.initializers
    np.testing.assert_array_equal(final["w0"].const_value.numpy(), arrays[0] + 2)  # type: ignore[union-attr]
    np.testing.assert_array_equal(final["w1"].const_value.numpy(), arrays[1])  # type: ignore[union-attr]
    np.testing.assert_array_equal(model.graph.initializers["w1"].const_value.numpy(), arrays[1])  # type: ignore[union-attr]


def test_external_data_of_others_is_copied(tmp_path: Path) -> None:
    """Small and large ones, also in Constant attributes: nothing keeps pointing at the folder it came from."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    proto = everywhere()
    onnx.save(
        everywhere(),
        tmp_path / "in" / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    given = ir.load(tmp_path / "in" / "m.onnx")
    for attribute in (
        a
        for f in (given.graph, *given.functions.values())
        for n in f.all_nodes()
        for a in n.attributes.values()
    ):
        if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            attribute.value.base_dir = tmp_path / "in"  # which onnx-ir forgets
    for external in (None, True):
        path = store.save_model(given, tmp_path / "out", external=external)
        back = onnx.load(path, load_external_data=False)
        for got, want in zip(arrays_of(back, path.parent), arrays_of(proto, path.parent), strict=True):
            assert got.tobytes() == want.tobytes() if got.dtype != object else got.tolist() == want.tolist()


def test_shared_weights_are_written_once(tmp_path: Path) -> None:
    tensor = ir.Tensor(np.ones((40, 40), np.float32))
    store.save_model(chain(tensor, tensor), tmp_path, external=True)
    assert (tmp_path / "model.onnx.data").stat().st_size == 6400


def test_large_models_get_a_file_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LARGE", 10_000)
    model = chain(*(ir.Tensor(np.full((40, 40), i, np.float32)) for i in range(3)))
    for external in (None, False):
        store.save_model(model, tmp_path, external=external)
        assert (tmp_path / "model.onnx.data").stat().st_size == 3 * 6400
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_the_model_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_proto(everywhere())
    before = ir.to_proto(model)

    def fail(*_: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(ir, "to_proto", fail)
    with pytest.raises(ValueError, match="no"):
        store.save_model(model, tmp_path)
    monkeypatch.undo()
    assert ir.to_proto(model) == before
    assert names(tmp_path) == []


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """128 MB of weights inside the .onnx: loaded and saved twice over with less than 40 MB more of our own."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            import numpy as np, onnx_ir as ir
            from lrcompile import store
            from lrcompile.load import load

            def anonymous():
                lines = Path("/proc/self/status").read_text().splitlines()
                return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) // 1024

            folder, peak, start = Path(sys.argv[1]), 0, None
            shape = ir.Shape((2048, 2048))
            def make(i):
                global peak
                peak = max(peak, anonymous())
                return ir.Tensor(np.full((2048, 2048), i, np.float32))
            x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2048]))
            value, nodes, weights = x, [], []
            for i in range(8):
                lazy = ir.LazyTensor(lambda i=i: make(i), dtype=ir.DataType.FLOAT, shape=shape)
                weights.append(ir.Value(name=f"w{i}", const_value=lazy, type=ir.TensorType(ir.DataType.FLOAT), shape=shape))
                nodes.append(ir.Node("", "MatMul", [value, weights[-1]]))
                value = nodes[-1].outputs[0]
            value.name = "y"
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 2048])
            model = ir.Model(ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g"), ir_version=10)
            start = anonymous()
            store.save_model(model, folder)
            del model, nodes, weights, value
            source = load(folder / "model.onnx")
            after_load = anonymous()
            store.save_model(source.model, folder, name="copy.onnx")
            store.save_model(source.model, folder, name="apart.onnx", external=True)
            print(start, peak, after_load, anonymous())
            """
        )
    )
    output = subprocess.check_output([sys.executable, str(script), str(tmp_path)], text=True)
    start, peak, after_load, end = map(int, output.split())
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "copy.onnx").read_bytes()
    assert (tmp_path / "apart.onnx.data").stat().st_size == 8 * 2048 * 2048 * 4
    assert peak - start < 60  # one weight of 16 MB, and its bytes
    assert after_load - start < 40
    assert end - start < 40


# --- the wire -----------------------------------------------------------------------------------------------------


def test_lighten_leaves_small_models_alone() -> None:
    data = everywhere().SerializeToString()
    assert wire.lighten(data) == data


@pytest.mark.parametrize("big", [0, 10, 1000])
def test_lighten_and_fill_are_mirrors(big: int) -> None:
    """Whatever is taken out is where the reference says; put back, the same model is there."""
    data = everywhere().SerializeToString()
    light = onnx.ModelProto.FromString(wire.lighten(data, big))
    from lrcompile.load.tensors import every_tensor

    pieces = {}
    for number, (tensor, _) in enumerate(every_tensor(light)):
        entries = {e.key: e.value for e in tensor.external_data}
        if entries.get("location") == wire.SELF:
            offset, length = int(entries["offset"]), int(entries["length"])
            pieces[number] = data[offset : offset + length]
            del tensor.external_data[:]
            wire.place(tensor, wire.HELD, number, length)
    assert len(pieces) >= 9 if big else pieces
    filled = b"".join(
        pieces[piece.number] if isinstance(piece, wire.Gap) else piece
        for piece in wire.fill(light.SerializeToString())
    )
    want, got = onnx.ModelProto.FromString(data), onnx.ModelProto.FromString(filled)
    for a, b in zip(arrays_of(want, Path()), arrays_of(got, Path()), strict=True):
        assert a.tobytes() == b.tobytes() if a.dtype != object else a.tolist() == b.tolist()


def test_what_contradicts_itself_is_left_for_the_checks() -> None:
    tensor = TensorProto(
        name="w", data_type=1, dims=[100], raw_data=bytes(400), data_location=TensorProto.EXTERNAL
    )
    model = onnx.ModelProto()
    model.graph.initializer.append(tensor)
    model.graph.initializer.append(
        TensorProto(name="v", data_type=1, raw_data=bytes(400), double_data=[1.0] * 50)
    )
    assert wire.lighten(model.SerializeToString(), 10) == model.SerializeToString()


def test_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FIELDS", 1000)
    wire.lighten(b"\x08\x01" * 1000)
    with pytest.raises(wire.WireError, match="parts"):
        wire.lighten(b"\x08\x01" * 1001)


def test_the_manifest_is_json_that_people_read(place: Path) -> None:
    publish(place)
    text = (place / store.MANIFEST).read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)["files"]) == ["model.onnx", "sub/w.bin"]


def test_scratch_folders_of_many_at_once_do_not_remove_each_other(tmp_path: Path) -> None:
    """A folder is made and marked in one step, as far as others can see."""
    code = (
        "import sys; from lrcompile.store import Cache\n"
        "for _ in range(60):\n"
        "    with Cache(sys.argv[1]).scratch() as folder:\n"
        "        (folder / 'x').write_text('x')\n"
        "        assert (folder / 'x').exists()\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0, 0, 0]
    assert not list((tmp_path / "scratch").iterdir())


def test_an_interrupt_while_a_folder_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = shutil.rmtree, []

    def interrupted(path: Path, **options: object) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), Cache(tmp_path).scratch() as folder:
        (folder / "x").write_text("x")
    assert not list((tmp_path / "scratch").iterdir())
