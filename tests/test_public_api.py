"""The public names of `lrcompile`, each importable, listed once and documented; `docs/stability.md` promises them."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import lrcompile

TREE = ast.parse(Path(lrcompile.__file__).read_text())


def named(entry: str) -> object:
    return getattr(lrcompile, entry)


def test_the_list_is_sorted_and_is_the_table() -> None:
    assert lrcompile.__all__ == sorted(lrcompile.__all__)
    assert set(lrcompile.__all__) == {*lrcompile._HOME, "__version__"}
    assert dir(lrcompile) == lrcompile.__all__


def test_type_checkers_see_the_same_names() -> None:
    """What stands under TYPE_CHECKING is what is imported on first use, from the same modules."""
    block = next(n for n in TREE.body if isinstance(n, ast.If))
    imports = [n for n in block.body if isinstance(n, ast.ImportFrom)]
    seen = {
        alias.name: (node.module or "").removeprefix("lrcompile.") for node in imports for alias in node.names
    }
    assert seen == lrcompile._HOME


@pytest.mark.parametrize("name", lrcompile.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = named(name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    assert not inspect.ismodule(value)
    # its own words: not those of a base class, nor the signature that dataclasses write where there are none
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    assert own, name
    assert not own.startswith(f"{name}("), name


def test_star_import_gives_the_list() -> None:
    space: dict[str, object] = {}
    exec("from lrcompile import *", space)
    assert set(space) - {"__builtins__"} == set(lrcompile.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        named("frobnicate")


@pytest.mark.parametrize("module", [n for n in lrcompile.__all__ if find_spec(f"lrcompile.{n}") is not None])
def test_a_function_named_like_its_module_stays_the_function(module: str) -> None:
    code = f"import lrcompile.{module}, lrcompile; assert callable(lrcompile.{module}), lrcompile.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "'numpy', 'onnx', 'onnx_ir', 'onnx_graphsurgeon', 'pydantic', 'polygraphy'"
    code = f"import sys, lrcompile; found = {{{heavy}}} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)
