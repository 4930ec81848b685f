"""MatMul, with or without a bias, and Gemm in the main graph. To add one: `def name(b: Builder) -> None`, and a line in PRODUCTS."""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import TensorProto

from .builder import ALL, Builder, Feature, Tensor, Weight
from .weights import weight

# MatMul ------------------------------------------------------------------------------------------------------------


def matmul(b: Builder, rank: int = 2, K: int | None = None, N: int | None = None) -> None:
    x = b.stream(rank, K)
    w = weight(b, (x.shape[-1], N or b.size()))
    b.leave(b.use("MatMul", [x.name, w.value], w), (*x.shape[:-1], w.shape[1]))


def matmul_left(b: Builder, rank: int = 2) -> None:
    """W @ x."""
    x = b.stream(rank)
    b.freeze()  # of rank 3 too: onnxruntime 1.31.1 fails on (M, K) @ (0, K, N)
    w = weight(b, (b.size(), x.shape[-2] if rank > 1 else x.shape[0]))
    shape = (*x.shape[:-2], w.shape[0], x.shape[-1]) if rank > 1 else (w.shape[0],)
    b.needs_rank.add(len(b.expected))
    b.leave(b.use("MatMul", [w.value, x.name], w), shape)


def matmul_vector_weight(b: Builder) -> None:
    x = b.stream(b.choices.pick([2, 3]))
    b.freeze()  # onnxruntime 1.31.1 fails on (0, K) @ (K)
    w = weight(b, (x.shape[-1],))
    y = b.use("MatMul", [x.name, w.value], w, reason="rank")
    b.leave(b.axes("Unsqueeze", y, [len(x.shape) - 1]), (*x.shape[:-1], 1))


def matmul_rank3(b: Builder, batch: int | None = 1) -> None:
    """[1, K, N] is a matrix; [B, K, N] is one for each batch entry."""
    x = b.stream(3)
    if batch is None:
        b.freeze()
        batch = x.shape[0]
        if batch == 1:
            batch, x = 3, b.input((3, *x.shape[1:]))
    w = weight(b, (batch, x.shape[-1], b.size()))
    b.needs_rank.add(len(b.expected))
    y = b.use("MatMul", [x.name, w.value], w, reason="batched" if batch > 1 else "")
    b.leave(y, (*x.shape[:-1], w.shape[-1]))


def matmul_shared(b: Builder) -> None:
    """One weight, two or three nodes."""
    w = weight(b, (b.size(), b.size()))
    for _ in range(b.choices.integer(2, 3)):
        x = b.stream(b.choices.pick([2, 3]), w.shape[0])
        b.leave(b.use("MatMul", [x.name, w.value], w), (*x.shape[:-1], w.shape[1]))


def matmul_same_input(b: Builder) -> None:
    """Two or three weights on one input, like q, k and v."""
    x = b.stream(b.choices.pick([2, 3]))
    N = b.size()
    for _ in range(b.choices.integer(2, 3)):
        w = weight(b, (x.shape[-1], N))
        b.leave(b.use("MatMul", [x.name, w.value], w), (*x.shape[:-1], N))


def matmul_constants(b: Builder) -> None:
    x = b.stream(2)
    left, right = (
        weight(b, (b.size(), x.shape[-1]), plain=True),
        weight(b, (x.shape[-1], b.size()), plain=True),
    )
    b.expect("MatMul", left, reason="constant", certain=False)
    y = b.use("MatMul", [left.value, right.value], right, reason="constant", certain=False)
    b.output(Tensor(y, (left.shape[0], right.shape[1])))
    b.leave(x.name, x.shape) if x.name not in [i.name for i in b.inputs] else b.leave(
        b.emit("Abs", [x.name]), x.shape
    )


def matmul_activations(b: Builder) -> None:
    x = b.stream(3)
    turned = b.emit("Transpose", [x.name], perm=[0, 2, 1])
    b.leave(b.emit("MatMul", [x.name, turned]), (*x.shape[:2], x.shape[1]))


