"""Sensitivity against really compiling one group; power laws; what ranks high and low; masks, logits, types, bodies, the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from lrcompile import sensitivity as module
from lrcompile.calibrate import StoredStatistics, calibrate
from lrcompile.curves import Problem, decision_of, prepare
from lrcompile.factorize import factorize
from lrcompile.feeds import Feeds, inputs_of, open_feeds
from lrcompile.lower import lower
from lrcompile.records import Budget, Candidate, Group, Plan, Source
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sensitivity import Response, power_law, predicted
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests import blocks
from tests.graphs import Array, OneProcess, model, node, normal, run

SVD, SLICING = factorization("svd"), factorization("slicing")
K = 12


@dataclass
class Study:
    made: ir.Model
    problem: Problem
    feeds: Feeds
    weights: ModelWeights
    statistics: StoredStatistics
    folder: Path
    methods: Sequence[Any]
    target: str
    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def predicted(self, monkeypatch: pytest.MonkeyPatch | None = None, child: Any = None) -> Problem:
        """The problem with movements; every (strength, movement) that was measured is written down, in the order of the groups."""
        seen: list[list[tuple[float, float]]] = []
        if monkeypatch is not None:
            monkeypatch.setattr(module, "power_law", lambda p: seen.append(list(p)) or power_law(p))
        scratch = self.folder / f"scratch-{len(list(self.folder.iterdir()))}"
        scratch.mkdir()
        source = Source(Path("m.onnx"), self.made, "source", (), 18)
        found = predicted(
            self.problem, source, self.weights, self.statistics, {m.name: m for m in self.methods}, self.feeds,
            child=child or OneProcess(), target=self.target, scratch=scratch, seed=0,
        )  # fmt: skip
        tried = [c.group.name for c in self.problem.open if c.candidates and module._is_tried(c.group)]
        self.points = dict(zip(tried, seen, strict=True)) if monkeypatch is not None else {}
        assert not list(scratch.iterdir())
        return found

    def compiled(
        self, group: Group, form: Candidate, evaluate: Any
    ) -> list[tuple[Mapping[str, Array], Mapping[str, Array]]]:
        """Outputs before and after, of a plan that takes this one group, by rewrite and lower."""
        plan = Plan(self.target, (replace(decision_of(group, form, ""), bound=False),))
        methods = {m.name: m for m in self.methods}
        sets = factorize(plan, {group.name: group}, self.weights, self.statistics, methods, 0)
        lowered = lower(rewrite(self.made, sets), ())
        return [(evaluate(self.made, f), evaluate(lowered, f)) for f in self.feeds]


def study(
    made: ir.Model, data: Sequence[Mapping[str, Array]], folder: Path, methods: Sequence[Any] = (SVD,),
    target: str = "reference", include: str | None = None,
) -> Study:  # fmt: skip
    folder.mkdir(exist_ok=True)
    finding, feeds, cache = find(made), open_feeds(list(data), inputs_of(made)), Cache(folder / "cache")
    statistics = calibrate(
        made, finding, feeds, "source", target=target, child=OneProcess(), cache=cache  # type: ignore[arg-type]
    )  # fmt: skip
    weights = ModelWeights(cache, 18)
    problem = prepare(finding, weights, statistics, methods, Budget(keep=0.5), target=target, include=include)
    return Study(made, problem, feeds, weights, statistics, folder, methods, target)


def relative(pairs: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]], name: str) -> float:
    """Squared, over all feeds."""
    a, b = (np.concatenate([p[i][name].astype(np.float64).reshape(-1) for p in pairs]) for i in (0, 1))
    return float(np.sum((a - b) ** 2) / np.sum(a**2))


def divergence(pairs: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]], name: str) -> float:
    """Mean over rows of KL(softmax a || softmax b)."""
    found = []
    for one, two in pairs:
        a, b = (x[name].astype(np.float64).reshape(-1, x[name].shape[-1]) for x in (one, two))
        p, q = (np.exp(x - x.max(axis=1, keepdims=True)) for x in (a, b))
        p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
        found.append((p * np.log(p / q)).sum(axis=1))
    return float(np.concatenate(found).mean())


def on_ort(made: ir.Model, feed: Mapping[str, Array]) -> dict[str, Array]:
    return dict(zip((v.name or "" for v in made.graph.outputs), blocks.run(made, feed), strict=True))


def check(
    known: Study,
    monkeypatch: pytest.MonkeyPatch,
    measure: Any,
    evaluate: Any,
    groups: Sequence[str],
    rel: float,
) -> None:
    """Every measured point is what compiling that form gives."""
    known.predicted(monkeypatch)
    curves = {c.group.name: c for c in known.problem.open}
    for name in groups:
        points = known.points[name]
        assert points
        for x, y in points:
            form = next(c for c in curves[name].candidates if c.error**2 == x)
            assert y == pytest.approx(
                measure(known.compiled(curves[name].group, form, evaluate)), rel=rel, abs=1e-9
            ), name


def network(output: str = "y") -> ir.Model:
    nodes = [
        node("MatMul", ["x", "w1"], ["p"], name="one"),
        node("Add", ["p", "b1"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("MatMul", ["t", "w2"], ["q"], name="two"),
        node("Add", ["q", "x"], ["r"]),
        node("MatMul", ["r", "w3"], [output], name="three"),
    ]
    constants = {f"w{i}": normal(K, K, seed=i) / np.float32(K**0.5) for i in (1, 2, 3)}
    return model(nodes, {"x": ("n", K)}, [output], {**constants, "b1": normal(K)})


def rows(n: int, seed: int) -> Array:
    return (
        normal(n, 5, seed=seed) @ normal(5, K, seed=77)
        + normal(n, K, seed=seed + 500) * np.float32(0.3)
        + np.float32(0.2)
    )


# The trial overrides a float32 weight; the compiled form multiplies two rounded factors. Movements are some percent.
CLOSE = 2e-3


@pytest.mark.parametrize("output", ["y", "logits"])
def test_it_is_what_compiling_one_group_gives(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = study(network(output), [{"x": rows(40, i)} for i in range(3)], tmp_path, target="ort-cpu")
    measure = divergence if output == "logits" else relative
    check(known, monkeypatch, lambda p: measure(p, output), on_ort, ["one", "two", "three"], CLOSE)


def test_several_outputs_count_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over outputs: one that lies before a weight does not move. Integers are no outputs to judge."""
    made = network()
    proto = ir.to_proto(made)
    proto.graph.node.append(node("Shape", ["x"], ["shape"]))
    for name, kind in (("t", TensorProto.FLOAT), ("shape", TensorProto.INT64)):
        proto.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    known = study(ir.from_proto(proto), [{"x": rows(40, i)} for i in range(3)], tmp_path, target="ort-cpu")

    def mean(pairs: Any) -> float:
        return (relative(pairs, "y") + relative(pairs, "t")) / 3

    check(known, monkeypatch, mean, on_ort, ["one", "two", "three"], CLOSE)


