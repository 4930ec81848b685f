"""Activations in 8 bits: which types there are, how inputs are smoothed before they are rounded, what that costs in accuracy, and the nodes.

    y ~ scale_x scale_n  (q(x / s) - z) (q(diag(s) W)),      q integers of 8 bits (or a float of 8 bits), the product in int32

s (K,) evens out the ranges of the input's channels, so that one step serves all of them: s_k = r_k^(1/2), r_k the largest |x_k| that
calibration saw, of geometric mean one (SmoothQuant with the weight's part left out: sites that read one value then divide by the
same s, and share one quantizer). A step d rounds x_k by noise of variance (d s_k)^2 / 12, and a weight's rows feel it as

    E |noise W|^2 = sum_k (d s_k)^2 / 12 |w_k|^2,      which the second moment of the input takes in before error feedback rounds W.

int8         the step of each run's own range: DynamicQuantizeLinear, MatMulInteger, Cast, Mul, which ONNX Runtime fuses to one node. Of the
             weight's 8 bits 7 are used: x86 without VNNI adds pairs of products u8 x s8 in 16 bits, which 255 (127 + 127) overflows
             and 255 (64 + 64) does not: wider weights give sums that differ by machine.
int8-static  the step of calibration: QuantizeLinear, DequantizeLinear on both sides of a MatMul, symmetric, as TensorRT fuses it
float8-static the same with E4M3 numbers
Sources: Xiao et al., SmoothQuant, 2023; Frantar et al., GPTQ, 2022; ONNX Runtime's note on reduce_range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lrcompile.errors import UsageError
from lrcompile.graph import Builder
from lrcompile.interfaces import Array, Factors, StatisticsSource, Weights
from lrcompile.quantize import Coded, fed_back, searched, storage, sweep
from lrcompile.records import Group, InputStatistics, Refusal

DYNAMIC, STATIC, FLOAT8 = "int8", "int8-static", "float8-static"
KINDS = (DYNAMIC, STATIC, FLOAT8)
SMOOTH, STEP = "smooth", "step"  # factors beside `w`: (K,), what x is multiplied by; (), of static types
_POWER = 0.5  # of a channel's range; on MiniLM 0.4 and 0.7 lose more
_SIGMAS = 4.0  # how far an input reaches whose range was not watched
_WORTH = 0.7  # of the noise without it: what smoothing must be below
_LEAST = 1e-3  # of the largest range: what a channel that hardly moves counts as
_DYNAMIC_BITS = 7
_LARGEST = {STATIC: 127.0, FLOAT8: 448.0}
_FLOAT8_NOISE = 2.0**-8 / 12.0 / 2.16  # of x^2: 3 bits of mantissa, x^2 / 4^exponent being 2.16 on average


def kinds_of(given: Sequence[str], target: str) -> tuple[str, ...]:
    """What ``--activations`` names, for a target: int8 is static on TensorRT, whose parser knows no dynamic one. Raises UsageError."""
    static = "trt" in target or "tensorrt" in target
    found: list[str] = []
    for name in given:
        if name not in ("auto", "int8", "float8"):
            raise UsageError(f"--activations {name}: it is one of auto, int8, float8")
        found.append({"float8": FLOAT8}.get(name, STATIC if static else DYNAMIC))
    return tuple(dict.fromkeys(found))


def storage_under(kind: str) -> str:
    """The type of weights that meet such activations."""
    return "float8" if kind == FLOAT8 else "int8"


def legal(kind: str, stored: str | None, group: Group) -> Refusal | None:
    """None, or why a group's input is not rounded so, whatever the target."""
    site = group.sites[0]
    if kind not in KINDS or stored != storage_under(kind):
        return Refusal(f"there are no activations in {kind} beside weights in {stored}")
    if group.kind != "alone" or site.kind != "linear" or any(group.transposed):
        return Refusal("activations are rounded where one MatMul or Gemm reads a weight of its own")
    if site.dtype != "float":
        return Refusal(f"activations are rounded where they are float32, not {site.dtype}")
    return None


# --- the mathematics ----------------------------------------------------------------------------------------------


def reach_of(known: InputStatistics) -> tuple[Array, Array]:
    """(K,) each: the least and the largest number of every channel, 0 between them."""
    if known.low is not None and known.high is not None:
        return np.minimum(known.low, 0.0), np.maximum(known.high, 0.0)
    assert known.second is not None
    far = _SIGMAS * np.sqrt(np.maximum(np.diagonal(known.second), 0.0))
    return -far, far


def smoothing(known: InputStatistics) -> Array:
    """(K,), in float32's numbers: 1 / s; ones where little is gained."""
    low, high = reach_of(known)
    far = np.maximum(-low, high)
    if not far.any():
        return np.ones(len(far))
    s = np.maximum(far, _LEAST * far.max()) ** _POWER
    s /= np.exp(np.log(s).mean())
    before, after = high.max() - low.min(), (high / s).max() - (low / s).min()
    if after**2 * np.square(s).mean() > _WORTH * before**2:  # noise of all channels together
        return np.ones(len(far))
    made: Array = (1.0 / s).astype(np.float32).astype(np.float64)
    return made


