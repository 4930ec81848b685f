"""A newer opset for a graph that stays as it is: allowed where no operator of it has changed its meaning in between."""

from __future__ import annotations

import numpy as np
import onnx.defs
import onnx_ir as ir

from lrcompile.graph import nodes, opset_of
from lrcompile.records import Refusal

# Their inputs or outputs mean something else now, under the same signature.
_CHANGED = frozenset({"GroupNormalization", "Resize", "Upsample", "Scan", "Loop", "Cast", "CastLike"})
_SAFE_FROM = {"Cast": 13, "CastLike": 15, "Loop": 13, "Resize": 19}  # after these only types were added
# Their axes were an attribute before this version, and are an input since.
_AXES_INPUT = 18
_REDUCTIONS = frozenset(
    f"Reduce{n}" for n in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)
_IR = {21: 10}  # the least IR version that knows the opset's types


def raisable(model: ir.Model, opset: int) -> Refusal | None:
    """None, or the operator for which the version counts."""
    before = opset_of(model)
    if before >= opset:
        return None
    for _, node in nodes(model):
        if node.domain in ("", "ai.onnx") and not _same(node.op_type, before, opset):
            return Refusal(
                f"it needs opset {opset}, the model has {before}, and {node.op_type} ({node.name}) does not mean the same in both: "
                "convert the model first (onnx.version_converter)"
            )
    return None


def raise_opset(model: ir.Model, opset: int) -> None:
    """In place; the caller has asked `raisable`."""
    before = opset_of(model)
    if before < opset:
        for _, node in list(nodes(model)) if before < _AXES_INPUT <= opset else ():
            if node.op_type in _REDUCTIONS and node.domain in ("", "ai.onnx"):
                _axes_as_input(node)
        model.opset_imports[""] = opset
        model.ir_version = max(model.ir_version or 0, _IR[opset])


def _axes_as_input(node: ir.Node) -> None:
    axes = node.attributes.pop("axes", None)
    if axes is None or node.graph is None:
        return
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(axes.as_ints(), np.int64))})
    constant.outputs[0].name = f"{node.outputs[0].name}_axes"
    node.graph.insert_before(node, constant)
    node.resize_inputs(2)
    node.replace_input_with(1, constant.outputs[0])


def _same(op_type: str, before: int, after: int) -> bool:
    """Whether every node of the old operator is one of the new, with the same defaults."""
    old, new = onnx.defs.get_schema(op_type, before, ""), onnx.defs.get_schema(op_type, after, "")
    if old.since_version == new.since_version or op_type in _REDUCTIONS:
        return True
    if op_type in _CHANGED and before < _SAFE_FROM.get(op_type, after):
        return False
    if new.deprecated:
        return False
    if len(old.inputs) > len(new.inputs) or len(old.outputs) > len(new.outputs):
        return False
    if any(a.name != b.name for a, b in zip(old.inputs, new.inputs, strict=False)):
        return False
    return all(
        name in new.attributes
        and new.attributes[name].default_value == attribute.default_value
        and new.attributes[name].type == attribute.type
        for name, attribute in old.attributes.items()
    ) and not any(a.required for name, a in new.attributes.items() if name not in old.attributes)
