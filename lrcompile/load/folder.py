"""The files that a model may read: regular ones inside its folder, or inside the blobs of its Hugging Face cache."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lrcompile.errors import ModelError
from lrcompile.store import files

if TYPE_CHECKING:
    from lrcompile.store.files import Bytes


@dataclass(frozen=True, slots=True)
class _File:
    """A file that was checked: its bytes, where it really lies, and its device and inode."""

    data: Bytes
    path: Path
    identity: tuple[int, int]


class ModelFolder:
    """External data beside a model, each file checked, mapped and hashed once.

    A location is the word of whoever wrote the model, so it may lead nowhere else: no absolute path, no ``..``, no link
    out of the folder. One exception: in ``.../snapshots/REV`` of a Hugging Face cache every file is a link into the
    cache's ``blobs``. A file with several hard links may be somebody else's under another name: refused unless allowed.
    """

    def __init__(self, folder: Path, allow_hardlinks: bool) -> None:
        self._folder = folder
        self._allow_hardlinks = allow_hardlinks
        self._files: dict[str, _File] = {}

    def open(self, location: str, where: str) -> Bytes:
        """The mapped bytes of a file. where: which tensor asks, for the message. Raises ModelError."""
        if location not in self._files:
            try:
                self._files[location] = self._open(location)
            except (OSError, ValueError) as error:
                raise ModelError(f"external data {location!r} of {where} {_reason(error)}") from error
        return self._files[location].data

    def hashes(self) -> tuple[tuple[str, str], ...]:
        """Name and SHA-256 of each file that was opened, sorted by name. Raises ModelError."""
        return tuple((location, self._hash(location)) for location in sorted(self._files))

    def _open(self, location: str) -> _File:
        path = self._resolve(location)
        descriptor = files.open_regular(path, follow=False)
        try:
            status = os.fstat(descriptor)
            if status.st_nlink > 1 and not self._allow_hardlinks:
                raise ValueError(f"has {status.st_nlink} hard links; --allow-hardlinks takes it all the same")
            return _File(files.map_descriptor(descriptor), path, (status.st_dev, status.st_ino))
        finally:
            os.close(descriptor)

    def _hash(self, location: str) -> str:
        file = self._files[location]
        descriptor = files.open_regular(
            file.path, follow=False
        )  # not kept open: a model may have thousands of files
        try:
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != file.identity:
                raise ModelError(f"external data {location!r} was replaced while it was read")
            return files.hash_descriptor(descriptor)
        finally:
            os.close(descriptor)

    def _resolve(self, location: str) -> Path:
        pure = PurePosixPath(location)
        if not location or "\0" in location:
            raise ValueError("has no usable name")
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError("lies outside the model's folder")
        real = Path(os.path.realpath(self._folder / location))
        roots = [Path(os.path.realpath(self._folder))]
        if (blobs := _blobs(self._folder)) is not None:
            roots.append(blobs)
        if not any(real.is_relative_to(root) for root in roots):
            raise ValueError(f"is a link to {real}, outside the model's folder")
        return real


def _blobs(folder: Path) -> Path | None:
    """The ``blobs`` of the Hugging Face cache in whose ``snapshots/REV`` (or below it) a folder lies."""
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
    for revision in (absolute, *absolute.parents):
        if revision.parent.name == "snapshots":
            blobs = revision.parent.parent / "blobs"
            return Path(os.path.realpath(blobs)) if blobs.is_dir() else None
    return None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, OSError):
        if error.errno == errno.EINVAL:
            return "is not a regular file"
        return f"cannot be opened: {error.strerror}"
    return str(error)
