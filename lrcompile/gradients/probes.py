"""Random cotangents that turn derivatives into expected movements of the outputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lrcompile.interfaces import Array


def default_cotangents(
    outputs: Mapping[str, Array], count: int, seed: int, mask: Array | None = None
) -> tuple[dict[str, Array], ...]:
    """`count` random sets v such that E (sum v^T dz)^2 is how far a small change dz moves the outputs, summed over them:

        a float output z (.., D)         v = n / sqrt(sum |z|^2)                             |dz|^2 / |z|^2
        one with "logit" in its name     v = (sqrt(p) n - p <sqrt(p), n>) / sqrt(rows)       mean over rows of dz^T F dz

    n ~ N(0, 1), p the softmax of a row, F = diag(p) - p p^T its Fisher information: KL(p || p') = dz^T F dz / 2 to second order.
    mask: (batch, sequence), zeros where rows of outputs (batch, sequence, .., D) are left out. Entries that are not
    finite, and outputs of integers, get no part.
    """
    floats = {name: z for name, z in outputs.items() if z.dtype.kind == "f" and z.size}
    return tuple(
        {
            name: _probe(name, z, np.random.default_rng((seed, number, index)), mask)
            for index, (name, z) in enumerate(floats.items())
        }
        for number in range(count)
    )


def _probe(name: str, z: Array, rng: np.random.Generator, mask: Array | None) -> Array:
    rows = np.ones(z.shape[:-1], bool)
    if mask is not None and z.ndim > 2 and mask.shape == z.shape[:2]:
        rows &= mask.astype(bool).reshape(*mask.shape, *(1,) * (z.ndim - 3))
    n: Array = np.asarray(rng.standard_normal(z.shape, np.float32))
    n[~np.isfinite(z)] = 0
    n *= rows[..., None] if z.ndim else rows
    if "logit" in name.lower() and z.ndim:
        p = _softmax(z)
        root = np.sqrt(p)
        n *= root  # from here on in place: logits are the largest array of a language model
        p *= np.sum(n, axis=-1, keepdims=True)
        n -= p
        scale = float(np.count_nonzero(rows))
    else:
        kept = (z[rows] if z.ndim else z).astype(np.float64)
        kept[~np.isfinite(kept)] = 0
        scale = float(np.vdot(kept, kept))
    n *= np.float32(scale**-0.5 if scale > 0 else 0.0)
    return n


def _softmax(z: Array) -> Array:
    """Rows of the last axis; a row without a finite entry gives zeros."""
    top: Array = np.max(z, axis=-1, keepdims=True)
    p: Array = np.subtract(z, np.where(np.isfinite(top), top, 0), dtype=np.float32)
    np.exp(p, out=p)
    p[~np.isfinite(p)] = 0
    total: Array = np.sum(p, axis=-1, keepdims=True)
    p /= np.where(total > 0, total, 1)
    return p
