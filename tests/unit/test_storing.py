"""Storage types through the stages: candidates, factors, graphs; legality; a newer opset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from lrcompile.compile import first_plan
from lrcompile.cost import bytes_of
from lrcompile.encoding import parts_of
from lrcompile.errors import BudgetError, UsageError
from lrcompile.factorize import factorize
from lrcompile.interfaces import CandidateOptions
from lrcompile.loss import group_loss
from lrcompile.lower import lower
from lrcompile.opsets import raisable, raise_opset
from lrcompile.oracle import reconstructed
from lrcompile.plan import Whole, choose, group_by_name, prepare
from lrcompile.records import Amount, Budget, Candidate, InputStatistics, Plan, Site
from lrcompile.registry import factorizations, runtime_of
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.storing import AUTO, forms, legal, types_of
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal

K, H, N = 64, 96, 5
METHODS = {m.name: m for m in factorizations().values() if m.name in ("dense", "svd")}


@dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return site.name


def two_layers(opset: int = 18) -> ir.Model:
    """A table, a product with a bias, one without and with its weight on the left."""
    nodes = [
        node("Gather", ["table", "ids"], ["x"], name="table"),
        node("MatMul", ["x", "w"], ["p"], name="up"),
        node("Add", ["p", "b"], ["h"], name="bias"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "v"], ["y"], name="down"),
    ]
    constants = {
        "table": normal(20, K), "w": normal(K, H), "b": normal(H), "v": normal(H, N),
    }  # fmt: skip
    return model(nodes, {"ids": ((3,), np.int64)}, ["y"], constants, opset=opset)


def statistics_of(sites: tuple[Site, ...]) -> Statistics:
    known = {}
    for site in sites:
        if site.kind == "linear":
            X = normal(500, site.K, dtype=np.float64) @ normal(site.K, site.K, seed=1, dtype=np.float64) + 0.5
            known[site.name] = InputStatistics(500, X.T @ X / 500, X.mean(axis=0))
        else:
            known[site.name] = InputStatistics(500, frequencies=np.full(site.K, 1 / site.K))
    return Statistics(known)


def planned(
    made: ir.Model,
    cache: Cache,
    budget: Budget,
    storages: tuple[str, ...],
    include: str | None = None,
    target: str = "ort-cpu",
) -> tuple[Plan, ModelWeights, Statistics]:
    finding = find(made)
    weights, statistics = ModelWeights(cache, 18), statistics_of(finding.sites)
    problem = prepare(
        finding, weights, statistics, tuple(METHODS.values()), budget, target=target, storages=storages, include=include,
        whole=Whole(0, {}),
    )  # fmt: skip
    assert not problem.predicts or all(c.candidates for c in problem.open)
    return choose(problem), weights, statistics


def outputs(made: ir.Model) -> Array:
    return run_model(made, {"ids": np.array([0, 7, -1])})["y"]


def run_model(made: ir.Model, feed: Mapping[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


@pytest.mark.parametrize("name", ("int8", "int4", "uint4-16", "uint3", "uint2", "ternary", "sign"))
@pytest.mark.parametrize("method", ("dense", "svd"))
def test_what_is_emitted_is_what_the_codes_mean(tmp_path: Path, name: str, method: str) -> None:
    """Cost, error and graph of one storage type everywhere, also of a table, in both methods."""
    made = two_layers()
    finding, cache = find(made), Cache(tmp_path)
    weights, statistics = ModelWeights(cache, 18), statistics_of(finding.sites)
    problem = prepare(
        finding, weights, statistics, tuple(METHODS.values()), Budget(bits=4.0), target="ort-cpu", storages=(name,), include="",
        whole=Whole(0, {}),
    )  # fmt: skip
    from lrcompile.curves import decision_of

    decisions = []
    for curve in problem.curves:
        coded = [c for c in curve.candidates if c.storage is not None and c.method == method]
        if coded:
            decisions.append(decision_of(curve.group, coded[-1], ""))
    assert decisions
    sets = factorize(
        Plan("ort-cpu", tuple(decisions)), group_by_name(finding), weights, statistics, METHODS, 0
    )
    for factors in sets:
        arrays = factors.load()
        assert factors.measured == pytest.approx(
            group_loss(factors.group, weights, statistics, factors.method.reconstruct(factors.group, arrays)),
            rel=1e-9,
        )
        by_row = factors.group.sites[0].kind == "lookup"
        held = [p for c in factors.codes().values() for p in parts_of(c, by_row=by_row).values()]
        bits = sum(p.array.size * p.dtype.bitwidth for p in held)
        assert factors.decision.bytes_after == -(-bits // 8)
    lowered = lower(rewrite(made, sets), ())
    assert not lowered.functions
    assert lowered.opset_imports[""] == 21 and (lowered.ir_version or 0) >= 10
    a, b = outputs(reconstructed(made, sets)), outputs(lowered)
    np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
    assert np.abs(outputs(made) - a).max() > 1e-4 * np.abs(a).max()  # it is another model


@pytest.mark.parametrize(("name", "groups"), (("int8", 1), ("uint4", 1), ("uint3-128", 2)))
def test_kernels_of_a_conv_are_coded(tmp_path: Path, name: str, groups: int) -> None:
    """Strides, pads, dilations, groups and a bias: the graph computes what the codes mean."""
    nodes = [
        node(
            "Conv", ["x", "w", "b"], ["y"], name="conv", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1], dilations=[1, 2],
            group=groups,
        )
    ]  # fmt: skip
    made = model(
        nodes,
        {"x": ((2, 8, 9, 7), np.float32)},
        ["y"],
        {"w": normal(12, 8 // groups, 3, 2), "b": normal(12)},
        opset=18,
    )
    finding, weights = find(made), ModelWeights(Cache(tmp_path), 18)
    problem = prepare(
        finding, weights, None, (METHODS["dense"],), Budget(bits=20.0), target="ort-cpu", storages=(name,), whole=Whole(0, {})
    )  # fmt: skip
    sets = factorize(choose(problem), group_by_name(finding), weights, None, METHODS, 0)
    assert [s.decision.storage for s in sets] == [name]
    x = {"x": normal(2, 8, 9, 7)}
    a, b = (run_model(m, x)["y"] for m in (reconstructed(made, sets), lower(rewrite(made, sets), ())))
    np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())  # sums of 48 in float32
    assert np.abs(run_model(made, x)["y"] - a).max() > 1e-4 * np.abs(a).max()
    no = legal("int8", sets[0].group, "trt-rtx")
    assert no is not None and "Conv" in no.reason


def test_biases_absorb_the_mean_of_what_rounding_changes(tmp_path: Path) -> None:
    plan, weights, statistics = planned(two_layers(), Cache(tmp_path), Budget(bits=2.6), ("uint2",))
    finding = find(two_layers())
    (up,) = (
        s
        for s in factorize(plan, group_by_name(finding), weights, statistics, METHODS, 0)
        if s.group.name == "up"
    )
    site, arrays = up.group.sites[0], up.load()
    mean = statistics.known[site.name].mean
    assert mean is not None
    before = mean @ weights.matrix(site) + weights.bias(site)
    after = mean @ arrays["w"] + arrays["bias.0"]
    np.testing.assert_allclose(after, before, atol=1e-9)


@pytest.mark.parametrize("bits", (3.0, 4.5, 8.5))
def test_a_budget_of_bits_is_kept(tmp_path: Path, bits: float) -> None:
    plan, *_ = planned(two_layers(), Cache(tmp_path), Budget(bits=bits), AUTO)
    eligible = [d for d in plan.decisions if d.group in ("up", "down")]
    stored = 8 * sum(d.bytes_after for d in eligible) / sum(d.parameters_before for d in eligible)
    assert 0.6 * bits < stored <= bits


@pytest.mark.parametrize("share", (0.3, 0.2))
def test_a_size_counts_tables_and_all_that_decodes_them(tmp_path: Path, share: float) -> None:
    """The constants of the graph are what the plan says, but for shapes, shifts and masks of a few bytes; the budget holds for both."""
    made = two_layers()
    whole = Whole(bytes_of(made), {})
    size = Amount(share, relative=True)
    finding, weights = find(made), ModelWeights(Cache(tmp_path), 18)
    statistics = statistics_of(finding.sites)
    problem = prepare(
        finding, weights, statistics, (METHODS["dense"],), Budget(size=size), target="ort-cpu", storages=AUTO, include="", whole=whole
    )  # fmt: skip
    plan = choose(problem)
    counted = whole.bytes - sum(d.bytes_before - d.bytes_after for d in plan.rewritten)
    assert {d.group for d in plan.rewritten} == {"table", "up", "down"}
    assert counted <= size.of(whole.bytes)
    sets = factorize(plan, group_by_name(finding), weights, statistics, METHODS, 0)
    held = bytes_of(lower(rewrite(made, sets), ()))
    assert 0 <= held - counted <= 128 * len(plan.rewritten)


def test_too_few_bits_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"--bits 0\.1 cannot be met"):
        planned(two_layers(), Cache(tmp_path), Budget(bits=0.1), ("int8",))


def test_bits_that_no_weight_can_be_stored_in_are_an_error(tmp_path: Path) -> None:
    problem = prepare(
        find(two_layers()), ModelWeights(Cache(tmp_path), 18), None, (METHODS["dense"],), Budget(bits=4.5), target="ort-cpu"
    )  # fmt: skip
    with pytest.raises(BudgetError, match=r"--bits 4\.5 cannot be met"):
        choose(problem)


def test_codes_are_of_the_second_moment(tmp_path: Path) -> None:
    """With data the error by that data is lower than that of plain rounding: feedback saw it."""
    errors = []
    for seen in (True, False):
        made = two_layers()
        finding, weights = find(made), ModelWeights(Cache(tmp_path / str(seen)), 18)
        statistics = statistics_of(finding.sites)
        problem = prepare(
            finding, weights, statistics if seen else None, (METHODS["dense"],), Budget(bits=4.0), target="ort-cpu",
            storages=("uint3",), whole=Whole(0, {}),
        )  # fmt: skip
        sets = factorize(
            choose(problem), group_by_name(finding), weights, statistics if seen else None, METHODS, 0
        )
        changed = {s.group.name: s.method.reconstruct(s.group, s.load()) for s in sets}
        errors.append([group_loss(s.group, weights, statistics, changed[s.group.name]) for s in sets])
    assert all(a < 0.8 * b for a, b in zip(*errors, strict=True))


def test_legality() -> None:
    groups = {g.name: g for g in find(two_layers()).groups}
    assert legal("uint4", groups["up"], "ort-cpu") is None
    assert legal("int4-32s32+", groups["up"], "trt-rtx") is None
    for name, target, words in (
        ("uint4-32s32", "trt", "no zero points"),
        ("uint2-32s32", "trt", "2 bits"),
        ("int4", "trt", "float8"),
        ("int4-16s32", "trt", "groups of 32, 64, 128"),
        ("int4-128s32", "trt", "not divisible"),
        ("int4-32s32", "trt-rtx", "no negative scales: use int4-32s32+"),
        ("float8", "ort-cpu", "TensorRT"),
        ("kmeans4", "ort-cpu", "comparisons"),
    ):
        refusal = legal(name, groups["up"], target)
        assert refusal is not None and words in refusal.reason, name
    table = legal("uint3", groups["table"], "ort-cpu")
    assert table is not None and "tables" in table.reason


def test_names_of_types() -> None:
    assert types_of(("auto", "int8"), "ort-cpu") == AUTO
    assert all(n.endswith("s32+") or n == "int8" for n in types_of(("auto",), "trt-rtx"))
    assert types_of(("int4-64s32", "int4-64s32+", "int8", "float16"), "trt") == (
        "int4-64s32+",
        "int8",
        "float16",
    )
    with pytest.raises(UsageError, match="--storage int5: no such type; there are auto, double, float"):
        types_of(("int5",), "ort-cpu")


def test_the_opset_is_raised_only_where_nothing_changes_its_meaning() -> None:
    assert raisable(two_layers(18), 21) is None
    assert raisable(two_layers(13), 21) is None
    old = two_layers(13)
    meant = model(
        [node("Upsample", ["x", "s"], ["z"], name="up")],
        {"x": (1, 1, 2, 2)},
        ["z"],
        {"s": normal(4)},
        opset=9,
    )
    refusal = raisable(meant, 21)
    assert refusal is not None and "Upsample (up)" in refusal.reason
    assert raisable(replace_opset(old, 22), 21) is None


@pytest.mark.parametrize("name", ("ReduceMean", "ReduceL2", "ReduceMax"))
@pytest.mark.parametrize("axes", ({"axes": [0]}, {"axes": [-1], "keepdims": 0}, {}))
def test_axes_of_reductions_become_inputs(name: str, axes: Mapping[str, object]) -> None:
    nodes = [node("MatMul", ["x", "v"], ["y"], name="p"), node(name, ["y"], ["z"], name="r", **axes)]
    made = model(nodes, {"x": ((2, K), np.float32)}, ["z"], {"v": normal(K, N)}, opset=13)
    raised = made.clone()
    assert raisable(raised, 21) is None
    raise_opset(raised, 21)
    assert raised.opset_imports[""] == 21
    x = {"x": normal(2, K)}
    np.testing.assert_array_equal(run_model(raised, x)["z"], run_model(made, x)["z"])


def replace_opset(made: ir.Model, opset: int) -> ir.Model:
    copy = made.clone()
    copy.opset_imports[""] = opset
    return copy


def test_a_wrong_factor_is_seen(tmp_path: Path) -> None:
    """Negative control of the comparison above: other codes, another product."""
    made = two_layers()
    plan, weights, statistics = planned(made, Cache(tmp_path), Budget(bits=4.6), ("uint4",))
    sets = factorize(plan, group_by_name(find(made)), weights, statistics, METHODS, 0)
    assert sets
    broken = []
    for factors in sets:
        codes = {n: replace(c, codes=np.roll(c.codes, 1, axis=0)) for n, c in factors.codes().items()}
        broken.append(replace(factors, codes=lambda c=codes: c))  # type: ignore[misc]
    a, b = outputs(reconstructed(made, sets)), outputs(lower(rewrite(made, broken), ()))
    assert np.abs(a - b).max() > 0.1 * np.abs(a).max()


def test_tensorrt_gets_factors_of_whole_groups(tmp_path: Path) -> None:
    """A rank that is no whole group would be refused by its builder: of a pair the rank is the second factor's rows."""
    made = two_layers()
    finding, name = find(made), "int4-32s32+"
    weights, statistics = ModelWeights(Cache(tmp_path), 18), statistics_of(finding.sites)
    up = next(g for g in finding.groups if g.sites[0].name == "up")
    found = tuple(METHODS["svd"].candidates(up, weights, statistics, CandidateOptions(ranks=(8, 24, 32))))

    def ranks(target: str) -> list[int | None]:
        made = forms(up, (METHODS["svd"],), found, (name,), target, weights, statistics)
        return [c.rank for c in made if isinstance(c, Candidate)]

    assert ranks("trt-rtx") == [32]
    assert ranks("ort-cpu") == [8, 24, 32]


