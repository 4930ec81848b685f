"""Calibration against numpy in float64: second moments, means, counts, ids, masks; the cache; what has no statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lrcompile.calibrate import StoredStatistics, calibrate
from lrcompile.feeds import inputs_of, open_feeds
from lrcompile.records import Finding, InputStatistics
from lrcompile.sites import find
from lrcompile.store import Cache
from tests.graphs import Array, OneProcess, model, node, normal, run

# Sums of float32 activations in float64 against the same sums by numpy: only the order differs.
EXACT = 1e-12
K = 6


def calibrated(
    made: ir.Model, data: Sequence[Mapping[str, Array]], folder: Path, child: OneProcess | None = None
) -> tuple[StoredStatistics, Finding]:
    finding = find(made)
    feeds = open_feeds(list(data), inputs_of(made))
    child = child or OneProcess()
    statistics = calibrate(
        made, finding, feeds, "source", target="reference", child=child, cache=Cache(folder)
    )  # type: ignore[arg-type]
    return statistics, finding


def of(statistics: StoredStatistics, finding: Finding, name: str) -> InputStatistics:
    known = statistics.of(next(s for s in finding.sites if s.name == name))
    assert known is not None
    return known


def unshrunk(known: InputStatistics, K: int) -> Array:
    """The measured moment: the shrinkage is the documented K / (K + 100 n) towards the mean eigenvalue, undone here."""
    a = K / (K + 100 * known.count)
    assert known.shrinkage == pytest.approx(a, rel=1e-12)
    assert known.second is not None
    spread = np.trace(known.second) / K  # the trace is not changed by it
    result: Array = (known.second - a * spread * np.eye(K)) / (1 - a)
    return result


def chain() -> ir.Model:
    nodes = [
        node("MatMul", ["x", "w1"], ["p"], name="first"),
        node("Relu", ["p"], ["h"]),
        node("MatMul", ["h", "w2"], ["y"], name="second"),
        node("MatMul", ["h", "w3"], ["z"], name="third"),
    ]
    return model(
        nodes,
        {"x": ("b", "s", K)},
        ["y", "z"],
        {"w1": normal(K, 5), "w2": normal(5, 4, seed=1), "w3": normal(5, 3, seed=2)},
    )


DATA = [{"x": normal(2, 3, K, seed=i) + 1} for i in range(4)]


def test_moments(tmp_path: Path) -> None:
    statistics, finding = calibrated(chain(), DATA, tmp_path)
    x = np.concatenate([f["x"].reshape(-1, K) for f in DATA])
    hidden = np.maximum(np.concatenate([(f["x"] @ normal(K, 5)).reshape(-1, 5) for f in DATA]), 0)
    for name, rows in (("first", x), ("second", hidden)):
        rows = rows.astype(np.float64)
        known, n = of(statistics, finding, name), rows.shape[1]
        assert known.count == 24 == len(rows)
        # the hidden rows are float32 products, summed in another order than the evaluator does: 1e-6
        room = EXACT if name == "first" else 1e-6
        np.testing.assert_allclose(unshrunk(known, n), rows.T @ rows / 24, rtol=room, atol=room)
        np.testing.assert_allclose(known.mean, rows.mean(axis=0), rtol=room, atol=room)
        np.testing.assert_allclose(
            known.centred, (1 - known.shrinkage) * np.cov(rows.T, bias=True) + known.shrinkage * np.trace(rows.T @ rows / 24) / n * np.eye(n),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
    second, third = (next(s for s in finding.sites if s.name == n) for n in ("second", "third"))
    assert (
        statistics.key(second) == statistics.key(third) != statistics.key(finding.sites[0])
    )  # one value, one tap


WIRED = {
    "left": (node("MatMul", ["w", "x"], ["y"]), (2, K, 3), normal(4, K), lambda x: np.swapaxes(x, 1, 2)),
    "gemm, transA": (node("Gemm", ["x", "w"], ["y"], transA=1), (K, 3), normal(K, 4), lambda x: x.T),
    "gemm, A": (node("Gemm", ["w", "x"], ["y"]), (K, 3), normal(4, K), lambda x: x.T),
    "einsum of two axes": (node("Einsum", ["x", "w"], ["y"], equation="bhsd,hdn->bsn"), (2, 2, 5, 3), normal(2, 3, 4),
                           lambda x: x.transpose(0, 2, 1, 3).reshape(-1, K)),
    "vector": (node("MatMul", ["x", "w"], ["y"]), (K,), normal(K, 4), lambda x: x[None]),
}  # fmt: skip


@pytest.mark.parametrize("name", WIRED)
def test_rows_are_what_meets_the_matrix(name: str, tmp_path: Path) -> None:
    op, shape, w, rows_of = WIRED[name]
    data = [{"x": normal(*shape, seed=i)} for i in range(2)]
    made = model([op], {"x": shape}, ["y"], {"w": w})
    statistics, finding = calibrated(made, data, tmp_path)
    known = statistics.of(finding.sites[0])
    assert known is not None
    rows = np.concatenate([rows_of(f["x"]).reshape(-1, K) for f in data]).astype(np.float64)
    assert known.count == len(rows)
    np.testing.assert_allclose(unshrunk(known, K), rows.T @ rows / len(rows), rtol=EXACT, atol=EXACT)


def table(mask: bool = True) -> ir.Model:
    nodes = [
        node("Gather", ["w", "ids"], ["e"], name="table"),
        node("MatMul", ["e", "v"], ["y"], name="linear"),
    ]
    inputs: dict[str, Any] = {"ids": (("b", "s"), np.int64)}
    if mask:
        inputs["attention_mask"] = (("b", "s"), np.int64)
        nodes.append(node("Identity", ["attention_mask"], ["m"]))
    return model(
        nodes,
        inputs,
        {"y": np.float32, **({"m": np.int64} if mask else {})},
        {"w": normal(5, 3), "v": normal(3, 4)},
    )


def test_ids_are_counted(tmp_path: Path) -> None:
    data = [{"ids": np.array([[0, 1, 1], [-1, 4, 0]])}, {"ids": np.array([[1, 1, 1]])}]
    statistics, finding = calibrated(table(mask=False), data, tmp_path)
    known = of(statistics, finding, "table")
    assert known.count == 9 and known.second is None
    share = np.array([2, 5, 0, 0, 2]) / 9  # -1 is the last row
    a = 5 / (5 + 900)
    np.testing.assert_allclose(known.frequencies, (1 - a) * share + a / 5, rtol=EXACT)
    assert (
        known.frequencies is not None
        and known.frequencies.sum() == pytest.approx(1, rel=1e-12)
        and known.frequencies.min() > 0
    )


def test_ids_seen_once_say_how_many_were_not_seen(tmp_path: Path) -> None:
    def frequencies(ids: list[int]) -> Array:
        statistics, finding = calibrated(table(mask=False), [{"ids": np.array([ids])}], tmp_path)
        known = of(statistics, finding, "table")
        assert known.frequencies is not None
        return known.frequencies

    # row 3 was seen once in twenty lookups: so often will a new row be asked for, spread over all
    share = np.array([19, 0, 0, 1, 0]) / 20
    np.testing.assert_allclose(frequencies([0] * 19 + [3]), 0.95 * share + 0.05 / 5, rtol=EXACT)
    # where every row was seen once, half of what was seen still counts
    np.testing.assert_allclose(frequencies([1, 2]), [0.1, 0.35, 0.35, 0.1, 0.1], rtol=EXACT)


def test_masked_rows_are_left_out(tmp_path: Path) -> None:
    ids, mask = np.array([[0, 1, 2], [3, 4, 4]]), np.array([[1, 1, 0], [1, 0, 0]])
    statistics, finding = calibrated(table(), [{"ids": ids, "attention_mask": mask}], tmp_path)
    rows = normal(5, 3)[ids[mask == 1]].astype(np.float64)
    known = of(statistics, finding, "linear")
    assert known.count == 3
    np.testing.assert_allclose(unshrunk(known, 3), rows.T @ rows / 3, rtol=EXACT, atol=EXACT)
    assert of(statistics, finding, "table").count == 3
    np.testing.assert_allclose(
        np.argsort(of(statistics, finding, "table").frequencies)[:2], [2, 4]
    )  # of equal, unseen rows


def test_a_mask_that_does_not_cover_the_rows(tmp_path: Path) -> None:
    """A total length (past and present) is another shape: every row counts."""
    made = model(
        [node("MatMul", ["x", "w"], ["y"], name="linear"), node("Identity", ["attention_mask"], ["m"])],
        {"x": ("b", "s", 3), "attention_mask": (("b", "t"), np.int64)}, {"y": np.float32, "m": np.int64}, {"w": normal(3, 4)},
    )  # fmt: skip
    statistics, finding = calibrated(
        made, [{"x": normal(2, 2, 3), "attention_mask": np.zeros((2, 5), np.int64)}], tmp_path
    )
    assert of(statistics, finding, "linear").count == 4


def test_a_matrix_of_the_masks_shape_is_not_masked(tmp_path: Path) -> None:
    """(batch, K) with K as long as the sequence: the mask says nothing about its columns."""
    made = model(
        [node("MatMul", ["x", "w"], ["y"], name="linear"), node("Identity", ["attention_mask"], ["m"])],
        {"x": ("b", 3), "attention_mask": (("b", "s"), np.int64)}, {"y": np.float32, "m": np.int64}, {"w": normal(3, 4)},
    )  # fmt: skip
    statistics, finding = calibrated(
        made, [{"x": normal(2, 3), "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}], tmp_path
    )
    assert of(statistics, finding, "linear").count == 2


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the model itself
def test_rows_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    x = normal(1, 4, K)
    x[0, 1, 2], x[0, 3, 0] = np.nan, np.inf
    statistics, finding = calibrated(chain(), [{"x": x}], tmp_path)
    known = of(statistics, finding, "first")
    assert known.count == 2 and known.second is not None and np.isfinite(known.second).all()


def test_no_rows_at_all(tmp_path: Path) -> None:
    statistics, finding = calibrated(chain(), [{"x": np.zeros((0, 3, K), np.float32)}], tmp_path)
    known = of(statistics, finding, "first")
    assert known.count == 0 and known.shrinkage == 1
    np.testing.assert_array_equal(known.second, np.eye(K))  # nothing was learned: the weight alone counts


def test_many_rows_in_blocks(tmp_path: Path) -> None:
    x = normal(1, 9000, K)
    statistics, finding = calibrated(chain(), [{"x": x}], tmp_path)
    rows = x[0].astype(np.float64)
    np.testing.assert_allclose(
        unshrunk(of(statistics, finding, "first"), K), rows.T @ rows / 9000, rtol=1e-10
    )


def test_float16_sums_do_not_overflow(tmp_path: Path) -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["y"], name="first")],
        {"x": (("b", K), np.float16)},
        {"y": np.float16},
        {"w": np.zeros((K, 2), np.float16)},
    )
    statistics, finding = calibrated(made, [{"x": np.full((100, K), 300, np.float16)}], tmp_path)
    np.testing.assert_allclose(unshrunk(of(statistics, finding, "first"), K), 90000, rtol=1e-9)


# --- what is run, and how often -----------------------------------------------------------------------------------


def test_the_second_run_reads_the_cache(tmp_path: Path) -> None:
    first, again = OneProcess(), OneProcess()
    one, finding = calibrated(chain(), DATA, tmp_path, first)
    two, _ = calibrated(chain(), DATA, tmp_path, again)
    assert len(first.calls) == 1 + len(DATA) and again.calls == []
    for site in finding.sites:
        a, b = one.of(site), two.of(site)
        assert a is not None and b is not None and one.key(site) == two.key(site)
        np.testing.assert_array_equal(a.second, b.second)


def test_other_data_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    one, finding = calibrated(chain(), DATA, tmp_path)
    child = OneProcess()
    two, _ = calibrated(chain(), DATA[:2], tmp_path, child)
    assert child.calls and one.key(finding.sites[0]) != two.key(finding.sites[0])
    assert of(two, finding, "first").count == 12


def test_inputs_alone_need_no_run(tmp_path: Path) -> None:
    """Every site reads a graph input: no engine is built for them."""
    made = model(
        [node("MatMul", ["x", "w"], ["y"], name="first")], {"x": ("b", "s", K)}, ["y"], {"w": normal(K, 2)}
    )
    child = OneProcess()
    calibrated(made, DATA, tmp_path, child)
    assert not [c for c in child.calls if c.startswith("build")]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    made = chain()
    before = [v.name for v in made.graph.outputs]
    calibrated(made, DATA, tmp_path)
    assert [v.name for v in made.graph.outputs] == before
    assert run(made, DATA[0])["y"].shape == (2, 3, 4)


def branch(name: str, seed: int) -> onnx.GraphProto:
    tensor = onnx.numpy_helper.from_array(normal(K, 4, seed=seed), f"w_{name}")
    output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    return helper.make_graph(
        [node("MatMul", ["x", f"w_{name}"], [f"{name}_y"], name=name)], name, [], [output], [tensor]
    )


def test_sites_in_bodies_have_no_statistics(tmp_path: Path) -> None:
    """How often a body runs is the data's business: such sites are left to methods that need no data."""
    nodes = [
        node("If", ["c"], ["y"], then_branch=branch("then", 0), else_branch=branch("else", 1)),
        node("MatMul", ["x", "w"], ["z"], name="outside"),
    ]
    made = model(nodes, {"x": ("b", K), "c": ((), np.bool_)}, ["y", "z"], {"w": normal(K, 2)})
    statistics, finding = calibrated(made, [{"x": normal(3, K), "c": np.asarray(True)}], tmp_path)
    known = {s.name: statistics.of(s) is not None for s in finding.sites}
    assert known == {"then": False, "else": False, "outside": True}
    assert all(statistics.key(s) == "" for s in finding.sites if s.name != "outside")


def test_refused_sites_have_no_statistics(tmp_path: Path) -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["y"], name="stack")],
        {"x": ("b", 3, K)},
        ["y"],
        {"w": normal(2, 1, K, 2)},
    )
    statistics, finding = calibrated(made, [{"x": normal(2, 3, K)}], tmp_path)
    assert statistics.of(finding.sites[0]) is None


def test_nothing_to_watch(tmp_path: Path) -> None:
    made = model([node("Relu", ["x"], ["y"])], {"x": ("b", K)}, ["y"])
    child = OneProcess()
    calibrated(made, [{"x": normal(2, K)}], tmp_path, child)
    assert child.calls == []
