"""How far outputs moved: relative L2, SNR, cosine, largest difference, and for logits KL and top-1 agreement.

Sums are float64 and grow feed by feed; a row is the last axis (a scalar or vector is one row). Where the original is not finite
nothing is summed; where only the other one is not, that is a problem of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lrcompile.interfaces import Array
from lrcompile.records import OutputEvidence

_ROWS = 1 << 20  # numbers widened to float64 at a time


@dataclass(slots=True)
class Movement:
    """Running sums over the feeds for one output; a is the original's, b the compiled's."""

    name: str
    eps: float = 0.0  # of the output's type
    count: int = 0  # numbers compared
    difference: float = 0.0  # sum of (a - b)^2
    energy: float = 0.0  # sum of a^2
    largest: float = 0.0  # max |a - b|
    peak: float = 0.0  # max |a|
    cosines: float = 0.0
    rows: int = 0
    divergence: float = 0.0  # sum over rows of KL(softmax a || softmax b)
    agreed: int = 0  # rows whose largest entry is the same
    problem: str = (
        ""  # shapes or types that differ, strings that differ, NaN or Inf where the original is finite
    )
    drift: bool = (
        False  # NaN or Inf of the original that came out otherwise: Inf times a rounded zero does that
    )

    @property
    def is_logits(self) -> bool:
        return "logit" in self.name.lower()

    def add(self, a: Array, b: Array) -> None:
        """One feed's output of both."""
        if a.shape != b.shape:
            self.problem = self.problem or f"shape {b.shape} instead of {a.shape}"
            return
        if a.dtype == object or a.dtype.kind in "US":
            same = bool((a == b).all())
            self.problem = self.problem or ("" if same else "strings differ")
            self.count += a.size
            self.rows, self.cosines = self.rows + 1, self.cosines + 1.0
            return
        if a.dtype != b.dtype:
            self.problem = self.problem or f"type {b.dtype} instead of {a.dtype}"
            return
        if a.dtype.kind == "c":
            a, b = np.stack([a.real, a.imag], -1), np.stack([b.real, b.imag], -1)
        width = a.shape[-1] if a.ndim else 1
        flat_a, flat_b = (
            a.reshape(-1, width) if a.size else a.reshape(0, 1),
            b.reshape(-1, width) if b.size else b.reshape(0, 1),
        )
        step = max(1, _ROWS // max(width, 1))
        for i in range(0, len(flat_a), step):
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # sums beyond float64 are Inf or NaN, which no limit lets pass
                self._block(flat_a[i : i + step].astype(np.float64), flat_b[i : i + step].astype(np.float64))

    def _block(self, a: Array, b: Array) -> None:
        finite = np.isfinite(a)
        if not np.isfinite(b[finite]).all():
            self.problem = self.problem or "NaN or infinite values where the original's are finite"
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            self.drift = True
        both = finite & np.isfinite(b)
        a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
        d = a - b
        self.count += a.size
        self.difference += float(np.vdot(d, d))
        self.energy += float(np.vdot(a, a))
        self.largest = max(self.largest, float(np.abs(d).max(initial=0.0)))
        self.peak = max(self.peak, float(np.abs(a).max(initial=0.0)))
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        product = norms[0] * norms[1]
        dots = np.einsum("ij,ij->i", a, b)
        cosines = np.divide(dots, product, out=(norms[0] == norms[1]).astype(np.float64), where=product > 0)
        self.cosines += float(np.clip(cosines, -1.0, 1.0).sum())
        self.rows += len(a)
        if self.is_logits:
            p, q = _log_softmax(a), _log_softmax(b)
            self.divergence += float((np.exp(p) * (p - q)).sum())
            self.agreed += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())

    @property
    def resolution(self) -> float:
        """One unit in the last place of the largest value, in the output's own type."""
        return self.eps * self.peak

    @property
    def relative_l2(self) -> float:
        if self.energy > 0:
            return math.sqrt(self.difference / self.energy)
        return 0.0 if self.difference == 0 else math.inf

    def evidence(self, noise: float) -> OutputEvidence:
        """noise: relative L2 that the original moves by itself."""
        snr = (
            None
            if self.difference == 0
            else 10 * math.log10(self.energy / self.difference)
            if self.energy > 0
            else -math.inf
        )
        logits = self.is_logits and self.rows > 0
        return OutputEvidence(
            relative_l2=self.relative_l2,
            snr_db=snr,
            cosine=self.cosines / self.rows if self.rows else 1.0,
            max_abs=self.largest,
            noise_floor=noise,
            kl=self.divergence / self.rows if logits else None,
            top1=self.agreed / self.rows if logits else None,
        )


def _log_softmax(a: Array) -> Array:
    shifted = a - a.max(axis=1, keepdims=True, initial=-np.inf)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
