"""What every form of a kernel must hold, found through the registry: pictures of one to three axes, strides, dilations, padding, groups.

Measured error <= claimed error; parameters and FLOPs as claimed; what is emitted computes what the original Conv computes with the
reconstructed kernel, in the reference runtime and in ONNX Runtime; deterministic; exact at full rank, and on kernels that have the form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from lrcompile import registry
from lrcompile.cost import dense_flops, rows_of
from lrcompile.curves import knows
from lrcompile.errors import PluginError
from lrcompile.factorize import factorize
from lrcompile.graph import shapes_of
from lrcompile.interfaces import Array, CandidateOptions, Factorization
from lrcompile.loss import group_loss
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.patches import rows_of_windows
from lrcompile.records import Candidate, Decision, Finding, Group, InputStatistics, Plan, Reaction, Site
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights

METHODS = sorted(
    n for n, m in registry.factorizations().items() if "conv" in getattr(m, "kinds", ()) and n != "dense"
)
NUMPY = {"float": np.float32, "float16": np.float16, "double": np.float64}
# Of the largest output: sums of up to a hundred products, in ONNX Runtime's own order.
CLOSE = {"float": 2e-5, "float16": 2e-2, "double": 1e-12}


@dataclass(frozen=True)
class Case:
    """A Conv. group: parts of the channels; channels, outputs: of one part."""

    kernel: tuple[int, ...]
    channels: int = 4
    outputs: int = 5
    group: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    bias: bool = True
    dtype: str = "float"
    size: int = 9

    def attributes(self) -> dict[str, object]:
        given: dict[str, object] = {"group": self.group, "auto_pad": self.auto_pad}
        for name in ("strides", "dilations", "pads"):
            if value := getattr(self, name):
                given[name] = value
        return given

    def picture(self, seed: int, batch: int = 3) -> Array:
        """Smooth along all axes, and channels that go together, so that what a window sees is not white."""
        shape = (batch, self.channels * self.group, *(self.size,) * len(self.kernel))
        x = np.random.default_rng(seed).standard_normal(shape)
        for axis in range(1, x.ndim):
            x = x + 0.7 * np.roll(x, 1, axis)
        return (x + 0.3).astype(NUMPY[self.dtype])


def model_of(case: Case, seed: int = 0, kernel: Array | None = None) -> ir.Model:
    rng = np.random.default_rng(seed)
    n, dtype = case.outputs * case.group, NUMPY[case.dtype]
    if kernel is None:
        kernel = rng.standard_normal((n, case.channels, *case.kernel)) * np.geomspace(1, 0.1, n).reshape(
            -1, 1, *[1] * len(case.kernel)
        )
    w = ir.val("w", const_value=ir.tensor(kernel.astype(dtype), name="w"))
    b = ir.val("b", const_value=ir.tensor(rng.standard_normal(n).astype(dtype), name="b"))
    kind = ir.DataType[case.dtype.upper()]
    x = ir.val("x", kind, ir.Shape(["batch", case.channels * case.group, *(case.size,) * len(case.kernel)]))
    tape = ir.tape.Tape()
    y = tape.op("Conv", [x, w, b] if case.bias else [x, w], case.attributes())
    y.name, y.dtype = "y", kind
    used = [w, b] if case.bias else [w]
    graph = ir.Graph([x], [y], nodes=tape.nodes, initializers=used, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=9)


@dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]
    name: str = ""

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return f"{site.name}-{self.name}" if site.name in self.known else ""


def statistics_of(site: Site, case: Case, seed: int) -> Statistics:
    """Moments of the rows that the windows of seeded pictures are, by brute force; of every other seed reactions too."""
    assert site.window is not None
    rows = np.concatenate(
        [r.astype(np.float64) for r in rows_of_windows(case.picture(seed + 5, 12), site.window)]
    )
    second = np.stack([part.T @ part / len(rows) for part in rows.transpose(1, 0, 2)])
    second += 1e-3 * np.trace(second, axis1=1, axis2=2)[:, None, None] / site.K * np.eye(site.K)
    mean, reaction = rows.mean(axis=0), None
    if case.group == 1:
        second, mean = second[0], mean[0]
        if seed % 2:
            G = np.random.default_rng(seed).standard_normal((site.N, site.N))
            reaction = Reaction(second / np.trace(second), G @ G.T + np.eye(site.N), 0.0)
    known = InputStatistics(len(rows), second, mean, reaction=reaction)
    return Statistics({site.name: known}, f"{case}-{seed}")


def run(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By both runtimes; ONNX Runtime has no Conv of doubles on a CPU."""
    proto = ir.to_proto(model)
    found = {"reference": ReferenceEvaluator(proto).run(None, dict(feeds))[0]}
    if feeds["x"].dtype != np.float64:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        found["ort"] = session.run(None, dict(feeds))[0]
    return found