def test_queries_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = blocks.attention()
    data = [blocks.feeds(made, seed, batch=6) for seed in range(2)]
    known = study(made, data, tmp_path, (SLICING,), "ort-cpu")
    name = blocks.groups(made)["query_key"].name
    check(known, monkeypatch, lambda p: relative(p, "y"), on_ort, [name], 1e-2)


@pytest.mark.parametrize("kind", ["shared", "tied"])
def test_one_weight_with_several_readers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its readers change, also those that read what the first one gave."""
    nodes = [
        node("Gather", ["w", "ids"], ["a"], name="first") if kind == "tied" else node("MatMul", ["x", "w"], ["a"], name="first"),
        node("MatMul", ["a", "u"], ["b"], name="between"),
        node("Tanh", ["b"], ["c"]),
        *([node("Transpose", ["w"], ["wt"])] if kind == "tied" else []),
        node("MatMul", ["c", "wt" if kind == "tied" else "w"], ["y"], name="again"),
    ]  # fmt: skip
    constants = {"w": normal(30 if kind == "tied" else K, K) / np.float32(K**0.5), "u": normal(K, K, seed=1)}
    rng = np.random.default_rng(0)
    if kind == "tied":
        made = model(nodes, {"ids": (("n",), np.int64)}, ["y"], constants)
        data: list[dict[str, Array]] = [{"ids": rng.integers(0, 30, 60)} for _ in range(3)]
    else:
        made, data = model(nodes, {"x": ("n", K)}, ["y"], constants), [{"x": rows(60, i)} for i in range(3)]
    known = study(made, data, tmp_path, target="ort-cpu", include=".")
    check(known, monkeypatch, lambda p: relative(p, "y"), on_ort, ["first", "between"], CLOSE)


# --- ranking ------------------------------------------------------------------------------------------------------


def test_the_sensitive_and_the_dead(tmp_path: Path) -> None:
    """Equal weights on one input: one loud, one soft, one whose output is multiplied by nothing."""
    loudness = {"loud": 10.0, "soft": 0.1, "plain": 1.0, "dead": 0.0}
    nodes, sums = [], []
    for name in loudness:
        nodes += [
            node("MatMul", ["x", f"w_{name}"], [f"p_{name}"], name=name),
            node("Mul", [f"p_{name}", f"s_{name}"], [name]),
        ]
        sums.append(name)
    nodes.append(node("Sum", sums, ["y"]))
    constants = {f"w_{n}": normal(K, K, seed=3 + i) for i, n in enumerate(loudness)}
    constants |= {f"s_{n}": np.array(s, np.float32) for n, s in loudness.items()}
    made = model(nodes, {"x": ("n", K)}, ["y"], constants)
    problem = study(made, [{"x": rows(60, i)} for i in range(3)], tmp_path, target="ort-cpu").predicted()
    assert problem.predicts
    moved = {c.group.name: {x.rank: x.movement or 0.0 for x in c.candidates} for c in problem.curves}
    for rank in (2, 4):
        by = sorted(loudness, key=lambda n: moved[n][rank])
        assert by == ["dead", "soft", "plain", "loud"]
        assert moved["loud"][rank] > 30 * moved["plain"][rank] > 900 * moved["soft"][rank] > 0
        assert moved["dead"][rank] < 1e-9
    for curve in problem.curves:  # more of a weight moves less
        falling = [moved[curve.group.name][c.rank] for c in curve.candidates]
        assert all(a >= b for a, b in pairwise(falling))


def test_inside_a_body_the_worst_is_assumed(tmp_path: Path) -> None:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("ty", "ey")]
    then = helper.make_graph([node("MatMul", ["h", "w2"], ["ty"], name="inside")], "t", [], info[:1])
    other = helper.make_graph([node("Tanh", ["h"], ["ey"])], "e", [], info[1:])
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="first"),
        node("If", ["c"], ["f"], then_branch=then, else_branch=other),
        node("MatMul", ["f", "w3"], ["y"], name="last"),
    ]
    made = model(
        nodes, {"x": ("n", K), "c": ((), np.bool_)}, ["y"], {f"w{i}": normal(K, K, seed=i) for i in (1, 2, 3)}
    )
    data = [{"x": rows(40, i), "c": np.asarray(i % 2 == 0)} for i in range(4)]
    plain = factorization("svd-plain")  # no moments are kept in bodies
    problem = study(made, data, tmp_path, (plain,)).predicted()
    curves = {c.group.name: c for c in problem.curves}
    assert problem.predicts
    responses = {}
    for name in ("first", "last"):  # by what they say of equal strengths
        a, b = (next(c for c in curves[name].candidates if c.rank == r) for r in (2, 4))
        q = np.log(a.movement / b.movement) / np.log(a.error**2 / b.error**2)  # type: ignore[operator]
        responses[name] = Response(a.movement / (a.error**2) ** q, q)  # type: ignore[operator]
    worst = max(responses.values(), key=lambda r: r(0.01))
    for form in curves["inside"].candidates:
        assert form.movement == pytest.approx(worst(form.error**2), rel=1e-6)


# --- what counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["y", "logits"])
def test_padding_does_not_count(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = ir.to_proto(network(output))
    shape = proto.graph.input[0].type.tensor_type.shape
    shape.dim.insert(1, type(shape.dim[0])(dim_param="s"))
    proto.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "s"]))
    proto.graph.node.append(node("Identity", ["attention_mask"], ["m"]))
    proto.graph.output.append(helper.make_tensor_value_info("m", TensorProto.INT64, None))
    mask = np.array([[1, 1, 1, 0, 0, 0]] * 10)
    seen = []
    for name, factor in (("zeros", 0.0), ("garbage", 50.0)):
        x = rows(60, 0).reshape(10, 6, K)
        x = np.where(mask[..., None] == 1, x, np.float32(factor) * normal(10, 6, K, seed=8)).astype(
            np.float32
        )
        feed = {"x": x, "attention_mask": mask}
        known = study(ir.from_proto(proto), [feed, feed], tmp_path / name, target="ort-cpu")
        known.predicted(monkeypatch)
        seen.append(known.points)
    for group, points in seen[0].items():
        # the same rows beside other ones: float32 kernels may sum in another order
        np.testing.assert_allclose(points, seen[1][group], rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_types(dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, constants, at = [], {}, "x"
    for i in range(3):
        constants[f"w{i}"] = (normal(K, K, seed=i) / K**0.5).astype(dtype)
        nodes += [node("MatMul", [at, f"w{i}"], [f"p{i}"], name=f"l{i}"), node("Tanh", [f"p{i}"], [f"h{i}"])]
        at = f"h{i}"
    made = model(nodes, {"x": (("n", K), dtype)}, {at: dtype}, constants)
    known = study(made, [{"x": rows(40, i).astype(dtype)} for i in range(2)], tmp_path)
    rel = {np.float16: 0.05, np.float64: 1e-6, ml_dtypes.bfloat16: 0.3}[dtype]  # of roundings at three layers
    check(known, monkeypatch, lambda p: relative(p, at), run, ["l0", "l1", "l2"], rel)


def test_a_model_that_nothing_can_change(tmp_path: Path) -> None:
    """No site: nothing is run."""
    made = model([node("Tanh", ["x"], ["y"])], {"x": ("n", K)}, ["y"])
    known, child = study(made, [{"x": rows(4, 0)}, {"x": rows(4, 1)}], tmp_path), OneProcess()
    assert known.predicted(child=child).open == () and child.calls == []


# --- the cache ----------------------------------------------------------------------------------------------------


def test_a_second_run_runs_nothing(tmp_path: Path) -> None:
    known = study(network(), [{"x": rows(40, i)} for i in range(3)], tmp_path, target="ort-cpu")
    first, again = OneProcess(), OneProcess()
    one, two = known.predicted(child=first), known.predicted(child=again)
    assert first.calls and again.calls == []
    assert [c.candidates for c in one.curves] == [c.candidates for c in two.curves]


def test_a_killed_run_keeps_what_it_measured(tmp_path: Path) -> None:
    class Dying(OneProcess):
        def call(self, function: str, *args: Any) -> object:
            if self.calls.count("lrcompile.sensitivity:moved") == 3:
                raise ConnectionError
            return super().call(function, *args)

    data = [{"x": rows(40, i)} for i in range(3)]
    whole = study(network(), data, tmp_path / "whole", target="ort-cpu").predicted()
    known, rest = study(network(), data, tmp_path / "killed", target="ort-cpu"), OneProcess()
    with pytest.raises(ConnectionError):
        known.predicted(child=Dying())
    again = known.predicted(child=rest)
    assert rest.calls.count("lrcompile.sensitivity:moved") == 3  # of six
    for a, b in zip(whole.curves, again.curves, strict=True):
        assert [c.movement for c in a.candidates] == pytest.approx(
            [c.movement for c in b.candidates], rel=1e-3
        )


def test_the_work_is_bounded(tmp_path: Path) -> None:
    """Twenty layers, forty trials on twelve feeds: trials together see no more than a few passes of the data."""
    nodes, constants, at = [], {}, "x"
    for i in range(20):
        constants[f"w{i}"] = normal(K, K, seed=i) / np.float32(K**0.5)
        nodes += [node("MatMul", [at, f"w{i}"], [f"p{i}"], name=f"l{i}"), node("Tanh", [f"p{i}"], [f"h{i}"])]
        at = f"h{i}"
    made = model(nodes, {"x": ("n", K)}, [at], constants)
    runs: list[int] = []

    class Counting(OneProcess):
        def call(self, function: str, *args: Any) -> object:
            if function in ("lrcompile.sensitivity:moved", "lrcompile.sensitivity:refer"):
                runs.append(len(args[1]))
            return super().call(function, *args)

    known = study(made, [{"x": rows(20, i)} for i in range(12)], tmp_path, target="ort-cpu")
    known.predicted(child=Counting())
    assert 40 < len(runs) <= 40 + 6  # and from at most six places the reference
    assert sum(runs) <= 8 * 12


# --- power laws ---------------------------------------------------------------------------------------------------


@given(
    scale=st.floats(1e-4, 1e3), exponent=st.floats(0.55, 1.95), x=st.floats(1e-4, 0.1), ratio=st.floats(1.2, 100)
)  # fmt: skip
def test_a_power_law_through_two_points(scale: float, exponent: float, x: float, ratio: float) -> None:
    law = power_law([(x * ratio, scale * (x * ratio) ** exponent), (x, scale * x**exponent)])
    if scale * x**exponent > 1e-11:
        assert law.exponent == pytest.approx(exponent, rel=1e-6, abs=1e-6)
        assert law(3 * x) == pytest.approx(scale * (3 * x) ** exponent, rel=1e-5)


def test_power_laws_that_are_not_believed() -> None:
    assert power_law([(0.1, 0.02)]) == Response(
        pytest.approx(0.2), 1.0
    )  # one point: straight from the origin
    law = power_law([(0.1, 0.02), (0.1001, 0.05)])  # the same strength twice: between both
    assert law.exponent == 1.0 and 0.02 < law(0.1) < 0.05
    steep, falling = power_law([(0.1, 1e-6), (0.2, 1.0)]), power_law([(0.1, 0.5), (0.4, 0.1)])
    assert (steep.exponent, falling.exponent) == (2.0, 0.5)
    assert steep(0.1) / 1e-6 == pytest.approx(
        1.0 / steep(0.2), rel=1e-9
    )  # in the middle, on a logarithmic scale
    assert power_law([(0.0, 0.0), (0.0, 0.0)])(0.5) >= 0 and law(0.0) == 0.0 and law(-1.0) == 0.0
