"""The contraction compiler against numpy's einsum: networks drawn at random, any number of rows, in numpy and in both runtimes."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from lrcompile.contraction import Contraction, Network, compiled, flops
from lrcompile.cores import dense, emit, network_of, packed, product, shapes
from lrcompile.graph import Builder
from lrcompile.interfaces import Array, Call
from tests.graphs import model as graph_of
from tests.graphs import node, normal

FEW = settings(max_examples=25, deadline=None)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Up to four cores; every axis of x and y is in one or more of them, every bond in two or more."""
    count = draw(st.integers(1, 4))
    inputs = tuple(f"k{i}" for i in range(draw(st.integers(1, 3))))
    outputs = tuple(f"n{i}" for i in range(draw(st.integers(1, 3))))
    bonds = tuple(f"s{i}" for i in range(1, draw(st.integers(0, 3)) + 1)) if count > 1 else ()
    cores: list[list[str]] = [[] for _ in range(count)]
    for axis in (*inputs, *outputs, *bonds):
        least = 2 if axis in bonds else 1
        chosen = draw(st.sets(st.integers(0, count - 1), min_size=least, max_size=min(count, 2)))
        for i in chosen:
            cores[i].append(axis)
    sizes = {a: draw(st.integers(1, 4)) for a in (*inputs, *outputs, *bonds)}
    return Network(inputs, outputs, tuple(map(tuple, cores)), sizes)


def cores_of(network: Network, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(network.shape(axes)) for axes in network.cores]


def brute(network: Network, cores: Sequence[Array]) -> Array:
    """W (K, N) by one einsum in numpy's own way: operands with lists of integers."""
    number = {a: i for i, a in enumerate(network.sizes)}
    pairs = [
        part
        for axes, core in zip(network.cores, cores, strict=True)
        for part in (core, [number[a] for a in axes])
    ]
    whole = np.einsum(*pairs, [number[a] for a in (*network.inputs, *network.outputs)])
    return whole.reshape(network.size(network.inputs), network.size(network.outputs))


def carried_out(made: Contraction, start: Array, stored: Sequence[Array]) -> Array:
    for step in made.steps:
        if step.op == "MatMul":
            start = start @ stored[step.argument[0]]
        elif step.op == "Reshape":
            start = start.reshape(step.argument)
        else:
            start = start.transpose(step.argument)
    return start


@given(network=networks(), seed=st.integers(0, 99), rows=st.sampled_from([0, 1, 5]))
@FEW
def test_steps_compute_the_einsum(network: Network, seed: int, rows: int) -> None:
    cores = cores_of(network, seed)
    W = brute(network, cores)
    np.testing.assert_allclose(product(network, cores), W, atol=1e-12 * (1 + np.abs(W).max()))
    x = np.random.default_rng(seed + 1).standard_normal((rows, W.shape[0]))
    stored = list(packed(network, cores).values())
    got = carried_out(compiled(network), x, stored)
    assert got.shape == (rows, W.shape[1])
    np.testing.assert_allclose(got, x @ W, atol=1e-12 * (1 + np.abs(x @ W).max(initial=0)))


@given(network=networks(), seed=st.integers(0, 99))
@FEW
def test_a_folded_network_is_the_matrix(network: Network, seed: int) -> None:
    folded = replace(network, folded=True)
    cores = cores_of(network, seed)
    W = brute(network, cores)
    stored = list(packed(folded, cores).values())
    got = carried_out(compiled(folded), stored[0], stored)
    np.testing.assert_allclose(got, W, atol=1e-12 * (1 + np.abs(W).max()))
    assert not any(-1 in s.argument for s in compiled(folded).steps if s.op == "Reshape")


