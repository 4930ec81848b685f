"""The smallest graph of every way to store a weight, for the legality table: what a backend really accepts and keeps small.

Each is one use of a constant weight of `D` x `D` (or a table) on an input of ``n`` rows. Those that quantize store integers
that fill their type, so that nothing is trivial to fold away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graphs import normal

Array = np.ndarray[Any, np.dtype[Any]]

D = 256
RANK = 16
DENSE = 4 * D * D  # bytes of the weight in float32
F32, F16, BF16, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT64
node = helper.make_node


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array],
    *,
    x: tuple[int, list[int | str]] = (F32, ["n", D]),
    y: int = F32,
    opset: int = 21,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """From input ``x`` to output ``y``."""
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", *x)],
        [helper.make_tensor_value_info("y", y, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [("", opset), ("com.microsoft", 1), ("lrcompile", 1)]
    opsets = [helper.make_opsetid(*domain) for domain in domains]
    return helper.make_model(
        made, opset_imports=opsets, ir_version=10 if opset < 25 else 13, functions=functions
    )


def integers(dtype: Any, *shape: int) -> Array:
    """Seeded integers over the type's whole range; of a float8 all its finite values."""
    if dtype == ml_dtypes.float8_e4m3fn:
        finite = np.arange(256, dtype=np.uint8).view(dtype)
        finite = finite[np.isfinite(finite.astype(np.float32))]
        return finite[np.random.default_rng(shape).integers(0, len(finite), shape)]
    low, high = (-2, 2) if dtype == ml_dtypes.int2 else _RANGES[np.dtype(dtype).name]
    return np.random.default_rng(shape).integers(low, high, shape).astype(dtype)


_RANGES = {"int8": (-127, 128), "uint8": (0, 256), "int4": (-7, 8), "uint4": (0, 16), "int64": (0, D)}


def factors(dtype: Any, kind: int) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "a"], ["h"], name="a"), node("MatMul", ["h", "b"], ["y"], name="b")]
    constants = {"a": normal(D, RANK, dtype=dtype), "b": normal(RANK, D, dtype=dtype)}
    return graph(nodes, constants, x=(kind, ["n", D]), y=kind)


def mixed() -> onnx.ModelProto:
    return graph([node("MatMul", ["x", "w"], ["y"], name="mul")], {"w": normal(D, D, dtype=np.float16)})


