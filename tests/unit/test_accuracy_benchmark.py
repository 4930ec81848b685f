"""`benchmarks/accuracy.py`: its table, its verdicts, its page and its baselines' weighings, on numbers that can be checked by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lrcompile.plan import Problem, prepare
from lrcompile.records import Budget, Candidate, InputStatistics
from lrcompile.registry import methods_of
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parts() -> Iterator[SimpleNamespace]:
    """The script and its modules; they find each other as they do when the script is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("baselines", "checks", "lab", "table")
        made: dict[str, ModuleType] = {n: importlib.import_module(f"accuracy_parts.{n}") for n in names}
        yield SimpleNamespace(**made, script=importlib.import_module("accuracy"))


# --- the table --------------------------------------------------------------------------------------------------------


def cells(parts: Any) -> Any:
    Cell = parts.table.Cell
    return {
        ("plain SVD", 0.9): Cell(0.895, {"same": 0.25, "other": 0.5}),
        ("plain SVD", 0.5): Cell(0.496, {"same": 0.125, "other": 0.75}),
        ("ASVD scaling", 0.9): Cell(0.9, {"same": 0.5, "other": 0.49999}),
        ("ASVD scaling", 0.5): Cell(failure="no gradients: torch is not there"),
    }


def test_table(parts: Any) -> None:
    """The best of a column is bold, also what prints the same; a cell without figures says why beneath."""
    text = parts.table.table(parts.table.ROWS[:2], (0.9, 0.5), ("same", "other"), cells(parts), True)
    assert text.splitlines() == [
        "| method | 0.9, same | 0.9, other | 0.5, same | 0.5, other | really kept |",
        "|---|---:|---:|---:|---:|---:|",
        "| plain SVD | 0.2500 | **0.5000** | **0.1250** | **0.7500** | 0.895 / 0.496 |",
        "| ASVD scaling | **0.5000** | **0.5000** | no gradients | no gradients | 0.900 / - |",
        "",
        "ASVD scaling: no gradients: torch is not there",
    ]


def test_of_perplexities_the_least_is_best(parts: Any) -> None:
    text = parts.table.table(parts.table.ROWS[:2], (0.9,), ("same",), cells(parts), False)
    assert "| plain SVD | **x0.250** |" in text
    assert "| ASVD scaling | x0.500 |" in text


@pytest.mark.parametrize(
    ("value", "shown"), [(1.2345, "x1.234"), (23.456, "x23.46"), (95_000, "x9.5e+04"), (1.2e6, "x1.2e+06")]
)
def test_perplexities_in_the_thousands_stay_short(parts: Any, value: float, shown: str) -> None:
    assert parts.table.number(value, False) == shown


def test_verdicts(parts: Any) -> None:
    """A defeat is printed like a win, what was not measured is no win."""
    Promise = parts.table.Promise
    promises = [
        Promise("plain SVD", 0.9, "same", 0.25, 0.5),
        Promise("plain SVD", 0.9, "other", 0.51),
        Promise("ASVD scaling", 0.5, "same", 0.1),
    ]
    lines = parts.table.verdicts(promises, cells(parts), True).splitlines()[2:]
    assert lines == [
        "| plain SVD: keep 0.9, same | >= 0.25 | 0.2500 | met | 0.5 | **not met** |",
        "| plain SVD: keep 0.9, other | >= 0.51 | 0.5000 | **not met** |  |  |",
        "| ASVD scaling: keep 0.5, same | >= 0.1 | not measured |  |  |  |",
    ]
    assert parts.table.verdict(2.0, 2.4, False) == "met"
    assert parts.table.verdict(2.5, 2.4, False) == "**not met**"


def test_every_promise_is_about_a_row_and_a_column(parts: Any) -> None:
    rows = {row.name for row in parts.table.ROWS}
    assert len(rows) == len(parts.table.ROWS)
    for name, promises in parts.script.PROMISES.items():
        made = parts.script.MODELS[name]
        for promise in promises:
            assert promise.row in rows
            assert promise.keep in made.keeps
            assert promise.text in made.texts


def test_page_keeps_the_sections_of_other_models(parts: Any) -> None:
    page = parts.script.page
    first = page("", {"minilm": "## minilm\n\n### Cost\n\nold"})
    both = page(first, {"smollm2": "## smollm2\n\nnew"})
    assert both.startswith(parts.script.INTRODUCTION)
    assert both.endswith("## minilm\n\n### Cost\n\nold\n\n## smollm2\n\nnew\n")
    again = page(both, {"minilm": "## minilm\n\nfresh"})
    assert again.endswith("\n\n## minilm\n\nfresh\n\n## smollm2\n\nnew\n")
    assert again.count(parts.script.INTRODUCTION) == 1


# --- scores and data --------------------------------------------------------------------------------------------------


def test_mean_cosine(parts: Any) -> None:
    a, b = np.array([[2.0, 0], [0, 1], [1, 1]]), np.array([[5.0, 0], [0, -1], [1, 0]])
    assert parts.lab.mean_cosine(a, b) == pytest.approx((1 - 1 + 0.5**0.5) / 3)