def matmul_of_integers(b: Builder) -> None:
    """int32 MatMul: a legal type, no factors."""
    K, N = b.size(), b.size()
    x = b.input((2, K), TensorProto.INT32, lambda rng, shape: rng.integers(-9, 9, shape).astype(np.int32))
    value = b.constant(b.rng.integers(-9, 9, (K, N)).astype(np.int32), "weight")
    y = b.use("MatMul", [x.name, value], Weight(value, (K, N), value, (K, N)), reason="integer")
    b.output(Tensor(y, (2, N)), TensorProto.INT32)


def matmul_integer(b: Builder) -> None:
    K, N = b.size(), b.size()
    x = b.input((2, K), TensorProto.UINT8, lambda rng, shape: rng.integers(0, 255, shape).astype(np.uint8))
    value = b.constant(b.rng.integers(-9, 9, (K, N)).astype(np.int8), "weight")
    y = b.use("MatMulInteger", [x.name, value], Weight(value, (K, N), value, (K, N)), reason="integer")
    b.output(Tensor(y, (2, N)), TensorProto.INT32)


def qlinear_matmul(b: Builder) -> None:
    K, N = b.size(), b.size()
    x = b.input((2, K), TensorProto.UINT8, lambda rng, shape: rng.integers(0, 255, shape).astype(np.uint8))
    value = b.constant(b.rng.integers(0, 255, (K, N)).astype(np.uint8), "weight")
    scale, zero = np.float32(0.02), np.uint8(128)
    scales = [b.constant(np.asarray(v), "scale") for v in (scale, zero, scale, zero, np.float32(0.5), zero)]
    inputs = [x.name, *scales[:2], value, *scales[2:]]
    y = b.use("QLinearMatMul", inputs, Weight(value, (K, N), value, (K, N)), reason="integer")
    b.output(Tensor(y, (2, N)), TensorProto.UINT8)


# a bias after MatMul -----------------------------------------------------------------------------------------------


def _biased(
    b: Builder, x: Tensor, bias: str | None = None, N: int | None = None
) -> tuple[str, tuple[int, ...]]:
    """x W + bias; the bias is (N), (1, N) or a scalar, on either side."""
    w = weight(b, (x.shape[-1], N or b.size()))
    shape = (*x.shape[:-1], w.shape[1])
    y = b.use("MatMul", [x.name, w.value], w)
    form = b.choices.pick([(w.shape[1],), (1, w.shape[1]), (), (1,)])
    operands = [y, bias or b.constant(b.normal(form), "bias")]
    if b.choices.chance(50):
        operands.reverse()
        b.tag("bias_left")
    b.tag(f"bias_rank{len(form)}")
    return b.emit("Add", operands), shape


def bias(b: Builder) -> None:
    b.leave(*_biased(b, b.stream(b.choices.pick([2, 3]))))


def bias_shared(b: Builder) -> None:
    """One bias for two MatMul: nobody may correct it for one of them."""
    N = b.size()
    shared = b.constant(b.normal((N,)), "bias")
    for _ in range(2):
        b.leave(*_biased(b, b.stream(2), shared, N))


def bias_after_output(b: Builder) -> None:
    """The product without the bias is a graph output as well."""
    x = b.stream(2)
    w = weight(b, (x.shape[-1], b.size()))
    y = b.use("MatMul", [x.name, w.value], w)
    shape = (x.shape[0], w.shape[1])
    b.output(Tensor(y, shape))
    b.leave(b.emit("Add", [y, b.constant(b.normal(shape[1:]), "bias")]), shape)


# Gemm --------------------------------------------------------------------------------------------------------------

GEMM_C = ("absent", "scalar", "one", "N", "1N", "M1", "MN")


