"""Families of cores: exact on what has the structure, through the compiled model; bounds; fits; found by a plan; folded under disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.blocks import block_svd
from lrcompile.contraction import Network
from lrcompile.cores import product
from lrcompile.curves import Whole, prepare
from lrcompile.edited import check_plan
from lrcompile.errors import UsageError
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.fitting import fitted
from lrcompile.folding import folded_constants
from lrcompile.interfaces import Array, CandidateOptions
from lrcompile.loss import group_loss
from lrcompile.lower import lower
from lrcompile.networks import NetworkFactorization
from lrcompile.plan import choose
from lrcompile.records import Amount, Budget, Candidate, Decision, InputStatistics, Plan, Reaction, Site
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.tables import plan_table
from lrcompile.weighing import Weighing, scaled, weighing_of
from lrcompile.weights import ModelWeights
from lrcompile_passes.tensor_train import modes, rounded, tt_svd
from tests.graphs import model, node, normal

FAMILIES = ("tt", "btt", "monarch", "kronecker")
FEW = settings(max_examples=15, deadline=None)


def family_of(name: str) -> NetworkFactorization:
    found = factorization(name)
    assert isinstance(found, NetworkFactorization)
    return found


def layer(W: Array, bias: bool = False) -> ir.Model:
    constants = {"w": W.astype(np.float32)} | ({"b": normal(W.shape[1], seed=9)} if bias else {})
    made = [node("MatMul", ["x", "w"], ["p" if bias else "y"], name="layer")]
    if bias:
        made.append(node("Add", ["p", "b"], ["y"], name="plus"))
    return model(made, {"x": (("n", W.shape[0]), np.float32)}, {"y": np.float32}, constants)


class Seen:
    """A statistics source that knows one thing of every site."""

    def __init__(self, known: InputStatistics) -> None:
        self.known = known

    def of(self, site: Site) -> InputStatistics | None:
        return self.known

    def key(self, site: Site) -> str:
        return f"{self.known.count}-{self.known.reaction is not None}"


def statistics(K: int, N: int, reacts: bool = False) -> Seen:
    X = (
        normal(4 * K, K, dtype=np.float64)
        @ np.diag(np.geomspace(3, 0.05, K))
        @ normal(K, K, seed=1, dtype=np.float64)
    )
    reaction = None
    if reacts:
        A, B = normal(K, K, seed=2, dtype=np.float64), normal(N, N, seed=3, dtype=np.float64)
        reaction = Reaction(A @ A.T / np.trace(A @ A.T), B @ B.T / N + np.eye(N), 0.3)
    X = X + 0.5
    return Seen(InputStatistics(len(X), X.T @ X / len(X), X.mean(axis=0), reaction=reaction))


def truth(
    name: str, K: int, N: int, structure: tuple[tuple[str, int | str], ...], rank: int, seed: int = 0
) -> Array:
    """A weight that has the structure."""
    network = family_of(name).family.network(K, N, structure, rank)
    rng = np.random.default_rng(seed)
    return product(network, [rng.standard_normal(network.shape(axes)) for axes in network.cores])


def made(graph: ir.Model, candidate: Candidate, cache: Path, seen: Seen | None = None) -> FactorSet:
    (group,) = find(graph).groups
    decision = Decision(
        group.name, tuple(s.name for s in group.sites), candidate.method, candidate.rank, None, candidate.error, candidate.bound,
        group.elements, candidate.cost.parameters, 0, 0, 0, 0, "", candidate.structure,
    )  # fmt: skip
    method = family_of(candidate.method)
    plan = Plan("reference", (decision,))
    return factorize(
        plan, {group.name: group}, ModelWeights(Cache(cache), 18), seen, {method.name: method}, 0
    )[0]


def forms(
    name: str, graph: ir.Model, cache: Path, ranks: Sequence[int], seen: Seen | None = None
) -> list[Candidate]:
    (group,) = find(graph).groups
    weights = ModelWeights(Cache(cache), 18)
    return list(family_of(name).candidates(group, weights, seen, CandidateOptions(ranks=tuple(ranks))))


def run(graph: ir.Model, x: Array) -> Array:
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: Array = session.run(None, {"x": x})[0]
    return found


TRUE_FORMS = [
    ("kronecker", 24, 30, (("k0", 4), ("n0", 5)), 1),
    ("kronecker", 24, 30, (("k0", 4), ("n0", 5)), 3),
    ("monarch", 24, 36, (("c", 4), ("b", 6)), 1),
    ("btt", 24, 32, (("k", "4x6"), ("n", "8x4")), 3),
    ("btt", 16, 32, (("k", "2x2x4"), ("n", "8x2x2")), 2),
    ("tt", 24, 24, (("k", "2x4x3"), ("n", "2x4x3"), ("order", "paired")), 4),
    ("tt", 24, 24, (("k", "2x4x3"), ("n", "2x4x3"), ("order", "crossed")), 4),
    ("tt", 36, 25, (("k", "6x6"), ("n", "5x5"), ("order", "split")), 3),
]


@pytest.mark.parametrize(("name", "K", "N", "structure", "rank"), TRUE_FORMS)
@pytest.mark.parametrize("data", [False, True])
def test_exact_on_what_has_the_structure(
    tmp_path: Path,
    name: str,
    K: int,
    N: int,
    structure: tuple[tuple[str, int | str], ...],
    rank: int,
    data: bool,
) -> None:
    """At its true size, through the compiled model, with the data's moments and without."""
    W = truth(name, K, N, structure, rank).astype(np.float32).astype(float)
    graph = layer(W)
    seen = statistics(K, N, reacts=True) if data else None
    family = family_of(name).family
    form = next(
        (c for c in forms(name, graph, tmp_path, [rank], seen) if c.structure == structure),
        Candidate(name, rank, forms(name, graph, tmp_path, [1])[0].cost, 0.0, False, structure),
    )
    found = made(graph, form, tmp_path, seen)
    assert found.measured < 1e-6  # the weight was rounded to float32, and so are the cores
    assert (
        sum(int(np.prod(s)) for n, s in found.shapes.items() if n != "bias.0")
        == family.network(K, N, structure, rank).parameters
    )
    x = normal(7, K)
    lowered = lower(rewrite(graph, (found,)), ())
    assert not {"Einsum", "Gemm"} & {n.op_type for n in lowered.graph}
    np.testing.assert_allclose(run(lowered, x), x @ W, atol=3e-5 * np.abs(x @ W).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_another_matrix_is_not_exact(tmp_path: Path, name: str) -> None:
    """The control: a random weight has none of the structures."""
    graph = layer(normal(24, 24))
    form = min(forms(name, graph, tmp_path, [1]), key=lambda c: c.cost.parameters)
    assert made(graph, form, tmp_path).measured > 0.3


@given(
    seed=st.integers(0, 99), shape=st.lists(st.integers(1, 5), min_size=2, max_size=5), rank=st.integers(1, 6)
)
@FEW
def test_tt_svd_is_within_its_bound_and_rounding_too(seed: int, shape: list[int], rank: int) -> None:
    tensor = np.random.default_rng(seed).standard_normal(shape)

    def whole(cores: Sequence[Array]) -> Array:
        out = cores[0]
        for core in cores[1:]:
            out = np.tensordot(out, core, axes=1)
        return out.reshape(shape)

    tails = 0.0
    bonds = []
    for cut in range(1, len(shape)):
        values = np.linalg.svd(tensor.reshape(int(np.prod(shape[:cut])), -1), compute_uv=False)
        tails += float(np.sum(values[rank:] ** 2))
        bonds.append(min(rank, len(values)))
    full = tt_svd(tensor, [10**9] * (len(shape) - 1))
    np.testing.assert_allclose(whole(full), tensor, atol=1e-12)
    best = max(float(np.sum(np.linalg.svd(tensor.reshape(int(np.prod(shape[:c])), -1), compute_uv=False)[rank:] ** 2))
               for c in range(1, len(shape)))  # fmt: skip
    for cores in (tt_svd(tensor, bonds), rounded(full, bonds)):
        assert [c.shape[2] for c in cores[:-1]] <= bonds
        error = float(np.sum((whole(cores) - tensor) ** 2))
        assert best - 1e-9 <= error <= tails + 1e-9


@pytest.mark.parametrize(
    ("n", "count", "wanted"), [(576, 3, (8, 9, 8)), (1536, 3, (8, 16, 12)), (384, 2, (16, 24))]
)
def test_modes_are_even(n: int, count: int, wanted: tuple[int, ...]) -> None:
    assert modes(n, count) == wanted


@pytest.mark.parametrize(
    ("n", "padded"), [(30522, True), (127, True), (997, True), (576, False), (12, False), (7, False)]
)
def test_padding_only_where_it_pays(n: int, padded: bool) -> None:
    for count in (3, 4):
        product_ = int(np.prod(modes(n, count)))
        assert n <= product_ <= n + n / 32
        if not padded:
            assert product_ == n
    assert not padded or int(np.prod(modes(n, 3))) > n


@given(
    K=st.sampled_from([6, 8, 12]),
    N=st.sampled_from([4, 9, 12]),
    seed=st.integers(0, 9),
    c=st.sampled_from([1, 2]),
)
@FEW
def test_blocks_are_the_best_of_their_rank(K: int, N: int, seed: int, c: int) -> None:
    """What is left at each rank, against an SVD of every block by itself."""
    W = np.random.default_rng(seed).standard_normal((K, N))
    b = 2 if N % 2 == 0 else 3
    found = block_svd(W, Weighing(None, 1.0), c, b)
    for rank, lost in enumerate(found["energy"]):
        blocks = [W[g * K // c : (g + 1) * K // c, beta::b] for g in range(c) for beta in range(b)]
        tails = sum(float(np.sum(np.linalg.svd(block, compute_uv=False)[rank:] ** 2)) for block in blocks)
        assert lost == pytest.approx(tails, abs=1e-9)
        low = found["left"][..., :rank] @ found["right"][:, :, :rank]
        again = low.transpose(0, 2, 3, 1).reshape(K, N)
        assert float(np.sum((W - again) ** 2)) == pytest.approx(tails, abs=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reacts", [False, True])
def test_a_fit_never_errs_more_than_its_start_and_mostly_less(name: str, reacts: bool) -> None:
    K, N = 24, 24
    family = family_of(name).family
    W = normal(K, N, dtype=np.float64) @ np.diag(np.geomspace(1, 0.1, N))
    seen = statistics(K, N, reacts).known
    assert seen.second is not None
    weighing = Weighing(
        seen.second, 1.0, (seen.weighing(False), seen.reaction.output) if seen.reaction else None
    )
    left, right = weighing.fitted

    def counts(cores: Sequence[Array], network: Network) -> float:
        E = W - product(network, cores)
        return float(np.vdot(left @ E, E if right is None else E @ right))

    for structure in family.structures(K, N):
        rank = min(2, family.largest(K, N, structure))
        network = family.network(K, N, structure, rank)
        start = family.cores(W, family.decompose(W, weighing, structure), structure, rank)
        before, after = counts(start, network), counts(fitted(W, network, start, left, right), network)
        assert after <= before * (1 + 1e-9)
        if name == "kronecker" or (name == "tt" and ("order", "split") not in structure):
            assert after < 0.9 * before  # their start knows nothing of the moments


def test_a_fit_finds_the_least_squares_of_one_core() -> None:
    """Of a network of one core the fit is the weight itself; four steps do it for four different eigenvalues."""
    W = normal(6, 5, dtype=np.float64)
    network = Network(("k0",), ("n0",), (("k0", "n0"),), {"k0": 6, "n0": 5})
    (core,) = fitted(W, network, [np.zeros((6, 5))], np.diag([1.0, 1.0, 2.0, 3.0, 4.0, 4.0]), None)
    np.testing.assert_allclose(core, W, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("reacts", [False, True])
def test_claims_are_those_of_the_start(tmp_path: Path, name: str, reacts: bool) -> None:
    """Error and movement at an asked rank, against the start's own by brute force: of a structure that can win the same, of others about."""
    K, N = 24, 24
    family, seen = family_of(name).family, statistics(K, N, reacts)
    true = family.structures(K, N)[0]
    W = truth(name, K, N, true, 1) + 0.05 * normal(K, N, dtype=np.float64)
    graph = layer(W, bias=True)
    (group,) = find(graph).groups
    weights = ModelWeights(Cache(tmp_path), 18)
    W = weights.matrix(group.sites[0])
    known = seen.known
    assert known.second is not None and known.mean is not None
    covariance = known.second - np.outer(known.mean, known.mean)
    checked = 0
    for form in forms(name, graph, tmp_path, [1], seen):
        if form.folds:
            continue
        assert form.rank is not None and not form.bound
        found = family.decompose(W, weighing_of(group, weights, seen), form.structure)
        network = family.network(K, N, form.structure, form.rank)
        E = W - product(network, family.cores(W, found, form.structure, form.rank))
        wanted = np.sqrt(np.trace(E.T @ covariance @ E) / np.trace(W.T @ known.second @ W))
        factor = 1 + 1e-5 if form.structure == true else 3.0
        checked += form.structure == true
        assert wanted / factor <= form.error <= wanted * factor
        if not reacts:
            assert form.movement is None
            continue
        assert known.reaction is not None and form.movement is not None
        moved = 0.7 * covariance + 0.3 * np.trace(covariance) * known.reaction.input
        wanted = np.trace(E.T @ moved @ E @ known.reaction.output)
        assert wanted / factor**2 <= form.movement <= wanted * factor**2
    assert checked == 1


def test_biases_absorb_the_mean(tmp_path: Path) -> None:
    graph, seen = layer(normal(24, 24), bias=True), statistics(24, 24)
    form = forms("btt", graph, tmp_path, [2], seen)[0]
    found = made(graph, form, tmp_path, seen)
    arrays = found.load()
    (group,) = find(graph).groups
    weights = ModelWeights(Cache(tmp_path), 18)
    assert seen.known.mean is not None
    w = found.method.reconstruct(group, arrays)["layer", "weight"]
    moved = seen.known.mean @ (weights.matrix(group.sites[0]) - w)
    np.testing.assert_allclose(arrays["bias.0"], normal(24, seed=9) + moved, atol=1e-5)
    without = {n: a for n, a in arrays.items() if n != "bias.0"}
    assert found.measured < group_loss(group, weights, seen, found.method.reconstruct(group, without))


def test_a_scaled_curve_goes_through_what_was_measured() -> None:
    proxy = np.array([8.0, 4.0, 2.0, 1.0, 0.0])
    curve = scaled(proxy, [1, 3], {1: 6.0, 3: 1.0}.__getitem__)
    assert curve[[1, 3]] == pytest.approx([6.0, 1.0])
    assert curve[0] == pytest.approx(12.0) and 2.0 < curve[2] < 3.0 and curve[4] == 0.0


@pytest.mark.parametrize("K", [127, 128])
def test_padding_is_cut_off_again(tmp_path: Path, K: int) -> None:
    """A prime is padded to 128; at full rank both are exact, through the compiled model."""
    graph = layer(normal(K, 127))
    (group,) = find(graph).groups
    weights, method = ModelWeights(Cache(tmp_path), 18), family_of("tt")
    (form,) = method.candidates(group, weights, None, CandidateOptions(full=True))
    assert form.structure[:2] == (("k", "4x8x4"), ("n", "4x8x4"))
    lowered = lower(rewrite(graph, (made(graph, form, tmp_path),)), ())
    assert {"Pad", "Slice"} & {n.op_type for n in lowered.graph} == (
        {"Pad", "Slice"} if K == 127 else {"Slice"}
    )
    x = normal(3, K)
    wanted = x @ normal(K, 127)
    np.testing.assert_allclose(run(lowered, x), wanted, atol=3e-5 * np.abs(wanted).max())


# --- disk ---------------------------------------------------------------------------------------------------------


def problem(graph: ir.Model, cache: Path, methods: Sequence[str], **budget: object):  # type: ignore[no-untyped-def]
    found = [factorization(m) for m in methods]
    return prepare(find(graph), ModelWeights(Cache(cache), 18), None, found, Budget(**budget), target="t")  # type: ignore[arg-type]


def test_what_takes_more_products_is_refused_but_for_the_disk(tmp_path: Path) -> None:
    graph = layer(truth("kronecker", 64, 64, (("k0", 8), ("n0", 8)), 12))
    (curve,) = problem(graph, tmp_path, ["kronecker"], rank=12, objective="size").curves
    assert not curve.candidates
    assert "--objective disk" in curve.reason and "more multiplications than the weight" in curve.reason
    (curve,) = problem(graph, tmp_path, ["kronecker"], rank=12, objective="flops").curves
    assert not curve.candidates and "--objective disk" in curve.reason and "as many FLOPs" in curve.reason
    (curve,) = problem(graph, tmp_path, ["kronecker"], rank=12, objective="disk").curves
    assert curve.candidates and all(c.folds for c in curve.candidates)
    best = min(curve.candidates, key=lambda c: c.error)
    assert best.error < 1e-5 and best.cost.flops == 2 * 64 * 64


def test_a_plan_that_folds_is_for_the_disk_only(tmp_path: Path) -> None:
    graph = layer(truth("kronecker", 64, 64, (("k0", 8), ("n0", 8)), 12))
    plan = choose(problem(graph, tmp_path, ["kronecker"], rank=12, objective="disk"))
    methods, weights = {"kronecker": factorization("kronecker")}, ModelWeights(Cache(tmp_path), 18)
    assert check_plan(plan, find(graph), methods, weights, None, "t", "disk").rewritten[0].folds
    with pytest.raises(UsageError, match="--objective disk"):
        check_plan(plan, find(graph), methods, weights, None, "t")


def test_folded_cores_lie_in_the_file_and_the_engine_has_the_weight(tmp_path: Path) -> None:
    W = truth("tt", 64, 64, (("k", "4x4x4"), ("n", "4x4x4"), ("order", "paired")), 12)
    graph = layer(W)
    plan = choose(problem(graph, tmp_path, ["tt"], rank=12, objective="disk"))
    (decision,) = plan.rewritten
    (group,) = find(graph).groups
    sets = factorize(
        plan, {group.name: group}, ModelWeights(Cache(tmp_path), 18), None, {"tt": factorization("tt")}, 0
    )
    lowered = lower(rewrite(graph, sets), ())
    stored = sum(
        v.const_value.nbytes for v in lowered.graph.initializers.values() if v.const_value is not None
    )
    assert decision.folds and stored == decision.bytes_after < W.size * 4
    x = normal(5, 64)
    np.testing.assert_allclose(run(lowered, x), x @ W, atol=3e-5 * np.abs(x @ W).max())
    assert folded_constants(lowered) == 1
    assert [n.op_type for n in lowered.graph if n.op_type != "Constant"] == ["MatMul"]
    (weight,) = lowered.graph.initializers.values()
    assert weight.const_value is not None and tuple(weight.const_value.shape) == (64, 64)
    np.testing.assert_allclose(run(lowered, x), x @ W, atol=3e-5 * np.abs(x @ W).max())
    assert folded_constants(lowered) == 0


def test_products_that_x_takes_part_in_are_left_alone(tmp_path: Path) -> None:
    graph = layer(truth("btt", 24, 24, (("k", "2x12"), ("n", "12x2")), 2))
    found = made(graph, forms("btt", graph, tmp_path, [2])[0], tmp_path)
    lowered = lower(rewrite(graph, (found,)), ())
    before = [n.op_type for n in lowered.graph]
    assert folded_constants(lowered) == 0
    assert [n.op_type for n in lowered.graph] == before


def test_a_budget_of_bytes_under_disk_counts_the_cores(tmp_path: Path) -> None:
    W = truth("tt", 64, 64, (("k", "4x4x4"), ("n", "4x4x4"), ("order", "paired")), 6)
    graph = layer(W)
    found = [factorization("tt"), factorization("svd-plain")]
    finding, weights = find(graph), ModelWeights(Cache(tmp_path), 18)
    whole = Whole(W.size * 4, {"layer": 1})
    budget = Budget(size=Amount(0.4, relative=True), objective="disk")
    plan = choose(prepare(finding, weights, None, found, budget, target="t", whole=whole))
    (decision,) = plan.rewritten
    assert decision.method == "tt" and decision.folds and decision.bytes_after <= 0.4 * W.size * 4
    assert decision.saves == ("disk",)
    (said,) = (line for line in plan_table(plan, why=True).splitlines() if decision.reason in line)
    assert "disk" in said.removesuffix(decision.reason).split()
    budget = Budget(size=Amount(0.4, relative=True))
    (decision,) = choose(prepare(finding, weights, None, found, budget, target="t", whole=whole)).rewritten
    assert decision.method == "svd-plain" and decision.saves == ("disk", "memory", "time")


def read(graph: ir.Model) -> Mapping[str, tuple[int, ...]]:
    return {
        n: tuple(v.const_value.shape.numpy())
        for n, v in graph.graph.initializers.items()
        if v.const_value is not None
    }


def test_names_of_cores_are_for_readers(tmp_path: Path) -> None:
    graph = layer(truth("btt", 24, 32, (("k", "4x6"), ("n", "8x4")), 3))
    form = next(c for c in forms("btt", graph, tmp_path, [3]) if c.structure == (("k", "4x6"), ("n", "8x4")))
    lowered = lower(rewrite(graph, (made(graph, form, tmp_path),)), ())
    assert read(lowered) == {
        "layer/btt/core0.k0_4.k1_6.n1_4.s1_3": (4, 6, 12),
        "layer/btt/core1.n1_4.k0_4.s1_3.n0_8": (4, 12, 8),
    }