def test_some_rows_come_from_all_over(parts: Any) -> None:
    assert parts.lab.spread(range(10), 3) == [1, 5, 8]
    assert parts.lab.spread(range(3), 10) == parts.lab.spread(range(3), None) == [0, 1, 2]


def test_rows_of_like_length_are_cut_to_the_longest(parts: Any) -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 40)
    mask = (np.arange(20) < lengths[:, None]).astype(np.int64)
    ids = mask * (1 + np.arange(40)[:, None])
    made = parts.lab.by_length([{"input_ids": ids, "attention_mask": mask}])
    assert sum(len(feed["input_ids"]) for feed in made) == 40
    assert sorted(int(i) for feed in made for i in feed["input_ids"][:, 0]) == list(range(1, 41))
    assert all(feed["attention_mask"].any(axis=0).all() for feed in made)  # no column of padding alone
    assert sum(int(feed["input_ids"].sum()) for feed in made) == ids.sum()


def test_few_of_a_file_and_of_a_folder(parts: Any, tmp_path: Path) -> None:
    rows = np.arange(20).reshape(20, 1)
    np.savez(tmp_path / "data.npz", x=rows)
    assert [feed["x"].ravel().tolist() for feed in parts.lab.few(tmp_path / "data.npz", None)] == [
        list(range(8)), list(range(8, 16)), list(range(16, 20))
    ]  # fmt: skip
    folder = tmp_path / "feeds"
    folder.mkdir()
    for i in range(4):
        np.savez(folder / f"{i}.npz", x=rows[i])
    assert [int(feed["x"][0]) for feed in parts.lab.few(folder / "", 2)] == [1, 3]


def test_movement_leaves_padding_out(parts: Any) -> None:
    """Relative squared of each output, KL where they are logits, the mean over outputs; at most 4."""
    feed = {"attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    a, b = normal(2, 3, 5, seed=6), normal(2, 3, 5, seed=7)
    kept = feed["attention_mask"].astype(bool)
    x, y = ({"hidden": parts.lab.unpadded(v, feed)} for v in (a, b))
    expected = np.sum((a - b)[kept] ** 2) / np.sum(a[kept] ** 2)
    assert parts.lab.movement([x], [y]) == pytest.approx(min(expected, 4.0), rel=1e-5)
    assert parts.lab.movement([x], [{"hidden": 100 * y["hidden"]}]) == 4.0
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (a, b))
    logits = parts.lab.movement([{"logits": a}], [{"logits": b}])
    assert logits == pytest.approx(np.sum(p * np.log(p / q)) / 6, rel=1e-5)


def test_key_of_feeds_is_of_their_contents(parts: Any) -> None:
    x = np.arange(6).reshape(2, 3)
    keys = {
        parts.lab.key_of(f) for f in ([{"x": x}], [{"x": x.T}], [{"y": x}], [{"x": x}] * 2, [{"x": x + 1}])
    }
    assert len(keys) == 5
    assert parts.lab.key_of([{"x": x.copy()}]) in keys


# --- baselines --------------------------------------------------------------------------------------------------------


class Known:
    """Statistics of one made-up input."""

    def __init__(self, K: int) -> None:
        x = normal(50, K, seed=1) + 3.0
        self.known = InputStatistics(50, x.T @ x / 50, x.mean(axis=0))

    def of(self, site: Any) -> InputStatistics:
        return self.known

    def key(self, site: Any) -> str:
        return "stored"


def one_layer(K: int = 24, N: int = 16) -> Any:
    made = model(
        [node("MatMul", ["x", "w"], ["h"], name="layer"), node("Add", ["h", "b"], ["y"], name="bias")],
        {"x": ("n", K)}, ["y"], {"w": normal(K, N, seed=2), "b": normal(N, seed=3)},
    )  # fmt: skip
    return find(made)


def test_a_diagonal_weighing_is_the_svd_of_the_scaled_weight(parts: Any) -> None:
    """min |S (W - What)| over rank r is S^-1 times the truncated SVD of S W; no bias is corrected."""
    finding = one_layer()
    (group,), K = finding.units, 24
    scale = np.linspace(0.1, 4.0, K)
    statistics = parts.baselines.Diagonal(Known(K), "test", {group.sites[0].name: scale**2})
    found = weights().low_rank(group, statistics, 5)
    assert set(found) == {"a", "b"}
    W = weights().matrix(group.sites[0])
    u, s, vt = np.linalg.svd(scale[:, None] * W, full_matrices=False)
    expected = (u[:, :5] * s[:5] @ vt[:5]) / scale[:, None]
    np.testing.assert_allclose(found["a"] @ found["b"], expected, atol=1e-10)


def test_whitening_as_published_is_not_centred(parts: Any) -> None:
    finding = one_layer()
    (group,) = finding.units
    known = Known(24)
    bare = parts.baselines.Uncentred(known)
    assert set(weights().low_rank(group, bare, 5)) == {"a", "b"}
    assert set(weights().low_rank(group, known, 5)) == {"a", "b", "bias.0"}
    np.testing.assert_array_equal(bare.of(group.sites[0]).second, known.known.second)


