"""How an operator's data meets its constant weight: every operator brought to ``y = x W`` or ``rows = W[ids]``.

| operator | x from data | W from weight | output from y |
|---|---|---|---|
| MatMul, weight right (K, N)        | as it is               | as it is           | as it is |
| MatMul, weight right (1, K, N)     | as it is, rank >= 3    | without its 1      | as it is |
| MatMul, weight left (M, K)         | last two axes swapped  | transposed         | last two axes swapped |
| MatMul, weight left (1, M, K)      | the same, rank >= 3    | the same           | the same |
| Gemm, weight B                     | A, transposed if transA| B^T if transB      | times alpha, plus beta C |
| Gemm, weight A                     | B^T unless transB      | A^T unless transA  | transposed, times alpha, plus beta C |
| Gather, axis 0                     | ids                    | as it is           | as it is |
| Gather, axis 1                     | ids                    | transposed         | last axis moved to the front |
| Einsum, one constant               | contracted labels last | contracted, free   | labels put in the output's order |
| Conv                               | as it is: a factorization makes Conv of it again, and sees W (channels x kernel, outputs) |

`wire` answers with a sentence where this cannot be done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from lrcompile.graph import tensor_of
from lrcompile.records import Kind, Layout, Step, Window, Wiring

Wired = tuple[Kind, Wiring, Layout]


def wire(node: ir.Node, operand: int, layout: Layout, ranks: dict[ir.Value, int]) -> Wired | str:
    """The wiring of a node whose input `operand` is a weight read as `layout`, or why there is none."""
    make = {"MatMul": _matmul, "Gemm": _gemm, "Gather": _gather, "Einsum": _einsum, "Conv": _conv}.get(
        node.op_type
    )
    if make is None or node.domain != "":
        return f"{node.op_type} is found but not factorized"
    return make(node, operand, layout, ranks)


def _matmul(node: ir.Node, operand: int, layout: Layout, ranks: dict[ir.Value, int]) -> Wired | str:
    other = node.inputs[1 - operand]
    if other is None or tensor_of(other) is not None:
        return "both operands are constant"
    shape = layout.shape
    if len(shape) == 1:
        return "the weight is a vector"
    rank = ranks.get(other)
    if len(shape) > 2:
        if math.prod(shape[:-2]) != 1:
            return f"the weight is a stack of {math.prod(shape[:-2])} matrices"
        if rank is None or rank < len(shape):
            return "the weight has more axes than the data"
        layout = layout.reshape(shape[-2:])
    if operand == 1:
        return "linear", Wiring(data=0), layout
    if rank is None:
        return "the weight is the left operand and the data's rank is unknown"
    swap = _swap(rank)
    return "linear", Wiring(data=1, before=swap, after=swap), layout.transpose((1, 0))


def _swap(rank: int) -> tuple[Step, ...]:
    """Exchange the last two axes; nothing to do for a vector."""
    if rank < 2:
        return ()
    return (("transpose", (*range(rank - 2), rank - 1, rank - 2)),)


def _gemm(node: ir.Node, operand: int, layout: Layout, ranks: dict[ir.Value, int]) -> Wired | str:
    other = node.inputs[1 - operand]
    if other is None or tensor_of(other) is not None:
        return "both operands are constant"
    if len(layout.shape) != 2:
        return "the weight is not a matrix"
    alpha, beta = _float(node, "alpha"), _float(node, "beta")
    trans = bool(_int(node, "transA")), bool(_int(node, "transB"))
    addend = 2 if len(node.inputs) > 2 and node.inputs[2] is not None and beta != 0.0 else None
    swap: tuple[Step, ...] = (("transpose", (1, 0)),)
    none: tuple[Step, ...] = ()
    if operand == 1:
        before, after, flip = (swap if trans[0] else none), none, trans[1]
    else:
        before, after, flip = (none if trans[1] else swap), swap, not trans[0]
    matrix = layout.transpose((1, 0)) if flip else layout
    return "linear", Wiring(1 - operand, before, after, alpha, addend, beta), matrix


def _gather(node: ir.Node, operand: int, layout: Layout, ranks: dict[ir.Value, int]) -> Wired | str:
    ids = node.inputs[1]
    if ids is None or tensor_of(ids) is not None:
        return "the ids are constant"
    if len(layout.shape) != 2:
        return "the table is not a matrix"
    if _int(node, "axis") % 2 == 0:
        return "lookup", Wiring(data=1), layout
    rank = ranks.get(ids)
    if rank is None:
        return "the table is read along axis 1 and the rank of the ids is unknown"
    front: tuple[Step, ...] = (("transpose", (rank, *range(rank))),) if rank else ()
    return "lookup", Wiring(data=1, after=front), layout.transpose((1, 0))


def _einsum(node: ir.Node, operand: int, layout: Layout, ranks: dict[ir.Value, int]) -> Wired | str:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, _, out = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return "the equation has not two operands"
    other = node.inputs[1 - operand]
    if other is None or tensor_of(other) is not None:
        return "both operands are constant"
    if "." in equation:
        return "the equation has an ellipsis"
    if "->" not in equation:  # numpy's rule: labels that occur once, in alphabetical order
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    w, x = terms[operand], terms[1 - operand]
    if any(len(set(t)) != len(t) for t in (w, x, out)):
        return "the equation repeats a label within an operand"
    if len(w) != len(layout.shape):
        return "the weight has not the axes of its label"
    contracted = [c for c in w if c in x and c not in out]
    free = [c for c in w if c not in x and c in out]
    if any(c in x and c in out for c in w):
        return "the weight shares a batch axis with the data"
    if len(contracted) + len(free) != len(w) or not contracted or not free:
        return "the equation sums the weight alone, or contracts nothing"
    rows = [c for c in x if c not in contracted]
    if any(c not in out for c in rows):
        return "the equation sums the data alone"
    size = dict(zip(w, layout.shape, strict=True))
    matrix = layout.transpose(tuple(w.index(c) for c in contracted + free))
    matrix = matrix.reshape((math.prod(size[c] for c in contracted), math.prod(size[c] for c in free)))
    kept = (0,) * len(rows)
    before = _permute(x, rows + contracted) + _merge(kept, [size[c] for c in contracted], matrix.shape[0])
    split: tuple[Step, ...] = (("reshape", (*kept, *(size[c] for c in free))),) if len(free) > 1 else ()
    return "linear", Wiring(1 - operand, before, split + _permute(rows + free, out)), matrix


def _conv(node: ir.Node, operand: int, layout: Layout, ranks: dict[ir.Value, int]) -> Wired | str:
    data = node.inputs[0]
    if data is None or tensor_of(data) is not None:
        return "both operands are constant"
    shape = layout.shape
    if len(shape) < 3:
        return "the kernel has no axis of a picture"
    matrix = layout.reshape((shape[0], math.prod(shape[1:]))).transpose((1, 0))
    addend = 2 if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return "conv", Wiring(data=0, addend=addend), matrix


def window_of(node: ir.Node, shape: tuple[int, ...]) -> Window:
    """The window of a Conv whose kernel has this shape, (channels out, channels a group, *kernel)."""
    kernel = shape[2:]
    ones, none = (1,) * len(kernel), (0,) * 2 * len(kernel)
    auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"

    def given(name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(node.attributes[name].as_ints()) if name in node.attributes else otherwise

    return Window(
        kernel,
        given("strides", ones),
        given("dilations", ones),
        given("pads", none) if auto == "NOTSET" else none,
        auto if auto.startswith("SAME") else "",
        max(_int(node, "group"), 1),
    )


def _permute(have: Sequence[str], want: Sequence[str]) -> tuple[Step, ...]:
    perm = tuple(list(have).index(c) for c in want)
    return (("transpose", perm),) if perm != tuple(range(len(perm))) else ()


def _merge(kept: tuple[int, ...], sizes: list[int], total: int) -> tuple[Step, ...]:
    return (("reshape", (*kept, total)),) if len(sizes) > 1 else ()


def _float(node: ir.Node, name: str) -> float:
    return float(node.attributes[name].as_float()) if name in node.attributes else 1.0


def _int(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0
