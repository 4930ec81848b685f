"""Named arrays on disk: safetensors files that are read mapped, and npz files without pickle."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lrcompile.errors import UsageError
from lrcompile.store.files import io_errors, map_file, open_regular, whole_file

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

# The safetensors names of the types that we keep.
_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
# What numpy raises on an archive that it cannot read.
_DAMAGED = (ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)
_NAMES = {np.dtype(code): name for name, code in _TYPES.items()}


def write_arrays(
    path: Path | str, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as one safetensors file, whole or not at all, without a second copy of them in memory.

    The file holds a SHA-256 of its data, by which `read_arrays` knows a damaged one.
    Raises TypeError for a type that is not kept, UsageError or BuildError for the path.
    """
    stored = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}
    header: dict[str, Any] = {}
    position, digest = 0, hashlib.sha256()
    for name, array in stored.items():
        if array.dtype not in _NAMES:
            raise TypeError(f"array {name!r} of type {array.dtype} cannot be stored")
        end = position + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
        digest.update(array.reshape(-1).view(np.uint8).data)
    header["__metadata__"] = {**(metadata or {}), "sha256": digest.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)  # so that the arrays lie aligned
    with whole_file(path) as file:
        file.write((len(text)).to_bytes(8, "little") + text)
        for array in stored.values():
            file.write(array.reshape(-1).view(np.uint8).data)


def read_arrays(path: Path | str) -> dict[str, Array]:
    """The arrays that `write_arrays` wrote, read-only views of the mapped file.

    Raises ValueError when the file is damaged, OSError when it cannot be opened.
    """
    data = map_file(path)
    try:
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        body = data[8 + length :]
        if hashlib.sha256(body.data).hexdigest() != header.pop("__metadata__")["sha256"]:
            raise ValueError("its hash is another one")
        arrays = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            arrays[name] = body[start:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return arrays


def read_npz(path: Path | str) -> dict[str, Array]:
    """The arrays of an ``.npz``, by name, in its order. Never unpickles.

    Raises UsageError when the file is not usable, BuildError when memory runs out.
    """
    try:
        with io_errors(path, "read"), os.fdopen(open_regular(path), "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise UsageError(f"cannot read {path}: its array has no name; np.savez gives each one")
            return {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        pickled = "pickle" in str(error).lower()
        what = "it holds Python objects" if pickled else "it is not an .npz file or is damaged"
        raise UsageError(f"cannot read {path}: {what} ({error})") from error


def open_array(path: Path | str, shape: tuple[int, ...]) -> Array:
    """A float64 array of zeros that lives in a file, mapped for reading and writing; the same array when it is there."""
    path = Path(path)
    with io_errors(path, "write"):
        return np.memmap(path, np.float64, "r+" if path.exists() else "w+", shape=shape)


def save_array(path: Path | str, array: Array) -> None:
    """One array in a file of its own, for this run only: no hash, no fsync. Any type that NumPy or ml_dtypes has."""
    flat = np.ascontiguousarray(array).reshape(np.shape(array))
    with io_errors(path, "write"):
        np.save(
            path,
            flat if flat.dtype.isbuiltin == 1 else flat.view(f"u{flat.dtype.itemsize}"),
            allow_pickle=False,
        )


def load_array(path: Path | str, dtype: str) -> Array:
    """What `save_array` wrote, mapped read-only. dtype: the name of its type."""
    with io_errors(path, "read"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    typed: Array = array if array.dtype.name == dtype else array.view(np.dtype(dtype))
    return typed
