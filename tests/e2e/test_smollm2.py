"""SmolLM2-135M the whole way: what is found, identity at full rank, perplexity at three budgets, and memory.

The recipe writes to `build/models/smollm2`, which is used again when it is there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lrcompile
from lrcompile.store import check_folder
from tests.e2e.test_big import compiled, limit
from tests.recipes import exported

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

METRIC = f"{ROOT / 'models' / 'perplexity.py'}:perplexity"
BOUND = limit(49152, 576)  # the table


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder with model.onnx, calib/, heldout/ and heldout_other/."""
    return exported("smollm2")


def test_what_is_found(smollm2: Path) -> None:
    finding = lrcompile.find(lrcompile.load(smollm2 / "model.onnx").model)
    assert all(site.refusal is None for site in finding.sites)
    parts = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
    blocks = [s for s in finding.sites if re.fullmatch(rf"model\.layers\.\d+\.({parts})/MatMul", s.name)]
    assert len(blocks) == len({s.name for s in blocks}) == 210
    (tied,) = (group for group in finding.units if group.kind == "tied")
    assert sorted(site.op for site in tied.sites) == ["Gather", "MatMul"]
    assert len(finding.sites) == 210 + 2
    assert len({site.weight for site in finding.sites}) == 211


def test_full_rank_changes_nothing(smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "0000.npz").write_bytes((smollm2 / "heldout" / "0000.npz").read_bytes())
    log = compiled(smollm2 / "model.onnx", tmp_path, f"rank=full verify_data={folder}", BOUND)
    document = check_folder(tmp_path / "out")
    assert sum(site["method"] != "dense" for site in document["sites"]) == 212, log[-2000:]
    error = document["evidence"]["outputs"]["logits"]["relative_l2"]
    sys.stdout.write(f"SmolLM2 --rank full: relative L2 of the logits {error:.2e}\n")
    assert error < 1e-4


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all budgets: the model is studied once."""
    return tmp_path_factory.mktemp("perplexity")


@pytest.mark.parametrize(("keep", "most"), [(0.9, 1.15), (0.8, 1.40), (0.6, 2.4)])
def test_perplexity(smollm2: Path, work: Path, keep: float, most: float) -> None:
    """Calibrated on half of the language reference, judged on the other half."""
    tokens = 0
    for path in (smollm2 / "calib").glob("*.npz"):
        with np.load(path) as feed:
            tokens += feed["input_ids"].size
    assert tokens >= 10_000
    shutil.rmtree(work / "out", ignore_errors=True)
    options = f"keep={keep} data=calib verify_data=heldout metric={METRIC}"
    log = compiled(smollm2 / "model.onnx", work, options, BOUND)
    before, after = _metric(log)
    sys.stdout.write(
        f"SmolLM2 --keep {keep}, {tokens} tokens, heldout: perplexity {before:.2f} -> {after:.2f}\n"
    )
    assert after <= most * before
    # On another source: printed, not judged.
    sys.stdout.write(
        "SmolLM2 --keep {}, heldout_other: perplexity {:.2f} -> {:.2f}\n".format(
            keep, *_other(smollm2, work / "out")
        )
    )


def _metric(log: str) -> tuple[float, float]:
    found = re.search(r"^metric: \(([\d.]+), ([\d.]+)\)", log, re.M)
    assert found is not None, log[-2000:]
    return float(found[1]), float(found[2])


def _other(smollm2: Path, out: Path) -> tuple[float, float]:
    """Perplexity of the original and of the published model on docstrings, each in a process of its own."""
    code = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import numpy as np, onnxruntime as ort
from perplexity import perplexity
options = ort.SessionOptions(); options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[2], options)
feeds = [dict(np.load(path)) for path in sorted(Path(sys.argv[3]).glob("*.npz"))]
print(perplexity(lambda feed: {"logits": session.run(["logits"], feed)[0]}, feeds))
"""
    scores = []
    for model in (smollm2, out):
        command = [
            sys.executable,
            "-c",
            code,
            str(ROOT / "models"),
            str(model / "model.onnx"),
            str(smollm2 / "heldout_other"),
        ]
        scores.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return scores[0], scores[1]