def dequantized(
    dtype: Any,
    *,
    block: int = 0,
    zero: bool = False,
    left: bool = False,
    rows: int = D,
    negative: bool = False,
    narrow: bool = False,
) -> onnx.ModelProto:
    """DequantizeLinear -> MatMul. block: along axis 0; 0: a scale a column (a row on the left). zero: with a zero point.

    negative: every other scale is. narrow: scales are stored in float16 and cast.
    """
    shape = (-(-rows // block), D) if block else (rows if left else D,)
    constants = {"w": integers(dtype, rows, D), "s": np.full(shape, 0.01, np.float32)}
    if negative:
        constants["s"][..., ::2] *= -1
    if zero:
        constants["z"] = np.ones(shape).astype(dtype)
    extra = {"block_size": block} if block else {}
    inputs = list(constants)
    nodes = []
    if narrow:
        constants["s"], inputs[1] = constants["s"].astype(np.float16), "t"
        nodes = [node("Cast", ["s"], ["t"], to=F32, name="scales")]
    nodes += [
        node("DequantizeLinear", inputs, ["d"], axis=0 if block or left else 1, name="wide", **extra),
        node("MatMul", ["d", "x"] if left else ["x", "d"], ["y"], name="mul"),
    ]
    opset = 25 if dtype == ml_dtypes.int2 else 21
    return graph(nodes, constants, x=(F32, [D, "n"] if left else ["n", rows]), opset=opset)


def custom(op: str) -> onnx.ModelProto:
    """An operator of ONNX Runtime's own domain."""
    domain = {"domain": "com.microsoft", "name": "own"}
    if op == "FusedMatMul":
        return graph([node(op, ["x", "w"], ["y"], alpha=2.0, **domain)], {"w": normal(D, D)})
    packed = integers(np.uint8, D, D // 32, 16)
    scales = np.full((D, D // 32), 0.01, np.float32)
    if op == "MatMulNBits":
        attributes = {"K": D, "N": D, "bits": 4, "block_size": 32}
        made = node(op, ["x", "w", "s"], ["y"], **attributes, **domain)
        return graph([made], {"w": packed, "s": scales})
    made = node(op, ["w", "x", "s"], ["y"], gather_axis=0, quantize_axis=1, block_size=32, **domain)
    return graph([made], {"w": integers(ml_dtypes.int4, D, D), "s": scales}, x=(I64, ["n"]))


def cast(dtype: Any) -> onnx.ModelProto:
    nodes = [node("Cast", ["w"], ["d"], to=F32, name="wide"), node("MatMul", ["x", "d"], ["h"], name="mul")]
    scale = node("Mul", ["h", "s"], ["y"], name="scale")
    return graph([*nodes, scale], {"w": integers(dtype, D, D), "s": normal(D)})


def table(late: bool) -> onnx.ModelProto:
    """An int8 table with a scale a row. late: rows are looked up first and scaled then."""
    constants = {"w": integers(np.int8, D, D), "s": np.full((D, 1) if late else D, 0.01, np.float32)}
    if late:
        nodes = [
            node("Gather", ["w", "x"], ["q"], name="rows"),
            node("Cast", ["q"], ["c"], to=F32, name="wide"),
            node("Gather", ["s", "x"], ["t"], name="scales"),
            node("Mul", ["c", "t"], ["y"], name="scale"),
        ]
    else:
        nodes = [
            node("DequantizeLinear", ["w", "s"], ["d"], axis=0, name="wide"),
            node("Gather", ["d", "x"], ["y"], name="rows"),
        ]
    return graph(nodes, constants, x=(I64, ["n"]))


def einsum() -> onnx.ModelProto:
    """A Kronecker product, (A x B) applied to the row as a matrix."""
    shapes = {"in": np.array([-1, 16, 16]), "out": np.array([-1, D])}
    nodes = [
        node("Reshape", ["x", "in"], ["m"], name="cut"),
        node("Einsum", ["m", "a", "b"], ["k"], equation="nij,ip,jq->npq", name="both"),
        node("Reshape", ["k", "out"], ["y"], name="join"),
    ]
    return graph(nodes, {"a": normal(16, 16), "b": normal(16, 16), **shapes})


def chain() -> onnx.ModelProto:
    """The same by Reshape, Transpose and MatMul."""
    shapes = {"in": np.array([-1, 16, 16]), "out": np.array([-1, D])}
    nodes = [
        node("Reshape", ["x", "in"], ["m"], name="cut"),
        node("MatMul", ["m", "b"], ["p"], name="b"),
        node("Transpose", ["p"], ["t"], perm=[0, 2, 1], name="turn"),
        node("MatMul", ["t", "a"], ["q"], name="a"),
        node("Transpose", ["q"], ["u"], perm=[0, 2, 1], name="back"),
        node("Reshape", ["u", "out"], ["y"], name="join"),
    ]
    return graph(nodes, {"a": normal(16, 16), "b": normal(16, 16), **shapes})


def two_cores() -> onnx.ModelProto:
    """Rows of a table by two smaller ones, at ids div 16 and mod 16."""
    nodes = [
        node("Div", ["x", "width"], ["i"], name="div"),
        node("Mod", ["x", "width"], ["j"], name="mod"),
        node("Gather", ["a", "i"], ["u"], name="first"),
        node("Gather", ["b", "j"], ["v"], name="second"),
        node("Mul", ["u", "v"], ["y"], name="join"),
    ]
    constants = {"a": normal(16, D), "b": normal(16, D), "width": np.array(16)}
    return graph(nodes, constants, x=(I64, ["n"]))


def branch() -> onnx.ModelProto:
    def body(name: str, op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, F32, ["n", D])
        return helper.make_graph([node(op, ["h"], [name], name=f"{name}_{op}")], name, [], [out])

    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="mul"),
        node("ReduceSum", ["h"], ["sum"], keepdims=0, name="sum"),
        node("Greater", ["sum", "zero"], ["yes"], name="test"),
        node("If", ["yes"], ["y"], then_branch=body("a", "Relu"), else_branch=body("b", "Neg"), name="if"),
    ]
    return graph(nodes, {"w": normal(D, D), "zero": np.array(0, np.float32)})


def function() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21)]
    inner = [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["y"])]
    made = helper.make_function("lrcompile", "pair", ["x", "a", "b"], ["y"], inner, opsets)
    call = node("pair", ["x", "a", "b"], ["y"], domain="lrcompile", name="call")
    return graph([call], {"a": normal(D, RANK), "b": normal(RANK, D)}, functions=[made])


def codebook() -> onnx.ModelProto:
    """Every eight numbers of the weight are one of 256 entries."""
    nodes = [
        node("Cast", ["i"], ["wide"], to=I64, name="wide"),
        node("Gather", ["book", "wide"], ["rows"], name="look"),
        node("Reshape", ["rows", "shape"], ["w"], name="join"),
        node("MatMul", ["x", "w"], ["y"], name="mul"),
    ]
    indices = integers(np.uint8, D * D // 8)
    return graph(nodes, {"book": normal(256, 8), "i": indices, "shape": np.array([D, D])})


def product() -> onnx.ModelProto:
    nodes = [node("MatMul", ["a", "b"], ["w"], name="w"), node("MatMul", ["x", "w"], ["y"], name="mul")]
    return graph(nodes, {"a": normal(D, RANK), "b": normal(RANK, D)})


def bits(op: str) -> onnx.ModelProto:
    """Two 4-bit numbers unpacked from a byte by the operator."""
    attributes = {"direction": "RIGHT"} if op == "BitShift" else {}
    nodes = [
        node(op, ["w", "four"], ["low"], name="unpack", **attributes),
        node("Cast", ["low"], ["d"], to=F32, name="wide"),
        node("MatMul", ["x", "d"], ["y"], name="mul"),
    ]
    return graph(nodes, {"w": integers(np.uint8, D, D), "four": np.array(4, np.uint8)})


def integer_product() -> onnx.ModelProto:
    nodes = [
        node("Cast", ["x"], ["q"], to=TensorProto.INT8, name="narrow"),
        node("MatMulInteger", ["q", "w"], ["i"], name="mul"),
        node("Cast", ["i"], ["y"], to=F32, name="wide"),
    ]
    return graph(nodes, {"w": integers(np.int8, D, D)})


def dynamic() -> onnx.ModelProto:
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="narrow"),
        node("DequantizeLinear", ["q", "s", "z"], ["y"], name="wide"),
    ]
    return graph(nodes, {})


