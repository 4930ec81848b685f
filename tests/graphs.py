"""Small graphs in a few lines, and their values by onnx's reference evaluator: what the unit tests are built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int | str | None, ...]
node = helper.make_node

# From here on a result is wrong, and not only rounded: sums of at most a few hundred float32 products of size one.
FLOAT32 = 1e-5


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Seeded normal numbers."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def kind_of(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def proto(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape | tuple[Shape | None, Any]],
    outputs: Sequence[str] | Mapping[str, Any],
    constants: Mapping[str, Array | onnx.TensorProto] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 9,
    defaults: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model. inputs: a shape (float32), or shape and numpy type. outputs: names (float32), or name -> numpy type.

    constants: initializers. defaults: those that are inputs as well (below IR 4: all).
    """
    tensors = []
    for name, array in (constants or {}).items():
        tensor = array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(np.asarray(array))
        tensor.name = name
        tensors.append(tensor)
    infos = []
    for name, given in inputs.items():
        typed = len(given) == 2 and (given[0] is None or isinstance(given[0], tuple))
        shape, dtype = given if typed else (given, np.float32)
        infos.append(helper.make_tensor_value_info(name, kind_of(dtype), shape))
    listed = [t for t in tensors if ir_version < 4 or t.name in defaults]
    infos += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in listed]
    types = outputs if isinstance(outputs, Mapping) else dict.fromkeys(outputs, np.float32)
    results = [helper.make_tensor_value_info(n, kind_of(t), None) for n, t in types.items()]
    graph = helper.make_graph(list(nodes), "g", infos, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def model(*args: Any, **kwargs: Any) -> ir.Model:
    """The same as an `onnx_ir.Model`."""
    return ir.from_proto(proto(*args, **kwargs))


def run(made: ir.Model | onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name, in the reference evaluator."""
    made = ir.to_proto(made) if isinstance(made, ir.Model) else made
    names = [o.name for o in made.graph.output]
    return dict(zip(names, ReferenceEvaluator(made).run(None, dict(feeds)), strict=True))


class Forgetful:
    """A cache that keeps nothing: every test computes."""

    def has(self, key: tuple[str, ...]) -> bool:
        return False

    def remember(
        self, key: tuple[str, ...], compute: Callable[[], Mapping[str, Array]]
    ) -> Mapping[str, Array]:
        return compute()


def weights() -> Any:
    """Weights of one model know their sites by name: each test's model gets its own."""
    from lrcompile.weights import ModelWeights

    return ModelWeights(Forgetful(), 18)  # type: ignore[arg-type]


class OneProcess:
    """Stands for a `Child` in tests that need no second process: engines run here, and every call is written down."""

    def __init__(self, change: Callable[[Mapping[str, Array]], Mapping[str, Array]] = dict) -> None:
        self.calls: list[str] = []
        self.change = change

    def build(self, target: str, path: Any, options: Any) -> Any:
        from lrcompile.registry import runtime_of

        self.calls.append(f"build {path.name}")
        engine: Any = runtime_of(target).build(path, options)
        engine.close = lambda: None  # a remote one has it
        return engine

    def call(self, function: str, *args: object) -> object:
        import importlib

        module, _, name = function.partition(":")
        self.calls.append(function)
        return getattr(importlib.import_module(module), name)(*args)
