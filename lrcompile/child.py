"""A process beside ours in which engines are built and run.

Builders crash, hang and eat memory on legal graphs; here that costs one line of error. The process is long-lived, starts
at the first request, and starts anew after a crash or a kill; engines stay in it, and what needs them without their
outputs (timing loops, comparisons, second moments) is called there:

    with Child(timeout=20) as child:
        with child.build("ort-cpu", path, options) as engine:
            outputs = engine.run(feeds)
            seconds = child.call("lrcompile.bench:time_runs", engine, feeds, 10)

Protocol: over a socket pair, one request and one reply at a time; each is a pickle whose arrays follow it as raw
buffers (pickle protocol 5), so that only the kernel copies them. An engine travels as a number.
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

if TYPE_CHECKING:  # a child that is only started and killed need not import NumPy
    from lrcompile.interfaces import Array, BuildOptions, Engine
    from lrcompile.records import EngineOptions

logger = logging.getLogger(__name__)

# Python's own -m would make a second copy of this module, and would not find it where sys.path was changed at run time.
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from lrcompile.child import serve; serve(*sys.argv[2:])"
_START = 60.0  # seconds that the interpreter may take to start; not counted against a request
_SLICE = 0.05  # seconds between two looks at the child's memory and at how much it printed
_LOG = 1 << 20  # bytes kept of what it printed
_MEMORY_WORDS = re.compile(
    r"memoryerror|bad[_ ]alloc|out of memory|memory allocation|(failed|cannot|unable) to allocate", re.I
)


class RemoteEngine:
    """An engine that lives in a child; a context manager. `Child.call` takes it as an argument."""

    def __init__(self, child: Child, handle: int, name: str, threads: int) -> None:
        self._child, self._handle, self._name, self._threads = child, handle, name, threads

    def run(self, feeds: Mapping[str, Array], *, timeout: float | None = None) -> dict[str, Array]:
        """Outputs by name, in the model's order."""
        result: dict[str, Array] = self._ask("run", feeds, timeout=timeout)
        return result

    def describe(self) -> dict[str, str]:
        """What really runs: provider, device, version."""
        result: dict[str, str] = self._ask("describe")
        return result

    def nodes(self) -> dict[str, int]:
        """``OpType (domain) on Provider`` -> count: what really runs."""
        result: dict[str, int] = self._ask("nodes")
        return result

    def close(self) -> None:
        """Free it. Nothing happens when it or its process is gone."""
        self._child._release(self._handle)

    def _ask(self, method: str, *args: object, timeout: float | None = None) -> Any:
        what = f"{method} of {self._name}"
        return self._child.call(
            "lrcompile.child:ask", self, method, *args, timeout=timeout, threads=self._threads, what=what
        )

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Child:
    """The parent's side. timeout: seconds for a request. memory: bytes the child may hold. None: no limit.

    Memory is what the kernel calls RssAnon + RssShmem, looked at while we wait. An rlimit counts what is not used:
    RLIMIT_AS all that is mapped or only reserved (CUDA reserves more than any machine has), RLIMIT_DATA also the
    weights that ONNX Runtime maps from their file, because it maps them private and writable.
    """

    def __init__(self, *, timeout: float | None = None, memory: int | None = None) -> None:
        self.timeout, self.memory = timeout, memory
        # by target: of engines that are asked for without options of their own
        self.engines: dict[str, EngineOptions] = {}
        self.deadline = None
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = contextlib.ExitStack()
        self._handles = itertools.count()
        self._live: set[int] = set()  # engines of the present process

    @property
    def deadline(self) -> float | None:
        """On the monotonic clock: no request may last beyond it, whatever its own limit."""
        return self._deadline

    @deadline.setter
    def deadline(self, moment: float | None) -> None:
        self._deadline = moment
        self._granted = 0.0 if moment is None else round(moment - time.monotonic(), 1)  # for the message

    def build(
        self,
        target: str,
        path: Path,
        options: BuildOptions,
        *,
        timeout: float | None = None,
        memory: int | None = None,
    ) -> RemoteEngine:
        """Build an engine of a model file for a target, there. Raises BuildError, and PluginError without the runtime."""
        handle, path, threads = next(self._handles), Path(path).absolute(), options.threads
        options = dataclasses.replace(options, target=target)
        usual = self.engines.get(target)
        if usual is not None and options.engine == type(usual)():
            options = dataclasses.replace(options, engine=usual)
        args = (handle, path, options)
        self._request("build", args, f"building {path.name} for {target}", timeout, memory, threads)
        self._live.add(handle)
        return RemoteEngine(self, handle, f"{path.name} on {target}", threads)

    def call(
        self,
        function: str,
        *args: object,
        timeout: float | None = None,
        memory: int | None = None,
        threads: int = 1,
        what: str = "",
    ) -> Any:
        """``module:function`` of these arguments, there, with so many BLAS threads. what: its name in error messages."""
        return self._request("call", (function, args), what or function, timeout, memory, threads)

    def close(self) -> None:
        """Kill it: there is nothing in it that is worth saving."""
        process, self._process = self._process, None
        self._live.clear()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that a builder may have started
            process.wait()
        self._resources.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _release(self, handle: int) -> None:
        if handle in self._live and self._process is not None and self._process.poll() is None:
            self._live.remove(handle)
            self._request("close", (handle,), "closing an engine", None, None, 1)

    def _request(
        self,
        kind: str,
        args: tuple[object, ...],
        what: str,
        timeout: float | None,
        memory: int | None,
        threads: int,
    ) -> Any:
        timeout = limit = self.timeout if timeout is None else timeout
        if self._deadline is not None:
            left = max(self._deadline - time.monotonic(), _SLICE)
            if timeout is None or left < timeout:
                timeout, limit = left, self._granted
        memory = self.memory if memory is None else memory
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            frames = _dump((what, threads, kind, args), self._handle_of)
            error, value, trace = self._exchange(frames, what, timeout, memory, limit)
        except LrcompileError:
            raise
        except BaseException:
            self.close()  # interrupted, say: a reply that is still to come must not answer the next request
            raise
        if error is not None:
            logger.debug("%s, in the child process:\n%s", what, trace)
            raise error
        return value

    def _start(self) -> None:
        self.close()
        self._socket, theirs = socket.socketpair()
        lifeline, held = os.pipe()  # nobody writes: that its other end closes is the message
        # what it prints goes to memory: the disk may be full, and nothing is left behind
        self._log = os.memfd_create("lrcompile-child")
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)
        self._resources.enter_context(self._socket)
        self._resources.callback(os.close, held)
        self._resources.callback(os.close, self._log)
        command = [
            sys.executable,
            "-u",
            "-c",
            _BOOT,
            json.dumps(sys.path),
            str(theirs.fileno()),
            str(lifeline),
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,  # a group of its own: killed as one, and deaf to the terminal's Ctrl-C
            )
        except OSError as error:
            self._fail(f"the child process cannot be started: {error}")
        finally:
            theirs.close()
            os.close(lifeline)
        self._exchange([], "starting the child process", _START, None, _START)

    def _handle_of(self, value: object) -> int | None:
        if not isinstance(value, RemoteEngine):
            return None
        if value._child is not self or value._handle not in self._live:
            raise BuildError(f"the engine of {value._name} was closed or its process ended: build it again")
        return value._handle

    def _exchange(
        self, frames: list[Any], what: str, timeout: float | None, memory: int | None, limit: float | None
    ) -> Any:
        """Send frames, if there are any, and wait for the reply. limit: the time limit that the user knows of."""
        deadline = time.monotonic() + (1e9 if timeout is None else timeout)
        try:
            self._socket.settimeout(timeout)
            os.ftruncate(self._log, 0)
            if frames:
                _send(self._socket, frames)
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            while not poll.poll(_SLICE * 1000):
                if time.monotonic() > deadline:
                    raise TimeoutError
                if memory is not None and (used := self._used()) > memory:
                    self._fail(f"{what}: memory limit of {memory >> 20} MB reached ({used >> 20} MB used)")
                if os.fstat(self._log).st_size > _LOG:
                    os.ftruncate(self._log, 0)
            self._socket.settimeout(max(deadline - time.monotonic(), 1))
            return _load(_receive(self._socket), None)
        except TimeoutError:
            self._fail(f"{what}: time limit of {limit:g} s reached; --timeout allows more")
        except (EOFError, ConnectionError):
            self._crashed(what)

    def _used(self) -> int:
        assert self._process is not None
        status = Path(
            f"/proc/{self._process.pid}/status"
        ).read_text()  # there until we reap it, dead or alive
        return sum(int(kib) << 10 for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M))

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
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        lines = [
            " ".join("".join(c if c.isprintable() else " " for c in line).split())
            for line in text.splitlines()
        ]
        return " | ".join([line for line in lines if line][-2:])[-400:]

    def _fail(self, message: str) -> NoReturn:
        self.close()
        raise BuildError(message)


