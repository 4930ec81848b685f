"""Calibrate: what the user's data does at the inputs of the sites, streamed into second moments on disk.

The original graph is cut down to the values that sites read ("taps"), run feed by feed in the child process, and the moments
grow there in float64, in files: memory does not grow with the data, nor with the number of sites.
Rows under an attention mask's zeros are left out where the mask covers the rows. A value that several sites read is tapped once.
Of a Conv the rows are what its window sees (`patches`), each group of channels by itself.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lrcompile.cost import is_large
from lrcompile.feeds import mask_over, masks_of
from lrcompile.interfaces import Array, BuildOptions, Engine
from lrcompile.patches import rows_of_windows
from lrcompile.progress import Progress, silent
from lrcompile.records import Finding, InputStatistics, Site, Step, Window
from lrcompile.store import new_folder, open_array, save_model

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feeds
    from lrcompile.store import Cache

logger = logging.getLogger(__name__)

_BLOCK = 4096  # rows turned to float64 at a time
_MOST_UNSEEN = 0.5  # of lookups that are expected to ask for rows that calibration never did
_WIDEST = 7168  # what a window may see: its second moment takes 400 MB


@dataclass(frozen=True, slots=True)
class Tap:
    """A value to watch. size: K for moments, V for ids. before: steps that bring the contracted axis last. window: of a Conv."""

    value: str
    lookup: bool
    size: int
    before: tuple[Step, ...]
    window: Window | None = None

    @property
    def order(self) -> tuple[object, ...]:
        return self.value, self.size, self.before, repr(self.window)


class StoredStatistics:
    """The `interfaces.StatisticsSource` over moments in the cache; each thread holds on to its last site's only."""

    def __init__(
        self, taps: Mapping[str, tuple[str, Tap]], load: Callable[[str], Mapping[str, Array]]
    ) -> None:
        self._taps = taps
        self._load = load
        self._kept = threading.local()

    def of(self, site: Site) -> InputStatistics | None:
        if site.name not in self._taps:
            return None
        key, tap = self._taps[site.name]
        last: tuple[str, InputStatistics] | None = getattr(self._kept, "last", None)
        if last is None or last[0] != key:
            self._kept.last = last = (key, _statistics(self._load(key), tap))
        return last[1]

    def key(self, site: Site) -> str:
        return self._taps[site.name][0] if site.name in self._taps else ""


def calibrate(
    model: ir.Model,
    finding: Finding,
    feeds: Feeds,
    source_key: str,
    *,
    target: str,
    child: Child,
    cache: Cache,
    progress: Progress = silent,
) -> StoredStatistics:
    """Statistics of every site in the main graph that can be taken. Cached: a killed run starts again where it was.

    source_key: hash of model and weights. target: the runtime target that runs the original.
    """
    taps = {s.name: tap_of(s) for s in finding.sites if s.refusal is None and s.path == "" and _is_watched(s)}
    prefix = hashlib.sha256(repr((source_key, feeds.key, target, "moments-5")).encode()).hexdigest()
    distinct = sorted(set(taps.values()), key=lambda t: t.order)
    keys = {tap: hashlib.sha256(repr((prefix, tap)).encode()).hexdigest() for tap in distinct}
    missing = [t for t in distinct if not cache.has(("moments", keys[t]))]
    if missing:
        logger.info("calibrating %d values on %d feeds", len(missing), len(feeds))
        with cache.scratch() as scratch:
            engine = None
            watched = {t.value for t in missing} - {v.name for v in model.graph.inputs}
            if watched:
                path = save_model(
                    _cut_to(model, watched), new_folder(scratch / "taps"), external=is_large(model) or None
                )
                engine = child.build(target, path, BuildOptions(target=target))
            for done, feed in enumerate(feeds):
                child.call("lrcompile.calibrate:accumulate", engine, feed, tuple(missing), str(scratch))
                progress("calibrate", done + 1, len(feeds))
            if engine is not None:
                engine.close()
            for index, tap in enumerate(missing):
                cache.remember(("moments", keys[tap]), lambda i=index, t=tap: _arrays(scratch, i, t))  # type: ignore[misc]
    return StoredStatistics(
        {name: (keys[t], t) for name, t in taps.items()}, lambda key: cache.remember(("moments", key), _gone)
    )


def accumulate(engine: Engine | None, feed: Mapping[str, Array], taps: Sequence[Tap], folder: str) -> None:
    """Runs in the child, beside the engine: one feed's share of every moment."""
    seen = dict(engine.run(feed)) if engine is not None else {}
    seen.update(feed)
    masks = masks_of(feed)
    for index, tap in enumerate(taps):
        arrays = _arrays(Path(folder), index, tap)
        if tap.window is not None:
            _add_windows(arrays, seen[tap.value], tap.window)
            continue
        rows = rows_of(seen[tap.value], tap, masks)
        if tap.lookup:
            ids = rows.astype(np.int64)
            ids = ids[(ids >= -tap.size) & (ids < tap.size)] % tap.size
            arrays["frequencies"] += np.bincount(ids, minlength=tap.size)
            arrays["count"] += len(ids)
            continue
        for block in blocks_of(rows):
            block = block[np.isfinite(block).all(axis=1)]
            arrays["second"] += block.T @ block
            arrays["mean"] += block.sum(axis=0)
            arrays["count"] += len(block)
            if len(block):
                np.minimum(arrays["low"], block.min(axis=0), out=arrays["low"])
                np.maximum(arrays["high"], block.max(axis=0), out=arrays["high"])


