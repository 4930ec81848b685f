"""Loading: every way in which a file can be bad ends in one `ModelError` that names the culprit; odd ones come through."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lrcompile import graph
from lrcompile.errors import ModelError
from lrcompile.load import legal, load
from lrcompile.store import save_model, wire

pytestmark = pytest.mark.timeout(60)  # nothing here may hang

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
info = helper.make_tensor_value_info
node = helper.make_node


def array(name: str, *shape: int, dtype: Any = np.float32) -> TensorProto:
    values = np.random.default_rng(len(name)).standard_normal(shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def model(
    nodes: list[NodeProto] | None = None,
    weights: list[TensorProto] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    inputs: list[Any] | None = None,
    outputs: list[Any] | None = None,
    imports: dict[str, int] | None = None,
    functions: list[Any] | None = None,
) -> ModelProto:
    """y = x @ w unless said otherwise."""
    graph_proto = helper.make_graph(
        [node("MatMul", ["x", "w"], ["y"], name="project")] if nodes is None else nodes,
        "g",
        inputs or [info("x", FLOAT, [2, 4])],
        outputs or [info("y", FLOAT, None)],
        [array("w", 4, 3)] if weights is None else weights,
    )
    opsets = [helper.make_opsetid(d, v) for d, v in {"": opset, **(imports or {})}.items()]
    return helper.make_model(
        graph_proto, opset_imports=opsets, ir_version=ir_version, functions=functions or []
    )


def external(name: str = "w", shape: tuple[int, ...] = (4, 3), **entries: Any) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write(folder: Path, proto: ModelProto | bytes, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    return path


def refused(path: Path, *words: str, **options: Any) -> str:
    """The message of the refusal, which names the file and holds the words."""
    with pytest.raises(ModelError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


# --- files --------------------------------------------------------------------------------------------------------


def test_what_is_not_a_model(tmp_path: Path) -> None:
    whole = model(weights=[array("w", 4, 3)]).SerializeToString()
    refused(tmp_path / "nowhere.onnx", "No such file")
    refused(tmp_path, "not a regular file")
    refused(write(tmp_path, b""), "empty")
    refused(write(tmp_path, b"PK\x03\x04" + bytes(range(256))), "not a whole ONNX model")
    refused(write(tmp_path, b"hello, world\n" * 20))
    refused(write(tmp_path, b"\0" * 5000))
    refused(write(tmp_path, b"\x08\x08"), "no graph")
    for length in range(0, len(whole), 7):
        refused(write(tmp_path, whole[:length]))


def test_fifo_device_and_socket(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.onnx")
    refused(tmp_path / "fifo.onnx", "not a regular file")
    refused(Path("/dev/zero"), "not a regular file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.onnx"))
        refused(tmp_path / "s.onnx", "not a regular file")


def test_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path, model())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")
    refused(path, "ermission denied")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_never_escape(tmp_path: Path, seed: int) -> None:
    """A whole family of files: whatever bytes are changed, it loads or is refused in one line."""
    (tmp_path / "w.bin").write_bytes(bytes(48))
    whole = bytearray(rich_model().SerializeToString())
    randomly = random.Random(seed)
    verdicts = set()
    for number in range(250):
        data = bytearray(whole)
        for _ in range(randomly.choice((1, 1, 2, 4))):
            at = randomly.randrange(len(data))
            match randomly.randrange(3):
                case 0:
                    data[at] ^= 1 << randomly.randrange(8)
                case 1:
                    del data[at : at + randomly.randrange(1, 8)]
                case 2:
                    data[at:at] = randomly.randbytes(randomly.randrange(1, 8))
        path = write(tmp_path, bytes(data), f"{number}.onnx")
        try:
            load(path)
        except ModelError as error:
            verdicts.add("refused")
            assert str(path) in str(error)
        else:
            verdicts.add("loaded")
    assert verdicts == {"refused", "loaded"}


def rich_model() -> ModelProto:
    """Every place a tensor can be: initializer, sparse one, external one, Constant, both branches of an If, a function."""
    then = helper.make_graph(
        [node("Constant", [], ["k"], value=array("", 3, 3)), node("MatMul", ["b", "k"], ["q"])],
        "t",
        [],
        [info("q", FLOAT, None)],
    )
    other = helper.make_graph(
        [node("MatMul", ["b", "v"], ["q"])], "e", [], [info("q", FLOAT, None)], [array("v", 3, 3)]
    )
    double = helper.make_function(
        "own", "Double", ["p"], ["r"], [node("Add", ["p", "p"], ["r"])], [helper.make_opsetid("", 17)]
    )
    proto = model(
        [
            node("MatMul", ["x", "w"], ["a"], name="project"),
            node("Double", ["a"], ["b"], domain="own"),
            node("If", ["c"], ["d"], then_branch=then, else_branch=other),
            node("Add", ["d", "s"], ["y"]),
        ],
        [external(location="w.bin", offset=0, length=48)],
        inputs=[info("x", FLOAT, ["n", 4]), info("c", BOOL, [])],
        imports={"own": 1},
        functions=[double],
    )
    values = helper.make_tensor("s", FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("", INT64, [2], [0, 2])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    return proto


def test_every_place_of_a_tensor(tmp_path: Path) -> None:
    weights = np.arange(12, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(weights.tobytes())
    path = write(tmp_path, rich_model())
    source = load(path)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.weights == (("w.bin", hashlib.sha256(weights.tobytes()).hexdigest()),)
    assert source.opset == 17
    assert source.notes == ("sparse initializer 's' was made dense",)
    assert [n.op_type for n in source.model.graph] == ["MatMul", "Add", "If", "Add"]
    assert not source.model.functions
    found = {use.where: use.tensor.numpy() for use in graph.tensors(source.model)}
    np.testing.assert_array_equal(found["initializer 'w'"], weights.reshape(4, 3))
    np.testing.assert_array_equal(found["initializer 's'"], np.array([1, 0, 2], np.float32))
    assert sum("_branch of If" in where for where in found) == 2


# --- versions, names, operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "ir_version"), [(7, 3), (8, 4), (13, 6), (17, 8), (21, 10), (25, 12), (26, 13)]
)
def test_versions_that_load(tmp_path: Path, opset: int, ir_version: int) -> None:
    inputs = [info("x", FLOAT, [2, 4]), *([info("w", FLOAT, [4, 3])] if ir_version < 4 else [])]
    source = load(write(tmp_path, model(opset=opset, ir_version=ir_version, inputs=inputs)))
    assert (source.opset, source.model.ir_version) == (opset, ir_version)


@pytest.mark.parametrize(
    ("opset", "ir_version", "word"),
    [(6, 3, "opset 6"), (27, 13, "opset 27"), (17, 14, "IR version 14"), (17, 2, "IR version 2")],
)
def test_versions_that_do_not(tmp_path: Path, opset: int, ir_version: int, word: str) -> None:
    refused(write(tmp_path, model(opset=opset, ir_version=ir_version)), word)


def test_opset_imports(tmp_path: Path) -> None:
    proto = model()
    del proto.opset_import[:]
    refused(write(tmp_path, proto), "opset imports")
    proto = model(imports={"ai.onnx": 18})
    refused(write(tmp_path, proto), "two versions")
    proto = model([node("Relu", ["x"], ["y"], domain="ai.onnx")], [])
    proto.opset_import[0].domain = "ai.onnx"
    assert load(write(tmp_path, proto)).opset == 17


IF = helper.make_graph([node("Neg", ["x"], ["q"])], "b", [], [info("q", FLOAT, None)])

BAD_GRAPHS: dict[str, tuple[ModelProto, tuple[str, ...]]] = {
    "cycle": (model([node("Add", ["x", "b"], ["a"], name="n1"), node("Neg", ["a"], ["b"], name="n2")], [], outputs=[info("b", FLOAT, None)]), ("n1", "'b'", "cycle")),
    "reads itself": (model([node("Add", ["x", "y"], ["y"], name="n1")], []), ("n1", "'y'", "cycle")),
    "not sorted": (model([node("Neg", ["a"], ["y"], name="n1"), node("Neg", ["x"], ["a"], name="n2")], []), ("n1", "n2", "'a'")),
    "dangling input": (model([node("Add", ["x", "nothing"], ["y"], name="n1")], []), ("n1", "'nothing'")),
    "dangling output": (model([node("Neg", ["x"], ["z"])], []), ("'y'",)),
    "name made twice": (model([node("Neg", ["x"], ["y"], name="n1"), node("Abs", ["x"], ["y"], name="n2")], []), ("n2", "'y'")),
    "makes an input": (model([node("Neg", ["x"], ["x"], name="n1")], [], outputs=[info("x", FLOAT, None)]), ("n1", "'x'")),
    "makes a weight": (model([node("Neg", ["x"], ["w"], name="n1")], outputs=[info("w", FLOAT, None)]), ("n1", "'w'")),
    "weight twice": (model(weights=[array("w", 4, 3), array("w", 4, 3)]), ("initializer 'w'", "twice")),
    "weight without name": (model(weights=[array("w", 4, 3), array("", 4, 3)]), ("no name",)),
    "input twice": (model(inputs=[info("x", FLOAT, [2, 4])] * 2), ("'x'", "twice")),
    "output twice": (model(outputs=[info("y", FLOAT, None)] * 2), ("'y'", "twice")),
    "input without type": (model(inputs=[onnx.ValueInfoProto(name="x")]), ("'x'", "type")),
    "unknown operator": (model([node("Frobnicate", ["x"], ["y"], name="n1")], []), ("n1", "Frobnicate", "opset 17")),
    "operator too new": (model([node("Gelu", ["x"], ["y"], name="n1")], []), ("n1", "Gelu", "opset 17")),
    "operator too old": (model([node("Upsample", ["x", "w"], ["y"], name="n1")]), ("n1", "Upsample")),
    "unknown domain": (model([node("Relu", ["x"], ["y"], name="n1", domain="acme")], [], imports={"acme": 1}), ("n1", "acme::Relu")),
    "unknown attribute": (model([node("Relu", ["x"], ["y"], name="n1", alpha=1.0)], []), ("alpha",)),
    "too many inputs": (model([node("Relu", ["x", "x"], ["y"], name="n1")], []), ("n1",)),
    "dtype of a weight": (model(weights=[array("w", 4, 3, dtype=np.float64)]), ("project", "inconsistent type")),
    "dtype an operator lacks": (model([node("Not", ["x"], ["y"], name="n1")], []), ("n1", "unsupported type")),
    "dtype of the output": (model(outputs=[info("y", INT64, [2, 3])]), ("elem type differs",)),
    "unnamed node": (model([node("Frobnicate", ["x"], ["y"])], []), ("'y'", "Frobnicate")),
    "in a branch": (
        model(
            [node("If", ["c"], ["y"], name="n1", then_branch=IF, else_branch=helper.make_graph([node("Neg", ["gone"], ["q"], name="n2")], "b", [], [info("q", FLOAT, None)]))],
            [],
            inputs=[info("x", FLOAT, [2]), info("c", BOOL, [])],
        ),
        ("n2", "'gone'", "else_branch of n1"),
    ),
    "outer value handed through": (
        model(
            [node("If", ["c"], ["y"], name="n1", then_branch=IF, else_branch=helper.make_graph([], "b", [], [info("x", FLOAT, None)]))],
            [],
            inputs=[info("x", FLOAT, [2]), info("c", BOOL, [])],
        ),
        ("'x'", "else_branch of n1"),
    ),
    "huge input": (model([node("Neg", ["x"], ["y"])], [], inputs=[info("x", FLOAT, [2**25, 2**25])]), ("'x'", "elements")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_bad_graph(tmp_path: Path, name: str) -> None:
    proto, words = BAD_GRAPHS[name]
    refused(write(tmp_path, proto), *words)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    data = model([node("Neg", ["x"], ["y"], name="NAME")], []).SerializeToString()
    refused(write(tmp_path, data.replace(b"NAME", b"\xff\xfe\xfd\xfc")), "UTF-8")


def nested(levels: int) -> bytes:
    """A model of If in If, made as bytes: protobuf's own writer stops where its reader does."""

    def field(number: int, data: bytes) -> bytes:
        return wire._tag(number, 2) + wire._encode(len(data)) + data

    body = model([node("Neg", ["x"], ["y"])], []).graph.SerializeToString()
    for _ in range(levels):
        attribute = field(1, b"then_branch") + field(6, body) + bytes([0xA0, 1, AttributeProto.GRAPH])
        body = field(1, field(1, b"c") + field(2, b"y") + field(4, b"If") + field(5, attribute)) + field(
            2, b"g"
        )
    return bytes([0x08, 8]) + field(7, body) + field(8, bytes([0x10, 17]))