# --- the child's side ---------------------------------------------------------------------------------------------


def serve(fd: str, lifeline: str) -> None:
    """Answer requests until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file in the user's folder
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lrcompile_runtimes").setLevel(logging.INFO)  # the last words of a builder that dies
    _die_with_parent(int(lifeline))
    os.set_inheritable(int(fd), False)
    engines: dict[int, Engine] = {}
    with socket.socket(fileno=int(fd)) as connection, contextlib.suppress(EOFError, ConnectionError):
        _send(connection, _dump("ready"))
        while True:
            _send(connection, _answer(_receive(connection), engines))


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel kill our process group when the parent's end of the pipe closes, however the parent ended.

    It works in the middle of a hanging builder, where nothing of Python runs. So does PR_SET_PDEATHSIG, but that one
    already fires when the *thread* that started us ends.
    """
    os.set_inheritable(lifeline, False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)


def _answer(frames: list[bytearray], engines: dict[int, Engine]) -> list[Any]:
    """The reply: (error, value, traceback). Both pickles can fail too."""
    what = "reading a request"
    try:
        what, threads, kind, args = _load(frames, engines.__getitem__)
        return _dump((None, _HANDLERS[kind](engines, threads, *args), ""))
    except LrcompileError as error:
        return _dump((error, None, traceback.format_exc()))
    except Exception as error:  # whatever a builder may raise
        text = f"{type(error).__name__}: {str(error)[:1000]}"
        reason = "out of memory: " if _MEMORY_WORDS.search(text) else ""
        return _dump((BuildError(f"{what}: {reason}{text}"), None, traceback.format_exc()))


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


def _dump(message: object, handle_of: Callable[[object], int | None] | None = None) -> list[Any]:
    """Frames of a message: the pickle, then the raw bytes of its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
    if handle_of is not None:
        pickler.persistent_id = handle_of  # type: ignore[method-assign]
    pickler.dump(message)
    return [file.getbuffer(), *(buffer.raw() for buffer in buffers)]


def _load(frames: list[bytearray], engine_of: Callable[[int], Engine] | None) -> Any:
    unpickler = pickle.Unpickler(io.BytesIO(frames[0]), buffers=frames[1:])
    if engine_of is not None:
        unpickler.persistent_load = engine_of  # type: ignore[method-assign]
    return unpickler.load()


def _send(connection: socket.socket, frames: list[Any]) -> None:
    sizes = [len(frame) for frame in frames]
    connection.sendall(struct.pack(f"<{len(sizes) + 1}Q", len(sizes), *sizes))
    for frame in frames:
        connection.sendall(frame)


def _receive(connection: socket.socket) -> list[bytearray]:
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
