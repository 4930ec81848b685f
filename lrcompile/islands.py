"""Which nodes go on computing in float32 when the rest of a graph computes in 16 bits.

Fixed, whatever stands around them, are
1. operators that sum, raise, divide or decide: `EXACT`. A mean of squares or an exponential leaves half's range, a comparison of
   rounded numbers is another one, and what makes numbers from integers (Range, CumSum) counts beyond 2048 or 256.
2. what has no kernel or no form in 16 bits: the schema of its opset says so; sequences, and If, Loop and Scan themselves (not the
   nodes in their bodies).
3. what finishes a norm: a Mul or Div that reads a root or a power (1 / sqrt(1e-12) is no half), up to the first that also reads
   something else; the elementwise nodes between two islands; a square before a sum.
4. what leads to a Sin or Cos: the angles of a rotary embedding are positions times frequencies.
5. in float16, what leads from a constant beyond its range to a Softmax: a mask of -3.4e38 may be added to a score, -65504 may not.
6. DequantizeLinear and QuantizeLinear whose scales are too small for normal halves, and what adds or clips to a scalar that is
   (1e-9, so that nothing is divided by zero), with what divides by it as in 3.
A node that only moves numbers, or adds and multiplies them, is part of an island when all that it reads comes out of islands,
constants and graph inputs, and all who read it compute in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lrcompile.graph import nodes, opset_of, tensor_of
from lrcompile.value_types import formals

FLOAT = ir.DataType.FLOAT
SMALL = 1024  # elements; a larger constant is a weight, and is stored in 16 bits whoever reads it

EXACT = frozenset(
    # sums and means
    "ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd CumSum CumProd "
    # functions that leave the range, or have arguments that 11 or 8 bits cannot tell apart
    "Pow Exp Log Sqrt Reciprocal LogSoftmax Sin Cos Tan Sinh Cosh Asin Acos Atan Asinh Acosh Atanh Det "
    # norms whose operator does not itself sum in float32
    "InstanceNormalization LpNormalization LpPool GlobalLpPool MeanVarianceNormalization LRN "
    # numbers made from nothing; their type is an attribute
    "Range EyeLike RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial "
    "BlackmanWindow HannWindow HammingWindow MelWeightMatrix DFT STFT "
    # decisions, and coordinates
    "Equal Greater GreaterOrEqual Less LessOrEqual Floor Ceil Round Mod Sign TopK ArgMax ArgMin Hardmax Unique "
    "RoiAlign NonMaxSuppression GridSample AffineGrid NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss".split()
)
MOVES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten Identity Expand Tile Concat Slice Split Gather GatherElements GatherND "
    "Scatter ScatterElements ScatterND Pad Where Trilu Compress DepthToSpace SpaceToDepth ReverseSequence Cast "
    "ConstantOfShape".split()
)
ELEMENTWISE = frozenset("Add Sub Mul Div Neg Abs Max Min Sum".split())
# Operators that read their input in whatever type it is.
INDIFFERENT = frozenset("Shape Size IsNaN IsInf".split())
# Inputs that stay float32 although the schema would have them otherwise: counts, indices, coordinates, ratios.
KEPT: Mapping[str, frozenset[int]] = {
    "Resize": frozenset({1}),
    "OneHot": frozenset({0, 1}),
    "Dropout": frozenset({1}),
}
_ROOTS = frozenset({"Sqrt", "Reciprocal", "Pow", "Exp"})
_GUARDS = ELEMENTWISE | {"Clip"}
_SUMS = frozenset({"ReduceMean", "ReduceSum"})
_WAVES = frozenset({"Sin", "Cos"})

Types = Mapping[ir.Value, ir.DataType]


def finite_range(half: ir.DataType) -> tuple[float, float]:
    """The smallest normal and the largest finite number of a 16-bit type."""
    info = np.finfo(np.float16) if half == ir.DataType.FLOAT16 else ml_dtypes.finfo(ml_dtypes.bfloat16)
    return float(info.tiny), float(info.max)


def reads_float(node: ir.Node, types: Types) -> list[ir.Value]:
    """The node's float32 inputs."""
    return [v for v in node.inputs if v is not None and types.get(v) == FLOAT]