@given(network=networks())
@FEW
def test_the_order_is_the_cheapest_that_never_multiplies_constants(network: Network) -> None:
    """By opt_einsum's count of every order in which x takes up the cores."""
    symbols = {a: opt_einsum.get_symbol(i) for i, a in enumerate(network.sizes)}
    terms = ["".join(symbols[a] for a in axes) for axes in (network.inputs, *network.cores)]
    equation = ",".join(terms) + "->" + "".join(symbols[a] for a in network.outputs)
    arrays = [network.shape(axes) for axes in (network.inputs, *network.cores)]
    sizes = {symbols[a]: n for a, n in network.sizes.items()}
    costs = []
    for order in itertools.permutations(range(len(network.cores))):
        path, remaining = [], ["x", *range(len(network.cores))]
        for core in order:  # x, and later what came out, which opt_einsum puts last
            pair = tuple(sorted((remaining.index("x"), remaining.index(core))))
            path.append(pair)
            remaining = [r for r in remaining if r not in ("x", core)] + ["x"]
        info = opt_einsum.contract_path(equation, *arrays, shapes=True, optimize=path)[1]
        assert info.size_dict == sizes
        # a step that sums nothing is counted once by opt_einsum and twice by us: MatMul adds to zero
        costs.append(
            sum(2 * np.prod([sizes[i] for i in set(step[2]) - set(",->")]) for step in info.contraction_list)
        )
    assert compiled(network).flops == flops(network) == min(costs)


@given(network=networks())
@FEW
def test_no_step_is_idle(network: Network) -> None:
    steps = compiled(network).steps
    for a, b in itertools.pairwise(steps):
        assert not (a.op == b.op != "MatMul")
    for step in steps:
        assert step.op != "Transpose" or step.argument != tuple(range(len(step.argument)))
        assert step.op != "Reshape" or step.argument.count(-1) == 1
    assert sum(s.op == "MatMul" for s in steps) == len(network.cores)
    assert sum(s.op == "Transpose" for s in steps) <= len(network.cores) + 1


@given(network=networks(), folded=st.booleans(), cropped=st.sampled_from([None, (3, 2)]))
@FEW
def test_names_say_all(network: Network, folded: bool, cropped: tuple[int, int] | None) -> None:
    network = replace(network, folded=folded, cropped=cropped)
    found = shapes(network)
    again = network_of((*found, "bias.0"))
    assert shapes(again) == found
    assert (again.folded, again.cropped, again.parameters) == (folded, cropped, network.parameters)
    assert {n: a.shape for n, a in packed(network, cores_of(network, 0)).items()} == found


BTT = Network(
    ("k0", "k1"), ("n0", "n1"), (("k0", "k1", "n1", "s"), ("n1", "k0", "s", "n0")),
    {"k0": 4, "k1": 6, "n0": 5, "n1": 3, "s": 2},
)  # fmt: skip


def test_a_block_tensor_train_takes_three_transposes_and_two_batched_products() -> None:
    made = compiled(BTT)
    assert [s.op for s in made.steps] == [
        "Reshape", "Transpose", "MatMul", "Reshape", "Transpose", "Reshape", "MatMul", "Transpose", "Reshape",
    ]  # fmt: skip
    assert made.flops == 2 * BTT.parameters == 2 * 2 * (24 * 3 + 15 * 4)
    assert [shape for _, shape in made.stored] == [(4, 6, 6), (3, 8, 5)]
    assert made.path == (0, 1)


def test_a_pair_needs_no_transpose() -> None:
    pair = Network(("k0",), ("n0",), (("s", "n0"), ("k0", "s")), {"k0": 7, "n0": 5, "s": 2})
    made = compiled(pair)
    assert [s.op for s in made.steps] == ["Reshape", "MatMul", "MatMul"]
    assert made.path == (1, 0)
    assert made.flops == 2 * 2 * (7 + 5)


def model_of(
    network: Network, cores: Sequence[Array], opset: int, dtype: ir.DataType, x_rank: int
) -> ir.Model:
    arrays = packed(network, [c.astype(dtype.numpy()) for c in cores])
    values = {n: ir.val(n, const_value=ir.tensor(a, name=n)) for n, a in arrays.items()}
    K = dense(arrays).shape[0]
    x = ir.val("x", dtype, ir.Shape([*(f"d{i}" for i in range(x_rank - 1)), K]))
    op = Builder("site")
    y = emit(op, Call("linear", False, x, values, {n: a.shape for n, a in arrays.items()}, opset))
    y.name, y.dtype = "y", dtype
    graph = ir.Graph(
        [x], [y], nodes=op.nodes, initializers=list(values.values()), opset_imports={"": opset}, name="g"
    )
    return ir.Model(graph, ir_version=8)


