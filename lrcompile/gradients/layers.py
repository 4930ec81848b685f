"""Convolutions, pools and norms, see operators.py. Images are (batch, channels, *spatial), one to three spatial axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from lrcompile.gradients.call import Call, Tensor


def _windows(o: Call, x: Tensor, kernel: list[int]) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Strides, dilations and what is to be padded (before, after) on each spatial axis, `auto_pad` worked out."""
    rank = len(kernel)
    strides, dilations = o.get("strides", [1] * rank), o.get("dilations", [1] * rank)
    auto, pads = o.get("auto_pad", "NOTSET"), o.get("pads", [0] * 2 * rank)
    around = [(pads[i], pads[i + rank]) for i in range(rank)]
    if auto == "VALID":
        around = [(0, 0)] * rank
    elif auto != "NOTSET":
        for i, (n, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            less = total // 2
            around[i] = (less, total - less) if auto == "SAME_UPPER" else (total - less, less)
    return strides, dilations, around


def _padded(x: Tensor, around: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Negative amounts cut."""
    flat = [n for pair in reversed(around) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _per_channel(c: Tensor, x: Tensor) -> Tensor:
    return c.reshape(-1, *(1,) * (x.dim() - 2))


def _conv(o: Call, x: Tensor, w: Tensor, b: Tensor = None) -> Tensor:
    strides, dilations, around = _windows(o, x, list(w.shape[2:]))
    pads = [before for before, _ in around]
    if any(before != after for before, after in around):
        x, pads = _padded(x, around), [0] * len(pads)
    none = [0] * len(pads)
    return torch.convolution(x, w, b, strides, pads, dilations, False, none, o.get("group", 1))


def _conv_transpose(o: Call, x: Tensor, w: Tensor, b: Tensor = None) -> Tensor:
    """The whole of it, cut or padded to what is asked for; the bias last, so that what is padded has it too."""
    kernel = list(w.shape[2:])
    rank = len(kernel)
    strides, dilations = o.get("strides", [1] * rank), o.get("dilations", [1] * rank)
    auto, pads, extra = (
        o.get("auto_pad", "NOTSET"),
        o.get("pads", [0] * 2 * rank),
        o.get("output_padding", [0] * rank),
    )
    y = torch.convolution(x, w, None, strides, [0] * rank, dilations, True, [0] * rank, o.get("group", 1))
    shape = o.get("output_shape")
    if shape is None and auto.startswith("SAME"):
        shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    around = [(-pads[i], extra[i] - pads[i + rank]) for i in range(rank)]
    if auto == "VALID":
        around = [(0, e) for e in extra]
    if shape is not None:
        for i, wanted in enumerate(shape[-rank:]):
            total = y.shape[2 + i] + extra[i] - wanted
            before = total // 2 if auto == "SAME_UPPER" else total - total // 2
            around[i] = (-before, extra[i] - (total - before))
    y = _padded(y, around)
    return y if b is None else y + _per_channel(b, y)


def _pool_frame(o: Call, x: Tensor) -> tuple[list[int], list[int], list[int], Any, Any]:
    """Kernel, strides, dilations, the explicit pads, and the further ones (maybe negative) with which the windows fit exactly.

    Windows: floor or ceil((n + pads - extent) / stride) + 1; with ceil, one that would start behind the image and its
    first padding is left out.
    """
    kernel = o.get("kernel_shape")
    strides, dilations, around = _windows(o, x, kernel)
    further = []
    for n, k, s, d, (before, after) in zip(x.shape[2:], kernel, strides, dilations, around, strict=True):
        room, extent = n + before + after, (k - 1) * d + 1
        count = (-(-(room - extent) // s) if o.get("ceil_mode", 0) else (room - extent) // s) + 1
        if o.get("ceil_mode", 0) and (count - 1) * s >= n + before:
            count -= 1
        further.append((0, (count - 1) * s + extent - room))
    return kernel, strides, dilations, around, further


def _max_pool(o: Call, x: Tensor) -> Tensor:
    if o.outputs > 1:
        raise NotImplementedError("it gives indices")
    kernel, strides, dilations, around, further = _pool_frame(o, x)
    x = _padded(_padded(x, around, -math.inf), further, -math.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(x, kernel, strides, 0, dilations)


def _average_pool(o: Call, x: Tensor) -> Tensor:
    """Sums over windows by what the windows hold of the image, and of its explicit padding where that counts too."""
    kernel, strides, dilations, around, further = _pool_frame(o, x)
    ones, none = torch.ones([1, 1, *kernel], dtype=x.dtype), [0] * len(kernel)

    def total(t: Tensor) -> Tensor:
        return torch.convolution(t, ones, None, strides, none, dilations, False, none, 1)

    inside = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    held = total(_padded(_padded(inside, around, float(bool(o.get("count_include_pad", 0)))), further))
    flat = x.reshape(x.shape[0] * x.shape[1], 1, *x.shape[2:])
    y = total(_padded(_padded(flat, around), further)) / held
    return y.reshape(*x.shape[:2], *y.shape[2:])


def _batch_norm(o: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if o.get("training_mode", 0) or not o.get("spatial", 1) or (o.opset < 14 and o.outputs > 1):
        raise NotImplementedError("it is in training mode")
    factor = scale * torch.rsqrt(variance + o.get("epsilon", 1e-5))
    return x * _per_channel(factor, x) + _per_channel(bias - mean * factor, x)


def _instance_norm(o: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, o.get("epsilon", 1e-5))


def _group_norm(o: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Before opset 21 scale and bias have an entry a group."""
    groups, channels = o.get("num_groups"), x.shape[1]
    if o.opset < 21:
        scale, bias = (t.repeat_interleave(channels // groups) for t in (scale, bias))
    return torch.group_norm(x, groups, scale, bias, o.get("epsilon", 1e-5))


def _layer_norm(o: Call, x: Tensor, scale: Tensor, bias: Tensor = None) -> Tensor | tuple[Tensor, ...]:
    shape, epsilon = x.shape[o.get("axis", -1) :], o.get("epsilon", 1e-5)
    y = torch.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)
    if o.outputs == 1:
        return y
    axes = list(range(x.dim() - len(shape), x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


def _rms_norm(o: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(o.get("axis", -1) % x.dim(), x.dim()))
    return x * torch.rsqrt((x * x).mean(axes, keepdim=True) + o.get("epsilon", 1e-5)) * scale


def _standardize(o: Call, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, o.get("axes", [0, 2, 3]), correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


def _local_response(o: Call, x: Tensor) -> Tensor:
    """x / (bias + alpha / size * sum of squares of the channels around)^beta"""
    size = o.get("size")
    before, after = (size - 1) // 2, size // 2
    squares = F.pad((x * x).flatten(2).transpose(1, 2), (before, after))
    total = squares.unfold(-1, size, 1).sum(-1).transpose(1, 2).reshape(x.shape)
    return x / (o.get("bias", 1.0) + o.get("alpha", 1e-4) / size * total) ** o.get("beta", 0.75)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


TABLE: dict[str, Callable[..., Any]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": lambda o, x: x.mean(_spatial(x), keepdim=True),
    "GlobalMaxPool": lambda o, x: x.amax(_spatial(x), keepdim=True),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response,
    "LayerNormalization": _layer_norm,
    "MaxPool": _max_pool,
    "MeanVarianceNormalization": _standardize,
    "RMSNormalization": _rms_norm,
}
