"""A process beside ours in which engines are built and run.

Builders crash, hang and eat memory on legal graphs; here that costs one line of error. The process is long-lived, starts
at the first request, and starts anew after a crash or a kill; engines stay in it, and what needs them without their
outputs (timing loops, comparisons, second moments) is called there:

    with Child(timeout=20) as child:
        with child.build("ort-cpu", path, options) as engine:
            outputs = engine.run(feeds)
            seconds = child.call("lrcompile.bench:time_runs", engine, feeds, 10)

Protocol: over a socket pair, one request and one reply at a time; each is a pickle whose arrays follow it as raw
buffers (pickle protocol 5), so that they are copied once, by the kernel. An engine travels as a number.
A Child serves one thread at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib
import io
import itertools
import json
import logging
import operator
import os
import pickle
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lrcompile import registry
from lrcompile.errors import BuildError, LrcompileError
from lrcompile.interfaces import BuildOptions, Engine

if TYPE_CHECKING:
    from lrcompile.interfaces import Array

logger = logging.getLogger(__name__)

# Python's own -m would make a second copy of this module, and would not find it where sys.path was changed at run time.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lrcompile.child import serve; serve(*sys.argv[2:])"
_START = 60.0  # seconds that the interpreter may take; never counted against a request
_SLICE = 0.05  # seconds between two looks at the child's memory and at what it printed
_LOG = 1 << 20  # bytes kept of what it printed
_MEMORY_WORDS = re.compile(r"memoryerror|bad[_ ]alloc|out of memory|memory allocation|(failed|cannot|unable) to allocate", re.I)


class RemoteEngine:
    """An engine that lives in a child; a context manager. Also an argument of `Child.call`."""

    def __init__(self, child: Child, handle: int, path: Path, options: BuildOptions) -> None:
        self._child, self._handle, self._options = child, handle, options
        self._name = f"{path.name} on {options.target}"

    def run(self, feeds: Mapping[str, Array], *, timeout: float | None = None) -> dict[str, Array]:
        """Outputs by name, in the model's order."""
        result: dict[str, Array] = self._ask("run", feeds, what=f"running {self._name}", timeout=timeout)
        return result

    def describe(self) -> dict[str, str]:
        """What really runs: provider, device, version."""
        result: dict[str, str] = self._ask("describe", what=f"describing {self._name}", timeout=None)
        return result

    def close(self) -> None:
        """Free it; nothing happens when it or its process is gone."""
        self._child._release(self._handle)

    def _ask(self, method: str, *args: object, what: str, timeout: float | None) -> Any:
        return self._child.call(
            "lrcompile.child:ask", self, method, *args, what=what, timeout=timeout, threads=self._options.threads
        )

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Child:
    """The parent's side. timeout: seconds for a request. memory: bytes the child may hold; None: no limit.

    Memory is what the kernel calls RssAnon + RssShmem, looked at while we wait. An rlimit would count what is not
    used: RLIMIT_AS all that is mapped or only reserved (CUDA reserves more than any machine has), RLIMIT_DATA also the
    weights that ONNX Runtime maps from their file, because it maps them private and writable.
    """

    def __init__(self, *, timeout: float | None = None, memory: int | None = None) -> None:
        self.timeout, self.memory = timeout, memory
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._cleanup = contextlib.ExitStack()
        self._log = -1
        self._handles = itertools.count()
        self._live: set[int] = set()  # engines of the present process

    def build(
        self, target: str, path: Path, options: BuildOptions, *, timeout: float | None = None, memory: int | None = None
    ) -> RemoteEngine:
        """Build an engine of a model file for a target, there. Raises BuildError, and PluginError without the runtime."""
        options = dataclasses.replace(options, target=target)
        engine = RemoteEngine(self, next(self._handles), path := Path(path).absolute(), options)
        what = f"building {path.name} for {target}"
        self._request("build", engine._handle, path, options, what=what, timeout=timeout, memory=memory, threads=options.threads)
        self._live.add(engine._handle)
        return engine

    def call(
        self,
        function: str,
        *args: object,
        timeout: float | None = None,
        memory: int | None = None,
        threads: int = 1,
        what: str | None = None,
    ) -> Any:
        """``module:function`` of these arguments, there, with so many BLAS threads. what: its name in error messages."""
        return self._request(
            "call", function, args, what=what or function, timeout=timeout, memory=memory, threads=threads
        )

    def close(self) -> None:
        """Kill it: there is nothing in it that is worth saving."""
        process, self._process, self._socket = self._process, None, None
        self._live.clear()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that a builder may have started
            process.wait()
        self._cleanup.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _release(self, handle: int) -> None:
        if handle in self._live:
            self._live.discard(handle)
            self._request("close", handle, what="closing an engine", timeout=None, memory=None, threads=1)

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        lifeline, held = os.pipe()  # nobody writes: that its other end closes is the message
        self._log = os.memfd_create("lrcompile-child")  # in memory: the disk may be full, and nothing is left behind
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)
        self._socket = self._cleanup.enter_context(ours)
        self._cleanup.callback(os.close, held)
        self._cleanup.callback(os.close, self._log)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _BOOT, json.dumps(sys.path), str(theirs.fileno()), str(lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,  # a group of its own: killed as one, and deaf to the terminal's Ctrl-C
            )
        finally:
            theirs.close()
            os.close(lifeline)
        self._receive("starting the child process", _START, None)

    def _request(
        self, *message: object, what: str, timeout: float | None, memory: int | None, threads: int
    ) -> Any:
        timeout = self.timeout if timeout is None else timeout
        memory = self.memory if memory is None else memory
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._socket is not None
            frames = _dump((what, threads, *message), self._handle_of)
            os.ftruncate(self._log, 0)
            started = time.monotonic()
            try:
                self._socket.settimeout(timeout)
                _send(self._socket, frames)
            except TimeoutError:
                self._fail(f"{what}: time limit of {timeout:g} s reached")
            except OSError:
                self._crashed(what)
            left = None if timeout is None else timeout - (time.monotonic() - started)
            error, value, trace = self._receive(what, left, memory, timeout)
        except LrcompileError:
            raise
        except BaseException:  # interrupted, say: the reply that is still to come must not answer the next request
            self.close()
            raise
        if error is not None:
            logger.debug("in the child process:\n%s", trace)
            raise error
        return value

    def _handle_of(self, value: object) -> int | None:
        if not isinstance(value, RemoteEngine):
            return None
        if value._child is not self or value._handle not in self._live:
            raise BuildError(f"the engine of {value._name} is gone, because it was closed or its process ended: build it again")
        return value._handle

    def _receive(self, what: str, left: float | None, memory: int | None, timeout: float | None = None) -> Any:
        assert self._socket is not None
        deadline = None if left is None else time.monotonic() + left
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while not poll.poll(_SLICE * 1000):
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
                if memory is not None and (used := self._memory()) > memory:
                    self._fail(f"{what}: memory limit of {memory / 2**20:.0f} MB reached ({used / 2**20:.0f} MB used)")
                if os.fstat(self._log).st_size > _LOG:
                    os.ftruncate(self._log, 0)
            self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), _SLICE))
            return _load(_recv(self._socket), None)
        except TimeoutError:
            self._fail(f"{what}: time limit of {left if timeout is None else timeout:g} s reached")
        except (EOFError, ConnectionError):
            self._crashed(what)

    def _memory(self) -> int:
        assert self._process is not None
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            return sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M)) << 10
        return 0

    def _fail(self, message: str) -> NoReturn:
        self.close()
        raise BuildError(message)

    def _crashed(self, what: str) -> NoReturn:
        assert self._process is not None
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:  # it only hung up
            code = 0
        how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        words = self._last_words()
        if code == -signal.SIGKILL:
            how += ", most likely killed by the system for want of memory"
        elif _MEMORY_WORDS.search(words):
            how += ", out of memory"
        self._fail(f"{what}: the child process {how}" + (f"; last words: {words}" if words else ""))

    def _last_words(self) -> str:
        size = os.fstat(self._log).st_size
        text = os.pread(self._log, 4096, max(0, size - 4096)).decode(errors="replace")
        text = re.sub(r"\x1b\[[0-9;]*m|[^\S\n]+", " ", text)
        lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
        return " | ".join([line for line in lines if line][-2:])[-400:]


