"""ONNX Runtime. A target is a row of `_TARGETS`: the execution provider that must be the active one.

Refusals: no silent fallback to another provider; inputs and outputs that its Python door cannot pass (2 and 4 bits, and
strings in a model that has bfloat16 or float8 ones too).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import BuildError, PluginError
from lrcompile.interfaces import Availability, BuildOptions, Engine, Rewrite, Runtime
from lrcompile.records import Built, Decision, Refusal
from lrcompile_runtimes import Port, check_feeds, repeated, words

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class _Target:
    provider: str
    device: str
    extra: str


_TARGETS = {"ort-cpu": _Target("CPUExecutionProvider", "CPU", "cpu")}

# Above this the session keeps no copies of weights in a layout of its own, and memory is given back after each run.
_BIG = 256 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h


class OrtEngine:
    """A session on a model file."""

    def __init__(self, model: Path, options: BuildOptions) -> None:
        ort = _import(target := _TARGETS[options.target])
        if target.provider not in (available := ort.get_available_providers()):
            raise BuildError(
                f"this onnxruntime has no {target.provider}, only {', '.join(available)}; {_remedy(target)}"
            )
        if not model.is_file():
            raise BuildError(f"there is no model file {model}")
        try:
            session = ort.InferenceSession(
                str(model), _session_options(ort, model, options), providers=[target.provider]
            )
        except Exception as error:  # pybind classes of its own, RuntimeError, ValueError
            raise BuildError(f"ONNX Runtime refuses {model.name}: {words(error)}") from error
        if session.get_providers()[0] != target.provider:
            raise BuildError(
                f"ONNX Runtime runs {model.name} on {session.get_providers()[0]} instead of {target.provider}"
            )
        session.disable_fallback()
        self._ort, self._session, self._target = ort, session, target
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
            values = self._run_raw(feeds) if self._raw else self._session.run(None, dict(feeds))
        except Exception as error:
            raise BuildError(f"ONNX Runtime cannot run the model: {words(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def _run_raw(self, feeds: Mapping[str, Array]) -> list[Array]:
        values = {name: _to_ort(self._ort, array) for name, array in feeds.items()}
        return [_from_ort(value) for value in self._session.run_with_ort_values(None, values)]

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[int], None]:
        return repeated(self.run, feeds)

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


def _import(target: _Target) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise PluginError(f"onnxruntime is not installed; {_remedy(target)}") from error
    return onnxruntime


def _remedy(target: _Target) -> str:
    return f'pip install "lrcompile[{target.extra}]"'


def _session_options(ort: Any, model: Path, options: BuildOptions) -> onnxruntime.SessionOptions:
    session = ort.SessionOptions()
    session.log_severity_level = 3  # errors
    session.intra_op_num_threads = options.threads
    session.inter_op_num_threads = 1
    session.use_deterministic_compute = True
    if not options.optimize:
        session.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if options.exact:
        session.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if _weight_bytes(model) > _BIG:
        session.add_session_config_entry("session.disable_prepacking", "1")
        session.enable_cpu_mem_arena = False
        session.enable_mem_pattern = False
        _give_back()
    return session


def _give_back() -> None:
    """Let this process return freed blocks of 1 MiB and more to the system at once.

    glibc raises that limit to the largest block it saw freed, and keeps what is smaller: 500 MB for a run of SmolLM2.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _weight_bytes(model: Path) -> int:
    """Bytes of the weights, those in external files included."""
    size = model.stat().st_size
    if size > _BIG:
        return size
    import mmap

    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if (
            mapped.find(b"location") < 0
        ):  # the key that external data has: importing onnx_ir for all takes 0.3 s
            return size
    import onnx_ir as ir

    from lrcompile import graph

    return sum(use.tensor.nbytes for use in graph.tensors(ir.load(model)))


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
        return tuple(_TARGETS)

    def availability(self, target: str) -> Availability:
        try:
            ort = _import(_TARGETS[target])
        except PluginError as error:
            return Availability(False, str(error))
        versions = (("onnxruntime", str(ort.__version__)),)
        if (provider := _TARGETS[target].provider) not in ort.get_available_providers():
            return Availability(
                False, f"this onnxruntime has no {provider}; {_remedy(_TARGETS[target])}", versions
            )
        return Availability(True, versions=versions)

    def lowering(self, target: str) -> tuple[Rewrite, ...]:
        return ()

    def supports(self, decision: Decision, target: str) -> Refusal | None:
        return None

    def engine_file(self, target: str) -> str | None:
        return None

    def serialize(self, model: Path, out: Path, options: BuildOptions) -> Built:
        raise AssertionError("a target without an engine file")

    def build(self, model: Path, options: BuildOptions) -> Engine:
        return OrtEngine(model, options)


runtimes: tuple[Runtime, ...] = (OrtRuntime(),)
