"""Feeds: the data a model is calibrated on and judged by, from files, functions, lists, or drawn from the graph.

``--data`` is a ``.npz`` (arrays of an input's rank are cut along axis 0 into batches; with one axis more, an entry is a
feed), a folder of ``.npz`` (a feed each), ``file.py[:load_data]`` (a function that yields feeds), or feeds in memory.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from lrcompile.errors import UsageError
from lrcompile.graph import dims, tensor_of
from lrcompile.interfaces import Array
from lrcompile.progress import Progress
from lrcompile.store import load_function, read_npz

Feed = Mapping[str, Array]
Data = str | Path | Iterable[Feed] | Callable[[], Iterable[Feed]]

# Through these an integer input is still the same ids when it reaches a Gather.
_ID_CARRIERS = frozenset(
    {
        "Cast",
        "Reshape",
        "Unsqueeze",
        "Squeeze",
        "Identity",
        "Transpose",
        "Slice",
        "Flatten",
        "Expand",
        "Concat",
    }
)


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input that must be fed: name, numpy type, and a shape of numbers, symbols or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def free(self, axis: int) -> str | None:
        """What a dimension without a fixed length is called; None: it has one."""
        assert self.shape is not None
        dim = self.shape[axis]
        return None if isinstance(dim, int) else dim if dim is not None else f"{self.name}#{axis}"


@dataclass(frozen=True, slots=True)
class Feeds:
    """Feeds that can be read again and again. key: SHA-256 of their contents. origin: what a report calls them."""

    open: Callable[[], Iterable[Feed]] = field(repr=False)
    count: int
    key: str
    origin: str
    start: int = 0
    note: str = ""  # for the report: what was taken from the user's data

    def __iter__(self) -> Iterator[Feed]:
        return iter(itertools.islice(self.open(), self.start, self.start + self.count))

    def __len__(self) -> int:
        return self.count

    def watched(self, stage: str, progress: Progress) -> Feeds:
        """The same feeds; whoever goes through them is seen doing so."""

        def opened() -> Iterator[Feed]:
            for done, feed in enumerate(self):
                progress(stage, done, self.count)
                yield feed
            progress(stage, self.count, self.count)

        return replace(self, open=opened, start=0)

    def split(self) -> tuple[Feeds, Feeds]:
        """The first three quarters, and the last quarter (at least one feed), which is held out."""
        held = max(1, self.count // 4)
        if self.count < 2:
            raise UsageError(
                f"{self.origin} has one feed: give --verify-data, or at least two feeds, so that one can be held out"
            )
        kept = self.count - held
        return (
            Feeds(self.open, kept, f"{self.key}:first", self.origin, self.start),
            Feeds(self.open, held, f"{self.key}:last", f"last quarter of {self.origin}", self.start + kept),
        )


def inputs_of(model: ir.Model) -> tuple[Input, ...]:
    """The inputs that a caller must feed: no initializer stands behind them."""
    found = []
    for value in model.graph.inputs:
        if value.is_initializer() or value.dtype is None:
            continue
        shape = None
        if value.shape is not None:
            shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
        found.append(Input(value.name or "", np.dtype(value.dtype.numpy()), shape))
    return tuple(found)


def open_feeds(data: Data, inputs: Sequence[Input], batch: int = 8) -> Feeds:
    """Feeds from what a user gave. Raises UsageError naming the file, the input and what is wrong with it."""
    source, origin = _source(data, inputs, batch)
    known = {i.name: i for i in inputs}
    digest = hashlib.sha256()
    count = 0

    def checked() -> Iterator[Feed]:
        for index, feed in enumerate(source()):
            yield _checked(feed, known, f"{origin}, feed {index}")

    for feed in checked():
        count += 1
        for name in sorted(feed):
            array = feed[name]
            digest.update(repr((name, array.dtype.str, array.shape)).encode())
            digest.update(
                repr(array.tolist()).encode()
                if array.dtype.hasobject
                else np.ascontiguousarray(array).tobytes()
            )
    if count == 0:
        raise UsageError(f"{origin} holds no feed")
    return Feeds(checked, count, digest.hexdigest(), origin)


def _source(data: Data, inputs: Sequence[Input], batch: int) -> tuple[Callable[[], Iterable[Feed]], str]:
    if callable(data):
        return data, "the given function"
    if not isinstance(data, (str, Path)):
        feeds = list(data)
        return lambda: feeds, "the given feeds"
    text, _, function = str(data).partition(".py:")
    if function or str(data).endswith(".py"):
        make = load_function(Path(text + ".py" if function else text), function or "load_data")
        return make, Path(str(data)).name
    path = Path(data)
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise UsageError(f"{path} holds no .npz file")
        return lambda: (read_npz(f) for f in files), f"{path.name}/"
    if path.suffix != ".npz":
        raise UsageError(f"{path}: data is a .npz file, a folder of them, or file.py:function")
    return lambda: _cut(read_npz(path), inputs, batch, path), path.name


def _cut(arrays: Mapping[str, Array], inputs: Sequence[Input], batch: int, path: Path) -> Iterator[Feed]:
    """Cut stacked arrays into feeds of `batch` rows; arrays with one axis more than their input hold a feed an entry."""
    if not arrays:
        raise UsageError(f"{path} holds no array")
    ranks = {i.name: len(i.shape) for i in inputs if i.shape is not None}
    stacked = [n for n, a in arrays.items() if n in ranks and a.ndim == ranks[n] + 1]
    if stacked and len(stacked) == len(arrays):
        lengths = {len(a) for a in arrays.values()}
        if len(lengths) != 1:
            raise UsageError(f"{path}: its arrays hold different numbers of feeds: {sorted(lengths)}")
        for i in range(lengths.pop()):
            yield {n: a[i] for n, a in arrays.items()}
        return
    if stacked:
        raise UsageError(f"{path}: {stacked[0]} has one axis more than its input, other arrays have not")
    if any(a.ndim == 0 for a in arrays.values()):
        yield arrays
        return
    lengths = {len(a) for a in arrays.values()}
    if len(lengths) != 1:
        raise UsageError(f"{path}: its arrays differ along axis 0: {sorted(lengths)}")
    rows = lengths.pop()
    fixed = {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)}
    step = min(fixed) if len(fixed) == 1 else batch
    if step == 0 or rows == 0:
        yield arrays
        return
    for start in range(0, rows - rows % step if fixed else rows, step):
        yield {n: a[start : start + step] for n, a in arrays.items()}


def _checked(feed: Feed, known: Mapping[str, Input], where: str) -> Feed:
    if missing := sorted(set(known) - set(feed)):
        raise UsageError(
            f"{where}: input {missing[0]!r} is missing; the model reads {', '.join(known) or 'nothing'}"
        )
    if unknown := sorted(set(feed) - set(known)):
        raise UsageError(
            f"{where}: the model has no input {unknown[0]!r}; it reads {', '.join(known) or 'nothing'}"
        )
    return {name: _fit(np.asarray(feed[name]), known[name], where) for name in known}


def _fit(array: Array, want: Input, where: str) -> Array:
    if (
        array.dtype.kind == "V" and array.dtype.itemsize == want.dtype.itemsize
    ):  # what np.savez makes of bfloat16 and its like
        array = array.view(want.dtype)
    if array.dtype != want.dtype:
        if not np.can_cast(array.dtype, want.dtype, "safe"):
            raise UsageError(f"{where}: input {want.name!r} is {array.dtype}, the model reads {want.dtype}")
        array = array.astype(want.dtype)
    if want.shape is not None:
        bad = array.ndim != len(want.shape) or any(
            isinstance(w, int) and w != n for w, n in zip(want.shape, array.shape, strict=False)
        )
        if bad:
            raise UsageError(
                f"{where}: input {want.name!r} has shape {array.shape}, the model reads {want.shape}"
            )
    return array


def calibration_and_held_out(
    data: Data | None, verify_data: Data | None, inputs: Sequence[Input], batch: int
) -> tuple[Feeds | None, Feeds | None]:
    """The feeds to learn from and those to judge by: the last quarter of the data, when nothing else is given for that."""
    known = open_feeds(data, inputs, batch) if data is not None else None
    if verify_data is not None:
        return known, open_feeds(verify_data, inputs, batch)
    return known.split() if known is not None else (None, None)


# --- padding --------------------------------------------------------------------------------------------------------


def masks_of(feed: Mapping[str, Array]) -> list[Array]:
    """What says which rows are padding, (batch, sequence): inputs of two axes that are named so.

    A decoder's mask covers its past as well, (batch, past + sequence): there the last part is meant.
    """
    masks = [a for n, a in feed.items() if "mask" in n.lower() and a.ndim == 2]
    past = next((a.shape[-2] for n, a in feed.items() if "past" in n.lower() and a.ndim == 4), 0)
    return [m[:, past:] for m in masks]


def mask_over(array: Array, masks: Sequence[Array]) -> Array | None:
    """The mask whose shape the array's first two axes have."""
    return next((m.astype(bool) for m in masks if m.shape == array.shape[:2]), None)


