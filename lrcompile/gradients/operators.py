"""ONNX operators in torch: a function for each, in a table by name. Imports torch: only functions may import this file.

A function is given its `Call` and the inputs as tensors, None where one is left out, and returns a tensor or a tuple of them.
It never writes to an input. What it does not cover, it raises as NotImplementedError with a sentence; the
one who runs the graph makes a refusal of that, as of what torch itself says.
Where torch's own names differ from ONNX's only in spelling, the table says so in a line.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812

from lrcompile.gradients import layers, movement
from lrcompile.gradients.call import Call, Tensor, axes_of
from lrcompile.graph import tensor_of
from lrcompile.interfaces import Array

__all__ = ["TABLE", "Call", "to_torch"]

Function = Callable[..., Any]

# 16-bit floats are computed in float32; of unsigned integers torch can do little.
_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float32,
    ir.DataType.BFLOAT16: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.int32,
    ir.DataType.UINT32: torch.int64,
    ir.DataType.UINT64: torch.int64,
}


def to_torch(array: Array) -> Tensor:
    """A tensor on the array's own memory wherever torch has its type; else 16-bit floats widened, small integers in 8 bits."""
    array = np.asarray(array)
    name = array.dtype.name
    if name in ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"):
        pass
    elif name.startswith(("uint16", "uint32", "uint64")):
        array = array.astype(np.int32 if name == "uint16" else np.int64)
    elif name.startswith(("int", "uint")):  # of 2 and 4 bits
        array = array.astype(np.int8)
    elif "float" in name:
        array = array.astype(np.float32)
    else:
        raise NotImplementedError(f"there are no tensors of {name}")
    if any(stride < 0 for stride in array.strides) or array.dtype.byteorder == ">":
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # mapped weights may not be written to, and nobody does
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)


def _type(number: Any) -> torch.dtype:
    kind = ir.DataType(number)
    if kind not in _TYPES:
        raise NotImplementedError(f"values of {kind.name} are not covered")
    return _TYPES[kind]


def _cast(o: Call, x: Tensor) -> Tensor:
    return x.to(_type(o.get("to")))


def _div(o: Call, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _pow(o: Call, a: Tensor, b: Tensor) -> Tensor:
    """The result has the type of the base. A lone exponent as a number: squares are products, and nothing more is kept."""
    if b.numel() == 1 and b.dim() <= a.dim():
        return torch.pow(a, b.item()).to(a.dtype)
    return torch.pow(a, b).to(a.dtype)


def _mod(o: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if o.get("fmod", 0) else torch.remainder(a, b)


def _clip(o: Call, x: Tensor, low: Tensor = None, high: Tensor = None) -> Tensor:
    low, high = o.get("min", low), o.get("max", high)  # attributes before opset 11
    x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))


def _is_inf(o: Call, x: Tensor) -> Tensor:
    up, down = o.get("detect_positive", 1), o.get("detect_negative", 1)
    return (torch.isposinf(x) & bool(up)) | (torch.isneginf(x) & bool(down))


def _variadic(function: Function) -> Function:
    return lambda o, *xs: functools.reduce(function, xs)


def _shrink(o: Call, x: Tensor) -> Tensor:
    low, bias = o.get("lambd", 0.5), o.get("bias", 0.0)
    return torch.where(x < -low, x + bias, torch.where(x > low, x - bias, torch.zeros_like(x)))


def _softmax(function: Function) -> Function:
    """Before opset 13 over all axes from `axis` on. A row of nothing but -inf gives NaN, but no NaN to the derivatives of others:

    exporters put a Where behind the softmax that drops such rows, and 0 * NaN would come back through it.
    """

    def run(o: Call, x: Tensor) -> Tensor:
        if o.opset < 13:
            axis = o.get("axis", 1) % max(x.dim(), 1)
            flat = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
            return function(flat, -1).reshape(x.shape)
        axis = o.get("axis", -1)
        if x.requires_grad and x.shape[axis] and x.numel():
            dead = torch.isneginf(x.detach().amax(axis, keepdim=True))
            if dead.any():
                return function(x.masked_fill(dead, 0.0), axis).masked_fill(dead, math.nan)
        return function(x, axis)

    return run


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


# --- reductions ---------------------------------------------------------------------------------------------------


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Function:
    """function(x, axes, keepdims) over axes that are an attribute or an input, all axes when none are given."""

    def run(o: Call, x: Tensor, given: Tensor = None) -> Tensor:
        axes = axes_of(o, given)
        if not axes:
            if o.get("noop_with_empty_axes", 0):
                return function(x.unsqueeze(-1), [-1], False)
            axes = list(range(x.dim()))
        if not axes:  # a number
            return function(x.reshape(1), [0], False)
        return function(x, sorted(a % x.dim() for a in axes), bool(o.get("keepdims", 1)))

    return run


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _norm(order: int) -> Callable[[Tensor, list[int], bool], Tensor]:
    """torch's has the derivative 0 at 0."""
    return lambda x, axes, keep: torch.linalg.vector_norm(x, order, axes, keep)


def _arg(function: Function) -> Function:
    def run(o: Call, x: Tensor) -> Tensor:
        axis, keep = o.get("axis", 0), bool(o.get("keepdims", 1))
        if not o.get("select_last_index", 0):
            return function(x, axis, keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keep)

    return run


def _top_k(o: Call, x: Tensor, count: Tensor = None) -> tuple[Tensor, Tensor]:
    """A stable sort: of equals ONNX wants the first, which topk does not promise."""
    axis, k = o.get("axis", -1), int(count) if count is not None else o.get("k")
    values, places = torch.sort(x, dim=axis, descending=bool(o.get("largest", 1)), stable=True)
    return values.narrow(axis, 0, k), places.narrow(axis, 0, k)


