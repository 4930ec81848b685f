"""The model as quantizers that come with ONNX Runtime leave it, each at what its documentation recommends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

from lrcompile.feeds import Feeds

_BLOCK = 32
_FEEDS = 8  # feeds that ranges of activations are taken from

# Writes the quantized model of a path to another.
Stock = Callable[[Path, Path, Feeds], None]


def dynamic(per_channel: bool, operators: tuple[str, ...] | None = None) -> Stock:
    def make(source: Path, target: Path, feeds: Feeds) -> None:
        quantize_dynamic(source, target, list(operators) if operators else None, per_channel=per_channel)

    return make


def static(source: Path, target: Path, feeds: Feeds) -> None:
    quantize_static(source, target, _Reader(feeds), per_channel=True, weight_type=QuantType.QInt8)


def blocks(make: Callable[[Feeds], nbits.WeightOnlyQuantConfig]) -> Stock:
    def write(source: Path, target: Path, feeds: Feeds) -> None:
        quantizer = nbits.MatMulNBitsQuantizer(onnx.load(source), block_size=_BLOCK, algo_config=make(feeds))
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))

    return write


def _rounded(bits: int, *operators: str) -> Stock:
    return blocks(
        lambda feeds: nbits.DefaultWeightOnlyQuantConfig(
            block_size=_BLOCK, is_symmetric=False, bits=bits, op_types_to_quantize=operators
        )
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds as ONNX Runtime asks for them."""

    def __init__(self, feeds: Feeds) -> None:
        self._left = list(itertools.islice(feeds, _FEEDS))  # a list, for quantizers copy it

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


STOCK: Mapping[str, Stock] = {
    "dynamic int8, every operator, per channel": dynamic(True),
    "dynamic int8, every operator, per tensor": dynamic(False),
    "dynamic int8, MatMul only, per channel": dynamic(True, ("MatMul",)),
    "static int8, per channel": static,
    "8 bits in blocks of 32, MatMul": _rounded(8, "MatMul"),
    "4 bits in blocks of 32, MatMul": _rounded(4, "MatMul"),
    "4 bits in blocks of 32, MatMul and tables": _rounded(4, "MatMul", "Gather"),
    "4 bits by HQQ, MatMul": blocks(lambda feeds: nbits.HQQWeightOnlyQuantConfig(block_size=_BLOCK)),
    "4 bits by k-quant, MatMul": blocks(lambda feeds: nbits.KQuantWeightOnlyQuantConfig()),
    "4 bits by GPTQ, MatMul": blocks(
        lambda feeds: nbits.GPTQWeightOnlyQuantConfig(calibration_data_reader=_Reader(feeds))
    ),
}
