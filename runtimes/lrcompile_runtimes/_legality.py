"""What every target makes of every way to store a weight: one table, as data, which `tests/unit/test_legality.py` rebuilds.

A row is an encoding (its smallest graph is of the same name in `tests/weight_forms.py`), a column a target. "tried" stands
where that test builds the graph; the columns of targets that cannot be tried without their GPU hold what the vendors'
documents and the target nearest to it say, and are marked so by `TRIED`.

"small": what the built engine keeps of the weight is no more than half of a dense float32 one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TARGETS = ("ort-cpu", "ort-cuda", "ort-tensorrt", "trt", "trt-rtx")
TRIED = ("ort-cpu", "trt-rtx")  # ONNX Runtime 1.31.1; TensorRT-RTX 1.7.1 for SM89 and SM120


@dataclass(frozen=True, slots=True)
class Verdict:
    """refused: why the target will not have it, empty where it will. small: whether it stays small. note: what else it costs."""

    refused: str = ""
    small: bool = False
    note: str = ""


_SMALL, _WIDE = Verdict(small=True), Verdict()
_FOLDED = Verdict(note="folded back to a dense float32 weight when the model is loaded")
_NO_ZERO = Verdict("only symmetric quantization: a zero point must be zero")
_NO_SIGN = Verdict("scales must be positive")
_NO_PLUGIN = Verdict("the operator is a plugin that the parser does not find")
_LOOSE = Verdict("a quantized constant may only be read by a DequantizeLinear")
_NO_OPERATOR = Verdict("the parser has no such operator")
_MIXED = Verdict("both operands of a MatMul must be of one type: a Cast is missing")
_UNPACKS = Verdict(small=True, note="the whole weight is dequantized in every run")
_FROM_ADA = Verdict(small=True, note="for compute capability 8.9 and later")


def _no_type(name: str) -> Verdict:
    return Verdict(f"the parser takes no {name}")


def _row(
    cpu: Verdict, rtx: Verdict, *, cuda: Verdict | None = None, full: Verdict | None = None
) -> Mapping[str, Verdict]:
    """cuda: ONNX Runtime's provider where it differs from the CPU's. All TensorRTs share their parser; full: the others where they differ."""
    return dict(zip(TARGETS, (cpu, cuda or cpu, full or rtx, full or rtx, rtx), strict=True))


ENCODINGS: Mapping[str, Mapping[str, Verdict]] = {
    # factors of a plain type
    "float32": _row(_SMALL, _SMALL),
    "float16": _row(Verdict(small=True, note="computed, and kept, in float32"), _SMALL, cuda=_SMALL),
    "bfloat16": _row(Verdict("the CPU has no kernel for bfloat16 products"), _SMALL, cuda=_SMALL),
    "float16 uncast": _row(_MIXED, _MIXED),
    # DequantizeLinear -> MatMul: a scale a column, or one for each block of rows
    "int8": _row(_SMALL, _SMALL),
    "int8/32": _row(_SMALL, _SMALL),
    "int4": _row(_SMALL, _SMALL),
    "int4/32": _row(_SMALL, _SMALL),
    "int4/64": _row(_SMALL, _SMALL),
    "int4/128": _row(_SMALL, _SMALL),
    "int4/32 ragged": _row(
        _SMALL, Verdict(small=True, note="built, but never run: rows are no multiple of 32")
    ),
    "int4/32 narrow": _row(_SMALL, Verdict(small=True, note="scales are widened to float32")),
    "int4/32 negative": _row(
        _SMALL, Verdict(small=True, note="built, against its documents, and never run"), full=_NO_SIGN
    ),
    "float8": _row(_UNPACKS, _FROM_ADA),
    "float8/32": _row(_UNPACKS, _FROM_ADA),
    "int8 zero": _row(_SMALL, _NO_ZERO),
    "int4/32 zero": _row(_SMALL, _NO_ZERO),
    "uint8": _row(_SMALL, _no_type("uint8")),
    "uint4/32": _row(_SMALL, _no_type("uint4")),
    "int2/32": _row(_SMALL, _no_type("int2")),
    # the weight on the left
    "int8 left": _row(_UNPACKS, _SMALL),
    "int4/32 left": _row(_UNPACKS, Verdict("the builder dies: an int4 constant may not be a left operand")),
    # operators of ONNX Runtime's own
    "MatMulNBits": _row(_SMALL, _NO_PLUGIN),
    "FusedMatMul": _row(_WIDE, _NO_PLUGIN),
    "GatherBlockQuantized": _row(_SMALL, _NO_PLUGIN),
    # integers brought to floats otherwise
    "int8 cast": _row(_FOLDED, _LOOSE),
    "int4 cast": _row(_FOLDED, _LOOSE),
    "MatMulInteger": _row(_SMALL, _NO_OPERATOR),
    "DynamicQuantizeLinear": _row(_SMALL, _NO_OPERATOR),
    "BitShift": _row(_FOLDED, _NO_OPERATOR),
    "BitwiseAnd": _row(_FOLDED, _NO_OPERATOR),
    # inputs rounded before they are multiplied
    "input int8": _row(
        _SMALL, _NO_OPERATOR, cuda=Verdict("the provider has no kernel for DynamicQuantizeLinear")
    ),
    "input int8-static": _row(_SMALL, _SMALL),
    "input float8-static": _row(
        Verdict("by default it fuses such products to an operator that has no float8"), _SMALL
    ),
    # tables
    "int8 rows": _row(_SMALL, _LOOSE),
    "int8 table": _row(_UNPACKS, _SMALL),
    "two cores": _row(_SMALL, _SMALL),
    # the graph around
    "Einsum": _row(_SMALL, _SMALL),
    "chain": _row(_SMALL, _SMALL),
    "If": _row(_WIDE, _WIDE),
    "function": _row(_SMALL, _SMALL),
    "NonZero": _row(_SMALL, _NO_PLUGIN),
    "codebook": _row(_FOLDED, Verdict(small=True, note="indices are widened to int32")),
    "product": _row(_FOLDED, _SMALL),
}


def verdict(storage: str, target: str) -> Verdict | None:
    """Of an encoding, by its name or by that of the type alone; None where the table knows nothing."""
    row = ENCODINGS.get(storage)
    return None if row is None else row[target]
