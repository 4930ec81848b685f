"""A published folder appears in one rename or not at all, and can be checked at any time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrcompile.errors import UsageError, VerificationError
from lrcompile.store.cache import owned_folder, remove_orphans
from lrcompile.store.files import io_errors, read_json, sha256

MANIFEST = "lrcompile.json"


def check_out(out: Path | str, force: bool) -> Path:
    """The absolute path of OUT, after the question whether it may be written, asked before any work is done.

    Raises UsageError when it exists and may not be replaced, or when its parent is missing or read-only.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link that OUT may be
    with io_errors(out, "write to"):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise UsageError(f"{out} exists and is not a folder; name another output folder")
        if out.is_dir():
            if not force:
                raise UsageError(f"{out} exists; choose another name or replace it with --force")
            if any(out.iterdir()) and not _is_published(out):
                raise UsageError(
                    f"{out} is not a folder of lrcompile (no {MANIFEST}), so --force does not replace it"
                )
        if not out.parent.is_dir():
            raise UsageError(f"{out.parent} is no folder; create it first")
        if not os.access(out.parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {out.parent}: permission denied or read-only")
    return out


def _is_published(folder: Path) -> bool:
    manifest = folder / MANIFEST
    if manifest.is_symlink() or not manifest.is_file():
        return False
    try:
        document = read_json(manifest)
    except UsageError:
        return False
    return isinstance(document, dict) and "files" in document


@contextlib.contextmanager
def staging(out: Path | str, *, force: bool = False, locks: Path) -> Iterator[Path]:
    """A folder beside OUT that becomes OUT when the with-statement ends well, and vanishes when it does not.

    locks: the cache's folder of locks. Raises UsageError when another process is writing OUT, or as `check_out`;
    BuildError when the disk is full.
    """
    from filelock import FileLock, Timeout  # 30 ms, wanted by no other user of the store

    out = check_out(out, force)
    place = Path(os.path.realpath(out.parent)) / out.name
    with io_errors(locks, "create the lock folder"):
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UsageError(
                f"another lrcompile is writing {out}; wait for it or choose another name"
            ) from error
    try:
        prefix = f".{place.name}.lrcompile-"
        remove_orphans(place.parent, prefix)
        with owned_folder(place.parent, f"{prefix}{os.getpid()}-{secrets.token_hex(4)}") as folder:
            yield folder
            with io_errors(out, "publish"):
                _sync(folder)
                _publish(folder, place, prefix, force)
    finally:
        lock.release()


def _publish(folder: Path, out: Path, prefix: str, force: bool) -> None:
    check_out(out, force)  # it may have come into being in the meantime
    if not out.exists():
        folder.rename(out)
        _sync_folder(out.parent)
        return
    with owned_folder(out.parent, f"{prefix}old-{os.getpid()}-{secrets.token_hex(4)}") as aside:
        out.rename(aside / out.name)
        try:
            folder.rename(out)
        except BaseException:
            (aside / out.name).rename(out)
            raise
        _sync_folder(out.parent)


def _sync(folder: Path) -> None:
    """Bring every file and folder below onto the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprints(folder: Path | str) -> dict[str, dict[str, Any]]:
    """``files`` of the manifest: every file of a folder but the manifest, with bytes and SHA-256, sorted by name.

    Raises VerificationError when something there is not a regular file, UsageError or BuildError as the disk says.
    """
    folder, files = Path(folder), {}
    with io_errors(folder, "read"):
        for root, folders, names in os.walk(folder, onerror=_raise):
            for name in (*names, *(f for f in folders if (Path(root) / f).is_symlink())):
                path = Path(root) / name
                relative = path.relative_to(folder).as_posix()
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise VerificationError(f"{folder} is damaged: {relative} is not a regular file")
                if relative != MANIFEST:
                    files[relative] = {"bytes": status.st_size, "sha256": sha256(path)}
    return dict(sorted(files.items()))


def _raise(error: OSError) -> None:
    raise error


def check_folder(out: Path | str) -> dict[str, Any]:
    """The manifest of a published folder in which every listed file is as it was and no other file lies.

    Raises VerificationError when it is damaged, UsageError when there is no such folder.
    """
    out = Path(out)
    if not out.is_dir():
        raise UsageError(f"{out} is no folder; lrcompile compile writes one")
    manifest = out / MANIFEST
    if manifest.is_symlink() or not manifest.is_file():
        raise VerificationError(f"{out} is damaged: {MANIFEST} is missing")
    try:
        document = json.loads(manifest.read_bytes())
        listed = {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in document["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VerificationError(f"{out} is damaged: {MANIFEST} is not readable ({error})") from error
    found = fingerprints(out)
    for name, entry in listed.items():
        if name not in found:
            raise VerificationError(f"{out} is damaged: {name} is missing")
        if found[name] != entry:
            raise VerificationError(f"{out} is damaged: {name} was altered")
    if extra := sorted(set(found) - set(listed)):
        raise VerificationError(f"{out} is damaged: {extra[0]} is not listed in {MANIFEST}")
    return dict(document)
