"""Factorize: measured errors against brute force on samples, storage types, the cache and its keys, broken plugins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from lrcompile.errors import PluginError
from lrcompile.factorize import annotate, factorize
from lrcompile.factors import FactorSet, bias_in_place
from lrcompile.loss import group_loss
from lrcompile.plan import choose, prepare
from lrcompile.records import Budget, Finding, InputStatistics, Plan, Site
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal

SVD, PLAIN = factorization("svd"), factorization("svd-plain")
K, N = 10, 8


@dataclasses.dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]
    name: str = "s"

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return self.name


X = normal(300, K, dtype=np.float64) @ normal(K, K, seed=1, dtype=np.float64) + 2.0
SEEN = Statistics({"layer": InputStatistics(300, X.T @ X / 300, X.mean(axis=0))})


def made(
    W: Array | None = None, bias: Array | None = None, alpha: float = 1.0, beta: float = 1.0
) -> ir.Model:
    W = normal(K, N) if W is None else W
    constants = {"w": W} if bias is None else {"w": W, "b": bias}
    op = node("Gemm", ["x", *constants], ["y"], name="layer", alpha=alpha, beta=beta)
    return model([op], {"x": (("n", K), W.dtype)}, {"y": W.dtype}, constants)


def planned(
    finding: Finding,
    weights: ModelWeights,
    statistics: Statistics | None = SEEN,
    method: Any = SVD,
    **budget: Any,
) -> Plan:
    return choose(
        prepare(finding, weights, statistics, (method,), Budget(**(budget or {"rank": 3})), target="t")
    )


def factorized(
    graph: ir.Model, cache: Path, statistics: Statistics | None = SEEN, method: Any = SVD, **budget: Any
) -> FactorSet:
    finding, weights = find(graph), ModelWeights(Cache(cache), 18)
    plan = planned(finding, weights, statistics, method, **budget)
    (factors,) = factorize(
        plan, {g.name: g for g in finding.groups}, weights, statistics, {method.name: method}, 0
    )
    return factors


def test_measured_error_is_that_of_the_samples(tmp_path: Path) -> None:
    """||X (W - What)|| / ||X W||, by brute force with the factors as they are stored."""
    factors = factorized(made(), tmp_path)
    arrays, W = factors.load(), normal(K, N).astype(np.float64)
    What = arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64)
    assert factors.measured == pytest.approx(np.linalg.norm(X @ (W - What)) / np.linalg.norm(X @ W), rel=1e-9)
    assert factors.measured <= (factors.decision.claimed_error or 0) + 1e-6


def test_a_corrected_bias_takes_the_means_share_away(tmp_path: Path) -> None:
    factors = factorized(made(bias=normal(N)), tmp_path)
    arrays, W = factors.load(), normal(K, N).astype(np.float64)
    D = W - arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64)
    centred = X - X.mean(axis=0)
    assert factors.measured == pytest.approx(np.linalg.norm(centred @ D) / np.linalg.norm(X @ W), rel=1e-9)
    plain = factorized(made(), tmp_path)
    assert factors.measured < plain.measured


def test_without_data_it_is_that_of_the_weight(tmp_path: Path) -> None:
    factors = factorized(made(), tmp_path, None, PLAIN)
    sigma = np.linalg.svd(normal(K, N).astype(np.float64), compute_uv=False)
    assert factors.measured == pytest.approx(np.sqrt((sigma[3:] ** 2).sum() / (sigma**2).sum()), rel=1e-6)


def test_the_plain_form_is_measured_by_the_data_all_the_same(tmp_path: Path) -> None:
    """So that the report can say what the data makes of it; its claim is then an estimate, replaced by the figure."""
    factors = factorized(made(), tmp_path, SEEN, PLAIN)
    whitened = factorized(made(), tmp_path, SEEN, SVD)
    assert factors.measured > whitened.measured
    assert not factors.decision.bound
    plan = annotate(Plan("t", (factors.decision,)), [factors])
    assert plan.decisions[0].claimed_error == factors.measured
    bound = annotate(Plan("t", (whitened.decision,)), [whitened])
    assert (
        bound.decisions[0].claimed_error == whitened.decision.claimed_error
    )  # a claim that is a bound stands


def test_tables_and_several_readers() -> None:
    W, D = normal(K, N, dtype=np.float64), normal(K, N, seed=5, dtype=np.float64)
    nodes = [
        node("MatMul", ["x", "w"], ["y"], name="layer"),
        node("Gather", ["w", "ids"], ["z"], name="rows"),
    ]
    finding = find(
        model(
            nodes,
            {"x": (("n", K), np.float64), "ids": (("n",), np.int64)},
            {"y": np.float64, "z": np.float64},
            {"w": W},
        )
    )
    (group,) = finding.units
    share = np.random.default_rng(0).dirichlet(np.ones(K))
    known = Statistics({**SEEN.known, "rows": InputStatistics(50, frequencies=share)})
    changed = {("layer", "weight"): W + D, ("rows", "weight"): W + D}

    class Given:
        def matrix(self, site: Site) -> Array:
            return W

    linear = np.linalg.norm(X @ D) / np.linalg.norm(X @ W)
    rows = np.sqrt((share @ (D**2).sum(axis=1)) / (share @ (W**2).sum(axis=1)))
    assert group_loss(group, Given(), known, changed) == pytest.approx(
        np.sqrt((linear**2 + rows**2) / 2), rel=1e-9
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_storage(dtype: Any, tmp_path: Path) -> None:
    factors = factorized(made(normal(K, N).astype(dtype)), tmp_path)
    arrays = factors.load()
    assert {a.dtype for a in arrays.values()} == {np.dtype(dtype)}
    assert factors.shapes == {n: a.shape for n, a in arrays.items()} == {"a": (K, 3), "b": (3, N)}
    assert factors.storage == ir.DataType.from_numpy(np.dtype(dtype))


def test_factors_of_a_quantized_weight_have_the_computing_type(tmp_path: Path) -> None:
    nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"], name="layer")]
    graph = model(
        nodes,
        {"x": ("n", 40)},
        ["y"],
        {"w": np.arange(1600).reshape(40, 40).astype(np.int8), "s": np.float32(0.1)},
    )
    factors = factorized(graph, tmp_path, None, PLAIN, rank=2)
    assert factors.storage == ir.DataType.FLOAT


# --- the cache ----------------------------------------------------------------------------------------------------


class Counting:
    """A factorization that counts how often it is asked for arrays, and may change them."""

    def __init__(self, method: Any, change: Any = lambda arrays: arrays) -> None:
        self.method, self.change, self.count = method, change, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def factorize(self, *args: Any) -> Mapping[str, Array]:
        self.count += 1
        return self.change(dict(self.method.factorize(*args)))  # type: ignore[no-any-return]


def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    method = Counting(SVD)
    first, second = (factorized(made(bias=normal(N)), tmp_path, SEEN, method) for _ in range(2))
    assert method.count == 1
    assert all(np.array_equal(second.load()[n], a) for n, a in first.load().items())
    assert second.measured == first.measured


@pytest.mark.parametrize(
    ("graph", "statistics", "budget"),
    [
        (made(normal(K, N, seed=9)), SEEN, {}),
        (made(bias=normal(N, seed=9)), SEEN, {}),
        (made(bias=normal(N)), dataclasses.replace(SEEN, name="other data"), {}),
        (made(bias=normal(N)), SEEN, {"rank": 2}),
        (made(bias=normal(N)), SEEN, {"rank": "full"}),
    ],
    ids=["weight", "bias", "data", "rank", "form"],
)
def test_whatever_factors_depend_on_is_in_their_key(
    graph: ir.Model, statistics: Statistics, budget: dict[str, Any], tmp_path: Path
) -> None:
    method = Counting(SVD)
    factorized(made(bias=normal(N)), tmp_path, SEEN, method)
    factorized(graph, tmp_path, statistics, method, **budget)
    assert method.count == 2


# --- broken plugins -----------------------------------------------------------------------------------------------


def test_a_claim_that_is_broken(tmp_path: Path) -> None:
    method = Counting(SVD, lambda arrays: {**arrays, "a": arrays["a"] * 1.1})
    with pytest.raises(
        PluginError, match=r"svd claimed at most [\d.e-]+ for layer and its factors have [\d.e-]+"
    ):
        factorized(made(), tmp_path, SEEN, method)


# 1e60 is finite, but not in float32; a bias is kept in float64 until it is rounded to the type of its constant
@pytest.mark.parametrize(
    ("name", "bad"),
    [(n, b) for n in ("a", "b", "bias.0") for b in (np.nan, np.inf, 1e60) if (n, b) != ("bias.0", 1e60)],
)
def test_factors_that_are_not_finite(name: str, bad: float, tmp_path: Path) -> None:
    def spoil(arrays: dict[str, Array]) -> dict[str, Array]:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[0] = bad
        return arrays

    with pytest.raises(PluginError, match=f"svd gave NaN or Inf in factor '{name}' of layer"):
        factorized(made(bias=normal(N)), tmp_path, SEEN, Counting(SVD, spoil))


# --- biases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (-2.0, 0.25)])
def test_biases_there_and_back(alpha: float, beta: float, tmp_path: Path) -> None:
    """b with output = alpha (x W + b) and back in the constant that Gemm multiplies by beta."""
    b = normal(1, N)
    (site,) = find(made(bias=b, alpha=alpha, beta=beta)).sites
    seen = ModelWeights(Cache(tmp_path), 18).bias(site)
    assert seen is not None
    np.testing.assert_allclose(alpha * seen, beta * b[0], rtol=1e-7)
    back = bias_in_place(site, seen)
    assert back.shape == (1, N)
    np.testing.assert_allclose(back, b, rtol=1e-7)


def test_no_bias_where_the_product_is_nothing(tmp_path: Path) -> None:
    (site,) = find(made(bias=normal(N), alpha=0.0)).sites
    assert ModelWeights(Cache(tmp_path), 18).bias(site) is None
