"""How a weight is stored, hidden and valued, and what else happens to it. To add one: write a function, add it to its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from .builder import BF16, F16, F32, F64, NUMPY, Array, Builder, Tensor, Weight

Shape = tuple[int, ...]
Stored = tuple[str, str, Shape]  # the value its reader sees, the stored constant, the stored shape
Inner = Callable[[Shape, int], Stored]  # makes what lies below: (shape, dtype) -> Stored


@dataclass(frozen=True, slots=True)
class Hiding:
    """A way to hide a weight. build(b, shape, dtype, inner); last: stores integers itself, so nothing lies below it."""

    build: Callable[[Builder, Shape, int, Inner], Stored]
    opset: int = 7
    ir: int = 3
    last: bool = False


def _transpose(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    axes = list(range(len(shape)))
    perm = axes[::-1] if b.choices.chance(70) else axes[1:] + axes[:1]
    value, stored, stored_shape = inner(tuple(shape[perm.index(i)] for i in axes), dtype)
    if perm == axes[::-1] and b.choices.chance(30):
        b.tag("transpose_default_perm")
        return b.emit("Transpose", [value]), stored, stored_shape
    return b.emit("Transpose", [value], perm=perm), stored, stored_shape


def _reshape(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    flat = int(np.prod(shape))
    below = b.choices.pick([(flat,), (1, *shape), (*shape, 1), shape[::-1], shape])
    value, stored, stored_shape = inner(below, dtype)
    target = list(shape)
    if b.choices.chance(40) and flat:
        target[b.choices.integer(0, len(target) - 1)] = -1
    return b.emit("Reshape", [value, b.constant(np.array(target, np.int64), "shape")]), stored, stored_shape


def _identity(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    value, stored, stored_shape = inner(shape, dtype)
    return b.emit("Identity", [value]), stored, stored_shape


def _cast(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    below = [d for d in (F16, F64, F32, BF16) if d != dtype and (d != BF16 or b.opset >= 13)]
    source = b.choices.pick(below)
    value, stored, stored_shape = inner(shape, source)
    return b.emit("Cast", [value], to=dtype), stored, stored_shape


def _squeeze(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    at = b.choices.integer(0, len(shape))
    value, stored, stored_shape = inner((*shape[:at], 1, *shape[at:]), dtype)
    return b.axes("Squeeze", value, [at]), stored, stored_shape


def _unsqueeze(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    """An axis of length 1 is added on the way; where there is none, one is added and squeezed again."""
    if 1 in shape and len(shape) > 1:
        at = shape.index(1)
        value, stored, stored_shape = inner(shape[:at] + shape[at + 1 :], dtype)
        return b.axes("Unsqueeze", value, [at]), stored, stored_shape
    value, stored, stored_shape = inner(shape, dtype)
    return b.axes("Squeeze", b.axes("Unsqueeze", value, [0]), [0]), stored, stored_shape


def _integers(b: Builder, shape: Shape, low: int, high: int, dtype: type) -> Stored:
    node = b.setting.storage == "constant_node"
    stored = b.constant(b.rng.integers(low, high, shape).astype(dtype), "weight", node)
    return stored, stored, shape


def _cast_scale(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    value, stored, stored_shape = _integers(b, shape, -127, 128, np.int8)
    scale_shape = b.choices.pick([(), (1,), (shape[-1],), (*shape[:-1], 1)])
    scale = np.full(scale_shape, 0.01) * (1 + b.rng.random(scale_shape))
    compute = F32 if dtype == BF16 != b.dtype else dtype  # ONNX Runtime has no Mul in bfloat16
    operands = [b.emit("Cast", [value], to=compute), b.constant(np.asarray(scale, NUMPY[compute]), "scale")]
    y = b.emit("Mul", operands[:: b.choices.pick([1, -1])])
    return b.cast(y, compute, dtype), stored, stored_shape


def _dequantize(b: Builder, shape: Shape, dtype: int, per_axis: bool) -> Stored:
    signed = b.choices.pick([True, False])
    low, high, kind = (-127, 128, np.int8) if signed else (0, 256, np.uint8)
    value, stored, stored_shape = _integers(b, shape, low, high, kind)
    axis = b.choices.integer(0, len(shape) - 1)
    scale_shape: Shape = (shape[axis],) if per_axis else ()
    small = dtype == F16 or dtype == b.dtype == BF16
    scale_type = dtype if small and b.opset >= 19 and b.choices.chance(50) else F32
    scale = np.asarray(0.01 * (1 + b.rng.random(scale_shape)), NUMPY[scale_type])
    inputs = [value, b.constant(scale, "scale")]
    if not signed or b.choices.chance(50):
        zero = b.rng.integers(-3, 4, scale_shape) if signed else b.rng.integers(120, 136, scale_shape)
        inputs.append(b.constant(np.asarray(zero, kind), "zero_point"))
    attributes = {"axis": axis - len(shape) * b.choices.pick([0, 1])} if per_axis else {}
    return b.cast(b.emit("DequantizeLinear", inputs, **attributes), scale_type, dtype), stored, stored_shape


def _dequant(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    return _dequantize(b, shape, dtype, per_axis=False)


def _dequant_axis(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    return _dequantize(b, shape, dtype, per_axis=True)


def _dequant_blocked(b: Builder, shape: Shape, dtype: int, inner: Inner) -> Stored:
    """int4 or uint4, one scale for a block along axis 0 (the last block may be short)."""
    block = b.choices.integer(1, max(1, shape[0] // 2 if len(shape) == 1 else shape[0]))
    kind, low, high = b.choices.pick([(TensorProto.INT4, -8, 8), (TensorProto.UINT4, 0, 16)])
    blocks = (-(-shape[0] // block), *shape[1:])
    values = b.rng.integers(low, high, shape)
    tensor = helper.make_tensor("", kind, shape, values.flatten())
    stored = b.constant(tensor, "weight", b.setting.storage == "constant_node")
    scale = (0.05 * (1 + b.rng.random(blocks))).astype(np.float32)
    inputs = [stored, b.constant(scale, "scale")]
    if kind == TensorProto.UINT4 or b.choices.chance(50):
        zero = np.full(blocks, 8 if kind == TensorProto.UINT4 else -1)
        inputs.append(b.constant(helper.make_tensor("", kind, blocks, zero.flatten()), "zero_point"))
    value = b.emit("DequantizeLinear", inputs, axis=0, block_size=block)
    return b.cast(value, F32, dtype), stored, shape


HIDINGS: dict[str, Hiding] = {
    "behind_transpose": Hiding(_transpose),
    "behind_reshape": Hiding(_reshape),
    "behind_identity": Hiding(_identity),
    "behind_cast": Hiding(_cast),
    "behind_squeeze": Hiding(_squeeze),
    "behind_unsqueeze": Hiding(_unsqueeze),
    "behind_cast_scale": Hiding(_cast_scale, last=True),
    "behind_dequantize": Hiding(_dequant, opset=10, last=True),
    "behind_dequantize_axis": Hiding(_dequant_axis, opset=13, last=True),
    "behind_dequantize_blocked": Hiding(_dequant_blocked, opset=21, ir=10, last=True),
}


def _rank_deficient(b: Builder, shape: Shape) -> Array:
    rows = b.rng.standard_normal((*shape[:-1], 1)) if len(shape) > 1 else np.ones(shape)
    return rows * b.rng.standard_normal(shape[-1:]) * 0.3


def _outlier(b: Builder, shape: Shape) -> Array:
    values = b.normal(shape, F64)
    values.flat[b.rng.integers(values.size)] = 100.0 if b.dtype == F16 else 1e4
    return values


def _planted(value: float) -> Callable[[Builder, Shape], Array]:
    def values(b: Builder, shape: Shape) -> Array:
        array = b.normal(shape, F64)
        array.flat[b.rng.integers(array.size)] = value
        return array

    return values


VALUES: dict[str, Callable[[Builder, Shape], Array]] = {
    "normal": lambda b, shape: b.normal(shape, F64),
    "all_zero": lambda b, shape: np.zeros(shape),
    "all_equal": lambda b, shape: np.full(shape, 0.25),
    "rank_deficient": _rank_deficient,
    "outlier": _outlier,
    "tiny": lambda b, shape: b.normal(shape, F64) * 1e-30,
    "negative_zero": lambda b, shape: np.where(b.rng.random(shape) < 0.5, -0.0, b.normal(shape, F64)),
    "nan": _planted(np.nan),
    "inf": _planted(np.inf),
}
BAD_VALUES = ("nan", "inf")

# What else happens to the stored constant: nothing; a caller may override it; it is a graph output; another op reads it too.
FATES = {"alone": "", "overridable": "overridable", "weight_is_output": "output", "read_elsewhere": ""}


def weight(b: Builder, shape: Shape, *, plain: bool = False) -> Weight:
    """A constant of this shape and the model's type in the current scope. plain: finite, untouched, not hidden."""
    steps = [] if plain else _steps(b)
    if b.wanted and steps and HIDINGS[steps[-1]].last:
        steps = steps[:-1]
    values, fate = "normal", "alone"
    if not plain and not (steps and HIDINGS[steps[-1]].last):
        values = _choose(b, "values", list(VALUES), 25)
        if b.scope is b.main:
            fates = [f for f in FATES if f != "overridable" or b.ir >= 4]
            fate = _choose(b, "fate", fates, 15)
    node = b.setting.storage == "constant_node" or (b.setting.storage == "mixed" and b.choices.chance(50))
    node = node and fate != "overridable"
    if fate != "alone":  # onnxruntime cannot hand out what may be bfloat16 as an array
        steps = [s for s in steps if s != "behind_cast"]
    dtypes: dict[str, int] = {}

    def make(shape: Shape, dtype: int, left: list[str]) -> Stored:
        if left:
            return HIDINGS[left[0]].build(b, shape, dtype, lambda s, d: make(s, d, left[1:]))
        name = b.constant(np.asarray(VALUES[values](b, shape), NUMPY[dtype]), "weight", node)
        dtypes[name] = dtype
        return name, name, shape

    value, stored, stored_shape = make(shape, b.dtype, steps)
    reason = "finite" if values in BAD_VALUES else FATES[fate]
    b.tag(*steps, *(["chain"] if len(steps) > 1 else []), *(["constant_node"] if node else []))
    b.tag(*([values] if values != "normal" else []), *([fate] if fate != "alone" else []))
    if fate == "overridable":
        b.defaults.append(stored)
    elif fate == "weight_is_output":
        b.output(Tensor(stored, stored_shape), dtypes[stored])
    elif fate == "read_elsewhere":
        b.output(Tensor(b.emit("Identity", [b.emit("Abs", [stored])]), stored_shape), dtypes[stored])
    return Weight(value, shape, stored, stored_shape, reason)


def _steps(b: Builder) -> list[str]:
    """None (mostly), one or up to three hidings; one that stores integers can only be the deepest."""
    legal = [n for n, h in HIDINGS.items() if b.opset >= h.opset and b.ir >= h.ir]
    if b.reference and b.opset < 19:  # onnx.reference knows DequantizeLinear from opset 19 on
        legal = [n for n in legal if "dequantize" not in n]
    soft = [n for n in legal if not HIDINGS[n].last]
    wanted = b.wanted.pop("hidden", None)
    if wanted == "chain":
        steps = [b.choices.pick(soft), b.choices.pick(legal)]
    elif wanted:
        steps = [wanted]
    elif b.choices.chance(40):
        steps = [b.choices.pick(legal)]
    else:
        return []
    while len(steps) < 3 and b.choices.chance(35):
        steps.insert(0, b.choices.pick(soft))
    return steps


def _choose(b: Builder, key: str, options: list[str], percent: int) -> str:
    """What must come, else the first option, else (percent) any."""
    if wanted := b.wanted.pop(key, None):
        return wanted
    return b.choices.pick(options) if b.choices.chance(percent) else options[0]
