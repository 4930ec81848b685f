"""Inputs rounded to 8 bits: what it costs is what is predicted, what is emitted is what is claimed, and hostile inputs stay harmless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompile.activations import (
    DYNAMIC,
    FLOAT8,
    KINDS,
    SMOOTH,
    STATIC,
    kinds_of,
    quantizer,
    smoothing,
    stand_in,
)
from lrcompile.child import Child
from lrcompile.errors import UsageError
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.graph import DOMAIN
from lrcompile.interfaces import Array, BuildOptions
from lrcompile.lower import lower
from lrcompile.oracle import reconstructed
from lrcompile.plan import group_by_name
from lrcompile.records import Decision, InputStatistics, Plan
from lrcompile.registry import factorization, runtime_of
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache, save_model
from lrcompile.weights import ModelWeights

_BITS = 255.0


def _model(W: Array, readers: int = 1) -> ir.Model:
    """x (rows, K) times the same numbers in so many weights, each with a bias."""
    tape = ir.tape.Tape()
    K, N = W.shape
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape(["rows", K]))
    constants, outputs = [], []
    for i in range(readers):
        w = ir.val(f"w{i}", const_value=ir.tensor(W.astype(np.float32), name=f"w{i}"))
        b = ir.val(f"b{i}", const_value=ir.tensor(np.full(N, 0.25, np.float32), name=f"b{i}"))
        constants += [w, b]
        y = tape.op("Add", [tape.op("MatMul", [x, w], name=f"mm{i}"), b], name=f"add{i}")
        y.name, y.dtype, y.shape = f"y{i}", ir.DataType.FLOAT, ir.Shape(["rows", N])
        outputs.append(y)
    graph = ir.Graph([x], outputs, nodes=tape.nodes, initializers=constants, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


class _Seen:
    """Statistics of rows, for every site."""

    def __init__(self, X: Array) -> None:
        X = X.astype(np.float64)
        self._known = InputStatistics(
            len(X), X.T @ X / len(X), X.mean(axis=0), low=np.minimum(X.min(axis=0), 0), high=np.maximum(X.max(axis=0), 0)
        )  # fmt: skip
        self._key = str(hash(X.tobytes()))

    def of(self, site: object) -> InputStatistics:
        return self._known

    def key(self, site: object) -> str:
        return self._key


def _sets(model: ir.Model, kind: str, X: Array | None, folder: Path) -> tuple[FactorSet, ...]:
    """Every weight with its input rounded to a kind."""
    finding = find(model)
    stored = "float8" if kind == FLOAT8 else "int8"
    decisions = tuple(
        Decision(
            g.name, tuple(s.name for s in g.sites), "dense", None, stored, None, False, g.elements, g.elements, 0, 0, 0, 0, "",
            activations=kind,
        )
        for g in finding.units
    )  # fmt: skip
    return factorize(
        Plan("reference", decisions), group_by_name(finding), ModelWeights(Cache(folder), 21), _Seen(X) if X is not None else None,
        {"dense": factorization("dense")}, 0,
    )  # fmt: skip


def _run(model: ir.Model, X: Array, level: int = 99) -> list[Array]:
    """In ONNX Runtime, by default with all its fusions."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel(level)
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"x": X.astype(np.float32)}))


def _allowed(sets: FactorSet, X: Array) -> Array:
    """(rows, N): the most that rounding the input to the step of this run may change a product: half a step a channel, and a little of float32."""
    factors = sets.load()
    W = factors["w"].astype(np.float64)
    smooth = factors[SMOOTH].astype(np.float64) if SMOOTH in factors else np.ones(len(W))
    x = X * smooth
    if sets.decision.activations == DYNAMIC:
        half = np.full_like(x, (max(x.max(initial=0), 0) - min(x.min(initial=0), 0)) / _BITS / 2)
        half = half * 2  # the zero point is rounded too, which moves the ends of the range by half a step
    elif sets.decision.activations == STATIC:
        step = float(factors["step"])
        half = np.maximum(step / 2, np.abs(x) - 127 * step)
    else:
        half = np.abs(x) * 2.0**-4 + float(factors["step"]) * 2.0**-9
    allowed: Array = (half / smooth) @ np.abs(W) * 1.001 + 1e-5 * np.abs(X @ W).max(initial=1.0)
    return allowed


def _check(W: Array, X: Array, kind: str, folder: Path, seen: Array | None) -> tuple[FactorSet, Array, Array]:
    """What is emitted against the reconstruction, within what rounding the input allows: the set, the difference and what is allowed."""
    model = _model(W)
    (sets,) = _sets(model, kind, seen, folder)
    emitted = lower(rewrite(model, [sets]), ())
    assert not any(n.domain == DOMAIN for n in emitted.graph)
    got, wanted = _run(emitted, X)[0], _run(reconstructed(model, [sets]), X)[0]
    return sets, np.abs(got - wanted), _allowed(sets, X)