@pytest.mark.parametrize("levels", [40, 5_000])
def test_deep_nesting(tmp_path: Path, levels: int) -> None:
    refused(write(tmp_path, nested(levels)))


def functions(count: int, calls: int) -> ModelProto:
    """count functions, each of which calls the next so many times."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    made = []
    for i in range(count):
        last = i == count - 1
        steps = [f"v{k}" for k in range(calls)] + ["r"]
        body = [
            node(f"F{i + 1}", [a], [b], domain="own")
            for a, b in zip(["p", *steps[1:-1]], steps[1:], strict=True)
        ]
        made.append(
            helper.make_function(
                "own", f"F{i}", ["p"], ["r"], [node("Neg", ["p"], ["r"])] if last else body, imports
            )
        )
    return model([node("F0", ["x"], ["y"], domain="own", name="n1")], [], imports={"own": 1}, functions=made)


def test_function_chain_bomb_and_cycle(tmp_path: Path) -> None:
    assert [n.op_type for n in load(write(tmp_path, functions(50, 1))).model.graph] == ["Neg"]
    assert len(load(write(tmp_path, functions(8, 2))).model.graph) == 2**7
    refused(write(tmp_path, functions(3000, 1)), "chain")
    refused(write(tmp_path, functions(60, 2)), f"{legal.MAX_NODES:,} nodes")
    proto = functions(3, 1)
    proto.functions[2].node[0].CopyFrom(node("F0", ["p"], ["r"], domain="own"))
    refused(write(tmp_path, proto), "own::F", "calls itself")
    proto = functions(2, 1)
    proto.functions.append(proto.functions[0])
    refused(write(tmp_path, proto), "own::F0", "twice")
    proto = functions(2, 1)
    proto.functions[1].node[0].input[0] = "gone"
    refused(write(tmp_path, proto), "'gone'", "function own::F1")
    proto = functions(2, 1)
    proto.graph.node[0].input.append("x")
    refused(write(tmp_path, proto), "n1", "2 inputs")


# --- tensors ------------------------------------------------------------------------------------------------------


def tensor(data_type: int = FLOAT, dims: tuple[int, ...] = (4, 3), **fields: Any) -> TensorProto:
    return TensorProto(name="w", data_type=data_type, dims=dims, **fields)


BAD_TENSORS: dict[str, tuple[TensorProto, tuple[str, ...]]] = {
    "too few bytes": (tensor(raw_data=bytes(47)), ("48", "47")),
    "too many bytes": (tensor(raw_data=bytes(49)), ("48", "49")),
    "no bytes": (tensor(), ("12", "0")),
    "2^50 elements": (tensor(dims=(2**25, 2**25), raw_data=bytes(4)), (f"{2**52:,}",)),
    "2^50 elements, no bytes": (tensor(dims=(2**25, 2**25)), (f"{2**50:,}",)),
    "more than any number": (tensor(dims=(2**62, 2**62)), ("impossible shape",)),
    "overflows to nothing": (tensor(dims=(2**32, 2**32, 0)), ("impossible shape",)),
    "negative size": (tensor(dims=(-4, -3), raw_data=bytes(48)), ("impossible shape",)),
    "rank 65": (tensor(dims=(1,) * 65, raw_data=bytes(4)), ("impossible shape",)),
    "too few numbers": (tensor(float_data=[1.0] * 11), ("12", "11")),
    "wrong field": (tensor(int64_data=[1] * 12), ("int64_data", "float_data")),
    "both fields": (tensor(raw_data=bytes(48), float_data=[1.0] * 12), ("twice",)),
    "unknown type": (tensor(data_type=99, raw_data=bytes(48)), ("element type 99",)),
    "no type": (tensor(data_type=0, raw_data=bytes(48)), ("element type 0",)),
    "int4 in whole bytes": (tensor(TensorProto.INT4, raw_data=bytes(12)), ("6", "12")),
    "odd int4": (tensor(TensorProto.INT4, dims=(5,), raw_data=bytes(2)), ("3", "2")),
    "strings as bytes": (tensor(TensorProto.STRING, raw_data=bytes(12)), ("12", "0")),
    "segments": (tensor(raw_data=bytes(48), segment=TensorProto.Segment(begin=0, end=1)), ("segments",)),
    "external and inside": (tensor(raw_data=bytes(48), data_location=TensorProto.EXTERNAL), ("as well",)),
    "external without place": (tensor(data_location=TensorProto.EXTERNAL), ("no location",)),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_bad_tensor(tmp_path: Path, name: str, place: str) -> None:
    bad, words = BAD_TENSORS[name]
    if place == "initializer":
        refused(write(tmp_path, model(weights=[bad])), "initializer 'w'", *words)
    else:
        constant = node("Constant", [], ["w"], name="k")
        constant.attribute.add(name="value", type=AttributeProto.TENSOR, t=bad)
        nodes = [constant, node("MatMul", ["x", "w"], ["y"])]
        refused(write(tmp_path, model(nodes, [])), "Constant node 'k'", *words)


def test_fields_of_every_type(tmp_path: Path) -> None:
    """What onnx itself writes, as raw bytes and as numbers, loads with the same values."""
    values = np.array([[0, 1, 1], [1, 0, 1]])
    weights = []
    for data_type in TensorProto.DataType.values():
        if data_type in (TensorProto.UNDEFINED, TensorProto.STRING) or data_type > TensorProto.INT2:
            continue
        dtype = helper.tensor_dtype_to_np_dtype(data_type)
        weights.append(numpy_helper.from_array(values.astype(dtype), f"raw{data_type}"))
        if data_type != TensorProto.FLOAT8E8M0:  # helper writes other numbers into it than it reads
            weights.append(
                helper.make_tensor(
                    f"typed{data_type}", data_type, (2, 3), values.ravel().astype(dtype).tolist()
                )
            )
    weights.append(helper.make_tensor("text", TensorProto.STRING, (2,), [b"a", b"b"]))
    proto = model([node("Neg", ["x"], ["y"])], weights, opset=25, ir_version=12)
    loaded = load(write(tmp_path, proto)).model.graph.initializers
    assert len(loaded) == len(weights)
    for name, value in loaded.items():
        assert value.const_value is not None
        if name.startswith(("raw", "typed")):
            want = numpy_helper.to_array(next(w for w in weights if w.name == name))
            np.testing.assert_array_equal(
                value.const_value.numpy().astype(np.complex64), want.astype(np.complex64)
            )


# --- external data ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with ``w.bin``, which holds what `model` needs, and another one beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w.bin").write_bytes(bytes(range(48)))
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "gone.bin"}, ("gone.bin", "missing")),
        ({"location": "../secret.bin"}, ("outside the model's folder",)),
        ({"location": "sub/../../secret.bin"}, ("outside the model's folder",)),
        ({"location": "/etc/passwd"}, ("outside the model's folder",)),
        ({"location": ""}, ("no usable name",)),
        ({"location": "a\0b"}, ("no usable name",)),
        ({"location": wire.HELD}, ("no usable name",)),
        ({"location": "."}, ("not a regular file",)),
        ({"location": "w.bin", "offset": 4}, ("cut short",)),
        ({"location": "w.bin", "offset": -4}, ("offset '-4'",)),
        ({"location": "w.bin", "offset": "four"}, ("offset 'four'",)),
        ({"location": "w.bin", "offset": 2**62}, ("cut short",)),
        ({"location": "w.bin", "offset": "9" * 30}, ("impossible offset",)),
        ({"location": "w.bin", "length": 44}, ("44", "48")),
        ({"location": "w.bin", "length": 52}, ("52", "48")),
        ({"location": "w.bin", "length": -1}, ("length '-1'",)),
    ],
)
@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_bad_external_data(folder: Path, entries: dict[str, Any], words: tuple[str, ...], place: str) -> None:
    if place == "initializer":
        proto = model(weights=[external(**entries)])
    else:
        proto = model(
            [node("Constant", [], ["w"], value=external(**entries)), node("MatMul", ["x", "w"], ["y"])], []
        )
    refused(write(folder, proto), "'w'", *words)


def test_external_data_of_a_function(folder: Path) -> None:
    body = [
        node("Constant", [], ["k"], value=external(location="../secret.bin")),
        node("MatMul", ["p", "k"], ["r"]),
    ]
    function = helper.make_function("own", "F", ["p"], ["r"], body, [helper.make_opsetid("", 17)])
    proto = model([node("F", ["x"], ["y"], domain="own")], [], imports={"own": 1}, functions=[function])
    refused(write(folder, proto), "outside the model's folder", "function own::F")
    function.node[0].attribute[0].t.external_data[0].value = "w.bin"
    proto = model([node("F", ["x"], ["y"], domain="own")], [], imports={"own": 1}, functions=[function])
    (use,) = graph.tensors(load(write(folder, proto)).model)
    assert use.tensor.tobytes() == bytes(range(48))


def test_external_fifo_and_device(folder: Path) -> None:
    os.mkfifo(folder / "fifo.bin")
    refused(write(folder, model(weights=[external(location="fifo.bin")])), "fifo.bin", "not a regular file")
    (folder / "zero.bin").symlink_to("/dev/zero")
    refused(write(folder, model(weights=[external(location="zero.bin")])), "zero.bin", "outside")


def test_links(folder: Path) -> None:
    path = write(folder, model(weights=[external(location="link.bin")]))
    (folder / "link.bin").symlink_to("w.bin")
    assert load(path).model.graph.initializers["w"].const_value.tobytes() == bytes(range(48))  # type: ignore[union-attr]
    (folder / "link.bin").unlink()
    (folder / "link.bin").symlink_to("../secret.bin")
    refused(path, "link.bin", "outside the model's folder")
    (folder / "link.bin").unlink()
    (folder / "link.bin").symlink_to("link.bin")
    refused(path, "link.bin")
    (folder / "link.bin").unlink()
    os.mkfifo(folder / "fifo.bin")
    (folder / "link.bin").symlink_to("fifo.bin")
    refused(path, "not a regular file")
    (folder / "sub").symlink_to("..")
    refused(write(folder, model(weights=[external(location="sub/secret.bin")])), "outside the model's folder")


def test_hard_links(folder: Path) -> None:
    path = write(folder, model(weights=[external(location="hard.bin")]))
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    refused(path, "hard.bin", "2 hard links", "--allow-hardlinks")
    source = load(path, allow_hardlinks=True)
    assert source.model.graph.initializers["w"].const_value.numpy().shape == (4, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("below", ["", "onnx"])
def test_hugging_face_cache(tmp_path: Path, below: str) -> None:
    """``snapshots/REV/model.onnx`` and its data are links into ``blobs``; a link elsewhere is refused there too."""
    cache = tmp_path / "models--acme--tiny"
    snapshot, blobs = cache / "snapshots" / "0123abcd" / below, cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "aaaa").write_bytes(model(weights=[external(location="model.onnx_data")]).SerializeToString())
    (blobs / "bbbb").write_bytes(bytes(range(48)))
    up = Path(*[".."] * (3 if below else 2))
    (snapshot / "model.onnx").symlink_to(up / "blobs" / "aaaa")
    (snapshot / "model.onnx_data").symlink_to(up / "blobs" / "bbbb")
    source = load(snapshot / "model.onnx")
    assert source.model.graph.initializers["w"].const_value.tobytes() == bytes(range(48))  # type: ignore[union-attr]
    assert source.weights == (("model.onnx_data", hashlib.sha256(bytes(range(48))).hexdigest()),)
    (tmp_path / "secret").write_bytes(bytes(48))
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").symlink_to(tmp_path / "secret")
    refused(snapshot / "model.onnx", "model.onnx_data", "outside")
    shutil.rmtree(blobs)
    refused(snapshot / "model.onnx")


def test_a_file_for_each_of_a_thousand_tensors(tmp_path: Path) -> None:
    """More small files than a process may have open, as old exporters write them; large ones are mapped."""
    resource = pytest.importorskip("resource")
    weights = [external(f"w{i}", location=f"w{i}.bin") for i in range(300)]
    for i in range(300):
        (tmp_path / f"w{i}.bin").write_bytes(bytes(48))
    path = write(tmp_path, model([node("Neg", ["x"], ["y"])], weights))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert len(load(path).weights) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_external_types_are_views_of_the_file(tmp_path: Path) -> None:
    """Every width, at odd offsets, without an offset, without a length; an empty tensor needs no bytes."""
    values = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "q": np.array([[-8, 7, 1], [0, 2, -3]], ml_dtypes.int4),
        "u": np.array([[3, 2, 1], [0, 2, 3]], ml_dtypes.uint2),
        "t": np.array([[True, False, True]]),
        "e": np.zeros((0, 5), np.float32),
    }
    tensors, data = [], b"\1"
    for name, value in values.items():
        proto = numpy_helper.from_array(value, name)
        length = len(proto.raw_data)
        entry = external(name, value.shape, location="w.bin", offset=len(data), length=length)
        entry.data_type = proto.data_type
        data += proto.raw_data
        tensors.append(entry)
    (tmp_path / "w.bin").write_bytes(data)
    path = write(tmp_path, model([node("Neg", ["x"], ["y"])], tensors, opset=25, ir_version=12))
    loaded = load(path).model
    for name, value in values.items():
        found = loaded.graph.initializers[name].const_value
        assert found is not None
        assert found.numpy().dtype == value.dtype
        np.testing.assert_array_equal(found.numpy(), value)
    copy = load(save_model(loaded, tmp_path, name="copy.onnx"))
    for name, value in values.items():
        np.testing.assert_array_equal(copy.model.graph.initializers[name].const_value.numpy(), value)  # type: ignore[union-attr]


# --- sparse, large, in memory -------------------------------------------------------------------------------------


def sparse(values: list[float], indices: Any, shape: list[int]) -> onnx.SparseTensorProto:
    indices = np.asarray(indices, np.int64)
    return helper.make_sparse_tensor(
        helper.make_tensor("w", FLOAT, [len(values)], values), numpy_helper.from_array(indices, "i"), shape
    )


@pytest.mark.parametrize("indices", [[1, 11], [[0, 1], [3, 2]]])
@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_sparse(tmp_path: Path, indices: Any, place: str) -> None:
    want = np.zeros((4, 3), np.float32)
    want[0, 1], want[3, 2] = 5, 6
    given = sparse([5.0, 6.0], indices, [4, 3])
    if place == "initializer":
        proto = model(weights=[])
        proto.graph.sparse_initializer.append(given)
    else:
        constant = node("Constant", [], ["w"], sparse_value=given)
        proto = model([constant, node("MatMul", ["x", "w"], ["y"])], [])
    source = load(write(tmp_path, proto))
    (use,) = graph.tensors(source.model)
    np.testing.assert_array_equal(use.tensor.numpy(), want)
    assert "made dense" in source.notes[0]
    again = onnx.load(save_model(source.model, tmp_path, name="again.onnx"))
    assert not again.graph.sparse_initializer


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (sparse([1.0], [12], [4, 3]), ("outside its shape",)),
        (sparse([1.0], [-1], [4, 3]), ("outside its shape",)),
        (sparse([1.0], [[0, 3]], [4, 3]), ("outside its shape",)),
        (sparse([1.0, 2.0], [1], [4, 3]), ("do not fit",)),
        (sparse([1.0], [0], [2**15, 2**15]), ("2 GiB",)),
        (sparse([1.0], [0], [2**40, 2**40]), ("2 GiB",)),
        (sparse([1.0], [0], [-4, -3]), ("impossible shape",)),
    ],
)
def test_bad_sparse(tmp_path: Path, given: onnx.SparseTensorProto, words: tuple[str, ...]) -> None:
    proto = model(weights=[])
    proto.graph.sparse_initializer.append(given)
    refused(write(tmp_path, proto), "sparse initializer 'w'", *words)


def test_large_arrays_inside_the_file_stay_there(tmp_path: Path) -> None:
    """What is larger than 64 KiB is found in the file's bytes and not parsed, in every place and both spellings."""
    raw, typed, inner = array("w", 300, 200), array("v", 200, 150), array("k", 150, 200)
    numbers = helper.make_tensor("v", FLOAT, [200, 150], numpy_helper.to_array(typed).ravel().tolist())
    then = helper.make_graph(
        [node("Constant", [], ["k"], value=inner), node("MatMul", ["b", "k"], ["q"])],
        "t",
        [],
        [info("q", FLOAT, None)],
    )
    other = helper.make_graph(
        [node("MatMul", ["b", "k2"], ["q"])], "e", [], [info("q", FLOAT, None)], [array("k2", 150, 200)]
    )
    proto = model(
        [
            node("MatMul", ["x", "w"], ["a"]),
            node("MatMul", ["a", "v"], ["b"]),
            node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        ],
        [raw, numbers],
        inputs=[info("x", FLOAT, [1, 300]), info("c", BOOL, [])],
    )
    data = proto.SerializeToString()
    light = wire.lighten(data)
    assert len(light) < 2000
    source = load(write(tmp_path, data))
    found = {use.name or "k": use.tensor for use in graph.tensors(source.model)}
    for want in (raw, typed, inner, array("k2", 150, 200)):
        tensor = found[want.name]
        assert tensor.tobytes() == want.raw_data
        assert not tensor.numpy().flags.owndata
    # Written again and parsed by onnx itself, it is the same model, the numbers as bytes.
    back = onnx.load(save_model(source.model, tmp_path, name="again.onnx"))
    assert back.graph.initializer[0].raw_data == raw.raw_data
    assert back.graph.initializer[1].raw_data == typed.raw_data
    load(tmp_path / "again.onnx")