def gemm(b: Builder, C: str | None = None, alpha: float | None = None, beta: float | None = None) -> None:
    trans_a = b.choices.chance(30)
    x = b.stream(2)
    M, K = x.shape[::-1] if trans_a else x.shape
    trans_b, N = b.choices.chance(50), b.size()
    w = weight(b, (N, K) if trans_b else (K, N))
    C = C or b.choices.pick([c for c in GEMM_C if c != "absent" or b.opset >= 11])
    shape = {"scalar": (), "one": (1,), "N": (N,), "1N": (1, N), "M1": (M, 1), "MN": (M, N)}.get(C)
    if trans_a or C in ("M1", "MN"):
        b.freeze()
    inputs = [x.name, w.value]
    if shape is not None:
        inputs.append(b.constant(b.normal(shape), "C"))
    elif b.choices.chance(30):
        inputs.append("")  # absent, spelled out
    attributes: dict[str, float | int] = {}
    for name, value in (("alpha", alpha), ("beta", beta)):
        value = b.choices.pick([1.0, 0.5, -2.0, 0.0]) if value is None else value
        if value != 1 or b.choices.chance(20):
            attributes[name] = value
            b.tag(f"{name}_{value:g}")
    for name, on in (("transA", trans_a), ("transB", trans_b)):
        if on or b.choices.chance(20):
            attributes[name] = int(on)
            b.tag(*([f"gemm_{name}"] if on else []))
    b.tag(f"gemm_C_{C}")
    certain = attributes.get("alpha") != 0  # nothing is left of the product
    b.leave(b.use("Gemm", inputs, w, certain=certain, **attributes), (M, N))


def gemm_left(b: Builder) -> None:
    """The weight is A."""
    x = b.stream(2)
    b.freeze()
    trans_b = b.choices.chance(50)
    K, N = x.shape[::-1] if trans_b else x.shape
    w = weight(b, (b.size(), K))
    y = b.use(
        "Gemm", [w.value, x.name, b.constant(b.normal((N,)), "C")], w, certain=False, transB=int(trans_b)
    )
    b.leave(y, (w.shape[0], N))


def gemm_activations(b: Builder) -> None:
    """Only C is constant: no site."""
    x = b.stream(2)
    b.freeze()
    M = x.shape[0]
    b.leave(b.emit("Gemm", [x.name, x.name, b.constant(b.normal((M,)), "C")], transB=1), (M, M))


PRODUCTS: dict[str, Feature] = {
    "matmul_right": Feature(matmul, dtypes=ALL),
    "matmul_x1": Feature(partial(matmul, rank=1), dtypes=ALL),
    "matmul_x3": Feature(partial(matmul, rank=3), dtypes=ALL),
    "matmul_x4": Feature(partial(matmul, rank=4), dtypes=ALL),
    "matmul_left": Feature(matmul_left, dtypes=ALL),
    "matmul_left_x1": Feature(partial(matmul_left, rank=1)),
    "matmul_left_x3": Feature(partial(matmul_left, rank=3)),
    "matmul_K1": Feature(partial(matmul, K=1)),
    "matmul_N1": Feature(partial(matmul, N=1)),
    "matmul_vector_weight": Feature(matmul_vector_weight),
    "matmul_weight_1KN": Feature(matmul_rank3),
    "matmul_weight_BKN": Feature(partial(matmul_rank3, batch=None)),
    "matmul_shared": Feature(matmul_shared),
    "matmul_same_input": Feature(matmul_same_input),
    "matmul_constants": Feature(matmul_constants),
    "matmul_activations": Feature(matmul_activations),
    "matmul_int32": Feature(matmul_of_integers, opset=9),
    "matmul_integer": Feature(matmul_integer, opset=10),
    "qlinear_matmul": Feature(qlinear_matmul, opset=10),
    "bias": Feature(bias, dtypes=ALL),
    "bias_shared": Feature(bias_shared),
    "bias_after_output": Feature(bias_after_output),
    **{f"gemm_C_{c}": Feature(partial(gemm, C=c), opset=11 if c == "absent" else 7) for c in GEMM_C},
    "gemm_alpha0": Feature(partial(gemm, alpha=0.0)),
    "gemm_alpha": Feature(partial(gemm, alpha=-0.75)),
    "gemm_beta0": Feature(partial(gemm, beta=0.0)),
    "gemm_beta": Feature(partial(gemm, beta=1.5)),
    "gemm": Feature(gemm, dtypes=ALL),
    "gemm_left": Feature(gemm_left),
    "gemm_activations": Feature(gemm_activations),
}
