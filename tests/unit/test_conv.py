"""Conv from the graph to the folder: windows, moments of what they see, reactions, plans, and CP that stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import lrcompile
from lrcompile.calibrate import calibrate
from lrcompile.cost import dense_flops, rows_of
from lrcompile.feeds import inputs_of, open_feeds
from lrcompile.load import load
from lrcompile.patches import rows_of_windows, windows
from lrcompile.reactions import reacting
from lrcompile.records import Budget, Plan, Window
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile_passes.conv.cp import _RIDGE, alternated, start
from tests.graphs import Array, OneProcess, model, node, normal, run

CHANNELS, SIZE = 6, 10


@pytest.fixture(scope="module")
def child() -> Iterator[lrcompile.Child]:
    with lrcompile.Child() as child:
        yield child


def network(group: int = 1) -> ir.Model:
    """Two Conv, the second's kernel of Tucker ranks 4 and 4 and a little noise, a pool and a classifier."""
    core = np.einsum(
        "nr,rqij,cq->ncij", normal(24, 4, seed=1), normal(4, 4, 3, 3, seed=2), normal(16 // group, 4, seed=3)
    )
    kernel = (core / 20 + 0.01 * normal(24, 16 // group, 3, 3, seed=4)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w", "b"], ["p"], name="first", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["p"], ["h"]),
        node("Conv", ["h", "v", "c"], ["q"], name="second", auto_pad="SAME_UPPER", group=group),
        node("GlobalAveragePool", ["q"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "u"], ["y"], name="third"),
    ]
    held = {
        "w": normal(16, CHANNELS, 3, 3, seed=5) / 5, "b": normal(16, seed=6), "v": kernel, "c": normal(24, seed=7), "u": normal(24, 3, seed=8),
    }  # fmt: skip
    return model(nodes, {"x": ("batch", CHANNELS, SIZE, SIZE)}, ["y"], held)


def pictures(count: int) -> list[dict[str, Array]]:
    return [{"x": normal(4, CHANNELS, SIZE, SIZE, seed=i) + 0.5} for i in range(count)]


@pytest.mark.parametrize("group", [1, 2])
def test_moments_are_of_what_the_window_sees(tmp_path: Path, group: int) -> None:
    """Against every patch of every picture, cut out by hand; each group of channels has its own."""
    made, data = network(group), pictures(3)
    finding = find(made)
    statistics = calibrate(
        made, finding, open_feeds(data, inputs_of(made)), "source", target="reference", child=OneProcess(), cache=Cache(tmp_path)
    )  # type: ignore[arg-type]  # fmt: skip
    site = next(s for s in finding.sites if s.name == "second")
    known = statistics.of(site)
    copy = made.clone()
    copy.graph.outputs.append(next(n for n in copy.graph if n.op_type == "Relu").outputs[0])
    copy.graph.outputs[-1].dtype = ir.DataType.FLOAT
    hidden = np.pad(np.concatenate([run(copy, f)["h"] for f in data]), [(0, 0), (0, 0), (1, 1), (1, 1)])
    rows = np.array([
        [part[:, i : i + 3, j : j + 3].reshape(-1) for part in np.split(picture, group)]
        for picture in hidden for i in range(SIZE // 2) for j in range(SIZE // 2)
    ], np.float64)  # fmt: skip
    assert known is not None and known.second is not None and known.mean is not None
    assert known.count == len(rows) == 12 * 25
    a = known.shrinkage
    second = np.stack([part.T @ part / len(rows) for part in rows.transpose(1, 0, 2)])
    spread = np.trace(second, axis1=1, axis2=2)[:, None, None] / site.K
    expected = (1 - a) * second + a * spread * np.eye(site.K)
    # float32 activations, summed in another order
    np.testing.assert_allclose(known.second.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(known.mean.reshape(group, -1), rows.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_of_large_pictures_some_positions_are_seen_always_the_same() -> None:
    window = Window((3, 3), (1, 1), (1, 1), (0, 0, 0, 0))
    x = normal(2, 2, 40, 30)
    first, again = ([*rows_of_windows(x, window)] for _ in range(2))
    assert [len(rows) for rows in first] == [256, 256]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    every = {rows.tobytes() for rows in np.moveaxis(windows(x, window)[0], 0, 2).reshape(-1, 18)}
    assert len({rows.tobytes() for rows in first[0].reshape(-1, 18)} & every) == 256  # each another one


def test_a_window_along_axes_keeps_the_padding_of_these() -> None:
    window = Window((3, 5), (2, 1), (1, 2), (1, 2, 3, 4), "", 2)
    assert window.along({0}) == Window((3, 1), (2, 1), (1, 1), (1, 0, 3, 0), "", 2)
    assert window.along({1}) == Window((1, 5), (1, 1), (1, 2), (0, 2, 0, 4), "", 2)
    assert window.along(()) == Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), "", 2)


def test_rows_are_positions_of_the_output() -> None:
    made = network()
    finding = find(made)
    rows = rows_of(made, finding, {"x": np.zeros((4, CHANNELS, SIZE, SIZE), np.float32)})
    assert rows == {"first": 4 * 25, "second": 4 * 25, "third": 4}
    assert dense_flops(finding.sites[0]) == 2 * 16 * CHANNELS * 9


def outputs(made: ir.Model) -> Array:
    session = onnxruntime.InferenceSession(
        ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.concatenate([session.run(None, feed)[0].astype(np.float64) for feed in pictures(8)])


def test_reactions_of_a_conv(tmp_path: Path, child: lrcompile.Child) -> None:
    """tr(E^T C E G), summed over positions, is how far small random errors of the kernel move the pooled output."""
    pytest.importorskip("torch")
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(network()), path)
    source = load(path)
    finding, feeds = find(source.model), open_feeds(pictures(8), inputs_of(source.model))
    cache = Cache(tmp_path / "cache")
    stored = calibrate(source.model, finding, feeds, source.key, target="ort-cpu", child=child, cache=cache)
    statistics, told = reacting(source, finding, stored, feeds, child=child, cache=cache, seed=0)
    assert told == ""
    site = next(s for s in finding.sites if s.name == "second")
    known = statistics.of(site)
    assert known is not None and known.reaction is not None and known.reaction.share == 0.0
    rng = np.random.default_rng(0)
    plain = outputs(source.model)
    ratios = []
    for scale in (0.01, 0.02, 0.04):
        E = scale * rng.standard_normal((site.K, site.N))
        changed = source.model.clone()
        assert known.mean is not None
        for name, by in (("v", site.layout.invert(E)), ("c", -known.mean @ E)):  # the bias absorbs the mean
            value = changed.graph.initializers[name]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() + by.astype(np.float32), name=name)
        measured = float(np.sum((outputs(changed) - plain) ** 2) / np.sum(plain**2))
        predicted = float(np.sum((E.T @ known.weighing(True) @ E) * known.reaction.output))
        ratios.append(measured / predicted)
    # positions are taken to err independently: of a pool over 25 of them, which like each other, that is too little by up to 25
    assert all(0.2 < r < 30 for r in ratios), ratios
    assert max(ratios) < 3 * min(ratios)


def test_a_network_is_compiled_within_a_budget(tmp_path: Path, child: lrcompile.Child) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(network()), path)
    options = lrcompile.Options(budget=Budget(keep=0.5), data=pictures(12), cache=tmp_path / "cache")
    result = lrcompile.compile(path, tmp_path / "out", options, child=child)
    assert result.evidence.verdict == "passed"
    by_name = {d.group: d for d in result.plan}
    assert by_name["second"].method == "tucker2"  # what it is made of
    assert result.plan.kept <= 0.5 and result.plan.movement is not None
    ((_, moved),) = result.evidence.outputs
    assert moved.relative_l2 < 0.1
    made = load(tmp_path / "out" / "model.onnx").model
    assert {n.op_type for n in made.graph} <= {
        "Conv",
        "Relu",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
        "MatMul",
        "Add",
        "Concat",
        "Gather",
    }
    # the plan can be given back, read from JSON
    again = lrcompile.Options(
        plan=Plan.from_json(result.plan.to_json()), data=pictures(12), cache=tmp_path / "cache"
    )
    repeated = lrcompile.compile(path, tmp_path / "again", again, child=child)
    assert [(d.method, d.rank, d.structure) for d in repeated.plan] == [
        (d.method, d.rank, d.structure) for d in result.plan
    ]


def test_one_ratio_for_all_without_predictions(tmp_path: Path, child: lrcompile.Child) -> None:
    """CP needs no data; without any, a budget is met by one common ratio."""
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(network()), path)
    options = lrcompile.Options(
        methods=("cp",), budget=Budget(keep=0.6), include="first|second", cache=tmp_path / "cache"
    )
    result = lrcompile.compile(path, tmp_path / "out", options, child=child)
    assert result.evidence.verdict == "passed" and result.plan.kept <= 0.6
    assert {d.method for d in result.plan.rewritten} == {"cp"}
    assert "one ratio" in result.plan.rewritten[0].reason


