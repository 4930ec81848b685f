"""Functions out of a user's Python file: data loaders, metrics, graphsurgeon scripts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrcompile.errors import UsageError


def load_function(path: Path | str, name: str) -> Callable[..., Any]:
    """``name`` of a Python file, whose code is run. Raises UsageError when the file or the function is not there or fails."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} failed when it was read: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = (
            ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        )
        raise UsageError(f"{path} has no function {name!r}; it has: {known}")
    return function  # type: ignore[no-any-return]