def test_a_plan_of_the_user_is_held_against_graph_and_target(tmp_path: Path) -> None:
    """Whatever form it asks for: codes need an opset that this graph may not be raised to."""
    nodes = [
        node("Upsample", ["x", "s"], ["z"], name="up"),
        node("MatMul", ["z", "w"], ["y"], name="product"),
    ]
    constants = {"s": np.ones(2, np.float32), "w": normal(K, N)}
    old, new = (
        model(n, {"x": (2, K)}, ["y"], constants if n is nodes else {"w": constants["w"]}, opset=o)
        for n, o in ((nodes, 9), ([node("MatMul", ["x", "w"], ["y"], name="product")], 18))
    )

    def asked(made: ir.Model) -> Plan:
        finding = find(made)
        plan, weights, statistics = planned(new, Cache(tmp_path), Budget(bits=9.0), ("int8",))
        assert [d.storage for d in plan.rewritten] == ["int8"]
        known = SimpleNamespace(
            options=SimpleNamespace(plan=plan, target="ort-cpu", budget=Budget()), finding=finding, methods=METHODS, weights=weights,
            statistics=statistics, source=SimpleNamespace(model=made), runtime=runtime_of("ort-cpu"),
        )  # fmt: skip
        return first_plan(None, known)  # type: ignore[arg-type]

    assert asked(new).rewritten
    with pytest.raises(UsageError, match=r"the plan's dense at 'product' is refused: .*Upsample \(up\)"):
        asked(old)