# --- the child's side ---------------------------------------------------------------------------------------------


def serve(fd: str, lifeline: str) -> None:
    """Answer requests until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file in the user's folder
    _die_with_parent(int(lifeline))
    os.set_inheritable(int(fd), False)
    engines: dict[int, Engine] = {}
    with socket.socket(fileno=int(fd)) as connection:
        _send(connection, _dump(None, lambda _: None))
        while True:
            try:
                frames = _recv(connection)
            except (EOFError, ConnectionError):
                return
            _send(connection, _answer(frames, engines))


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel kill our process group when the parent's end of the pipe closes, however the parent ended.

    It works in the middle of a hanging builder, where nothing of Python runs; PR_SET_PDEATHSIG would too, but it
    fires already when the *thread* ends that started us.
    """
    os.set_inheritable(lifeline, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def _answer(frames: list[bytearray], engines: dict[int, Engine]) -> list[Any]:
    what = "reading a request"
    try:
        what, threads, kind, *rest = _load(frames, engines.__getitem__)
        return _dump((None, _HANDLERS[kind](engines, threads, *rest), ""), lambda _: None)
    except LrcompileError as error:
        return _dump((error, None, traceback.format_exc()), lambda _: None)
    except Exception as error:  # whatever a builder may raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:1000]}"
        memory = "out of memory: " if _MEMORY_WORDS.search(text) else ""
        return _dump((BuildError(f"{what}: {memory}{text}"), None, traceback.format_exc()), lambda _: None)


def _build(engines: dict[int, Engine], threads: int, handle: int, path: Path, options: BuildOptions) -> None:
    runtime = registry.runtime_of(options.target)
    with _blas_threads(threads):
        engines[handle] = runtime.build(path, options).__enter__()


def _call(engines: dict[int, Engine], threads: int, name: str, args: tuple[object, ...]) -> object:
    module, _, attribute = name.partition(":")
    function = operator.attrgetter(attribute)(importlib.import_module(module))
    with _blas_threads(threads):  # after the import: only libraries that are loaded can be told
        return function(*args)


def _close(engines: dict[int, Engine], threads: int, handle: int) -> None:
    engines.pop(handle).__exit__(None, None, None)


_HANDLERS: Mapping[str, Callable[..., object]] = {"build": _build, "call": _call, "close": _close}


def ask(engine: Engine, method: str, *args: object) -> dict[str, Any]:
    """A method of an engine that gives a mapping: what `RemoteEngine` calls."""
    return dict(getattr(engine, method)(*args))


def _blas_threads(threads: int) -> contextlib.AbstractContextManager[object]:
    from threadpoolctl import threadpool_limits

    limits: contextlib.AbstractContextManager[object] = threadpool_limits(threads)
    return limits


# --- the wire -----------------------------------------------------------------------------------------------------


def _dump(message: object, handle_of: Callable[[object], int | None]) -> list[Any]:
    """Frames of a message: the pickle, then the raw bytes of its arrays."""
    buffers: list[pickle.PickleBuffer] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> int | None:
            return handle_of(value)

    file = io.BytesIO()
    Pickler(file, protocol=5, buffer_callback=buffers.append).dump(message)
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _load(frames: list[bytearray], engine_of: Callable[[int], Engine] | None) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, handle: int) -> Engine:
            assert engine_of is not None
            return engine_of(handle)

    return Unpickler(io.BytesIO(frames[0]), buffers=frames[1:]).load()


def _send(connection: socket.socket, frames: list[Any]) -> None:
    sizes = [len(frame) for frame in frames]
    connection.sendall(struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes))
    for frame in frames:
        connection.sendall(frame)


def _recv(connection: socket.socket) -> list[bytearray]:
    (count,) = struct.unpack("<Q", _read(connection, 8))
    return [_read(connection, size) for size in struct.unpack(f"<{count}Q", _read(connection, 8 * count))]


def _read(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if not (got := connection.recv_into(view)):
            raise EOFError
        view = view[got:]
    return data
