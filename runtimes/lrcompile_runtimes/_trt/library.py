"""The two libraries: what each is called, where it comes from, what it can do without a GPU, and which options it has."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrcompile.errors import PluginError, UsageError
from lrcompile.records import EngineOptions
from lrcompile_runtimes import _cuda


@dataclass(frozen=True, slots=True)
class Library:
    """module: what is imported. remedy: how to get it. offline: builds without a GPU, for whatever is named."""

    module: str
    product: str
    engine_file: str
    remedy: str
    offline: bool


LIBRARIES = {
    "trt": Library(
        "tensorrt",
        "TensorRT",
        "engine.plan",
        'its libraries are on NVIDIA\'s own index: pip install "lrcompile[tensorrt]" --extra-index-url '
        "https://pypi.nvidia.com",
        False,
    ),
    "trt-rtx": Library(
        "tensorrt_rtx",
        "TensorRT-RTX",
        "engine.rtx",
        'pip install "lrcompile[tensorrt-rtx]"',
        True,
    ),
}
LEVELS = range(6)
_NO_GPU = "no NVIDIA GPU is visible"


def load(target: str) -> Any:
    """The library's module. Raises PluginError that says how to get it."""
    library = LIBRARIES[target]
    try:
        module = importlib.import_module(library.module)
    except (ImportError, OSError) as error:
        raise PluginError(f"{library.product} is not installed ({error}); {library.remedy}") from error
    if not hasattr(module, "Builder"):  # a folder of that name, such as one with stubs
        raise PluginError(f"{library.product} is not installed; {library.remedy}")
    return module


def version(target: str, module: Any) -> str:
    return f"{LIBRARIES[target].product} {module.__version__}"


def capabilities(module: Any) -> Mapping[str, Any]:
    """What RTX builds for: ``8.6`` -> its constant."""
    members = module.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}


def unrunnable(target: str, module: Any) -> str:
    """Why engines cannot run here; empty where they can."""
    here = _cuda.capability()
    if here is None:
        return _NO_GPU
    if LIBRARIES[target].offline and here not in (known := capabilities(module)):
        return f"the GPU has compute capability {here}, {version(target, module)} runs on {', '.join(known)} only"
    return ""


def check(wanted: EngineOptions, target: str, module: Any) -> None:
    """Raise UsageError for what the library has no use for."""
    library = LIBRARIES[target]
    if wanted.provider:
        name = wanted.provider[0][0]
        raise UsageError(f"target {target} has no execution provider that could take the option {name!r}")
    if wanted.cpu_nodes:
        raise UsageError(
            f"target {target} runs every node on the GPU; only ort targets leave nodes to the CPU"
        )
    if wanted.level is not None and wanted.level not in LEVELS:
        raise UsageError(f"{library.product} has optimisation levels 0 to {LEVELS[-1]}, not {wanted.level}")
    if not library.offline:
        if wanted.capabilities:
            raise UsageError(
                f"{library.product} builds for the GPU at hand; compute capabilities are for target trt-rtx"
            )
        return
    known = capabilities(module)
    if unknown := [c for c in wanted.capabilities if c not in known]:
        raise UsageError(
            f"{version(target, module)} builds for compute capabilities {', '.join(known)}, not for {unknown[0]}"
        )
    reason = unrunnable(target, module)
    if not wanted.capabilities and reason:
        raise UsageError(f"{reason}; say what to build for: --compute-capability {','.join(known)}")
    if wanted.refittable and reason:
        raise UsageError(f"{library.product} builds refittable engines only where they can run: {reason}")
