"""What every registered factorization must hold, found through the registry: a new file is tested without a line here.

For a family of small sites (operators, shapes, biases, shared and tied weights, with data and without):
measured error <= claimed error; parameters as claimed; what is emitted computes what `reconstruct` says, in the reference runtime and in
ONNX Runtime; deterministic; exact to rounding at full rank where that is declared; refusals are sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from lrcompile import registry
from lrcompile.errors import PluginError
from lrcompile.factorize import factorize
from lrcompile.interfaces import Array, CandidateOptions, Factorization
from lrcompile.loss import group_loss
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.records import Candidate, Decision, Group, InputStatistics, Plan, Reaction, Site
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights

# those of Conv are held to the same in test_conv.py
METHODS = sorted(
    n for n, m in registry.factorizations().items() if "linear" in getattr(m, "kinds", ("linear",))
)
KINDS = ("matmul", "bias", "gemm", "left", "gather", "shared", "tied", "siblings", "ffn", "ffn bias")
# Types that forms of codes alone are offered in.
CODES = ("uint4", "int3-16s16", "int8")
# Forms of a weight that are carried out: of those with many structures some from all over.
_MOST = 6


@dataclass(frozen=True)
class Statistics:
    """A statistics source over given samples; linear inputs get a low-rank-ish second moment, so that weighting matters."""

    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return f"{site.name}-{self.known[site.name].count}" if site.name in self.known else ""


def model_of(kind: str, K: int, N: int, seed: int, rank: int) -> ir.Model:
    """One weight (K, N) of decaying spectrum, and its readers."""
    rng = np.random.default_rng(seed)
    W = (
        rng.standard_normal((K, rank)) @ rng.standard_normal((rank, N)) + 0.1 * rng.standard_normal((K, N))
    ).astype(np.float32)
    b = rng.standard_normal(N).astype(np.float32)
    w, c = ir.val("w", const_value=ir.tensor(W, name="w")), ir.val("c", const_value=ir.tensor(b, name="c"))
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape(["batch", K]))
    ids = ir.val("ids", ir.DataType.INT64, ir.Shape(["batch", 3]))
    tape = ir.tape.Tape()
    inputs, outputs = [x], []
    if kind in ("matmul", "bias", "shared"):
        y = tape.op("MatMul", [x, w])
        outputs.append(tape.op("Add", [y, c]) if kind == "bias" else y)
    if kind == "shared":
        outputs.append(tape.op("MatMul", [tape.op("Relu", [x]), w]))
    if kind == "gemm":
        outputs.append(tape.op("Gemm", [x, w, c], {"alpha": 0.5, "beta": 2.0}))
    if kind == "left":
        x.shape = ir.Shape([N, "batch"])
        outputs.append(tape.op("MatMul", [w, x]))
    if kind in ("gather", "tied"):
        inputs = [ids] if kind == "gather" else [ids, x]
        outputs.append(tape.op("Gather", [w, ids]))
    if kind == "tied":
        x.shape = ir.Shape(["batch", N])
        outputs.append(tape.op("MatMul", [x, tape.op("Transpose", [w], {"perm": [1, 0]})]))
    more: list[ir.Value] = []
    if kind == "siblings":  # weights that read one value
        more = [ir.val(f"w{i}", const_value=ir.tensor(W[::s], name=f"w{i}")) for i, s in ((1, -1), (2, 1))]
        outputs += [tape.op("MatMul", [x, v]) for v in (w, *more)]
    if kind.startswith("ffn"):
        back = rng.standard_normal((N, K)).astype(np.float32)
        more = [ir.val("down", const_value=ir.tensor(back, name="down"))]
        hidden = tape.op("MatMul", [x, w])
        if kind == "ffn bias":
            hidden = tape.op("Add", [hidden, c])
        y = tape.op("MatMul", [tape.op("Relu", [hidden]), more[0]])
        if kind == "ffn bias":
            more.append(ir.val("d", const_value=ir.tensor(back[0], name="d")))
            y = tape.op("Add", [y, more[1]])
        outputs.append(y)
    for i, y in enumerate(outputs):
        y.name, y.dtype = f"y{i}", ir.DataType.FLOAT
    used = [v for v in (w, c, *more) if v.uses()]
    graph = ir.Graph(inputs, outputs, nodes=tape.nodes, initializers=used, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=9)


def statistics_of(sites: tuple[Site, ...], seed: int, samples: int) -> Statistics:
    rng = np.random.default_rng(seed + 1)
    known = {}
    inputs: dict[str | None, Array] = {}
    for site in sites:
        if site.kind == "lookup":
            share = rng.dirichlet(np.ones(site.K))
            known[site.name] = InputStatistics(samples, frequencies=share)
        else:
            if site.data.name not in inputs:  # who reads one value sees one moment
                inputs[site.data.name] = (
                    rng.standard_normal((samples, site.K)) * np.geomspace(3, 0.01, site.K) + 0.5
                )
            X = inputs[site.data.name]
            reaction = None
            if seed % 2:  # known of every other model: how its outputs react
                A, B = (rng.standard_normal((n, n)) for n in (site.K, site.N))
                reaction = Reaction(A @ A.T / np.trace(A @ A.T), B @ B.T + np.eye(site.N), 0.3)
            known[site.name] = InputStatistics(samples, X.T @ X / samples, X.mean(axis=0), reaction=reaction)
    return Statistics(known)


def feeds_of(model: ir.Model, table: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed + 2)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = tuple(d if isinstance(d, int) else 5 for d in value.shape)
        if value.dtype == ir.DataType.INT64:
            feeds[value.name or ""] = rng.integers(-table, table, shape)
        else:
            feeds[value.name or ""] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def run(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, list[Array]]:
    proto = ir.to_proto(model)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.qdq_matmulnbits_accuracy_level", "1"
    )  # facts of the backend: else 5e-3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return {
        "reference": ReferenceEvaluator(proto).run(None, dict(feeds)),
        "ort": session.run(None, dict(feeds)),
    }


def decision(group: Group, candidate: Candidate) -> Decision:
    n = group.elements
    storage = (
        "float" if candidate.method == "dense" else candidate.storage
    )  # dense in its own type would rewrite nothing
    return Decision(
        group.name, tuple(s.name for s in group.sites), candidate.method, candidate.rank, storage, candidate.error,
        candidate.bound, n, candidate.cost.parameters, 4 * n, candidate.cost.bytes, 0, candidate.cost.flops, "", candidate.structure,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


def cases(method: Factorization, cache: Cache, kind: str, K: int, N: int, seed: int, with_data: bool) -> Iterator[
    tuple[ir.Model, Group, ModelWeights, Statistics | None, Candidate]
]:  # fmt: skip
    model = model_of(kind, K, N, seed, rank=max(1, min(K, N) // 3))
    finding = find(model)
    for group in finding.groups:
        if method.serves(group) is not None:
            continue
        weights = ModelWeights(cache, 18)
        statistics = statistics_of(group.sites, seed, samples=4 * max(K, N)) if with_data else None
        if method.needs_data and statistics is None:
            continue
        found = list(
            method.candidates(group, weights, statistics, CandidateOptions((1, 2, min(K, N)), storages=CODES))
        )
        for candidate in found[:: len(found) // _MOST + 1]:
            yield model, group, weights, statistics, candidate


SIZES = st.integers(2, 12)
FEW = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", METHODS)
@given(kind=st.sampled_from(KINDS), K=SIZES, N=SIZES, seed=st.integers(0, 99), with_data=st.booleans())
@FEW
def test_claims_and_emission(
    cache: Cache, name: str, kind: str, K: int, N: int, seed: int, with_data: bool
) -> None:
    method = registry.factorization(name)
    for model, group, weights, statistics, candidate in cases(method, cache, kind, K, N, seed, with_data):
        plan = Plan("reference", (decision(group, candidate),))
        (factors,) = factorize(plan, {group.name: group}, weights, statistics, {name: method}, 0)
        arrays = factors.load()
        stored = sum(a.size for n, a in arrays.items() if not n.startswith("bias") and a.dtype.kind != "i")
        assert stored == candidate.cost.parameters
        promised = {
            n: s.shape if isinstance(s, np.ndarray) else s for n, s in method.shapes(group, candidate).items()
        }
        assert promised == {n: a.shape for n, a in arrays.items() if not n.startswith("bias") and n != "kept"}
        if candidate.bound:
            assert factors.measured <= candidate.error + 1e-6
        measured = group_loss(group, weights, statistics, method.reconstruct(group, arrays))
        assert measured == pytest.approx(factors.measured, rel=1e-9, abs=1e-12)
        made = rewrite(model, (factors,))
        cut = any(role == "weight" for _, role in method.edits(group, arrays))
        assert {f.domain for f in made.functions.values()} == (set() if cut else {"lrcompile"})
        lowered = lower(made, ())
        assert not lowered.functions
        feeds = feeds_of(model, K, seed)
        oracle, ours = run(reconstructed(model, (factors,)), feeds), run(lowered, feeds)
        for runtime in oracle:
            for a, b in zip(oracle[runtime], ours[runtime], strict=True):
                np.testing.assert_allclose(b, a, atol=2e-5 * max(1.0, float(np.abs(a).max())), rtol=0)


@pytest.mark.parametrize("name", METHODS)
@given(kind=st.sampled_from(KINDS), K=SIZES, N=SIZES, seed=st.integers(0, 99))
@FEW
def test_full_rank_is_exact(cache: Cache, name: str, kind: str, K: int, N: int, seed: int) -> None:
    method = registry.factorization(name)
    if not method.exact_at_full_rank:
        return
    model = model_of(kind, K, N, seed, rank=max(1, min(K, N) // 3))
    for group in find(model).groups:
        if method.serves(group) is not None:
            continue
        weights = ModelWeights(cache, 18)
        made = list(method.candidates(group, weights, None, CandidateOptions(full=True)))
        assert len(made) == group.shares_weight  # --rank full takes every weight by itself
        for candidate in made:
            changed = method.reconstruct(group, method.factorize(group, weights, None, candidate, 0))
            for site in group.sites:
                W = weights.matrix(site)
                np.testing.assert_allclose(
                    changed[site.name, "weight"], W, atol=1e-12 * np.abs(W).max(), rtol=0
                )


@pytest.mark.parametrize("name", METHODS)
def test_deterministic(tmp_path: Path, name: str) -> None:
    method = registry.factorization(name)
    made: list[list[Array]] = []
    for turn in range(2):
        cache = Cache(
            tmp_path / str(turn)
        )  # an empty cache each: nothing may be remembered from the first turn
        arrays = []
        for kind in KINDS:
            for _, group, weights, statistics, candidate in cases(method, cache, kind, 9, 7, 3, True):
                given = method.factorize(group, weights, statistics, candidate, 0).values()
                arrays += [f if isinstance(f, np.ndarray) else f.values for f in given]
        made.append(arrays)
    assert made[0]
    assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_refusals_are_sentences(name: str) -> None:
    method = registry.factorization(name)
    model = model_of("tied", 6, 5, 0, 2)
    sites = find(model).sites
    odd = Group("qkv:x", "qkv", sites, (False,) * len(sites))
    refusal = method.serves(odd)
    assert refusal is None or (len(refusal.reason) > 10 and "\n" not in refusal.reason)


def test_a_broken_claim_is_caught(tmp_path: Path) -> None:
    """The contract itself can fail: a factorization that claims less error than its factors have is an error."""
    method = registry.factorization("svd-plain")
    _, group, weights, _, candidate = next(
        c for c in cases(method, Cache(tmp_path), "matmul", 12, 9, 1, True) if c[4].rank == 1
    )
    lie = decision(group, Candidate(candidate.method, 1, candidate.cost, candidate.error / 10))
    with pytest.raises(PluginError, match="claimed at most"):
        factorize(Plan("reference", (lie,)), {group.name: group}, weights, None, {"svd-plain": method}, 0)
