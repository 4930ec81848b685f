"""Sessions of ONNX Runtime on a device: which provider must be active, its options, and that nothing falls back to the CPU.

A target is a row of `TARGETS`. A provider's own options win over what we derive from `EngineOptions`. Engines and kernels that a
provider compiles are kept under `BuildOptions.cache`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import BuildError, PluginError, UsageError
from lrcompile.interfaces import BuildOptions
from lrcompile.records import flag_of
from lrcompile_runtimes import words

if TYPE_CHECKING:
    import onnxruntime

    from lrcompile.records import ShapeRange

logger = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Target:
    """provider: the one that must be active. others: whose kernels may run what it does not take, the CPU's excepted.

    library: of a provider that is in the wheel, and needs libraries that are not. package: the module of a plug-in provider. fields: `EngineOptions` that it has an option for, and how that is named and written.
    shapes: prefix of the three options for shape ranges. caches: options that take the cache folder.
    """

    provider: str
    device: str
    extra: str
    others: tuple[str, ...] = ()
    library: str = ""
    package: str = ""
    defaults: tuple[tuple[str, str], ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)
    shapes: str = ""
    caches: Mapping[str, str] = field(default_factory=dict)

    @property
    def remedy(self) -> str:
        remedy = f'pip install "lrcompile[{self.extra}]"'
        return f"{remedy} {self.package.replace('_', '-')}" if self.package else remedy


TARGETS = {
    "ort-cpu": Target(CPU, "CPU", "cpu"),
    "ort-cuda": Target(
        "CUDAExecutionProvider", "GPU", "gpu", fields={"cuda_graph": "enable_cuda_graph", "workspace": "gpu_mem_limit"},
        # one algorithm for a convolution in every run, not the one that was fastest this time
        defaults=(("cudnn_conv_algo_search", "HEURISTIC"),),
    ),
    "ort-tensorrt": Target(
        "TensorrtExecutionProvider", "GPU", "gpu", others=("CUDAExecutionProvider",),
        library="libonnxruntime_providers_tensorrt.so",
        fields={
            "cuda_graph": "trt_cuda_graph_enable", "workspace": "trt_max_workspace_size",
            "level": "trt_builder_optimization_level",
        },
        shapes="trt_profile_",
        caches={"trt_engine_cache_enable": "trt_engine_cache_path", "trt_timing_cache_enable": "trt_timing_cache_path"},
    ),
    "ort-trt-rtx": Target(
        "NvTensorRTRTXExecutionProvider", "GPU", "cpu", package="onnxruntime_ep_nv_tensorrt_rtx",
        fields={
            "cuda_graph": "enable_cuda_graph", "workspace": "nv_max_workspace_size",
            "streaming": "nv_weight_streaming_budget",
        },
        shapes="nv_profile_",
        caches={"": "nv_runtime_cache_path"},
    ),
}  # fmt: skip

# Above this the session keeps no copies of weights in a layout of its own, and memory is given back after each run.
_BIG = 256 << 20
_M_MMAP_THRESHOLD = -3  # of malloc.h
_EXACT = {"ort-cuda": (("use_tf32", "0"),)}  # TensorFloat-32 keeps 10 bits of a float32 product's 23


def load(target: Target) -> Any:
    """The module, with the provider's libraries loaded. Raises PluginError with the way to get what is missing."""
    try:
        import onnxruntime
    except ImportError as error:
        raise PluginError(f"onnxruntime is not installed; {target.remedy}") from error
    if target.device == "GPU" and not target.package:
        with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints which libraries it does not find
            onnxruntime.preload_dlls()
        if text := said.getvalue().strip():
            logger.debug("onnxruntime.preload_dlls: %s", text)
    return onnxruntime


def missing(ort: Any, target: Target) -> str:
    """Why the target's provider is not there, empty where it is."""
    if target.package:
        try:
            return "" if _devices(ort, target) else f"{target.provider} finds no GPU that it supports"
        except ImportError:
            return f"{target.package} is not installed; {target.remedy}"
        except Exception as error:  # the plug-in's library or one that it needs cannot be loaded
            return f"{target.provider} cannot be loaded: {words(error)}"
    if target.provider in (available := ort.get_available_providers()):
        return _unloadable(ort, target)
    return f"this onnxruntime has no {target.provider}, only {', '.join(available)}; {target.remedy}"


def _unloadable(ort: Any, target: Target) -> str:
    """Why the library of a provider cannot be loaded, empty where it can."""
    if target.library:
        try:
            ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / target.library))
        except OSError as error:
            return f"{target.provider} cannot be loaded: {words(error)}; install TensorRT's libraries"
    return ""


