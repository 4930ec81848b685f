"""Shapes of inputs as people write them: ``x:1x64`` (trtexec) or ``x:[1,64]`` (Polygraphy), several with commas between. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lrcompile.errors import UsageError
from lrcompile.feeds import Input
from lrcompile.records import ShapeRange

_SHAPE = r"\[[\d,\s]*\]|\d+(?:x\d+)*"
_HOW = "write INPUT:1x64 or INPUT:[1,64]; a range is INPUT:1x8,1x64,8x64, the smallest, the usual and the largest"


def parse_ranges(texts: Sequence[str]) -> tuple[ShapeRange, ...]:
    """Each input's shape, or its smallest, usual and largest. Raises ValueError."""
    found: dict[str, ShapeRange] = {}
    for text in texts:
        for part in re.split(rf",(?=\s*[^,\[\]]+?:(?:{_SHAPE}))", text):
            name, _, shapes = part.strip().rpartition(":")
            if not name or re.fullmatch(rf"(?:{_SHAPE})(?:,\s*(?:{_SHAPE}))*", shapes) is None:
                raise ValueError(f"{text!r} is no shape: {_HOW}")
            several = [_numbers(s) for s in re.findall(_SHAPE, shapes)]
            if len(several) not in (1, 3) or len({len(s) for s in several}) > 1:
                raise ValueError(f"{text!r} is no range of shapes: {_HOW}")
            least, usual, most = several * 3 if len(several) == 1 else several
            if not all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
                raise ValueError(f"{text!r}: the smallest, the usual and the largest shape must rise")
            found[name] = ShapeRange(name, least, usual, most)
    return tuple(found.values())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def dims_of(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[Input]) -> dict[str, int]:
    """The free dimensions of a model's inputs when these have the shapes given. Raises UsageError where they cannot."""
    known = {i.name: i for i in inputs}
    dims: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(
                f"--shape: the model has no input {name!r}; it reads {', '.join(known) or 'nothing'}"
            )
        given = known[name]
        if given.shape is None:
            raise UsageError(f"--shape: the model does not say which rank {name!r} has: give --data")
        if len(given.shape) != len(shape):
            raise UsageError(f"--shape: input {name!r} has {len(given.shape)} axes, not {len(shape)}")
        for axis, size in enumerate(shape):
            free = given.free(axis)
            if free is None:
                if given.shape[axis] != size:
                    raise UsageError(f"--shape: axis {axis} of {name!r} is {given.shape[axis]}, not {size}")
            elif dims.setdefault(free, size) != size:
                raise UsageError(f"--shape: {free!r} would be both {dims[free]} and {size}")
    return dims


def written(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Shapes as trtexec writes them: ``x:1x64, y:scalar``."""
    return ", ".join(f"{name}:{'x'.join(map(str, shape)) or 'scalar'}" for name, shape in shapes.items())
