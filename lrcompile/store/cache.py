"""What a killed run finds again, and folders that go away by themselves."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.store.arrays import read_arrays, write_arrays
from lrcompile.store.files import io_errors

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)


class Cache:
    """A folder of computed arrays, scratch space and locks. Nothing in it is needed: it may be deleted at any time."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def locks(self) -> Path:
        """Where `staging` keeps its locks."""
        return self.root / "locks"

    @property
    def costs(self) -> Path:
        """Where tables of measured costs lie."""
        return self.root / "costs"

    @property
    def builders(self) -> Path:
        """What engine builders keep between runs."""
        return self.root / "builders"

    def path(self, key: tuple[str, ...]) -> Path:
        """Where the arrays of a key lie."""
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.root / "arrays" / digest[:2] / f"{digest}.safetensors"

    def has(self, key: tuple[str, ...]) -> bool:
        """Whether `remember` would find this key."""
        return self.path(key).is_file()

    def remember(
        self, key: tuple[str, ...], compute: Callable[[], Mapping[str, Array]]
    ) -> Mapping[str, Array]:
        """The arrays of a key: read mapped when they are there and whole, else computed and kept.

        key: all that the arrays depend on, code version included. Raises what compute raises; UsageError or BuildError
        when they cannot be written.
        """
        path = self.path(key)
        try:
            return read_arrays(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("computing again: %s", error)
        arrays = compute()
        with self.scratch() as scratch:  # where a half-written file is removed even after kill -9
            write_arrays(scratch / path.name, arrays)
            with io_errors(path, "write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                (scratch / path.name).replace(path)
                return read_arrays(path)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A private folder for the time of a with-statement. What killed runs left behind is removed."""
        parent = self.root / "scratch"
        with contextlib.ExitStack() as stack:
            with io_errors(parent, "create the cache folder"):
                parent.mkdir(parents=True, exist_ok=True)
                with _one_at_a_time(
                    parent
                ):  # or another run takes a folder that is made but not yet marked for an orphan
                    remove_orphans(parent, "")
                    folder = stack.enter_context(
                        owned_folder(parent, f"{os.getpid()}-{secrets.token_hex(4)}")
                    )
            yield folder


@contextlib.contextmanager
def owned_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder, marked as in use by a lock on the folder itself, removed at the end if it is still there.

    The kernel drops the lock when its owner dies, however it dies: what is not locked has no owner.
    """
    folder = parent / name
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, folder)
        with io_errors(folder, "create"):
            folder.mkdir(mode=0o755)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
        _try_lock(descriptor)
        yield folder


def _remove(folder: Path) -> None:
    """Remove a folder of ours to the end: also when the user interrupts just then."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_orphans(parent: Path, prefix: str) -> None:
    """Remove the folders of parent whose name starts with prefix and whose owner is dead."""
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _try_lock(descriptor):
                    logger.info("removing %s, left behind by a run that was killed", folder)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another owns it, or this file system has no such locks: then nobody's folder is removed
        return False
    return True
