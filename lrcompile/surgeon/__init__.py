"""The graphsurgeon door: our models as `gs.Graph`, and back; a pass applied to one, and ``--gs-script``.

The bridge goes through protos without weights: every constant crosses as a stand-in that names where its tensor is held, and
a `gs.Constant` reads its values when somebody asks for them. What graphsurgeon cannot carry (metadata, initializers that are
inputs, types that are no tensors, empty lists) is put back on what survives: nodes and values that still bear their names.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from lrcompile.errors import ModelError, UsageError
from lrcompile.load import load
from lrcompile.records import Source
from lrcompile.store import load_function, models, wire
from lrcompile.surgeon.losses import lift, restore, strip

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

_IR_VERSION = 10  # has all element types that models use, and every runtime of the last years reads it


@dataclass(frozen=True)
class Scripted(Source):
    """A model that a user's script changed. Its hashes are those of the file; digest: SHA-256 of what the script made.

    The path is empty, as for a model in memory: what is compared with, and published where nothing is rewritten, is the
    scripted model and not the file.
    """

    digest: str = ""

    @property
    def key(self) -> str:
        return f"{super().key}|{self.digest}"


class HeldValues(gs.ir.tensor.LazyValues):  # type: ignore[misc]
    """Values of a `gs.Constant` that stay where they are (a mapped file, say) until they are asked for."""

    def __init__(self, lazy: gs.ir.tensor.LazyValues, held: ir.TensorProtocol) -> None:
        self.shape, self.dtype, self.nbytes, self.held = lazy.shape, lazy.dtype, lazy.nbytes, held

    @property
    def tensor(self) -> onnx.TensorProto:
        """A whole tensor, a new one each time, for graphsurgeon's own exporter, which writes a name into it."""
        return ir.to_proto(self.held)

    def load(self) -> Array:
        """A copy that a script may write to, in the tensor's own type (ml_dtypes where NumPy has none)."""
        return np.array(self.held.numpy())


def apply(graph: gs.Graph, *passes: ir.passes.PassBase) -> gs.Graph:
    """Passes (`LowRankPass` or any other of onnx-ir) applied to a graph one after another; the graph given stays as it is.

    Raises ModelError when the graph cannot be exported, and what the passes raise.
    """
    model = to_model(graph)
    for step in passes:
        model = step(model).model
    return to_graph(model)


def scripted(source: Source, script: str | None) -> Source:
    """The model after ``FILE.py:FUNCTION``, a user's ``(gs.Graph) -> gs.Graph | None`` (None: the graph given was changed).

    script: None gives the source back. Raises UsageError with what the script raised, ModelError when its graph is not legal.
    """
    if script is None:
        return source
    path, _, name = script.rpartition(":")
    if not path:
        raise UsageError(f"--gs-script {script}: write FILE.py:FUNCTION")
    function = load_function(path, name)
    called = f"{Path(path).name}:{name}"
    with contextlib.redirect_stdout(sys.stderr):  # graphsurgeon and scripts print; stdout is for results
        graph = to_graph(source.model)
        graph.functions.clear()  # the few that loading could not inline come back whole; graphsurgeon trips over some
        lazy = [(c, c._values) for c in _constants(graph)]
        try:
            made = function(graph)
        except Exception as error:
            raise UsageError(f"--gs-script {called} failed: {type(error).__name__}: {error}") from error
        made = graph if made is None else made
        if not isinstance(made, gs.Graph):
            raise UsageError(f"--gs-script {called} returned a {type(made).__name__}, not a graph")
        for constant, held in lazy:  # looked at, and not changed: back to the file
            if isinstance(constant, gs.Constant) and _same(constant._values, held):
                constant._values = held
        try:
            checked = load(to_model(made, source.model))
        except ModelError as error:
            raise ModelError(f"the graph that --gs-script {called} made is not legal: {error}") from error
    note = f"{called} changed the model before anything else; it is what that script made that everything is compared with"
    notes = (*source.notes, note, *checked.notes)
    return Scripted(
        Path(), checked.model, source.sha256, source.weights, checked.opset, notes, checked.sha256
    )


