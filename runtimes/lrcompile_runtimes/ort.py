"""ONNX Runtime. A target is a row of `_ort_devices.TARGETS`: the execution provider that must be the active one.

Refusals: no silent fallback to another provider, nor of a node that computes to the CPU; inputs and outputs that its Python door
cannot pass (2 and 4 bits, and strings in a model that has bfloat16 or float8 ones too).
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import BuildError, PluginError
from lrcompile.interfaces import Availability, BuildOptions, Engine, Rewrite, Runtime
from lrcompile.records import Built, Decision, Refusal
from lrcompile_runtimes import Port, check_feeds, repeated, words
from lrcompile_runtimes._legality import verdict
from lrcompile_runtimes._ort_devices import TARGETS, load, missing, open_session
from lrcompile_runtimes._ort_nodes import check_placement, count_nodes, record
from lrcompile_runtimes._ort_norms import NormsApart

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

_NO_GRAPH = "-1"  # a run that neither records nor replays a CUDA graph


class OrtEngine:
    """A session on a model file."""

    def __init__(self, model: Path, options: BuildOptions) -> None:
        self._target = target = TARGETS[options.target]
        ort = load(target)
        if why := missing(ort, target):
            raise BuildError(why)
        if not model.is_file():
            raise BuildError(f"there is no model file {model}")
        strict = target.device == "GPU" and not options.engine.cpu_nodes
        session = open_session(ort, model, options, record if strict else None)
        if strict:
            check_placement(session, model, options.target)
        self._ort, self._session, self._model, self._options = ort, session, model, options
        self._graphs = itertools.count(1)  # the next CUDA graph's number
        required, optional = session.get_inputs(), session.get_overridable_initializers()
        self._ports = tuple(_port(node, node in optional) for node in (*required, *optional))
        self._outputs = tuple(output.name for output in session.get_outputs())
        types = {node.name: node.type for node in (*required, *optional, *session.get_outputs())}
        for name, kind in types.items():
            if kind.startswith(
                ("tensor(int4", "tensor(uint4", "tensor(int2", "tensor(uint2", "tensor(float4")
            ):
                raise BuildError(
                    f"ONNX Runtime's Python interface cannot pass {name!r} of {model.name}, a {kind}: cast it"
                )
        # types that NumPy lacks, so that session.run takes and gives none
        self._raw = any("bfloat16" in kind or "float8" in kind for kind in types.values())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_feeds(self._ports, feeds)
        try:
            settings = self._settings(
                _NO_GRAPH
            )  # a graph replays fixed addresses, and these feeds come from anywhere
            values = (
                self._run_raw(feeds, settings)
                if self._raw
                else self._session.run(None, dict(feeds), settings)
            )
        except Exception as error:
            raise BuildError(f"ONNX Runtime cannot run the model: {words(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def _run_raw(self, feeds: Mapping[str, Array], settings: Any) -> list[Array]:
        values = {name: _to_ort(self._ort, array) for name, array in feeds.items()}
        return [_from_ort(value) for value in self._session.run_with_ort_values(None, values, settings)]

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[int], None]:
        # a plug-in provider's device cannot be written to from the CPU build of onnxruntime, which it comes with
        if self._target.device == "CPU" or self._target.package:
            return repeated(self.run, feeds)
        check_feeds(self._ports, feeds)
        try:
            return self._on_device(feeds)
        except Exception as error:
            raise BuildError(f"ONNX Runtime cannot run the model: {words(error)}") from error

    def _on_device(self, feeds: Mapping[str, Array]) -> Callable[[int], None]:
        """Feeds and outputs in buffers on the GPU that stay where they are; with CUDA graphs, one graph for them, recorded here."""
        session, binding = self._session, self._session.io_binding()
        for name, array in feeds.items():
            if array.dtype.isbuiltin == 1:
                binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
            else:  # strings stay on the host, and NumPy's door to the GPU knows no bfloat16
                binding.bind_ortvalue_input(name, _to_ort(self._ort, array))
        for name in self._outputs:
            binding.bind_output(name, "cuda", 0)
        session.run_with_iobinding(binding, self._settings(_NO_GRAPH))  # finds the outputs' shapes
        outputs = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, value in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        number = next(self._graphs)
        settings = self._settings(str(number), synchronize=False)

        def times(count: int) -> None:
            for _ in range(count):
                session.run_with_iobinding(binding, settings)
            binding.synchronize_outputs()

        times(2)  # records
        if self._options.engine.cuda_graph:
            weakref.finalize(times, session.release_captured_graph, number)
        return times

    def _settings(self, graph: str, synchronize: bool = True) -> Any:
        """Run options, or None where the session's own do. graph: number of the CUDA graph to record or replay."""
        if self._target.device == "CPU":
            return None
        settings = self._ort.RunOptions()
        if self._options.engine.cuda_graph:
            settings.add_run_config_entry("gpu_graph_id", graph)
        if not synchronize:
            settings.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return settings

    def nodes(self) -> dict[str, int]:
        return count_nodes(self._ort, self._model, self._options)

    def describe(self) -> dict[str, str]:
        return {
            "runtime": "ort",
            "provider": self._session.get_providers()[0],
            "device": self._target.device,
            "version": self._ort.__version__,
        }

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._session