def decision(group: Group, candidate: Candidate, flops: int = 0) -> Decision:
    n = group.elements
    return Decision(
        group.name, tuple(s.name for s in group.sites), candidate.method, candidate.rank, candidate.storage, candidate.error,
        candidate.bound, n, candidate.cost.parameters, 4 * n, candidate.cost.bytes, flops, candidate.cost.flops, "", candidate.structure,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache"))


def candidates(
    method: Factorization, case: Case, cache: Cache, seed: int = 0, kernel: Array | None = None
) -> Iterator[tuple[ir.Model, Group, ModelWeights, Statistics, Candidate]]:
    model = model_of(case, seed, kernel)
    (group,) = find(model).groups
    if method.serves(group) is not None:
        return
    weights, statistics = ModelWeights(cache, 18), statistics_of(group.sites[0], case, seed)
    for candidate in method.candidates(group, weights, statistics, CandidateOptions()):
        yield model, group, weights, statistics, candidate


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))
    some = st.integers(1, 3 if rank < 3 else 2)
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(2 * rank)) if auto == "NOTSET" else ()
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank)) if not auto.startswith("SAME") else ()
    return Case(
        kernel, draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.sampled_from([1, 1, 2])),
        tuple(draw(some) for _ in range(rank)), dilations, pads, auto, draw(st.booleans()), size=9 if rank < 3 else 6,
    )  # fmt: skip


FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)  # fmt: skip


