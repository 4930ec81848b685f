"""The mathematics of few bits: storage types, rounding, error feedback, corrections, Kashin's decomposition. Pure; float64; seeds are explicit.

storage      types as data, and how many bits each takes, all told
rounding     to nearest, and with the scales that lose least
codebook     k-means in one and two dimensions
feedback     rounding that sees the second moment of the input, and sweeps that mend it
correction   low rank beside a rounded weight
orthogonal   fast orthogonal matrices
kashin       two spread-out factors instead of one weight
pairs        one code for both of them
"""

from __future__ import annotations

from lrcompile.quantize.correction import alternating, correction
from lrcompile.quantize.feedback import fed_back, loss, rounded_by, sweep
from lrcompile.quantize.formats import Storage, names, storage
from lrcompile.quantize.orthogonal import Orthogonal, orthogonal
from lrcompile.quantize.rounding import Coded, plain, searched

__all__ = [
    "Coded",
    "Orthogonal",
    "Storage",
    "alternating",
    "correction",
    "fed_back",
    "loss",
    "names",
    "orthogonal",
    "plain",
    "rounded_by",
    "searched",
    "storage",
    "sweep",
]