def test_field_numbers_are_those_of_onnx() -> None:
    for (message, number), child in wire.CHILDREN.items():
        field = getattr(onnx, message).DESCRIPTOR.fields_by_number[number]
        assert field.message_type.name == child
    names = {number: TensorProto.DESCRIPTOR.fields_by_number[number].name for number in wire.DATA}
    assert names == {4: "float_data", 9: "raw_data", 10: "double_data"}
    reachable = {
        (m.name, f.number)
        for m in _messages()
        for f in m.fields
        if f.message_type and f.message_type.name in _holders()
    }
    assert reachable - {("TrainingInfoProto", 1), ("TrainingInfoProto", 2), ("ModelProto", 20)} == set(
        wire.CHILDREN
    )


def _messages() -> list[Any]:
    return list(ModelProto.DESCRIPTOR.file.message_types_by_name.values())


def _holders() -> set[str]:
    """Messages that can hold a tensor, at any depth."""
    holders = {"TensorProto"}
    while True:
        more = {
            m.name for m in _messages() for f in m.fields if f.message_type and f.message_type.name in holders
        }
        if more <= holders:
            return holders
        holders |= more


def test_a_model_in_memory(tmp_path: Path) -> None:
    """Left as it was; small, large, external and lazy tensors all come through."""
    (tmp_path / "w.bin").write_bytes(bytes(range(48)))
    large = np.random.default_rng(0).standard_normal((3, 700)).astype(np.float32)
    proto = model(
        [node("MatMul", ["x", "w"], ["a"], name="same"), node("MatMul", ["a", "v"], ["y"], name="same")],
        [external(location="w.bin"), numpy_helper.from_array(large, "v")],
    )
    given = ir.load(write(tmp_path, proto))
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(large), dtype=ir.DataType.FLOAT, shape=ir.Shape(large.shape), name="v"
    )
    given.graph.initializers["v"].const_value = lazy
    source = load(given)
    assert source.path == Path()
    assert len(source.sha256) == 64
    assert source.sha256 == load(given).sha256
    np.testing.assert_array_equal(source.model.graph.initializers["v"].const_value.numpy(), large)  # type: ignore[union-attr]
    assert source.model.graph.initializers["w"].const_value.tobytes() == bytes(range(48))  # type: ignore[union-attr]
    assert [n.name for n in source.model.graph] == ["same", "same_2"]
    assert [n.name for n in given.graph] == ["same", "same"]
    assert given.graph.initializers["v"].const_value is lazy
    given.graph.initializers["v"].const_value = ir.Tensor(large + 1, name="v")
    assert load(given).sha256 != source.sha256
    (tmp_path / "w.bin").write_bytes(bytes(20))
    with pytest.raises(ModelError, match=r"the model: .*cut short"):
        load(ir.load(tmp_path / "m.onnx"))


