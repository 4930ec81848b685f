"""A copy of a model whose float32 graph computes in float16 or bfloat16, its interface as it was.

`islands` says which nodes stay in float32. Each value has one type, that of the node that makes it; who wants it in the other
reads a Cast, one for each value. A constant is stored in the type that its readers want; in both when it is small and they
disagree, else in 16 bits. Weights are rounded to nearest when they are written, one at a time. Graph inputs and outputs, those of
bodies, and what goes into and comes out of If, Loop and Scan stay float32. Float64 and integers are not touched.

Finite numbers beyond the range become the largest finite one, with a note (`notes_of`): the -3.4e38 of masks would become -inf.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from lrcompile.graph import Names, bodies, dims, is_overridable, nodes, opset_of, tensor_of
from lrcompile.islands import (
    FLOAT,
    SMALL,
    allowed,
    exceeds,
    finite_range,
    is_indifferent,
    is_movable,
    lowered_nodes,
)
from lrcompile.records import Precision
from lrcompile.value_types import types_of

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

HALVES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NOTES = "lrcompile.precision"
_NUMPY: Mapping[ir.DataType, Any] = {
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


def convert(model: ir.Model, precision: Precision) -> ir.Model:
    """A copy that computes in that type, local functions inlined; the model itself when nothing in it would change."""
    if (found := _analysed(model, precision)) is None:
        return model
    copy, uses = found
    before = [_interface(b.graph) for b in bodies(copy)]
    notes = _Converter(copy, uses).run()
    assert before == [_interface(b.graph) for b in bodies(copy)]
    copy.meta[_NOTES] = notes
    for note in notes:
        logger.info("%s", note)
    return copy


def widened(model: ir.Model, precision: Precision) -> ir.Model:
    """A copy that computes in float32 with the weights of `convert`: what judges it where a runtime has no kernel."""
    if (found := _analysed(model, precision)) is None:
        return model
    copy, uses = found
    for value in _constants(copy, uses.types):
        if uses.wants_half(value):
            _store(value, _rounded(_tensor(value), uses.half, widen=True))
    return copy


def refloated(model: ir.Model, precision: Precision) -> ir.Model:
    """A copy of what `convert` gave that computes in float32 with the same weights: `widened`, where only that file is left."""
    half, copy = HALVES[precision], model.clone()
    made = [v for b in bodies(copy) for v in b.graph.initializers.values()]
    for _, node in nodes(copy):
        made += node.outputs
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes.add(ir.AttrInt64("to", int(FLOAT)))
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == half:
                tensor = _rounded(attribute.as_tensor(), half, widen=True)
                node.attributes.add(ir.AttrTensor(attribute.name, tensor))
    for value in (v for v in made if v.dtype == half):
        if value.const_value is not None:
            value.const_value = _rounded(value.const_value, half, widen=True)
        value.type = ir.TensorType(FLOAT)
    return copy


def notes_of(model: ir.Model) -> tuple[str, ...]:
    """What `convert` has to say about the copy that it made."""
    found: tuple[str, ...] = model.meta.get(_NOTES, ())
    return found


def _interface(graph: ir.Graph) -> list[tuple[str | None, ir.DataType | None]]:
    """Before IR 4 the constants are listed as inputs too, and these may change."""
    given = [v for v in graph.inputs if not v.is_initializer() or is_overridable(v)]
    return [(v.name, v.dtype) for v in (*given, *graph.outputs)]


# --- which value is wanted in which type ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Uses:
    """The graph as it was: types of its values, the nodes that shall compute in `half`, and at which inputs and outputs."""

    half: ir.DataType
    opset: int
    types: Mapping[ir.Value, ir.DataType]
    low: frozenset[ir.Node]
    ports: dict[ir.Node, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)

    def of(self, node: ir.Node) -> tuple[frozenset[int], frozenset[int]]:
        """The inputs and outputs of a node that are of the 16-bit type."""
        if node not in self.low:
            return frozenset(), frozenset()
        if node not in self.ports:
            self.ports[node] = allowed(node, self.half, self.opset)
        return self.ports[node]

    def wants(self, node: ir.Node, index: int) -> ir.DataType | None:
        """The type in which a node reads its float32 input; None: any."""
        if is_indifferent(node, self.types):
            return None
        return self.half if index in self.of(node)[0] else FLOAT

    def wants_half(self, value: ir.Value) -> bool:
        return any(self.wants(node, index) == self.half for node, index in value.uses())

    def wants_float(self, value: ir.Value) -> bool:
        return value.is_graph_output() or any(self.wants(n, i) == FLOAT for n, i in value.uses())


def _analysed(model: ir.Model, precision: Precision) -> tuple[ir.Model, _Uses] | None:
    """A copy without functions, and what is to be done to it; None: nothing."""
    if precision == "fp32":
        return None
    half = HALVES[precision]
    copy = model.clone()
    if copy.functions:
        common.InlinePass()(copy)
    opset = opset_of(copy)
    types = types_of(copy, opset)
    low = frozenset(lowered_nodes(copy, types, half))
    return (copy, _Uses(half, opset, types, low)) if low else None


def _constants(model: ir.Model, types: Mapping[ir.Value, ir.DataType]) -> list[ir.Value]:
    """Values of float32 constants: initializers that nobody may override, and outputs of Constant nodes."""
    values = [
        v
        for b in bodies(model)
        for v in b.graph.initializers.values()
        if v.const_value and not is_overridable(v)
    ]
    values += [n.outputs[0] for _, n in nodes(model) if n.op_type == "Constant" and tensor_of(n.outputs[0])]
    return [v for v in values if types.get(v) == FLOAT]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = tensor_of(value)
    assert tensor is not None
    return tensor


def _rounded(tensor: ir.TensorProtocol, half: ir.DataType, widen: bool = False) -> ir.TensorProtocol:
    """The tensor rounded to nearest, out-of-range numbers clipped; computed when it is read."""
    _, most = finite_range(half)

    def make() -> ir.Tensor[Any]:
        array = tensor.numpy()
        clipped = np.where(np.isfinite(array), np.clip(array, -most, most), array)
        rounded = clipped.astype(_NUMPY[half])
        return ir.Tensor(rounded.astype(np.float32) if widen else rounded, name=tensor.name)

    if tensor.size <= SMALL:  # lies in the graph, where shape inference reads it
        return make()
    return ir.LazyTensor(
        make, dtype=FLOAT if widen else half, shape=ir.Shape(dims(tensor)), name=tensor.name,
        doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
    )  # fmt: skip


def _store(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give a constant another tensor."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        for name in [n for n in node.attributes if n.startswith("value")]:
            node.attributes.pop(name)
        node.attributes.add(ir.AttrTensor("value", tensor))
        node.meta.pop("lrcompile.tensor", None)
    value.type = ir.TensorType(tensor.dtype)  # a new one: clones share them


# --- the change ----------------------------------------------------------------------------------------------------


class _Converter:
    """Changes the copy in place, guided by what `_Uses` says of the graph as it was."""

    def __init__(self, model: ir.Model, uses: _Uses) -> None:
        self._model, self._uses, self._half = model, uses, uses.half
        self._word = uses.half.name.lower()
        self._names = Names(model)
        self._clipped: list[str] = []

    def run(self) -> tuple[str, ...]:
        made = {
            v
            for node in self._uses.low
            for i, v in enumerate(node.outputs)
            if i in self._uses.of(node)[1] and self._uses.types.get(v) == FLOAT
        }
        constants = _constants(self._model, self._uses.types)
        for value in constants:
            self._constant(value)
        given = [v for b in bodies(self._model) for v in b.graph.inputs]
        given += [v for b in bodies(self._model) for v in b.graph.initializers.values() if is_overridable(v)]
        given += [v for _, n in list(nodes(self._model)) for v in n.outputs]
        for value in dict.fromkeys(given):
            if self._uses.types.get(value) == FLOAT and value not in set(constants):
                self._meet(value, self._half if value in made else FLOAT)
        for node in self._uses.low:
            self._attributes(node)
        _drop_empty_casts(self._model)
        return self._notes()

    def _constant(self, value: ir.Value) -> None:
        """Store a constant in the type, or types, that its readers want."""
        tensor, half = _tensor(value), self._half
        if not self._uses.wants_half(value):
            return
        if exceeds(tensor, finite_range(half)[1]):
            self._clipped.append(value.name or "")
        rounded = _rounded(tensor, half)
        if not self._uses.wants_float(value):
            _store(value, rounded)
        elif value.is_graph_input():  # before IR 4 a second initializer would be a second input
            self._meet(value, FLOAT)
        elif tensor.size <= SMALL or value.is_graph_output():
            self._redirect(value, half, self._twin(value, rounded))
        else:
            _store(value, rounded)
            self._meet(value, half)

    def _twin(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """A second constant, beside the first."""
        name = self._names.value(f"{value.name}/{self._word}")
        twin = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(dims(tensor)))
        node = value.producer()
        if node is None:
            twin.const_value = tensor
            assert value.graph is not None
            value.graph.register_initializer(twin)
        else:
            attribute = ir.AttrTensor("value", tensor)
            node.append(self._node("Constant", (), (attribute,), twin))
        return twin

    def _meet(self, value: ir.Value, natural: ir.DataType) -> None:
        """Set the type of a value, and cast it for the readers that want the other."""
        other = FLOAT if natural == self._half else self._half
        wanted = any(self._uses.wants(n, i) == other for n, i in value.uses())
        graph, returned = value.graph, natural == self._half and value.is_graph_output()
        if natural == self._half:
            value.type = ir.TensorType(natural)
        if not (wanted or returned):
            return
        cast = ir.Value(type=ir.TensorType(other), shape=value.shape)
        if returned:  # the interface keeps its name
            cast.name, value.name = value.name, self._names.value(f"{value.name}/{self._word}")
        else:
            cast.name = self._names.value(f"{value.name}/{other.name.lower()}")
        self._redirect(value, other, cast)
        if returned:
            for body in bodies(self._model):
                for i, output in enumerate(body.graph.outputs):
                    if output is value:
                        body.graph.outputs[i] = cast
        node = self._node("Cast", (value,), (ir.AttrInt64("to", int(other)),), cast)
        producer = value.producer()
        if producer is not None:
            producer.append(node)
        else:
            assert isinstance(graph, ir.Graph)
            graph.insert_before(graph[0], node)

    def _redirect(self, value: ir.Value, dtype: ir.DataType, replacement: ir.Value) -> None:
        for node, index in tuple(value.uses()):
            if self._uses.wants(node, index) == dtype:
                node.replace_input_with(index, replacement)

    def _node(
        self, op: str, inputs: tuple[ir.Value, ...], attributes: tuple[ir.Attr, ...], made: ir.Value
    ) -> ir.Node:
        name = self._names.node(f"{made.name}/{op.lower()}")
        node = ir.Node("", op, inputs, attributes, outputs=[made], name=name)
        node.metadata_props["lrcompile.precision"] = self._word
        return node

    def _attributes(self, node: ir.Node) -> None:
        """Attributes that fix the type of what a node makes."""
        if node.op_type == "Cast":
            node.attributes.add(ir.AttrInt64("to", int(self._half)))
        elif node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            fill = ir.tensor(np.zeros(1, np.float32)) if given is None else given.as_tensor()
            if exceeds(fill, finite_range(self._half)[1]):
                self._clipped.append(node.outputs[0].name or "")
            node.attributes.add(ir.AttrTensor("value", _rounded(fill, self._half)))

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._clipped:
            most = finite_range(self._half)[1]
            names = ", ".join(self._clipped[:3]) + (" ..." if len(self._clipped) > 3 else "")
            notes.append(f"constants beyond {self._word} were clipped to {most:.5g}: {names}")
        left = sorted({n.op_type for n in _islands(self._model, self._uses) if not is_movable(n)})
        if left:
            notes.append(f"computed in float32: {', '.join(left)}")
        return tuple(notes)


def _islands(model: ir.Model, uses: _Uses) -> list[ir.Node]:
    floats: Callable[[ir.Node], bool] = lambda n: any(uses.types.get(v) == FLOAT for v in n.outputs)  # noqa: E731
    return [n for _, n in nodes(model) if n not in uses.low and n.op_type != "Constant" and floats(n)]


def _drop_empty_casts(model: ir.Model) -> None:
    """Casts of the user's that have come to cast a value to the type that it has."""
    for body, node in list(nodes(model)):
        if node.op_type != "Cast" or node.domain not in ("", "ai.onnx"):
            continue
        value, made = node.inputs[0], node.outputs[0]
        if value is None or value.dtype is None or made.is_graph_output():
            continue
        if value.dtype == ir.DataType(node.attributes["to"].as_int()):
            made.replace_all_uses_with(value)
            body.graph.remove(node, safe=True)