# --- drawn from the graph -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Style:
    """One guess at what is legal. batch, length: of free axes, None: as in the user's first feed.

    integers: how those without a known bound are drawn; "copy": from the user's first feed.
    """

    batch: int | None
    length: int | None
    integers: Literal["random", "copy", "ones", "zeros"]

    @property
    def needs_data(self) -> bool:
        return self.batch is None or self.integers == "copy"


# From the usual to the last resort; the first one that the original accepts is used.
STYLES = (
    Style(2, 8, "random"),
    Style(2, 8, "copy"),
    Style(None, None, "random"),
    Style(None, None, "copy"),
    Style(2, 8, "ones"),
    Style(1, 8, "random"),
    Style(1, 1, "ones"),
    Style(2, 2, "ones"),
    Style(1, 1, "zeros"),
)


def draw(
    model: ir.Model, style: Style, seed: int, count: int, dims: Mapping[str, int], like: Feed | None = None
) -> Feeds:
    """Seeded feeds: floats normal, ids below the smallest table that they index, masks one, pasts empty.

    dims: values of symbolic dimensions. like: a feed of the user's, of which only shapes are taken, and integers without a known
    bound (style "copy"): such integers steer shapes or loops.
    """
    inputs = inputs_of(model)
    values = {v.name: v for v in model.graph.inputs}
    bounds = {i.name: _id_bound(values[i.name]) for i in inputs if i.dtype.kind in "iu"}
    sizes: dict[str, int] = dict(dims)

    def one(rng: np.random.Generator) -> Feed:
        return {i.name: _array(i, rng, style, sizes, bounds.get(i.name), like) for i in inputs}

    feeds = [one(np.random.default_rng((seed, n))) for n in range(count)]
    copied = [i.name for i in inputs if _copies(i, style, bounds.get(i.name), like)]
    note = (
        f"inputs.json: {', '.join(copied)} copied from the first feed of --data, because shapes or loops hang on it"
        if copied
        else ""
    )
    return Feeds(
        lambda: feeds, count, f"drawn:{seed}:{style}:{sorted(dims.items())}", f"{count} feeds drawn with seed {seed}", note=note
    )  # fmt: skip


