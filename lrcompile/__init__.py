"""lrcompile: factorize the constant weights of an ONNX model, build an engine, prove how far the outputs moved.

    import lrcompile

    result = lrcompile.compile("model.onnx", "out", lrcompile.Options(budget=lrcompile.Budget(keep=0.9), data="calib.npz"))
    print(result)

Names are imported when they are first used, so that ``lrcompile --help`` stays quick.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.compile import compile  # noqa: A004
    from lrcompile.errors import (
        BudgetError,
        BuildError,
        LrcompileError,
        ModelError,
        PluginError,
        UsageError,
        VerificationError,
    )
    from lrcompile.load import load
    from lrcompile.options import Options
    from lrcompile.records import Budget, Evidence, Limit, Plan, Result
    from lrcompile.sites import find

__version__ = "0.1.0"

# Public name -> the module that holds it.
_HOME = {
    "Budget": "records",
    "BudgetError": "errors",
    "BuildError": "errors",
    "Child": "child",
    "Evidence": "records",
    "Limit": "records",
    "LrcompileError": "errors",
    "ModelError": "errors",
    "Options": "options",
    "Plan": "records",
    "PluginError": "errors",
    "Result": "records",
    "UsageError": "errors",
    "VerificationError": "errors",
    "compile": "compile",
    "find": "sites",
    "load": "load",
}

__all__ = [
    "Budget",
    "BudgetError",
    "BuildError",
    "Child",
    "Evidence",
    "Limit",
    "LrcompileError",
    "ModelError",
    "Options",
    "Plan",
    "PluginError",
    "Result",
    "UsageError",
    "VerificationError",
    "__version__",
    "compile",
    "find",
    "load",
]


class _Package(types.ModuleType):
    """Some public functions are named after the module they live in (`lrcompile.compile`). Importing such a module would put
    the module in the function's place; here the public name always means the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, types.ModuleType) and name in _HOME):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{self.__name__}.{_HOME[name]}"), name)
        super().__setattr__(name, found)
        return found

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
