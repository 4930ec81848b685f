"""Planning by time: forms that do not pay are refused in words, and what was measured to be too slow loses its least paying weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lrcompile.curves import Seconds, timed
from lrcompile.errors import BudgetError
from lrcompile.plan import Problem, Trial, Whole, choose, fast_enough, prepare, revise
from lrcompile.records import Amount, Budget, Candidate, Evidence, Group, Limit, Plan
from lrcompile.registry import factorization
from lrcompile.sites import find
from tests.graphs import model, node, normal, weights

PLAIN = factorization("svd-plain")
PASSED, FAILED = Evidence((), "ran", "here", "passed"), Evidence((), "ran", "here", "failed")
REST = 1.0  # seconds that the original takes beside its weights


def clock(factor: Mapping[str, float]) -> Seconds:
    """One second a dense weight; a form takes its share of the parameters times the factor of its group."""

    def seconds(group: Group, form: Candidate | None) -> float | None:
        if group.name not in factor:
            return None
        return 1.0 if form is None else factor[group.name] * form.cost.parameters / group.elements

    return seconds


def problem(budget: Budget, *factors: float, margin: float = 1.02) -> Problem:
    """Weights (16, 16), layer0 and so on, one for each factor."""
    count = len(factors)
    made = model(
        [node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"], name=f"layer{i}") for i in range(count)],
        {f"x{i}": ("n", 16) for i in range(count)},
        [f"y{i}" for i in range(count)],
        {f"w{i}": normal(16, 16, seed=i) for i in range(count)},
    )
    plain = prepare(find(made), weights(), None, (PLAIN,), budget, target="ort-cpu")
    whole = Whole(1024 * count, {f"layer{i}": 4 for i in range(count)}, REST + count)
    return timed(plain, clock({f"layer{i}": f for i, f in enumerate(factors)}), whole, margin)


def rewritten(plan: Plan | None) -> list[str]:
    assert plan is not None
    return [d.group for d in plan.rewritten]


def fast(keep: float | None = None, **limits: object) -> Budget:
    return Budget(keep=keep, objective="latency", **limits)  # type: ignore[arg-type]


def test_a_form_that_is_no_faster_is_refused_with_its_figure() -> None:
    made = problem(fast(0.5), 1.0, 9.0)
    assert made.curves[0].candidates and not made.curves[1].candidates
    assert (
        made.curves[1].reason
        == "no form pays: the best would take at least 1.12 times the time of the weight"
    )
    assert "expected to take 0.50 of the time" in made.curves[0].candidates[3].note


def test_a_weight_that_was_not_timed_stays_as_it_is() -> None:
    made = problem(fast(0.5), 1.0, 1.0)
    unknown = timed(made, clock({"layer0": 1.0}), made.whole or Whole(0, {}), 1.02)
    assert "was not timed" in unknown.curves[1].reason


def test_where_nothing_pays_a_budget_is_no_error() -> None:
    plan = choose(problem(fast(0.5), 9.0, 9.0))
    assert not plan.rewritten
    assert all(d.reason.startswith("no form pays") for d in plan.decisions)
    plan = choose(problem(fast(0.5), 9.0, 1.0))  # as small as the rest allows
    assert rewritten(plan) == ["layer1"] and plan.kept == pytest.approx(0.5 + 0.5 * 32 / 256)


def test_the_gate_takes_the_least_paying_half_back() -> None:
    made = problem(fast(0.5), 0.4, 0.9, 0.6, 1.5)
    trials = [Trial(choose(made), PASSED, 0.9)]
    assert len(rewritten(trials[0].plan)) == 4
    trials.append(Trial(revise(made, trials), PASSED, 1.0))  # type: ignore[arg-type]
    assert rewritten(trials[-1].plan) == ["layer0", "layer2"]
    assert {d.reason for d in trials[-1].plan.decisions if not d.rewrites} == {
        "dense: it pays least, and with it the engine was not fast enough"
    }
    trials.append(Trial(revise(made, trials), PASSED, 1.019))  # type: ignore[arg-type]
    assert rewritten(trials[-1].plan) == ["layer0"]
    last = revise(made, trials)
    assert rewritten(last) == []
    assert (
        last is not None
        and "no form was measured to make the engine 1.02 times as fast" in last.decisions[0].reason
    )
    trials.append(Trial(last, PASSED))
    assert fast_enough(made, trials[-1]) and revise(made, trials) is None


@pytest.mark.parametrize(
    ("speedup", "margin", "enough"), [(1.03, 1.02, True), (1.03, 1.1, False), (0.99, 1.0, False)]
)
def test_fast_enough(speedup: float, margin: float, enough: bool) -> None:
    made = problem(fast(0.5), 1.0, margin=margin)
    trial = Trial(choose(made), PASSED, speedup)
    assert fast_enough(made, trial) is enough
    assert (revise(made, [trial]) is None) is enough


def test_without_a_wish_for_speed_there_is_no_gate() -> None:
    made = problem(Budget(keep=0.5), 1.0)
    plain = Trial(choose(made), PASSED)
    assert fast_enough(made, plain) and revise(made, [plain]) is None


def test_a_plan_that_failed_its_error_limit_is_not_gated() -> None:
    made = problem(fast(0.5), 1.0)
    assert revise(made, [Trial(choose(made), FAILED, 0.5)]) is None


# --- --latency ----------------------------------------------------------------------------------------------------


def test_a_latency_budget_counts_what_cannot_shrink() -> None:
    made = problem(Budget(latency=Amount(0.7, relative=True)), 1.0, 1.0, 1.0)
    plan = choose(made)  # 4 s, of which 1 is no weight: 2.8 leave 1.8 for three weights
    spent = REST + sum(d.parameters_after / d.parameters_before for d in plan.decisions)
    assert 2.4 < spent <= 0.7 * 4.0
    assert choose(problem(Budget(latency=Amount(2.8)), 1.0, 1.0, 1.0)).decisions == plan.decisions


def test_a_latency_budget_that_no_plan_keeps() -> None:
    with pytest.raises(
        BudgetError, match=r"--latency 0\.2x cannot be met: by the cost table the fastest plan takes 0\.34"
    ):
        choose(problem(Budget(latency=Amount(0.2, relative=True)), 1.0, 1.0, 1.0))


def test_a_latency_budget_that_was_missed_is_tried_with_less() -> None:
    made = problem(Budget(latency=Amount(0.7, relative=True)), 1.0, 1.0, 1.0)
    trials = [Trial(choose(made), PASSED, 1 / 0.8)]
    assert not fast_enough(made, trials[0])
    tighter = revise(made, trials)
    assert tighter is not None and tighter.kept < trials[0].plan.kept
    assert fast_enough(made, Trial(tighter, PASSED, 1 / 0.69))
    trials += [Trial(tighter, PASSED, 1 / 0.8)] * 3
    assert revise(made, trials) is None  # it is given up


def test_under_an_error_limit_time_is_what_gets_small() -> None:
    """layer0 saves much time for its parameters, layer1 little: the share that is searched over is one of time."""
    made = problem(fast(max_error=(Limit("cosine", 0.9),)), 0.2, 0.95)
    plan = choose(made)
    seconds = made.seconds
    assert seconds is not None and plan.ratio == 0.5
    curves = {c.group.name: c for c in made.curves}
    spent = sum(
        seconds(
            curves[d.group].group, next((c for c in curves[d.group].candidates if c.rank == d.rank), None)
        )
        or 0.0
        for d in plan.decisions
    )
    assert spent <= 0.5 * 2.0
