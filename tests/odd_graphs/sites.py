"""Gather, Einsum, and what is only listed, in the main graph. To add one: `def name(b: Builder) -> None`, and a line in SITES."""

from __future__ import annotations

from functools import partial

import numpy as np
from onnx import TensorProto

from .builder import ALL, F16, F32, Builder, Feature, Tensor
from .products import PRODUCTS
from .weights import weight

# Gather ------------------------------------------------------------------------------------------------------------


def ids(b: Builder, rank: int, V: int) -> Tensor:
    kind, dtype = b.choices.pick([(TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32)])
    low = -V if b.opset >= 11 and b.choices.chance(50) else 0
    b.tag("ids_negative" if low else "ids_positive", f"ids_{np.dtype(dtype).name}", f"ids_rank{rank}")
    shape = tuple(b.size(1, 4) for _ in range(rank))
    return b.input(shape, kind, lambda rng, shape: np.asarray(rng.integers(low, V, shape), dtype))


def gather(b: Builder, axis: int = 0, rank: int | None = None) -> None:
    rank = b.choices.pick([1, 2, 0, 3]) if rank is None else rank
    w = weight(b, (b.size(), b.size()))
    i = ids(b, rank, w.shape[axis])
    at = axis % 2
    if at == 1:
        b.needs_rank.add(len(b.expected))
    if at == 1 or rank == 0:
        b.freeze()
    attributes = {} if axis == 0 and b.choices.chance(50) else {"axis": axis}
    y = b.use("Gather", [w.value, i.name], w, **attributes)
    b.leave(y, (*i.shape, w.shape[1]) if at == 0 else (w.shape[0], *i.shape))


def gather_constant_ids(b: Builder) -> None:
    w = weight(b, (b.size(), b.size()), plain=True)
    i = b.constant(b.rng.integers(0, w.shape[0], (3,)), "ids")
    y = b.use("Gather", [w.value, i], w, reason="constant", certain=False)
    b.output(Tensor(y, (3, w.shape[1])))


def gather_rank3(b: Builder) -> None:
    w = weight(b, (b.size(), 2, b.size()), plain=True)
    i = ids(b, 1, w.shape[0])
    b.leave(b.use("Gather", [w.value, i.name], w, reason="rank"), (*i.shape, *w.shape[1:]))


def gather_vector(b: Builder) -> None:
    w = weight(b, (b.size(),), plain=True)
    i = ids(b, 2, w.shape[0])
    b.leave(b.use("Gather", [w.value, i.name], w, reason="rank"), i.shape)


def tied(b: Builder, gemm: bool = False) -> None:
    """A table that is the head too: through a Transpose, or as Gemm's B with transB = 1."""
    w = weight(b, (b.size(), b.size()))
    i = ids(b, 1 if gemm else 2, w.shape[0])
    x = b.emit("Relu", [b.use("Gather", [w.value, i.name], w)])
    if gemm:
        C = [] if b.opset >= 11 else [b.constant(b.normal((w.shape[0],)), "C")]
        y = b.use("Gemm", [x, w.value, *C], w, transB=1)
    else:
        y = b.use("MatMul", [x, b.emit("Transpose", [w.value], perm=[1, 0])], w)
    b.leave(y, (*i.shape, w.shape[0]))


# Einsum ------------------------------------------------------------------------------------------------------------

# equation, where the weight stands, reason, certain. Letters of x: b batch, s sequence, k last axis; others are drawn.
EINSUM: dict[str, tuple[str, int, str, bool]] = {
    "einsum_plain": ("bk,kn->bn", 1, "", True),
    "einsum_sequence": ("bsk,kn->bsn", 1, "", True),
    "einsum_weight_first": ("kn,bk->bn", 0, "", True),
    "einsum_transposed": ("bk,nk->bn", 1, "", True),
    "einsum_spaces": (" bk , kn -> bn ", 1, "", True),
    "einsum_heads": ("bsk,khd->bshd", 1, "", True),
    "einsum_output_order": ("bsk,kn->bns", 1, "", False),
    "einsum_implicit": ("bk,kn", 1, "", False),
    "einsum_ellipsis": ("...k,kn->...n", 1, "", False),
    "einsum_batched": ("bk,bkn->bn", 1, "equation", True),
    "einsum_diagonal": ("bk,kk->bk", 1, "equation", True),
    "einsum_elementwise": ("bk,kn->bkn", 1, "equation", True),
    "einsum_vector": ("bk,k->b", 1, "equation", True),
    "einsum_sum": ("bk,kn->b", 1, "equation", False),
}