def rounded_input(kind: str) -> onnx.ModelProto:
    """The input in 8 bits too: with the step of each run, or with a given one."""
    if kind == "dynamic":
        nodes = [
            node("DynamicQuantizeLinear", ["x"], ["q", "t", "z"], name="narrow"),
            node("MatMulInteger", ["q", "w", "z"], ["i"], name="mul"),
            node("Cast", ["i"], ["c"], to=F32, name="wide"),
            node("Mul", ["t", "s"], ["ts"], name="scales"),
            node("Mul", ["c", "ts"], ["y"], name="scale"),
        ]
        return graph(nodes, {"w": integers(np.int8, D, D), "s": np.full(D, 0.01, np.float32)})
    dtype = np.dtype(np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
    nodes = [
        node("QuantizeLinear", ["x", "t", "z"], ["q"], name="narrow"),
        node("DequantizeLinear", ["q", "t", "z"], ["r"], name="rounded"),
        node("DequantizeLinear", ["w", "s"], ["d"], axis=1, name="wide"),
        node("MatMul", ["r", "d"], ["y"], name="mul"),
    ]
    steps = {"t": np.array(0.05, np.float32), "z": np.zeros((), dtype), "s": np.full(D, 0.01, np.float32)}
    return graph(nodes, {"w": integers(np.int8, D, D).astype(dtype), **steps})


def non_zero() -> onnx.ModelProto:
    return graph([node("NonZero", ["x"], ["y"], name="where")], {}, y=I64)


ENCODINGS: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "float32": lambda: factors(np.float32, F32),
    "float16": lambda: factors(np.float16, F16),
    "bfloat16": lambda: factors(ml_dtypes.bfloat16, BF16),
    "float16 uncast": mixed,
    "int8": lambda: dequantized(np.int8),
    "int8/32": lambda: dequantized(np.int8, block=32),
    "int4/32": lambda: dequantized(ml_dtypes.int4, block=32),
    "int4/64": lambda: dequantized(ml_dtypes.int4, block=64),
    "int4/128": lambda: dequantized(ml_dtypes.int4, block=128),
    "int4": lambda: dequantized(ml_dtypes.int4),
    "int4/32 narrow": lambda: dequantized(ml_dtypes.int4, block=32, narrow=True),
    "int4/32 negative": lambda: dequantized(ml_dtypes.int4, block=32, negative=True),
    "float8": lambda: dequantized(ml_dtypes.float8_e4m3fn),
    "float8/32": lambda: dequantized(ml_dtypes.float8_e4m3fn, block=32),
    "int8 zero": lambda: dequantized(np.int8, zero=True),
    "int4/32 zero": lambda: dequantized(ml_dtypes.int4, block=32, zero=True),
    "uint8": lambda: dequantized(np.uint8),
    "uint4/32": lambda: dequantized(ml_dtypes.uint4, block=32),
    "int2/32": lambda: dequantized(ml_dtypes.int2, block=32),
    "int4/32 ragged": lambda: dequantized(ml_dtypes.int4, block=32, rows=D - 8),
    "MatMulNBits": lambda: custom("MatMulNBits"),
    "FusedMatMul": lambda: custom("FusedMatMul"),
    "GatherBlockQuantized": lambda: custom("GatherBlockQuantized"),
    "int8 cast": lambda: cast(np.int8),
    "int4 cast": lambda: cast(ml_dtypes.int4),
    "int8 left": lambda: dequantized(np.int8, left=True),
    "int4/32 left": lambda: dequantized(ml_dtypes.int4, block=32, left=True),
    # inputs rounded before they are multiplied
    "input int8": lambda: rounded_input("dynamic"),
    "input int8-static": lambda: rounded_input("int8"),
    "input float8-static": lambda: rounded_input("float8"),
    "int8 rows": lambda: table(late=True),
    "int8 table": lambda: table(late=False),
    "Einsum": einsum,
    "chain": chain,
    "two cores": two_cores,
    "If": branch,
    "function": function,
    "codebook": codebook,
    "product": product,
    "BitShift": lambda: bits("BitShift"),
    "BitwiseAnd": lambda: bits("BitwiseAnd"),
    "MatMulInteger": integer_product,
    "DynamicQuantizeLinear": dynamic,
    "NonZero": non_zero,
}