def _add_windows(arrays: Mapping[str, Array], pictures: Array, window: Window) -> None:
    """second (g, K, K), mean (g, K)."""
    for rows in rows_of_windows(pictures, window):
        for block in blocks_of(rows[np.isfinite(rows).all(axis=(1, 2))]):
            groups = block.transpose(1, 0, 2)
            arrays["second"] += groups.transpose(0, 2, 1) @ groups
            arrays["mean"] += block.sum(axis=0)
            arrays["count"] += len(block)


def rows_of(array: Array, tap: Tap, masks: Sequence[Array]) -> Array:
    """A tapped value as rows of what is contracted, (rows, K), or as ids (rows,); without those that a mask covers."""
    # (batch, K) may look like a mask's shape by chance
    by_row = tap.lookup or (array.ndim > 2 and not tap.before)
    keep = mask_over(array, masks) if by_row else None
    if tap.lookup:
        return (array[keep] if keep is not None else array).reshape(-1)
    for kind, argument in tap.before:
        array = array.transpose(argument) if kind == "transpose" else _reshape(array, argument)
    return (array[keep] if keep is not None else array).reshape(-1, tap.size)


def blocks_of(rows: Array) -> Iterator[Array]:
    """The rows in float64, some thousand at a time."""
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK].astype(np.float64)


def _reshape(array: Array, shape: tuple[int, ...]) -> Array:
    return array.reshape(tuple(array.shape[i] if n == 0 else n for i, n in enumerate(shape)))


def tap_of(site: Site) -> Tap:
    """What is watched for a site."""
    assert site.wiring is not None
    return Tap(site.data.name or "", site.kind == "lookup", site.K, site.wiring.before, site.window)


def _is_watched(site: Site) -> bool:
    if site.kind == "conv" and site.K > _WIDEST:
        logger.warning("%s: its window of %d numbers is too wide for a second moment", site.name, site.K)
        return False
    return site.kind in ("linear", "lookup", "conv")


def _cut_to(model: ir.Model, values: set[str]) -> ir.Model:
    """A copy whose outputs are the watched values; the runtime drops what they do not need."""
    copy = model.clone()
    produced = {v.name or "": v for node in copy.graph for v in node.outputs}
    produced |= dict(copy.graph.initializers)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(produced[name] for name in sorted(values))
    return copy


def _arrays(folder: Path, index: int, tap: Tap) -> dict[str, Array]:
    """The running sums of one tap, mapped from their files."""
    shapes: dict[str, tuple[int, ...]] = {"count": (1,)}
    lead = (tap.window.group,) if tap.window is not None else ()
    shapes |= (
        {"frequencies": (tap.size,)}
        if tap.lookup
        else {"second": (*lead, tap.size, tap.size), "mean": (*lead, tap.size)}
    )
    if not tap.lookup and tap.window is None:
        shapes |= {"low": (tap.size,), "high": (tap.size,)}  # of 0 and all numbers seen
    return {name: open_array(folder / f"{index}.{name}", shape) for name, shape in shapes.items()}


def _statistics(sums: Mapping[str, Array], tap: Tap) -> InputStatistics:
    count = int(sums["count"][0])
    if tap.lookup:
        # Good and Turing: the share of ids seen once is how often the next will be one that was never seen
        once = np.count_nonzero(sums["frequencies"] == 1) / max(count, 1)
        shrinkage = max(shrinkage_of(count, tap.size), min(float(once), _MOST_UNSEEN))
        share = sums["frequencies"] / max(count, 1)
        return InputStatistics(
            count, frequencies=(1 - shrinkage) * share + shrinkage / tap.size, shrinkage=shrinkage
        )
    second, mean = sums["second"] / max(count, 1), sums["mean"] / max(count, 1)
    if tap.window is None:
        second = shrunk(second, count)
    elif tap.window.group == 1:
        second, mean = shrunk(second[0], count), mean[0]
    else:
        second = np.stack([shrunk(part, count) for part in second])
    return InputStatistics(
        count,
        second,
        mean,
        shrinkage=shrinkage_of(count, tap.size),
        low=sums.get("low"),
        high=sums.get("high"),
    )


def shrinkage_of(count: int, size: int) -> float:
    """K / (K + 100 n): 1e-4 at a hundred rows a dimension, a half at a hundredth of a row."""
    return size / (size + 100.0 * count)


def shrunk(second: Array, count: int, spread: float | None = None) -> Array:
    """(1 - a) times a moment plus a times the mean eigenvalue (`spread`, its own by default) on the diagonal."""
    size = len(second)
    shrinkage = shrinkage_of(count, size)
    if spread is None:
        spread = float(np.trace(second)) / size or 1.0
    made: Array = (1 - shrinkage) * second
    made[np.diag_indices(size)] += shrinkage * spread
    return made


def _gone() -> Mapping[str, Array]:
    raise RuntimeError("calibration moments vanished from the cache while they were in use")