def _outliers(rows: int, K: int, seed: int) -> Array:
    """Rows whose channels have ranges that differ a hundredfold."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, K)) * np.exp(1.5 * rng.standard_normal(K))


@pytest.mark.parametrize("kind", KINDS)
@given(K=st.integers(1, 70), N=st.integers(1, 40), rows=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_what_is_emitted_is_the_reconstruction_of_a_rounded_input(
    kind: str, K: int, N: int, rows: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    X = _outliers(rows + 40, K, seed)
    W = np.random.default_rng(seed).standard_normal((K, N)) / np.sqrt(K)
    _, moved, allowed = _check(W, X[:rows], kind, tmp_path_factory.mktemp("cache"), X)
    assert (moved <= allowed).all(), (moved - allowed).max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupted_scale_breaks_that_contract(kind: str, tmp_path: Path) -> None:
    X, W = _outliers(60, 48, 0), np.random.default_rng(0).standard_normal((48, 24))
    model = _model(W)
    (sets,) = _sets(model, kind, X, tmp_path)

    def wrong() -> dict[str, object]:
        return {
            n: replace(c, scales=c.scales * np.where(np.arange(24) == 5, 1.5, 1.0))
            for n, c in sets.codes().items()
        }

    broken = replace(sets, codes=wrong)
    got = _run(lower(rewrite(model, [broken]), ()), X)[0]
    moved = np.abs(got - _run(reconstructed(model, [sets]), X)[0])
    over = (moved > _allowed(sets, X)).any(axis=0)
    assert over[5] and over.sum() == 1


HOSTILE: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "zero columns": lambda W, X: (np.where(np.arange(W.shape[1]) % 2, W, 0.0), X),
    "zero weight": lambda W, X: (0.0 * W, X),
    "one huge outlier in the weight": lambda W, X: (W + 1e4 * (np.indices(W.shape).sum(axis=0) == 0), X),
    "one huge outlier in the input": lambda W, X: (W, X + 1e4 * (np.indices(X.shape).sum(axis=0) == 0)),
    "a dead channel": lambda W, X: (W, X * (np.arange(X.shape[1]) != 2)),
    "constant input": lambda W, X: (W, np.full_like(X, 3.0)),
    "zero input": lambda W, X: (W, 0.0 * X),
    "no rows": lambda W, X: (W, X[:0]),
    "one column": lambda W, X: (W[:, :1], X),
    "one channel": lambda W, X: (W[:1], X[:, :1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_cases(kind: str, case: str, tmp_path: Path) -> None:
    W, X = HOSTILE[case](np.random.default_rng(1).standard_normal((33, 17)), _outliers(50, 33, 1))
    sets, moved, allowed = _check(W, X, kind, tmp_path, X if len(X) else _outliers(50, W.shape[0], 1))
    assert (moved <= allowed).all()
    assert all(np.isfinite(a).all() for a in sets.load().values())


def test_7_bits_do_not_overflow_the_sums_of_pairs(tmp_path: Path) -> None:
    """x86 without VNNI adds two products in 16 bits and saturates: with weights at the ends of their range sums stay exact."""
    X, W = np.full((8, 64), 1.0), np.ones((64, 16))
    model = _model(W)
    (sets,) = _sets(model, DYNAMIC, X, tmp_path)
    codes = sets.codes()["w"].codes
    assert codes.min() >= -64 and codes.max() <= 63
    assert 2 * 255 * 64 < 1 << 15 <= 2 * 255 * 127  # and 8 bits would not do
    for kind in (DYNAMIC, STATIC):  # of static types 8 bits are used: s8 x s8 is no such product
        _, moved, allowed = _check(W, X, kind, tmp_path, X)
        assert moved.max() < 1e-4 < allowed.min()


def test_the_error_of_rounding_is_as_predicted(tmp_path: Path) -> None:
    X, W = _outliers(2000, 64, 3), np.random.default_rng(3).standard_normal((64, 48))
    model = _model(W)
    (sets,) = _sets(model, DYNAMIC, X, tmp_path)
    got = _run(lower(rewrite(model, [sets]), ()), X)[0]
    relative = np.linalg.norm(got - (X @ W + 0.25)) / np.linalg.norm(X @ W)
    assert relative == pytest.approx(sets.measured, rel=0.15)  # noise is uniform and independent, about


@pytest.mark.parametrize("kind", KINDS)
def test_a_stand_in_moves_outputs_as_rounding_does(kind: str) -> None:
    X, W = _outliers(4000, 64, 4), np.random.default_rng(4).standard_normal((64, 48))
    known = _Seen(X).of(None)
    noise = quantizer(kind, known, 64).noise
    wanted = noise @ np.square(W).sum(axis=1)
    moved = np.square(X @ stand_in(W, kind, known, 0)).sum(axis=1).mean()
    assert moved == pytest.approx(wanted, rel=0.5)  # few channels carry most of x here


def test_smoothing_pays_where_channels_differ_and_is_left_out_where_they_do_not() -> None:
    wide, even = (
        _Seen(_outliers(500, 64, 5)).of(None),
        _Seen(np.random.default_rng(5).uniform(-1, 1, (500, 64))).of(None),
    )
    smooth = smoothing(wide)
    assert np.exp(np.log(smooth).mean()) == pytest.approx(1.0)
    assert (
        quantizer(DYNAMIC, wide, 64).noise.sum()
        < 0.2 * np.square((wide.high.max() - wide.low.min()) / _BITS) / 12 * 64
    )  # type: ignore[union-attr]
    assert (smoothing(even) == 1.0).all()
    assert SMOOTH not in quantizer(DYNAMIC, even, 64).factors


def test_sites_that_read_one_value_share_its_quantizer_and_the_weights_stay_small(tmp_path: Path) -> None:
    X, W = _outliers(60, 64, 6), np.random.default_rng(6).standard_normal((64, 32))
    model = _model(W, readers=3)
    lowered = lower(rewrite(model, _sets(model, DYNAMIC, X, tmp_path)), ())
    kinds = [n.op_type for n in lowered.graph]
    assert kinds.count("DynamicQuantizeLinear") == 1 and kinds.count("MatMulInteger") == 3
    assert sum(n.op_type == "Mul" and "smoothed" in (n.name or "") for n in lowered.graph) == 1
    written = tmp_path / "optimized.onnx"
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(written), 3
    ort.InferenceSession(
        ir.to_proto(lowered).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ran = ir.load(written)
    assert sum(n.op_type == "MatMulIntegerToFloat" for n in ran.graph) == 3
    large = [
        v.dtype
        for v in ran.graph.initializers.values()
        if v.const_value is not None and v.const_value.size >= 64 * 32
    ]
    assert large == [ir.DataType.INT8] * 3


def test_a_lone_weight_is_one_node_in_onnx_runtime(tmp_path: Path) -> None:
    X, W = _outliers(60, 64, 7), np.random.default_rng(7).standard_normal((64, 32))
    model = _model(W)
    written = tmp_path / "optimized.onnx"
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(written), 3
    proto = ir.to_proto(lower(rewrite(model, _sets(model, DYNAMIC, X, tmp_path)), ()))
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [n.op_type for n in ir.load(written).graph] == ["Mul", "DynamicQuantizeMatMul"]


@pytest.mark.parametrize("bias", [True, False])
def test_float8_is_judged_on_the_cpu(bias: bool, tmp_path: Path) -> None:
    """ONNX Runtime's own fusion of it breaks without a bias; our engine goes on without the fusion."""
    X, W = _outliers(60, 32, 8), np.random.default_rng(8).standard_normal((32, 16))
    model = _model(W)
    sets = _sets(model, FLOAT8, X, tmp_path)
    made = lower(rewrite(model, sets), ())
    if not bias:
        add = made.graph[-1]
        product, y = add.inputs[0], made.graph.outputs[0]
        assert add.op_type == "Add" and product is not None
        product.name, product.type, product.shape = "product", y.type, y.shape
        made.graph.outputs[0] = product
        made.graph.remove(add)
    path = save_model(made, tmp_path)
    with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu")) as engine:
        (got,) = engine.run({"x": X.astype(np.float32)}).values()
    factors = sets[0].load()
    wanted = X @ factors["w"] + (factors["bias.0"] if bias else 0.0)
    assert (np.abs(got - wanted) <= _allowed(sets[0], X)).all()


@pytest.mark.parametrize("kind", [STATIC, FLOAT8])
def test_tensorrt_rtx_builds_it_and_keeps_it_small(kind: str, tmp_path: Path) -> None:
    """For two GPUs that are not here, in a child process."""
    pytest.importorskip("tensorrt_rtx")
    X, W = _outliers(60, 256, 9), np.random.default_rng(9).standard_normal((256, 128))
    model = _model(W, readers=2)
    path = save_model(lower(rewrite(model, _sets(model, kind, X, tmp_path)), ()), tmp_path)
    with Child(timeout=120) as child:
        said = child.call("tests.kept:by_rtx", str(path), ("8.9", "12.0"), "x", (0, 256))
    assert int(said["weights"].split()[0]) <= 2 * 4 * W.size / 2


def test_names() -> None:
    assert kinds_of(("auto",), "ort-cpu") == (DYNAMIC,)
    assert kinds_of(("int8", "auto"), "trt-rtx") == (STATIC,)
    assert kinds_of(("auto", "float8"), "trt") == (STATIC, FLOAT8)
    with pytest.raises(UsageError, match="--activations int4"):
        kinds_of(("int4",), "ort-cpu")