def makes_float(node: ir.Node, types: Types) -> list[ir.Value]:
    """The node's float32 outputs."""
    return [v for v in node.outputs if types.get(v) == FLOAT]


def is_indifferent(node: ir.Node, types: Types) -> bool:
    """Whether a reader takes its input in any float type: it asks for the shape, or casts to something else."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return node.op_type in INDIFFERENT or (node.op_type == "Cast" and not makes_float(node, types))


def allowed(node: ir.Node, half: ir.DataType, opset: int) -> tuple[frozenset[int], frozenset[int]]:
    """Indices of inputs and outputs that the operator's schema lets be of the 16-bit type."""
    schema = formals(node, opset)
    if schema is None:
        return frozenset(), frozenset()
    word = f"tensor({half.name.lower()})"
    kept = KEPT.get(node.op_type, frozenset())
    ins, outs = (frozenset(i for i, f in enumerate(side) if word in f.types) for side in schema)
    return ins - kept, outs


def is_movable(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in MOVES | ELEMENTWISE


def lowered_nodes(model: ir.Model, types: Types, half: ir.DataType) -> set[ir.Node]:
    """The nodes with float32 inputs or outputs that shall compute in the 16-bit type; all others are islands."""
    concerned = [
        n
        for _, n in nodes(model)
        if (reads_float(n, types) or makes_float(n, types))
        and n.op_type != "Constant"
        and not is_indifferent(n, types)
    ]
    fixed = _fixed(model, concerned, types, half)
    undecided = {n for n in concerned if n not in fixed and is_movable(n)}
    low = {n for n in concerned if n not in fixed and n not in undecided}
    while demoted := {n for n in undecided if _touches(n, low, types)}:
        low |= demoted
        undecided -= demoted
    return low


def _touches(node: ir.Node, low: Collection[ir.Node], types: Types) -> bool:
    """Whether what the node reads or makes is, or will be, in 16 bits."""
    for value in reads_float(node, types):
        tensor = tensor_of(value)
        if (value.producer() in low) if tensor is None else tensor.size > SMALL:
            return True
    return any(reader in low for value in makes_float(node, types) for reader in value.consumers())


def _fixed(model: ir.Model, concerned: list[ir.Node], types: Types, half: ir.DataType) -> set[ir.Node]:
    opset = opset_of(model)
    fixed = {n for n in concerned if n.op_type in EXACT or not _has_form(n, types, half, opset)}
    least, most = finite_range(half)
    fixed |= {n for n in concerned if n.op_type.endswith("uantizeLinear") and _is_tiny(n.inputs[1], least)}
    guards = {n for n in concerned if n.op_type in _GUARDS and any(_is_tiny(v, least, 1) for v in n.inputs)}
    if half == ir.DataType.FLOAT16:
        fixed |= _masks(concerned, types, most)
    for wave in [n for n in concerned if n.op_type in _WAVES]:
        fixed |= _closure(
            [wave],
            lambda n: [p for v in n.inputs if v is not None and (p := v.producer()) is not None],
            _leads,
        )
    fixed |= guards
    return fixed | _tails(concerned, fixed, guards, types)


def _has_form(node: ir.Node, types: Types, half: ir.DataType, opset: int) -> bool:
    """Whether the operator exists in the 16-bit type, where its type is that of its inputs."""
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return False
    if any(
        isinstance(v.type, (ir.SequenceType, ir.OptionalType)) for v in (*node.inputs, *node.outputs) if v
    ):
        return False
    if node.op_type == "LayerNormalization" and any(
        v.uses() or v.is_graph_output() for v in node.outputs[1:]
    ):
        return False  # mean and deviation are of a type that an attribute fixes
    if (given := node.attributes.get("output_dtype")) is not None and given.value:
        return False
    ins, outs = allowed(node, half, opset)
    made = all(i in outs for i, v in enumerate(node.outputs) if types.get(v) == FLOAT)
    floats = [i for i, v in enumerate(node.inputs) if v is not None and types.get(v) == FLOAT]
    reads = any(i in ins for i in floats) or not floats
    return made and reads


def _is_tiny(value: ir.Value | None, least: float, size: int | None = None) -> bool:
    """Whether a constant (of that many elements) holds a number between zero and the least normal one."""
    tensor = tensor_of(value)
    if tensor is None or tensor.dtype != FLOAT or size not in (None, tensor.size):
        return False
    numbers = np.abs(tensor.numpy())
    return bool(np.any((numbers > 0) & (numbers < least)))


def exceeds(tensor: ir.TensorProtocol, most: float) -> bool:
    """Whether a tensor holds finite numbers beyond the range; infinities stay what they are."""
    array = np.abs(tensor.numpy())
    return bool(np.any((array > most) & np.isfinite(array)))


def _masks(concerned: list[ir.Node], types: Types, most: float) -> set[ir.Node]:
    """What lies between constants beyond the range and the Softmax nodes that they reach."""
    between = MOVES | ELEMENTWISE

    def carries(node: ir.Node) -> bool:
        return node.op_type in between or node.op_type == "Softmax"

    softmaxes = [n for n in concerned if n.op_type == "Softmax"]
    if not softmaxes:
        return set()
    before = _closure(softmaxes, lambda n: [p for v in reads_float(n, types) if (p := v.producer())], carries)
    starts = [n for n in before if any(_is_large(v, most) for v in reads_float(n, types)) or _fills(n, most)]
    after = _closure(
        starts, lambda n: [c for v in n.outputs for c in v.consumers() if n.op_type != "Softmax"], carries
    )
    return before & after


def _is_large(value: ir.Value, most: float) -> bool:
    tensor = tensor_of(value)
    return tensor is not None and exceeds(tensor, most)


def _fills(node: ir.Node, most: float) -> bool:
    given = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    return given is not None and exceeds(given.as_tensor(), most)


def _leads(node: ir.Node) -> bool:
    """Whether the way back from a Sin or Cos goes on through this node: not through a product with a weight."""
    if node.op_type in ("MatMul", "Einsum"):
        return not any(
            t is not None and sum(n > 1 for n in t.shape.numpy()) > 1 for t in map(tensor_of, node.inputs)
        )
    return node.op_type in MOVES | ELEMENTWISE | _WAVES | {"Range"}


def _closure(
    starts: Iterable[ir.Node], step: Callable[[ir.Node], Iterable[ir.Node]], goes: Callable[[ir.Node], bool]
) -> set[ir.Node]:
    pending, seen = list(starts), set[ir.Node]()
    while pending:
        node = pending.pop()
        if node not in seen and goes(node):
            seen.add(node)
            pending.extend(step(node))
    return seen


def _tails(concerned: list[ir.Node], fixed: set[ir.Node], guards: set[ir.Node], types: Types) -> set[ir.Node]:
    """Elementwise nodes that belong to an island: they finish a root or a power, square for a sum, or lie between two."""
    added: set[ir.Node] = set()
    tails = guards | {n for n in fixed if n.op_type in _ROOTS}
    for node in concerned:  # in order, so that a tail of a tail is found
        if node in fixed or node.op_type not in ELEMENTWISE:
            continue
        makers = [v.producer() for v in reads_float(node, types) if tensor_of(v) is None]
        readers = [c for v in makes_float(node, types) for c in v.consumers()]
        ends = any(m in tails for m in makers)
        between = any(m in fixed or m in added for m in makers) and any(r in fixed for r in readers)
        square = node.op_type == "Mul" and any(r.op_type in _SUMS for r in readers)
        if ends or between or square:
            added.add(node)
        if ends and all(m in tails for m in makers):
            tails.add(node)
    return added
