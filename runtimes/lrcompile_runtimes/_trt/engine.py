"""A TensorRT engine that runs: bytes whose hash was checked, device memory, one stream.

Needs the GPU that it was built for, and so could only be tested with a stand-in for the library (`tests/fake_trt.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import BuildError
from lrcompile_runtimes import Port, check_feeds
from lrcompile_runtimes._cuda import Buffer, Device
from lrcompile_runtimes._trt.layers import from_json, kinds
from lrcompile_runtimes._trt.log import listen, log_of, uncollected

if TYPE_CHECKING:
    import numpy as np
    import tensorrt as trt

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How an engine is run. streaming: bytes of weights that stay on the device. kernels: the file of a runtime cache (RTX)."""

    cuda_graph: bool = False
    streaming: int | None = None
    kernels: Path | None = None


class TrtEngine:
    """A deserialized engine with one context. library: the module, ``tensorrt`` or ``tensorrt_rtx``."""

    def __init__(
        self,
        library: Any,
        data: bytes | memoryview,
        device: Device,
        described: Mapping[str, str],
        options: RunOptions,
    ) -> None:
        self._library, self._device, self._options = library, device, options
        self._described = dict(described)
        self._runtime: Any = library.Runtime(log_of(library))
        words = listen(self._runtime.logger)
        with uncollected():
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BuildError(f"{described['library']} cannot load the engine: {words}")
        self._engine: trt.ICudaEngine = engine
        if options.streaming is not None:
            engine.weight_streaming_budget_v2 = options.streaming
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for name in names:
            if engine.get_tensor_location(name) != library.TensorLocation.DEVICE:
                raise BuildError(
                    f"{name!r} decides shapes by its values, which stay on the CPU: not supported"
                )
        self._inputs = [n for n in names if engine.get_tensor_mode(n) == library.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        self._ports = tuple(
            Port(n, self._dtype(n), tuple(d if d >= 0 else None for d in engine.get_tensor_shape(n)))
            for n in self._inputs
        )
        self._context, self._kernels = self._new_context()

    def _new_context(self) -> tuple[trt.IExecutionContext, Any]:
        """A context, and its runtime cache where the library has one: kernels that RTX compiled for this GPU before."""
        engine: Any = self._engine
        if not hasattr(self._library, "IRuntimeCache"):
            return engine.create_execution_context(), None
        config, cache = engine.create_runtime_config(), None
        if self._options.cuda_graph:
            config.cuda_graph_strategy = self._library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._options.kernels is not None:
            cache = config.create_runtime_cache()
            if self._options.kernels.is_file():
                cache.deserialize(self._options.kernels.read_bytes())
            config.set_runtime_cache(cache)
        return engine.create_execution_context(config), cache

    def _dtype(self, name: str) -> np.dtype[Any]:
        return dtype_of(str(self._engine.get_tensor_dtype(name)).rpartition(".")[2], name)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import numpy as np

        bound = self._bind(feeds)
        self._launch()
        self._device.synchronize()
        outputs = {}
        for name in self._outputs:
            grown = bound.grown.get(name)
            shape = grown.shape if grown is not None else tuple(self._context.get_tensor_shape(name))
            outputs[name] = np.empty(shape, self._dtype(name))
            buffer = grown.buffer if grown is not None else bound.buffers[name]
            if outputs[name].size and buffer is not None:
                self._device.download(buffer, outputs[name])
        return outputs

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[int], None]:
        bound = self._bind(feeds)
        self._launch()  # the first one allocates, and compiles where the library compiles late
        self._device.synchronize()
        launch = self._launch
        if self._options.cuda_graph and not hasattr(self._library, "IRuntimeCache"):  # RTX records by itself
            if bound.grown:
                raise BuildError(
                    f"a CUDA graph cannot hold {next(iter(bound.grown))!r}: its shape depends on data"
                )
            launch = self._device.record(self._launch)

        def times(count: int, _held: object = bound) -> None:
            for _ in range(count):
                launch()
            self._device.synchronize()

        return times

    def _bind(self, feeds: Mapping[str, Array]) -> _Bound:
        """Put feeds on the device and make room for outputs."""
        import numpy as np

        check_feeds(self._ports, feeds)
        context, buffers, grown = self._context, dict[str, Buffer](), dict[str, Any]()
        for name in self._inputs:
            array = np.asarray(feeds[name])
            if not context.set_input_shape(name, array.shape):
                low, _, high = self._engine.get_tensor_profile_shape(name, 0)
                raise BuildError(
                    f"input {name!r} was given shape {array.shape}; the engine takes {tuple(low)} to {tuple(high)}"
                )
            buffers[name] = self._device.empty(array.nbytes)
            self._device.upload(buffers[name], array)
            context.set_tensor_address(name, buffers[name].address)
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                grown[name] = _allocator(self._library, self._device)
                context.set_output_allocator(name, grown[name])
            else:
                buffers[name] = self._device.empty(math.prod(shape) * self._dtype(name).itemsize)
                context.set_tensor_address(name, buffers[name].address)
        return _Bound(buffers, grown)

    def _launch(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise BuildError("TensorRT cannot run the model: the launch was refused")

    def nodes(self) -> dict[str, int]:
        inspector = self._engine.create_engine_inspector()
        return kinds(from_json(inspector.get_engine_information(self._library.LayerInformationFormat.JSON)))

    def describe(self) -> dict[str, str]:
        return dict(self._described)

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._kernels is not None and self._options.kernels is not None:
            replace_file(self._options.kernels, bytes(self._kernels.serialize()))
        del self._context, self._engine, self._runtime


def dtype_of(kind: str, name: str) -> np.dtype[Any]:
    """NumPy's type for a member of TensorRT's DataType. Raises BuildError where there is none."""
    import ml_dtypes
    import numpy as np

    types: dict[str, Any] = {
        "FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "FP8": ml_dtypes.float8_e4m3fn,
        "INT64": np.int64, "INT32": np.int32, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
    }  # fmt: skip
    if kind not in types:
        raise BuildError(f"{name!r} is a {kind}, which NumPy cannot hold: cast it")
    dtype: np.dtype[Any] = np.dtype(types[kind])
    return dtype


@dataclass(frozen=True, slots=True)
class _Bound:
    """What must live as long as the engine runs on it. grown: allocators of outputs whose shape only the run tells."""

    buffers: Mapping[str, Buffer]
    grown: Mapping[str, Any]


def _allocator(library: Any, device: Device) -> Any:
    """An IOutputAllocator that keeps one buffer, and the shape that it was told."""

    class Allocator(library.IOutputAllocator):  # type: ignore[misc]  # the base comes with the library
        def __init__(self) -> None:
            super().__init__()
            self.buffer: Buffer | None = None
            self.size = 0
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            if self.buffer is None or size > self.size:
                self.buffer, self.size = device.empty(size), size
            return self.buffer.address

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()


def replace_file(path: Path, data: bytes) -> None:
    """Write a cache in one step: another process may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_name(f".{path.name}.{id(data)}")
    stage.write_bytes(data)
    stage.replace(path)
