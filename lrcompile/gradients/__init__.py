"""Reverse-mode derivatives of a model's outputs with respect to what chosen nodes give, by torch's autograd.

The main graph is run node by node with torch tensors. For a watched site with data x and output y, and a cotangent v of the
outputs z, the result is x as the node reads it and

    g = sum_outputs (dz / dy)^T v

the *total* derivative: through everything that follows, other sites included. To first order a change E of the weight of y = x W
moves sum v^T z by <x^T g, E>, so sums of g g^T, x^T g or |g|^2 x x^T say what an error of this weight does to the outputs.

Refused, by a sentence and never by an exception: torch is not there, an operator is not covered (control flow, quantized and
contributed operators, recurrent ones, Resize), a form of one is not, memory ends, a derivative is not finite.

operators.py  the table, elementwise operators, reductions      movement.py  operators that move data
layers.py     convolutions, pools, norms                        call.py      what an operator knows of its node
probes.py     random cotangents
The first three import torch; only functions import them, so that who has no torch can import the package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile.gradients.probes import default_cotangents
from lrcompile.graph import opset_of
from lrcompile.interfaces import Array
from lrcompile.records import Refusal

__all__ = ["Consume", "Cotangents", "Differentiable", "default_cotangents", "refusal"]

# The outputs' values, and for each backward pass the cotangents of some of them.
Cotangents = Callable[[Mapping[str, Array]], Sequence[Mapping[str, Array]]]
# Number of the backward pass, and (x, g) of every watched site in order. Arrays may share memory: do not write to them.
Consume = Callable[[int, Sequence[tuple[Array, Array]]], None]

_OLDEST = 7  # before it, broadcasting followed other rules


def refusal(model: ir.Model, values: Collection[str] | None = None) -> Refusal | None:
    """Why derivatives cannot be had: torch is missing, or the first operator that is not covered; None when they can.

    values: names of the values that must be computed; by default the graph's outputs. Other nodes are not looked at.
    """
    try:
        from lrcompile.gradients.operators import TABLE
    except ImportError:
        return Refusal('derivatives need torch, which is not installed: pip install "lrcompile[torch]"')
    if opset_of(model) < _OLDEST:
        return Refusal(f"derivatives need opset {_OLDEST} or later, and the model has {opset_of(model)}")
    wanted = [v.name or "" for v in model.graph.outputs] if values is None else values
    known = _values(model)
    for node in _needed(model, [known[name] for name in wanted]):
        if node.domain not in ("", "ai.onnx") or node.op_type not in TABLE:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            return Refusal(f"derivatives of {name} (node {_label(node)}) are not covered")
    return None


class Differentiable:
    """A model with watched sites. model: local functions inlined. watched: for each site the names of its x and y.

    Weights stay where they are: float32 ones are used in place, mapped or not; 16-bit ones are widened while `pull` runs.
    All is computed in float32, what the model has in float64 in float64.
    """

    def __init__(self, model: ir.Model, watched: Sequence[tuple[str, str]]) -> None:
        self._model, self._watched = model, tuple(watched)

    def pull(
        self, feed: Mapping[str, Array], outputs: Sequence[str], cotangents: Cotangents, consume: Consume
    ) -> Refusal | None:
        """One forward pass on this feed, then a backward pass for each set of cotangents.

        outputs: the names of those that matter; what only others need is not computed. cotangents: is given their values
        (16-bit floats widened) and returns sets of v, each of its output's shape; outputs that a set leaves out count as zero.
        consume: is given, for each set in turn, x and g of every watched site as the node has them, x (.., K) and g (.., N) for
        a MatMul from the right; floats are float32. g is zero where no output depends on the site.
        Its calls for earlier sets have happened when a later one is refused.
        """
        values = {*outputs, *(name for pair in self._watched for name in pair)}
        if (reason := refusal(self._model, values)) is not None:
            return reason
        import torch

        with torch.enable_grad():
            found = self._forward(feed, values)
            if isinstance(found, Refusal):
                return found
            sets = cotangents({name: _array(found[name], keep=True) for name in outputs})
            xs = [_array(found[x]) for x, _ in self._watched]
            ys = {y: found[y] for _, y in self._watched if found[y].requires_grad}
            ends = {name: found[name] for name in outputs if found[name].requires_grad}
            shapes = {y: tuple(found[y].shape) for _, y in self._watched}
            del found
            for number, given in enumerate(sets):
                try:
                    pulled = _backward(ends, ys, given, retain=number + 1 < len(sets))
                except Exception as error:  # memory above all
                    return Refusal(f"the derivatives could not be computed: {_first_line(error)}")
                gs = [
                    _array(pulled[y]) if y in pulled else np.zeros(shapes[y], np.float32)
                    for _, y in self._watched
                ]
                del pulled
                bad = next((y for (_, y), g in zip(self._watched, gs, strict=True) if not _finite(g)), None)
                if bad is not None:
                    return Refusal(f"the derivative with respect to {bad!r} is not finite")
                consume(number, list(zip(xs, gs, strict=True)))
                del gs  # before the next are made
        return None

    def _forward(self, feed: Mapping[str, Array], names: Collection[str]) -> dict[str, Any] | Refusal:
        """The named values as tensors; every watched y is a place that autograd can be asked for."""
        from lrcompile.gradients.operators import TABLE, Call, to_torch

        known, opset = _values(self._model), opset_of(self._model)
        wanted = {known[name] for name in names}
        watched = {known[y] for _, y in self._watched}
        nodes = _needed(self._model, wanted)
        uses = Counter(v for node in nodes for v in node.inputs if v is not None)
        uses.update(wanted)
        held: dict[ir.Value, Any] = {}

        def read(value: ir.Value) -> Any:
            """Inputs and weights when they are first asked for."""
            if value not in held and (value.name or "") in feed:
                held[value] = to_torch(feed[value.name or ""])
            elif value not in held and value.const_value is not None:
                held[value] = to_torch(value.const_value.numpy())
            if value not in held:
                raise ValueError(f"{value.name!r} has no value")
            return held[value]

        for node in nodes:
            try:
                given = [None if v is None else read(v) for v in node.inputs]
                made = TABLE[node.op_type](Call(node, opset), *given)
            except Exception as error:  # a form that is not covered, as the table or torch says it
                return Refusal(
                    f"{node.op_type} node {_label(node)} could not be computed: {_first_line(error)}"
                )
            for value, tensor in zip(
                node.outputs, made if isinstance(made, tuple) else (made,), strict=False
            ):
                if value in watched and tensor.is_floating_point():
                    # A view of its own: its derivative is that of what reads this value, whatever shares its memory.
                    tensor = (
                        tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
                    )
                if uses[value]:
                    held[value] = tensor
            if (missing := next((v for v in node.outputs if uses[v] and v not in held), None)) is not None:
                return Refusal(
                    f"output {missing.name!r} of {node.op_type} node {_label(node)} is not covered"
                )
            del given, made
            for value in filter(None, node.inputs):  # autograd keeps what it needs
                uses[value] -= 1
                if not uses[value]:
                    held.pop(value, None)
        try:
            return {v.name or "": read(v) for v in wanted}
        except Exception as error:
            return Refusal(_first_line(error))


def _backward(
    ends: Mapping[str, Any], ys: Mapping[str, Any], given: Mapping[str, Array], retain: bool
) -> dict[str, Any]:
    """The derivative of sum v^T z with respect to each y that matters for it."""
    import torch

    from lrcompile.gradients.operators import to_torch

    used = [name for name in given if name in ends]
    if not used or not ys:
        return {}
    vs = [to_torch(given[name]).to(ends[name].dtype) for name in used]
    found = torch.autograd.grad(
        [ends[n] for n in used], list(ys.values()), vs, retain_graph=retain, allow_unused=True
    )
    return {name: g for name, g in zip(ys, found, strict=True) if g is not None}


def _array(tensor: Any, keep: bool = False) -> Array:
    """As NumPy's; floats as float32 unless they are to be kept as they are."""
    tensor = tensor.detach()
    if not keep and tensor.is_floating_point():
        tensor = tensor.float()
    array: Array = tensor.numpy()
    return array


def _finite(array: Array) -> bool:
    """Whether a sum is finite, which it is not with one NaN or infinity in it; no array of booleans is made."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum(dtype=np.float64)))


def _values(model: ir.Model) -> dict[str, ir.Value]:
    """The main graph's values by name, which are unique."""
    known = {v.name or "": v for v in model.graph.inputs} | dict(model.graph.initializers)
    return known | {v.name or "": v for node in model.graph for v in node.outputs}


def _needed(model: ir.Model, values: Collection[ir.Value]) -> list[ir.Node]:
    """The nodes of the main graph that these values are computed with, in order."""
    pending = [v.producer() for v in values]
    reached = set[ir.Node]()
    while pending:
        node = pending.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        pending += [v.producer() for v in node.inputs if v is not None]
    return [node for node in model.graph if node in reached]


def _label(node: ir.Node) -> str:
    return repr(node.name or next((v.name for v in node.outputs if v.name), ""))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