def einsum(b: Builder, name: str) -> None:
    equation, position, reason, certain = EINSUM[name]
    left, _, right = equation.replace(" ", "").replace("...", "b").partition("->")
    terms = left.split(",")
    x = b.stream(len(terms[1 - position]))
    sizes = dict(zip(terms[1 - position], x.shape, strict=True))
    if "b" in terms[position]:
        b.freeze()
    w = weight(b, tuple(sizes.setdefault(c, b.size()) for c in terms[position]))
    operands = [x.name, w.value] if position else [w.value, x.name]
    y = b.use("Einsum", operands, w, reason=reason, certain=certain, equation=equation)
    out = right or "".join(sorted(c for c in set(left) if left.count(c) == 1 and c != ","))
    shape = tuple(sizes[c] for c in out)
    if out.find("b") != 0:
        b.freeze()
    b.leave(y, shape) if len(shape) > 1 else b.output(Tensor(y, shape))


# pictures, and what is found and listed but never taken ------------------------------------------------------------

# spatial axes, kernel, channels in and out, groups
CONV = {
    "conv_1x1": (2, 1, 4, 6, 1),
    "conv_1d": (1, 3, 4, 6, 1),
    "conv_kxk": (2, 3, 4, 6, 1),
    "conv_grouped": (2, 3, 4, 6, 2),
    "conv_depthwise": (2, 3, 4, 4, 4),
}


def conv(b: Builder, name: str, transpose: bool = False) -> None:
    b.freeze()
    spatial, k, cin, cout, groups = CONV[name]
    x = b.input((2, cin, *[5] * spatial))
    w = weight(b, ((cin, cout // groups) if transpose else (cout, cin // groups)) + (k,) * spatial)
    inputs = [x.name, w.value, *([b.constant(b.normal((cout,)), "B")] if b.choices.chance(50) else [])]
    op = "ConvTranspose" if transpose else "Conv"
    y = b.use(
        op, inputs, w, reason="transposed" if transpose else "", group=groups, kernel_shape=[k] * spatial
    )
    side = 5 + k - 1 if transpose else 5 - k + 1
    b.leave(y, (2, cout, *[side] * spatial))


def recurrent(b: Builder, op: str) -> None:
    """W and R are both weights; one direction or two."""
    b.freeze()
    gates, D = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], b.choices.pick([1, 2])
    x, H = b.input((3, 2, b.size())), b.size(2, 6)
    W, R = weight(b, (D, gates * H, x.shape[-1])), weight(b, (D, gates * H, H))
    direction = "bidirectional" if D == 2 else "forward"
    b.expect(op, R, reason="recurrent")
    y = b.use(op, [x.name, W.value, R.value], W, reason="recurrent", hidden_size=H, direction=direction)
    b.leave(y, (3, D, 2, H))


SITES: dict[str, Feature] = {
    **PRODUCTS,
    **{f"gather_rank{r}": Feature(partial(gather, rank=r), dtypes=ALL) for r in range(4)},
    "gather_axis1": Feature(partial(gather, axis=1)),
    "gather_axis_minus1": Feature(partial(gather, axis=-1)),
    "gather_axis_minus2": Feature(partial(gather, axis=-2)),
    "gather_constant_ids": Feature(gather_constant_ids),
    "gather_rank3_table": Feature(gather_rank3),
    "gather_vector": Feature(gather_vector),
    "tied_transpose": Feature(tied, dtypes=ALL),
    "tied_gemm": Feature(partial(tied, gemm=True)),
    **{name: Feature(partial(einsum, name=name), opset=12) for name in EINSUM},
    **{name: Feature(partial(conv, name=name), dtypes=(F32, F16)) for name in CONV},
    "conv_transpose": Feature(partial(conv, name="conv_grouped", transpose=True), dtypes=(F32,)),
    **{op.lower(): Feature(partial(recurrent, op=op), dtypes=(F32,)) for op in ("LSTM", "GRU", "RNN")},
}
