"""The cost table: exact where it was measured, between its points what a law of speed says there, silent where it knows nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.cost import rows_of
from lrcompile.records import Candidate, Cost, Group
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.timing import (
    Clock,
    CostTable,
    Form,
    Timing,
    by_form,
    forms_of,
    gaps,
    ranks_to_measure,
    standard_forms,
)
from tests.graphs import model, node, normal

EMPTY = CostTable("ort-cpu", "a processor", "1.0", 1)


def form(K: int, N: int, rank: int | None, method: str = "svd") -> Form:
    return Form(method if rank else "dense", "linear", K, (N,), rank, "float")


def law(f: Form, rows: int) -> float:
    """A machine of 1 TFLOP/s and 100 GB/s that takes 5 microseconds to start a kernel."""
    (N,), r = f.widths, f.rank
    products = [(f.K, N)] if r is None else [(f.K, r), (r, N)]
    return sum(5e-6 + max(2 * rows * a * b / 1e12, 4 * a * b / 1e11) for a, b in products)


def measured(*forms: Form, rows: tuple[int, ...] = (1, 128)) -> CostTable:
    return EMPTY.with_timings(Timing(f, m, law(f, m)) for f in forms for m in rows)


@given(
    K=st.integers(64, 2048), N=st.integers(64, 2048), rows=st.sampled_from([1, 7, 128, 4096]), data=st.data()
)
@settings(max_examples=40, deadline=None)
def test_between_measured_ranks(K: int, N: int, rows: int, data: st.DataObject) -> None:
    even = max(K * N // (K + N), 5)
    ranks = ranks_to_measure(range(1, even + 1), 5)
    clock = Clock(measured(*(form(K, N, r) for r in ranks), rows=(rows,)))
    for r in ranks:
        assert clock.seconds(form(K, N, r), rows) == pytest.approx(law(form(K, N, r), rows), rel=1e-12)
    rank = data.draw(st.integers(1, even))
    assert clock.seconds(form(K, N, rank), rows) == pytest.approx(law(form(K, N, rank), rows), rel=0.15)


def test_between_measured_rows() -> None:
    """Rows on a grid of fours: the bend of the law between two of them costs no more than a fifth."""
    rows = tuple(4**i for i in range(7))
    clock = Clock(measured(form(512, 512, None), rows=rows))
    for m in range(1, 4096, 37):
        assert clock.seconds(form(512, 512, None), m) == pytest.approx(law(form(512, 512, None), m), rel=0.2)


def test_no_rows_take_no_time() -> None:
    assert Clock(EMPTY).seconds(form(8, 8, None), 0) == 0.0


def test_sizes_that_were_not_measured_follow_the_family() -> None:
    sizes = [(K, N) for K in (256, 512, 1024, 2048) for N in (256, 512, 1024, 2048)]
    clock = Clock(measured(*(form(K, N, None) for K, N in sizes), rows=(1, 16, 128, 1024)))
    for K, N in ((384, 1536), (768, 768), (1536, 640)):
        assert clock.seconds(form(K, N, None), 128) == pytest.approx(law(form(K, N, None), 128), rel=0.25)


def test_what_nothing_like_it_was_measured_of_is_not_known() -> None:
    clock = Clock(measured(form(64, 64, None)))
    assert clock.seconds(form(64, 64, 8), 1) is None  # another method
    assert clock.seconds(form(64, 128, None), 1) is None  # two points make no trend
    assert clock.seconds(replace(form(64, 64, None), dtype="float16"), 1) is None


def test_a_rank_beyond_the_last_costs_no_less() -> None:
    clock = Clock(measured(form(512, 512, 32), form(512, 512, 64), rows=(4096,)))
    last = clock.seconds(form(512, 512, 64), 4096)
    beyond = clock.seconds(form(512, 512, 128), 4096)
    assert last is not None and beyond is not None
    assert beyond == pytest.approx(law(form(512, 512, 128), 4096), rel=0.1) and beyond > last


def test_a_table_is_json() -> None:
    folded = replace(form(64, 32, 8, "pivoted"), structure=(("form", 2),), permutes="out")
    table = measured(form(64, 32, None), folded)
    read = CostTable.from_json(json.loads(json.dumps(table.to_json())))
    assert read == table
    wrong = table.to_json()
    wrong["timings"][0]["seconds"] = -1.0
    with pytest.raises(ValueError, match="seconds"):
        CostTable.from_json(wrong)
    with pytest.raises(KeyError):
        CostTable.from_json({"timings": []})


def test_measuring_again_replaces() -> None:
    table = measured(form(8, 8, None), rows=(1,)).with_timings([Timing(form(8, 8, None), 1, 7.0)])
    assert [t.seconds for t in table.timings] == [7.0]
    assert gaps(table, [(form(8, 8, None), 1), (form(8, 8, None), 2), (form(8, 8, 4), 0)]) == (
        (form(8, 8, None), 2),
    )


@given(st.sets(st.integers(1, 500), min_size=1), st.integers(2, 8))
def test_ranks_to_measure(ranks: set[int], most: int) -> None:
    chosen = ranks_to_measure(sorted(ranks), most)
    assert len(chosen) <= most and set(chosen) <= ranks
    assert chosen[0] == min(ranks) and chosen[-1] == max(ranks)
    assert list(chosen) == sorted(set(chosen))


def test_rows_of_a_form_come_together() -> None:
    a, b = form(8, 8, None), form(8, 8, 2)
    assert by_form([(a, 5), (b, 1), (a, 2)]) == {a: (2, 5), b: (1,)}


def test_standard_forms_hold_the_weight_itself_and_stop_at_break_even() -> None:
    forms = standard_forms(512, (512,), "float", 4)
    assert forms[0] == form(512, 512, None) and len(set(forms)) == len(forms)
    assert {f.method for f in forms} == {"dense", "svd", "pivoted"}
    assert max(f.rank or 0 for f in forms) == 256
    together = standard_forms(64, (64, 16, 16), "float", 3)
    assert sum(f.method == "dense" for f in together) == 2  # two of one size are one
    assert all(f.permutes is None for f in together)


# --- the forms of a group -----------------------------------------------------------------------------------------


def groups() -> dict[str, Group]:
    """A lone weight, one with two readers, a table with a head, and three weights that read one value."""
    nodes = [
        node("MatMul", ["x", "lone"], ["a"], name="lone"),
        node("MatMul", ["x", "twice"], ["b"], name="first"),
        node("MatMul", ["b", "twice"], ["c"], name="second"),
        node("Gather", ["table", "ids"], ["d"], name="table"),
        node("Transpose", ["table"], ["t"], perm=[1, 0]),
        node("MatMul", ["x", "t"], ["e"], name="head"),
    ]
    constants = {"lone": normal(8, 6), "twice": normal(8, 8), "table": normal(20, 8)}
    made = model(nodes, {"x": ("n", 8), "ids": (("n",), np.int64)}, ["a", "c", "d", "e"], constants)
    found = {g.kind: g for g in find(made).groups if g.shares_weight}
    sites = tuple(s for s in find(made).sites if s.name in ("lone", "first"))
    return {**found, "qkv": Group("together", "qkv", sites, (False, False))}


def candidate(rank: int) -> Candidate:
    return Candidate("svd", rank, Cost(0, 0, 0), 0.0)


def test_forms_of_groups() -> None:
    by_kind, svd = groups(), factorization("svd")
    assert forms_of(by_kind["alone"], candidate(3), svd) == ((form(8, 6, 3), "lone"),)
    assert forms_of(by_kind["alone"], None, None, "float16") == (
        (replace(form(8, 6, None), dtype="float16"), "lone"),
    )
    assert [s for _, s in forms_of(by_kind["shared"], candidate(3), svd)] == ["first", "second"]
    (table, _), (head, _) = forms_of(by_kind["tied"], candidate(3), svd)
    assert (table.kind, table.transposed, head.kind, head.transposed) == ("lookup", False, "linear", True)
    ((together, site),) = forms_of(by_kind["qkv"], candidate(3), svd)
    assert together.widths == (6, 8) and site == "lone"


def test_a_group_takes_the_time_of_all_its_readers() -> None:
    group, svd = groups()["shared"], factorization("svd")
    clock = Clock(measured(form(8, 8, 3), form(8, 8, None), rows=(4, 16)))
    both = clock.of(group, candidate(3), svd, {"first": 4, "second": 16})
    assert both == pytest.approx(law(form(8, 8, 3), 4) + law(form(8, 8, 3), 16), rel=1e-12)
    assert clock.of(group, None, None, {"first": 4}) == pytest.approx(law(form(8, 8, None), 4), rel=1e-12)
    assert clock.of(groups()["alone"], candidate(3), svd, {"lone": 4}) is None
    assert math.isfinite(law(form(8, 8, None), 1))


def test_codes_and_rounded_inputs_have_times_of_their_own() -> None:
    """A weight in few bits is not timed by the weight as it is, nor by another type's time."""
    group = groups()["alone"]
    site, method = group.sites[0], factorization("dense")
    dense = Form("dense", "linear", site.K, (site.N,), None, site.dtype)
    stored = replace(dense, storage="int8")
    rounded = replace(stored, activations="int8")
    form = Candidate("dense", None, Cost(0, 0, 0), 0.0, storage="int8")
    rows = {site.name: 8}
    table = EMPTY.with_timings([Timing(dense, 8, 3e-3), Timing(stored, 8, 2e-3)])
    clock = Clock(table)
    assert clock.of(group, None, None, rows) == 3e-3
    assert clock.of(group, form, method, rows) == 2e-3
    assert clock.of(group, replace(form, activations="int8"), method, rows) is None
    assert clock.of(group, replace(form, storage="uint4"), method, rows) is None
    clock = Clock(
        CostTable.from_json(json.loads(json.dumps(table.with_timings([Timing(rounded, 8, 1e-3)]).to_json())))
    )
    assert clock.of(group, replace(form, activations="int8"), method, rows) == 1e-3


def test_rows_behind_an_operator_that_onnx_does_not_know() -> None:
    """A fused attention of ONNX Runtime: what stands behind it meets as many rows as what stands before it."""
    nodes = [
        node("MatMul", ["x", "w"], ["q"], name="query"),
        node(
            "MultiHeadAttention",
            ["q", "q", "q"],
            ["a"],
            name="attention",
            domain="com.microsoft",
            num_heads=2,
        ),
        node("MatMul", ["a", "w2"], ["y"], name="output"),
    ]
    made = model(nodes, {"x": ("b", "s", 8)}, ["y"], {"w": normal(8, 8), "w2": normal(8, 6)})
    made.graph.opset_imports["com.microsoft"] = 1
    rows = rows_of(made, find(made), {"x": np.zeros((2, 5, 8), np.float32)})
    assert rows == {"query": 10, "output": 10}
    assert [n.op_type for n in made.graph] == ["MatMul", "MultiHeadAttention", "MatMul"]