def run(model: ir.Model, feeds: Mapping[str, Array]) -> tuple[Array, Array]:
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return ReferenceEvaluator(proto).run(None, dict(feeds))[0], session.run(None, dict(feeds))[0]


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 13, 18, 21])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("cropped", [None, (22, 13)])
def test_nodes_compute_it_for_any_rank_and_opset(
    opset: int, folded: bool, cropped: tuple[int, int] | None
) -> None:
    network = replace(BTT, folded=folded, cropped=cropped)
    cores = cores_of(network, 1)
    W = product(network, cores)
    for leading in ((), (3,), (2, 3), (2, 1, 3)):
        x = normal(*leading, W.shape[0], seed=2)
        model = model_of(network, cores, opset, ir.DataType.FLOAT, len(leading) + 1)
        assert not any(n.op_type == "Einsum" for n in model.graph)
        for got in run(model, {"x": x}):
            assert got.shape == (*leading, W.shape[1])
            # float32: about 50 sums of terms of size one
            np.testing.assert_allclose(got, x @ W, atol=2e-5 * (1 + np.abs(x @ W).max(initial=0)))


def test_no_rows_at_all() -> None:
    """Without its optimizations: ONNX Runtime 1.31 divides by zero where it has fused a Transpose into a MatMul of no rows."""
    model = ir.to_proto(model_of(BTT, cores_of(BTT, 1), 18, ir.DataType.FLOAT, 3))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    feeds = {"x": np.zeros((2, 0, 24), np.float32)}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    assert session.run(None, feeds)[0].shape == (2, 0, 15)
    assert ReferenceEvaluator(model).run(None, feeds)[0].shape == (2, 0, 15)


_FUSED = """
import numpy as np, onnxruntime, sys
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {"x": np.zeros((int(sys.argv[2]), 24), np.float32)})[0].shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="which signal it is, is Linux's")
@pytest.mark.parametrize("rows", [0, 1])
def test_onnx_runtime_still_divides_by_no_rows(tmp_path: Path, rows: int) -> None:
    """The smallest graph that dies. Where this fails with no rows it was mended: then docs/families.md need not warn."""
    made = [
        node("Reshape", ["x", "s"], ["a"], allowzero=0),
        node("Transpose", ["a"], ["b"], perm=[1, 0, 2]),
        node("MatMul", ["b", "w"], ["y"]),
    ]
    constants = {"s": np.array([-1, 2, 12]), "w": normal(2, 12, 3)}
    path = tmp_path / "model.onnx"
    ir.save(graph_of(made, {"x": ("n", 24)}, ["y"], constants), path)
    run = subprocess.run(
        [sys.executable, "-c", _FUSED, str(path), str(rows)], capture_output=True, text=True, check=False
    )
    if rows:
        assert run.returncode == 0 and "(2, 1, 3)" in run.stdout, run.stderr
    else:
        assert run.returncode == -signal.SIGFPE, (run.stdout, run.stderr)


def test_float16() -> None:
    cores = [0.3 * c for c in cores_of(BTT, 1)]
    W = product(BTT, cores)
    x = normal(4, W.shape[0]).astype(np.float16)
    for got in run(model_of(BTT, cores, 18, ir.DataType.FLOAT16, 2), {"x": x}):
        assert got.dtype == np.float16
        # eleven digits of the cores and of what stands between the two products
        np.testing.assert_allclose(got.astype(float), x @ W, atol=4e-3 * np.abs(x @ W).max())


def test_a_corrupted_core_shows() -> None:
    cores = cores_of(BTT, 1)
    W = product(BTT, cores)
    cores[0][0] *= 1.01
    got, _ = run(model_of(BTT, cores, 18, ir.DataType.FLOAT, 2), {"x": normal(4, W.shape[0])})
    assert np.abs(got - normal(4, W.shape[0]) @ W).max() > 1e-3
