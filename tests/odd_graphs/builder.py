"""The builder that every feature writes into: values, nodes, bodies, streams and feeds; and the source of choices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .records import Expected

T = TypeVar("T")
Array = np.ndarray[Any, Any]

F32, F16, F64, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16
NUMPY: dict[int, Any] = {F32: np.float32, F16: np.float16, F64: np.float64, BF16: ml_dtypes.bfloat16}


class Choices(Protocol):
    """Where decisions come from. The first option, the least integer and False are the simplest (hypothesis shrinks to them)."""

    def pick(self, options: Sequence[T]) -> T: ...
    def integer(self, low: int, high: int) -> int: ...
    def chance(self, percent: int) -> bool: ...


class Seeded:
    """Choices from a seed: for runs without hypothesis."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def chance(self, percent: int) -> bool:
        return self.random.randrange(100) < percent


@dataclass(frozen=True, slots=True)
class Tensor:
    """An activation; shape at the first feed, the last axis is what the next site contracts."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant as its reader sees it (value, shape) and as it is stored; reason: why nobody may touch it."""

    value: str
    shape: tuple[int, ...]
    stored: str
    stored_shape: tuple[int, ...]
    reason: str = ""


@dataclass(slots=True)
class Input:
    """A graph input; make: an array of a shape. free: axis 0 may have another length in each feed."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    make: Callable[[np.random.Generator, tuple[int, ...]], Array]
    free: bool


@dataclass(slots=True)
class Scope:
    """A graph being written: the main one, a body, or (constants only as nodes) a function."""

    path: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for the whole model. style: of names, see `STYLES`. storage: where weights lie, see `Builder.constant`."""

    opset: int = 17
    ir: int = 8
    dtype: int = F32
    style: str = "plain"
    storage: str = "initializer"
    seed: int = 0


STYLES: dict[str, Callable[[str, int], str]] = {
    "plain": lambda kind, i: f"{kind}_{i}",
    "slashes": lambda kind, i: f"/model/layers.{i}/{kind}/MatMul_output_0",
    "spaces": lambda kind, i: f" my {kind}  nr {i}\t",
    "html": lambda kind, i: f"<b>{kind} & \"{i}\"</b>&amp;<script>alert('{i}')</script>",
    "unicode": lambda kind, i: f"重み·{kind}·β\u0301\U0001f600{i}",
    "long": lambda kind, i: f"{kind}_{'x' * 700}_{i}",
    "numbers": lambda kind, i: str(i),
}


