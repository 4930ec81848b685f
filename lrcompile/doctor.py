"""Doctor: what is installed, which targets really run a model here, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lrcompile import registry
from lrcompile.child import Child
from lrcompile.errors import LrcompileError
from lrcompile.interfaces import BuildOptions
from lrcompile.store import default_cache, new_folder

_SECONDS, _TOLERANCE = 60.0, 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. needed: lrcompile does not work without it. remedy: what to do where ok is False."""

    kind: Literal["python", "package", "plugin", "target", "cache"]
    name: str
    ok: bool
    detail: str
    needed: bool = False
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        mark = "ok" if self.ok else "BROKEN" if self.needed else "-"
        remedy = f"; {self.remedy}" if self.remedy and not self.ok else ""
        return f"{mark:6} {self.kind:8} {self.name:22} {self.detail}{remedy}"


def doctor(cache: Path | None = None) -> tuple[Check, ...]:
    """All checks, in a stable order. A target counts as working when it ran a model of two layers in a child process."""
    return (_python(), *_packages(), *_plugins(), *_targets(), _cache(cache or default_cache()))


def healthy(checks: tuple[Check, ...]) -> bool:
    """Whether all that is needed is there, and at least one target works."""
    return all(c.ok for c in checks if c.needed) and any(
        c.ok for c in checks if c.kind == "target" and c.name != "reference"
    )


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "python",
        "python",
        sys.version_info >= (3, 11),
        f"{version} at {sys.executable}",
        True,
        "Python 3.11 or newer is needed",
    )


def _packages() -> Iterator[Check]:
    """Each requirement of ours with the version that is installed; those of extras are needed by nobody."""
    for requirement in importlib.metadata.requires("lrcompile") or ():
        what, _, marker = requirement.partition(";")
        name = re.split(r"[^\w.-]", what.strip(), maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)", marker)
        if extra is not None and extra[1] == "dev":
            continue
        wanted = what.strip().removeprefix(name).strip() or "any version"
        part = f", extra {extra[1]}" if extra else ""
        remedy = f'pip install "lrcompile[{extra[1]}]"' if extra else f'pip install "{what.strip()}"'
        try:
            detail, found = f"{importlib.metadata.version(name)} ({wanted}{part})", True
        except importlib.metadata.PackageNotFoundError:
            detail, found = f"not installed ({wanted}{part})", False
        yield Check("package", name, found, detail, extra is None, remedy)


def _plugins() -> Iterator[Check]:
    for name in registry.factorizations():
        yield Check("plugin", name, True, "factorization")
    for name, reason in registry.missing().items():
        yield Check("plugin", name, False, f"not loaded: {reason}")


def _targets() -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="lrcompile-doctor-") as folder, Child(timeout=_SECONDS) as child:
        path = Path(folder) / "model.onnx"
        expected = _write_model(path)
        for runtime in registry.runtimes().values():
            for target in runtime.targets():
                available = runtime.availability(target)
                versions = ", ".join(f"{name} {version}" for name, version in available.versions)
                if not available.ok:
                    yield Check("target", target, False, "not available", remedy=available.reason)
                    continue
                problem = _problem(child, target, path, expected)
                detail = (
                    f"ran a model of two layers{f' ({versions})' if versions else ''}"
                    if problem is None
                    else problem
                )
                yield Check("target", target, problem is None, detail)


def _problem(child: Child, target: str, path: Path, expected: np.ndarray[Any, Any]) -> str | None:
    """What went wrong when the model ran there, or None."""
    try:
        with child.build(target, path, BuildOptions(target)) as engine:
            given = engine.run({"x": np.ones((2, 8), np.float32)})["y"]
    except LrcompileError as error:
        return str(error)
    worst = float(np.abs(given - expected).max())
    return None if worst <= _TOLERANCE else f"its result is wrong by {worst:.2g}"


def _write_model(path: Path) -> np.ndarray[Any, Any]:
    """y = relu(x A) B, and y for x of ones (2, 8)."""
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 4)))
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "b"], ["y"]),
        ],
        "two_layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(A, "a"), numpy_helper.from_array(B, "b")],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    result: np.ndarray[Any, Any] = np.maximum(np.ones((2, 8)) @ A, 0) @ B
    return result


def _cache(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=new_folder(folder)):
            return Check("cache", "cache", True, f"{folder} is writable", True)
    except (OSError, LrcompileError) as error:
        return Check(
            "cache", "cache", False, f"{folder} cannot be written: {error}", True, "name another with --cache"
        )