def _devices(ort: Any, target: Target) -> list[Any]:
    """Devices that a plug-in provider serves. The library is registered once in a process."""
    plugin = importlib.import_module(target.package)
    if target.provider not in {device.ep_name for device in ort.get_ep_devices()}:
        with contextlib.suppress(
            ort.capi.onnxruntime_pybind11_state.Fail
        ):  # registered, but without a device
            ort.register_execution_provider_library(target.provider, plugin.get_library_path())
    return [device for device in ort.get_ep_devices() if device.ep_name == target.provider]


# ONNX Runtime 1.31.1 fuses products of quantized float8 to an operator that has no such type, and refuses its own graph then.
_FLOAT8_FUSION = "Type 'tensor(float8e4m3fn)' of input parameter"


def open_session(
    ort: Any,
    model: Path,
    options: BuildOptions,
    adjust: Callable[[onnxruntime.SessionOptions], None] | None = None,
) -> onnxruntime.InferenceSession:
    """A session whose first provider is the target's. adjust: what the caller sets on the session's options.

    Raises BuildError in ONNX Runtime's words, and where another provider became active.
    """
    target = TARGETS[options.target]
    settings = _session_options(ort, model, options)
    if adjust is not None:
        adjust(settings)
    given = provider_options(options)
    providers: list[Any] = [(target.provider, given), *target.others]
    if target.package:
        settings.add_provider_for_devices(_devices(ort, target)[:1], given)
        providers = []

    def opened() -> onnxruntime.InferenceSession:
        with contextlib.redirect_stdout(io.StringIO()):
            return ort.InferenceSession(str(model), settings, providers=providers or None, enable_fallback=0)

    try:
        try:
            session = opened()
        except Exception as error:
            if _FLOAT8_FUSION not in str(error):
                raise
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
            session = opened()
    except Exception as error:  # pybind classes of its own, RuntimeError, ValueError
        raise BuildError(f"ONNX Runtime refuses {model.name}: {words(error)}") from error
    if session.get_providers()[0] != target.provider:
        raise BuildError(
            f"ONNX Runtime runs {model.name} on {session.get_providers()[0]} instead of {target.provider}; "
            "its libraries or the GPU are missing"
        )
    session.disable_fallback()
    if target.device == "CPU":
        _trim()
    return session


def provider_options(options: BuildOptions) -> dict[str, str]:
    """Options of the target's provider, all as text. Raises UsageError for an option that it has no use for."""
    target, engine = TARGETS[options.target], options.engine
    # shapes: a session takes any; what is said of them says at which ones speed counts
    known = {*target.fields, "provider", "cpu_nodes", "shapes"}
    if target.device == "CPU":
        known.remove("cpu_nodes")
    for name in engine.said:
        if name not in known:
            raise UsageError(f"{flag_of(name)}: target {options.target} has no use for it")
    made = dict(target.defaults) | dict(_EXACT.get(options.target, ()) if options.exact else ())
    for name, option in target.fields.items():
        value = getattr(engine, name)
        if value not in (None, False):
            made[option] = str(int(value))
    if engine.shapes and target.shapes:
        for part, attribute in (("min", "least"), ("opt", "usual"), ("max", "most")):
            ranges = (f"{s.input}:{'x'.join(map(str, getattr(s, attribute)))}" for s in engine.shapes)
            made[f"{target.shapes}{part}_shapes"] = ",".join(ranges)
    if options.cache is not None:
        for switch, path in target.caches.items():
            made |= {path: str(options.cache)} | ({switch: "1"} if switch else {})
    return made | dict(engine.provider)


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
    if options.engine.cuda_graph:
        for name, size in _dimensions(model, options.engine.shapes).items():
            session.add_free_dimension_override_by_name(name, size)
    if TARGETS[options.target].device == "CPU" and _weight_bytes(model) > _BIG:
        session.add_session_config_entry("session.disable_prepacking", "1")
        session.enable_cpu_mem_arena = False
        session.enable_mem_pattern = False
        _give_back()
    return session


def _dimensions(model: Path, shapes: Sequence[ShapeRange]) -> dict[str, int]:
    """Sizes of named dimensions of inputs whose shape is fixed: then shapes are constants, and no node that computes them stays on the CPU."""
    fixed = {s.input: s.usual for s in shapes if s.least == s.most}
    if not fixed:
        return {}
    import onnx_ir as ir

    return {
        dim.value: size
        for value in ir.load(model).graph.inputs
        for dim, size in zip(value.shape or (), fixed.get(value.name or "", ()), strict=False)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }


def _give_back() -> None:
    """Let this process return freed blocks of 1 MiB and more to the system at once.

    glibc raises that limit to the largest block it saw freed, and keeps what is smaller: 500 MB for a run of SmolLM2.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _trim() -> None:
    """Give back what loading has freed: packing and unpacking weights needs them twice, and glibc would keep that."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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
