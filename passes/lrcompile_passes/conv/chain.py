"""A chain of Conv: its cost, its graph, and the one kernel that it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lrcompile.interfaces import Array, Call, Constant, Factors, Op, Weights
from lrcompile.records import Cost, Group, Kind, Refusal, Window
from lrcompile.weighing import bias_edits

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stage:
    """One Conv of a chain. name: of its factor, the kernel. axes: those of the window that it sees."""

    name: str
    axes: frozenset[int]
    depthwise: bool = False

    def window(self, whole: Window) -> Window:
        return whole.along(self.axes)


class Chain:
    """What the forms share: all but their mathematics."""

    kinds: tuple[Kind, ...] = ("conv",)
    needs_data = True
    only_by_name = False
    exact_at_full_rank = False

    def __init__(self, name: str) -> None:
        self.name = name

    def stages(self, window: Window, names: Sequence[str]) -> tuple[Stage, ...]:
        """The stages in order. names: of the factors, where the form has several orders."""
        raise AssertionError("a form has stages")

    def serves(self, group: Group) -> Refusal | None:
        site = group.sites[0]
        if site.window is None or not group.shares_weight:
            return Refusal(f"{self.name} factorizes the kernel of a Conv")
        if len({s.window for s in group.sites}) > 1:
            return Refusal("several Conv read the kernel, by different strides, padding or groups")
        return self.refuses(site.window, site.K // site.window.size)

    def refuses(self, window: Window, channels: int) -> Refusal | None:
        """Why this window is not for this form."""
        if window.group > 1 and channels == 1:
            return Refusal(f"the Conv is depthwise: each channel is seen alone, {self.name} has none to mix")
        return None

    def cost(self, group: Group, shapes: Shapes, weights: Weights) -> Cost:
        """flops: for one position of the output; a stage before a stride runs at more positions than that."""
        site = group.sites[0]
        assert site.window is not None
        parameters = flops = 0
        later = 1
        for stage in reversed(self.stages(site.window, list(shapes))):
            elements = math.prod(shapes[stage.name])
            parameters += elements
            flops += 2 * elements * later
            later *= math.prod(stage.window(site.window).strides)
        return Cost(parameters, parameters * weights.itemsize(site), flops * len(group.sites))

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        changed: dict[Constant, Array] = {}
        for site in group.sites:
            assert site.window is not None
            stages = self.stages(site.window, list(factors))
            kernel = composed([factors[s.name].astype(np.float64) for s in stages], stages, site.window.group)
            changed[site.name, "weight"] = kernel.reshape(site.N, site.K).T
        return {**changed, **self.edits(group, factors)}

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return bias_edits(group, factors)

    def emit(self, op: Op, call: Call) -> ir.Value:
        assert call.window is not None
        y = call.x
        stages = self.stages(call.window, list(call.shapes))
        for stage in stages:
            bias = [call.bias] if stage is stages[-1] and call.bias is not None else []
            groups = call.shapes[stage.name][0] if stage.depthwise else call.window.group
            seen = stage.window(call.window).attributes(groups)
            y = op("Conv", y, call.factors[stage.name], *bias, name=stage.name, **seen)
        return y


def composed(kernels: Sequence[Array], stages: Sequence[Stage], groups: int) -> Array:
    """The kernel (n, c, *window) that does what the chain does. Stages see different axes, so it is a product of theirs at each point."""
    whole: Array | None = None
    for kernel, stage in zip(kernels, stages, strict=True):
        rank = kernel.ndim - 2
        apart = np.moveaxis(
            kernel.reshape(groups, -1, *kernel.shape[1:]), (1, 2), (-2, -1)
        )  # (groups, *window, out, in)
        whole = apart if whole is None else apart * whole if stage.depthwise else apart @ whole
    assert whole is not None
    made = np.moveaxis(whole, (-2, -1), (1, 2))
    return made.reshape(-1, *made.shape[2 : 3 + rank])


def by_channels(group: Group, kernels: Array) -> Array:
    """(groups, K, r): kernels as columns, of the group's first site -> (groups * r, channels, *window), as ONNX has them."""
    window = group.sites[0].window
    assert window is not None
    columns = kernels.transpose(0, 2, 1)
    return columns.reshape(columns.shape[0] * columns.shape[1], -1, *window.kernel)


def points(mixing: Array, rank: int) -> Array:
    """(groups, in, out) -> (groups * out, in, 1, .., 1): 1x1 kernels."""
    rows = mixing.transpose(0, 2, 1)
    return rows.reshape(rows.shape[0] * rows.shape[1], rows.shape[2], *(1,) * rank)


def grid(full: int, wanted: tuple[int, ...] | None, steps: int | None = None) -> list[int]:
    """Ranks to look at: those that are wanted; else multiples of 8 (of 1, for small ones) up to full, at most about `steps` of them."""
    if wanted is not None:
        return [r for r in wanted if 1 <= r <= full]
    multiple = 8 if full >= 64 else 4 if full >= 32 else 1
    if steps is not None:
        multiple *= max(1, round(full / (steps * multiple)))
    return list(range(multiple, full + 1, multiple))
