"""The first stage: a file, or a model in memory, becomes a checked `Source` whose weights stay on disk.

    folder.py       which files a model may read, and nothing else
    tensors.py      every tensor holds exactly what it claims; sparse ones become dense
    legal.py        versions, names, order, operators; then onnx's own checker
    functions.py    local functions inlined, names made unique

The file is mapped, never read: arrays of more than 64 KiB are left out of what protobuf parses (`store.wire`) and become
views of the mapping, so a model of any size is checked in little memory. Whatever is wrong ends in one `ModelError` that
names the file and the tensor or node.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from lrcompile import graph
from lrcompile.errors import LrcompileError, ModelError
from lrcompile.load import functions, legal, tensors
from lrcompile.load.folder import ModelFolder
from lrcompile.records import Source
from lrcompile.store import files, models, wire

if TYPE_CHECKING:
    from lrcompile.store.files import Bytes

logger = logging.getLogger(__name__)

# A protobuf message ends at 2 GiB everywhere; a graph without its arrays is far smaller than this.
MAX_FILE, MAX_GRAPH = 2**31 - 1, 2**29


def load(path: str | Path | ir.Model, *, allow_hardlinks: bool = False) -> Source:
    """Read and check a model. Raises ModelError.

    path: an ``.onnx`` file, whose external data may lie in its folder, or a model in memory, which is left as it is.
    allow_hardlinks: take external data from files that have other names elsewhere.
    """
    if isinstance(path, ir.Model):
        return _guarded("the model", lambda: _from_memory(path, allow_hardlinks))
    return _guarded(str(path), lambda: _from_file(Path(path), allow_hardlinks))


def _guarded(name: str, work: Callable[[], Source]) -> Source:
    """Do the work; whatever it raises about the model names the file."""
    try:
        return work()
    except LrcompileError as error:
        raise type(error)(f"{name}: {error}") from error
    except RecursionError as error:
        raise ModelError(f"{name}: its graphs are nested too deeply") from error
    except MemoryError as error:
        raise ModelError(f"{name}: there is not enough memory to read it") from error


def _from_file(path: Path, allow_hardlinks: bool) -> Source:
    try:
        descriptor = files.open_regular(path)
    except OSError as error:
        raise ModelError(f"cannot be opened: {error.strerror or error}") from error
    try:
        data = files.map_descriptor(descriptor)
        if not data.size:
            raise ModelError("the file is empty")
        if data.size > MAX_FILE:
            raise ModelError(
                "the file is larger than 2 GiB, where protobuf ends; keep the weights in external data"
            )
        # Where the name the user gave stands, not where it leads: that is where external data is looked for.
        folder = ModelFolder(path.parent, allow_hardlinks)
        model, notes = _build(data.data, data, folder, [])
        return Source(
            path=path,
            model=model,
            sha256=files.hash_descriptor(descriptor),
            weights=folder.hashes(),
            opset=graph.opset_of(model),
            notes=notes,
        )
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def _from_memory(given: ir.Model, allow_hardlinks: bool) -> Source:
    with legal.foreign("cannot be serialized"):
        light, held = models.detach(given)
    folders: dict[str, ModelFolder] = {}
    for number, tensor in enumerate(held):
        if isinstance(tensor, ir.ExternalTensor):  # its file is subject to the rules that hold for files
            where, base = f"tensor {tensor.name!r}", os.fspath(tensor.base_dir)
            folder = folders.setdefault(base, ModelFolder(Path(base), allow_hardlinks))
            data = folder.open(os.fspath(tensor.location), where)
            tensors.check_range(where, tensor.offset or 0, tensor.nbytes, data.size)
            held[number] = tensors.mapped(tensor, data)
    model, notes = _build(light, None, ModelFolder(Path(), allow_hardlinks), held)
    digest = hashlib.sha256(light)
    for tensor in held:
        digest.update(models.tensor_bytes(tensor))
    return Source(Path(), model, digest.hexdigest(), (), graph.opset_of(model), notes)


def _build(
    data: memoryview | bytes, own: Bytes | None, folder: ModelFolder, held: list[ir.TensorProtocol]
) -> tuple[ir.Model, tuple[str, ...]]:
    """The checked model of a serialized one. own: the mapped file it came from. held: arrays that it refers to."""
    try:
        light = wire.lighten(data) if own is not None else bytes(data)
    except wire.WireError as error:
        raise ModelError(f"this is not a whole ONNX model: {error}") from error
    if len(light) > MAX_GRAPH:
        raise ModelError(
            f"the graph without its large arrays takes {len(light):,} bytes, which is more than {MAX_GRAPH:,}; "
            "keep weights as raw_data or in external data"
        )
    with legal.foreign("this is not a whole ONNX model"):
        proto = onnx.ModelProto.FromString(light)
    del light
    legal.check_text(proto)
    legal.check_header(proto)
    declared = {"input": _declared(proto.graph.input), "output": _declared(proto.graph.output)}
    legal.normalise(proto)
    arrays = tensors.Arrays(folder, own, held)
    notes = tensors.make_dense(proto, arrays)
    for tensor, where in tensors.every_tensor(proto):
        arrays.check(tensor, where)
    legal.check(proto)
    with legal.foreign("onnx-ir cannot read it"):
        model = ir.from_proto(proto)
    for side, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            # one value to onnx-ir, but declared twice in the file, perhaps in different words
            if value.is_graph_output() and (value.is_graph_input() or value.is_initializer()):
                value.meta.setdefault(models.DECLARED, {})[side] = declared[side].get(value.name or "", b"")
    notes += functions.flatten(model)
    models.replace_tensors(model, arrays.replacement)
    graph.mark_constants(model)
    return model, tuple(notes)


def _declared(infos: Iterable[onnx.ValueInfoProto]) -> dict[str, bytes]:
    return {info.name: info.SerializeToString() for info in infos}
