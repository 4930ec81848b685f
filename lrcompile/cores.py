"""Cores of a network as factors: how they are named and stored, what matrix they are, and the nodes that multiply by them.

A factor's name says its axes in the order in which they are stored, ``core1.r1_16.k1_8.n1_8``: k axes are x's, n axes y's, the
others bonds. So nothing but the arrays is needed to know the network again, and a reader of the graph sees what he looks at.
``folded0..`` instead of ``core0..``: the cores are multiplied out before x is, which a runtime does once when it loads the file;
``.of_K_N`` at the end of the first name: the axes hold more than K or N.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import opt_einsum

from lrcompile.contraction import Axes, Network, compiled
from lrcompile.interfaces import Array, Call, Factors, Op

_NAME = re.compile(r"(core|folded)(\d+)((?:\.[a-z]+\d*_\d+)*?)(?:\.of_(\d+)_(\d+))?")
_AXIS = re.compile(r"\.([a-z]+\d*)_(\d+)")
# From these versions on Slice takes its bounds, and Pad its widths, as inputs; from the last one on no rows at all are a shape.
_SLICE, _PAD, _ALLOW_ZERO = 10, 11, 14


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Name and stored shape of every core."""
    return {_name(network, i, axes): shape for i, (axes, shape) in enumerate(compiled(network).stored)}


def packed(network: Network, cores: Sequence[Array]) -> dict[str, Array]:
    """Cores in the network's own axes as the factors that are stored."""
    found = {}
    for i, (core, own, (axes, shape)) in enumerate(
        zip(cores, network.cores, compiled(network).stored, strict=True)
    ):
        found[_name(network, i, axes)] = core.transpose([own.index(a) for a in axes]).reshape(shape)
    return found


def network_of(names: Iterable[str]) -> Network:
    """The network whose factors bear these names; other names are passed over. Its cores have their axes as they are stored."""
    read = sorted((int(m[2]), m) for name in names if (m := _NAME.fullmatch(name)))
    axes = [[(a, int(n)) for a, n in _AXIS.findall(m[3])] for _, m in read]
    sizes = {a: n for core in axes for a, n in core}
    first = read[0][1]

    def sides(letter: str) -> Axes:
        return tuple(sorted((a for a in sizes if a[0] == letter), key=lambda a: int(a[1:])))

    return Network(
        sides("k"), sides("n"), tuple(tuple(a for a, _ in core) for core in axes), sizes, first[1] == "folded",
        (int(first[4]), int(first[5])) if first[4] else None,
    )  # fmt: skip


def dense(factors: Factors) -> Array:
    """W (K, N), float64."""
    network = network_of(factors)
    arrays = {int(m[2]): a for name, a in factors.items() if (m := _NAME.fullmatch(name))}
    canonical = [
        arrays[i].astype(np.float64).reshape(network.shape(axes)) for i, axes in enumerate(network.cores)
    ]
    return product(network, canonical)


def product(network: Network, cores: Sequence[Array]) -> Array:
    """W (K, N) of cores in the network's own axes."""
    return multiplier(network)(cores)


def multiplier(network: Network) -> Callable[[Sequence[Array]], Array]:
    """`product` of many sets of cores: the order is looked for once."""
    whole = (*network.inputs, *network.outputs)
    expression = einsum(network, network.cores, whole)
    K, N = network.cropped or (network.size(network.inputs), network.size(network.outputs))

    def multiplied(cores: Sequence[Array]) -> Array:
        made: Array = expression(*cores).reshape(network.size(network.inputs), network.size(network.outputs))
        return made[:K, :N]

    return multiplied


def einsum(network: Network, terms: Sequence[Axes], result: Axes) -> Callable[..., Array]:
    """Arrays of these axes multiplied to one of `result`: opt_einsum's order, each step a batched product.

    NumPy's own einsum leaves BLAS where two arrays share an axis that stays, as blocks do.
    """
    symbols = {a: opt_einsum.get_symbol(i) for i, a in enumerate(network.sizes)}
    words = ["".join(symbols[a] for a in axes) for axes in (*terms, result)]
    info = opt_einsum.contract_path(
        f"{','.join(words[:-1])}->{words[-1]}", *map(network.shape, terms), shapes=True
    )[1]
    steps = [(tuple(sorted(step[0], reverse=True)), step[2]) for step in info.contraction_list]

    def multiplied(*arrays: Array) -> Array:
        held = list(arrays)
        for places, words in steps:
            taken = [held.pop(i) for i in places]
            held.append(_pair(words, *taken) if len(taken) == 2 else np.einsum(words, *taken))
        return held[0]

    return multiplied


