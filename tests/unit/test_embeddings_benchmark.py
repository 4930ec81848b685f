"""`benchmarks/embeddings.py`: its reference points and its bytes, on numbers that can be checked by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from lrcompile.records import InputStatistics, Site
from lrcompile.registry import factorization
from lrcompile.sites import find
from tests.graphs import Array, model, node, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("embeddings")


class Seen:
    """A hundred lookups, most of them of the first row."""

    def of(self, site: Site) -> InputStatistics:
        return InputStatistics(
            100, frequencies=np.full(40, 1 / 40) if site.K == 40 else np.array([0.7, 0.1, 0.1, 0.1])
        )

    def key(self, site: Site) -> str:
        return "seen"


def lab_of(W: Array) -> SimpleNamespace:
    made = model([node("Gather", ["w", "ids"], ["y"])], {"ids": (("n",), np.int64)}, ["y"], {"w": W})
    return SimpleNamespace(
        finding=find(made), weights=weights(), statistics=lambda kind: Seen(), seed=0, model=made
    )


def test_int4_is_rounded_by_hand(script: ModuleType) -> None:
    """A scale is a seventh of the largest of 32 numbers, and no number is further from its own than half a scale."""
    W = np.zeros((4, 64), np.float32)
    W[:, 0], W[:, 1], W[:, 40] = 7.0, 1.4, 0.5
    lab = lab_of(W)
    row = script.quantized(lab, script.table_of(lab), 4, 32)
    table = row.sets[0].load()["w"]
    # the scale of the first block is 1, of the second 0.5 / 7, which float16 rounds by at most one in 2048
    assert table[0, :2].tolist() == [7.0, 1.0]
    assert table[0, 40] == pytest.approx(0.5, rel=1 / 2048)
    assert row.size == pytest.approx((4 * 64 / 2 + 2 * 8) / (4 * 4 * 64))
    assert row.error == pytest.approx(0.4 / np.sqrt(49 + 1.96 + 0.25), rel=1e-3)


def test_a_form_within_the_bytes_is_chosen(script: ModuleType) -> None:
    W = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    lab = lab_of(W)
    group, plain = script.table_of(lab), factorization("svd-plain")
    row = script.best(lab, group, plain, 0.75)
    assert row.kept == pytest.approx(8 * (40 + 16) / 640)  # ranks go by eights
    assert row.size == row.kept / 2  # two bytes a number, of four
    assert (np.abs(row.sets[0].load()["a"] - row.sets[0].load()["a"].astype(np.float16)) == 0).all()
    assert "no form within 0.650" in script.best(lab, group, plain, 0.65)
