"""Plans: budgets kept exactly and counted once, the words of the design, edited plans held against the model, the search over one ratio."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrcompile.cost import bytes_of
from lrcompile.edited import check_plan
from lrcompile.errors import BudgetError, UsageError
from lrcompile.plan import Problem, Trial, Whole, choose, dense_plan, prepare, revise, traced
from lrcompile.records import Amount, Budget, Decision, Evidence, Finding, Group, Limit, Plan, Refusal
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.tables import plan_table
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal, weights

PLAIN, SVD, DENSE = factorization("svd-plain"), factorization("svd"), factorization("dense")


def linears(
    *shapes: tuple[int, int], extra: list[onnx.NodeProto] | None = None, **constants: Array
) -> ir.Model:
    """A MatMul each, named layer0, layer1, .. with inputs x0, x1, .."""
    nodes = [node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"], name=f"layer{i}") for i in range(len(shapes))] + (
        extra or []
    )
    held = {f"w{i}": normal(*s, seed=i) for i, s in enumerate(shapes)} | constants
    inputs: dict[str, Any] = {f"x{i}": ("n", s[0]) for i, s in enumerate(shapes)}
    if any("ids" in n.input for n in nodes):
        inputs["ids"] = (("n",), np.int64)
    return model(nodes, inputs, [n.output[0] for n in nodes if not n.output[0].startswith("inner")], held)


def problem(made: ir.Model, budget: Budget, methods: tuple[Any, ...] = (PLAIN,), **options: Any) -> Problem:
    return prepare(find(made), weights(), None, methods, budget, target="ort-cpu", **options)


def planned(made: ir.Model, budget: Budget, methods: tuple[Any, ...] = (PLAIN,), **options: Any) -> Plan:
    return choose(problem(made, budget, methods, **options))


def by_name(plan: Plan) -> dict[str, Decision]:
    return {d.group: d for d in plan.decisions}


# --- --keep -------------------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=4),
    keep=st.floats(0.15, 0.999),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_keep(shapes: list[tuple[int, int]], keep: float) -> None:
    """Never above the budget; below it by less than the next rank of every group; or an error that is true."""
    made = linears(*shapes)
    total = sum(K * N for K, N in shapes)
    problem_ = problem(made, Budget(keep=keep))
    assert (problem_.total, problem_.fixed) == (total, sum(K * N for K, N in shapes if K + N >= K * N))
    try:
        plan = choose(problem_)
    except BudgetError as error:
        least = sum(min(K + N, K * N) for K, N in shapes)  # rank one, or dense where even that is no smaller
        assert least > keep * total
        assert f"{least / total:.3f}" in str(error) and f"{total:,}" in str(error)
        return
    after = sum(d.parameters_after for d in plan.decisions)
    assert after <= keep * total
    # one more rank everywhere (where there is one that is smaller than the weight) would break the budget
    more = 0
    for d, (K, N) in zip(plan.decisions, shapes, strict=True):
        step = (d.rank + 1) * (K + N) if d.rank is not None else K * N
        more += step if step < K * N else d.parameters_after
    assert more > keep * total or more == after
    for d in plan.rewritten:
        assert d.parameters_after < d.parameters_before


def test_keep_of_big_weights_goes_in_eights() -> None:
    plan = planned(linears((128, 256)), Budget(keep=0.5))
    (d,) = plan.decisions
    assert (d.rank, d.parameters_after) == (40, 40 * 384)  # 42.7 ranks would fit
    assert d.flops_before == 2 * 128 * 256 and d.flops_after == 2 * 40 * 384


def test_keep_one_leaves_everything_dense() -> None:
    plan = planned(linears((6, 4), (9, 9)), Budget(keep=1.0))
    assert not plan.rewritten
    assert {d.reason for d in plan.decisions} == {"the budget keeps everything"}


def test_a_shared_weight_counts_once() -> None:
    again = node("MatMul", ["x0", "w0"], ["z"], name="again")
    made = linears((10, 10), (10, 10), extra=[again])
    problem_ = problem(made, Budget(keep=0.6))
    assert problem_.total == 200
    plan = choose(problem_)
    assert [d.sites for d in plan.decisions] == [("layer0", "again"), ("layer1",)]
    assert [d.parameters_after for d in plan.decisions] == [60, 60]
    assert plan.decisions[0].flops_before == 2 * 2 * 100 and plan.decisions[0].flops_after == 2 * 2 * 60


def test_refused_weights_count_and_cannot_shrink() -> None:
    stack = node("MatMul", ["x0", "stack"], ["z"], name="stack")
    made = linears((10, 10), extra=[stack], stack=normal(2, 10, 10))
    problem_ = problem(made, Budget(keep=0.8))
    assert (problem_.total, problem_.fixed) == (300, 200)
    plan = choose(problem_)
    assert by_name(plan)["layer0"].parameters_after == 40  # 0.8 of 300 is 240, of which 200 stay
    assert by_name(plan)["stack"].reason == "the weight is a stack of 2 matrices"
    with pytest.raises(
        BudgetError,
        match=r"--keep 0\.5 cannot be met: the least that can be kept is 0\.733 of the 300 .* 200 parameters of which",
    ):
        choose(problem(made, Budget(keep=0.5)))


def test_a_weight_that_another_node_keeps_is_not_rewritten() -> None:
    """Factors would come on top of it. Only the identity mode, which costs what it costs, takes it."""
    other = node("Relu", ["w0"], ["z"], name="reader")
    made = linears((10, 10), (10, 10), extra=[other])
    plan = planned(made, Budget(keep=0.9))
    assert (
        by_name(plan)["layer0"].reason
        == "reader reads the weight too and keeps it in the file: factors would only add to it"
    )
    assert by_name(plan)["layer1"].parameters_after == 80 and not by_name(plan)["layer0"].rewrites
    assert planned(made, Budget(rank=2)).rewritten[0].group == "layer1"
    assert len(planned(made, Budget(rank="full")).rewritten) == 2


def test_a_weight_with_a_taken_and_a_refused_reader_counts_once() -> None:
    reshape = node("Unsqueeze", ["w0", "axis"], ["inner"])
    stack = node("Gather", ["inner", "ids"], ["z"], name="odd")  # a table of rank 3
    problem_ = problem(
        linears((10, 10), extra=[reshape, stack], axis=np.array([0])), Budget(keep=0.9), include="."
    )
    assert (problem_.total, problem_.fixed) == (100, 100)


# --- energy, rank, full -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_energy(energy: float) -> None:
    made = linears((20, 20), (20, 8))
    for d in planned(made, Budget(energy=energy)).decisions:
        i = int(d.group[-1])
        sigma = np.linalg.svd(
            made.graph.initializers[f"w{i}"].const_value.numpy().astype(np.float64), compute_uv=False
        )
        held = np.cumsum(sigma**2) / np.sum(sigma**2)
        rank = int(np.argmax(held >= energy)) + 1
        K, N = made.graph.initializers[f"w{i}"].const_value.shape.numpy()
        if rank * (K + N) < K * N:
            assert d.rank == rank and d.reason.startswith(
                f"smallest rank that holds {energy:g} of the energy"
            )
        else:
            assert not d.rewrites and d.reason == f"no rank below break-even holds {energy:g} of the energy"


def test_rank() -> None:
    plan = planned(linears((20, 20), (6, 4), (2, 9)), Budget(rank=5))
    decisions = by_name(plan)
    assert decisions["layer0"].rank == 5 and decisions["layer0"].reason.startswith("rank as asked")
    assert decisions["layer1"].reason == "the weight has at most rank 4"
    assert decisions["layer2"].reason == "the weight has at most rank 2"
    assert (
        by_name(planned(linears((6, 4)), Budget(rank=3)))["layer0"].reason
        == "rank 3 would take as many parameters as the weight"
    )


HEAD = [
    node("Gather", ["table", "ids"], ["e"], name="table"),
    node("Transpose", ["table"], ["inner_t"]),
    node("MatMul", ["e2", "inner_t"], ["logits"], name="head"),
    node("Relu", ["e"], ["e2"], name="relu"),
]
HEAD = [HEAD[0], HEAD[3], HEAD[1], HEAD[2]]


def tied(**more: Array) -> ir.Model:
    return linears((10, 10), extra=HEAD, table=normal(12, 10), **more)


def test_full_rank_takes_everything_whatever_it_costs() -> None:
    plan = planned(tied(), Budget(rank="full"))
    assert {d.group: (d.method, d.rank) for d in plan.decisions} == {
        "layer0": ("svd-plain", 10),
        "table": ("svd-plain", 10),
    }
    assert all(d.parameters_after > d.parameters_before for d in plan.decisions)
    plan = planned(tied(), Budget(rank="full"), methods=(SVD,))  # without data, too
    assert len(plan.rewritten) == 2


# --- who is eligible ----------------------------------------------------------------------------------------------


def eligible(
    made: ir.Model, include: str | None = None, exclude: str | None = None, **budget: Any
) -> tuple[set[str], int, dict[str, str]]:
    """Groups that are rewritten, the parameters that count, and the reasons of the others."""
    problem_ = problem(made, Budget(**(budget or {"keep": 0.7})), include=include, exclude=exclude)
    plan = choose(problem_)
    return (
        {d.group for d in plan.rewritten},
        problem_.total,
        {d.group: d.reason for d in plan.decisions if not d.rewrites},
    )


def test_tables_and_tied_heads_are_not_eligible() -> None:
    names, total, reasons = eligible(tied())
    assert names == {"layer0"} and total == 100
    assert reasons == {"table": "a Gather weight takes part only when --include names it"}
    alone = linears(
        (10, 10), extra=[node("Gather", ["table", "ids"], ["e"], name="table")], table=normal(12, 10)
    )
    assert eligible(alone)[:2] == ({"layer0"}, 100)


@pytest.mark.parametrize("include", ["table", "head", "^tab|^head$"])
def test_include_makes_exactly_these_eligible(include: str) -> None:
    """A tied weight is wanted when either reader is; nothing else takes part any more."""
    names, total, reasons = eligible(tied(), include=include)
    assert (names, total, reasons) == ({"table"}, 120, {"layer0": "not included by name"})


def test_exclude_takes_away() -> None:
    made = linears((10, 10), (10, 10))
    assert eligible(made, exclude="0")[:2] == ({"layer1"}, 100)
    assert eligible(made, exclude="0")[2] == {"layer0": "excluded by name"}
    names, total, reasons = eligible(
        tied(), include=".", exclude="head"
    )  # one reader excluded is enough: the weight is one
    assert (names, total, reasons) == ({"layer0"}, 100, {"table": "excluded by name"})
    assert eligible(tied(), include="layer", exclude="layer", keep=1.0)[:2] == (set(), 0)


def test_include_that_matches_nothing() -> None:
    plan = planned(linears((10, 10)), Budget(keep=0.5), include="nobody")
    assert not plan.rewritten and [d.reason for d in plan.decisions] == ["not included by name"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_are_none(option: str) -> None:
    with pytest.raises(UsageError, match=r"'\(' is not a regular expression"):
        problem(linears((4, 4)), Budget(keep=0.5), **{option: "("})


def test_full_rank_can_be_excluded_from() -> None:
    assert eligible(tied(), exclude="table", rank="full")[0] == {"layer0"}


# --- methods and targets that refuse ------------------------------------------------------------------------------


def test_reasons_of_methods_and_targets() -> None:
    made = linears((10, 10))
    plan = planned(
        made,
        Budget(keep=0.99999),
        methods=(PLAIN,),
        supports=lambda d: Refusal("no kernel for it") if d.rank != 3 else None,
    )
    assert [d.rank for d in plan.decisions] == [3]
    with pytest.raises(BudgetError, match="100 parameters of which cannot be rewritten"):
        planned(made, Budget(keep=0.5), methods=(DENSE,))
    plan = planned(made, Budget(energy=0.1), methods=(SVD,))
    assert [d.reason for d in plan.decisions] == ["svd needs calibration data at this input"]
    plan = planned(made, Budget(energy=0.1), supports=lambda d: Refusal("no kernel for it"))
    assert plan.decisions[0].reason.startswith("no kernel for it")


def test_quantized_weights_are_not_blown_up() -> None:
    """Factors of an int8 weight are float32: their bytes count, not only their numbers."""
    nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"], name="layer")]
    made = model(nodes, {"x": ("n", 40)}, ["y"], {"w": np.ones((40, 40), np.int8), "s": np.float32(1)})
    plan = planned(made, Budget(rank=15))
    assert (
        plan.decisions[0].reason
        == "its factors would take more bytes than the weight does in its own type (1,600)"
    )
    assert planned(made, Budget(rank=4)).decisions[0].bytes_after == 4 * 80 * 4


# --- --size, --flops, and the curve over sizes ----------------------------------------------------------------------


def moving(made: ir.Model, budget: Budget, **whole: Any) -> Problem:
    """A problem whose movements are known: the squared error of each form times the number of its layer + 1."""
    finding = find(made)
    rows = {s.name: 3 for s in finding.sites}
    bare = prepare(
        finding,
        weights(),
        None,
        (PLAIN,),
        budget,
        target="ort-cpu",
        whole=Whole(bytes_of(made), rows, **whole),
    )
    curves = tuple(
        replace(c, candidates=tuple(replace(x, movement=x.error**2 * (i + 1)) for x in c.candidates))
        for i, c in enumerate(bare.curves)
    )
    return replace(bare, curves=curves)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("predicts", [False, True])
def test_size_and_flops(share: float, predicts: bool) -> None:
    """Of the whole model: what is not eligible counts for --size; both are kept, and nearly used up."""
    made = linears(
        (40, 40), (40, 20), extra=[node("Gather", ["table", "ids"], ["e"], name="t")], table=normal(50, 10)
    )
    whole = {"size": 4 * (1600 + 800 + 500), "flops": 3 * 2 * (1600 + 800)}
    for name, before in whole.items():
        for amount in (Amount(share, relative=True), Amount(share * before)):
            problem_ = moving(made, Budget(**{name: amount}))
            if not predicts:
                problem_ = replace(
                    problem_,
                    curves=tuple(
                        replace(c, candidates=tuple(replace(x, movement=None) for x in c.candidates))
                        for c in problem_.curves
                    ),
                )
            plan = choose(problem_)
            saved = {
                "size": sum(d.bytes_before - d.bytes_after for d in plan.decisions),
                "flops": 3 * sum(d.flops_before - d.flops_after for d in plan.decisions),
            }[name]
            assert (plan.movement is None) != predicts
            room = share * before - (before - saved)
            assert 0 <= room < {"size": 4 * (80 + 60), "flops": 6 * (80 + 60)}[name]  # a rank more of each


def test_amounts_that_cannot_be_met() -> None:
    made = linears((10, 10), extra=[node("Gather", ["table", "ids"], ["e"], name="t")], table=normal(50, 10))
    with pytest.raises(BudgetError) as caught:
        choose(moving(made, Budget(size=Amount(1000))))
    assert str(caught.value).startswith(
        "--size 1KB cannot be met: the least that can be kept is 0.867 of the 2,400 bytes (2.08KB), where only the 100 eligible"
    )
    with pytest.raises(BudgetError, match=r"--flops 0\.1x cannot be met: .* 0\.200 of the 600 FLOPs \(120\)"):
        choose(moving(made, Budget(flops=Amount(0.1, relative=True))))


@pytest.mark.parametrize(
    "budget",
    [{"size": Amount(1e9)}, {"size": Amount(1.0, relative=True)}, {"flops": Amount(1.0, relative=True)}],
)
def test_more_than_there_is_leaves_everything_dense(budget: dict[str, Any]) -> None:
    plan = choose(moving(linears((10, 10)), Budget(**budget)))
    assert [d.reason for d in plan.decisions] == ["the budget keeps everything"]


@pytest.mark.parametrize(
    "budget", [{"keep": 0.5}, {"size": Amount(0.5, relative=True)}, {"max_error": (Limit("cosine", 0.99),)}]
)
def test_the_predicted_curve_falls(budget: dict[str, Any]) -> None:
    plans = list(traced(moving(linears((30, 30), (20, 40)), Budget(**budget)), np.linspace(0, 1, 21)))
    for a, b in pairwise(plans):
        assert (
            a.kept < b.kept and a.movement is not None and b.movement is not None and a.movement > b.movement
        )
    assert plans[-1].kept == 1.0 and plans[-1].movement == 0.0
    assert not list(
        traced(problem(linears((30, 30)), Budget(keep=0.5)), (0.5,))
    )  # nothing is predicted without data


def test_the_objective_decides_what_gets_small_and_what_is_legal() -> None:
    """An int8 weight: its factors save FLOPs and cost bytes."""
    nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"], name="layer")]
    made = model(nodes, {"x": ("n", 40)}, ["y"], {"w": np.ones((40, 40), np.int8), "s": np.float32(1)})
    limit = (Limit("cosine", 0.9),)
    small = moving(made, Budget(max_error=limit))
    fast = moving(made, Budget(max_error=limit, objective="flops"))
    assert max(c.rank or 0 for c in small.curves[0].candidates) == 4  # 80 r x 4 bytes below 1,600
    assert max(c.rank or 0 for c in fast.curves[0].candidates) == 19  # 80 r products below 1,600
    assert (choose(fast).ratio, choose(small).ratio) == (0.5, 0.5)


def test_the_printed_plan_says_what_moves_the_outputs() -> None:
    plan = choose(moving(linears((30, 30), (20, 40)), Budget(keep=0.5)))
    lines = str(plan).splitlines()
    assert lines[0].split() == ["site", "method", "rank", "kept", "error", "moves", "reason"]
    assert f"{plan.decisions[0].movement:.2e}" in lines[1]
    assert lines[-1].startswith(f"predicted to move the outputs by {plan.movement:.1e} in all")
    assert "moves" not in str(planned(linears((30, 30)), Budget(keep=0.5)))


# --- plans as values ----------------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    plan = replace(planned(tied(), Budget(rank="full")), notes=("a note",), ratio=0.25)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("decisions"),
        lambda d: d["decisions"][0].pop("method"),
        lambda d: d["decisions"][0].update(colour="red"),
        lambda d: d["decisions"][0].update(rank="8"),
        lambda d: d["decisions"][0].update(rank=2.5),
        lambda d: d["decisions"][0].update(rank=True),
    ],
)
def test_json_that_is_not_a_plan(edit: Callable[[Any], object]) -> None:
    document = json.loads(json.dumps(planned(linears((10, 10)), Budget(rank=2)).to_json()))
    edit(document)
    with pytest.raises((KeyError, TypeError)):
        Plan.from_json(document)


def held(plan: Plan, made: ir.Model, target: str = "ort-cpu") -> Plan:
    return check_plan(
        plan, find(made), {"svd": SVD, "svd-plain": PLAIN, "dense": DENSE}, weights(), None, target
    )


def test_an_edited_plan_is_priced_anew() -> None:
    made = linears((20, 20), (20, 10))
    plan = planned(made, Budget(rank=3))
    edited = replace(
        plan,
        decisions=(
            replace(plan.decisions[0], rank=5, claimed_error=0.0, parameters_after=1),
            *plan.decisions[1:],
        ),
    )
    checked = held(edited, made)
    assert checked.decisions[0] == planned(made, Budget(rank=5)).decisions[0]
    assert checked.decisions[1] == plan.decisions[1]
    assert held(plan, made) == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": "layer9"}, "the plan rewrites 'layer9', which is not in this model"),
        ({"group": "stack"}, "the plan rewrites 'stack', which cannot be rewritten"),
        ({"sites": ("layer1",)}, "the plan's group 'layer0' holds other sites than the model's: layer1"),
        ({"method": "magic"}, "the plan asks for 'magic' at 'layer0'; known: dense, svd, svd-plain"),
        ({"rank": 0}, "the plan's rank 0 at 'layer0' is not between 1 and 10"),
        ({"rank": 11}, "the plan's rank 11 at 'layer0' is not between 1 and 10"),
        ({"method": "svd"}, "which needs calibration data there: give --data"),
        ({"storage": "int5"}, "the plan stores 'layer0' in 'int5': there is no such type"),
        ({"storage": "kmeans4"}, "the plan stores 'layer0' in 'kmeans4': kmeans4 is a type for comparisons"),
        ({"structure": (("blocks", 2),)}, "in a form that it does not have"),
    ],
)
def test_plans_that_do_not_fit(change: dict[str, Any], words: str) -> None:
    made = linears(
        (10, 10), extra=[node("MatMul", ["x0", "stack"], ["z"], name="stack")], stack=normal(2, 10, 10)
    )
    plan = planned(made, Budget(rank=2))
    with pytest.raises(UsageError) as caught:
        held(replace(plan, decisions=(replace(plan.decisions[0], **change), *plan.decisions[1:])), made)
    assert words in str(caught.value)


def test_a_plan_of_another_target_or_with_a_site_twice() -> None:
    made = linears((10, 10))
    plan = planned(made, Budget(rank=2))
    with pytest.raises(UsageError, match="the plan is for ort-cpu, not for trt"):
        held(plan, made, "trt")
    with pytest.raises(UsageError, match="rewrites 'layer0' twice"):
        held(replace(plan, decisions=plan.decisions * 2), made)


# --- the search over one ratio ------------------------------------------------------------------------------------


def simulate(problem_: Problem, passes: Callable[[Plan], bool]) -> list[tuple[Plan, bool]]:
    """What `compile.search` does, with a verdict from a function instead of a compiled model."""
    trials: list[Trial] = []
    plan: Plan | None = choose(problem_)
    while plan:
        verdict = "passed" if passes(plan) else "failed"
        trials.append(Trial(plan, Evidence((), "ran", "here", verdict)))  # type: ignore[arg-type]
        plan = revise(problem_, trials)
        assert len(trials) <= 7
    return [(t.plan, t.evidence.verdict != "failed") for t in trials]


def kept(plan: Plan) -> float:
    return sum(d.parameters_after for d in plan.decisions) / sum(d.parameters_before for d in plan.decisions)


LIMITED = Budget(max_error=(Limit("cosine", 0.99),))


@pytest.fixture(scope="module")
def wide() -> Problem:
    """Ranks fine enough that every ratio is a plan of its own."""
    return problem(linears((120, 120), (100, 127)), LIMITED)


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.1, 0.24, 0.26, 0.4999, 0.5001, 0.77, 0.9, 0.96, 0.999])
def test_the_search_finds_the_threshold(wide: Problem, threshold: float) -> None:
    """Plans pass from a ratio on. The last that passed is the smallest, and no passing ratio lies 0.03 below it."""
    trials = simulate(wide, lambda plan: plan.ratio >= threshold)  # type: ignore[operator]
    passed = [p.ratio for p, ok in trials if ok]
    failed = [p.ratio for p, ok in trials if not ok]
    assert trials[0][0].ratio == 0.5
    assert passed == sorted(passed, reverse=True)  # `compile._better` keeps the later of those that pass
    assert failed == sorted(failed)
    best = min(passed, default=1.0)
    least = 240 / 14400  # rank one of the squarer weight: below it there is nothing to try
    assert best >= threshold and best - max(threshold, least) <= 0.03
    assert (not passed) == (threshold > 0.97)


def test_a_search_that_nothing_passes_or_everything(wide: Problem) -> None:
    assert not any(ok for _, ok in simulate(wide, lambda plan: False))
    trials = simulate(wide, lambda plan: True)
    assert all(ok for _, ok in trials) and kept(trials[-1][0]) < 0.05


def test_more_ratio_is_never_less_of_a_plan(wide: Problem) -> None:
    from lrcompile.plan import _at_share

    plans = [_at_share(wide, r) for r in np.linspace(0, 1, 41)]
    for a, b in pairwise(plans):
        for x, y in zip(a.decisions, b.decisions, strict=True):
            assert x.parameters_after <= y.parameters_after
            assert (x.claimed_error or 0) >= (y.claimed_error or 0)


def test_the_same_ranks_are_not_tried_twice() -> None:
    """A 4 x 4 weight has one rank below break-even: the search is over after it, passed or failed."""
    small = problem(linears((4, 4)), LIMITED)
    for answer in (True, False):
        trials = simulate(small, lambda plan, answer=answer: answer)
        assert [d.rank for d in trials[0][0].decisions] == [1] and len(trials) == 1


@pytest.mark.parametrize("threshold", [1, 2, 3, 4, 5])
def test_coarse_ranks(threshold: int) -> None:
    """Few ranks: the smallest that passes is found all the same."""
    coarse = problem(linears((12, 12)), LIMITED)
    trials = simulate(coarse, lambda plan: plan.decisions[0].rank >= threshold)  # type: ignore[operator]
    forms = [p.decisions[0].rank for p, _ in trials]
    assert len(set(forms)) == len(forms)
    assert min(p.decisions[0].rank for p, ok in trials if ok) == threshold


def test_budgets_and_given_plans_are_not_searched() -> None:
    made = linears((10, 10))
    limit = (Limit("cosine", 0.99),)
    for budget in (
        Budget(keep=0.5, max_error=limit),
        Budget(rank=2, max_error=limit),
        Budget(energy=0.5, max_error=limit),
    ):
        assert len(simulate(problem(made, budget), lambda plan: False)) == 1
    limited = problem(made, LIMITED)
    given = planned(made, Budget(rank=2))  # a plan of the user's has no ratio
    assert revise(limited, [Trial(given, Evidence((), "ran", "here", "failed"))]) is None
    assert revise(limited, []) is None


def test_nothing_to_rewrite_ends_at_once() -> None:
    nothing = problem(linears((2, 2)), LIMITED)
    assert len(simulate(nothing, lambda plan: True)) == 1


def test_the_dense_plan() -> None:
    stack = node("MatMul", ["x0", "stack"], ["z"], name="stack")
    problem_ = problem(linears((10, 10), extra=[stack], stack=normal(2, 10, 10)), LIMITED)
    plan = dense_plan(problem_, "because")
    assert not plan.rewritten and {d.group: d.reason for d in plan.decisions} == {
        "layer0": "because",
        "stack": "the weight is a stack of 2 matrices",
    }


def test_every_site_has_exactly_one_decision() -> None:
    made = tied()
    finding: Finding = find(made)
    plan = planned(made, Budget(keep=0.5))
    assert sorted(n for d in plan.decisions for n in d.sites) == sorted(s.name for s in finding.sites)
    assert all(isinstance(g, Group) for g in finding.units)
    assert (
        str(plan).splitlines()[-1]
        == "1 of 2 groups rewritten for ort-cpu; 160 of 220 parameters kept (0.727)"
    )


def test_the_cache_of_weights_is_used(tmp_path: Path) -> None:
    """Curves are computed once for all plans of a search: choosing and revising read no weight."""
    problem_ = problem(linears((20, 20)), LIMITED)
    calls: list[str] = []
    original = ModelWeights.matrix
    try:
        ModelWeights.matrix = lambda self, site: calls.append(site.name) or original(self, site)  # type: ignore[method-assign,func-returns-value]
        simulate(problem_, lambda plan: False)
    finally:
        ModelWeights.matrix = original  # type: ignore[method-assign]
    assert not calls


def test_the_table_says_what_a_weight_is_stored_in() -> None:
    plan = planned(linears((10, 10)), Budget(keep=0.8))
    coded = replace(plan, decisions=(replace(plan.decisions[0], method="dense", storage="int4"),))
    assert "dense in int4" in plan_table(coded) and " in int4" not in plan_table(plan)
    held = [sum(getattr(d, f"bytes_{w}") for d in coded.decisions) for w in ("before", "after")]
    assert f"{held[0]:,} -> {held[1]:,} of their bytes" in plan_table(coded)
    assert "of their bytes" not in plan_table(plan)
