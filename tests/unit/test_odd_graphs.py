"""The generated models are legal, run, are spread over all features, and are the same each time."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.odd_graphs import FEATURES, OddGraph, corpus, odd_graphs

SAMPLES = 400

# Checks and runs models until its input ends; a crash ends it, and its parent knows which model that was.
CHILD = """
import pickle, sys
import onnx, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, 1
answers, sys.stdout = sys.stdout.buffer, sys.stderr
while True:
    try:
        model, check, feeds, optimized = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        if check:
            onnx.checker.check_model(model, full_check=True)
        level = "ORT_ENABLE_ALL" if optimized else "ORT_DISABLE_ALL"
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        outputs = []
        if feeds:
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            outputs = [session.run(None, feed) for feed in feeds]
        answer = outputs
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    pickle.dump(answer, answers)
    answers.flush()
"""


class Child:
    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CHILD], stdin=-1, stdout=-1)

    def run(self, graph: OddGraph, optimized: bool = True) -> list[list[Any]]:
        feeds = graph.feeds if graph.runs_on_ort else []
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            message = graph.model.SerializeToString(), graph.passes_checker, feeds, optimized
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            pytest.fail(f"exit code {self.process.wait()} on {graph}")
        assert not isinstance(answer, str), f"{answer}\non {graph}"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


@pytest.fixture(scope="module")
def samples() -> list[OddGraph]:
    return corpus(0, SAMPLES)


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _bodies(attribute.g)


def test_every_sample_is_legal_and_runs(samples: list[OddGraph], child: Child) -> None:
    for graph in samples:
        outputs = child.run(graph)
        assert len(graph.feeds) == 2
        if not graph.runs_on_ort:
            outputs = [ReferenceEvaluator(graph.model).run(None, feed) for feed in graph.feeds]
        assert [len(o) for o in outputs] == [len(graph.model.graph.output)] * 2, graph


def test_every_feature_appears(samples: list[OddGraph]) -> None:
    counts = Counter(f for g in samples for f in g.features)
    assert {f: counts[f] for f in FEATURES if counts[f] < 2} == {}
    every = (
        {f"opset{o}" for o in range(7, 26)}
        | {f"ir{i}" for i in range(3, 14)}
        | {f"gemm_trans{t}" for t in "AB"}
    )
    every |= {"bias_rank0", "bias_rank1", "bias_rank2", "bias_left", "ids_negative", "ids_int32", "ids_int64"}
    every |= {"alpha_0", "beta_0", "batch_0", "output_between", "chain", "if_constant"}
    assert {f: counts[f] for f in every if counts[f] < 2} == {}
    taken = Counter(e.taken for g in samples for e in g.sites if e.certain)
    assert taken[True] > 300
    assert taken[False] > 100
    assert sum(not g.sites for g in samples) >= 3
    assert sum(g.runs_on_ort for g in samples) > 340


def test_expected_weights_are_in_the_model(samples: list[OddGraph]) -> None:
    for graph in samples:
        shapes: dict[str, tuple[int, ...]] = {}
        operators = Counter[str]()
        functions = graph.model.functions
        for body in [*_bodies(graph.model.graph), *functions]:
            operators.update(n.op_type for n in body.node)
            shapes |= {t.name: tuple(t.dims) for t in getattr(body, "initializer", [])}
            for node in body.node:
                if node.op_type == "Constant" and not node.attribute[0].ref_attr_name:
                    shapes[node.output[0]] = tuple(node.attribute[0].t.dims)
        for site in graph.sites:
            held = "function_tensor_attribute" in graph.features and site.where.startswith("function Held")
            assert held or shapes[site.weight] == site.shape, (site, graph)
            assert operators[site.op], (site, graph)


def test_equal_seeds_give_equal_models() -> None:
    def key(g: OddGraph) -> Any:
        feeds = [{k: (str(v.dtype), v.shape, v.tobytes()) for k, v in f.items()} for f in g.feeds]
        return g.model.SerializeToString(deterministic=True), feeds, g.sites, g.label

    one, two, other = corpus(3, 60), corpus(3, 60), corpus(4, 60)
    assert [key(g) for g in one] == [key(g) for g in two]
    assert sum(key(a) != key(b) for a, b in zip(one, other, strict=True)) > 50
    assert [key(g) for g in corpus(3, 20)] == [key(g) for g in one[:20]]


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(graph=odd_graphs())
def test_the_strategy_gives_legal_models(graph: OddGraph, child: Child) -> None:
    child.run(graph)


# an independent evaluation in NumPy --------------------------------------------------------------------------------


def _axes(a: dict[str, Any], i: list[Any]) -> tuple[int, ...]:
    return tuple(a["axes"] if "axes" in a else i[1])


def _gemm(i: list[Any], a: dict[str, Any]) -> Any:
    left, right = i[0].T if a.get("transA") else i[0], i[1].T if a.get("transB") else i[1]
    c = i[2] if len(i) > 2 and i[2] is not None else 0
    return a.get("alpha", 1.0) * (left @ right) + a.get("beta", 1.0) * c


def _dequantize(i: list[Any], a: dict[str, Any]) -> Any:
    shape = [1] * i[0].ndim
    if i[1].ndim == 1:
        shape[a.get("axis", 1)] = -1
    zero = i[2].reshape(shape) if len(i) > 2 else 0
    return (i[0].astype(np.float64) - zero) * i[1].reshape(shape)


NUMPY: dict[str, Any] = {
    "MatMul": lambda i, a: i[0] @ i[1],
    "Gemm": _gemm,
    "Add": lambda i, a: i[0] + i[1],
    "Mul": lambda i, a: i[0] * i[1],
    "Relu": lambda i, a: np.maximum(i[0], 0),
    "Abs": lambda i, a: np.abs(i[0]),
    "Identity": lambda i, a: i[0],
    "Gather": lambda i, a: np.take(i[0], i[1], axis=a.get("axis", 0), mode="wrap"),
    "Einsum": lambda i, a: np.einsum(a["equation"].decode().replace(" ", ""), *i),
    "Transpose": lambda i, a: np.transpose(i[0], a.get("perm")),
    "Reshape": lambda i, a: i[0].reshape(i[1]),
    "Flatten": lambda i, a: i[0].reshape(int(np.prod(i[0].shape[: a["axis"]])), i[0].shape[-1]),
    "Unsqueeze": lambda i, a: np.expand_dims(i[0], _axes(a, i)),
    "Squeeze": lambda i, a: np.squeeze(i[0], _axes(a, i)),
    "Cast": lambda i, a: i[0].astype(onnx.helper.tensor_dtype_to_np_dtype(a["to"])),
    "DequantizeLinear": _dequantize,
}


def _evaluate(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    values: dict[str, Any] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} | feed
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            values[node.output[0]] = numpy_helper.to_array(attributes["value"])
        else:
            inputs = [values[n] if n else None for n in node.input]
            values[node.output[0]] = NUMPY[node.op_type](inputs, attributes)
    return [values[o.name] for o in model.graph.output]


def test_numpy_agrees_with_onnxruntime(samples: list[OddGraph], child: Child) -> None:
    """Unoptimized: else onnxruntime turns DequantizeLinear + MatMul into MatMulNBits and rounds x to 8 bits (errors of 1e-3)."""
    judged = Counter[str]()
    for graph in samples:
        operators = {n.op_type for n in graph.model.graph.node} - {"Constant"}
        excluded = {
            "float16",
            "bfloat16",
            "nan",
            "inf",
            "outlier",
            "behind_dequantize_blocked",
            "duplicate_node_names",
        }
        if not operators <= NUMPY.keys() or excluded & set(graph.features):
            continue
        for feed, outputs in zip(graph.feeds, child.run(graph, optimized=False), strict=True):
            for ours, theirs in zip(_evaluate(graph.model, feed), outputs, strict=True):
                assert ours.shape == theirs.shape, graph
                scale = 1 + np.max(np.abs(theirs), initial=0)
                np.testing.assert_allclose(
                    ours, theirs, rtol=0, atol=1e-5 * float(scale), err_msg=repr(graph)
                )
        judged.update(operators)
    assert {op: judged[op] for op in NUMPY if judged[op] < 3} == {}
