"""grouped, tt-table and tt-vector: what they are exact on, ids of every kind, the tied head, counts, refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.curves import too_old
from lrcompile.errors import PluginError
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.interfaces import CandidateOptions, Factorization, Factors
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.records import Candidate, Decision, Group, InputStatistics, Plan, Site
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from tests.graphs import Array, model, node, normal, run
from tests.graphs import weights as new_weights

METHODS = ("grouped", "tt-table", "tt-vector")
# Products of a few dozen float64 numbers of size one, behind decompositions of Gram matrices.
EXACT = 1e-6
# The same in float32, a few products deep.
ROUNDING = 2e-5
# float16 keeps three digits, and three products follow each other.
HALF = 1e-2


class Seen:
    """Tables are asked for each row as often as `shares` say; heads see white noise."""

    def __init__(self, shares: Array) -> None:
        self.shares = shares / shares.sum()

    def of(self, site: Site) -> InputStatistics:
        if site.kind == "lookup":
            return InputStatistics(1000, frequencies=self.shares)
        return InputStatistics(1000, np.eye(site.K), np.zeros(site.K))

    def key(self, site: Site) -> str:
        return "seen"


def lookups(W: Array, ids: Any = np.int64, shape: tuple[str, ...] = ("b", "s"), opset: int = 18) -> ir.Model:
    nodes = [node("Gather", ["w", "ids"], ["y"], name="table")]
    return model(nodes, {"ids": (shape, ids)}, {"y": W.dtype}, {"w": W}, opset=opset)


def tied(W: Array) -> ir.Model:
    nodes = [
        node("Gather", ["w", "ids"], ["e"], name="table"),
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("MatMul", ["x", "wt"], ["y"], name="head"),
    ]
    inputs = {"ids": (("b", "s"), np.int64), "x": (("n", W.shape[1]), W.dtype)}
    return model(nodes, inputs, {"e": W.dtype, "y": W.dtype}, {"w": W})


def forms(name: str, made: ir.Model, shares: Array, **options: Any) -> Iterator[tuple[Candidate, FactorSet]]:
    """Every candidate, carried out."""
    group, weights, seen = find(made).groups[0], new_weights(), Seen(shares)
    method = factorization(name)
    for candidate in method.candidates(group, weights, seen, CandidateOptions(**options)):
        (factors,) = factorize(
            plan_of(group, candidate), {group.name: group}, weights, seen, {name: method}, 0
        )
        yield candidate, factors


def plan_of(group: Group, candidate: Candidate) -> Plan:
    n = group.elements
    return Plan("reference", (Decision(
        group.name, tuple(s.name for s in group.sites), candidate.method, candidate.rank, None, candidate.error, candidate.bound,
        n, candidate.cost.parameters, 4 * n, candidate.cost.bytes, 0, candidate.cost.flops, "", candidate.structure,
    ),))  # fmt: skip


def in_runtime(made: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # ids outside of the table are logged as errors before they are raised
    proto = ir.to_proto(made).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, dict(feeds))
    return found


def equal(a: Array, b: Array, tolerance: float) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max(initial=0.0))), rtol=0)


def low(rows: int, columns: int, rank: int, seed: int) -> Array:
    return normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


def train(*ranks: int, base: int, columns: int) -> Array:
    """A table whose row is G1[i1] G2[i2] G3[i3] B, (base^3, columns)."""
    one, two, three = (1, *ranks)[:-1], ranks, range(3)
    cores = [normal(base, a, b, seed=i).astype(np.float64) for i, a, b in zip(three, one, two, strict=True)]
    rows = np.einsum("iab,jbc,kcd->ijkd", *cores).reshape(base**3, -1)
    made: Array = (rows @ normal(ranks[-1], columns, seed=9)).astype(np.float32)
    return made


def test_rows_that_need_no_rank_get_none() -> None:
    """A quarter of the rows is asked for nearly always and has full rank, the others have rank 2 in two groups."""
    V, D = 60, 12
    ids = np.random.default_rng(0).permutation(V)
    W = np.empty((V, D), np.float32)
    W[ids[:15]], W[ids[15:30]], W[ids[30:]] = normal(15, D), low(15, D, 2, 3), low(30, D, 2, 5)
    shares = np.empty(V)
    shares[ids] = np.geomspace(1, 0.01, V)
    true = 17 * D + (17 + D) * 2 + (32 + D) * 2  # two rows of zeros about every group
    made = lookups(W)
    candidate, factors = next(f for f in forms("grouped", made, shares) if f[0].error < EXACT)
    assert candidate.cost.parameters <= true + V + D  # sizes come in steps of a pair's rank
    asked = {"ids": np.arange(-V, V).reshape(2, V)}
    equal(run(lower(rewrite(made, (factors,)), ()), asked)["y"], W[np.arange(-V, V).reshape(2, V)], ROUNDING)
    # a common rank for all rows is much worse at the same size
    pairs = [c for c, _ in forms("svd", made, shares) if c.cost.parameters <= candidate.cost.parameters]
    assert min(c.error for c in pairs) > 0.1


def test_a_train_of_digits_is_found_at_its_size() -> None:
    W = train(2, 3, 2, base=4, columns=6)
    table = lookups(W)
    candidate, factors = next(f for f in forms("tt-table", table, np.ones(64)) if f[0].error < EXACT)
    assert dict(candidate.structure) == {"form": "cloud", "order": "natural", "ranks": "2x3x2"}
    assert candidate.cost.parameters == 4 * 2 + 4 * 2 * 3 + 4 * 3 * 2 + 2 * 6 + 64
    made = lower(rewrite(table, (factors,)), ())
    equal(run(made, {"ids": np.arange(64)[None]})["y"][0], W, ROUNDING)
    assert "order" not in factors.shapes


def test_an_order_finds_like_rows() -> None:
    """Clusters of equal rows, shuffled: in the order of the ids no digit says anything."""
    W = np.repeat(normal(4, 6), 16, axis=0)[np.random.default_rng(1).permutation(64)]
    errors: dict[str | int, float] = {}
    for candidate, factors in forms("tt-table", lookups(W), np.ones(64), ranks=(4,)):
        chosen = dict(candidate.structure)
        if chosen["form"] == "cloud":
            errors[chosen["order"]] = factors.measured
    assert errors["bisection"] < EXACT and errors["natural"] > 0.2


def test_a_train_for_each_row_is_found_at_its_size() -> None:
    W = np.einsum("vi,vj->vij", normal(10, 3), normal(10, 4, seed=1)).reshape(10, 12)
    table = lookups(W)
    candidate, factors = next(forms("tt-vector", table, np.ones(10)))
    assert (candidate.rank, candidate.cost.parameters) == (1, 10 * (3 + 4))
    assert factors.measured < EXACT
    equal(run(lower(rewrite(table, (factors,)), ()), {"ids": np.arange(10)[None]})["y"][0], W, ROUNDING)


@pytest.mark.parametrize("name", METHODS)
@given(V=st.integers(1, 40), D=st.integers(1, 14), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_every_size(name: str, V: int, D: int, seed: int) -> None:
    made, shares = lookups(normal(V, D, seed=seed)), np.random.default_rng(seed).dirichlet(np.ones(V))
    ids = {"ids": np.arange(-V, V).reshape(2, V)}
    for candidate, factors in forms(name, made, shares, ranks=(1, min(V, D))):
        stored = {n: a for n, a in factors.load().items() if a.dtype.kind == "f"}
        assert sum(a.size for a in stored.values()) == candidate.cost.parameters
        assert candidate.cost.bytes - 4 * candidate.cost.parameters in (0, 4 * V)
        assert factors.measured <= candidate.error + 1e-6  # float32 rounds the factors
        ours, oracle = rewrite(made, (factors,)), reconstructed(made, (factors,))
        equal(run(lower(ours, ()), ids)["y"], run(oracle, ids)["y"], ROUNDING)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(), ("n",), ("a", "b", "c")])
def test_ids_are_taken_as_the_original_takes_them(name: str, kind: Any, shape: tuple[str, ...]) -> None:
    V = 29
    made = lookups(normal(V, 6), kind, shape)
    original_fails = []
    for _, factors in forms(name, made, np.arange(1.0, V + 1), ranks=(1, 3)):
        ours, oracle = lower(rewrite(made, (factors,)), ()), reconstructed(made, (factors,))
        for value in (0, V - 1, -1, -V):
            ids = {"ids": np.full((1,) * len(shape), value, kind)}
            equal(in_runtime(ours, ids)[0], in_runtime(oracle, ids)[0], ROUNDING)
        if shape:
            none = {"ids": np.zeros((2,) * (len(shape) - 1) + (0,), kind)}
            assert in_runtime(ours, none)[0].shape == (*none["ids"].shape, 6)
        for value in (V, -V - 1, 10 * V):
            ids = {"ids": np.full((1,) * len(shape), value, kind)}
            for graph in (made, ours):
                with pytest.raises(Exception, match="out of data bounds"):
                    in_runtime(graph, ids)
                with pytest.raises(IndexError):
                    run(graph, ids)
                original_fails.append(graph is made)
    assert any(original_fails)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str) -> None:
    made = lookups(low(50, 12, 4, 0).astype(np.float16), opset=21)
    ids = {"ids": np.arange(-50, 50)[None]}
    for _, factors in forms(name, made, np.geomspace(1, 1e-6, 50), ranks=(3,)):
        ours, oracle = lower(rewrite(made, (factors,)), ()), reconstructed(made, (factors,))
        equal(in_runtime(ours, ids)[0], in_runtime(oracle, ids)[0], HALF)


def test_a_tied_head_reads_the_same_factors() -> None:
    W = low(40, 8, 5, 0) + 0.1 * normal(40, 8)
    made, shares = tied(W), np.geomspace(1, 1e-3, 40)
    feeds = {"ids": np.arange(-40, 40)[None], "x": normal(3, 8)}
    seen = 0
    for candidate, factors in forms("grouped", made, shares, ranks=(2, 4, 6)):
        ours = lower(rewrite(made, (factors,)), ())
        floats = [v for v in ours.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
        stored = sum(int(np.prod(v.const_value.shape.numpy())) for v in floats if v.const_value is not None)
        assert stored == candidate.cost.parameters  # once
        for a, b in zip(
            in_runtime(ours, feeds), in_runtime(reconstructed(made, (factors,)), feeds), strict=True
        ):
            equal(a, b, ROUNDING)
        assert candidate.error == pytest.approx(
            factors.measured, rel=0.5
        )  # an estimate: two readers, one weighing
        seen += 1
    assert seen == 3


class Rolled:
    """A method whose ids are off by one."""

    def __init__(self, inner: Factorization) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def factorize(self, *args: Any) -> Factors:
        factors = dict(self.inner.factorize(*args))
        factors["order"] = np.roll(factors["order"], 1)
        return factors


@pytest.mark.parametrize("name", ["grouped", "tt-table"])
def test_a_wrong_order_breaks_the_claim(name: str) -> None:
    made, shares, weights = lookups(normal(40, 8)), np.ones(40), new_weights()
    group, method = find(made).groups[0], factorization(name)
    options = CandidateOptions(ranks=(5,))
    candidate = next(
        c
        for c in method.candidates(group, weights, Seen(shares), options)
        if ("order", "natural") not in c.structure
    )
    broken: Any = Rolled(method)
    with pytest.raises(PluginError, match="claimed at most"):
        factorize(plan_of(group, candidate), {group.name: group}, weights, Seen(shares), {name: broken}, 0)


def test_refusals() -> None:
    W = normal(9, 4)
    product = model([node("MatMul", ["x", "w"], ["y"])], {"x": ("n", 9)}, ["y"], {"w": W})
    columns = model(
        [node("Gather", ["w", "ids"], ["e"], name="rows"), node("Gather", ["w", "ids"], ["f"], name="columns", axis=1)],
        {"ids": (("n",), np.int64)}, ["e", "f"], {"w": W},
    )  # fmt: skip

    def said(name: str, made: ir.Model) -> str:
        refusal = factorization(name).serves(find(made).groups[0])
        assert refusal is not None
        return refusal.reason

    assert "by columns" in said("grouped", columns)
    for name in METHODS:
        assert "lookup" in said(name, product) or "looked up" in said(name, product)
        if name != "grouped":
            assert "lookups only" in said(name, tied(W))
            assert "columns" in said(name, columns)
    # before opset 12 nothing clips integers, before 14 no Reshape gives nothing
    old = new_weights()
    old.opset = 10
    group = find(lookups(W)).groups[0]
    for name in METHODS:
        assert not list(factorization(name).candidates(group, old, Seen(np.ones(9)), CandidateOptions()))
        said_of_it = too_old(factorization(name), old)
        assert said_of_it is not None and "opset 10" in said_of_it
        assert too_old(factorization(name), new_weights()) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tensorrt_builds_every_form(name: str, dtype: Any) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    tables = [lookups(low(200, 12, 4, 0).astype(dtype), kind, opset=21) for kind in (np.int64, np.int32)]
    if name == "grouped":
        tables.append(tied(low(200, 12, 4, 0).astype(dtype)))
    for table in tables:
        for _, factors in forms(name, table, np.geomspace(1, 1e-3, 200), ranks=(3,)):
            proto = ir.to_proto(lower(rewrite(table, (factors,)), ())).SerializeToString()
            for capability in ("SM86", "SM120"):
                assert serialized(trt, proto, capability) is not None


def serialized(trt: Any, proto: bytes, capability: str) -> Any:
    """An engine for this capability, None where the builder cannot make one. Needs no GPU."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(proto), parser.get_error(0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        profile.set_shape(value.name, *(tuple(n if d < 0 else d for d in value.shape) for n in (1, 4, 16)))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    return builder.build_serialized_network(network, config)
