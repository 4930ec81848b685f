"""Coded matrices in ONNX: the constants that hold one, and the nodes that decode it into what DequantizeLinear makes of integers.

    8 bits      int8 or uint8                                     4 bits   int4 or uint4 (opset 21)
    1, 2, 3     planes of one and two bits, eight or four codes a byte, unpacked by BitShift and BitwiseAnd: runtimes do that once, when
                they fold constants, and keep four bits
    scales      float32, or float16 and Cast, or float8, Cast and one factor; one a column (axis 1) or one a block of rows (axis 0)

Codes of ternary and sign types are integers with a zero point too. Numbers of a float8 are their own constant. Places in levels that were
fitted to two matrices are gathered from these, which runtimes do once when they load the file: there only the file is smaller. A table is read by
row: codes and scales of the rows that are asked for are gathered, then decoded, so that the table is never decoded as a whole; its groups
run along the row. DequantizeLinear is made once for each consumer, which lets runtimes keep the codes in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lrcompile.graph import Builder
from lrcompile.interfaces import Array
from lrcompile.quantize import Coded, Storage
from lrcompile.quantize.formats import SCALES, float8_codes

OPSET = 21  # of block_size and 4 bits


@dataclass(frozen=True, slots=True)
class Part:
    """A constant of a coded matrix."""

    dtype: ir.DataType
    array: Array


def parts_of(coded: Coded, *, by_row: bool = False) -> dict[str, Part]:
    """The constants, by the suffix of their name. by_row: of a table, whose transpose was coded."""
    if coded.storage.together > 1:
        assert coded.levels is not None
        dtype = ir.DataType.UINT4 if coded.storage.bits == 4 else ir.DataType.UINT8
        codes = Part(dtype, coded.codes.astype(dtype.numpy()))
        levels, scales = (
            Part(ir.DataType.FLOAT, a.astype(np.float32)) for a in (coded.levels, coded.scales[0, :, None])
        )
        return {"": codes, "levels": levels, "scale": scales}
    made = {**_codes(coded, by_row), **_scales(coded, by_row)}
    if (zeros := _zeros(coded)) is not None:
        dtype = ir.DataType.UINT8 if by_row else _integer(coded.storage)  # of rows that are gathered
        one_a_column = not by_row and len(zeros) == 1
        array = zeros.T if by_row else zeros[0] if one_a_column else zeros
        made["zero"] = Part(dtype, np.ascontiguousarray(array).astype(dtype.numpy()))
    return made


def size_of(storage: Storage, K: int, N: int, *, by_row: bool = False) -> int:
    """Bits that the constants of a matrix (K, N) take in a file: of less than four bits a zero point takes four, and codes fill whole bytes."""
    groups, bits = storage.groups(K) * N, storage.bits
    planes = {3: (2, 1)}.get(bits, (bits,))
    if bits == 8 or (bits == 4 and not by_row):
        total = bits * K * N
    else:
        total = sum(8 * math.ceil(K * plane / 8) * N for plane in planes)
    total += groups * SCALES[storage.scale] + (32 if storage.scale == "float8" else 0)
    if storage.zero_points or bits < 4:
        total += groups * (8 if by_row or bits == 8 else 4)
    return total


def _integer(storage: Storage) -> ir.DataType:
    """What DequantizeLinear reads."""
    if storage.bits == 8:
        return ir.DataType.UINT8 if storage.zero_points else ir.DataType.INT8
    return ir.DataType.INT4 if storage.bits == 4 and not storage.zero_points else ir.DataType.UINT4


def _steps(storage: Storage) -> tuple[int, int]:
    """level = step code - first for types whose levels are integers: of ternary 1, 1, of signs 2, 1, of quarters 2, 3."""
    return int(storage.levels[1] - storage.levels[0]), int(-storage.levels[0])


def _zeros(coded: Coded) -> Array | None:
    """(groups, N): zero points, also those that signed codes of less than four bits get; None where zero is zero."""
    storage = coded.storage
    if coded.zeros is not None:
        return coded.zeros
    return None if storage.bits >= 4 else np.full(coded.scales.shape, stored_zero(storage))


def stored_zero(storage: Storage) -> int:
    """What stands for zero where signed codes are stored from zero upwards."""
    return _steps(storage)[1] if storage.levels else -storage.low


def _codes(coded: Coded, by_row: bool) -> dict[str, Part]:
    storage = coded.storage
    if storage.bits == 8 and storage.levels:
        values = np.array(storage.levels)[coded.codes].astype(ml_dtypes.float8_e4m3fn)
        return {"": Part(ir.DataType.FLOAT8E4M3FN, values)}
    codes = coded.codes.T if by_row else coded.codes
    if storage.bits == 8 or (storage.bits == 4 and not by_row):
        dtype = _integer(storage)
        return {"": Part(dtype, np.ascontiguousarray(codes).astype(dtype.numpy()))}
    low = (coded.codes if storage.levels else coded.codes - storage.low).astype(np.uint8)
    if by_row:
        return {
            "": Part(ir.DataType.UINT8, packed(np.ascontiguousarray(low.T).T, storage.bits)[:, 0].T.copy())
        }
    if storage.bits == 3:
        return {
            "": Part(ir.DataType.UINT8, packed(low & 3, 2)),
            "high": Part(ir.DataType.UINT8, packed(low >> 2, 1)),
        }
    return {"": Part(ir.DataType.UINT8, packed(low, storage.bits))}


def packed(codes: Array, bits: int) -> Array:
    """(K, N) codes below 2^bits, bits 1, 2 or 4, to bytes (ceil(K bits / 8), 1, N): those of consecutive rows, the first lowest."""
    per = 8 // bits
    short = -len(codes) % per
    padded = np.concatenate([codes, np.zeros((short, codes.shape[1]), codes.dtype)]).astype(np.uint8)
    rows = padded.reshape(-1, per, codes.shape[1])
    made: Array = np.bitwise_or.reduce(rows << (np.arange(per, dtype=np.uint8) * bits)[:, None], axis=1)
    return made[:, None]


def _scales(coded: Coded, by_row: bool) -> dict[str, Part]:
    storage, scales = coded.storage, coded.scales.T if by_row else coded.scales
    if not by_row and len(scales) == 1:
        scales = scales[0]
    if storage.scale == "float8":
        return {
            "scale": Part(ir.DataType.FLOAT8E4M3FN, float8_codes(scales, coded.factor)),
            "factor": Part(ir.DataType.FLOAT, np.array(coded.factor, np.float32)),
        }
    dtype = ir.DataType.FLOAT16 if storage.scale == "float16" else ir.DataType.FLOAT
    return {"scale": Part(dtype, scales.astype(dtype.numpy()))}


def decode(
    op: Builder,
    given: Mapping[str, ir.Value],
    storage: Storage,
    shape: tuple[int, ...],
    compute: ir.DataType,
    name: str,
) -> ir.Value:
    """The nodes that make a matrix (K, N), or (K, N, n) of n with common codes, of its parts."""
    if storage.together > 1:
        places = op("Cast", given[""], name=f"{name}_places", to=ir.DataType.INT32)
        normal = op("Gather", given["levels"], places, name=f"{name}_normal", axis=0)
        numbers = op("Mul", normal, given["scale"], name=f"{name}_numbers")
        return (
            numbers if compute == ir.DataType.FLOAT else op("Cast", numbers, name=f"{name}_cast", to=compute)
        )
    K, N = shape
    scale = _decoded_scale(op, given, storage, compute, name)
    codes = given[""]
    if storage.bits < 4:
        codes = _unpacked(op, codes, 2 if storage.bits == 3 else storage.bits, K, N, f"{name}_low")
        if storage.bits == 3:
            high = _unpacked(op, given["high"], 1, K, N, f"{name}_high")
            shift = op.constant(np.array(2, np.uint8), f"{name}_two")
            codes = op(
                "BitwiseOr",
                codes,
                op("BitShift", high, shift, name=f"{name}_up", direction="LEFT"),
                name=f"{name}_codes",
            )
        elif storage.levels and _steps(storage)[0] == 2:
            codes = op(
                "BitShift",
                codes,
                op.constant(np.array(1, np.uint8), f"{name}_one"),
                name=f"{name}_codes",
                direction="LEFT",
            )
        codes = op("Cast", codes, name=f"{name}_uint4", to=ir.DataType.UINT4)
    inputs = [codes, scale, *([given["zero"]] if "zero" in given else [])]
    blocked = storage.groups(K) > 1
    if blocked:
        made = op("DequantizeLinear", *inputs, name=f"{name}_dequantized", axis=0, block_size=storage.group)
    else:
        made = op("DequantizeLinear", *inputs, name=f"{name}_dequantized", axis=1)
    return made if compute != ir.DataType.DOUBLE else op("Cast", made, name=f"{name}_cast", to=compute)


def decode_rows(
    op: Builder,
    given: Mapping[str, ir.Value],
    storage: Storage,
    shape: tuple[int, ...],
    ids: ir.Value,
    compute: ir.DataType,
    name: str,
) -> ir.Value:
    """Rows `ids` of a table (V, D): codes and scales are gathered, then decoded."""
    D = shape[1]
    codes = op("Gather", given[""], ids, name=f"{name}_rows", axis=0)
    if storage.bits < 8:
        per = 8 // storage.bits
        shifts = op.constant(np.arange(per, dtype=np.uint8) * storage.bits, f"{name}_shifts")
        mask = op.constant(np.array((1 << storage.bits) - 1, np.uint8), f"{name}_mask")
        last = op.constant(np.array([-1], np.int64), f"{name}_last")
        spread = op(
            "BitShift",
            op("Unsqueeze", codes, last, name=f"{name}_bytes"),
            shifts,
            name=f"{name}_shifted",
            direction="RIGHT",
        )
        codes = _flat(op, op("BitwiseAnd", spread, mask, name=f"{name}_codes"), f"{name}_flat")
    scale = _decoded_scale(op, given, storage, compute, name, ids)
    numbers = op("Cast", codes, name=f"{name}_numbers", to=compute)
    groups = math.ceil(D / storage.group) if storage.group else 1
    if groups > 1:  # (.., D) to (.., groups, size)
        size = op.constant(np.array([groups, storage.group], np.int64), f"{name}_blocks")
        head = op("Shape", ids, name=f"{name}_head")
        numbers = op(
            "Reshape", numbers, op("Concat", head, size, name=f"{name}_shape", axis=0), name=f"{name}_blocked"
        )
        end = op.constant(np.array([-1], np.int64), f"{name}_end")
        scale = op("Unsqueeze", scale, end, name=f"{name}_scales")
    zero = _row_zero(op, given, storage, ids, compute, name)
    if zero is not None:
        if groups > 1 and "zero" in given:
            zero = op("Unsqueeze", zero, end, name=f"{name}_zeros")
        numbers = op("Sub", numbers, zero, name=f"{name}_centred")
    made = op("Mul", numbers, scale, name=f"{name}_scaled")
    return _flat(op, made, name) if groups > 1 else made


def _row_zero(
    op: Builder,
    given: Mapping[str, ir.Value],
    storage: Storage,
    ids: ir.Value,
    compute: ir.DataType,
    name: str,
) -> ir.Value | None:
    if "zero" in given:
        return op(
            "Cast",
            op("Gather", given["zero"], ids, name=f"{name}_zero_rows", axis=0),
            name=f"{name}_zero",
            to=compute,
        )
    if storage.bits == 8:
        return None
    return op.constant(np.array(-storage.low, compute.numpy()), f"{name}_zero")


def _flat(op: Builder, value: ir.Value, name: str) -> ir.Value:
    """The last two axes as one."""
    head = op("Shape", value, name=f"{name}_outer", end=-2)
    rest = op.constant(np.array([-1], np.int64), f"{name}_rest")
    return op("Reshape", value, op("Concat", head, rest, name=f"{name}_to", axis=0), name=f"{name}_joined")


def _decoded_scale(
    op: Builder,
    given: Mapping[str, ir.Value],
    storage: Storage,
    compute: ir.DataType,
    name: str,
    ids: ir.Value | None = None,
) -> ir.Value:
    """In the type that codes are multiplied in: no DequantizeLinear takes scales of float64."""
    kind = ir.DataType.FLOAT if compute == ir.DataType.DOUBLE and ids is None else compute
    scale = given["scale"]
    if ids is not None:
        scale = op("Gather", scale, ids, name=f"{name}_scale_rows", axis=0)
    if storage.scale == "float8":
        scale = op("Cast", scale, name=f"{name}_scale_float", to=ir.DataType.FLOAT)
        scale = op("Mul", scale, given["factor"], name=f"{name}_scale")
    stored = ir.DataType.FLOAT16 if storage.scale == "float16" else ir.DataType.FLOAT
    return scale if stored == kind else op("Cast", scale, name=f"{name}_scale_cast", to=kind)


def _unpacked(op: Builder, packs: ir.Value, bits: int, K: int, N: int, name: str) -> ir.Value:
    """Bytes (P, 1, N) back to codes (K, N)."""
    per = 8 // bits
    shifts = op.constant((np.arange(per, dtype=np.uint8) * bits)[None, :, None], f"{name}_shifts")
    mask = op.constant(np.array((1 << bits) - 1, np.uint8), f"{name}_mask")
    spread = op(
        "BitwiseAnd",
        op("BitShift", packs, shifts, name=f"{name}_shifted", direction="RIGHT"),
        mask,
        name=f"{name}_masked",
    )
    rows = op.constant(np.array([-1, N], np.int64), f"{name}_shape")
    flat = op("Reshape", spread, rows, name=f"{name}_flat")
    if K % per == 0:
        return flat
    bounds = [
        op.constant(np.array([n], np.int64), f"{name}_{w}") for n, w in ((0, "from"), (K, "to"), (0, "along"))
    ]
    return op("Slice", flat, *bounds, name=f"{name}_cut")
