"""What a Conv's window sees, as rows: at each position of the output a vector x with y = x W, W (K, N) the kernel's matrix.

Positions of one picture are much alike, so only some of each are looked at, drawn by a fixed seed: memory and time grow neither with
the size of the pictures nor with how far their windows overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lrcompile.interfaces import Array
from lrcompile.records import Window

_POSITIONS = 256  # of a picture
_SEED = 0


def windows(x: Array, window: Window) -> Array:
    """x (batch, channels, *picture) -> (batch, channels, *output, *kernel), a view of the padded pictures."""
    sizes = x.shape[2:]
    extents = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    around = [(window.pads[i], window.pads[i + window.rank]) for i in range(window.rank)]
    if window.auto_pad:  # as many outputs as strides fit
        around = []
        for n, s, extent in zip(sizes, window.strides, extents, strict=True):
            total = max((-(-n // s) - 1) * s + extent - n, 0)
            less = total // 2
            around.append((less, total - less) if window.auto_pad == "SAME_UPPER" else (total - less, less))
    if any(before or after for before, after in around):
        x = np.pad(x, [(0, 0), (0, 0), *around])
    axes = tuple(range(2, 2 + window.rank))
    seen = sliding_window_view(x, tuple(extents), axes)
    steps = [slice(None, None, n) for n in (*window.strides, *window.dilations)]
    return seen[(slice(None), slice(None), *steps)]


def rows_of_windows(x: Array, window: Window, most: int = _POSITIONS) -> Iterator[Array]:
    """At most so many positions of each picture in turn: (positions, group, K)."""
    draw = np.random.default_rng(_SEED)
    for picture in windows(x, window):
        shape = picture.shape[1 : 1 + window.rank]
        count = math.prod(shape)
        chosen = np.sort(draw.choice(count, most, replace=False)) if count > most else np.arange(count)
        taken = np.moveaxis(picture, 0, window.rank)[
            np.unravel_index(chosen, shape)
        ]  # (positions, channels, *kernel)
        yield taken.reshape(len(chosen), window.group, -1)