def to_graph(model: ir.Model) -> gs.Graph:
    """The model as graphsurgeon knows it, weights left where they are. Raises ModelError when graphsurgeon cannot read it."""
    light, held = models.detach(model)
    proto = onnx.ModelProto.FromString(light)
    strip(proto)
    with _foreign("graphsurgeon cannot read the model"):
        graph = gs.import_onnx(proto)
    for constant in _constants(graph):
        stand_in = constant._values.tensor
        entries = {entry.key: entry.value for entry in stand_in.external_data}
        outside = entries.get("location") == wire.HELD
        tensor = held[int(entries["offset"])] if outside else ir.from_proto(stand_in)
        constant._values = HeldValues(constant._values, tensor)
    return graph


def to_model(graph: gs.Graph, original: ir.Model | None = None) -> ir.Model:
    """The graph as a model that shares its arrays. Raises ModelError when graphsurgeon cannot export it.

    original: the model that the graph was made of, for what graphsurgeon does not carry.
    """
    constants = _constants(graph)
    own = [constant._values for constant in constants]
    with _foreign("graphsurgeon cannot export the graph"):
        held = [_tensor(constant) for constant in constants]
        try:
            for number, constant in enumerate(constants):
                constant._values = gs.ir.tensor.LazyValues(_stand_in(held[number], number))
            proto = gs.export_onnx(graph, do_type_check=False)
        finally:
            for constant, values in zip(constants, own, strict=True):
                constant._values = values
    if graph.ir_version is None:  # made by hand; onnx then writes its newest, which runtimes do not read yet
        least = onnx.helper.find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
        proto.ir_version = max(_IR_VERSION, least)
    lift(proto, set(original.graph.initializers) if original is not None else set())
    with _foreign("onnx-ir cannot read what graphsurgeon exported"):
        model: ir.Model = ir.from_proto(proto)
    models.replace_tensors(
        model, lambda t: _named(held[t.offset or 0], t.name) if isinstance(t, ir.ExternalTensor) else None
    )
    if original is not None:
        restore(model, original)
    return model


@contextlib.contextmanager
def _foreign(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # graphsurgeon raises of all kinds
        raise ModelError(f"{what}: {type(error).__name__}: {error}") from error


def _constants(graph: gs.Graph) -> list[gs.Constant]:
    """Every constant of the graph, its bodies and functions, each once: what nodes read, and what attributes hold."""
    found: dict[int, gs.Constant] = {}
    for root in (graph, *graph.functions):
        for body in (root, *root.subgraphs(recursive=True)):
            things = [
                *body.tensors().values(),
                *(value for node in body.nodes for value in node.attrs.values()),
            ]
            found.update({id(thing): thing for thing in things if isinstance(thing, gs.Constant)})
    return list(found.values())


def _tensor(constant: gs.Constant) -> ir.TensorProtocol:
    values = constant._values
    if isinstance(values, HeldValues):
        return values.held
    if isinstance(values, gs.ir.tensor.SparseValues):
        values = values.load().astype(values.dtype)
    elif isinstance(values, gs.ir.tensor.LazyValues):
        tensor: ir.TensorProtocol = ir.from_proto(values.tensor)
        return tensor
    if values.dtype.kind in "OSU":
        return ir.tensor(values, dtype=ir.DataType.STRING, name=constant.name)
    wanted = ir.DataType.from_numpy(values.dtype)
    if constant._export_dtype is not None:
        wanted = ir.DataType(dtype_to_onnx(constant._export_dtype))
    return ir.Tensor(
        np.ascontiguousarray(values, wanted.numpy()).reshape(values.shape), wanted, name=constant.name
    )


def _stand_in(tensor: ir.TensorProtocol, number: int) -> onnx.TensorProto:
    """A tensor without values that says where they are; strings, which no external data can hold, as they are."""
    if tensor.dtype == ir.DataType.STRING:
        return ir.to_proto(tensor)
    proto = onnx.TensorProto(data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    wire.place(proto, wire.HELD, number, tensor.nbytes)
    return proto


def _named(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    """The tensor under that name. It may be another model's too, so it is not renamed: copies of a constant share one."""
    if (tensor.name or "") == (name or ""):
        return tensor
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _same(values: Any, held: HeldValues) -> bool:
    if not isinstance(values, np.ndarray):
        return False
    before = held.held.numpy()
    if values.dtype != before.dtype or values.shape != before.shape:
        return False
    return (
        np.ascontiguousarray(values).tobytes() == before.tobytes()
        if values.dtype != object
        else bool((values == before).all())
    )
