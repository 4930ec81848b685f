"""The GPU at hand: finding it, here with a driver that is made up; memory, streams and graphs on a real one (`-m gpu`)."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lrcompile.errors import BuildError, PluginError
from lrcompile_runtimes import _cuda


def driver(*, init: int = 0, get: int = 0, attribute: int = 0) -> SimpleNamespace:
    """libcuda with one GPU of compute capability 8.6; the arguments are what its calls return."""

    def attributes(value: Any, which: int, device: object) -> int:
        value._obj.value = {75: 8, 76: 6}[which]
        return attribute

    return SimpleNamespace(
        cuInit=lambda flags: init, cuDeviceGet=lambda device, index: get, cuDeviceGetAttribute=attributes
    )


@pytest.mark.parametrize(
    ("made", "capability"),
    [
        (driver(), "8.6"),
        (driver(init=100), None),  # CUDA_ERROR_NO_DEVICE
        (driver(get=101), None),
        (driver(attribute=1), None),
    ],
)
def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, made: Any, capability: str | None) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    assert _cuda.capability() == capability


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert _cuda.capability() is None


def test_neither_torch_nor_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "cuda", "cuda.bindings"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(PluginError, match="cuda-python"):
        _cuda.device()


def test_an_error_of_cuda_is_told() -> None:
    assert _cuda._checked((0, "result")) == "result"
    assert _cuda._checked((0,)) is None
    with pytest.raises(BuildError, match="CUDA says 2"):
        _cuda._checked((2, None))


# --- on a GPU -----------------------------------------------------------------------------------------------------


def devices() -> list[Any]:
    found: list[Any] = []
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        found.append(_cuda.TorchDevice())
    try:
        from cuda.bindings import runtime

        found.append(_cuda.CudaDevice(runtime))
    except ImportError:
        pass
    assert found, "neither torch with CUDA nor cuda-python"
    return found


@pytest.mark.gpu
def test_what_goes_there_comes_back() -> None:
    assert _cuda.capability() is not None
    arrays = [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.arange(12).reshape(3, 4).T,
        np.array(3, np.int8),
        np.empty((0, 2), np.float32),
    ]
    for device in devices():
        assert device.stream
        for array in arrays:
            buffer = device.empty(array.nbytes)
            assert buffer.address
            device.upload(buffer, array)
            back = np.empty(array.shape, array.dtype)
            device.download(buffer, back)
            np.testing.assert_array_equal(back, array)


@pytest.mark.gpu
def test_a_recorded_graph_is_replayed() -> None:
    """Recorded is a fill; what was uploaded between is overwritten by every replay."""
    for device in devices():
        buffer, back = device.empty(8), np.empty(8, np.uint8)
        if isinstance(device, _cuda.TorchDevice):
            replay = device.record(lambda b=buffer: b.tensor.fill_(7))
        else:
            runtime = device._runtime
            replay = device.record(
                lambda b=buffer, d=device, r=runtime: _cuda._checked(
                    r.cudaMemsetAsync(b.address, 7, 8, d._stream)
                )
            )
        for _ in range(2):
            device.upload(buffer, np.zeros(8, np.uint8))
            device.download(buffer, back)
            assert not back.any()
            replay()
            device.synchronize()
            device.download(buffer, back)
            assert (back == 7).all()
