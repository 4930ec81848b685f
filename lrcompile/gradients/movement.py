"""Operators that move data or make shapes and ids, see operators.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F  # noqa: N812

from lrcompile.gradients.call import Call, Tensor, axes_of


def _shape(o: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[o.get("start", 0) : o.get("end", x.dim())], dtype=torch.int64)


def _reshape(o: Call, x: Tensor, wanted: Tensor = None) -> Tensor:
    shape = axes_of(o, wanted, "shape")
    if not o.get("allowzero", 0):
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    if -1 in shape and not x.numel():  # torch calls that ambiguous
        at = shape.index(-1)
        rest = math.prod(n for n in shape if n != -1)
        shape[at] = x.numel() // rest if rest else 0
    return x.reshape(shape)


def _transpose(o: Call, x: Tensor) -> Tensor:
    return x.permute(o.get("perm", list(range(x.dim()))[::-1]))


def _squeeze(o: Call, x: Tensor, given: Tensor = None) -> Tensor:
    axes = axes_of(o, given) or [i for i, n in enumerate(x.shape) if n == 1]
    return x.squeeze([a % x.dim() for a in axes]) if axes else x


def _unsqueeze(o: Call, x: Tensor, given: Tensor = None) -> Tensor:
    axes = axes_of(o, given)
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


def _flatten(o: Call, x: Tensor) -> Tensor:
    axis = o.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _expand(o: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


def _slice(
    o: Call, x: Tensor, starts: Tensor = None, ends: Tensor = None, axes: Tensor = None, steps: Tensor = None
) -> Tensor:
    """Python's slices: ONNX clamps as they do."""
    begin, end = axes_of(o, starts, "starts"), axes_of(o, ends, "ends")
    along = axes_of(o, axes) or list(range(len(begin)))
    step = axes_of(o, steps, "steps") or [1] * len(begin)
    for a, b, axis, s in zip(begin, end, along, step, strict=True):
        taken = range(*slice(a, b, s).indices(x.shape[axis]))
        if s == 1 or not taken:
            x = x.narrow(axis, min(taken.start, x.shape[axis]), len(taken))
        else:
            x = x.index_select(axis, torch.tensor(taken))
    return x


def _split(o: Call, x: Tensor, sizes: Tensor = None) -> tuple[Tensor, ...]:
    axis = o.get("axis", 0)
    lengths = axes_of(o, sizes, "split")
    if not lengths:
        count, n = o.get("num_outputs", o.outputs), x.shape[axis]
        each = -(-n // count)
        lengths = [max(0, min(each, n - i * each)) for i in range(count)]
    return tuple(torch.split(x, lengths, axis))


def _wrapped(ids: Tensor, size: int) -> Tensor:
    """Ids counted from the end, counted from the start."""
    ids = ids.to(torch.int64)
    return torch.where(ids < 0, ids + size, ids)


def _gather(o: Call, x: Tensor, ids: Tensor) -> Tensor:
    axis = o.get("axis", 0) % x.dim()
    taken = x.index_select(axis, _wrapped(ids, x.shape[axis]).reshape(-1))
    return taken.reshape(x.shape[:axis] + ids.shape + x.shape[axis + 1 :])


def _gather_elements(o: Call, x: Tensor, ids: Tensor) -> Tensor:
    axis = o.get("axis", 0)
    return torch.gather(x, axis, _wrapped(ids, x.shape[axis]))


def _gather_nd(o: Call, x: Tensor, ids: Tensor) -> Tensor:
    """x[ids[.., 0], ids[.., 1], ..]; each of the first `batch_dims` axes with itself."""
    batch = o.get("batch_dims", 0)
    rank = ids.dim() - 1
    own = [torch.arange(x.shape[i]).reshape([-1 if d == i else 1 for d in range(rank)]) for i in range(batch)]
    given = [_wrapped(part, x.shape[batch + i]) for i, part in enumerate(ids.unbind(-1))]
    return x[(*own, *given)]


def _scatter_nd(o: Call, x: Tensor, ids: Tensor, updates: Tensor) -> Tensor:
    reduction = o.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise NotImplementedError(f"its reduction is {reduction!r}")
    places = tuple(_wrapped(part, x.shape[i]) for i, part in enumerate(ids.unbind(-1)))
    return x.index_put(places, updates, accumulate=reduction == "add")


_SCATTERED = {"mul": "prod", "max": "amax", "min": "amin", "add": "sum"}


def _scatter_elements(o: Call, x: Tensor, ids: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = o.get("axis", 0), o.get("reduction", "none")
    places = _wrapped(ids, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, _SCATTERED[reduction], include_self=True)


def _pad(o: Call, x: Tensor, pads: Tensor = None, value: Tensor = None, given: Tensor = None) -> Tensor:
    amounts, mode = axes_of(o, pads, "pads"), o.get("mode", "constant")
    axes = [a % x.dim() for a in axes_of(o, given)] or list(range(x.dim()))
    around = {a: (amounts[i], amounts[i + len(axes)]) for i, a in enumerate(axes)}
    if mode == "constant":
        fill = o.get("value", 0.0) if value is None else value.item()
        flat = [n for axis in reversed(range(x.dim())) for n in around.get(axis, (0, 0))]
        return F.pad(x, flat, value=fill)
    for axis, (before, after) in around.items():
        n = x.shape[axis]
        at = torch.arange(-before, n + after)
        if mode == "edge":
            at = at.clamp(0, n - 1)
        elif mode == "wrap":
            at = at % n
        elif mode == "reflect":
            period = max(2 * (n - 1), 1)
            at = torch.minimum(at % period, period - at % period) if n > 1 else at * 0
        else:
            raise NotImplementedError(f"its mode is {mode!r}")
        x = x.index_select(axis, at) if (before or after) else x
    return x


def _range(o: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _one_hot(o: Call, ids: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    n, axis = int(depth), o.get("axis", -1)
    axis += ids.dim() + 1 if axis < 0 else 0
    classes = torch.arange(n).reshape([-1 if d == axis else 1 for d in range(ids.dim() + 1)])
    return torch.where(_wrapped(ids, n).unsqueeze(axis) == classes, values[1], values[0])


def _eye_like(o: Call, x: Tensor) -> Tensor:
    kind = o.get("dtype")
    dtype = x.dtype if kind is None else getattr(torch, ir.DataType(kind).name.lower())
    n, m = x.shape
    return (torch.arange(m) - torch.arange(n)[:, None] == o.get("k", 0)).to(dtype)


def _compress(o: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = o.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, condition.nonzero().reshape(-1))


def _trilu(o: Call, x: Tensor, k: Tensor = None) -> Tensor:
    return (torch.triu if o.get("upper", 1) else torch.tril)(x, 0 if k is None else int(k))


def _depth_to_space(o: Call, x: Tensor) -> Tensor:
    b, (n, c, h, w) = o.get("blocksize"), x.shape
    if o.get("mode", "DCR") == "DCR":
        return (
            x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
        )
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(o: Call, x: Tensor) -> Tensor:
    b, (n, c, h, w) = o.get("blocksize"), x.shape
    return (
        x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)
    )


TABLE: dict[str, Callable[..., Any]] = {
    "Compress": _compress,
    "Concat": lambda o, *xs: torch.cat(xs, o.get("axis")),
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "EyeLike": _eye_like,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": lambda o, x: torch.nonzero(x).T,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": lambda o, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda o, x, repeats: x.repeat(repeats.tolist()),
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
