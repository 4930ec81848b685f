"""Walking and building ONNX graphs: the one walker over bodies and tensors, and small helpers that plugins may use."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

DOMAIN = "lrcompile"

# The float types a weight can be computed in, and every type that the totals count as a parameter.
FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, slots=True)
class Body:
    """A graph of the model and where it stands: ``""`` for the main one, else a sentence."""

    graph: ir.Graph
    path: str
    function: ir.Function | None = None
    owner: ir.Node | None = None  # the If, Loop or Scan whose body this is


@dataclass(frozen=True, slots=True)
class TensorUse:
    """A tensor of the file. holder: the initializer's value or the node with the attribute. path: which body."""

    tensor: ir.TensorProtocol
    name: str
    where: str
    holder: ir.Value | ir.Node
    path: str


def bodies(model: ir.Model) -> Iterator[Body]:
    """Every graph of the model: the main one, the bodies of If, Loop and Scan at any depth, and local functions."""
    pending = [Body(model.graph, "")]
    pending += [Body(f.graph, f"function {f.domain}::{f.name}", f) for f in model.functions.values()]
    while pending:  # a stack, not recursion: nesting depth is the file's choice
        body = pending.pop(0)
        yield body
        for node in body.graph:
            for attribute in node.attributes.values():
                for graph in _graphs_of(attribute):
                    where = f"{attribute.name} of {node.name or node.op_type}"
                    path = f"{where} in {body.path}" if body.path else where
                    pending.append(Body(graph, path, body.function, node))


def nodes(model: ir.Model) -> Iterator[tuple[Body, ir.Node]]:
    """Every node with the body it stands in."""
    for body in bodies(model):
        for node in body.graph:
            yield body, node


def tensors(model: ir.Model) -> Iterator[TensorUse]:
    """Every tensor of the file: initializers and tensor attributes (Constant's above all) of every body."""
    for body in bodies(model):
        place = f" in {body.path}" if body.path else ""
        for name, value in body.graph.initializers.items():
            if value.const_value is not None:
                yield TensorUse(value.const_value, name, f"initializer {name!r}{place}", value, body.path)
        for node in body.graph:
            for attribute in node.attributes.values():
                for tensor in _tensors_of(attribute):
                    owner = node.name or (node.outputs[0].name if node.outputs else "") or node.op_type
                    where = f"attribute {attribute.name!r} of {node.op_type} node {owner!r}{place}"
                    yield TensorUse(tensor, tensor.name or owner, where, node, body.path)


def _graphs_of(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    if attribute.type == ir.AttributeType.GRAPHS:
        return tuple(attribute.as_graphs())
    return ()


def _tensors_of(attribute: ir.Attr) -> tuple[ir.TensorProtocol, ...]:
    if attribute.is_ref() or attribute.value is None:
        return ()
    if attribute.type == ir.AttributeType.TENSOR:
        return (attribute.as_tensor(),)
    if attribute.type == ir.AttributeType.TENSORS:
        return tuple(attribute.as_tensors())
    return ()


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value always holds: an initializer nobody may override, or a Constant node's; else None."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        if not value.is_initializer() or is_overridable(value):
            return None
        return value.const_value
    if node.op_type == "Constant" and node.domain == "":
        attribute = node.attributes.get("value")
        if attribute is not None:
            return None if attribute.is_ref() else attribute.as_tensor()
        return _spelled_out(node)
    return None


def _spelled_out(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant that holds numbers as value_int, value_ints, value_float or value_floats; the same one each time."""
    if "lrcompile.tensor" not in node.meta:
        kinds = {
            "value_int": np.int64,
            "value_ints": np.int64,
            "value_float": np.float32,
            "value_floats": np.float32,
        }
        given = next((a for n, a in node.attributes.items() if n in kinds and not a.is_ref()), None)
        node.meta["lrcompile.tensor"] = (
            None if given is None else ir.tensor(np.asarray(given.value, kinds[given.name]))
        )
    found: ir.TensorProtocol | None = node.meta["lrcompile.tensor"]
    return found


def is_overridable(value: ir.Value) -> bool:
    """Whether a caller may feed this initializer: it is a graph input as well, in IR 4 or later.

    Before IR 4 every initializer had to be listed as an input and meant a constant all the same;
    `mark_constants` records that on the values.
    """
    return (
        value.is_initializer() and value.is_graph_input() and not value.meta.get("lrcompile.constant", False)
    )


def mark_constants(model: ir.Model) -> None:
    """Record which initializers are constants although they are listed as inputs (IR 3 and earlier)."""
    if (model.ir_version or 0) < 4:
        for value in model.graph.initializers.values():
            value.meta["lrcompile.constant"] = True


def reached_from(model: ir.Model, starts: Iterable[ir.Node]) -> set[ir.Node]:
    """The nodes that compute with what these nodes compute, through bodies too, and these nodes themselves."""
    owners = {body.graph: body.owner for body in bodies(model)}
    pending, reached = list(starts), set[ir.Node]()
    while pending:
        node = pending.pop()
        if node in reached:
            continue
        reached.add(node)
        for value in node.outputs:
            pending.extend(value.consumers())
        for attribute in (
            node.attributes.values()
        ):  # what a Loop or Scan is given, and what it carries round, enters its body
            for graph in _graphs_of(attribute):
                pending.extend(n for v in graph.inputs for n in v.consumers())
        owner = owners.get(node.graph) if isinstance(node.graph, ir.Graph) else None
        if owner is not None:
            pending.append(owner)
    return reached


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """A tensor's shape in numbers."""
    return tuple(int(n) for n in tensor.shape.numpy())


def opset_of(model: ir.Model) -> int:
    """Version of the default domain."""
    return model.opset_imports.get("", 1)


def shapes_of(
    model: ir.Model, inputs: Mapping[str, tuple[int, ...]] | None = None
) -> dict[ir.Value, ir.Shape]:
    """Shape of every value for which onnx's shape inference finds one. The model is not changed.

    inputs: shapes to assume for graph inputs; with them most shapes become numbers.
    """
    copy = model.clone()
    for value in copy.graph.inputs:
        if inputs is not None and (known := inputs.get(value.name or "")) is not None:
            value.shape = ir.Shape(known)
    for _, node in list(nodes(copy)):
        _as_its_first_input(node)
    if inputs is not None:  # what the file says of inner values would be held against the numbers
        for _, node in nodes(copy):
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=inputs is not None)(copy)
    except Exception as error:  # inference is a help: what it cannot do only leaves shapes unknown
        logger.warning("shape inference failed, some sites may be left out: %s", error)
    shapes: dict[ir.Value, ir.Shape] = {}
    for ours, theirs in zip(bodies(model), bodies(copy), strict=True):
        pairs = [*zip(ours.graph.inputs, theirs.graph.inputs, strict=True)]
        for a, b in zip(ours.graph, theirs.graph, strict=True):
            pairs += zip(a.outputs, b.outputs, strict=False)  # an Identity has only the first
        shapes.update({a: b.shape for a, b in pairs if b.shape is not None})
    return shapes


# Operators of runtimes that onnx's inference does not know, whose first output has the shape of the first input.
_LIKE_FIRST = frozenset(
    "MultiHeadAttention GroupQueryAttention RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization "
    "LayerNormalization SimplifiedLayerNormalization Gelu FastGelu BiasGelu QuickGelu BiasAdd".split()
)


def _as_its_first_input(node: ir.Node) -> None:
    """Make an operator of ONNX Runtime's domain an Identity, where its shape is what inference wants to know; of packed inputs it is not."""
    packed = node.op_type in ("MultiHeadAttention", "GroupQueryAttention") and (
        len(node.inputs) < 3 or None in node.inputs[1:3]
    )
    if node.domain != "com.microsoft" or node.op_type not in _LIKE_FIRST or packed or node.graph is None:
        return
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return
    same = ir.Node("", "Identity", [node.inputs[0]], outputs=[ir.Value(name=node.outputs[0].name)])
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [same], [node.outputs[0]], [same.outputs[0]]
    )


