"""Sites inside If, Loop and Scan bodies and inside local functions. To add one: a function, and a line in BODIES."""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from .builder import ALL, Builder, Feature, Tensor, Weight
from .weights import weight

DOMAIN = "odd.functions"
BOOL = TensorProto.BOOL


def _flag(b: Builder) -> Tensor:
    return b.input((), BOOL, lambda rng, shape: np.asarray(rng.random() < 0.5))


def _maybe_constant(b: Builder) -> str:
    """A condition: an input, or (an If that a compiler could fold) a constant."""
    if b.choices.chance(25):
        b.tag("if_constant")
        return b.constant(np.asarray(b.choices.pick([True, False])), "cond")
    return _flag(b).name


def if_both(b: Builder, outer: bool) -> None:
    """A MatMul in each branch; the weight is the same one of the outer graph, or each branch's own."""
    x, N = b.stream(2), b.size()
    cond = _maybe_constant(b)
    certain = "if_constant" not in b.tags  # the dead branch may be gone
    shared = weight(b, (x.shape[-1], N)) if outer else None
    bodies = {}
    for branch in ("then", "else"):
        with b.body(f"If.{branch}") as scope:
            w = shared or weight(b, (x.shape[-1], N))
            y = b.use("MatMul", [x.name, w.value], w, certain=certain)
            y = b.emit("Neg", [y]) if branch == "else" else y
            bodies[f"{branch}_branch"] = b.graph(scope, [], [(y, b.dtype)])
    b.leave(b.emit("If", [cond], **bodies), (x.shape[0], N))


def if_constant_branch(b: Builder) -> None:
    """One branch computes nothing: it gives a constant back."""
    b.freeze()
    x, N = b.stream(2), b.size()
    shape, cond = (x.shape[0], N), _flag(b).name
    w = weight(b, (x.shape[-1], N))
    with b.body("If.then") as scope:
        then = b.graph(scope, [], [(b.use("MatMul", [x.name, w.value], w), b.dtype)])
    with b.body("If.else") as scope:
        other = b.graph(scope, [], [(b.constant(b.normal(shape), "const", node=True), b.dtype)])
    b.leave(b.emit("If", [cond], then_branch=then, else_branch=other), shape)


def loop(b: Builder, outer: bool, nested: bool = False) -> None:
    """h = h W, two or three times; nested: only where an If inside says so."""
    x = b.stream(2)
    K = x.shape[-1]
    certain = True
    shared = weight(b, (K, K)) if outer else None
    trips, cond = (
        b.constant(np.asarray(b.size(2, 3), np.int64), "trips"),
        b.constant(np.asarray(True), "cond"),
    )
    flag = _flag(b).name if nested else ""
    with b.body("Loop") as scope:
        i, go, h = (b.name(k) for k in ("iteration", "go", "state"))
        w = shared or (weight(b, (K, K)) if not nested else None)
        if nested:
            branches = {}
            for branch in ("then", "else"):
                with b.body(f"If.{branch}") as inner:
                    own = w or weight(b, (K, K))
                    y = b.use("MatMul", [h, own.value], own, certain=certain)
                    branches[f"{branch}_branch"] = b.graph(inner, [], [(y, b.dtype)])
            y = b.emit("If", [flag], **branches)
        else:
            assert w is not None
            y = b.use("MatMul", [h, w.value], w)
        y, go_on = b.emit("Tanh", [y]), b.emit("Identity", [go])
        state = helper.make_tensor_value_info(h, b.dtype, None)
        infos = [helper.make_tensor_value_info(n, t, []) for n, t in ((i, TensorProto.INT64), (go, BOOL))]
        body = b.graph(scope, [*infos, state], [(go_on, BOOL), (y, b.dtype)])
    b.leave(b.emit("Loop", [trips, cond, x.name], body=body), x.shape)


def scan(b: Builder, outer: bool) -> None:
    """y_t = x_t W over axis 0; the state is the sum."""
    b.freeze()
    x, N = b.stream(2), b.size()
    shared = weight(b, (x.shape[-1], N)) if outer else None
    start = b.constant(b.normal((N,)), "start")
    with b.body("Scan") as scope:
        h, step = b.name("state"), b.name("step")
        w = shared or weight(b, (x.shape[-1], N))
        y = b.use("MatMul", [step, w.value], w)
        total = b.emit("Add", [h, y])
        info = [helper.make_tensor_value_info(n, b.dtype, s) for n, s in ((h, [N]), (step, [x.shape[-1]]))]
        body = b.graph(scope, info, [(total, b.dtype), (b.emit("Tanh", [y]), b.dtype)])
    total, rows = b.name("total"), b.name("rows")
    node = helper.make_node(
        "Scan", [start, x.name], [total, rows], name=b.name("Scan"), body=body, num_scan_inputs=1
    )
    b.scope.nodes.append(node)
    b.output(Tensor(total, (N,)))
    b.leave(rows, (x.shape[0], N))


# local functions ---------------------------------------------------------------------------------------------------


def _function(
    b: Builder,
    name: str,
    inputs: list[str],
    outputs: list[str],
    nodes: list[NodeProto],
    attributes: tuple[str, ...] = (),
) -> None:
    imports = [helper.make_opsetid("", b.opset), helper.make_opsetid(DOMAIN, 1)]
    b.functions.append(helper.make_function(DOMAIN, name, inputs, outputs, nodes, imports, list(attributes)))


