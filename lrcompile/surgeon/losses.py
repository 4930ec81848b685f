"""What graphsurgeon does not carry: taken out before it reads a model, put back on what survived.

Metadata of model, nodes and values; initializers that are inputs too; types that are no tensors; attributes of some kinds,
and empty lists; outer constants that bodies read, which it writes into every body.
"""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir

from lrcompile.graph import bodies
from lrcompile.load.tensors import every_graph

# Attributes that graphsurgeon leaves out when it reads a model.
_NOT_CARRIED = {"TENSORS", "GRAPHS", "TYPE_PROTO", "TYPE_PROTOS", "SPARSE_TENSOR", "SPARSE_TENSORS"}


def strip(proto: onnx.ModelProto) -> None:
    """Take out what graphsurgeon would fail on, now or when it writes: `restore` puts it back."""
    for body, _ in every_graph(proto):
        if isinstance(body, onnx.GraphProto):
            for info in (*body.input, *body.output, *body.value_info):
                if not info.type.HasField("tensor_type"):
                    info.ClearField("type")
        for node in body.node:
            kept = [attribute for attribute in node.attribute if _is_carried(attribute)]
            if len(kept) < len(node.attribute):
                kept = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in kept]
                del node.attribute[:]
                node.attribute.extend(kept)


def _is_carried(attribute: onnx.AttributeProto) -> bool:
    """Whether graphsurgeon takes an attribute in and gives it out again: empty lists are lost on the way."""
    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
    empty = kind in ("INTS", "FLOATS", "STRINGS") and not (
        attribute.ints or attribute.floats or attribute.strings
    )
    return kind not in _NOT_CARRIED and (not empty or bool(attribute.ref_attr_name))


def lift(proto: onnx.ModelProto, outer: set[str]) -> None:
    """graphsurgeon writes a constant into every graph that reads it. What several read belongs to the main graph, and so
    does what stood there before (outer).
    """
    graphs = [body for body, place in every_graph(proto) if place and isinstance(body, onnx.GraphProto)]
    times = Counter(
        tensor.SerializeToString() for body in (proto.graph, *graphs) for tensor in body.initializer
    )
    known = {tensor.SerializeToString() for tensor in proto.graph.initializer}
    for body in graphs:
        stay = []
        for tensor in body.initializer:
            key = tensor.SerializeToString()
            if times[key] == 1 and tensor.name not in outer:
                stay.append(key)
            elif key not in known:
                known.add(key)
                proto.graph.initializer.add().ParseFromString(key)
        del body.initializer[:]
        for key in stay:
            body.initializer.add().ParseFromString(key)


def restore(model: ir.Model, original: ir.Model) -> None:
    """What graphsurgeon dropped, put back on the model, on the nodes and values that survived, and on the interface."""
    model.metadata_props.update(original.metadata_props)
    model.graph.metadata_props.update(original.graph.metadata_props)
    model.doc_string, model.domain, model.model_version = (
        original.doc_string,
        original.domain,
        original.model_version,
    )
    model.producer_name = model.producer_name or original.producer_name  # Graph.copy loses it
    model.producer_version = model.producer_version or original.producer_version
    for key, function in original.functions.items():
        model.functions.setdefault(key, function.clone())
    values, nodes = _by_name(original)
    here, survivors = _by_name(model)
    for output, node in survivors.items():
        before = nodes.get(output)
        if before is not None and before.op_identifier()[:2] == node.op_identifier()[:2]:
            node.metadata_props.update(before.metadata_props)
            node.doc_string, node.overload = node.doc_string or before.doc_string, before.overload
            for attribute in before.attributes.values():
                lost = attribute.type.name in _NOT_CARRIED or attribute.value == ()
                if (
                    lost
                    and attribute.name not in node.attributes
                    and attribute.type != ir.AttributeType.GRAPHS
                ):
                    node.attributes.add(attribute)
    for name, value in here.items():
        if (old := values.get(name)) is not None:
            value.metadata_props.update(old.metadata_props)
            value.meta.update(old.meta)  # where onnx-ir keeps quantization annotations
            value.doc_string = value.doc_string or old.doc_string
            if value.type is None or _same_kind(value.const_value, old.const_value):
                value.type, value.shape = old.type, old.shape
    _restore_inputs(model, original)


def _same_kind(tensor: ir.TensorProtocol | None, old: ir.TensorProtocol | None) -> bool:
    """Whether both are there and alike, so that what the interface says of one (symbolic dimensions) holds for the other."""
    return tensor is not None and old is not None and (tensor.dtype, tensor.shape) == (old.dtype, old.shape)


def _restore_inputs(model: ir.Model, original: ir.Model) -> None:
    """Initializers that are inputs too: graphsurgeon knows them as constants only, and drops those that nobody reads."""
    constants, inputs = model.graph.initializers, model.graph.inputs
    for index, old in enumerate(original.graph.inputs):
        if old.is_initializer() and old.name is not None:
            if old.name not in constants and not old.uses():
                again = ir.Value(name=old.name, type=old.type, shape=old.shape, const_value=old.const_value)
                model.graph.register_initializer(again)
            if (value := constants.get(old.name)) is not None:
                inputs.insert(min(index, len(inputs)), value)
    if (model.ir_version or 0) < 4:  # there every initializer is an input
        inputs.extend(value for value in list(constants.values()) if not value.is_graph_input())


def _by_name(model: ir.Model) -> tuple[dict[str, ir.Value], dict[str, ir.Node]]:
    """Values by name, and nodes by their first output's name, which is unique where their own may be missing."""
    values: dict[str, ir.Value] = {}
    nodes: dict[str, ir.Node] = {}
    for body in bodies(model):
        if body.function is None:
            values |= {v.name: v for v in (*body.graph.inputs, *body.graph.initializers.values()) if v.name}
            for node in body.graph:
                named = {v.name: v for v in node.outputs if v.name}
                values |= named
                nodes |= dict.fromkeys(list(named)[:1], node)
    return values, nodes
