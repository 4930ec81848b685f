"""Opening, mapping, hashing and writing of single files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lrcompile.errors import BuildError, LrcompileError, UsageError

if TYPE_CHECKING:
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK, SMALL = 1 << 22, 1 << 16  # bytes

# What the machine lacks, in words; every other OSError is about the path that was given.
_LACKS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system takes no file of that size",
    errno.EIO: "the disk failed",
    errno.ENOMEM: "there is not enough memory",
    errno.EMFILE: "too many files are open (see ulimit -n)",
    errno.ENFILE: "too many files are open",
}


@contextlib.contextmanager
def io_errors(path: Path | str, doing: str = "use") -> Iterator[None]:
    """Turn what the operating system says about path into a sentence.

    Raises BuildError when disk or memory ran out, UsageError when the path is not usable.
    """
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error
    except MemoryError as error:
        raise BuildError(f"cannot {doing} {path}: there is not enough memory") from error


def explain(error: OSError, path: Path | str, doing: str) -> LrcompileError:
    """The error of ours that an OSError means."""
    if error.errno in _LACKS:
        return BuildError(f"cannot {doing} {path}: {_LACKS[error.errno]}")
    reason = error.strerror or str(error)
    return UsageError(f"cannot {doing} {path}: {reason[:1].lower()}{reason[1:]}")


def open_regular(path: Path | str, *, follow: bool = True) -> int:
    """A descriptor for reading a regular file. Never waits for a FIFO and never touches a device.

    Raises OSError, with EINVAL when path is something else than a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    # Asked before opening as well: opening alone can move a device (a tape rewinds).
    if not stat.S_ISREG(Path(path).stat(follow_symlinks=follow).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file")


def map_descriptor(descriptor: int) -> Bytes:
    """The bytes of an open file, read-only and mapped; they stay valid when the descriptor is closed.

    A small file is read instead: a mapping costs a descriptor, of which there may be no more than a thousand.
    """
    size = os.fstat(descriptor).st_size
    if size <= SMALL:
        return np.frombuffer(os.pread(descriptor, size, 0), np.uint8)
    return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)


def hash_descriptor(descriptor: int) -> str:
    """SHA-256 of an open file, hexadecimal, read in pieces."""
    digest, position = hashlib.sha256(), 0
    while piece := os.pread(descriptor, CHUNK, position):
        digest.update(piece)
        position += len(piece)
    return digest.hexdigest()


def map_file(path: Path | str) -> Bytes:
    """The bytes of a regular file, read-only and mapped. Raises OSError."""
    descriptor = open_regular(path)
    try:
        return map_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path | str) -> str:
    """SHA-256 of a regular file, hexadecimal, read in pieces. Raises OSError."""
    descriptor = open_regular(path)
    try:
        return hash_descriptor(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path | str) -> bytes:
    """A whole regular file. Raises UsageError or BuildError."""
    with io_errors(path, "read"), os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def read_text(path: Path | str) -> str:
    """A whole UTF-8 file. Raises UsageError or BuildError."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path}: not UTF-8 text (byte {error.start})") from error


def read_json(path: Path | str) -> Any:
    """A JSON document. Raises UsageError or BuildError."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: not JSON ({error})") from error


@contextlib.contextmanager
def whole_file(path: Path | str, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is complete: written beside it, flushed, renamed.

    A file that is replaced keeps living for those who have it mapped. durable: on the disk before it gets its name.
    Raises UsageError or BuildError.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    with io_errors(path, "write"):
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a whole file or nothing. Raises UsageError or BuildError."""
    with whole_file(path) as file:
        file.write(data)


def write_text(path: Path | str, text: str) -> None:
    """Write a whole UTF-8 file or nothing. Raises UsageError or BuildError."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, document: Any) -> None:
    """Write a JSON document that people can read; NaN and infinity are refused (ValueError): JSON has none."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