def test_a_plan_asks_a_conv_for_what_is_there(tmp_path: Path, child: lrcompile.Child) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(network()), path)
    options = lrcompile.Options(
        budget=Budget(rank=2), methods=("conv-channel",), data=pictures(8), cache=tmp_path / "cache"
    )
    result = lrcompile.compile(path, tmp_path / "out", options, child=child)
    document = result.plan.to_json()
    for decision in document["decisions"]:
        if decision["group"] == "second":
            decision["method"] = "svd"
    with pytest.raises(lrcompile.UsageError, match="not for Conv"):
        lrcompile.compile(
            path, tmp_path / "again", lrcompile.Options(plan=Plan.from_json(document), data=pictures(8), cache=tmp_path / "cache"), child=child
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_cp_of_a_tensor_without_a_best_one_stays_bounded(seed: int) -> None:
    """a a b + a b a + b a a has rank 3, and tensors of rank 2 as near as one likes, whose parts then grow without limit."""
    a, b = np.eye(2)
    T = sum(np.einsum("i,j,k->ijk", *parts) for parts in ((a, a, b), (a, b, a), (b, a, a)))
    modes, value = alternated(T, start(T, 2, (seed,), spectral=False), 5000)
    assert np.isfinite(value)
    size = float(np.vdot(T, T))
    assert np.vdot(modes[-1], modes[-1]) <= size / (
        0.5 * _RIDGE
    )  # t is relative to the components' norms, which are at most one
    assert all(np.linalg.norm(m, axis=0) <= 1 + 1e-9 for mode in modes[:-1] for m in mode.T)
    made = np.einsum("ir,jr,kr->ijk", *modes)
    assert np.linalg.norm(T - made) < 0.7 * np.sqrt(size)  # and it still approximates
