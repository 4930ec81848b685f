"""Export of small torch and transformers models: interface, names, dimensions, files, refusals."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lrcompile.errors import LrcompileError, ModelError, PluginError, UsageError
from lrcompile.export import export
from lrcompile.export import names as export_names

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

MAKE = """
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24, bias=False), nn.Linear(24, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, scale):
        for layer in self.layers:
            x = layer(x)
        return {"y": x * scale}


def make():
    torch.manual_seed(0)
    return Net(), (torch.ones(2, 3, 8), torch.ones(8)), {"x": {0: "batch", 1: "rows"}}


def without_inputs():
    return Net()


def flat():
    return nn.Flatten(0), (torch.ones(2, 3),), {"input": {1: "columns"}}


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 2 else x * 3


def branch():
    return Branch(), (torch.ones(2, 3),), {"x": {0: "batch"}}


def broken():
    raise RuntimeError("no weights here")


not_callable = 3
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "net.py"
    path.write_text(MAKE)
    return path


@pytest.fixture(scope="module")
def net(recipe: Path) -> Path:
    return export(f"{recipe}:make", recipe.parent / "deep" / "net.onnx")


def shapes(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in values}


def test_module_interface_names_and_numbers(recipe: Path, net: Path) -> None:
    graph = ir.load(net).graph
    assert shapes(graph.inputs) == {"x": ["batch", "rows", 8], "scale": [8]}
    assert shapes(graph.outputs) == {"y": ["batch", "rows", 8]}
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    for layer in ("layers.0", "layers.1"):
        assert f"{layer}.up/MatMul" in names
        assert graph.initializers[f"{layer}.up.weight.T"].shape == (8, 24)
        assert graph.initializers[f"{layer}.down.weight.T"].shape == (24, 8)

    module = sys.modules["lrcompile_make_net"].make()[0]
    x = np.random.default_rng(0).standard_normal((5, 1, 8)).astype(np.float32)
    scale = np.arange(8, dtype=np.float32)
    (got,) = ort.InferenceSession(net).run(None, {"x": x, "scale": scale})
    want = module(torch.from_numpy(x), torch.from_numpy(scale))["y"].detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_same_bytes_twice_and_no_paths_inside(recipe: Path, net: Path, tmp_path: Path) -> None:
    again = export(f"{recipe}:make", tmp_path / "other.onnx")
    assert again.read_bytes() == net.read_bytes()
    for trace in (b"File ", b"site-packages", str(recipe.parent).encode(), b"graph_signature"):
        assert trace not in net.read_bytes()


def test_weights_above_the_limit_go_to_one_file(
    recipe: Path, net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("lrcompile.export"), "_INLINE_LIMIT", 100)
    path = export(f"{recipe}:make", tmp_path / "big.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    inline, external = (ir.load(p).graph.initializers for p in (net, path))
    assert list(inline) == list(external)
    for name in inline:
        np.testing.assert_array_equal(inline[name].const_value.numpy(), external[name].const_value.numpy())


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("without_inputs", UsageError, "example inputs"),
        ("branch", ModelError, "fixes it at 2"),
        ("broken", PluginError, "no weights here"),
        ("not_callable", UsageError, "no function 'not_callable'"),
        ("absent", UsageError, "no function 'absent'"),
    ],
)
def test_refusals_of_make(
    recipe: Path, tmp_path: Path, function: str, error: type[LrcompileError], words: str
) -> None:
    with pytest.raises(error, match=words):
        export(f"{recipe}:{function}", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_inputs_by_position_take_the_names_of_forward(recipe: Path, tmp_path: Path) -> None:
    graph = ir.load(export(f"{recipe}:flat", tmp_path / "m.onnx")).graph
    assert shapes(graph.inputs) == {"input": [2, "columns"]}


def test_refusals_of_paths(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "broken.gguf").write_bytes(b"not a gguf file")
    (tmp_path / "folder").mkdir()
    for model, error, words in (
        ("nowhere", UsageError, "no such file or folder"),
        ("nowhere.py:make", UsageError, "no such file"),
        (str(tmp_path / "model.bin"), UsageError, "cannot export this file"),
        (str(tmp_path / "folder"), ModelError, "config.json is missing"),
        (str(tmp_path / "broken.gguf"), ModelError, "cannot load it"),
    ):
        with pytest.raises(error, match=words):
            export(model, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="float8"):
        export(str(tmp_path / "folder"), tmp_path / "m.onnx", dtype="float8")


def test_axes_of_inputs_that_are_not_there(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"axes name the inputs \['z'\]"):
        export(f"{recipe}:make", tmp_path / "m.onnx", axes={"z": {0: "batch"}})


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(PluginError, match=r'onnxscript: pip install "lrcompile\[torch\]"'):
        export(tmp_path, tmp_path / "m.onnx")


# -- transformers ------------------------------------------------------------------------------------------------------


def tiny_bert() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        ),
        add_pooling_layer=True,
    ).eval()


