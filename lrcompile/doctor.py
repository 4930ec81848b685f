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
from lrcompile.footprint import nvidia_smi
from lrcompile.interfaces import Availability, BuildOptions, Runtime
from lrcompile.records import EngineOptions, ShapeRange
from lrcompile.store import default_cache, new_folder

_SECONDS = 120.0  # that building and running may take on one target
_TOLERANCE = 5e-3  # of probabilities: what TF32 kernels make of scores of size ten; a wrong layer is off by 0.1 and more
_IDS = np.array([0, 5, 31, 7])


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. needed: lrcompile does not work without it. remedy: what to do where ok is False."""

    kind: Literal["python", "package", "plugin", "device", "target", "cache"]
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
    """All checks, in a stable order. A target counts as working when a child process ran a model of ten layers there, and rightly.

    Or built it, where the engine is for a GPU that is not here.
    """
    return (_python(), *_packages(), *_plugins(), *_devices(), *_targets(), _cache(cache or default_cache()))


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


def _devices() -> Iterator[Check]:
    """The GPU and its driver, where nvidia-smi knows one."""
    if said := nvidia_smi("name,driver_version,memory.total"):
        name, driver, memory = (part.strip() for part in said.rsplit(",", 2))
        yield Check("device", name, True, f"driver {driver}, {int(memory) / 1024:.0f} GiB of memory")


def _targets() -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="lrcompile-doctor-") as folder, Child(timeout=_SECONDS) as child:
        path = Path(folder) / "model.onnx"
        expected = write_model(path)
        for runtime in registry.runtimes().values():
            for target in runtime.targets():
                yield _target(runtime, target, child, path, expected)


def _target(runtime: Runtime, target: str, child: Child, path: Path, expected: np.ndarray[Any, Any]) -> Check:
    try:
        available: Availability = child.call(
            "lrcompile.build:availability_of", target, what=f"looking for {target}"
        )
    except LrcompileError as error:
        return Check("target", target, False, str(error), remedy="see its installation guide")
    versions = ", ".join(f"{name} {version}" for name, version in available.versions)
    if not available.ok:
        return Check("target", target, False, "not available", remedy=available.reason)
    engine = EngineOptions(shapes=(ShapeRange("ids", (1,), _IDS.shape, (16,)),))
    options = BuildOptions(
        target, engine=engine if runtime.engine_file(target) is not None else EngineOptions()
    )
    try:
        if available.unrunnable and runtime.engine_file(target) is not None:
            args = (target, path, path.with_name(f"engine-{target}"), options)
            size = child.call("lrcompile.doctor:serialize", *args, what=f"building for {target}")
            worst, words = (
                0.0,
                f"built a model of ten layers ({size:,} bytes), not run: {available.unrunnable}",
            )
        else:
            with child.build(target, path, options) as running:
                worst = float(np.abs(running.run({"ids": _IDS})["y"] - expected).max())
            words = "ran a model of ten layers"
    except LrcompileError as error:
        return Check("target", target, False, str(error), remedy="see its installation guide")
    right = worst <= _TOLERANCE  # of a NaN too this says no
    detail = (
        f"{words}{f' ({versions})' if versions else ''}" if right else f"its result is wrong by {worst:.2g}"
    )
    return Check("target", target, right, detail, remedy="update the runtime or its driver")


def serialize(target: str, model: Path, out: Path, options: BuildOptions) -> int:
    """Runs in the child: build an engine file; its bytes."""
    return registry.runtime_of(target).serialize(model, out, options).path.stat().st_size


def write_model(path: Path) -> np.ndarray[Any, Any]:
    """Ten layers of the kinds that compiled models have: y (n, 8) of ids (n,). Gives y of `_IDS`."""
    rng = np.random.default_rng(0)
    shapes = {"table": (32, 16), "a": (16, 4), "b": (4, 16), "scale": (16,), "shift": (16,), "w": (16, 24), "c": (24,), "d": (24, 6), "e": (6, 8)}  # fmt: skip
    k = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Gather", ["table", "ids"], ["x"], axis=0),
            node("MatMul", ["x", "a"], ["xa"]),
            node("MatMul", ["xa", "b"], ["xab"]),
            node("Add", ["x", "xab"], ["sum"]),
            node("LayerNormalization", ["sum", "scale", "shift"], ["normal"], epsilon=1e-5),
            node("Gemm", ["normal", "w", "c"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("MatMul", ["r", "d"], ["rd"]),
            node("MatMul", ["rd", "e"], ["rde"]),
            node("Softmax", ["rde"], ["y"], axis=-1),
        ],
        "ten_layers",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in k.items()],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    x = k["table"][_IDS].astype(np.float64)
    x += x @ k["a"] @ k["b"]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * k["scale"] + k["shift"]
    scores = np.maximum(x @ k["w"] + k["c"], 0) @ k["d"] @ k["e"]
    powers = np.exp(scores - scores.max(1, keepdims=True))
    result: np.ndarray[Any, Any] = powers / powers.sum(1, keepdims=True)
    return result


def _cache(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=new_folder(folder)):
            return Check("cache", "cache", True, f"{folder} is writable", True)
    except (OSError, LrcompileError) as error:
        return Check(
            "cache", "cache", False, f"{folder} cannot be written: {error}", True, "name another with --cache"
        )