def _pair(words: str, a: Array, b: Array) -> Array:
    left, right, result = words.replace("->", ",").split(",")
    sizes = dict(zip(left + right, a.shape + b.shape, strict=True))
    shared = [c for c in left if c in right]
    batch, summed = [c for c in shared if c in result], [c for c in shared if c not in result]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]

    def arranged(array: Array, axes: str, *groups: list[str]) -> Array:
        order = [axes.index(c) for group in groups for c in group]
        return array.transpose(order).reshape([math.prod(sizes[c] for c in group) for group in groups])

    made = arranged(a, left, batch, rows, summed) @ arranged(b, right, batch, summed, columns)
    axes = [*batch, *rows, *columns]
    whole: Array = made.reshape([sizes[c] for c in axes]).transpose([axes.index(c) for c in result])
    return whole


def emit(op: Op, call: Call) -> ir.Value:
    """x W (.., N) for x (.., K) of any rank: MatMul, Reshape and Transpose, and Shape for the leading axes of the result."""
    network = network_of(call.shapes)
    names = {int(m[2]): n for n in call.shapes if (m := _NAME.fullmatch(n))}
    if network.folded:
        return op("MatMul", call.x, _matrix(op, call, network, names), name="product")
    K, N = network.cropped or (network.size(network.inputs), network.size(network.outputs))
    x = call.x
    if network.size(network.inputs) > K:
        x = op("Reshape", x, _integers(op, (-1, K)), name="flat")
        x = _padded(op, x, network.size(network.inputs) - K, call)
    y = _steps(op, x, network, names, call, last=network.size(network.outputs) == N)
    if network.size(network.outputs) > N:
        y = _slice(op, y, 1, N, call.opset, "cut")
    leading = _slice(op, op("Shape", call.x, name="shape"), 0, -1, call.opset, "leading")
    shape = op("Concat", leading, _integers(op, (N,)), name="shape_of_y", axis=0)
    if call.opset < _ALLOW_ZERO:
        return op("Reshape", y, shape, name="y")
    return op("Reshape", y, shape, name="y", allowzero=1)


def _matrix(op: Op, call: Call, network: Network, names: Mapping[int, str]) -> ir.Value:
    """W as a constant subgraph."""
    w = _steps(op, call.factors[names[0]], network, names, call, last=False)
    if network.cropped is not None:
        for axis, end in enumerate(network.cropped):
            w = _slice(op, w, axis, end, call.opset, f"cut_{axis}")
    return w


def _steps(
    op: Op, value: ir.Value, network: Network, names: Mapping[int, str], call: Call, *, last: bool
) -> ir.Value:
    """What the contraction says; last: a Reshape follows, so that its own last one is not needed."""
    steps = compiled(network).steps
    if last and steps[-1].op == "Reshape":
        steps = steps[:-1]
    for step in steps:
        if step.op == "MatMul":
            name = names[step.argument[0]]
            value = op("MatMul", value, call.factors[name], name=name.partition(".")[0])
        elif step.op == "Transpose":
            value = op("Transpose", value, perm=step.argument)
        else:
            value = op("Reshape", value, _integers(op, step.argument))
    return value


def _padded(op: Op, x: ir.Value, width: int, call: Call) -> ir.Value:
    if call.opset < _PAD:
        return op("Pad", x, name="pad", pads=(0, 0, 0, width))
    return op("Pad", x, _integers(op, (0, 0, 0, width)), name="pad")


def _slice(op: Op, value: ir.Value, axis: int, end: int, opset: int, name: str) -> ir.Value:
    if opset < _SLICE:
        return op("Slice", value, name=name, axes=(axis,), starts=(0,), ends=(end,))
    bounds = (_integers(op, (0,)), _integers(op, (end,)), _integers(op, (axis,)))
    return op("Slice", value, *bounds, name=name)


def _integers(op: Op, values: tuple[int, ...]) -> ir.Value:
    return op.constant(np.array(values, np.int64))


def _name(network: Network, index: int, axes: Axes) -> str:
    kind = "folded" if network.folded else "core"
    cropped = "" if index or network.cropped is None else ".of_{}_{}".format(*network.cropped)
    return f"{kind}{index}" + "".join(f".{a}_{network.sizes[a]}" for a in axes) + cropped
