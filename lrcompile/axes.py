"""Axes of a value as products of parts, and what a Reshape makes of them.

    (batch, sequence, 384)  ->  (batch, sequence, 12, 32)        the part 384 splits into 12 (stride 32) and 32 (stride 1)
    (batch, 12, sequence, 32)  ->  (batch * 12, sequence, 32)    an axis of two parts

A part is a number, or a symbol where the file does not tell the number. Parts of role ``width`` are what a cut makes smaller: together
they count the columns of a site's weight, column = sum of (index * stride). Parts of role ``repeat`` are the copies of a head that
grouped queries read. Axes of length one have no parts. The entries of a shape (what Reshape and Expand are given) are such products too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Part:
    """A factor of an axis. size: a number, or any symbol. stride, site: of a width's parts, which columns of which site they count."""

    size: Hashable
    role: Literal["other", "width", "repeat"] = "other"
    stride: int = 0
    site: int = 0


Axis = tuple[Part, ...]
Axes = tuple[Axis, ...]


def length(n: Hashable) -> Axis:
    """An axis of n, which is not ours to cut."""
    return () if n == 1 else (Part(n),)


def number(axis: Axis) -> int | None:
    """The length in numbers, None where a symbol takes part."""
    sizes = [p.size for p in axis]
    return (
        math.prod(s for s in sizes if isinstance(s, int)) if all(isinstance(s, int) for s in sizes) else None
    )


def is_given(entry: Axis, n: int) -> bool:
    """Whether an entry of a shape is this very number, written down."""
    return entry == (Part(n),)


def ours(axis: Axis) -> Axis:
    """The parts that belong to a width or repeat its heads."""
    return tuple(p for p in axis if p.role != "other")


def is_cut(axis: Axis) -> bool:
    """Whether the length of this axis changes with the width: the innermost columns lie on it."""
    return any(p.role == "width" and p.stride == 1 for p in axis)


def innermost(axis: Axis) -> int:
    """How many columns, from the innermost on, lie on this axis one after the other: an upper bound of the size of a head."""
    run = 1
    for part in reversed(axis):
        if part.role != "width" or part.stride != run:
            break
        assert isinstance(part.size, int)
        run *= part.size
    return run


def regroup(axes: Axes, entries: Sequence[Axis]) -> Axes | None:
    """The axes after a Reshape to these entries, of which one may be -1; None where they do not tell what becomes of the width.

    Entries are matched with the parts from both ends. What is left in the middle is one entry, which takes all parts that are left, or
    holds nothing of ours.
    """
    parts = [p for axis in axes for p in axis]
    first, last = 0, len(entries)
    front: list[Axis] = []
    back: list[Axis] = []
    while first < last and not is_given(entries[first], -1):
        taken = _take(parts, entries[first], left=True)
        if taken is None:
            break
        front.append(taken)
        first += 1
    while first < last and not is_given(entries[last - 1], -1):
        taken = _take(parts, entries[last - 1], left=False)
        if taken is None:
            break
        back.insert(0, taken)
        last -= 1
    middle: list[Axis] = []
    if last - first == 1:
        middle = [tuple(parts)]
        if number(entries[first]) not in (None, -1) and number(middle[0]) not in (
            None,
            number(entries[first]),
        ):
            return None  # no legal graph
    elif last > first:
        if ours(tuple(parts)):
            return None
        middle = [(Part(object()),) if is_given(e, -1) else e for e in entries[first:last]]
    elif parts:
        return None
    return (*front, *middle, *back)


def _take(parts: list[Part], entry: Axis, *, left: bool) -> Axis | None:
    """Take the product `entry` off one end of the parts, splitting the last one taken where it must be; None leaves them as they are."""
    rest = list(parts)
    wanted = math.prod(p.size for p in entry if isinstance(p.size, int))
    symbols = Counter(p.size for p in entry if not isinstance(p.size, int))
    taken: list[Part] = []
    while wanted != 1 or symbols:
        if not rest:
            return None
        part = rest.pop(0 if left else -1)
        if not isinstance(part.size, int):
            if not symbols[part.size]:
                return None
            symbols -= Counter([part.size])
        elif part.size and wanted % part.size == 0:
            wanted //= part.size
        elif part.size and wanted and part.size % wanted == 0 and not symbols:
            outer, inner = _split(part, wanted if left else part.size // wanted)
            rest.insert(0 if left else len(rest), inner if left else outer)
            part, wanted = outer if left else inner, 1
        else:
            return None
        taken.insert(len(taken) if left else 0, part)
    parts[:] = rest
    return tuple(taken)


def _split(part: Part, outer: int) -> tuple[Part, Part]:
    """A part of a number's size as two: `outer` times what is left."""
    assert isinstance(part.size, int)
    inner = part.size // outer
    return replace(part, size=outer, stride=part.stride * inner), replace(part, size=inner)
