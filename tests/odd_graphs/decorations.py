"""What else may be in a model. To add one: a function, and a line in BEFORE (it writes nodes) or AFTER (it edits the proto)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from .builder import F32, Builder, Tensor
from .weights import weight


def unused_initializer(b: Builder) -> None:
    b.constant(b.normal((3, 5)), "unused")


def unused_node(b: Builder) -> None:
    b.emit("Relu", [b.input((2, 3)).name])


def unused_matmul(b: Builder) -> None:
    x, w = b.input((2, 5)), weight(b, (5, 3), plain=True)
    b.use("MatMul", [x.name, w.value], w, reason="unused", certain=False)


def pass_through(b: Builder) -> None:
    """An output that is an input."""
    b.output(b.input((2, 3)))


def initializer_output(b: Builder) -> None:
    """An initializer that nobody but the caller reads."""
    b.output(Tensor(b.constant(b.normal((2, 3)), "given"), (2, 3)))


def unused_input(b: Builder) -> None:
    b.input((2,), TensorProto.INT64, lambda rng, shape: rng.integers(0, 9, shape))


def empty_constant(b: Builder) -> None:
    """A constant with no elements, joined to something."""
    x = b.input((2, 3), free=False)
    b.output(
        Tensor(b.emit("Concat", [x.name, b.constant(np.zeros((0, 3), b.normal((1,)).dtype))], axis=0), (2, 3))
    )


BEFORE: dict[str, Callable[[Builder], None]] = {
    "unused_initializer": unused_initializer,
    "unused_node": unused_node,
    "unused_matmul": unused_matmul,
    "pass_through": pass_through,
    "initializer_output": initializer_output,
    "unused_input": unused_input,
    "empty_constant": empty_constant,
}


def unnamed_nodes(b: Builder, m: onnx.ModelProto) -> None:
    for node in m.graph.node:
        node.name = ""


def duplicate_node_names(b: Builder, m: onnx.ModelProto) -> None:
    for node in m.graph.node:
        node.name = "same"


def same_names_in_bodies(b: Builder, m: onnx.ModelProto) -> None:
    """Each body names its nodes anew, and all the same way."""
    graphs = [m.graph]
    while graphs:
        graph = graphs.pop()
        for n, node in enumerate(graph.node):
            node.name = f"node_{n}"
            graphs += [a.g for a in node.attribute if a.HasField("g")]


def node_named_as_tensor(b: Builder, m: onnx.ModelProto) -> None:
    """Nodes and tensors have separate name spaces."""
    for node in m.graph.node:
        node.name = next(iter(node.output))


def metadata(b: Builder, m: onnx.ModelProto) -> None:
    helper.set_model_props(m, {"author": "Ünï <b>", "": "empty key"} if b.ir >= 10 else {"author": "Ünï <b>"})
    if b.ir >= 10:
        for holder in (m.graph, *m.graph.node):
            holder.metadata_props.append(onnx.StringStringEntryProto(key="pkg", value="odd"))


def doc_strings(b: Builder, m: onnx.ModelProto) -> None:
    m.doc_string, m.graph.doc_string = "a\nmodel", "a graph \U0001f600"
    m.producer_name, m.producer_version, m.domain, m.model_version = "odd", "0.0", "org.example", 2**40
    for holder in (*m.graph.node, *m.graph.initializer, *m.graph.input):
        holder.doc_string = "doc"


def quantization_annotation(b: Builder, m: onnx.ModelProto) -> None:
    scale, zero = (
        helper.make_tensor(b.name(k), t, [], [1]) for k, t in (("s", F32), ("z", TensorProto.UINT8))
    )
    if b.ir < 4:
        m.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, []) for t in (scale, zero))
    m.graph.initializer.extend([scale, zero])
    entry = m.graph.quantization_annotation.add(tensor_name=m.graph.output[0].name)
    for key, tensor in (("SCALE_TENSOR", scale), ("ZERO_POINT_TENSOR", zero)):
        entry.quant_parameter_tensor_names.append(onnx.StringStringEntryProto(key=key, value=tensor.name))


def many_domains(b: Builder, m: onnx.ModelProto) -> None:
    for domain, version in (("com.microsoft", 1), ("ai.onnx.ml", 2)):
        m.opset_import.append(helper.make_opsetid(domain, version))


def default_domain_spelled(b: Builder, m: onnx.ModelProto) -> None:
    """The default domain is imported by its other name (on a node the checker does not know that name)."""
    m.opset_import[0].domain = "ai.onnx"


def value_info(b: Builder, m: onnx.ModelProto) -> None:
    """Inferred shapes are written down: everything that an exporter would leave."""
    m.graph.value_info.extend(shape_inference.infer_shapes(m).graph.value_info)


def unknown_rank(b: Builder, m: onnx.ModelProto) -> None:
    for value in m.graph.input:
        if value.name in [i.name for i in b.inputs]:
            value.type.tensor_type.ClearField("shape")


def nameless_dimensions(b: Builder, m: onnx.ModelProto) -> None:
    for value in m.graph.input:
        if value.name in [i.name for i in b.inputs]:
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("value")


def one_symbol(b: Builder, m: onnx.ModelProto) -> None:
    """Sizes are symbols, and each is one that the other inputs may use with another value: "0"."""
    for n, value in enumerate(m.graph.input):
        if value.name in [i.name for i in b.inputs] and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = f"{n} + 1 * <b>"


def raw_to_typed_fields(b: Builder, m: onnx.ModelProto) -> None:
    """Values in float_data, not raw_data."""
    for tensor in m.graph.initializer:
        if tensor.data_type == F32 and tensor.HasField("raw_data"):
            values = onnx.numpy_helper.to_array(tensor).flatten()
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values.tolist())


# onnxruntime refuses it, onnx.reference takes it: alone, and only where asked for.
NOT_ON_ORT = {"duplicate_node_names"}

# onnx.reference does not know these.
NOT_ON_REFERENCE = {"default_domain_spelled", "empty_constant"}

AFTER: dict[str, Callable[[Builder, onnx.ModelProto], None]] = {
    "unnamed_nodes": unnamed_nodes,
    "duplicate_node_names": duplicate_node_names,
    "same_names_in_bodies": same_names_in_bodies,
    "node_named_as_tensor": node_named_as_tensor,
    "metadata": metadata,
    "doc_strings": doc_strings,
    "quantization_annotation": quantization_annotation,
    "many_domains": many_domains,
    "default_domain_spelled": default_domain_spelled,
    "value_info": value_info,
    "unknown_rank": unknown_rank,
    "nameless_dimensions": nameless_dimensions,
    "symbols_with_spaces": one_symbol,
    "typed_fields": raw_to_typed_fields,
}
