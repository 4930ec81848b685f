"""The graphsurgeon door: what goes through comes out unchanged, what a script does is done, and weights stay on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

from lrcompile import LowRankPass, surgeon
from lrcompile.errors import ModelError, UsageError
from lrcompile.load import load
from lrcompile.load.tensors import every_graph
from lrcompile.options import Options
from lrcompile.records import Budget, Source
from tests.odd_graphs import corpus

SCRIPTS = """
import onnx_graphsurgeon as gs

def nothing(graph): pass

def copy(graph): return graph.copy()

def touch(graph):
    print("scripts may print")
    for body in (graph, *graph.subgraphs(recursive=True)):
        things = [*body.tensors().values(), *(v for n in body.nodes for v in n.attrs.values())]
        assert all(t.values is not None for t in things if isinstance(t, gs.Constant))
"""
COUNT = 80  # one of nearly every feature of the family


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Source]:
    """A script's body, run on a model: ``g`` is the graph."""

    def run(model: onnx.ModelProto, code: str) -> Source:
        onnx.save(model, tmp_path / "model.onnx")
        lines = "".join(f"    {line}\n" for line in code.splitlines())
        (tmp_path / "s.py").write_text(
            f"import onnx_graphsurgeon as gs\nimport numpy as np\ndef f(g):\n{lines}"
        )
        return surgeon.scripted(load(tmp_path / "model.onnx"), f"{tmp_path / 's.py'}:f")

    return run


