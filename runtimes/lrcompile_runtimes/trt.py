"""TensorRT and TensorRT-RTX: two libraries with one API, a row of `_trt/library.py` each.

The precision stands in the graph: networks are strongly typed. TensorRT builds on the GPU that it builds for; TensorRT-RTX
without any, for the compute capabilities that are named. Polygraphy's loaders choose one of the two libraries for the
whole process, by an environment variable, and keep the builder's words to themselves; so the API is called directly.

Refusals: dynamic inputs without a range; inputs whose values are shapes; options that a library has no use for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from lrcompile.errors import BuildError, PluginError
from lrcompile.interfaces import Availability, BuildOptions, Engine, Rewrite, Runtime
from lrcompile.records import Built, Decision, Refusal
from lrcompile_runtimes import _cuda
from lrcompile_runtimes._legality import verdict
from lrcompile_runtimes._trt.build import serialize
from lrcompile_runtimes._trt.engine import RunOptions, TrtEngine
from lrcompile_runtimes._trt.library import LIBRARIES, load, unrunnable, version


class TrtRuntime:
    """Runtime ``trt``."""

    name = "trt"

    def targets(self) -> tuple[str, ...]:
        return tuple(LIBRARIES)

    def availability(self, target: str) -> Availability:
        library = LIBRARIES[target]
        try:
            module = load(target)
        except PluginError as error:
            return Availability(False, str(error))
        versions = ((library.module, str(module.__version__)),)
        reason = unrunnable(target, module)
        if reason and not library.offline:
            return Availability(False, f"{library.product} builds on a GPU, and {reason}", versions)
        return Availability(True, versions=versions, unrunnable=reason)

    def lowering(self, target: str) -> tuple[Rewrite, ...]:
        return ()

    def fusions(self, target: str) -> tuple[Rewrite, ...]:
        return ()  # the builder fuses by itself, and knows none of ONNX Runtime's operators

    def supports(self, decision: Decision, target: str) -> Refusal | None:
        names = ((decision.storage or "").lower(), f"input {decision.activations}")
        found = (known for name in names if (known := verdict(name, target)) is not None)
        return next((Refusal(f"{target}: {v.refused}") for v in found if v.refused), None)

    def engine_file(self, target: str) -> str | None:
        return LIBRARIES[target].engine_file

    def serialize(self, model: Path, out: Path, options: BuildOptions) -> Built:
        made = serialize(model, options)
        with out.open("wb") as file:
            file.write(made.data)
            file.flush()
            os.fsync(file.fileno())
        layers = tuple((layer.name, str(layer)) for layer in made.layers)
        return Built(out, tuple(made.describe.items()), layers)

    def build(self, model: Path, options: BuildOptions) -> Engine:
        target = options.target
        data: bytes | memoryview | None = _trusted(options) if options.serialized is not None else None
        module = load(target)
        if reason := unrunnable(target, module):
            raise BuildError(f"an engine of {model.name} cannot run here: {reason}")
        device = _cuda.device()
        product = version(target, module)
        described: Mapping[str, str] = {"runtime": "trt", "library": product}
        if data is None:
            made = serialize(model, options)
            data, described = made.data, made.describe
        kernels = options.cache / f"tensorrt-rtx-{module.__version__}.kernels" if options.cache else None
        run = RunOptions(options.engine.cuda_graph, options.engine.streaming, kernels)
        return TrtEngine(module, data, device, described, run)


def _trusted(options: BuildOptions) -> bytes:
    """The bytes of an engine file. Raises BuildError unless their hash is what the manifest says: loading one runs its code."""
    assert options.serialized is not None
    try:
        data = options.serialized.read_bytes()
    except OSError as error:
        raise BuildError(f"the engine {options.serialized} cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != options.sha256:
        raise BuildError(
            f"the engine {options.serialized.name} is not loaded: its SHA-256 is not the published one"
        )
    return data


runtimes: tuple[Runtime, ...] = (TrtRuntime(),)