def _port(node: Any, optional: bool) -> Port:
    # an unknown rank looks like that of a scalar here
    return Port(node.name, _dtype(node.type), tuple(node.shape) or None, optional)


def _to_ort(ort: Any, array: Array) -> Any:
    import numpy as np
    from onnx import helper

    if array.dtype.isbuiltin != 2:  # NumPy's own
        return ort.OrtValue.ortvalue_from_numpy(array)
    array = np.ascontiguousarray(array).reshape(array.shape)  # the former makes scalars vectors
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array, helper.np_dtype_to_tensor_dtype(array.dtype)
    )


def _from_ort(value: Any) -> Array:
    import numpy as np

    dtype = _dtype(value.data_type())
    if dtype is None or dtype.isbuiltin != 2:
        array: Array = value.numpy()
        return array
    raw = ctypes.string_at(value.data_ptr(), int(np.prod(value.shape())) * dtype.itemsize)
    return np.frombuffer(bytearray(raw), dtype).reshape(value.shape())


def _dtype(kind: str) -> np.dtype[Any] | None:
    """NumPy's type for ``tensor(float)``; None for sequences, maps and optionals."""
    from onnx import TensorProto, helper

    if not kind.startswith("tensor("):
        return None
    return helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind[7:-1].upper()))


class OrtRuntime:
    """Runtime ``ort``."""

    name = "ort"

    def targets(self) -> tuple[str, ...]:
        return tuple(TARGETS)

    def availability(self, target: str) -> Availability:
        try:
            ort = load(TARGETS[target])
        except PluginError as error:
            return Availability(False, str(error))
        why = missing(ort, TARGETS[target])
        return Availability(not why, why, (("onnxruntime", str(ort.__version__)),))

    def lowering(self, target: str) -> tuple[Rewrite, ...]:
        # docs/fusions.md: what was measured
        return (NormsApart(),) if target == "ort-cpu" else ()

    def fusions(self, target: str) -> tuple[Rewrite, ...]:
        if target in ("ort-tensorrt", "ort-trt-rtx"):  # TensorRT's parser knows no operator of com.microsoft
            return ()
        if importlib.util.find_spec("onnxscript") is None:
            logger.info("no fusions without onnxscript; pip install 'lrcompile[torch]'")
            return ()
        from lrcompile_runtimes._ort_fusions import TransformerFusions

        return (TransformerFusions(),)

    def supports(self, decision: Decision, target: str) -> Refusal | None:
        if "static" in (decision.activations or "") and target in ("ort-cpu", "ort-cuda"):
            return Refusal(
                f"{target} rounds inputs with the step of each run, or not at all: nothing of it is faster"
            )
        known = verdict(f"input {decision.activations}", target)
        return Refusal(f"{target}: {known.refused}") if known is not None and known.refused else None

    def engine_file(self, target: str) -> str | None:
        return None

    def serialize(self, model: Path, out: Path, options: BuildOptions) -> Built:
        raise AssertionError("a target without an engine file")

    def build(self, model: Path, options: BuildOptions) -> Engine:
        return OrtEngine(model, options)


runtimes: tuple[Runtime, ...] = (OrtRuntime(),)