def model(dtype: Any = np.float32) -> onnx.ModelProto:
    """y = Relu(x W) V, with W and V of 8 KB each, x of type `dtype`."""
    rng = np.random.default_rng(0)
    w = ir.tensor(rng.standard_normal((32, 64)).astype(dtype), name="w")
    v = ir.tensor(rng.standard_normal((64, 32)).astype(dtype), name="v")
    kind = int(w.dtype)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="second"),
    ]
    nodes[2].metadata_props.add(key="who", value="me")
    ports = [helper.make_tensor_value_info(n, kind, ["batch", 32]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [ir.to_proto(w), ir.to_proto(v)])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made.metadata_props.add(key="author", value="me")
    return made


def form(model: ir.Model) -> dict[str, Any]:
    """All that a model says, but for constants that nobody reads, which graphsurgeon drops."""
    proto = ir.to_proto(model)
    read = {v.name for v in (*proto.graph.input, *proto.graph.output)}
    for body, _ in every_graph(proto):
        read |= {name for node in body.node for name in node.input}
        for node in body.node:
            for attribute in node.attribute:
                if not attribute.t.name:
                    attribute.t.ClearField("name")  # absent and empty are the same
            node.attribute.sort(key=lambda a: a.name)
    for body, _ in every_graph(proto):
        if isinstance(body, onnx.GraphProto):
            for field in (body.initializer, body.value_info):
                kept = sorted((t for t in field if t.name in read), key=lambda t: t.name)
                kept = [type(t).FromString(t.SerializeToString()) for t in kept]
                del field[:]
                field.extend(kept if field is body.initializer else [])
    return {field.name: value for field, value in proto.ListFields()}


@pytest.mark.parametrize("script", ["nothing", "copy", "touch"])
def test_a_script_that_changes_nothing(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the family of odd graphs: interface, metadata, bodies, functions, values, versions are all as they were."""
    (tmp_path / "scripts.py").write_text(SCRIPTS)
    for graph in corpus(5, COUNT):
        onnx.save(graph.model, tmp_path / "model.onnx")
        source = load(tmp_path / "model.onnx")
        before = form(source.model)
        made = surgeon.scripted(source, f"{tmp_path / 'scripts.py'}:{script}")
        assert form(made.model) == before, graph.label
        assert form(source.model) == before, graph.label
        assert (made.sha256, made.weights) == (source.sha256, source.weights)
        assert made.key != source.key
    assert capsys.readouterr().out == ""


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    """Looked at or not: the very tensors that loading made, which are views of the mapped file when they are large."""
    (tmp_path / "scripts.py").write_text(SCRIPTS)
    source = load(ir.from_proto(model()))
    for script in ("nothing", "touch"):
        made = surgeon.scripted(source, f"{tmp_path / 'scripts.py'}:{script}")
        for name, value in source.model.graph.initializers.items():
            assert made.model.graph.initializers[name].const_value is value.const_value


def test_new_values_renamed_copied_and_removed_weights(run: Callable[..., Source]) -> None:
    made = run(
        model(),
        "first, relu, second = g.nodes\n"
        "w = first.inputs[1]\n"
        "w.values = w.values * 2\n"
        "v = second.inputs[1]\n"
        "second.inputs[1] = copied = v.copy()\n"
        "copied.name = 'v_copy'\n"
        "out = gs.Variable('z', np.float32, ['batch', 32])\n"
        "g.nodes.append(gs.Node('MatMul', 'third', inputs=[relu.outputs[0], v], outputs=[out]))\n"
        "g.outputs.append(out)\n"
        "w.name = 'w_renamed'\n"
        "return g",
    ).model
    before = {t.name: onnx.numpy_helper.to_array(t) for t in model().graph.initializer}
    after = {
        name: value.const_value.numpy()
        for name, value in made.graph.initializers.items()
        if value.const_value
    }
    assert set(after) == {"w_renamed", "v", "v_copy"}
    np.testing.assert_array_equal(after["w_renamed"], before["w"] * 2)
    np.testing.assert_array_equal(after["v"], before["v"])
    np.testing.assert_array_equal(after["v_copy"], before["v"])
    assert [n.name for n in made.graph] == ["first", "relu", "second", "third"]
    assert dict(made.graph.node(2).metadata_props) == {"who": "me"}
    assert dict(made.metadata_props) == {"author": "me"}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types(run: Callable[..., Source], dtype: Any) -> None:
    made = run(model(dtype), "w = g.tensors()['w']\nw.values = w.values * w.values.dtype.type(2)").model
    before = ir.from_proto(model(dtype)).graph.initializers
    after = made.graph.initializers
    assert after["w"].dtype == before["w"].dtype
    np.testing.assert_array_equal(after["w"].const_value.numpy(), before["w"].const_value.numpy() * dtype(2))  # type: ignore[union-attr]
    np.testing.assert_array_equal(after["v"].const_value.numpy(), before["v"].const_value.numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [4, 400])  # in the graph, and outside of it
def test_four_bits(run: Callable[..., Source], rows: int) -> None:
    """graphsurgeon raises when it writes 4-bit values that were looked at."""
    array = (np.arange(rows * 8) % 16 - 8).reshape(rows, 8).astype(ml_dtypes.int4)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
            helper.make_node("MatMul", ["x", "d"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])],
        [ir.to_proto(ir.tensor(array, name="q")), helper.make_tensor("s", TensorProto.FLOAT, (), [0.5])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for code, wanted in (
        ("g.tensors()['q'].values", array),
        ("q = g.tensors()['q']\nq.values = q.values[::-1]", array[::-1]),
    ):
        value = run(proto, code).model.graph.initializers["q"].const_value
        assert value is not None
        assert value.dtype == ir.DataType.INT4
        np.testing.assert_array_equal(value.numpy().astype(np.int8), wanted.astype(np.int8))


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("raise KeyError('layer 7')", UsageError, "s.py:f failed: KeyError: 'layer 7'"),
        ("return 3", UsageError, "returned a int, not a graph"),
        ("g.nodes.reverse()", ModelError, "that --gs-script s.py:f made is not legal"),
        ("g.nodes[0].op = 'NoSuchOperator'", ModelError, "NoSuchOperator"),
        ("g.nodes[1].attrs['alpha'] = object()", ModelError, "graphsurgeon cannot export the graph"),
        ("g.nodes[0].inputs[1] = gs.Variable('ghost')", ModelError, "ghost"),
    ],
)
def test_what_goes_wrong_is_one_line(
    run: Callable[..., Source], code: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        run(model(), code)
    assert "\n" not in str(raised.value)


def test_a_script_needs_a_function() -> None:
    source = load(ir.from_proto(model()))
    assert surgeon.scripted(source, None) is source
    with pytest.raises(UsageError, match=r"write FILE\.py:FUNCTION"):
        surgeon.scripted(source, "s.py")


def test_passes_on_a_graph(tmp_path: Path) -> None:
    graph = gs.import_onnx(model())
    options = Options(methods=("svd",), budget=Budget(rank="full"), cache=tmp_path)
    made = surgeon.apply(graph, LowRankPass(options), CommonSubexpressionEliminationPass())
    assert [n.op for n in graph.nodes] == ["MatMul", "Relu", "MatMul"]
    assert [n.op for n in made.nodes] == ["MatMul", "MatMul", "Relu", "MatMul", "MatMul"]
    onnx.checker.check_model(
        gs.export_onnx(made), full_check=True
    )  # by graphsurgeon's own exporter: values are whole
    product = made.nodes[0].inputs[1].values @ made.nodes[1].inputs[1].values
    np.testing.assert_allclose(product, graph.nodes[0].inputs[1].values, atol=1e-5)


def test_a_graph_made_by_hand() -> None:
    """No IR version is given, and two bodies read one array."""
    weight = gs.Constant("w", np.eye(40, dtype=np.float32))
    branches = {}
    for name in ("then_branch", "else_branch"):
        out = gs.Variable(f"{name}_out", np.float32)
        body = gs.Graph(
            [gs.Node("Add", inputs=[weight, weight], outputs=[out])], [], [out], name=name, opset=17
        )
        branches[name] = body
    condition, y = gs.Variable("c", np.bool_, []), gs.Variable("y", np.float32, [40, 40])
    graph = gs.Graph([gs.Node("If", "if", branches, [condition], [y])], [condition], [y], opset=17)
    made = surgeon.to_model(graph)
    assert list(made.graph.initializers) == ["w"]  # once, where both branches see it
    assert load(made).opset == 17