@dataclass(frozen=True, slots=True, eq=False)
class Quantizer:
    """How an input is rounded. smooth (K,): what it is multiplied by before; step: of a static type, that which reaches calibration's range.

    noise (K,): variance of what rounding adds to each channel of x.
    """

    kind: str
    smooth: Array
    step: float
    noise: Array

    @property
    def factors(self) -> Factors:
        made = {} if (self.smooth == 1.0).all() else {SMOOTH: self.smooth}
        return made if self.kind == DYNAMIC else {**made, STEP: np.array(self.step)}

    def coded(self, W: Array, moment: Array | None, sweeps: int) -> Coded:
        """diag(s) W in its storage type, rounded with error feedback by what the smoothed and rounded input is."""
        kind = storage(storage_under(self.kind))
        bits = replace(kind, bits=_DYNAMIC_BITS) if self.kind == DYNAMIC else kind
        V = W / self.smooth[:, None]
        if moment is None:
            return replace(searched(V, bits), storage=kind)
        H = moment * np.outer(self.smooth, self.smooth)
        H[np.diag_indices(len(H))] += self.noise * self.smooth**2
        made = fed_back(V, H, bits)
        return replace(sweep(V, H, made, sweeps) if sweeps else made, storage=kind)


def quantizer(kind: str, known: InputStatistics | None, K: int) -> Quantizer:
    """For an input of which this is known; of an unknown one nothing is smoothed, and static steps reach four deviations of one."""
    if known is None or known.second is None:
        known = InputStatistics(0, np.eye(K))
    smooth = smoothing(known)
    low, high = (end * smooth for end in reach_of(known))
    far = max(float(-low.min(initial=0.0)), float(high.max(initial=0.0))) or 1.0
    step = float(np.float32(far / _LARGEST.get(kind, 127.0)))
    if kind == FLOAT8:
        assert known.second is not None
        return Quantizer(kind, smooth, step, _FLOAT8_NOISE * np.diagonal(known.second))
    width = float(high.max(initial=0.0) - low.min(initial=0.0)) / 255.0 if kind == DYNAMIC else step
    return Quantizer(kind, smooth, step, np.square(width / smooth) / 12.0)


def restored(values: Array, factors: Factors) -> Array:
    """W of the codes of diag(s) W."""
    return values * factors[SMOOTH].astype(np.float64)[:, None] if SMOOTH in factors else values


def noise_of(
    kind: str, group: Group, weights: Weights, statistics: StatisticsSource | None
) -> tuple[float, float]:
    """Relative error of a lone site that rounding its input causes, squared, and how far that is predicted to move the outputs.

    The second is 0 where nothing is known of the outputs.
    """
    site = group.sites[0]
    known = statistics.of(site) if statistics is not None else None
    W = weights.matrix(site)
    noise = quantizer(kind, known, len(W)).noise
    C = np.eye(len(W)) if known is None or known.second is None else known.second
    all_ = float(np.vdot(W, C @ W))
    lost = float(noise @ np.square(W).sum(axis=1)) / all_ if all_ > 0 else 0.0
    if known is None or known.reaction is None:
        return lost, 0.0
    return lost, float(np.sum((W.T @ (noise[:, None] * W)) * known.reaction.output))


def stand_in(W: Array, kind: str, known: InputStatistics, seed: int) -> Array:
    """A change (K, N) of the weight that moves its outputs as far as rounding the input does, to be tried where inputs cannot be."""
    assert known.second is not None
    spread = np.sqrt(quantizer(kind, known, len(W)).noise @ np.square(W))  # (N,)
    whole = float(np.trace(known.second))
    rng = np.random.default_rng(seed)
    made: Array = rng.standard_normal(W.shape) * (spread / np.sqrt(whole if whole > 0 else 1.0))
    return made


# --- the nodes ----------------------------------------------------------------------------------------------------


def product(
    op: Builder, x: ir.Value, kind: str, given: dict[str, ir.Value], smooth: ir.Value | None, step: ir.Value | None, decoded: ir.Value | None
) -> ir.Value:  # fmt: skip
    """x W of a rounded x. given: the weight's codes ("") and scales ("scale"); decoded: of static types, what DequantizeLinear makes of them."""
    if smooth is not None:
        x = op("Mul", x, smooth, name="smoothed")
    if kind != DYNAMIC:
        assert step is not None and decoded is not None
        zero = np.zeros((), ml_dtypes.float8_e4m3fn if kind == FLOAT8 else np.int8)
        zero_point = op.constant(zero, "zero")
        codes = op("QuantizeLinear", x, step, zero_point, name="quantized")
        rounded = op("DequantizeLinear", codes, step, zero_point, name="rounded")
        return op("MatMul", rounded, decoded, name="product")
    codes, scale, zero_point = op.several("DynamicQuantizeLinear", x, outputs=3, name="quantized")
    sums = op("MatMulInteger", codes, given[""], zero_point, name="sums")
    scales = op("Mul", scale, given["scale"], name="scales")
    return op("Mul", op("Cast", sums, name="numbers", to=ir.DataType.FLOAT), scales, name="product")