def function_constant(b: Builder, calls: int = 1, nested: bool = False) -> None:
    """The weight is a Constant in the function; nested: of a function that this one calls."""
    K = b.size()
    name = f"Dense{len(b.functions)}"
    with b.body(f"function {name}") as scope:
        x = b.name("x")
        w = weight(b, (K, K))
        y = b.emit("MatMul", [x, w.value])
        for _ in range(calls):
            b.expect("MatMul", w)
        _function(b, name, [x], [y], scope.nodes)
    if nested:
        outer = f"Outer{len(b.functions)}"
        with b.body(f"function {outer}") as scope:
            x = b.name("x")
            y = b.emit("Tanh", [b.emit(name, [x], domain=DOMAIN)])
            _function(b, outer, [x], [y], scope.nodes)
        name = outer
    for _ in range(calls):
        s = b.stream(2, K)
        b.leave(b.emit(name, [s.name], domain=DOMAIN), s.shape)


def function_argument(b: Builder, calls: int = 1) -> None:
    """The weight is passed in; with two calls, another one each time."""
    name = f"Apply{len(b.functions)}"
    with b.body(f"function {name}") as scope:
        x, argument = b.name("x"), b.name("weight")
        _function(b, name, [x, argument], [b.emit("MatMul", [x, argument])], scope.nodes)
    for _ in range(calls):
        s = b.stream(b.choices.pick([2, 3]))
        w = weight(b, (s.shape[-1], b.size()))
        b.expect("MatMul", w)
        b.leave(b.emit(name, [s.name, w.value], domain=DOMAIN), (*s.shape[:-1], w.shape[1]))


def _reference(name: str, to: str, kind: int) -> AttributeProto:
    return AttributeProto(name=name, type=kind, ref_attr_name=to)


def function_attribute(b: Builder) -> None:
    """alpha and transB of a Gemm come from the call."""
    name = f"Scaled{len(b.functions)}"
    with b.body(f"function {name}") as scope:
        x, argument, bias = b.name("x"), b.name("weight"), b.name("bias")
        y = b.emit("Gemm", [x, argument, bias])
        scope.nodes[-1].attribute.append(_reference("alpha", "scale", AttributeProto.FLOAT))
        scope.nodes[-1].attribute.append(_reference("transB", "turned", AttributeProto.INT))
        _function(b, name, [x, argument, bias], [y], scope.nodes, ("scale", "turned"))
    s, N, turned = b.stream(2), b.size(), b.choices.pick([0, 1])
    w = weight(b, (N, s.shape[-1]) if turned else (s.shape[-1], N))
    b.expect("Gemm", w)
    bias = b.constant(b.normal((N,)), "bias")
    b.leave(b.emit(name, [s.name, w.value, bias], domain=DOMAIN, scale=-0.5, turned=turned), (s.shape[0], N))


def function_tensor_attribute(b: Builder) -> None:
    """The weight itself is an attribute of the call: a Constant in the function refers to it."""
    name, s, N = f"Held{len(b.functions)}", b.stream(2), b.size()
    tensor = numpy_helper.from_array(b.normal((s.shape[-1], N)))
    with b.body(f"function {name}") as scope:
        x, value = b.name("x"), b.name("weight")
        constant = helper.make_node("Constant", [], [value])
        constant.attribute.append(_reference("value", "held", AttributeProto.TENSOR))
        scope.nodes.append(constant)
        shape = (s.shape[-1], N)
        y = b.use("MatMul", [x, value], Weight(value, shape, value, shape))
        _function(b, name, [x], [y], scope.nodes, ("held",))
    b.leave(b.emit(name, [s.name], domain=DOMAIN, held=tensor), (s.shape[0], N))


def unused_function(b: Builder) -> None:
    """Defined, never called: nothing there is a site."""
    name = f"Unused{len(b.functions)}"
    with b.body(f"function {name}") as scope:
        x = b.name("x")
        w = weight(b, (3, 3), plain=True)
        y = b.use("MatMul", [x, w.value], w, reason="unused", certain=False)
        _function(b, name, [x], [y], scope.nodes)
    s = b.stream(2)
    b.leave(b.emit("Tanh", [s.name]), s.shape)


BODIES: dict[str, Feature] = {
    "if_outer_weight": Feature(partial(if_both, outer=True)),
    "if_own_weight": Feature(partial(if_both, outer=False)),
    "if_constant_branch": Feature(if_constant_branch),
    "loop_outer_weight": Feature(partial(loop, outer=True)),
    "loop_own_weight": Feature(partial(loop, outer=False)),
    "loop_if_outer_weight": Feature(partial(loop, outer=True, nested=True)),
    "loop_if_own_weight": Feature(partial(loop, outer=False, nested=True)),
    "scan_outer_weight": Feature(partial(scan, outer=True), opset=9),
    "scan_own_weight": Feature(partial(scan, outer=False), opset=9),
    "function_constant": Feature(function_constant, opset=9, ir=8, dtypes=ALL),
    "function_called_twice": Feature(partial(function_constant, calls=2), opset=9, ir=8),
    "function_nested": Feature(partial(function_constant, calls=2, nested=True), opset=9, ir=8),
    "function_argument": Feature(function_argument, opset=9, ir=8),
    "function_argument_twice": Feature(partial(function_argument, calls=2), opset=9, ir=8),
    "function_attribute": Feature(function_attribute, opset=9, ir=8),
    "function_tensor_attribute": Feature(function_tensor_attribute, opset=9, ir=8),
    "function_unused": Feature(unused_function, opset=9, ir=8),
}
