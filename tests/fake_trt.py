"""A stand-in for TensorRT and its GPU where there is none: device memory is the host's, an engine is a Python function.

It keeps to what the documentation says of the calls that `lrcompile_runtimes._trt.engine` makes, and complains of misuse.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Memory:
    def __init__(self, size: int) -> None:
        self.array = np.full(max(size, 1), 0xAB, np.uint8)
        self.address = self.array.ctypes.data


class HostDevice:
    """`lrcompile_runtimes._cuda.Device` without a GPU. What was launched runs at once; recorded: how many graphs there are."""

    stream = 7

    def __init__(self) -> None:
        self.recorded = 0
        self.allocated: list[int] = []

    def empty(self, size: int) -> Memory:
        self.allocated.append(size)
        return Memory(size)

    def upload(self, buffer: Memory, array: Array) -> None:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer.array[: raw.size] = raw

    def download(self, buffer: Memory, array: Array) -> None:
        array.reshape(-1).view(np.uint8)[:] = buffer.array[: array.nbytes]

    def synchronize(self) -> None:
        pass

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return launch


class TensorIOMode(Enum):
    INPUT, OUTPUT = 1, 2


class TensorLocation(Enum):
    DEVICE, HOST = 0, 1


class DataType(Enum):
    FLOAT, HALF, INT64, INT4 = 0, 1, 2, 3


class IOutputAllocator:
    pass


class Context:
    """Computes the positive entries of x (their number depends on data) and 2 x, both float32; x is (n, 3), n from 1 to 4."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.launches = engine, 0
        self.shape: tuple[int, ...] | None = None
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name != "x" or len(shape) != 2 or not 0 <= shape[0] <= 4 or shape[1] != 3:
            return False
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address, "a null pointer"
        self.addresses[name] = address
        return True

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shape is not None
        return (-1,) if name == "positive" else self.shape

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostDevice.stream
        assert self.shape is not None
        x = _read(self.addresses["x"], self.shape)
        _write(self.addresses["double"], 2 * x)
        if self.engine.data_dependent:
            found = x[x > 0]
            allocator = self.allocators["positive"]
            _write(allocator.reallocate_output_async("positive", 0, found.nbytes, 256, stream), found)
            allocator.notify_shape("positive", found.shape)
        self.launches += 1
        return bool(self.engine.works)


def _read(address: int, shape: tuple[int, ...]) -> Array:
    size = int(np.prod(shape)) * 4
    return np.frombuffer(ctypes.string_at(address, size), np.float32).reshape(shape)


def _write(address: int, array: Array) -> None:
    raw = np.ascontiguousarray(array, np.float32).tobytes()
    ctypes.memmove(address, raw, len(raw))


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels = b"kernels"

    def deserialize(self, data: bytes) -> None:
        self.kernels = data + b", more"

    def serialize(self) -> bytes:
        return self.kernels


class RuntimeConfig:
    """Of TensorRT-RTX."""

    cuda_graph_strategy = "disabled"

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> None:
        self.cache = cache


class Engine:
    def __init__(self, data: bytes) -> None:
        self.data_dependent, self.works = b"positive" in data, b"broken" not in data
        self.dtype = DataType.INT4 if b"int4" in data else DataType.FLOAT
        self.location = TensorLocation.HOST if b"host" in data else TensorLocation.DEVICE
        self.names = ["x", "double", *(["positive"] if self.data_dependent else [])]
        self.num_io_tensors = len(self.names)
        self.weight_streaming_budget_v2 = -1
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "x" else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return self.location

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.dtype

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self, config: RuntimeConfig | None = None) -> Context:
        self.contexts.append(Context(self))
        self.config = config
        return self.contexts[-1]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_engine_inspector(self) -> Engine:
        return self

    def get_engine_information(self, kind: str) -> str:
        tensor = {"Name": "x", "Dimensions": [-1, 3], "Format/Datatype": "Row major linear FP32"}
        layer = {"LayerType": "ElementWise", "Inputs": [tensor], "Outputs": [tensor]}
        return json.dumps({"Layers": [{"Name": "a", **layer}, {"Name": "b", **layer}]})


class Library:
    """What stands for the module ``tensorrt``."""

    TensorIOMode, TensorLocation, IOutputAllocator = TensorIOMode, TensorLocation, IOutputAllocator

    class LayerInformationFormat:
        JSON = "json"

    class ILogger:
        pass

    class Runtime:
        def __init__(self, log: object) -> None:
            self.logger = log

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            return Engine(data) if data.startswith(b"engine") else None


class RtxLibrary(Library):
    """What stands for ``tensorrt_rtx``."""

    IRuntimeCache = RuntimeCache

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = "whole"
