"""Coded matrices out of the constants that hold them: the inverse of `encoding.parts_of`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lrcompile.encoding import parts_of, stored_zero
from lrcompile.graph import dims
from lrcompile.interfaces import Array
from lrcompile.quantize import Coded, Storage


def coded_of(
    parts: Mapping[str, ir.TensorProtocol], storage: Storage, shape: tuple[int, ...], *, by_row: bool = False
) -> Coded | None:
    """The matrix of this shape, as it was coded (of a table the transpose); None where the constants are not those of such a one."""
    shape = shape[:2]
    groups, N = storage.groups(shape[0]), shape[1]
    fitted = np.zeros((1 << storage.bits, storage.together))
    zeros = np.zeros((groups, N)) if storage.zero_points else None
    blank = Coded(
        storage,
        np.zeros(shape, np.int16),
        np.ones((groups, N)),
        zeros,
        fitted if storage.together > 1 else None,
    )
    wanted = {n: (p.dtype, p.array.shape) for n, p in parts_of(blank, by_row=by_row).items()}
    if wanted != {n: (t.dtype, dims(t)) for n, t in parts.items()}:
        return None
    arrays = {n: t.numpy() for n, t in parts.items()}
    if storage.together > 1:
        numbers = {n: arrays[n].astype(np.float64) for n in ("levels", "scale")}
        return replace(
            blank, codes=arrays[""].astype(np.int16), levels=numbers["levels"], scales=numbers["scale"].T
        )
    factor = float(arrays["factor"]) if "factor" in arrays else 1.0
    scales = _by_group(arrays["scale"], groups, by_row).astype(np.float64) * factor
    return Coded(
        storage, _codes(arrays, storage, shape, by_row), scales, _zeros(arrays, storage, groups, by_row),
        np.array(storage.levels) if storage.levels else None, factor,
    )  # fmt: skip


def _codes(arrays: Mapping[str, Array], storage: Storage, shape: tuple[int, ...], by_row: bool) -> Array:
    held = arrays[""]
    if storage.bits == 8 and storage.levels:
        return np.searchsorted(np.array(storage.levels), held.astype(np.float64)).astype(np.int16)
    if storage.bits == 8 or (storage.bits == 4 and not by_row):
        return (held.T if by_row else held).astype(np.int16)
    if by_row:
        low = _unpacked(held.T[:, None], storage.bits, shape[0])
    elif storage.bits == 3:
        low = _unpacked(held, 2, shape[0]) | _unpacked(arrays["high"], 1, shape[0]) << 2
    else:
        low = _unpacked(held, storage.bits, shape[0])
    codes: Array = low.astype(np.int16) + (0 if storage.levels else storage.low)
    return codes


def _unpacked(packs: Array, bits: int, K: int) -> Array:
    """Bytes (P, 1, N) back to codes (K, N); the inverse of `encoding.packed`."""
    shifts = (np.arange(8 // bits, dtype=np.uint8) * bits)[None, :, None]
    codes: Array = (packs >> shifts) & ((1 << bits) - 1)
    return codes.reshape(-1, packs.shape[2])[:K]


def _by_group(array: Array, groups: int, by_row: bool) -> Array:
    """(groups, N)."""
    return array.T if by_row else array.reshape(groups, -1)


def _zeros(arrays: Mapping[str, Array], storage: Storage, groups: int, by_row: bool) -> Array | None:
    """Zero points beyond those that codes of the type have anyway; None where there are none."""
    if "zero" not in arrays:
        return None
    held = _by_group(arrays["zero"], groups, by_row).astype(np.float64)
    if storage.zero_points:
        return held
    beyond = held - stored_zero(storage)
    return beyond if beyond.any() else None
