"""What a benchmark says: throughput, shares of the roofline, the picture; and the ceilings that it is made of."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import lrcompile
from lrcompile.bench import Race, Spread
from lrcompile.benchmark import Benchmark, Row, write_plot
from lrcompile.footprint import peak_memory
from lrcompile.interfaces import BuildOptions
from lrcompile.records import Finding
from lrcompile.roofline import Ceilings, ceilings_of, computing_type, roofline
from lrcompile.sites import find
from tests.graphs import node, normal, proto

pytest.importorskip("onnxruntime")


def row(name: str, original: float, compiled: float, roof: tuple[float, float] | None = None) -> Row:
    flat = [Spread(*(t * f for f in (0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3))) for t in (original, compiled)]
    ratio = Spread(*[original / compiled] * 7)
    race = Race("ort-cpu", 1, ("x:1x2",), 10, *flat, ratio, Spread(*[1.0] * 7), (0.9, 1.1))
    return Row(name, race, "token", 128, (2_000_000, None), roof)


def test_a_row_counts_its_units() -> None:
    made = row("prefill 128", 4e-3, 2e-3, (1e-3, 1e-3))
    assert made.throughput == pytest.approx((32000, 64000))
    assert made.shares == pytest.approx((0.25, 0.5))
    assert "tokens/s" in str(made)
    assert "25% reached" in str(made)
    assert "2.0 -> ?" in str(made)
    assert row("", 1, 1).shares is None


@pytest.mark.parametrize("times", [((4e-3, 2e-3), (5e-3, 5e-3)), ((4e-3, 2e-3), (0.5, 0.4))])
def test_the_picture_is_svg_with_every_name(times: tuple[tuple[float, float], ...], tmp_path: Path) -> None:
    rows = tuple(row(f"batch <{i}> & $x$", a, b, (a / 2, b / 2)) for i, (a, b) in enumerate(times))
    write_plot(tmp_path / "plot.svg", Benchmark("ort-cpu", 1, rows))
    text = "".join(ET.parse(tmp_path / "plot.svg").getroot().itertext())
    for r in rows:
        assert r.name in text
        assert f"{r.race.ratio.median:.2f}x" in text
    assert "roofline" in text


def model() -> ir.Model:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])]
    return ir.from_proto(proto(nodes, {"x": ("n", 32)}, ["y"], {"w": normal(32, 64), "v": normal(64, 16)}))


def test_the_roofline_is_the_slower_of_both_for_each_site() -> None:
    made = model()
    feed = {"x": normal(10, 32)}
    found: Finding = find(made)
    sizes = [(4 * 32 * 64, 2 * 10 * 32 * 64), (4 * 64 * 16, 2 * 10 * 64 * 16)]
    for bandwidth, peak in ((1e3, 1e12), (1e12, 1e3), (1e3, 5e3)):
        wanted = sum(max(b / bandwidth, f / peak) for b, f in sizes)
        assert roofline(made, found, feed, Ceilings("float", bandwidth, peak)) == pytest.approx(wanted)
    assert computing_type(found) == "float"


def test_ceilings_are_measured_once_and_memory_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrcompile.roofline._ON_CPU", ((64, 4096), 128))
    options, described = BuildOptions("ort-cpu"), {"device": "CPU", "version": "1"}
    with lrcompile.Child() as child:
        first = ceilings_of(child, options, described, "float", cache=tmp_path / "c", scratch=tmp_path)
        assert 1e7 < first.bandwidth < 1e13
        assert 1e7 < first.peak < 1e14
        monkeypatch.setattr("lrcompile.roofline._seconds", lambda *_: pytest.fail("measured twice"))
        assert (
            ceilings_of(child, options, described, "float", cache=tmp_path / "c", scratch=tmp_path) == first
        )
    big = proto(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": ("n", 2048)},
        ["y"],
        {"w": np.ones((2048, 2048), np.float32)},
    )
    (tmp_path / "big.onnx").write_bytes(big.SerializeToString())
    used = peak_memory(tmp_path / "big.onnx", options, {"x": normal(2, 2048)}, 60)
    assert used is not None
    assert 16e6 < used < 200e6  # the weight has 16.8 MB
