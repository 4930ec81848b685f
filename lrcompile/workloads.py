"""What `bench` runs: shapes that a user asks for, each with the values of the model's free dimensions. Pure.

``--shape`` names inputs until one comes a second time: there another setting begins. ``--batches 1,8`` gives axis 0 these lengths.
``--prefill N`` and ``--decode N`` are for decoders, models that read ids (batch, sequence) and a cache (batch, .., past, ..): N tokens
with an empty cache, and one token with a cache of N.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lrcompile.errors import UsageError
from lrcompile.feeds import Feed, Input
from lrcompile.shapes import dims_of, parse_ranges, written


@dataclass(frozen=True, slots=True)
class Workload:
    """A setting to run a model in. dims: values of its free dimensions. unit: what throughput counts, ``row``, ``token`` or ``run``."""

    name: str
    dims: Mapping[str, int]
    unit: str = "row"

    def count(self, feed: Feed) -> int:
        """How many of these units a run on this feed has: rows are the length of axis 0, tokens are ids."""
        arrays = [a for a in feed.values() if a.ndim > 0]
        if self.unit == "token":
            return next(a.size for n, a in feed.items() if _is_ids(n) and a.ndim == 2)
        return int(arrays[0].shape[0]) if arrays and self.unit == "row" else 1


def numbers(flag: str, text: str | None) -> tuple[int, ...]:
    """``1,8`` as numbers. Raises UsageError."""
    parts = [p.strip() for p in (text or "").split(",") if text]
    if not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise UsageError(f"--{flag} {text}: give numbers above 0 with commas between, such as 1,8")
    return tuple(map(int, parts))


def workloads_of(
    inputs: Sequence[Input],
    *,
    shapes: Sequence[str] = (),
    batches: Sequence[int] = (),
    prefill: Sequence[int] = (),
    decode: Sequence[int] = (),
) -> tuple[Workload, ...]:
    """Every setting asked for; each one at each batch. Raises UsageError where the model has no such axis."""
    settings = [Workload(text, dims) for text, dims in _settings(shapes, inputs)]
    if prefill or decode:
        batch, sequence, past, total = _decoder(inputs)
        for name, lengths in (("prefill", prefill), ("decode", decode)):
            for n in lengths:
                fresh, held = (n, 0) if name == "prefill" else (1, n)
                dims = {sequence: fresh, past: held, **({total: fresh + held} if total else {})}
                settings.append(Workload(f"{name} {n}", {batch: 1, **dims} if batch else dims, "token"))
    if not batches:
        return tuple(settings)
    axis = _batch_axis(inputs)
    return tuple(
        Workload(f"{w.name}, batch {b}".removeprefix(", "), {**w.dims, axis: b}, w.unit)
        for w in settings or [Workload("", {})]
        for b in batches
    )


def _settings(texts: Sequence[str], inputs: Sequence[Input]) -> Iterable[tuple[str, Mapping[str, int]]]:
    settings: list[dict[str, tuple[int, ...]]] = []
    for text in texts:
        try:
            ranges = parse_ranges([text])
        except ValueError as error:
            raise UsageError(f"--shape {error}") from error
        named = {r.input: r.usual for r in ranges}
        if not settings or settings[-1].keys() & named.keys():
            settings.append({})
        settings[-1] |= named
    for setting in settings:
        yield written(setting), dims_of(setting, inputs)


def _batch_axis(inputs: Sequence[Input]) -> str:
    free = Counter(name for i in inputs if i.shape and (name := i.free(0)) is not None)
    if not free:
        raise UsageError("--batches: axis 0 of every input has a fixed length")
    return free.most_common(1)[0][0]


def _decoder(inputs: Sequence[Input]) -> tuple[str | None, str, str, str | None]:
    """Names of the free dimensions: batch, sequence, past, and past + sequence where that one is free by itself."""
    ids = next((i for i in inputs if _is_ids(i.name) and i.shape is not None and len(i.shape) == 2), None)
    cache = next(
        (i for i in inputs if "past" in i.name.lower() and i.shape is not None and len(i.shape) == 4), None
    )
    if ids is None or cache is None:
        raise UsageError("--prefill and --decode: the model has no cache, or reads no ids: give --shape")
    sequence, past = ids.free(1), next(filter(None, map(cache.free, (2, 1, 3))), None)
    if sequence is None or past is None:
        raise UsageError("--prefill and --decode: the model was exported for one length of sequence or cache")
    mask = next(
        (i for i in inputs if "mask" in i.name.lower() and i.shape is not None and len(i.shape) == 2), None
    )
    total = mask.free(1) if mask is not None else None
    if total is not None and (total == sequence or "+" in total):
        total = None
    return ids.free(0), sequence, past, total


def _is_ids(name: str) -> bool:
    return name.lower().endswith(("input_ids", "ids")) and "position" not in name.lower()
