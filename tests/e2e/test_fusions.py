"""Fused operators of real models: never fewer after factorization than before, with ONNX Runtime's own fusions and with ours.

What is fused depends on the graph alone, so factors are made up: every group that a method takes, at a low rank or half the width.
``python tests/e2e/test_fusions.py minilm smollm2`` prints the table of docs/fusions.md.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lrcompile import fused
from lrcompile.curves import knows
from lrcompile.factors import FactorSet
from lrcompile.interfaces import Array, BuildOptions, Factorization, Factors
from lrcompile.load import load
from lrcompile.lower import lower
from lrcompile.records import Candidate, Cost, Decision, Group
from lrcompile.registry import factorization, runtime_of
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.weights import storage_of
from tests.recipes import exported

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torch")

TARGET = "ort-cpu"
METHODS = ("svd-plain", "pivoted", "slicing")
ATTENTIONS = {"minilm": 6, "tiny_vlm": 2, "tiny_llama": 2, "smollm2": 30}  # that onnxscript fuses
RANK = 8


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """A model as it is and fused by `Runtime.fusions`, and what runs of both."""

    model: ir.Model
    nodes: Mapping[str, int]
    fused: fused.Fused

    @classmethod
    def of(cls, model: ir.Model) -> Counted:
        seen: list[Mapping[str, int]] = []

        def nodes_of(made: ir.Model) -> Mapping[str, int]:
            with tempfile.TemporaryDirectory() as folder:
                path = saved(made, Path(folder))
                with runtime_of(TARGET).build(path, BuildOptions(TARGET)) as engine:
                    seen.append(engine.nodes())
            return seen[-1]

        made = fused.fuse(model, runtime_of(TARGET).fusions(TARGET), {}, nodes_of, always=True)
        return cls(model, seen[0], made)


def saved(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "model.onnx", external_data="weights.bin")
    return folder / "model.onnx"


def feed_of(folder: Path) -> dict[str, Array]:
    """Two short rows of the calibration data."""
    first = folder / "calib.npz"
    with np.load(first if first.is_file() else min((folder / "calib").glob("*.npz"))) as arrays:
        return {name: a[:2, :16] if a.ndim == 2 else a[:2] for name, a in arrays.items()}


def made_up(group: Group, method: Factorization, seed: int) -> FactorSet:
    """Random factors of the shapes that the method promises, biases and kept channels with them."""
    width = group.width
    rank = width.size // 2 if width is not None and method.name == "slicing" else RANK
    promised = method.shapes(group, Candidate(method.name, rank, Cost(0, 0, 0), 1.0))
    rng, storage = np.random.default_rng(seed), storage_of(group.sites[0])
    arrays: dict[str, Array] = {
        n: s if isinstance(s, np.ndarray) else (rng.standard_normal(s) / np.sqrt(s[0])).astype(storage.numpy())
        for n, s in promised.items()
    }  # fmt: skip
    if method.name == "slicing":
        assert width is not None
        half = np.arange(rank // 2)
        kept = np.concatenate([half, half + width.size // 2]) if width.planes else np.arange(rank)
        arrays["kept"] = kept.astype(np.int32)
        for i, site in enumerate(group.sites):
            if site.bias is not None:
                arrays[f"bias.{i}"] = np.zeros(arrays[f"weight.{i}"].shape[1])
    n = group.elements
    decision = Decision(
        group.name, tuple(s.name for s in group.sites), method.name, rank, None, None, False, n, n, 0, 0, 0, 0, "",
    )  # fmt: skip

    def given() -> Factors:
        return arrays

    return FactorSet(
        decision, group, method, storage, {n: a.shape for n, a in arrays.items()}, 0.0, given,
        frozenset(n for n, a in arrays.items() if a.dtype.kind == "i"),
    )  # fmt: skip


@functools.cache
def dense(name: str) -> Counted:
    """As it is, but for the target's own lowering, which keeps sums apart from norms: with that the factored ones are compared."""
    return Counted.of(lower(ir.load(exported(name) / "model.onnx"), runtime_of(TARGET).lowering(TARGET)))


def factored(name: str, method: str) -> tuple[Counted, tuple[FactorSet, ...]]:
    """The model with every group rewritten that the method takes, the larger groups first."""
    model, chosen = load(exported(name) / "model.onnx").model, factorization(method)
    taken, sets = set[str](), list[FactorSet]()
    for group in sorted(find(model).groups, key=lambda g: -len(g.sites)):
        names = {site.name for site in group.sites}
        small = method != "slicing" and any(min(s.K, s.N) <= RANK for s in group.sites)
        if knows(chosen, group) and chosen.serves(group) is None and not small and not names & taken:
            taken |= names
            sets.append(made_up(group, chosen, len(sets)))
    lowered = lower(rewrite(model, sets), runtime_of(TARGET).lowering(TARGET))
    return Counted.of(lowered), tuple(sets)


def outputs(model: ir.Model, feed: Mapping[str, Array], folder: Path) -> Mapping[str, Array]:
    folder.mkdir()
    with runtime_of(TARGET).build(saved(model, folder), BuildOptions(TARGET)) as engine:
        return engine.run(feed)


def check(name: str, method: str, work: Path) -> None:
    before, (after, sets) = dense(name), factored(name, method)
    if method == "svd-plain":
        assert any(len(s.group.sites) == 3 for s in sets), "no queries, keys and values share a factor"
    table = any(site.kind == "lookup" for s in sets for site in s.group.sites)
    assert fused.fewer(before.nodes, after.nodes, table) == ()
    assert fused.fewer(before.nodes, after.fused.nodes, table) == ()
    assert fused.fewer(before.fused.nodes, after.fused.nodes, table) == ()
    assert fused.kinds(after.fused.nodes)["attention"] == ATTENTIONS[name]
    # the comparison can fail: without its fusions the model has fewer than with them
    assert fused.fewer(after.fused.nodes, after.nodes)
    feed = feed_of(exported(name))
    plain = outputs(after.model, feed, work / "plain")
    for output, got in outputs(after.fused.model, feed, work / "fused").items():
        # float32 sums in another order, through all layers
        largest = float(np.abs(plain[output]).max())
        np.testing.assert_allclose(got, plain[output], rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["tiny_vlm", "tiny_llama"])
def test_tiny_models(name: str, method: str, tmp_path: Path) -> None:
    check(name, method, tmp_path)


@pytest.mark.parametrize("method", ["svd-plain", "pivoted", pytest.param("slicing", marks=pytest.mark.slow)])
def test_minilm(method: str, tmp_path: Path) -> None:
    check("minilm", method, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_smollm2(method: str, tmp_path: Path) -> None:
    check("smollm2", method, tmp_path)


def main() -> None:
    for name in sys.argv[1:] or ATTENTIONS:
        for method in ("dense", *METHODS):
            found = dense(name) if method == "dense" else factored(name, method)[0]
            for what, nodes in (("as loaded", found.nodes), ("fused", found.fused.nodes)):
                sys.stdout.write(f"{name} {method} | {what} | {sum(nodes.values())} | {fused.kinds(nodes)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
