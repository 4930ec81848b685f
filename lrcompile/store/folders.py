"""Folders and copies of files; what they hold is made elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from lrcompile.store.files import io_errors


def default_cache() -> Path:
    """Where factors and moments are kept when nobody says otherwise: the user's cache folder."""
    from platformdirs import user_cache_path  # wanted by no other user of the store

    return user_cache_path("lrcompile")


def new_folder(path: Path) -> Path:
    """The folder, made with its parents if it is not there."""
    with io_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True)
    return path


def copy_file(source: Path, target: Path) -> None:
    """A file's bytes under another name; links are followed. Raises UsageError or BuildError."""
    with io_errors(target, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def copy_folder(source: Path, target: Path) -> None:
    """All files of a folder into another, which may exist."""
    for path in sorted(
        source.rglob("*")
    ):  # copytree would collect what fails into an error without its reason
        if path.is_file():
            copy_file(path, target / path.relative_to(source))


def remove_folder(path: Path) -> None:
    """A folder of ours that is no longer needed."""
    shutil.rmtree(path, ignore_errors=True)