def _cumulative(o: Call, x: Tensor, axis: Tensor) -> Tensor:
    at = int(axis)
    x = x.flip(at) if o.get("reverse", 0) else x
    y = torch.cumsum(x, at, dtype=x.dtype)
    y = y - x if o.get("exclusive", 0) else y
    return y.flip(at) if o.get("reverse", 0) else y


# --- products -----------------------------------------------------------------------------------------------------


def _gemm(o: Call, a: Tensor, b: Tensor, c: Tensor = None) -> Tensor:
    y = (a.T if o.get("transA", 0) else a) @ (b.T if o.get("transB", 0) else b)
    alpha, beta = o.get("alpha", 1.0), o.get("beta", 1.0)
    y = y if alpha == 1 else y * alpha
    return y if c is None else y + (c if beta == 1 else c * beta)


def _dequantize(o: Call, x: Tensor, scale: Tensor, zero: Tensor = None) -> Tensor:
    """Of constants: what is quantized on the way has no derivative, and its QuantizeLinear is refused."""
    axis, block = o.get("axis", 1), o.get("block_size", 0)

    def fit(t: Tensor) -> Tensor:
        if block:
            return t.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
        return t if t.numel() == 1 else t.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])

    y = x.to(scale.dtype)
    return (y if zero is None else y - fit(zero.to(scale.dtype))) * fit(scale)


def _constant(o: Call) -> Tensor:
    if (tensor := tensor_of(o.node.outputs[0])) is None:
        raise NotImplementedError("it holds no numbers")
    return to_torch(tensor.numpy())


def _plain(function: Function) -> Function:
    return lambda o, *xs: function(*xs)


def _dropout(o: Call, x: Tensor, ratio: Tensor = None, training: Tensor = None) -> tuple[Tensor, Tensor]:
    if training is not None and bool(training):
        raise NotImplementedError("it is in training mode")
    return x, torch.ones_like(x, dtype=torch.bool)


# torch has them under the same meaning
_SAME: dict[str, Function] = {
    **{n: getattr(torch, n.lower()) for n in "Sqrt Reciprocal Neg Abs Exp Log Erf Tanh Sigmoid Relu".split()},
    **{
        n: getattr(torch, n.lower()) for n in "Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh".split()
    },
    **{n: getattr(torch, n.lower()) for n in "Floor Ceil Round Sign IsNaN Where".split()},
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "MatMul": torch.matmul,
    "Equal": torch.eq,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Not": torch.logical_not,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "BitwiseNot": torch.bitwise_not,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros((), dtype=x.dtype)),
    "Softsign": F.softsign,
    "Mish": F.mish,
    "HardSwish": lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1),
    "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x),
    "CastLike": lambda x, like: x.to(like.dtype),
    "Identity": lambda x: x,
}

_OWN: dict[str, Function] = {
    "Cast": _cast,
    "Clip": _clip,
    "CumSum": _cumulative,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Dropout": _dropout,
    "Gemm": _gemm,
    "IsInf": _is_inf,
    "Mod": _mod,
    "Pow": _pow,
    "Shrink": _shrink,
    "TopK": _top_k,
    "Constant": _constant,
    "Einsum": lambda o, *xs: torch.einsum(o.get("equation").replace(" ", ""), *xs),
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Sum": _variadic(torch.add),
    "Mean": lambda o, *xs: functools.reduce(torch.add, xs) / len(xs),
    "LeakyRelu": lambda o, x: F.leaky_relu(x, o.get("alpha", 0.01)),
    "ThresholdedRelu": lambda o, x: F.threshold(x, o.get("alpha", 1.0), 0.0),
    "Elu": lambda o, x: F.elu(x, o.get("alpha", 1.0)),
    "Celu": lambda o, x: F.celu(x, o.get("alpha", 1.0)),
    "Selu": lambda o, x: (
        o.get("gamma", 1.05070102214813232421875) * F.elu(x, o.get("alpha", 1.67326319217681884765625))
    ),
    "Gelu": lambda o, x: F.gelu(x, approximate=o.get("approximate", "none")),
    "Swish": lambda o, x: x * torch.sigmoid(o.get("alpha", 1.0) * x),
    "HardSigmoid": lambda o, x: torch.clamp(o.get("alpha", 0.2) * x + o.get("beta", 0.5), 0, 1),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Hardmax": _softmax(_hardmax),
    "ReduceSum": _reduce(_sum),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceL1": _reduce(_norm(1)),
    "ReduceL2": _reduce(_norm(2)),
    "ReduceSumSquare": _reduce(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "ReduceLogSum": _reduce(lambda x, axes, keep: torch.log(_sum(x, axes, keep))),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "LpNormalization": lambda o, x: (
        x / torch.linalg.vector_norm(x, o.get("p", 2), o.get("axis", -1), keepdim=True)
    ),
    "ConstantOfShape": lambda o, shape: torch.full(
        shape.tolist(), **_filling(o.get("value")), requires_grad=False
    ),
}


def _filling(tensor: ir.TensorProtocol | None) -> dict[str, Any]:
    value = torch.zeros(1) if tensor is None else to_torch(tensor.numpy())
    return {"fill_value": value.item(), "dtype": value.dtype}


TABLE: dict[str, Function] = {
    **{name: _plain(function) for name, function in _SAME.items()},
    **_OWN,
    **movement.TABLE,
    **layers.TABLE,
}
