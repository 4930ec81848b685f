"""The legality table, rebuilt: every encoding is given to ONNX Runtime and to TensorRT-RTX, which say what they make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from lrcompile.child import Child
from lrcompile.errors import BuildError
from lrcompile.registry import runtimes
from lrcompile_runtimes._legality import ENCODINGS, TARGETS, TRIED, verdict
from tests import weight_forms


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(timeout=60) as child:
        yield child


def kept(encoding: str, target: str, child: Child, path: Path, *capabilities: str) -> int:
    """Bytes of all constants in what is built."""
    made = weight_forms.ENCODINGS[encoding]()
    onnx.save(made, path)
    if target == "ort-cpu":
        tensors = onnx.load(child.call("tests.kept:by_ort", str(path))).graph.initializer
        return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in tensors)
    (port,) = made.graph.input
    dims = tuple(dim.dim_value for dim in port.type.tensor_type.shape.dim)
    return int(
        child.call("tests.kept:by_rtx", str(path), capabilities, port.name, dims)["weights"].split()[0]
    )


def agree(encoding: str, target: str, child: Child, tmp_path: Path, *capabilities: str) -> None:
    """What the table says is what happens."""
    said = ENCODINGS[encoding][target]
    try:
        size = kept(encoding, target, child, tmp_path / "model.onnx", *capabilities)
    except BuildError as error:
        assert said.refused, f"{encoding} is refused: {error}"
    else:
        assert not said.refused, f"{encoding} is built"
        assert said.small == (size <= weight_forms.DENSE / 2), f"{encoding} keeps {size} bytes"


def test_the_table_is_complete() -> None:
    assert set(ENCODINGS) == set(weight_forms.ENCODINGS)
    assert all(set(row) == set(TARGETS) for row in ENCODINGS.values())
    assert set(TRIED) <= set(TARGETS)
    known = {target for runtime in runtimes().values() for target in runtime.targets()}
    assert {"trt", "trt-rtx", "ort-cpu"} <= known & set(TARGETS)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_onnx_runtime_agrees(encoding: str, child: Child, tmp_path: Path) -> None:
    agree(encoding, "ort-cpu", child, tmp_path)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tensorrt_rtx_agrees(encoding: str, child: Child, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    agree(encoding, "trt-rtx", child, tmp_path, "8.9", "12.0")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tensorrt_rtx_agrees_for_each_gpu(
    encoding: str, capability: str, child: Child, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    agree(encoding, "trt-rtx", child, tmp_path, capability)


def test_a_table_that_lies_is_found_out(
    child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoding, other in (
        ("int8 cast", "float32"),
        ("float16 uncast", "float32"),
        ("float32", "float16 uncast"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(ENCODINGS, encoding, ENCODINGS[other])  # type: ignore[arg-type]
            with pytest.raises(AssertionError):
                agree(encoding, "ort-cpu", child, tmp_path)


def test_a_type_alone_names_an_encoding() -> None:
    assert (said := verdict("uint8", "trt-rtx")) is not None
    assert "uint8" in said.refused
    assert (said := verdict("int8", "trt-rtx")) is not None
    assert said.small
    assert verdict("", "trt-rtx") is None
