"""Fused operators: kinds and counts, fusions that are kept or dropped, and onnxscript's on real attention."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile import fused
from lrcompile.curves import decision_of
from lrcompile.errors import BuildError
from lrcompile.factorize import factorize
from lrcompile.graph import reached_from
from lrcompile.interfaces import BuildOptions, CandidateOptions
from lrcompile.lower import lower
from lrcompile.records import Plan
from lrcompile.registry import factorization, runtime_of
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from lrcompile_runtimes import _ort_nodes
from tests.graphs import model, node, normal

CPU = "CPUExecutionProvider"


def ran(**counts: int) -> dict[str, int]:
    return {f"{op} (com.microsoft) on {CPU}": count for op, count in counts.items()}


# --- counts -------------------------------------------------------------------------------------------------------


def test_a_key_goes_there_and_back() -> None:
    key = "MatMul (ai.onnx) on CPUExecutionProvider"
    assert fused.Ran.of(key) == fused.Ran("MatMul", "ai.onnx", CPU)
    assert str(fused.Ran.of(key)) == key
    with pytest.raises(AssertionError, match="MatMul"):
        fused.Ran.of("MatMul")


@pytest.mark.parametrize(
    ("before", "after", "lost"),
    [
        ({"Attention": 2}, {"MultiHeadAttention": 2}, ()),
        ({"Attention": 2}, {"MultiHeadAttention": 1}, ("attention: 2 before, 1 after",)),
        ({"SkipLayerNormalization": 2}, {"LayerNormalization": 2}, ("skip normalization: 2 before, 0 after",)),
        ({"LayerNormalization": 2}, {"SkipLayerNormalization": 2}, ()),
        ({"BiasGelu": 1}, {"Gelu": 1}, ("GELU with bias: 1 before, 0 after",)),
        ({"FusedMatMul": 3}, {"MultiHeadAttention": 1, "FusedMatMul": 1}, ()),
        ({"FusedMatMul": 3}, {"MultiHeadAttention": 1}, ("fused product: 3 before, 0 after",)),
        ({"BiasGelu": 1}, {"Gelu": 1, "DynamicQuantizeMatMul": 1}, ()),
        ({"BiasGelu": 2}, {"Gelu": 2, "MatMulIntegerToFloat": 1}, ("GELU with bias: 2 before, 0 after",)),
        ({"MatMulNBits": 3}, {}, ()),
    ],
)  # fmt: skip
def test_what_counts_as_fewer(
    before: Mapping[str, int], after: Mapping[str, int], lost: tuple[str, ...]
) -> None:
    assert fused.fewer(ran(**before), ran(**after)) == lost


def test_a_factored_table_has_no_norm_that_embeds() -> None:
    before, after = ran(EmbedLayerNormalization=1, SkipLayerNormalization=2), ran(SkipLayerNormalization=2)
    after |= ran(LayerNormalization=1)
    assert len(fused.fewer(before, after)) == 2
    assert fused.fewer(before, after, factored_table=True) == ()
    assert fused.fewer(before, ran(SkipLayerNormalization=2), factored_table=True) == (
        "normalization: 3 before, 2 after",
    )


# --- the step -----------------------------------------------------------------------------------------------------


class Renaming:
    """Every operator `old` becomes `new`."""

    name = "renaming"

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def __call__(self, made: ir.Model) -> int:
        found = [n for n in made.graph if n.op_type == self.old]
        for n in found:
            n.op_type = self.new
        return len(found)


def nodes_of(made: ir.Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for n in made.graph:
        if n.op_type == "Nope":
            raise BuildError("no kernel for Nope")
        key = f"{n.op_type} ({n.domain or 'ai.onnx'}) on {CPU}"
        counts[key] = counts.get(key, 0) + 1
    return counts


def gelu(op: str = "Gelu") -> ir.Model:
    return model([node(op, ["x"], ["y"])], {"x": (2,)}, ["y"], opset=20)


def test_fusions_are_applied_where_fewer_operators_are_fused() -> None:
    lowered = gelu("Erf")
    made = fused.fuse(lowered, [Renaming("Erf", "Gelu")], ran(Gelu=1), nodes_of)
    assert (made.applied, made.lost) == ((("renaming", 1),), ())
    assert [n.op_type for n in made.model.graph] == ["Gelu"]
    assert [n.op_type for n in lowered.graph] == ["Erf"]


def test_fusions_are_left_out_where_nothing_is_lost_unless_asked_for() -> None:
    renaming = Renaming("Gelu", "FastGelu")
    assert fused.fuse(gelu(), [renaming], ran(Gelu=1), nodes_of).applied == ()
    assert fused.fuse(gelu(), [renaming], ran(Gelu=1), nodes_of, always=True).applied == (("renaming", 1),)
    assert fused.fuse(gelu(), [], ran(Gelu=1), nodes_of, always=True).applied == ()


def test_fusions_that_the_runtime_refuses_or_that_cost_others_are_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for bad in ("Nope", "Relu"):
        lowered = gelu()
        made = fused.fuse(lowered, [Renaming("Gelu", bad)], ran(Gelu=2), nodes_of, always=True)
        assert made.model is lowered
        assert made.applied == ()
        assert made.lost == ("GELU: 2 before, 1 after",)
    assert "no kernel for Nope" in caplog.text


# --- ONNX Runtime's ------------------------------------------------------------------------------------------------

WIDTH, HEADS, SIZE = 32, 4, 8


def attention(opset: int = 20, packed: bool = False) -> ir.Model:
    """Self-attention with biases behind a norm, as torch exports it, and a residual norm; batch and sequence stay open.

    packed: queries, keys and values come of one product that is split.
    """
    constants = {"g": normal(WIDTH) + 2, "b": normal(WIDTH), "heads": np.array([0, 0, HEADS, SIZE])}
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["n"], axis=-1)]
    if packed:
        constants |= {"wqkv": normal(WIDTH, 3 * WIDTH) / 6, "bqkv": normal(3 * WIDTH, seed=9)}
        nodes += [
            node("MatMul", ["n", "wqkv"], ["p0"]),
            node("Add", ["p0", "bqkv"], ["p1"]),
            node("Split", ["p1"], ["q1", "k1", "v1"], axis=-1, num_outputs=3),
        ]
    for i, name in enumerate("qkv"):
        if not packed:
            constants |= {f"w{name}": normal(WIDTH, WIDTH, seed=i) / 6, f"b{name}": normal(WIDTH, seed=i + 9)}
            nodes += [
                node("MatMul", ["n", f"w{name}"], [f"{name}0"]),
                node("Add", [f"{name}0", f"b{name}"], [f"{name}1"]),
            ]
        nodes += [
            node("Reshape", [f"{name}1", "heads"], [f"{name}2"]),
            node("Transpose", [f"{name}2"], [f"{name}3"], perm=[0, 2, 1, 3]),
        ]
    constants |= {
        "scale": np.float32(SIZE**-0.5),
        "flat": np.array([0, 0, WIDTH]),
        "wo": normal(WIDTH, WIDTH) / 6,
    }
    nodes += [
        node("Transpose", ["k3"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["q3", "kt"], ["s"]),
        node("Mul", ["s", "scale"], ["s1"]),
        node("Softmax", ["s1"], ["p"], axis=-1),
        node("MatMul", ["p", "v3"], ["c"]),
        node("Transpose", ["c"], ["c1"], perm=[0, 2, 1, 3]),
        node("Reshape", ["c1", "flat"], ["c2"]),
        node("MatMul", ["c2", "wo"], ["o"]),
        node("Add", ["x", "o"], ["r"]),
        node("LayerNormalization", ["r", "g", "b"], ["y"], axis=-1),
    ]  # fmt: skip
    made = model(nodes, {"x": ("batch", "sequence", WIDTH)}, ["y"], constants, opset=opset)
    made.graph.outputs[0].shape = ir.Shape(["batch", "sequence", WIDTH])
    return made


def rms_norm() -> ir.Model:
    """x + a MatMul, and a root-mean-square norm that nothing is added to, as torch exports it."""
    nodes = [
        node("Pow", ["x", "two"], ["s"]),
        node("ReduceMean", ["s", "axes"], ["m"], keepdims=1, noop_with_empty_axes=0),
        node("Add", ["m", "eps"], ["e"]),
        node("Sqrt", ["e"], ["q"]),
        node("Reciprocal", ["q"], ["i"]),
        node("Mul", ["x", "i"], ["n"]),
        node("Mul", ["g", "n"], ["y"]),
    ]
    constants = {
        "two": np.float32(2), "axes": np.array([-1]), "eps": np.array(1e-6, np.float32), "g": normal(WIDTH),
    }  # fmt: skip
    made = model(nodes, {"x": ("batch", WIDTH)}, ["y"], constants, opset=20)
    made.graph.outputs[0].shape = ir.Shape(["batch", WIDTH])
    return made


def fusion() -> fused.Rewrite:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (only,) = runtime_of("ort-cpu").fusions("ort-cpu")
    return only


def engine_nodes(made: ir.Model, folder: Path) -> dict[str, int]:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    ir.save(made, path)
    with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu")) as engine:
        return dict(engine.nodes())


def run(made: ir.Model, feed: np.ndarray, folder: Path) -> np.ndarray:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    ir.save(made, path)
    with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu", optimize=False)) as engine:
        return np.asarray(engine.run({"x": feed})["y"])


def test_attention_and_norms_are_fused_and_compute_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, made = fusion(), attention()
    plain = made.clone()
    assert apply(made) > 0
    operators = {n.op_type for n in made.graph}
    assert operators & {"Attention", "MultiHeadAttention"}
    assert "SkipLayerNormalization" in operators
    assert "Softmax" not in operators
    assert [str(v.shape) for v in (*made.graph.inputs, *made.graph.outputs)] == ["[batch,sequence,32]"] * 2
    for shape in ((1, 1, WIDTH), (2, 5, WIDTH), (3, 17, WIDTH)):
        x = normal(*shape)
        want, got = run(plain, x, tmp_path), run(made, x, tmp_path)
        # sums of 32 float32 products in another order, after a norm: a few units of 6e-8
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["svd-plain", "pivoted"])
def test_packed_queries_keys_and_values_stay_packed(method: str, tmp_path: Path) -> None:
    """One weight that a Split follows becomes one chain before that Split, and as much is fused around it."""
    apply, made = fusion(), attention(packed=True)
    before = [engine_nodes(made, tmp_path)]
    (group,) = (g for g in find(made).groups if [s.weight for s in g.sites] == ["wqkv"])
    chosen, weights = factorization(method), ModelWeights(Cache(tmp_path / "cache"), 20)
    (candidate,) = chosen.candidates(group, weights, None, CandidateOptions(ranks=(8,)))
    plan = Plan("ort-cpu", (decision_of(group, candidate, ""),))
    sets = factorize(plan, {group.name: group}, weights, None, {method: chosen}, 0)
    ours = lower(rewrite(made, sets), ())
    plain, x = ours.clone(), normal(2, 5, WIDTH)
    after = [engine_nodes(ours, tmp_path)]
    assert apply(made) and apply(ours)
    before.append(engine_nodes(made, tmp_path))
    after.append(engine_nodes(ours, tmp_path))
    assert list(map(fused.kinds, after)) == list(map(fused.kinds, before))
    assert fused.kinds(after[1])["attention"] == 1
    (split,) = (n for n in ours.graph if n.op_type == "Split")
    products = [n for n in ours.graph if n.op_type == "MatMul" and "lrcompile.method" in n.metadata_props]
    assert len(products) == 2 and products[1].inputs[0] is products[0].outputs[0]
    assert split in reached_from(ours, products[1:])
    np.testing.assert_allclose(run(ours, x, tmp_path), run(plain, x, tmp_path), rtol=0, atol=1e-5)


def test_what_it_makes_is_legal_onnx_and_says_who_made_it(tmp_path: Path) -> None:
    apply, made = fusion(), rms_norm()
    plain = made.clone()
    assert apply(made) == 1
    onnx.checker.check_model(ir.to_proto(made))
    assert all(not n.domain for n in made.graph)
    ran = engine_nodes(made, tmp_path)
    assert fused.kinds(ran) == {"normalization": 1}
    assert fused.kinds(engine_nodes(plain, tmp_path)) == {}  # ONNX Runtime alone does not see it
    x = normal(3, WIDTH)
    np.testing.assert_allclose(run(made, x, tmp_path), run(plain, x, tmp_path), rtol=1e-6, atol=1e-6)
    block = attention()
    apply(block)
    assert {n.metadata_props.get("lrcompile.fusion", "") != "" for n in block.graph if n.domain} == {True}


def test_a_library_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    apply = fusion()
    core = pytest.importorskip("onnxscript.rewriter.ort_fusions._core")

    def crash(made: ir.Model) -> None:
        made.graph.remove(next(n for n in made.graph if n.op_type == "Softmax"))
        raise KeyError("planted")

    def rename(made: ir.Model) -> tuple[ir.Model, dict[str, int]]:
        made.graph.inputs[0].shape = ir.Shape([1, 1, WIDTH])
        return made, {"planted": 1}

    for planted, said in ((crash, "planted"), (rename, "its inputs changed")):
        monkeypatch.setattr(core, "fuse_xformers", planted)
        made = attention()
        before = [(n.op_type, n.name) for n in made.graph]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert apply(made) == 0
        assert [(n.op_type, n.name) for n in made.graph] == before
        assert str(made.graph.inputs[0].shape) == "[batch,sequence,32]"
        assert said in caplog.text


def test_a_weight_that_a_caller_may_override_is_not_taken_for_a_constant() -> None:
    apply, made = fusion(), attention()
    weight = made.graph.initializers["wq"]
    made.graph.inputs.append(weight)
    assert apply(made) == 0


def test_an_engine_counts_what_it_fused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["h", "b"], ["s"]), node("Gelu", ["s"], ["y"])]
    made = model(nodes, {"x": ("n", 3, 4)}, ["y"], {"w": normal(4, 5), "b": normal(5)}, opset=20)
    found = engine_nodes(made, tmp_path)
    assert found == {f"BiasGelu (com.microsoft) on {CPU}": 1, f"MatMul (ai.onnx) on {CPU}": 1}
    path = tmp_path / "0.onnx"
    with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu", optimize=False)) as engine:
        assert sum(engine.nodes().values()) == 3
    with runtime_of("reference").build(path, BuildOptions("reference")) as engine:
        assert engine.nodes()["Gelu (ai.onnx) on reference"] == 1


@pytest.mark.parametrize("external", [False, True])
def test_counting_writes_no_weights(external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    made = model(nodes, {"x": ("n", 300)}, ["y"], {"w": normal(300, 400)}, opset=20)
    path, folder = tmp_path / "model.onnx", tmp_path / "temporary"
    onnx.save(ir.to_proto(made), path, save_as_external_data=external, location="w.bin")
    assert (tmp_path / "w.bin").is_file() == external
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    opened, written = _ort_nodes.open_session, list[int]()

    def open_session(*args: Any) -> Any:
        session = opened(*args)
        written.append(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
        return session

    monkeypatch.setattr(_ort_nodes, "open_session", open_session)
    with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu")) as engine:
        found = engine.nodes()
        monkeypatch.setattr(os, "devnull", str(folder / "kept"))
        assert engine.nodes() == found
    assert written[0] < 1000
    assert written[1] > 4 * 300 * 400  # what would be written elsewhere
    assert sorted(f.name for f in folder.iterdir()) == ["kept"]
