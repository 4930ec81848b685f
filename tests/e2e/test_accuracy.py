"""How close outputs stay at a given size, on real models, whole calibration data and two texts: what `docs/accuracy.md` tabulates.

Slow: each model is studied once (the cache is shared), then compiled at every budget.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lrcompile
from tests.e2e.test_minilm import cosine, embeddings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def child() -> Iterator[lrcompile.Child]:
    with lrcompile.Child() as child:
        yield child


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accuracy")


def compiled(
    minilm: Path, work: Path, child: lrcompile.Child, name: str, **given: object
) -> lrcompile.Result:
    options = lrcompile.Options(
        data=minilm / "calib.npz",
        verify_data=minilm / "heldout.npz",
        cache=work / "cache",
        force=True,
        **given,
    )  # type: ignore[arg-type]
    return lrcompile.compile(minilm / "model.onnx", work / name, options, child=child)


def cosines(minilm: Path, published: Path) -> tuple[float, float]:
    """On the other half of the calibration text, and on docstrings."""
    texts = [minilm / "heldout.npz", minilm / "heldout_other.npz"]
    same, other = (
        cosine(embeddings(minilm / "model.onnx", t), embeddings(published / "model.onnx", t)) for t in texts
    )
    return same, other


@pytest.mark.parametrize(
    ("keep", "methods", "least"),
    [
        (0.9, ("auto",), (0.990, 0.985)),
        (0.75, ("auto",), (0.968, 0.945)),
        (0.5, ("auto",), (0.905, 0.85)),
        (0.75, ("svd",), (0.94, 0.90)),
    ],
)
def test_keep(
    minilm: Path,
    work: Path,
    child: lrcompile.Child,
    keep: float,
    methods: tuple[str, ...],
    least: tuple[float, float],
) -> None:
    name = f"keep-{keep}-{methods[0]}"
    result = compiled(minilm, work, child, name, budget=lrcompile.Budget(keep=keep), methods=methods)
    sites = [s for s in result.manifest["sites"] if s["op"] == "MatMul"]
    assert sum(s["parameters_after"] for s in sites) <= keep * sum(s["parameters_before"] for s in sites)
    same, other = cosines(minilm, work / name)
    sys.stdout.write(f"MiniLM {name}: cosine {same:.4f} same text, {other:.4f} docstrings\n")
    assert same >= least[0] and other >= least[1]


def test_an_error_limit(minilm: Path, work: Path, child: lrcompile.Child) -> None:
    budget = lrcompile.Budget(max_error=(lrcompile.Limit("cosine", 0.99),))
    result = compiled(minilm, work, child, "limit", budget=budget)
    assert result.evidence.verdict == "passed"
    assert all(figures.cosine >= 0.99 for _, figures in result.evidence.outputs)
    assert result.tradeoff is not None
    assert result.totals.bytes_after < result.totals.bytes_before
    sys.stdout.write(f"MiniLM cosine=0.99: {result.tradeoff}\n")
