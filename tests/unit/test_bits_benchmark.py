"""`benchmarks/bits.py`: what is kept between runs, what is said to be met, and the picture, on numbers that can be checked by hand."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from lrcompile.records import Decision, Plan
from lrcompile.store import Cache

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("one", "two")


@pytest.fixture(scope="module")
def bits() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("bits")


def test_rows_are_kept_and_measured_again_when_named(bits: ModuleType, tmp_path: Path) -> None:
    measured: list[str] = []

    def kept(wanted: tuple[str, ...] | None, key: str = "model") -> object:
        def measure() -> object:
            measured.append("now")
            return bits.Figures(bits=4.5, other=0.5 + 0.01 * len(measured))

        return bits.Kept(Cache(tmp_path), (key,), wanted, lambda words: None).row("a row", measure)

    first = kept(None)
    assert first is not None and first.other == 0.51 and np.isnan(first.size)
    assert kept(None).other == 0.51  # type: ignore[union-attr]
    assert kept(("another",)).other == 0.51  # type: ignore[union-attr]
    assert kept(("row",)).other == 0.52  # type: ignore[union-attr]
    assert kept(("another",), "other model") is None
    assert measured == ["now", "now"]


@pytest.mark.parametrize(("reached", "said"), ((0.9, "met"), (0.8999, "**not met**")))
def test_what_is_met_is_said(bits: ModuleType, reached: float, said: str) -> None:
    promise = bits.Promise("--bits 4", 0.9, 0.7, goals=(0.99, 0.95), size=2e6)
    text = bits.verdicts((promise,), {"--bits 4": bits.Figures(same=0.99, other=reached, size=3e6)}, TEXTS)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert cells[0][1:] == ["one", "0.7", "0.9900", "met", "0.99", "met"]
    assert cells[1][1:] == ["two", "0.9", f"{reached:.4f}", said, "0.95", "**not met**"]
    assert cells[2][1:5] == ["MB", "2 at most", "3.00", "**not met**"]
    assert "not measured" in bits.verdicts((promise,), {}, TEXTS)


def test_tables_leave_out_what_was_not_measured(bits: ModuleType) -> None:
    rows = {
        "plain": bits.Figures(bits=4.0, same=0.5, other=0.25),
        "--bits 4": bits.Figures(same=0.75, other=0.125),
    }
    lines = bits.table(rows, {"bits": "bits", "size": "MB"}, TEXTS).splitlines()
    assert lines[0] == "|  | bits | one | two |"
    assert lines[2:] == ["| plain | 4.00 | 0.5000 | 0.2500 |", "| `--bits 4` |  | 0.7500 | 0.1250 |"]
    assert bits.missing(["plain", "other"], rows) == ["Not measured for this page: other."]
    assert bits.missing(["plain"], rows) == []


def test_the_margin_is_over_the_better_of_plain_two_bits(bits: ModuleType) -> None:
    recipes = {
        "plain int2-32s16": bits.Figures(bits=2.5, same=0.4, other=0.30),
        "plain uint2": bits.Figures(bits=2.3, same=0.5, other=0.45),
        "feedback uint2": bits.Figures(bits=2.3, same=0.9, other=0.9),
    }
    (said,) = bits.margin(recipes, {bits.TWO: bits.Figures(bits=2.25, same=0.9, other=0.85)})
    assert "plain uint2" in said and "+0.4000" in said
    assert bits.margin(recipes, {}) == []


def test_bits_count_what_stays_dense(bits: ModuleType) -> None:
    """Of 100 numbers 60 are rewritten into 30 bytes, and 40 take four bytes each."""
    decision = Decision("g", ("g",), "dense", None, "uint4", 0.1, False, 60, 60, 240, 30, 0, 0, "")
    plan = Plan("ort-cpu", (decision,), eligible=100)
    assert bits.ours.bits_of(plan) == pytest.approx(8 * (30 + 160) / 100)


def test_the_picture_holds_every_row(bits: ModuleType) -> None:
    def row(size: float, other: float) -> object:
        return bits.Figures(size=size, other=other)

    whole = {"--size 10MB": row(10e6, 0.9), "--size 20MB": row(20e6, 0.99)}
    drawn = bits.picture(whole, {"--bits 4": row(50e6, 0.95)}, {"stock <a>": row(23e6, 0.93)}, 90e6)
    assert drawn.startswith("<svg") and "2 sizes" in drawn
    assert "stock &lt;a&gt;" in drawn and "--bits 4" in drawn and "§" not in drawn
    assert len(re.findall("<use ", drawn)) >= 4  # a mark each


def test_kashin_counts_its_levels_and_signs(bits: ModuleType) -> None:
    """Two factors of two bits, four float32 a column, a sign a row."""
    W = np.random.default_rng(0).standard_normal((64, 8))
    row = next(r for r in bits.ROWS if r.name == "Kashin by column, four steps")
    made, taken = row.make(W, np.eye(64))
    assert taken == 4 * 64 * 8 + 4 * 32 * 8 + 64
    assert np.linalg.norm(W - made) < 0.2 * np.linalg.norm(W)  # 0.13 is expected of Gaussians


def test_stock_quantizers_see_each_feed_once(bits: ModuleType) -> None:
    stock = importlib.import_module("bits_parts.stock")
    reader = stock._Reader([{"x": np.array([i])} for i in range(20)])
    seen = []
    while (feed := reader.get_next()) is not None:
        seen.append(int(feed["x"][0]))
    assert sorted(seen) == list(range(8))


def test_a_feed_to_race_on_is_full(bits: ModuleType) -> None:
    mask = np.ones((8, 128), np.int64)
    mask[:, 70:] = 0
    lab = SimpleNamespace(calibration=[{"input_ids": np.ones((8, 128), np.int64), "attention_mask": mask}])
    feed = bits.ours.cut(lab, 1, 128)
    assert feed["attention_mask"].shape == (1, 128) and feed["attention_mask"].all()