# --- functions and names ------------------------------------------------------------------------------------------


def run(proto: ModelProto, **feeds: Any) -> list[Any]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(proto).run(None, feeds)


def test_functions_are_inlined_and_compute_the_same(tmp_path: Path) -> None:
    """Defaults, references to attributes, an input handed through, outputs left out, calls in calls and in branches."""
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    leaky = node("LeakyRelu", ["p"], ["t"], name="inner")
    leaky.attribute.add(name="alpha", ref_attr_name="slope", type=AttributeProto.FLOAT)
    two = helper.make_function(
        "own", "Two", ["p", "unused"], ["r", "p"],
        [leaky, node("Dropout", ["t"], ["r", ""], name="inner2")], imports, attributes=[], attribute_protos=[helper.make_attribute("slope", 0.5)],
    )  # fmt: skip
    outer = helper.make_function(
        "own", "Outer", ["p"], ["r"],
        [node("Two", ["p"], ["a"], domain="own"), node("Two", ["a"], ["b", "c"], domain="own", slope=0.25), node("Add", ["b", "c"], ["r"])], imports,
    )  # fmt: skip
    then = helper.make_graph([node("Outer", ["t"], ["q"], domain="own")], "t", [], [info("q", FLOAT, None)])
    other = helper.make_graph([node("Neg", ["t"], ["q"])], "e", [], [info("q", FLOAT, None)])
    proto = model(
        [
            node("Outer", ["x"], ["t"], domain="own", name="inner"),
            node("Two", ["t"], ["u", "handed"], domain="own"),
            node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        ],
        [],
        inputs=[info("x", FLOAT, [2, 4]), info("c", BOOL, [])],
        outputs=[info("y", FLOAT, None), info("handed", FLOAT, None), info("u", FLOAT, None)],
        imports={"own": 1},
        functions=[two, outer],
    )
    source = load(write(tmp_path, proto))
    assert not source.model.functions
    assert source.notes == ()
    assert [o.name for o in source.model.graph.outputs] == ["y", "handed", "u"]
    assert [i.name for i in source.model.graph.inputs] == ["x", "c"]
    names = [n.name for _, n in graph.nodes(source.model) if n.name]
    assert len(names) == len(set(names))
    values = [o.name for _, n in graph.nodes(source.model) for o in n.outputs if o.name]
    assert len(values) == len(set(values))
    flat = onnx.load(save_model(source.model, tmp_path, name="flat.onnx"))
    load(tmp_path / "flat.onnx")
    assert not any(o for n in flat.graph.node if n.op_type == "Dropout" for o in n.output[1:])
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)

    def leaky(value: Any, slope: float) -> Any:
        return np.where(value < 0, value * np.float32(slope), value)

    def twice(value: Any) -> Any:
        return leaky(leaky(value, 0.5), 0.25) + leaky(value, 0.5)

    for c in (True, False):
        y, handed, u = run(flat, x=x, c=np.array(c))
        np.testing.assert_array_equal(handed, twice(x))
        np.testing.assert_array_equal(u, leaky(twice(x), 0.5))
        np.testing.assert_array_equal(y, twice(twice(x)) if c else -twice(x))