def drop(model: ir.Model, value: ir.Value) -> None:
    """Remove what made a constant that nobody reads any more."""
    pending = [value]
    while pending:
        at = pending.pop()
        if at.uses() or at.is_graph_output():
            continue
        node = at.producer()
        if node is not None:
            if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            pending.extend(v for v in node.inputs if v is not None)
            node.graph.remove(node, safe=True)
        elif at.is_initializer() and at.graph is not None and at.name is not None:
            graph = at.graph
            if at.is_graph_input():
                if (model.ir_version or 0) >= 4:
                    continue
                graph.inputs.remove(at)
            del graph.initializers[at.name]


class Names:
    """Names that no value and no node of a model bears. Names are per model: shadowing across bodies is illegal."""

    def __init__(self, model: ir.Model) -> None:
        self._values: set[str] = set()
        self._nodes: set[str] = set()
        for body in bodies(model):
            self._values.update(v.name for v in body.graph.inputs if v.name)
            self._values.update(body.graph.initializers)
            for node in body.graph:
                self._nodes.add(node.name or "")
                self._values.update(v.name for v in node.outputs if v.name)

    def value(self, wish: str) -> str:
        return self._fresh(wish, self._values)

    def node(self, wish: str) -> str:
        return self._fresh(wish, self._nodes)

    @staticmethod
    def _fresh(wish: str, used: set[str]) -> str:
        name, i = wish, 1
        while name in used:
            i += 1
            name = f"{wish}_{i}"
        used.add(name)
        return name


class Builder:
    """Makes nodes into a list; see `interfaces.Op`. Names come out as ``prefix/name``."""

    def __init__(self, prefix: str, metadata: dict[str, str] | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._metadata = metadata or {}
        self._count = 0

    def __call__(self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any) -> ir.Value:
        self._count += 1
        label = f"{self._prefix}/{name or f'{op_type.lower()}_{self._count}'}"
        attrs = [_attr(k, v) for k, v in attributes.items()]
        output = ir.Value(name=f"{label}_out")  # a factor may bear the label itself
        self._add(ir.Node("", op_type, list(inputs), attrs, outputs=[output], name=label))
        return output

    def several(self, op_type: str, *inputs: ir.Value, outputs: int, name: str) -> tuple[ir.Value, ...]:
        """A node of so many outputs."""
        label = f"{self._prefix}/{name}"
        made = tuple(ir.Value(name=f"{label}_out_{i}") for i in range(outputs))
        self._add(ir.Node("", op_type, list(inputs), outputs=made, name=label))
        return made

    def _add(self, node: ir.Node) -> None:
        node.metadata_props.update(self._metadata)
        self.nodes.append(node)

    def constant(self, array: Array, name: str = "") -> ir.Value:
        return self(
            "Constant",
            name=name or f"constant_{self._count + 1}",
            value=ir.Tensor(np.asarray(array, order="C")),  # a scalar stays one
        )


def _attr(name: str, value: Any) -> ir.Attr:
    if isinstance(value, ir.Tensor):
        return ir.AttrTensor(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, (tuple, list)):
        return ir.AttrInt64s(name, list(value))
    return ir.AttrInt64(name, int(value))