def some(found: Iterator[tuple[ir.Model, Group, ModelWeights, Statistics, Candidate]]) -> list[
    tuple[ir.Model, Group, ModelWeights, Statistics, Candidate]
]:  # fmt: skip
    """The first, the middle and the last: each is compiled twice, in two runtimes."""
    every = list(found)
    return [every[i] for i in sorted({0, len(every) // 2, len(every) - 1})] if every else []


@pytest.mark.parametrize("name", METHODS)
@given(case=cases(), seed=st.integers(0, 99))
@FEW
def test_claims_and_emission(cache: Cache, name: str, case: Case, seed: int) -> None:
    method = registry.factorization(name)
    for model, group, weights, statistics, candidate in some(candidates(method, case, cache, seed)):
        plan = Plan("reference", (decision(group, candidate),))
        (factors,) = factorize(plan, {group.name: group}, weights, statistics, {name: method}, 0)
        arrays = {n: a for n, a in factors.load().items() if not n.startswith("bias")}
        assert sum(a.size for a in arrays.values()) == candidate.cost.parameters
        assert {n: a.shape for n, a in arrays.items()} == dict(method.shapes(group, candidate))
        assert ("bias.0" in factors.load()) == case.bias
        changed = method.reconstruct(group, factors.load())
        assert group_loss(group, weights, statistics, changed) == pytest.approx(
            factors.measured, rel=1e-9, abs=1e-12
        )
        if candidate.bound:
            assert factors.measured <= candidate.error + 1e-6
        else:  # an estimate, but of a fit that is the same
            assert factors.measured == pytest.approx(candidate.error, abs=1e-4)
        lowered = lower(rewrite(model, (factors,)), ())
        feeds = {"x": case.picture(seed)}
        oracle, ours = run(reconstructed(model, (factors,)), feeds), run(lowered, feeds)
        for runtime in oracle:
            close = CLOSE["float"] * max(1.0, float(np.abs(oracle[runtime]).max()))
            np.testing.assert_allclose(ours[runtime], oracle[runtime], atol=close, rtol=0)


@given(case=cases(), seed=st.integers(0, 99))
@FEW
def test_rows_of_windows_are_what_a_kernel_meets(case: Case, seed: int) -> None:
    """x W + b at every position is what ONNX Runtime makes of the Conv: the matrix, the window and the rows agree.

    Not the reference runtime: in onnx 1.23 it pads pictures of three axes wrongly where the two ends differ.
    """
    model = model_of(case, seed)
    (site,) = find(model).sites
    assert site.window is not None
    x = case.picture(seed, 2)
    W = np.split(site.layout.apply(model.graph.initializers["w"].const_value.numpy()), case.group, axis=1)  # type: ignore[union-attr]
    expected = run(model, {"x": x})["ort"]
    bias = model.graph.initializers["b"].const_value.numpy() if case.bias else 0.0  # type: ignore[union-attr]
    for picture, rows in zip(expected, rows_of_windows(x, site.window, most=10**6), strict=True):
        made = np.concatenate([rows[:, i] @ w for i, w in enumerate(W)], axis=1) + bias
        np.testing.assert_allclose(
            made, picture.reshape(len(picture), -1).T, atol=CLOSE["float"] * np.abs(expected).max(), rtol=0
        )


@pytest.mark.parametrize("name", [n for n in METHODS if registry.factorization(n).exact_at_full_rank])
@given(case=cases(), seed=st.integers(0, 99))
@FEW
def test_full_rank_is_exact(cache: Cache, name: str, case: Case, seed: int) -> None:
    method = registry.factorization(name)
    (group,) = find(model_of(case, seed)).groups
    assert method.serves(group) is None
    weights = ModelWeights(cache, 18)
    (candidate,) = method.candidates(group, weights, None, CandidateOptions(full=True))
    changed = method.reconstruct(group, method.factorize(group, weights, None, candidate, 0))
    W = weights.matrix(group.sites[0])
    np.testing.assert_allclose(
        changed[group.sites[0].name, "weight"], W, atol=1e-12 * np.abs(W).max(), rtol=0
    )


def test_some_method_serves_rank_full() -> None:
    assert any(registry.factorization(n).exact_at_full_rank for n in METHODS)


def _structured(form: str, rng: np.random.Generator) -> Array:
    """(12, 8, 3, 3) of a form's own: of rank 2, of q = 3 and r = 4, of two components."""
    if form == "conv-channel":
        return np.tensordot(rng.standard_normal((12, 2)), rng.standard_normal((2, 8, 3, 3)), 1)
    if form == "conv-spatial":
        return np.einsum("nrj,rci->ncij", rng.standard_normal((12, 2, 3)), rng.standard_normal((2, 8, 3)))
    if form == "tucker2":
        core = rng.standard_normal((4, 3, 3, 3))
        return np.einsum("nr,rqij,cq->ncij", rng.standard_normal((12, 4)), core, rng.standard_normal((8, 3)))
    modes = [rng.standard_normal((size, 2)) for size in (12, 8, 3, 3)]
    return np.einsum("nr,cr,ir,jr->ncij", *modes)


# Two components of a CP form are found by iteration, and the ridge that keeps them bounded leaves its mark.
EXACT = {"conv-channel": 1e-5, "conv-spatial": 1e-5, "tucker2": 1e-5, "cp": 1e-2}
TRUE_RANK = {"conv-channel": 2, "conv-spatial": 2, "tucker2": 4, "cp": 2}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_on_kernels_of_the_form(cache: Cache, name: str, seed: int) -> None:
    method = registry.factorization(name)
    case = Case((3, 3), 8, 12, pads=(1, 1, 1, 1), dtype="double")
    kernel = _structured(name, np.random.default_rng(seed))
    model = model_of(case, seed, kernel)
    (group,) = find(model).groups
    weights, statistics = ModelWeights(cache, 18), statistics_of(group.sites[0], case, seed)
    errors = {}
    for rank in (TRUE_RANK[name], TRUE_RANK[name] - 1):
        found = list(method.candidates(group, weights, statistics, CandidateOptions(ranks=(rank,))))
        best = min(found, key=lambda c: (round(c.error, 6), c.cost.parameters))
        factors = method.factorize(group, weights, statistics, best, 0)
        errors[rank] = group_loss(group, weights, statistics, method.reconstruct(group, factors))
    assert errors[TRUE_RANK[name]] < EXACT[name]
    assert errors[TRUE_RANK[name] - 1] > 5 * EXACT[name]  # one less is not enough


def _macs(model: ir.Model, x: Array) -> int:
    """Of all Conv: elements of the kernel for each position of the output."""
    shapes = shapes_of(model, {"x": x.shape})
    total = 0
    for node in model.graph:
        if node.op_type == "Conv":
            y, w = shapes[node.outputs[0]].numpy(), node.inputs[1]
            assert w is not None and w.const_value is not None
            total += y[0] * math.prod(y[2:]) * w.const_value.size
    return total


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("group", [1, 2])
def test_flops_are_those_of_the_graph(cache: Cache, name: str, strides: tuple[int, int], group: int) -> None:
    """Where strides divide the picture: elsewhere a stage before a stride sees a part of a step more or less."""
    case = Case((3, 3), 4, 6, group, strides, auto_pad="SAME_UPPER", size=8)
    for model, found, weights, statistics, candidate in some(
        candidates(registry.factorization(name), case, cache)
    ):
        plan = Plan("reference", (decision(found, candidate),))
        (factors,) = factorize(
            plan, {found.name: found}, weights, statistics, {name: registry.factorization(name)}, 0
        )
        x = case.picture(0)
        rows = rows_of(model, Finding(found.sites, (found,)), {"x": x})[found.sites[0].name]
        assert 2 * _macs(lower(rewrite(model, (factors,)), ()), x) == rows * candidate.cost.flops
        assert 2 * _macs(model, x) == rows * dense_flops(found.sites[0])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types(cache: Cache, name: str, dtype: str) -> None:
    """Stored and computed in the type of the original."""
    method, case = registry.factorization(name), Case((3, 3), 6, 8, pads=(1, 0, 0, 1), dtype=dtype)
    for model, group, weights, statistics, candidate in some(candidates(method, case, cache)):
        plan = Plan("reference", (replace(decision(group, candidate), bound=False),))
        (factors,) = factorize(plan, {group.name: group}, weights, statistics, {name: method}, 0)
        assert {a.dtype for n, a in factors.load().items() if not n.startswith("bias")} == {
            np.dtype(NUMPY[dtype])
        }
        feeds = {"x": case.picture(0)}
        oracle, ours = (
            run(reconstructed(model, (factors,)), feeds),
            run(lower(rewrite(model, (factors,)), ()), feeds),
        )
        for runtime in oracle:
            size = float(np.abs(oracle[runtime].astype(np.float64)).max())
            np.testing.assert_allclose(ours[runtime], oracle[runtime], atol=CLOSE[dtype] * size, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_deterministic(tmp_path: Path, name: str) -> None:
    made: list[list[Array]] = []
    method = registry.factorization(name)
    for turn in range(2):
        cache = Cache(tmp_path / str(turn))
        found = some(candidates(method, Case((3, 3), 5, 6, group=2), cache, 3))
        made.append([a for _, g, w, s, c in found for a in method.factorize(g, w, s, c, 0).values()])
    assert made[0] and all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_refusals_are_sentences(name: str) -> None:
    method = registry.factorization(name)
    (depthwise,) = find(model_of(Case((3, 3), 1, 1, group=4))).groups
    assert knows(method, depthwise)
    answer = method.serves(depthwise)
    assert (answer is None) == (name == "conv-channel")  # whose one rank costs more than the kernel
    assert answer is None or "depthwise" in answer.reason
    (point,) = find(model_of(Case((1, 1)))).groups
    assert (method.serves(point) is None) == (name == "conv-channel")


def test_methods_for_matrices_are_not_asked() -> None:
    (group,) = find(model_of(Case((3, 3)))).groups
    asked = {n for n, m in registry.factorizations().items() if knows(m, group)}
    assert set(METHODS) <= asked and not asked & {"svd", "svd-plain", "pivoted", "slicing"}


def test_a_broken_claim_is_caught(cache: Cache) -> None:
    method = registry.factorization("tucker2")
    found = list(candidates(method, Case((3, 3), 6, 8), cache))
    _, group, weights, statistics, candidate = found[0]
    lie = decision(group, replace(candidate, error=candidate.error / 10))
    with pytest.raises(PluginError, match="claimed at most"):
        factorize(Plan("reference", (lie,)), {group.name: group}, weights, statistics, {"tucker2": method}, 0)


def test_a_corrupted_factor_shows(cache: Cache) -> None:
    """The comparison with the oracle can fail."""
    method = registry.factorization("conv-spatial")
    model, group, weights, statistics, candidate = next(candidates(method, Case((3, 3), 6, 8), cache))
    (factors,) = factorize(
        Plan("reference", (decision(group, candidate),)),
        {group.name: group},
        weights,
        statistics,
        {method.name: method},
        0,
    )
    arrays = dict(factors.load())
    arrays["rest"] = arrays["rest"] * np.float32(1.01)
    broken = replace(factors, load=lambda: arrays)
    feeds = {"x": Case((3, 3), 6, 8).picture(0)}
    right, wrong = (
        run(reconstructed(model, (factors,)), feeds),
        run(lower(rewrite(model, (broken,)), ()), feeds),
    )
    assert np.abs(right["ort"] - wrong["ort"]).max() > 1e-3 * np.abs(right["ort"]).max()
