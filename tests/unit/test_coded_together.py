"""Factorizations that code their factors themselves, lqer and kashin: what their parts cost, what is emitted, hostile weights, who may use them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from lrcompile.child import Child
from lrcompile.curves import decision_of
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.interfaces import CandidateOptions
from lrcompile.loss import group_loss
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.plan import choose, group_by_name, prepare
from lrcompile.quantize import storage
from lrcompile.records import Budget, Candidate, Group, InputStatistics, Plan, Site
from lrcompile.registry import factorization
from lrcompile.rewrite import parts_by_name, rewrite
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.storing import AUTO_TENSORRT, types_of
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal

METHODS = {n: factorization(n) for n in ("dense", "lqer", "kashin")}
CODED = ("lqer", "kashin")


@dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return site.name


def model_of(W: Array) -> ir.Model:
    """y = x W + b."""
    nodes = [node("MatMul", ["x", "w"], ["p"], name="up"), node("Add", ["p", "b"], ["y"], name="bias")]
    constants = {"w": W.astype(np.float32), "b": normal(W.shape[1])}
    return model(nodes, {"x": (3, len(W))}, ["y"], constants, opset=21)


def statistics_of(K: int) -> Statistics:
    X = normal(300, K, dtype=np.float64) @ normal(K, K, seed=1, dtype=np.float64) + 0.5
    return Statistics({"up": InputStatistics(300, X.T @ X / 300, X.mean(axis=0))})


def candidates_of(
    name: str, made: ir.Model, cache: Cache, types: Sequence[str] = ("uint4",), seen: bool = True
) -> tuple[list[Candidate], Group, ModelWeights, Statistics | None]:
    (group,) = find(made).groups
    weights, statistics = ModelWeights(cache, 21), statistics_of(group.sites[0].K) if seen else None
    options = CandidateOptions(ranks=(1, 4) if name == "lqer" else None, storages=tuple(types))
    return list(METHODS[name].candidates(group, weights, statistics, options)), group, weights, statistics


def carried_out(
    candidate: Candidate, group: Group, weights: ModelWeights, statistics: Statistics | None
) -> FactorSet:
    plan = Plan("ort-cpu", (decision_of(group, candidate, ""),))
    (factors,) = factorize(plan, {group.name: group}, weights, statistics, METHODS, 0)
    return factors


def outputs(made: ir.Model, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    return y


def hostile() -> dict[str, Array]:
    W = normal(50, 12, dtype=np.float64)
    outlier, holes = W.copy(), W.copy()
    outlier[3, 2], holes[:, ::2] = 1e4, 0.0
    return {
        "no whole groups": W, "outlier": outlier, "zero columns": holes, "zero": 0 * W, "constant": np.full((50, 12), 0.3),
        "one column": W[:, :1], "few rows": W[:4],
    }  # fmt: skip


@pytest.mark.parametrize("case", sorted(hostile()))
@pytest.mark.parametrize("name", CODED)
def test_hostile_weights(name: str, case: str, tmp_path: Path) -> None:
    """Finite, no worse than nothing, and the graph computes what the codes mean, of every form there is."""
    W = hostile()[case]
    made = model_of(W)
    found, *where = candidates_of(name, made, Cache(tmp_path), ("uint4", "uint2"))
    assert found
    x = normal(3, len(W), seed=5)
    for candidate in found:
        factors = carried_out(candidate, *where)
        assert np.isfinite(factors.measured) and factors.measured <= 1.0
        a, b = outputs(reconstructed(made, (factors,)), x), outputs(lower(rewrite(made, (factors,)), ()), x)
        np.testing.assert_allclose(
            b, a, atol=1e-5 * max(1.0, float(np.abs(W).max()) * 50)
        )  # sums of 50 in float32


@pytest.mark.parametrize("name", CODED)
def test_all_parts_are_counted(name: str, tmp_path: Path) -> None:
    """What a candidate says it takes is what the file holds of it; codes of less than four bits have zero points of four bits beside."""
    made = model_of(normal(64, 48))
    found, *where = candidates_of(name, made, Cache(tmp_path), ("uint4", "uint3", "int8"))
    assert {c.storage for c in found} >= (
        {"uint4", "uint3"} if name == "lqer" else {"quarters", "int4-0s32+", "pairs4", "pairs8"}
    )
    assert "int8" not in {c.storage for c in found}  # loses too little to be corrected
    for candidate in found:
        factors = carried_out(candidate, *where)
        parts = {n: p.array.size * p.dtype.bitwidth for n, p in parts_by_name(factors).items()}
        plain = 32 * sum(
            int(np.prod(s))
            for n, s in factors.shapes.items()
            if n not in factors.coded and not n.startswith("bias")
        )
        held = sum(parts.values()) + plain
        spare = sum(bits for n, bits in parts.items() if n.endswith(".zero"))
        assert candidate.cost.bytes * 8 - 40 <= held <= candidate.cost.bytes * 8 + spare, candidate


def test_corrections_pay_by_rank_and_by_turns(tmp_path: Path) -> None:
    made = model_of(normal(64, 48))
    (_, group, weights, statistics) = candidates_of("lqer", made, Cache(tmp_path))
    lqer = METHODS["lqer"]
    ranks = (1, 2, 4, 8, 16, 32)
    found = list(lqer.candidates(group, weights, statistics, CandidateOptions(ranks, storages=("uint3",))))
    measured = [carried_out(c, group, weights, statistics).measured for c in found]
    assert all(b < a for a, b in itertools.pairwise(measured))
    assert all(m <= 1.02 * c.error for m, c in zip(measured, found, strict=True))  # the claim is one turn's
    dense = next(iter(METHODS["dense"].candidates(group, weights, None, CandidateOptions())))
    alone = carried_out(replace(dense, storage="uint3", bound=False), group, weights, statistics).measured
    assert measured[-1] < 0.6 * alone and measured[0] < alone


def test_which_forms_there_are(tmp_path: Path) -> None:
    """Ranks in whole groups of types without zero points, two bits beside those with them; nothing without codes."""
    lqer, kashin = METHODS["lqer"], METHODS["kashin"]
    made = model_of(normal(256, 256))
    (_, group, weights, _) = candidates_of("lqer", made, Cache(tmp_path))
    assert not list(lqer.candidates(group, weights, None, CandidateOptions()))
    types = types_of(("auto",), "trt-rtx")
    assert types == AUTO_TENSORRT
    ranks = {
        (c.storage, c.rank) for c in lqer.candidates(group, weights, None, CandidateOptions(storages=types))
    }
    assert ranks == {("int4-32s32+", 32)}
    for target, kept in (("ort-cpu", {"quarters", "int4-0s32+"}), ("trt-rtx", {"int4-0s32+"})):
        for objective, more in (("size", set()), ("disk", {"pairs4", "pairs8"})):
            problem = prepare(
                find(made), weights, None, (METHODS["dense"], kashin), Budget(bits=9.0, objective=objective), target=target,
                storages=("int8",),
            )  # fmt: skip
            (curve,) = problem.curves
            assert {c.storage for c in curve.candidates if c.method == "kashin"} == kept | more, (
                target,
                objective,
            )
    notes = [c.note for c in kashin.candidates(group, weights, None, CandidateOptions())]
    assert all("times the weight's mean size" in n and "a step" in n for n in notes)
    assert storage("pairs4").size(10, 10) == 400 + 2 * 16 * 32 + 10 * 32


def test_a_budget_between_two_types_takes_a_correction(tmp_path: Path) -> None:
    """Five bits are no type: named, a corrected weight of four stands for them, and errs less than four bits alone."""
    made = model_of(normal(256, 256))
    (_, group, weights, statistics) = candidates_of("lqer", made, Cache(tmp_path))
    problem = prepare(
        find(made), weights, statistics, (METHODS["dense"], METHODS["lqer"]), Budget(bits=5.0), target="ort-cpu",
        storages=types_of(("auto",), "ort-cpu"),
    )  # fmt: skip
    plan = choose(problem)
    (decision,) = plan.rewritten
    assert decision.method == "lqer" and decision.storage == "uint4"
    assert 8 * decision.bytes_after <= 5.0 * 256 * 256
    (factors,) = factorize(plan, group_by_name(find(made)), weights, statistics, METHODS, 0)
    assert factors.measured == pytest.approx(
        group_loss(group, weights, statistics, METHODS["lqer"].reconstruct(group, factors.load())), rel=1e-9
    )


@pytest.mark.parametrize("name", CODED)
def test_a_wrong_code_is_seen(name: str, tmp_path: Path) -> None:
    """Negative control of the comparisons above: codes of one factor moved by a place, and the graph computes something else."""
    made = model_of(normal(50, 12))
    found, *where = candidates_of(name, made, Cache(tmp_path))
    x = normal(3, 50, seed=5)
    for candidate in found:
        factors = carried_out(candidate, *where)
        oracle = outputs(reconstructed(made, (factors,)), x)
        for wrong in factors.codes():
            codes = {
                n: replace(c, codes=np.roll(c.codes, 1)) if n == wrong else c
                for n, c in factors.codes().items()
            }
            broken = replace(factors, codes=lambda c=codes: c)  # type: ignore[misc]
            assert np.abs(outputs(lower(rewrite(made, (broken,)), ()), x) - oracle).max() > 1e-2, wrong


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(timeout=60) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "kind", "target", "least", "most"),
    (
        ("lqer", "uint4", "ort-cpu", 0.12, 0.25),
        ("lqer", "int4-32s32", "trt-rtx", 0.12, 0.25),
        ("kashin", "quarters", "ort-cpu", 0.25, 0.32),  # two codes of four bits in memory
        ("kashin", "int4-0s32+", "trt-rtx", 0.25, 0.3),
        ("kashin", "pairs4", "ort-cpu", 0.99, 1.05),  # made into the weight
        ("kashin", "pairs4", "trt-rtx", 0.99, 1.05),
    ),
)
def test_what_engines_keep(
    name: str, kind: str, target: str, least: float, most: float, child: Child, tmp_path: Path
) -> None:
    """Shares of a float32 weight: corrections and uniform levels stay codes, centroids become the weight."""
    if target == "trt-rtx":
        pytest.importorskip("tensorrt_rtx")
    made = model_of(normal(256, 256))
    (_, group, weights, _) = candidates_of(name, made, Cache(tmp_path))
    types = (kind,) if name == "lqer" else ()
    found = METHODS[name].candidates(group, weights, None, CandidateOptions(storages=types))
    candidate = next(c for c in found if c.storage == kind)
    path = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(lower(rewrite(made, (carried_out(candidate, group, weights, None),)), ())), path)
    if target == "ort-cpu":
        tensors = onnx.load(child.call("tests.kept:by_ort", str(path))).graph.initializer
        kept = sum(len(t.raw_data) or t.ByteSize() for t in tensors)
    else:
        kept = int(child.call("tests.kept:by_rtx", str(path), ("8.9",), "x", (3, 256))["weights"].split()[0])
    assert least <= kept / (4 * 256 * 256) <= most