def test_weighings_of_other_data_have_other_keys(parts: Any) -> None:
    (group,) = one_layer().units
    site = group.sites[0]
    rows = [{site.name: np.full(24, value)} for value in (1.0, 2.0)]
    keys = {parts.baselines.Diagonal(Known(24), name, r).key(site) for name in ("a", "b") for r in rows}
    keys |= {"stored", parts.baselines.Uncentred(Known(24)).key(site)}
    assert len(keys) == 6


def test_inputs_never_seen_are_not_free(parts: Any) -> None:
    np.testing.assert_allclose(parts.baselines.floored(np.array([0.0, 2.0])), [1e-6, 2.0])
    np.testing.assert_allclose(parts.baselines.floored(np.zeros(2)), [1.0, 1.0])


def test_fisher_rows_of_sequences_and_of_rows(parts: Any) -> None:
    x, g = normal(3, 4, 5, seed=4), normal(3, 4, 6, seed=5)

    def by_hand(x: Array, g: Array) -> Array:
        return sum((np.outer(x, g) if x.ndim == 1 else x.T @ g) ** 2 for x, g in zip(x, g, strict=True)).sum(
            axis=1
        )

    np.testing.assert_allclose(parts.baselines.squared_rows(x, g), by_hand(x, g), rtol=1e-5)
    np.testing.assert_allclose(parts.baselines.squared_rows(x[0], g[0]), by_hand(x[0], g[0]), rtol=1e-5)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_spearman_is_scipys(parts: Any) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 8, 30).tolist()
    b = (np.array(a) + rng.normal(0, 3, 30)).tolist()
    assert parts.checks.spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert parts.checks.spearman([1, 2, 3], [2, 4, 80]) == pytest.approx(1.0)
    assert parts.checks.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


def problem() -> Problem:
    """Four weights whose candidates move the outputs by their squared error, the later weights ten times more each."""
    nodes = [node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"], name=f"layer{i}") for i in range(4)]
    made = model(
        nodes, {f"x{i}": ("n", 40) for i in range(4)}, [f"y{i}" for i in range(4)],
        {f"w{i}": normal(40, 30, seed=i) for i in range(4)},
    )  # fmt: skip
    methods = tuple(methods_of(("svd-plain",)).values())
    found = prepare(find(made), weights(), None, methods, Budget(keep=0.5), target="ort-cpu")

    def moved(c: Candidate, i: int) -> Candidate:
        return replace(
            c, movement=10.0**i * c.error**2, method="svd" if c.rank is None or c.rank % 2 else "pivoted"
        )

    return replace(
        found,
        curves=tuple(
            replace(curve, candidates=tuple(moved(c, i) for c in curve.candidates))
            for i, curve in enumerate(found.curves)
        ),
    )


def test_drawn_plans(parts: Any) -> None:
    """Within their budgets, of their methods alone, and predicted without the jitter that chose them; the same for one seed."""
    given = problem()
    forms = {(c.group.name, x.method, x.rank): x.movement for c in given.curves for x in c.candidates}
    drawn = list(parts.checks.drawn_plans(given, 12, seed=3))
    assert len(drawn) == 12
    for one in drawn:
        assert 0.3 < one.keep <= 0.95
        assert {d.method for d in one.plan.rewritten} <= set(one.methods)
        expected = sum(forms[d.group, d.method, d.rank] for d in one.plan.rewritten)
        assert one.predicted == pytest.approx(expected, rel=1e-9)
    assert len({one.predicted for one in drawn}) > 8
    again = parts.checks.drawn_plans(given, 12, seed=3)
    assert [one.predicted for one in again] == [one.predicted for one in drawn]
    assert [one.predicted for one in parts.checks.drawn_plans(given, 12, seed=4)] != [
        one.predicted for one in drawn
    ]


def test_page_of_plans(parts: Any) -> None:
    found = [
        (parts.checks.Drawn(None, 0.5 + i / 10, ("svd",), 1.0, 0.1 * (i + 1)), 0.3 * (i + 1))
        for i in range(3)
    ]
    text = parts.checks.plans_page(found, 1.0, "other half")
    assert "**1.000** (asked: at least 0.9, met)" in text
    assert "median 3.00, from 3.00 to 3.00" in text
    assert "**not met**" in parts.checks.plans_page(found, 0.89, "other half")


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_page(parts: Any) -> None:
    checks = parts.checks
    bare = {checks.PASS: 10.0, checks.SVD: 4.0, checks.EIGH: 1.0}
    text, met = checks.cost_page(
        {**bare, **dict.fromkeys(checks.STAGES, 24.0)}, {**bare, **dict.fromkeys(checks.STAGES, 26.0)}, 0.75
    )
    assert met
    assert "| together | 120.0 | 130.0 | 13.00 |" in text
    assert "2.0 minutes of 2.2 (met), 2.2 of 2.2 minutes of processor (met; were" in text
    assert "of 2.0: **not met**" in text
    _, met = checks.cost_page(
        {**bare, **dict.fromkeys(checks.STAGES, 24.0)}, {**bare, **dict.fromkeys(checks.STAGES, 27.0)}, 0.75
    )
    assert not met