def test_function_of_another_opset(tmp_path: Path) -> None:
    """Inlined where the operators are the same in both versions; else left, with those it calls, and said."""

    def made(op: str) -> ModelProto:
        newer = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        inner = helper.make_function(
            "own", "Inner", ["p"], ["r"], [node("Neg", ["p"], ["r"])], [helper.make_opsetid("", 17)]
        )
        outer = helper.make_function(
            "own",
            "F",
            ["p"],
            ["r"],
            [node(op, ["p"], ["a"]), node("Inner", ["a"], ["r"], domain="own")],
            newer,
        )
        return model(
            [node("F", ["x"], ["y"], domain="own")], [], imports={"own": 1}, functions=[outer, inner]
        )

    source = load(write(tmp_path, made("Relu")))
    assert [n.op_type for n in source.model.graph] == ["Relu", "Neg"]
    refused(write(tmp_path, made("ReduceMax")), "ReduceMax", "version 18")


def test_functions_that_are_left(tmp_path: Path) -> None:
    """What cannot be inlined stays, with what it calls, and is said."""
    newer = [
        helper.make_opsetid("", 17),
        helper.make_opsetid("com.microsoft", 2),
        helper.make_opsetid("own", 1),
    ]
    inner = helper.make_function("own", "Inner", ["p"], ["r"], [node("Neg", ["p"], ["r"])], newer[:1])
    steps = [node("Gelu", ["p"], ["a"], domain="com.microsoft"), node("Inner", ["a"], ["r"], domain="own")]
    outer = helper.make_function("own", "F", ["p"], ["r"], steps, newer)
    calls = [node("F", ["x"], ["a"], domain="own"), node("Inner", ["a"], ["y"], domain="own")]
    proto = model(calls, [], imports={"own": 1, "com.microsoft": 1}, functions=[outer, inner])
    source = load(write(tmp_path, proto))
    assert [n.op_type for n in source.model.graph] == ["F", "Inner"]
    assert len(source.model.functions) == 2
    assert "own::F was left" in source.notes[0]
    assert "opset 2 of com.microsoft" in source.notes[0]
    assert "own::Inner was left" in source.notes[1]


