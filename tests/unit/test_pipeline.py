"""The compile as a pass: same plan as `compile`, the input untouched, composable, and honest about what it changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import CommonSubexpressionEliminationPass

import lrcompile
from lrcompile import Budget, Child, Limit, LowRankPass, LowRankResult, Options, UsageError, VerificationError
from lrcompile.pipeline import PLAN

FEEDS = [{"x": np.random.default_rng(n).standard_normal((32, 24)).astype(np.float32)} for n in range(4)]


def model() -> ir.Model:
    """y = Relu(x W + b) V, the same one each time."""
    rng = np.random.default_rng(1)
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[n,24] x) => (float[n,16] y) {
            h = MatMul(x, W)
            s = Add(h, b)
            r = Relu(s)
            y = MatMul(r, V)
        }"""
    made = ir.from_onnx_text(
        text,
        initializers=[
            ir.tensor(rng.standard_normal((24, 48)).astype(np.float32), name="W"),
            ir.tensor(rng.standard_normal(48).astype(np.float32), name="b"),
            ir.tensor(rng.standard_normal((48, 16)).astype(np.float32), name="V"),
        ],
    )
    for node, name in zip(made.graph, ("first", "add", "relu", "second"), strict=True):
        node.name = name
    return made


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return Options(
        methods=("svd",), budget=Budget(keep=0.6), data=FEEDS, cache=tmp_path_factory.mktemp("cache")
    )


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child() as child:
        yield child


def outputs(model: ir.Model) -> Any:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, FEEDS[0])[0]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_pass_does_what_compile_does(options: Options, child: Child, tmp_path: Path) -> None:
    given = model()
    before = ir.to_proto(given).SerializeToString()
    result = LowRankPass(options, verify=True, child=child)(given)
    assert isinstance(result, LowRankResult)
    assert result.modified
    assert ir.to_proto(given).SerializeToString() == before
    assert ops(result.model) == ["MatMul", "MatMul", "Add", "Relu", "MatMul", "MatMul"]
    compiled = lrcompile.compile(given, tmp_path / "out", options, child=child)
    forms = [[(d.group, d.method, d.rank, d.claimed_error) for d in p] for p in (result.plan, compiled.plan)]
    assert forms[0] == forms[1]
    assert [s.decision.group for s in result.sets] == [d.group for d in result.plan.decisions if d.rewrites]
    published = ReferenceEvaluator(str(tmp_path / "out" / "model.onnx")).run(None, FEEDS[0])[0]
    np.testing.assert_array_equal(outputs(result.model), published)


@pytest.mark.parametrize("inline", [True, False])
def test_full_rank_is_the_identity(options: Options, child: Child, inline: bool) -> None:
    full = dataclasses.replace(options, budget=Budget(rank="full"), data=None)
    given = model()
    result = LowRankPass(full, inline=inline, verify=True, child=child)(given)
    np.testing.assert_allclose(outputs(result.model), outputs(given), rtol=0, atol=1e-4)
    assert len(result.model.functions) == (0 if inline else 2)


def test_it_composes_and_comes_to_an_end(options: Options, child: Child) -> None:
    steps = [LowRankPass(options, child=child), CommonSubexpressionEliminationPass()]
    once = ir.passes.Sequential(*steps)(model())
    thrice = ir.passes.PassManager(steps, steps=3)(model())
    assert ops(thrice.model) == ops(once.model)
    assert thrice.model.meta[PLAN] == once.model.meta[PLAN]
    for inline in (True, False):
        first = LowRankPass(options, inline=inline, child=child)(model())
        again = LowRankPass(options, child=child)(first)
        assert not again.modified
        assert again.model is not first.model
        assert ir.to_proto(again.model) == ir.to_proto(first.model)


def test_nothing_to_do(options: Options, child: Child) -> None:
    given = model()
    result = LowRankPass(dataclasses.replace(options, exclude="."), child=child)(given)
    assert not result.modified
    assert ir.to_proto(result.model) == ir.to_proto(given)
    assert all(d.reason == "excluded by name" for d in result.model.meta[PLAN].decisions)


def test_a_model_that_is_not_legal(options: Options) -> None:
    broken = model()
    broken.graph.node(1).op_type = "NoSuchOperator"
    with pytest.raises(ir.passes.PreconditionError, match="NoSuchOperator"):
        LowRankPass(options)(broken)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"budget": Budget(keep=0.5, max_error=(Limit("cosine", 0.9),))}, "measures no outputs"),
        ({"budget": Budget()}, "bounds the size"),
        ({"budget": Budget(keep=2.0)}, "--keep 2"),
        ({"data": None, "methods": ("auto",)}, "--data"),
    ],
)
def test_options_are_refused_when_the_pass_is_made(
    options: Options, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        LowRankPass(dataclasses.replace(options, **change))


def test_a_wrong_rewrite_is_found(options: Options, child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier itself: one factor of what comes out is turned round."""
    from lrcompile import pipeline

    def flipped(*args: Any) -> ir.Model:
        made = rewrite(*args)
        name = next(n for n in made.graph.initializers if n.endswith("/a"))
        value = made.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(-value.const_value.numpy(), name=name)
        return made

    rewrite = pipeline.rewrite
    monkeypatch.setattr(pipeline, "rewrite", flipped)
    with pytest.raises(VerificationError, match="does not compute"):
        LowRankPass(options, verify=True, child=child)(model())


def test_a_precision_is_part_of_the_pass(options: Options, child: Child) -> None:
    half = dataclasses.replace(options, precision="fp16", timeout=300.0)
    result = LowRankPass(half, verify=True, child=child)(model())
    types = {v.dtype for v in result.model.graph.initializers.values() if v.name and "/svd/" in v.name}
    assert types == {ir.DataType.FLOAT16}
    assert result.model.graph.inputs[0].dtype == result.model.graph.outputs[0].dtype == ir.DataType.FLOAT
    with pytest.raises(UsageError, match="inline=False"):
        LowRankPass(half, inline=False)
