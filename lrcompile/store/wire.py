"""Big weights out of, and into, the protobuf bytes of a model, without ever parsing or copying them.

A serialized message is a row of fields, each a tag and a value; a nested message is a value with its length before it.
So a weight's bytes can be found by walking the tags, left out of what is parsed, and put back while a file is written:
only the lengths of the messages around it change. Field numbers are those of ``onnx.proto``; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import TensorProto

# Locations of external data that no file can have: "in the model file itself" and "held by the caller, number offset".
SELF, HELD = "\0self", "\0held"

# Where tensors can stand: (message, field) -> message.
CHILDREN = {
    ("ModelProto", 7): "GraphProto",
    ("ModelProto", 25): "FunctionProto",
    ("FunctionProto", 7): "NodeProto",
    ("FunctionProto", 11): "AttributeProto",
    ("GraphProto", 1): "NodeProto",
    ("GraphProto", 5): "TensorProto",
    ("GraphProto", 15): "SparseTensorProto",
    ("NodeProto", 5): "AttributeProto",
    ("AttributeProto", 5): "TensorProto",
    ("AttributeProto", 6): "GraphProto",
    ("AttributeProto", 10): "TensorProto",
    ("AttributeProto", 11): "GraphProto",
    ("AttributeProto", 22): "SparseTensorProto",
    ("AttributeProto", 23): "SparseTensorProto",
    ("SparseTensorProto", 1): "TensorProto",
    ("SparseTensorProto", 2): "TensorProto",
}
# Fields of TensorProto that hold the bytes of the array as they are, and for which types (None: all but strings).
DATA: dict[int, tuple[int, ...] | None] = {
    4: (1, 14),
    9: None,
    10: (11, 15),
}  # float_data, raw_data, double_data
TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")

BIG = 1 << 16  # bytes; what is smaller is cheap to parse
MAX_FIELDS = 5_000_000
MAX_DEPTH = 100  # protobuf's own limit


class WireError(ValueError):
    """The bytes are not a protobuf message, or one that nobody could mean."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes that are written in later: those of the array that the caller holds under this number."""

    number: int
    length: int

    def __len__(self) -> int:
        return self.length


Piece = bytes | memoryview | Gap


def place(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make a tensor point at external data."""
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def lighten(data: memoryview | bytes, big: int = BIG) -> bytes:
    """The model with every array larger than big bytes replaced by a reference into data (location `SELF`).

    data: a serialized ModelProto. Raises WireError.
    """
    view = memoryview(data)
    return b"".join(
        piece if not isinstance(piece, Gap) else b""
        for piece in _Rewriter(
            view, lambda start, end: end - start > big, lambda s, e: _take_out(view, s, e, big)
        ).run()
    )


def fill(light: bytes) -> list[Piece]:
    """The pieces of the model whose tensors at location `HELD` are to be written in: a `Gap` for each.

    light: a serialized ModelProto of ours; offset of a held tensor is its number, length its bytes.
    """
    marker, view = HELD.encode(), memoryview(light)
    return _Rewriter(view, lambda s, e: light.find(marker, s, e) >= 0, lambda s, e: _put_in(light[s:e])).run()


def _take_out(data: memoryview, start: int, end: int, big: int) -> list[Piece] | None:
    from onnx import TensorProto

    found: list[tuple[int, int, int]] = []
    rest, kept = [], start
    for number, wire_type, at, body, stop in _fields(data, start, end, limit=1000):
        if wire_type == 2 and stop - body > big and number in DATA:
            found.append((number, body, stop))
            rest.append(data[kept:at])
            kept = stop
    if len(found) != 1:
        return None
    rest.append(data[kept:end])
    number, body, stop = found[0]
    tensor = TensorProto.FromString(b"".join(rest))
    types = DATA[number]
    holds_more = tensor.external_data or tensor.HasField("data_location") or tensor.HasField("raw_data")
    if holds_more or any(len(getattr(tensor, f)) for f in TYPED) or tensor.data_type == TensorProto.STRING:
        return None  # contradicts itself: left as it is, for the checks to find
    if types is not None and tensor.data_type not in types:
        return None
    place(tensor, SELF, body, stop - body)
    return [tensor.SerializeToString()]


def _put_in(data: bytes) -> list[Piece] | None:
    from onnx import TensorProto

    tensor = TensorProto.FromString(data)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if entries.get("location") != HELD:
        return None
    length = int(entries["length"])
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    head = _tag(9, 2) + _encode(length)
    return [tensor.SerializeToString() + head, Gap(int(entries["offset"]), length)]


class _Rewriter:
    """Copies a ModelProto, descending only where `wanted`, with the tensors found there replaced."""

    def __init__(
        self,
        data: memoryview,
        wanted: Callable[[int, int], bool],
        tensor: Callable[[int, int], list[Piece] | None],
    ) -> None:
        self.data, self.wanted, self.tensor = data, wanted, tensor
        self.left = MAX_FIELDS

    def run(self) -> list[Piece]:
        return self.message("ModelProto", 0, len(self.data), 0)

    def message(self, kind: str, start: int, end: int, depth: int) -> list[Piece]:
        if kind == "TensorProto":
            return self.tensor(start, end) or [self.data[start:end]]
        pieces: list[Piece] = []
        copied = start
        for number, wire_type, at, body, stop in _fields(self.data, start, end, self.left):
            self.left -= 1
            child = CHILDREN.get((kind, number)) if wire_type == 2 else None
            if child is None or depth >= MAX_DEPTH or not self.wanted(body, stop):
                continue
            inner = self.message(child, body, stop, depth + 1)
            head = _tag(number, 2) + _encode(sum(map(len, inner)))
            pieces += [self.data[copied:at], head, *inner]
            copied = stop
        return [*pieces, self.data[copied:end]]


def _fields(data: memoryview, start: int, end: int, limit: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, wire type, where the tag starts, where the value starts, where it ends) of each field of a message."""
    position = start
    while position < end:
        if (limit := limit - 1) < 0:
            raise WireError(f"it has more than {MAX_FIELDS:,} parts")
        at = position
        tag, position = _decode(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        body = position
        if wire_type == 0:
            _, position = _decode(data, position, end)
        elif wire_type == 1:
            position += 8
        elif wire_type == 2:
            length, body = _decode(data, position, end)
            position = body + length
        elif wire_type == 5:
            position += 4
        else:
            raise WireError("it is not a protobuf message")
        if position > end:
            raise WireError("it is cut short, or not a protobuf message")
        yield number, wire_type, at, body, position


def _decode(data: memoryview, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise WireError("it is cut short, or not a protobuf message")


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(number: int, wire_type: int) -> bytes:
    return _encode(number << 3 | wire_type)
