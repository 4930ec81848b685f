"""The GPU at hand: which one it is, and memory, a stream and a recorded graph on it, through torch or through cuda-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from lrcompile.errors import BuildError, PluginError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute of cuda.h


def capability() -> str | None:
    """Compute capability of the first GPU, ``8.6``; None without one that the driver lets us use."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(value.value)
    return "{}.{}".format(*numbers)


class Buffer(Protocol):
    """Memory on the device, freed with the object. address: never null, that of an empty tensor neither."""

    @property
    def address(self) -> int: ...


class Device(Protocol):
    """What an engine needs of the GPU. All work goes to one stream."""

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        ...

    def empty(self, size: int) -> Buffer:
        """So many bytes."""
        ...

    def upload(self, buffer: Buffer, array: Array) -> None: ...

    def download(self, buffer: Buffer, array: Array) -> None:
        """Fill the array, and wait for it."""
        ...

    def synchronize(self) -> None: ...

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What replays all that `launch` sends to the stream, as one graph."""
        ...


def device() -> Device:
    """Through torch where it is installed with CUDA, else through cuda-python. Raises PluginError that says how to get one."""
    try:
        import torch

        if torch.cuda.is_available():
            return TorchDevice()
    except ImportError:
        pass
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise PluginError(
            "running an engine needs torch with CUDA or cuda-python; pip install cuda-python"
        ) from error
    return CudaDevice(runtime)


class _TorchBuffer:
    def __init__(self, tensor: Any) -> None:
        self.tensor, self.address = tensor, int(tensor.data_ptr())


class TorchDevice:
    """Memory of torch's allocator."""

    def __init__(self) -> None:
        import torch

        self._torch, self._stream = torch, torch.cuda.Stream()

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def empty(self, size: int) -> _TorchBuffer:
        return _TorchBuffer(self._torch.empty(max(size, 1), dtype=self._torch.uint8, device="cuda"))

    def upload(self, buffer: Any, array: Array) -> None:
        raw = self._torch.from_numpy(_raw(array).copy())  # torch wants memory that may be written
        with self._torch.cuda.stream(self._stream):
            buffer.tensor[: raw.numel()].copy_(raw)

    def download(self, buffer: Any, array: Array) -> None:
        with self._torch.cuda.stream(self._stream):
            host = buffer.tensor[: array.nbytes].cpu()
        self.synchronize()
        _raw(array)[:] = host.numpy()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            launch()

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay


class _CudaBuffer:
    def __init__(self, runtime: Any, size: int) -> None:
        self._runtime, self.address = runtime, int(_checked(runtime.cudaMalloc(max(size, 1))))

    def __del__(self) -> None:
        self._runtime.cudaFree(self.address)


class CudaDevice:
    """The same through NVIDIA's own bindings, whose functions give an error code before their result."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._stream = _checked(runtime.cudaStreamCreate())

    @property
    def stream(self) -> int:
        return int(self._stream)

    def empty(self, size: int) -> _CudaBuffer:
        return _CudaBuffer(self._runtime, size)

    def upload(self, buffer: Buffer, array: Array) -> None:
        raw, kind = _raw(array), self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _checked(
            self._runtime.cudaMemcpyAsync(buffer.address, raw.ctypes.data, raw.nbytes, kind, self._stream)
        )
        self.synchronize()  # the array may be gone afterwards

    def download(self, buffer: Buffer, array: Array) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked(
            self._runtime.cudaMemcpyAsync(array.ctypes.data, buffer.address, array.nbytes, kind, self._stream)
        )
        self.synchronize()

    def synchronize(self) -> None:
        _checked(self._runtime.cudaStreamSynchronize(self._stream))

    def record(self, launch: Callable[[], None]) -> Callable[[], None]:
        runtime, stream = self._runtime, self._stream
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(runtime.cudaStreamBeginCapture(stream, mode))
        launch()
        graph = _checked(runtime.cudaStreamEndCapture(stream))
        ready = _checked(runtime.cudaGraphInstantiate(graph, 0))
        return lambda: _checked(runtime.cudaGraphLaunch(ready, stream))


def _checked(answer: tuple[Any, ...]) -> Any:
    error, *results = answer
    if int(error):
        raise BuildError(f"CUDA says {error}")
    return results[0] if results else None


def _raw(array: Array) -> Array:
    """The bytes of an array, in row-major order; of one that is contiguous its own memory."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
