"""ONNX's own reference evaluator: slow, written for clarity, and therefore the oracle of small graphs.

Model-local functions are inlined first: the evaluator wants them in order of use and knows no overloads. The whole
model is read into memory. What it lacks (an operator, a type) is refused when the engine is built or run, by name.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import BuildError, UsageError
from lrcompile.interfaces import Availability, BuildOptions, Engine, Rewrite, Runtime
from lrcompile.records import Built, Decision, Refusal, flag_of
from lrcompile_runtimes import Port, check_feeds, repeated, words

if TYPE_CHECKING:
    import numpy as np
    import onnx

    Array = np.ndarray[Any, np.dtype[Any]]


class ReferenceEngine:
    """A loaded model. Threads are those of NumPy's BLAS, which the process that holds the engine decides."""

    def __init__(self, model: Path) -> None:
        import onnx
        from onnx import inliner
        from onnx.reference import ReferenceEvaluator

        try:
            proto = onnx.load(model)
            if proto.functions:
                proto = inliner.inline_local_functions(proto)
            self._ports = tuple(_ports(proto))
            self._outputs = tuple(output.name for output in proto.graph.output)
            self._evaluator = ReferenceEvaluator(proto)
            self._nodes = Counter(
                f"{n.op_type} ({n.domain or 'ai.onnx'}) on reference" for n in proto.graph.node
            )
        except Exception as error:  # the evaluator raises of all kinds
            raise BuildError(f"the reference evaluator cannot load {model.name}: {words(error)}") from error

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import numpy as np

        check_feeds(self._ports, feeds)
        try:
            outputs = self._evaluator.run(None, dict(feeds))
        except Exception as error:
            raise BuildError(f"the reference evaluator cannot run the model: {words(error)}") from error
        named = zip(self._outputs, outputs, strict=True)
        return {name: np.asarray(value) if isinstance(value, np.generic) else value for name, value in named}

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[int], None]:
        return repeated(self.run, feeds)

    def nodes(self) -> dict[str, int]:
        return dict(sorted(self._nodes.items()))

    def describe(self) -> dict[str, str]:
        return {"runtime": "reference", "device": "CPU", "version": importlib.metadata.version("onnx")}

    def __enter__(self) -> ReferenceEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._evaluator


def _ports(model: onnx.ModelProto) -> list[Port]:
    from onnx import helper

    defaults = {tensor.name for tensor in model.graph.initializer}
    ports = []
    for value in model.graph.input:
        kind = value.type.WhichOneof("value")
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if kind == "tensor_type" else None
        dims = (
            tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim)
            if tensor.HasField("shape")
            else None
        )
        ports.append(Port(value.name, dtype, dims, value.name in defaults))
    return ports


class ReferenceRuntime:
    """Runtime ``reference``, target ``reference``."""

    name = "reference"

    def targets(self) -> tuple[str, ...]:
        return ("reference",)

    def availability(self, target: str) -> Availability:
        return Availability(True, versions=(("onnx", importlib.metadata.version("onnx")),))

    def lowering(self, target: str) -> tuple[Rewrite, ...]:
        return ()

    def fusions(self, target: str) -> tuple[Rewrite, ...]:
        return ()

    def supports(self, decision: Decision, target: str) -> Refusal | None:
        return None

    def engine_file(self, target: str) -> str | None:
        return None

    def serialize(self, model: Path, out: Path, options: BuildOptions) -> Built:
        raise AssertionError("a target without an engine file")

    def build(self, model: Path, options: BuildOptions) -> Engine:
        for name in options.engine.said:
            if name != "shapes":  # it takes any
                raise UsageError(f"{flag_of(name)}: target {options.target} has no use for it")
        return ReferenceEngine(model)


runtimes: tuple[Runtime, ...] = (ReferenceRuntime(),)