class Builder:
    """Writes one model. Features call `stream` for an input, `weight` (weights.py), `use` or `emit`, and `leave` the result."""

    def __init__(self, choices: Choices, setting: Setting) -> None:
        self.choices, self.setting = choices, setting
        self.opset, self.ir, self.dtype = setting.opset, setting.ir, setting.dtype
        self.rng = np.random.default_rng(setting.seed)
        self.scope = self.main = Scope("main")
        self.inputs: list[Input] = []
        self.defaults: list[str] = []  # overridable initializers
        self.outputs: list[tuple[str, int, tuple[int, ...]]] = []
        self.open: list[Tensor] = []  # results that nobody has read yet
        self.expected: list[Expected] = []
        self.functions: list[onnx.FunctionProto] = []
        self.needs_rank: set[int] = (
            set()
        )  # which of them a compiler can only take where it knows the rank of x
        self.tags: list[str] = []
        self.wanted: dict[str, str] = {}  # features that must come: "hidden", "values", "fate" -> entry
        self.reference = False  # onnx.reference is the only runtime: keep to what it knows
        self.frozen = False
        self._names = 0

    # names and constants -------------------------------------------------------------------------------------

    def tag(self, *names: str) -> None:
        self.tags += [n for n in names if n not in self.tags]

    def name(self, kind: str) -> str:
        self._names += 1
        return STYLES[self.setting.style](kind, self._names)

    def size(self, low: int = 2, high: int = 24) -> int:
        return self.choices.integer(low, high)

    def normal(self, shape: Sequence[int], dtype: int | None = None) -> Array:
        """Seeded normal values, scaled so that products keep their size."""
        scale = max([1, *shape[-2:]]) ** -0.5
        return (self.rng.standard_normal(tuple(shape)) * scale).astype(NUMPY[dtype or self.dtype])

    def constant(self, array: Array | onnx.TensorProto, kind: str = "const", node: bool | None = None) -> str:
        """A constant in the current scope: an initializer, or a Constant node (always where initializers are not legal)."""
        name = self.name(kind)
        tensor = array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(np.asarray(array))
        tensor.name = name
        in_function = self.scope.path.startswith("function")
        if node and self.opset < 9 and tensor.data_type not in NUMPY:
            node = False  # Constant takes integers from opset 9 on
        if node or in_function or (self.ir < 4 and self.scope is not self.main):
            tensor.name = ""
            self.scope.nodes.append(
                helper.make_node("Constant", [], [name], name=self.name("Constant"), value=tensor)
            )
        else:
            self.scope.initializers.append(tensor)
        return name

    # nodes ---------------------------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: Sequence[str], *, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """A node in the current scope; the name of its first output."""
        names = [self.name(op.lower()) for _ in range(outputs)]
        node = helper.make_node(op, list(inputs), names, name=self.name(op), domain=domain, **attributes)
        self.scope.nodes.append(node)
        return names[0]

    def use(
        self,
        op: str,
        inputs: Sequence[str],
        weight: Weight,
        *,
        reason: str = "",
        certain: bool = True,
        **kw: Any,
    ) -> str:
        """`emit`, and note that the weight is used here; reason: why this use is not taken."""
        self.expect(op, weight, reason=reason, certain=certain)
        return self.emit(op, inputs, **kw)

    def expect(self, op: str, weight: Weight, *, reason: str = "", certain: bool = True) -> None:
        reason = weight.reason or reason
        where = self.scope.path
        self.expected.append(
            Expected(op, weight.stored, weight.stored_shape, not reason, reason, certain, where)
        )

    def axes(self, op: str, value: str, axes: Sequence[int]) -> str:
        """Unsqueeze or Squeeze: axes are an attribute before opset 13, an input since."""
        if self.opset < 13:
            return self.emit(op, [value], axes=list(axes))
        return self.emit(op, [value, self.constant(np.array(axes, np.int64), "axes")])

    def cast(self, value: str, source: int, target: int) -> str:
        return value if source == target else self.emit("Cast", [value], to=target)

    # inputs, outputs and what flows between them -------------------------------------------------------------

    def freeze(self) -> None:
        """Axis 0 means more than a batch from here on: every feed has the same shapes."""
        self.frozen = True

    def input(
        self, shape: Sequence[int], dtype: int | None = None, make: Any = None, free: bool = True
    ) -> Tensor:
        dtype = dtype or self.dtype
        if make is None:
            target = NUMPY[dtype]
            make = lambda rng, shape: rng.standard_normal(shape).astype(target)  # noqa: E731
        name = self.name("input")
        self.inputs.append(Input(name, dtype, tuple(shape), make, free and len(shape) > 0))
        return Tensor(name, tuple(shape))

    def stream(self, rank: int, last: int | None = None) -> Tensor:
        """An activation of this rank: what an earlier feature left (in sequence) or a new graph input (parallel)."""
        if self.open and rank >= 2 and last is None and self.choices.chance(60):
            x = self.open.pop()
            if self.choices.chance(25):
                self.tag("output_between")
                self.output(x)
            if self.choices.chance(30):
                x = Tensor(self.emit("Relu", [x.name]), x.shape)
            return self.as_rank(x, rank)
        if rank == 1:
            self.freeze()
        batch = [self.size(1, 4) for _ in range(rank - 1)]
        return self.input([*batch, last or self.size()], free=rank > 1)

    def as_rank(self, x: Tensor, rank: int) -> Tensor:
        if len(x.shape) > rank:
            rows = int(np.prod(x.shape[:-1]))
            x = Tensor(self.emit("Flatten", [x.name], axis=len(x.shape) - 1), (rows, x.shape[-1]))
        while len(x.shape) < rank:
            at = 1 if len(x.shape) > 1 else 0
            x = Tensor(self.axes("Unsqueeze", x.name, [at]), (*x.shape[:at], 1, *x.shape[at:]))
        return x

    def leave(self, name: str, shape: Sequence[int]) -> Tensor:
        """Hand a result on: the next feature may read it, else it is an output."""
        self.open.append(Tensor(name, tuple(shape)))
        return self.open[-1]

    def output(self, x: Tensor, dtype: int | None = None) -> None:
        if x.name not in [name for name, _, _ in self.outputs]:
            self.outputs.append((x.name, dtype or self.dtype, x.shape))

    # bodies --------------------------------------------------------------------------------------------------

    @contextmanager
    def body(self, path: str) -> Iterator[Scope]:
        """Everything emitted inside goes to the body of an If, Loop or Scan, or (path "function NAME") of a function."""
        before = self.scope
        nested = before is not self.main and not path.startswith("function")
        self.scope = Scope(f"{before.path}/{path}" if nested else path)
        try:
            yield self.scope
        finally:
            self.scope = before

    def graph(
        self, scope: Scope, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[tuple[str, int]]
    ) -> onnx.GraphProto:
        """A scope as the attribute of a control flow node; outputs: name and element type, no shape."""
        infos = [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs]
        return helper.make_graph(scope.nodes, self.name("body"), list(inputs), infos, scope.initializers)


ALL, REAL = (F32, F16, F64, BF16), (F32, F16, F64)


@dataclass(frozen=True, slots=True)
class Feature:
    """Something odd to build; opset, ir: the least it needs; dtypes: of the whole model."""

    build: Callable[[Builder], None]
    opset: int = 7
    ir: int = 3
    dtypes: tuple[int, ...] = REAL
