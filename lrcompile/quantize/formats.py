"""Storage types as data: what ``--storage`` takes, how numbers are coded, and how many bits that is, all told.

A matrix (K, N) is cut along K into groups; of each group and column

    w ~ scale (level[code] - zero),     code of `bits` bits, one scale a group and column, and a zero point where the type has them

`levels` are the integers that the bits can count (signed without zero points, unsigned with them), those of a small float, or
given ones (NF4, ternary, signs). A k-means type has levels fitted to the matrix, 2^bits of them. Which target takes which type is said elsewhere (`legality`).
Sources: NF4: Dettmers et al., QLoRA, 2023; scales of 8 bits with one factor for all: NVFP4, Open Compute MX.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache

import ml_dtypes
import numpy as np

from lrcompile.interfaces import Array

# Quantiles of a normal distribution, with an exact zero: QLoRA, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Bits and mantissa of what a scale may be stored in. float8: of one float32 for the whole matrix.
SCALES = {"float32": 32, "float16": 16, "float8": 8}
SMALLEST = 1e-30  # a scale of nothing but zeros


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage type. group: numbers of a column that share a scale, 0 for the whole column. zero_points: stored in `bits` bits.

    levels: ascending; empty: integers. fitted: the levels are fitted to the matrix (k-means) and stored beside it in float32. together:
    how many matrices of one shape share the codes, each with its own levels. whole: one scale for the whole
    matrix. scale: the type of scales. positive: none of them is negative.
    """

    name: str
    bits: int
    group: int = 0
    zero_points: bool = False
    levels: tuple[float, ...] = ()
    fitted: bool = False
    together: int = 1
    whole: bool = False
    scale: str = "float32"
    positive: bool = False

    @property
    def integers(self) -> bool:
        """Whether codes are integers that a scale multiplies, and not places in a table."""
        return not self.levels and not self.fitted

    @property
    def signed(self) -> bool:
        """Whether scales may be negative: few signed integers reach one level further below zero, and either end may need it."""
        return self.integers and not self.zero_points and not self.positive and self.bits < 8

    @property
    def low(self) -> int:
        """The least integer."""
        return 0 if self.zero_points else -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1 if self.zero_points else (1 << (self.bits - 1)) - 1

    @property
    def reach(self) -> float:
        """What the scale of a group multiplies to get its largest number."""
        if self.levels:
            return max(abs(self.levels[0]), abs(self.levels[-1]))
        return float(self.high - self.low) if self.zero_points else float(self.high)

    def groups(self, K: int) -> int:
        return math.ceil(K / self.group) if self.group and not self.whole else 1

    def size(self, K: int, N: int) -> int:
        """Bits that a matrix (K, N) takes: codes, scales, zero points and levels."""
        scales = 1 if self.whole else self.groups(K) * N
        total = K * N * self.bits + scales * SCALES[self.scale]
        if self.scale == "float8":
            total += 32
        if self.zero_points:
            total += scales * self.bits
        if self.fitted:
            total += 32 * (1 << self.bits) * self.together
        return total

    def bits_per_number(self, K: int, N: int) -> float:
        return self.size(K, N) / (K * N)


def _float_levels(dtype: np.dtype[np.generic]) -> tuple[float, ...]:
    """All finite values of a small float, ascending, one zero."""
    width = ml_dtypes.finfo(dtype).bits
    values = np.arange(1 << width, dtype=np.uint8).view(dtype).astype(np.float64)
    return tuple(float(v) for v in np.unique(values[np.isfinite(values)]))


def factor_of(scales: Array, kind: str) -> float:
    """What scales are stored in units of: 1, or for float8 a float32 in which the largest takes all but the last of its binades."""
    if kind != "float8":
        return 1.0
    return float(np.float32(max(float(np.max(np.abs(scales), initial=0.0)) / 256.0, SMALLEST)))


def round_scales(scales: Array, kind: str, factor: float = 1.0) -> Array:
    """Scales as they will be stored, in float64. What is too large becomes the largest; none that is not zero becomes zero."""
    if kind == "float32":
        return scales.astype(np.float32).astype(np.float64)
    if kind == "float8":
        codes: Array = float8_codes(scales, factor).astype(np.float64)
        return codes * factor
    info = np.finfo(np.float16)
    sign = np.where(scales < 0, -1.0, 1.0)
    kept: Array = (sign * np.clip(np.abs(scales), info.tiny, info.max)).astype(np.float16).astype(np.float64)
    return kept


def float8_codes(scales: Array, factor: float) -> Array:
    """scales / factor in float8 (e4m3)."""
    least, largest = 2.0**-9, 448.0
    ratio = scales / factor
    sign = np.where(ratio < 0, -1.0, 1.0)
    codes: Array = (sign * np.clip(np.abs(ratio), least, largest)).astype(ml_dtypes.float8_e4m3fn)
    return codes


# Two matrices with one code: no type that a weight by itself could take.
_TOGETHER = {s.name: s for s in (Storage(f"pairs{n}", n, fitted=True, together=2) for n in (4, 8))}


@cache
def _known() -> dict[str, Storage]:
    table = [
        Storage("int8", 8),
        Storage("int4", 4, 32, scale="float8"),
        Storage("uint4", 4, 32, zero_points=True, scale="float8"),
        Storage("int3", 3, 32, scale="float8"),
        Storage("uint3", 3, 32, zero_points=True, scale="float8"),
        Storage("int2", 2, 32, scale="float8"),
        Storage("uint2", 2, 32, zero_points=True, scale="float8"),
        Storage("float8", 8, levels=_float_levels(np.dtype(ml_dtypes.float8_e4m3fn))),
        Storage("nf4", 4, 64, levels=NF4, scale="float8"),
        Storage("ternary", 2, levels=(-1.0, 0.0, 1.0)),
        Storage("sign", 1, levels=(-1.0, 1.0)),
        Storage("quarters", 2, levels=(-3.0, -1.0, 1.0, 3.0)),  # +-c1 +-c2 with c1 = 2 c2: two signs
        Storage("kmeans4", 4, fitted=True, whole=True),
        Storage("kmeans2", 2, fitted=True, whole=True),
        Storage("tensor4", 4, whole=True),
        Storage("tensor2", 2, whole=True),
    ]
    return {s.name: s for s in table}


def storage(name: str) -> Storage:
    """The type that a name means. Raises KeyError.

    ``int4``, ``int4-64`` (groups of 64), ``int4-16s8`` (scales of 8 bits), ``int4-32s32+`` (no negative scales).
    """
    found = re.fullmatch(r"([a-z]+\d*)(?:-(\d+))?(?:s(8|16|32))?(\+?)", name)
    if found is None:
        raise KeyError(name)
    made = _TOGETHER.get(found[1]) or _known()[found[1]]
    if found[4] and not made.signed:
        raise KeyError(name)
    if found[2] is not None:
        made = replace(made, group=int(found[2]))
    if found[3] is not None:
        made = replace(made, scale=f"float{found[3]}")
    return replace(made, name=name, positive=bool(found[4]))


def names() -> tuple[str, ...]:
    """The names without a group of their own, of types that a matrix by itself may take."""
    return tuple(_known())
