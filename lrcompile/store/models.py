"""Writing a model weight by weight: no more than one of them is in memory, and none is ever in a protobuf message."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import ModelError
from lrcompile.store import wire
from lrcompile.store.files import whole_file

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

SMALL = 1024  # bytes; what is smaller stays in the graph, where shape inference sees it
LARGE = 1 << 30  # bytes of weights from which they get a file of their own (protobuf ends at 2 GiB)
ALIGNMENT = 64
# In the `meta` of a value that is an output and also an input or an initializer: how the file declares it on either side.
DECLARED = "lrcompile.declared"

Replace = Callable[["ir.TensorProtocol"], "ir.TensorProtocol | None"]


def save_model(
    model: ir.Model, folder: Path | str, *, name: str = "model.onnx", external: bool | None = None
) -> Path:
    """Write a model, and give the path of its ``.onnx``. Equal models give equal bytes.

    external: weights of more than 1 KiB go to ``NAME.data`` beside it; None: when all weights exceed 1 GiB, in which
    case False does the same. Weights that lie in other files (mapped ones, ExternalTensor) are copied, never referred to.
    Files already there are replaced, so that who has them mapped keeps the old ones. The model is left as it was.
    Raises UsageError or BuildError as the disk says.
    """
    path = Path(folder) / name
    held = _outside_the_graph(model)
    total = sum(tensor.nbytes for tensor in held)
    places = _write_data(held, path) if external or total > LARGE else {}
    light, held = detach(model, places)
    with whole_file(path, durable=False) as file:
        for piece in wire.fill(light):
            file.write(tensor_bytes(held[piece.number]) if isinstance(piece, wire.Gap) else piece)
    return path


def detach(
    model: ir.Model, places: Mapping[int, tuple[str, int]] | None = None
) -> tuple[bytes, list[ir.TensorProtocol]]:
    """The serialized model without its weights, and these: the tensor at location `wire.HELD`, offset i, is the i-th.

    places: location and offset, by the tensor's id, of those that lie in a file already. The model is left as it was.
    """
    import onnx_ir as ir  # heavy, and wanted by no other part of the store

    places = places or {}
    wanted = {id(tensor) for tensor in _outside_the_graph(model)}
    held: list[ir.TensorProtocol] = []

    def stand_in(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if id(tensor) not in wanted:
            return None
        location, offset = places.get(id(tensor), (wire.HELD, len(held)))
        if location == wire.HELD:
            held.append(tensor)
        return ir.ExternalTensor(
            location,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )

    undo = replace_tensors(model, stand_in)
    try:
        proto = ir.to_proto(model)
        _declare(model.graph.inputs, proto.graph.input, "input")
        _declare(model.graph.outputs, proto.graph.output, "output")
        return proto.SerializeToString(deterministic=True), held
    finally:
        undo()


def _declare(values: Iterable[ir.Value], infos: Iterable[Any], side: str) -> None:
    """Give interface values back the declarations that the file had."""
    for value, info in zip(values, infos, strict=True):
        if declaration := value.meta.get(DECLARED, {}).get(side):
            info.ParseFromString(declaration)


def _outside_the_graph(model: ir.Model) -> list[ir.TensorProtocol]:
    """The tensors that are not serialized with the graph, each once: those that are not small or lie in a file."""
    import onnx_ir as ir

    tensors: dict[int, ir.TensorProtocol] = {}

    def collect(tensor: ir.TensorProtocol) -> None:
        in_file = isinstance(tensor, ir.ExternalTensor)
        if tensor.dtype != ir.DataType.STRING and (in_file or tensor.nbytes > SMALL):
            tensors[id(tensor)] = tensor

    replace_tensors(model, collect)
    return list(tensors.values())


def _write_data(tensors: list[ir.TensorProtocol], path: Path) -> dict[int, tuple[str, int]]:
    """Write the weights one after another; gives each its location and offset."""
    places: dict[int, tuple[str, int]] = {}
    data = path.with_name(f"{path.name}.data")
    with whole_file(data, durable=False) as file:
        position = 0
        for tensor in tensors:
            if tensor.nbytes <= SMALL:
                continue
            padding = -position % ALIGNMENT
            file.write(b"\0" * padding)
            places[id(tensor)] = (data.name, position + padding)
            position += padding + file.write(tensor_bytes(tensor))
    return places


def tensor_bytes(tensor: ir.TensorProtocol) -> memoryview | bytes:
    """The bytes of a tensor as ONNX stores them, without a copy where the array lies like that already.

    Raises ModelError when the file it lies in cannot be read.
    """
    import numpy as np
    import onnx_ir as ir

    if isinstance(tensor, (ir.Tensor, ir.PackedTensor)) and isinstance(tensor.raw, np.ndarray):
        raw = tensor.raw
        as_stored = isinstance(tensor, ir.PackedTensor) or tensor.dtype.bitwidth >= 8
        if (
            as_stored
            and raw.flags.c_contiguous
            and raw.nbytes == tensor.nbytes
            and raw.dtype.byteorder != ">"
        ):
            return raw.reshape(-1).view(np.uint8).data
    try:
        return tensor.tobytes()
    except OSError as error:  # of the file it lies in, not of one that is being written
        raise ModelError(f"tensor {tensor.name!r} cannot be read: {error}") from error


def replace_tensors(model: ir.Model, replace: Replace) -> Callable[[], None]:
    """Put `replace(tensor)` in the place of every tensor of the model for which it is not None, in the walker's order.

    Gives a function that puts the old ones back.
    """
    from lrcompile import graph

    undo: list[Callable[[], None]] = []
    for body in graph.bodies(model):
        for value in body.graph.initializers.values():
            old = value.const_value
            if old is not None and (new := replace(old)) is not None:
                value.const_value = new
                undo.append(partial(setattr, value, "const_value", old))
        for node in body.graph:
            for key, attribute in list(node.attributes.items()):
                if (changed := _replaced(attribute, replace)) is not None:
                    node.attributes[key] = changed
                    undo.append(partial(node.attributes.add, attribute))

    def restore() -> None:
        for step in undo:
            step()

    return restore


def _replaced(attribute: ir.Attr, replace: Replace) -> ir.Attr | None:
    import onnx_ir as ir

    if attribute.is_ref() or attribute.value is None:
        return None
    if attribute.type == ir.AttributeType.TENSOR:
        new = replace(attribute.as_tensor())
        return None if new is None else ir.AttrTensor(attribute.name, new, doc_string=attribute.doc_string)
    if attribute.type == ir.AttributeType.TENSORS:
        pairs = [(tensor, replace(tensor)) for tensor in attribute.as_tensors()]
        if any(new is not None for _, new in pairs):
            tensors = [tensor if new is None else new for tensor, new in pairs]
            return ir.AttrTensors(attribute.name, tensors, doc_string=attribute.doc_string)
    return None
