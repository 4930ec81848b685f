"""The element type of every value of a model, and what an operator's schema says of its inputs and outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from lrcompile.graph import bodies, nodes

logger = logging.getLogger(__name__)

# Operators outside the standard whose float inputs and outputs are all of one type: ONNX Runtime's fused ones.
FUSED = frozenset(
    "Attention BiasGelu BiasSoftmax BiasSplitGelu DecoderMaskedMultiHeadAttention EmbedLayerNormalization FastGelu "
    "FusedConv FusedGemm FusedMatMul GatherBlockQuantized Gelu GroupNorm GroupQueryAttention MatMulNBits MultiHeadAttention NhwcConv "
    "PackedAttention PackedMultiHeadAttention QuickGelu RelativePositionBias RotaryEmbedding SimplifiedLayerNormalization "
    "SkipLayerNormalization SkipSimplifiedLayerNormalization".split()
)
_FUSED_DOMAINS = ("", "com.microsoft")  # ONNX Runtime keeps some of them in the standard's own domain
_CACHE = "lrcompile.schema"


@dataclass(frozen=True, slots=True)
class Formal:
    """An input or output in an operator's schema. variable: what its type is called, or the fixed type; types: those it may have."""

    variable: str
    types: frozenset[str]


def formals(node: ir.Node, opset: int) -> tuple[tuple[Formal, ...], tuple[Formal, ...]] | None:
    """One formal for each actual input and output, variadic ones repeated; None when there is no schema."""
    if _CACHE not in node.meta:
        node.meta[_CACHE] = _formals(node, opset)
    found: tuple[tuple[Formal, ...], tuple[Formal, ...]] | None = node.meta[_CACHE]
    return found


def _formals(node: ir.Node, opset: int) -> tuple[tuple[Formal, ...], tuple[Formal, ...]] | None:
    if node.domain in _FUSED_DOMAINS and node.op_type in FUSED and not _standard(node, opset):
        one = Formal("T", frozenset({"tensor(float)", "tensor(float16)", "tensor(bfloat16)"}))
        return (one,) * len(node.inputs), (one,) * len(node.outputs)
    if not _standard(node, opset):
        return None
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}

    def of(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], count: int) -> tuple[Formal, ...]:
        made = []
        for i in range(count):
            p = parameters[min(i, len(parameters) - 1)]
            made.append(Formal(p.type_str, allowed.get(p.type_str, frozenset({p.type_str}))))
        return tuple(made)

    return of(schema.inputs, len(node.inputs)), of(schema.outputs, len(node.outputs))


def _standard(node: ir.Node, opset: int) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


def types_of(model: ir.Model, opset: int) -> dict[ir.Value, ir.DataType]:
    """Element type of every tensor value that has one. The model is not changed.

    From onnx's inference; behind an operator that it does not know, from the file, and else from the schema: an output has the type
    of the first input with the same type variable.
    """
    copy = model.clone()
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(copy)
    except Exception as error:  # a help: types are then taken from schemas
        logger.warning("type inference failed: %s", error)
    types: dict[ir.Value, ir.DataType] = {}

    def learn(pairs: Sequence[tuple[ir.Value, ir.Value]]) -> None:
        for ours, theirs in pairs:
            tensor = theirs.type if theirs.type is not None else ours.type
            if isinstance(tensor, ir.TensorType) and tensor.dtype != ir.DataType.UNDEFINED:
                types[ours] = tensor.dtype

    for ours, theirs in zip(bodies(model), bodies(copy), strict=True):
        learn(list(zip(ours.graph.inputs, theirs.graph.inputs, strict=True)))
        for value in ours.graph.initializers.values():
            if value.const_value is not None:
                types[value] = value.const_value.dtype
        for a, b in zip(ours.graph, theirs.graph, strict=True):
            learn(list(zip(a.outputs, b.outputs, strict=True)))
    for _, node in nodes(model):  # in order: what one node lacks, the next may need
        if any(v not in types and v.type is None for v in node.outputs):
            types.update(_by_schema(node, types, opset))
    return types


def _by_schema(
    node: ir.Node, types: Mapping[ir.Value, ir.DataType], opset: int
) -> dict[ir.Value, ir.DataType]:
    schema = formals(node, opset)
    if schema is None:
        return {}
    bound: dict[str, ir.DataType] = {}
    for value, formal in zip(node.inputs, schema[0], strict=True):
        if value is not None and value in types:
            bound.setdefault(formal.variable, types[value])
    return {
        value: bound[formal.variable]
        for value, formal in zip(node.outputs, schema[1], strict=True)
        if value not in types and formal.variable in bound
    }
