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
    from lrcompile.bench import Race
    from lrcompile.benchmark import Benchmark
    from lrcompile.child import Child
    from lrcompile.commands import Verification, bench, inspect, plan, tune, verify
    from lrcompile.compile import compile  # noqa: A004
    from lrcompile.doctor import Check, doctor
    from lrcompile.errors import (
        BudgetError,
        BuildError,
        LrcompileError,
        ModelError,
        PluginError,
        UsageError,
        VerificationError,
    )
    from lrcompile.export import export
    from lrcompile.inspection import Inspection
    from lrcompile.load import load
    from lrcompile.options import Options
    from lrcompile.pipeline import LowRankPass, LowRankResult
    from lrcompile.records import Amount, Budget, Evidence, Limit, Plan, Result, Tradeoff
    from lrcompile.sites import find

__version__ = "0.1.0"

# Public name -> the module that holds it.
_HOME = {
    "Amount": "records",
    "Benchmark": "benchmark",
    "Budget": "records",
    "BudgetError": "errors",
    "BuildError": "errors",
    "Check": "doctor",
    "Child": "child",
    "Evidence": "records",
    "Inspection": "inspection",
    "Limit": "records",
    "LowRankPass": "pipeline",
    "LowRankResult": "pipeline",
    "LrcompileError": "errors",
    "ModelError": "errors",
    "Options": "options",
    "Plan": "records",
    "PluginError": "errors",
    "Race": "bench",
    "Result": "records",
    "Tradeoff": "records",
    "UsageError": "errors",
    "Verification": "commands",
    "VerificationError": "errors",
    "bench": "commands",
    "compile": "compile",
    "doctor": "doctor",
    "export": "export",
    "find": "sites",
    "inspect": "commands",
    "load": "load",
    "plan": "commands",
    "tune": "commands",
    "verify": "commands",
}

__all__ = [
    "Amount",
    "Benchmark",
    "Budget",
    "BudgetError",
    "BuildError",
    "Check",
    "Child",
    "Evidence",
    "Inspection",
    "Limit",
    "LowRankPass",
    "LowRankResult",
    "LrcompileError",
    "ModelError",
    "Options",
    "Plan",
    "PluginError",
    "Race",
    "Result",
    "Tradeoff",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "bench",
    "compile",
    "doctor",
    "export",
    "find",
    "inspect",
    "load",
    "plan",
    "tune",
    "verify",
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