def test_encoder_folder(tmp_path: Path) -> None:
    bert = tiny_bert()
    bert.save_pretrained(tmp_path / "bert")
    path = export(tmp_path / "bert", tmp_path / "bert.onnx")
    graph = ir.load(path).graph
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert shapes(graph.inputs) == {name: ["batch", "sequence"] for name in names}
    assert shapes(graph.outputs) == {
        "last_hidden_state": ["batch", "sequence", 32],
        "pooler_output": ["batch", 32],
    }
    assert "encoder.layer.0.attention.self.query/MatMul" in {node.name for node in graph}
    assert "encoder.layer.0.attention.self.query.weight.T" in graph.initializers

    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(64, size=(3, 7)),
        "attention_mask": (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int64),
        "token_type_ids": rng.integers(2, size=(3, 7)),
    }
    got = ort.InferenceSession(path).run(["pooler_output"], feed)[0]
    with torch.no_grad():
        want = bert(**{k: torch.from_numpy(v) for k, v in feed.items()}).pooler_output.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_weights_that_transformers_would_invent_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_bert().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 weights of BertModel are missing, such as encoder\.layer\.0\.output"
    ):
        export(tmp_path, tmp_path / "m.onnx")


# -- names, on graphs built by hand ------------------------------------------------------------------------------------


def test_numbers_and_sums_among_symbols(caplog: pytest.LogCaptureFixture) -> None:
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape(["s1", "16", "s7"]))
    y = ir.val("y", ir.DataType.FLOAT, ir.Shape(["s1", "s7 + s3", "2*s7"]))
    past = ir.val("past", ir.DataType.FLOAT, ir.Shape(["s3", None, 4, "s5", "s5*s7"]))
    total = ir.val("total", ir.DataType.FLOAT, ir.Shape(["s9", "2*s9", "u0"]))
    nodes = [ir.node("Foo", [x, past, total], outputs=[y])]
    graph = ir.Graph([x, past, total], [y], nodes=nodes, opset_imports={"": 20}, name="g")
    graph.metadata_props["pkg.torch.export.ExportedProgram.range_constraints"] = (
        "{s5: VR[4, 4], s1: VR[2, 9]}"
    )
    model = ir.Model(graph, ir_version=10)
    axes = {"x": {0: "batch", 2: "sequence"}, "past": {0: "past"}, "total": {0: "past + sequence"}}
    export_names.name_dimensions(model, axes)
    assert shapes(model.graph.inputs) == {
        "x": ["batch", 16, "sequence"],
        "past": ["past", None, 4, 4, "4*sequence"],
        "total": ["past + sequence", "2*(past + sequence)", "u0"],
    }
    assert shapes(model.graph.outputs) == {"y": ["batch", "past + sequence", "2*sequence"]}
    assert caplog.messages == ["dimension batch: the model was traced for sizes up to 9"]


def test_node_names_are_unique_without_module_paths() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape([2]))
    first = ir.node("Relu", [x], metadata_props={export_names.SCOPES: "['', 'body', 'relu']"})
    second = ir.node("Relu", first.outputs, metadata_props={export_names.SCOPES: "['', 'body', 'relu_1']"})
    third = ir.node("Relu", second.outputs)
    model = ir.Model(ir.Graph([x], third.outputs, nodes=[first, second, third], name="g"), ir_version=10)
    export_names.name_nodes(model)
    assert [node.name for node in model.graph] == ["body/Relu", "body/Relu_1", "Relu"]
