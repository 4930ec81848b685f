"""all-MiniLM-L6-v2 the whole way: what is found, identity at full rank, `svd` against `svd-plain`, and the published folder.

The recipe writes to `build/models/minilm`, which is used again when it is there.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

import lrcompile

pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

TABLE = "embeddings.word_embeddings"
MATMULS = r"encoder\.layer\..*/MatMul"


@pytest.fixture(scope="module")
def child() -> Iterator[lrcompile.Child]:
    with lrcompile.Child() as child:
        yield child


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("minilm")


def embeddings(model: Path, data: Path) -> np.ndarray:
    """The pooled `sentence_embedding` of every row: rows of like length together, cut to the longest."""
    session = ort.InferenceSession(model)
    with np.load(data) as arrays:
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
    lengths = mask.sum(1)
    made = np.empty((len(ids), 384), np.float32)
    for rows in np.array_split(np.argsort(lengths, kind="stable"), len(ids) // 16):
        longest = int(lengths[rows].max())
        feed = {"input_ids": ids[rows, :longest], "attention_mask": mask[rows, :longest]}
        made[rows] = session.run(["sentence_embedding"], feed)[0]
    return made


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over rows; rows have length 1."""
    return float(np.mean(np.einsum("ij,ij->i", a.astype(np.float64), b.astype(np.float64))))


def small(data: Path, target: Path, rows: int) -> Path:
    """Some rows of a data file, spread over it."""
    with np.load(data) as arrays:
        step = len(arrays["input_ids"]) // rows
        np.savez(target, **{name: array[::step][:rows] for name, array in arrays.items()})
    return target


def test_what_is_found(minilm: Path) -> None:
    sites = lrcompile.find(lrcompile.load(minilm / "model.onnx").model).sites
    assert all(site.refusal is None for site in sites)
    assert sum(site.op == "MatMul" for site in sites) == 36
    tables = [site for site in sites if site.op == "Gather"]
    assert (30522, 384) in [site.weight_shape for site in tables]
    assert [site.name for site in tables if site.name.startswith(TABLE)] == [f"{TABLE}/Gather"]


def test_full_rank_changes_nothing(minilm: Path, work: Path, child: lrcompile.Child) -> None:
    """On text, every site rewritten, the word table too."""
    heldout = small(minilm / "heldout.npz", work / "small.npz", 32)
    options = lrcompile.Options(
        budget=lrcompile.Budget(rank="full"), verify_data=heldout, cache=work / "cache-full"
    )
    result = lrcompile.compile(minilm / "model.onnx", work / "full", options, child=child)
    assert result.evidence.verdict == "passed"
    rewritten = [s for s in result.manifest["sites"] if s["method"] != "dense"]
    assert len(rewritten) == 36 + 3
    for name, figures in result.evidence.outputs:
        sys.stdout.write(f"MiniLM --rank full, {name}: relative L2 {figures.relative_l2:.2e}\n")
        assert figures.relative_l2 < 1e-5


def test_the_default_against_svd_plain_on_two_layers(
    minilm: Path, work: Path, child: lrcompile.Child
) -> None:
    """The first two of six layers, pooled: measured 0.9965 and 0.9949 against 0.900 and 0.902."""
    compare(shallow(minilm / "model.onnx", work / "shallow.onnx", 2), minilm, work, child, 12)
    judge(work / "shallow.onnx", minilm, work, {"heldout": 0.99, "heldout_other": 0.985}, margin=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_against_svd_plain(minilm: Path, work: Path, child: lrcompile.Child) -> None:
    compare(minilm / "model.onnx", minilm, work, child, 36)
    judge(minilm / "model.onnx", minilm, work, {"heldout": 0.93, "heldout_other": 0.88}, margin=0.2)


def shallow(source: Path, target: Path, layers: int) -> Path:
    """The model without the layers behind these: what the last of them gives is pooled."""
    model = ir.load(source)
    made = {node.name: node.outputs[0] for node in model.graph}
    last, kept = (made[f"encoder.layer.{i}.output.LayerNorm/LayerNormalization"] for i in (5, layers - 1))
    last.name, kept.name = f"{last.name}_of_all", last.name
    ir.convenience.replace_all_uses_with(last, kept, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(model)
    ir.save(model, target)
    return target


def compare(model: Path, data: Path, work: Path, child: lrcompile.Child, linear: int) -> None:
    """`--keep 0.75` on the MatMul, calibrated on 32 rows, by `auto` and by `svd-plain`, published in folders of these names.

    The whole data is `tests/e2e/test_accuracy.py`'s.
    """
    few = small(data / "calib.npz", work / "calib.npz", 32)
    verify = small(data / "heldout.npz", work / "few.npz", 16)
    for method, given in {"auto": few, "svd-plain": None}.items():
        options = lrcompile.Options(
            budget=lrcompile.Budget(keep=0.75),
            methods=(method,),
            data=given,
            verify_data=verify,
            cache=work / "cache-keep",
            force=True,
        )
        result = lrcompile.compile(model, work / method, options, child=child)
        rewritten = {s["name"] for s in result.manifest["sites"] if s["method"] != "dense"}
        assert rewritten and all(re.fullmatch(MATMULS, name) for name in rewritten)
        sites = [s for s in result.manifest["sites"] if s["op"] == "MatMul"]
        assert len(sites) == linear
        kept = sum(s["parameters_after"] for s in sites) / sum(s["parameters_before"] for s in sites)
        assert 0.73 < kept <= 0.75


def judge(model: Path, data: Path, work: Path, least: Mapping[str, float], margin: float) -> None:
    """Both on two texts that were not calibrated on; and what is published runs without us."""
    for text, floor in least.items():
        rows = small(data / f"{text}.npz", work / f"{text}.npz", 64)
        want = embeddings(model, rows)
        found = {m: cosine(want, embeddings(work / m / "model.onnx", rows)) for m in ("auto", "svd-plain")}
        sys.stdout.write(f"{model.name} --keep 0.75, {text}: cosine {found}\n")
        assert found["auto"] >= floor
        assert found["auto"] >= found["svd-plain"] + margin

    # What is published needs nothing beside it.
    out = work / "auto"
    command = [
        *(str(Path(sys.executable).with_name("polygraphy")), "run", str(out / "model.onnx"), "--onnxrt"),
        *("--load-inputs", str(out / "inputs.json"), "--load-outputs", str(out / "outputs.json")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "PASSED" in done.stdout