def test_many_calls_take_linear_time(tmp_path: Path) -> None:
    body = [node("Neg", ["p"], ["a"], name="n"), node("Abs", ["a"], ["r"], name="m")]
    function = helper.make_function("own", "F", ["p"], ["r"], body, [helper.make_opsetid("", 17)])
    calls = [node("F", [f"v{i}"], [f"v{i + 1}"], domain="own") for i in range(4000)]
    proto = model(
        calls,
        [],
        inputs=[info("v0", FLOAT, [2])],
        outputs=[info("v4000", FLOAT, [2])],
        imports={"own": 1},
        functions=[function],
    )
    assert len(load(write(tmp_path, proto)).model.graph) == 8000


def test_an_input_that_is_an_output(tmp_path: Path) -> None:
    """Each side keeps its own declaration."""
    inputs = [info("x", FLOAT, [2, 4]), info("z", FLOAT, ["n", None])]
    proto = model(inputs=inputs, outputs=[info("y", FLOAT, None), info("z", FLOAT, ["m", 5])])
    loaded = load(write(tmp_path, proto)).model
    back = onnx.load(save_model(loaded, tmp_path, name="again.onnx"))
    assert list(back.graph.input) == inputs
    assert back.graph.output[1] == proto.graph.output[1]


def test_odd_but_valid(tmp_path: Path) -> None:
    """Metadata, doc strings, unicode and slashes in names, equal node names, a name that shadows, sizes of -1."""
    then = helper.make_graph([node("Neg", ["x"], ["a"])], "", [], [info("a", FLOAT, None)])
    other = helper.make_graph(
        [node("Add", ["x", "<b>&"], ["q"])], "e", [], [info("q", FLOAT, None)], [array("<b>&", 2)]
    )
    nodes = [
        node("Add", ["x", "<b>&"], ["größe/1:0"], name="n"),
        node("If", ["c"], ["a"], name="n", then_branch=then, else_branch=other),
        node("Neg", ["a"], ["y"], name="n"),
    ]
    x = info("x", FLOAT, ["größe"])
    proto = model(
        nodes,
        [array("<b>&", 2)],
        inputs=[x, info("c", BOOL, [])],
        outputs=[info("y", FLOAT, None), info("größe/1:0", FLOAT, [-1])],
    )
    proto.metadata_props.add(key="schlüssel", value="<script>")
    proto.doc_string, proto.producer_name, proto.domain, proto.model_version = "über", "me", "d", 7
    proto.graph.doc_string = "graph"
    proto.graph.metadata_props.add(key="k", value="v")
    # The branch's own 'a' hides nothing it reads, so it is merely renamed.
    source = load(write(tmp_path, proto))
    back = onnx.load(save_model(source.model, tmp_path, name="again.onnx"))
    assert [o.name for o in back.graph.output] == ["y", "größe/1:0"]
    assert back.graph.input[0] == x
    assert (back.doc_string, back.producer_name, back.domain, back.model_version) == ("über", "me", "d", 7)
    assert (back.ir_version, list(back.opset_import)) == (8, list(proto.opset_import))
    assert back.metadata_props == proto.metadata_props
    assert back.graph.metadata_props == proto.graph.metadata_props
    assert [n.name for n in back.graph.node] == ["n", "n_2", "n_3"]
    inner = [n.output[0] for a in back.graph.node[1].attribute for n in a.g.node]
    assert len({*inner, *(o for n in back.graph.node for o in n.output)}) == 5
    data = np.ones(2, np.float32)
    for c in (True, False):
        for a, b in zip(run(proto, x=data, c=np.array(c)), run(back, x=data, c=np.array(c)), strict=True):
            np.testing.assert_array_equal(a, b)
