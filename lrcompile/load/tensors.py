"""Every tensor of a file holds exactly what it claims to hold, and sparse ones become dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from lrcompile.errors import ModelError
from lrcompile.load.folder import ModelFolder
from lrcompile.store import wire

if TYPE_CHECKING:
    from lrcompile.store.files import Bytes

MAX_DENSE = 1 << 31  # bytes that a sparse tensor may become
MAX_RANK = 64  # NumPy's

# Which field holds the values of a type when raw_data does not.
_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.STRING: "string_data",
}
_COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_FLOAT6 = {ir.DataType.FLOAT6E2M3, ir.DataType.FLOAT6E3M2}

Graph = onnx.GraphProto | onnx.FunctionProto


def every_graph(model: onnx.ModelProto) -> Iterator[tuple[Graph, str]]:
    """Every graph and function of a model, with its place: ``""`` or `` in then_branch of If_2``."""
    pending: list[tuple[Graph, str]] = [(f, f" in function {f.domain}::{f.name}") for f in model.functions]
    pending.append((model.graph, ""))
    while pending:
        body, place = pending.pop()
        yield body, place
        for node in body.node:
            for attribute in node.attribute:
                inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())]
                pending += [(g, f" in {attribute.name} of {node.name or node.op_type}{place}") for g in inner]


def every_attribute(model: onnx.ModelProto) -> Iterator[tuple[onnx.AttributeProto, str]]:
    """Every attribute with its name and owner; defaults of functions as well."""
    for body, place in every_graph(model):
        for node in body.node:
            for attribute in node.attribute:
                yield attribute, f"attribute {attribute.name!r} of {node_label(node)}{place}"
        if isinstance(body, onnx.FunctionProto):
            for attribute in body.attribute_proto:
                yield attribute, f"default of attribute {attribute.name!r}{place}"


def every_tensor(model: onnx.ModelProto) -> Iterator[tuple[TensorProto, str]]:
    """Every dense tensor with a sentence that says where it is."""
    for body, place in every_graph(model):
        if isinstance(body, onnx.GraphProto):
            for tensor in body.initializer:
                yield tensor, f"initializer {tensor.name!r}{place}"
    for attribute, where in every_attribute(model):
        for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ())):
            yield tensor, where


def node_label(node: onnx.NodeProto) -> str:
    """How a message calls a node: its name, or else what it makes."""
    name = node.name or next((output for output in node.output if output), "")
    return f"{node.op_type} node {name!r}"


class Arrays:
    """Where the values of tensors are: in the proto, in the model file, in external data, or held in memory."""

    def __init__(self, folder: ModelFolder, own: Bytes | None, held: list[ir.TensorProtocol]) -> None:
        self._folder, self._own, self._held = folder, own, held

    def check(self, tensor: TensorProto, where: str) -> None:
        """Raises ModelError when type, shape and values of a tensor contradict each other, or values are missing."""
        dtype = _data_type(tensor, where)
        shape = tuple(tensor.dims)
        if len(shape) > MAX_RANK or any(d < 0 for d in shape) or math.prod(d or 1 for d in shape) > 2**60:
            raise ModelError(f"{where} has the impossible shape {_shape(shape)}")
        count = math.prod(shape)
        typed = {field: len(getattr(tensor, field)) for field in wire.TYPED if len(getattr(tensor, field))}
        if tensor.HasField("segment"):
            raise ModelError(f"{where} is cut into segments, which nothing reads")
        if tensor.data_location == TensorProto.EXTERNAL:
            if typed or tensor.HasField("raw_data"):
                raise ModelError(f"{where} has its values in external data and in the file as well")
            if dtype == ir.DataType.STRING:
                raise ModelError(f"{where} has strings in external data, which ONNX does not have")
            self._check_external(tensor, where, _nbytes(dtype, count), shape)
            return
        if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
            held, wanted = len(tensor.raw_data), _nbytes(dtype, count)
            if typed:
                raise ModelError(f"{where} has its values twice, as raw_data and as {next(iter(typed))}")
            if held != wanted:
                raise ModelError(
                    f"{where} of {dtype.name} {_shape(shape)} needs {wanted:,} bytes and holds {held:,}"
                )
            return
        field = _FIELDS.get(tensor.data_type, "int32_data")
        wanted = count * 2 if tensor.data_type in _COMPLEX else count
        if dtype != ir.DataType.STRING and dtype.bitwidth < 8 and dtype not in _FLOAT6:
            wanted = _nbytes(dtype, count)  # packed, a byte in each entry
        if set(typed) - {field}:
            raise ModelError(
                f"{where} of {dtype.name} has its values in {min(set(typed) - {field})}, not {field}"
            )
        if (held := typed.get(field, 0)) != wanted:
            raise ModelError(
                f"{where} of {dtype.name} {_shape(shape)} needs {wanted:,} values and holds {held:,}"
            )

    def _check_external(self, tensor: TensorProto, where: str, wanted: int, shape: tuple[int, ...]) -> None:
        location, offset, length = _entries(tensor, where)
        if location == wire.HELD:
            if offset >= len(self._held):
                raise ModelError(f"external data of {where} has no usable name")
            return
        if length is not None and length != wanted:
            raise ModelError(
                f"external data of {where} is {length:,} bytes long where its shape {_shape(shape)} needs {wanted:,}"
            )
        check_range(where, offset, wanted, self._data(location, where).size)
        del tensor.external_data[:]  # said once more, in full and without keys that readers only warn of
        wire.place(tensor, location, offset, wanted)

    def _data(self, location: str, where: str) -> Bytes:
        if location == wire.SELF and self._own is not None:
            return self._own
        return self._folder.open(location, where)

    def replacement(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        """For a tensor whose values lie elsewhere, one that has them: a view of the mapped file, or what was held."""
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        location = str(tensor.location)
        if location == wire.HELD:
            return self._held[tensor.offset or 0]
        return mapped(tensor, self._data(location, f"tensor {tensor.name!r}"))

    def array(self, tensor: TensorProto, where: str) -> np.ndarray:
        """The values of a tensor that was checked."""
        self.check(tensor, where)
        read = ir.serde.deserialize_tensor(tensor)
        return (self.replacement(read) or read).numpy()

    def hold(self, array: np.ndarray, like: TensorProto, shape: tuple[int, ...]) -> TensorProto:
        """A tensor whose values are kept here."""
        dtype = ir.DataType(like.data_type)
        self._held.append(ir.Tensor(array, dtype, name=like.name, doc_string=like.doc_string))
        tensor = TensorProto(name=like.name, doc_string=like.doc_string, data_type=like.data_type, dims=shape)
        wire.place(tensor, wire.HELD, len(self._held) - 1, array.nbytes)
        return tensor


def make_dense(model: onnx.ModelProto, arrays: Arrays) -> list[str]:
    """Make sparse initializers and attributes dense, in place: onnx-ir knows none. Gives a note for each.

    Raises ModelError when one is damaged or would take more than 2 GiB.
    """
    notes = []
    for body, place in every_graph(model):
        if isinstance(body, onnx.GraphProto):
            for sparse in body.sparse_initializer:
                where = f"sparse initializer {sparse.values.name!r}{place}"
                body.initializer.append(_dense(sparse, where, arrays))
                notes.append(f"{where} was made dense")
            body.ClearField("sparse_initializer")
        for node in body.node:
            for attribute in node.attribute:
                where = f"attribute {attribute.name!r} of {node_label(node)}{place}"
                if len(attribute.sparse_tensors) or (
                    attribute.HasField("sparse_tensor")
                    and (node.op_type, attribute.name) != ("Constant", "sparse_value")
                ):
                    raise ModelError(f"{where} is a sparse tensor, which only Constant nodes may have here")
                if attribute.HasField("sparse_tensor"):
                    tensor = _dense(attribute.sparse_tensor, where, arrays)
                    attribute.Clear()
                    attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                    attribute.t.CopyFrom(tensor)
                    notes.append(f"{where} was made dense")
    return notes


def _dense(sparse: onnx.SparseTensorProto, where: str, arrays: Arrays) -> TensorProto:
    shape = tuple(sparse.dims)
    dtype = _data_type(sparse.values, where)
    if dtype == ir.DataType.STRING or dtype.bitwidth < 8:
        raise ModelError(f"{where} is of type {dtype.name}, for which there are no sparse tensors here")
    if not shape or len(shape) > MAX_RANK or any(d <= 0 for d in shape):
        raise ModelError(f"{where} has the impossible shape {_shape(shape)}")
    count = math.prod(shape)
    if _nbytes(dtype, count) > MAX_DENSE:
        raise ModelError(f"{where} of shape {_shape(shape)} would take more than 2 GiB when made dense")
    values = arrays.array(sparse.values, f"values of {where}")
    if sparse.indices.data_type != TensorProto.INT64:
        raise ModelError(f"indices of {where} are not INT64")
    indices = arrays.array(sparse.indices, f"indices of {where}")
    if values.ndim != 1 or indices.shape not in ((len(values),), (len(values), len(shape))):
        raise ModelError(f"{where} has {values.shape} values and {indices.shape} indices, which do not fit")
    limit = np.array(shape if indices.ndim == 2 else count)
    if np.any(indices < 0) or np.any(indices >= limit):
        raise ModelError(f"{where} has indices outside its shape {_shape(shape)}")
    dense = np.zeros(count, values.dtype)
    flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
    dense[flat] = values
    return arrays.hold(dense.reshape(shape), sparse.values, shape)


def mapped(tensor: ir.ExternalTensor, data: Bytes) -> ir.TensorProtocol:
    """A tensor whose array is a view of a mapped file. data: the whole file; offset and size were checked."""
    start = tensor.offset or 0
    raw = data[start : start + tensor.nbytes]
    replacement: ir.Tensor[Any] | ir.PackedTensor[Any]
    if tensor.dtype.bitwidth < 8:
        replacement = ir.PackedTensor(raw, tensor.dtype, shape=tensor.shape, name=tensor.name)
    else:
        array = raw.view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        replacement = ir.Tensor(array, tensor.dtype, name=tensor.name)
    replacement.doc_string = tensor.doc_string
    replacement.metadata_props.update(tensor.metadata_props)
    return replacement


def check_range(where: str, offset: int, length: int, size: int) -> None:
    """Raises ModelError when a file of size bytes does not hold what lies at offset."""
    if offset < 0 or offset + length > size:
        raise ModelError(
            f"external data of {where} should be bytes {offset:,} to {offset + length:,} of a file that has {size:,}: "
            "it is cut short or belongs to another model"
        )


def _data_type(tensor: TensorProto, where: str) -> ir.DataType:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where} has the unknown element type {tensor.data_type}")
    return dtype


def _nbytes(dtype: ir.DataType, count: int) -> int:
    return 0 if dtype == ir.DataType.STRING else (count * dtype.bitwidth + 7) // 8


def _entries(tensor: TensorProto, where: str) -> tuple[str, int, int | None]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "location" not in entries:
        raise ModelError(f"external data of {where} has no location")
    numbers: dict[str, int | None] = {"offset": 0, "length": None}
    for key in numbers:
        if key in entries:
            text = entries[key].strip()
            if not (
                text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20
            ) or text.startswith("-"):
                raise ModelError(f"external data of {where} has the impossible {key} {entries[key][:40]!r}")
            numbers[key] = int(text)
    return entries["location"], numbers["offset"] or 0, numbers["length"]


def _shape(shape: tuple[int, ...]) -> str:
    text = "x".join(map(str, shape[:8]))
    return f"[{text}{'x...' if len(shape) > 8 else ''}]"