def _copies(want: Input, style: Style, bound: int | None, like: Feed | None) -> bool:
    return like is not None and style.integers == "copy" and want.dtype.kind in "iu" and bound is None


def _array(
    want: Input,
    rng: np.random.Generator,
    style: Style,
    sizes: dict[str, int],
    bound: int | None,
    like: Feed | None,
) -> Array:
    if style.batch is None and like is not None:
        shape = like[want.name].shape
    else:
        shape = tuple(_length(d, axis, want, style, sizes) for axis, d in enumerate(want.shape or ()))
    if like is not None and _copies(want, style, bound, like):
        return like[want.name]
    return _values(want, shape, rng, style, bound).astype(want.dtype)


def _values(
    want: Input, shape: tuple[int, ...], rng: np.random.Generator, style: Style, bound: int | None
) -> Array:
    if want.dtype == np.bool_ or "mask" in want.name.lower():
        return np.ones(shape)
    if want.dtype.kind in "iu":
        if "position" in want.name.lower() and shape:
            return np.broadcast_to(np.arange(shape[-1]) % (bound or shape[-1] or 1), shape)
        if bound is None and style.integers in ("ones", "zeros"):
            return np.full(shape, 1 if style.integers == "ones" else 0)
        return np.asarray(rng.integers(0, max(3 if bound is None else bound, 1), shape))
    if want.dtype.kind in "OUS":
        return np.full(shape, "text", dtype=object)
    return np.asarray(rng.standard_normal(shape))


def _length(dim: int | str | None, axis: int, want: Input, style: Style, sizes: dict[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    name = dim if dim is not None else f"{want.name}#{axis}"
    if name not in sizes:
        terms = [t.strip() for t in name.split("+")]
        if len(terms) > 1:  # exporters write total lengths as sums
            sizes[name] = sum(int(t) if t.isdigit() else _length(t, axis, want, style, sizes) for t in terms)
        elif "past" in name.lower():
            sizes[name] = 0
        else:
            sizes[name] = (style.batch if axis == 0 else style.length) or 1
    return sizes[name]


def _id_bound(value: ir.Value) -> int | None:
    """Rows of the smallest constant table that this input's values index, None when they index none."""
    found: list[int] = []
    pending, seen = [value], {value}
    while pending and len(seen) < 256:
        at = pending.pop()
        for use in at.uses():
            node, index = use.node, use.idx
            if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
                size = _rows(
                    node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                )
                found += [size] if size is not None else []
            elif node.op_type in _ID_CARRIERS and (index == 0 or node.op_type == "Concat"):
                fresh = [v for v in node.outputs if v not in seen]
                seen.update(fresh)
                pending.extend(fresh)
    return min(found) if found else None


def _rows(table: ir.Value, axis: int) -> int | None:
    tensor = table.const_value if table.is_initializer() else tensor_of(table)
    if tensor is not None:
        shape = dims(tensor)
        return shape[axis] if -len(shape) <= axis < len(shape) else None
    if table.shape is None or not -len(table.shape) <= axis < len(table.shape):
        return None
    size = table.shape[axis]
    return size if isinstance(size, int) else None
