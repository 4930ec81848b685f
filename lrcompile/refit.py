"""Refit: factors in graph order, each group fitted to what the dense model gives on the inputs that the compressed part really makes.

With z the dense model's input of a site, x what reaches it behind the groups that are compressed already, and both centred where a
bias can absorb the means, the product x What is fitted to a target between two worlds:

    M  = W + s (C + ridge)^-1 (D - C) W,      C = E[x x^T],   D = E[x z^T],   ridge = r diag C,   s = n / (2 n + 8 K)
    b* = b + ((1 - s) E[x] + s E[z]) W - E[x] M

x M + b* is the best linear guess, s = 1, of the dense output z W + b, or the weight as it is, s = 0. The ridge pulls towards W, not
towards nothing: where x shows little, little is corrected. A factorization sees M, b* and
the statistics of x in the place of W, b and those of z: it need not know. In a chain (up and down; value and output) only
the last weight is refitted: the others are cut, not fitted.

Dense and compressed activations are carried part by part (`walk`, `carrier`): two to three runs of the model in all, whatever its depth.
Source: SVD-LLM v2, MPIFA and SparseGPT refit likewise; half-way targets measured best (docs/accuracy.md).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from lrcompile.calibrate import Tap, blocks_of, rows_of, shrinkage_of, shrunk, tap_of
from lrcompile.carrier import Carrier, read_all
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import masks_of
from lrcompile.interfaces import Array, Factorization, StatisticsSource
from lrcompile.oracle import Reconstruction
from lrcompile.progress import Progress, silent
from lrcompile.records import Decision, Group, InputStatistics, Plan, Site, Source
from lrcompile.store import new_folder, open_array, remove_folder
from lrcompile.walk import CHAINS, Stage, stages_of, watched
from lrcompile.weights import ModelWeights

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feed, Feeds

logger = logging.getLogger(__name__)

SHARE = 0.5  # s, of many samples: measured best on MiniLM and SmolLM2
_ENOUGH = 4  # rows a dimension at which half of that is left: of fewer the correction learns their noise
_RIDGE = 1.0  # r: an input as loud as its own noise is half corrected
_LEAST = 1e-9


def refit(
    source: Source,
    plan: Plan,
    groups: Mapping[str, Group],
    weights: ModelWeights,
    statistics: StatisticsSource,
    methods: Mapping[str, Factorization],
    feeds: Feeds,
    *,
    child: Child,
    target: str,
    scratch: Path,
    seed: int,
    progress: Progress = silent,
) -> tuple[FactorSet, ...]:
    """Factors of every decision that rewrites, in the plan's order. Raises PluginError when a factorization broke its claim."""
    walking = tuple(d for d in plan.rewritten if _walks(groups[d.group]))
    plain = tuple(d for d in plan.rewritten if d not in walking)
    sets = list(factorize(replace(plan, decisions=plain), groups, weights, statistics, methods, seed))
    stages = stages_of(source.model, [groups[d.group] for d in walking])
    walk = Walk(source, stages, statistics, feeds, child, target, scratch, progress)
    walk.put(sets)
    known = "refit-3" + source.key + feeds.key + target + repr((SHARE, _RIDGE)) + _forms(plain)
    by_group = {d.group: d for d in walking}
    for index, stage in enumerate(stages):
        decisions = tuple(replace(by_group[g.name], bound=False) for g in stage.groups)
        live = LiveStatistics(walk, index, hashlib.sha256(known.encode()).hexdigest())
        part = replace(plan, decisions=decisions)
        corrects = {d.group for d in decisions if methods[d.method].needs_data or d.storage is not None}
        centred = {s.name for g in stage.groups if g.name in corrects for s in _centred(g)}
        made = factorize(
            part,
            groups,
            LiveWeights(weights, live, stage, centred),
            live,
            methods,
            seed,
            measured_by=(weights, statistics),
        )
        walk.put(made)
        sets += made
        known += _forms(decisions)
        progress("refit", index + 1, len(stages))
    walk.close()
    order = {d.group: i for i, d in enumerate(plan.rewritten)}
    return tuple(sorted(sets, key=lambda s: order[s.decision.group]))


def _walks(group: Group) -> bool:
    """Whether a group has a place in the graph's order: one with readers at several depths has not, nor has one inside a body."""
    return group.kind not in ("shared", "tied") and all(
        s.path == "" and s.kind == "linear" for s in group.sites
    )


def _forms(decisions: Sequence[Decision]) -> str:
    return repr([(d.group, d.method, d.rank, d.structure, d.storage, d.activations) for d in decisions])


def _centred(group: Group) -> tuple[Site, ...]:
    """The sites whose bias a factorization that looks at data corrects: of weights that share factors all have one, or none does."""
    biased = tuple(s for s in group.sites if s.bias is not None)
    return biased if group.kind not in ("qkv", "gate_up") or len(biased) == len(group.sites) else ()


class Walk:
    """Dense and compressed activations at the stage that was last asked for, and the moments of what is watched there."""

    def __init__(
        self, source: Source, stages: Sequence[Stage], statistics: StatisticsSource, feeds: Feeds, child: Child,
        target: str, scratch: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self.stages, self.statistics = stages, statistics
        self._source, self._feeds, self._child = source, feeds, child
        self._compressed = Reconstruction(source.model)
        self._folder = new_folder(scratch / "refit")
        self._dense = Carrier(feeds, child, target, self._folder / "dense")
        self._live = Carrier(feeds, child, target, self._folder / "live")
        self._at = -1
        self._lock = threading.Lock()
        self._broken = False
        self._moments: dict[Tap, Path] = {}

    def put(self, sets: Sequence[FactorSet]) -> None:
        """These groups are compressed from here on."""
        self._compressed.put(sets)

    def moments(self, index: int, tap: Tap) -> Mapping[str, Array]:
        """Running sums of a value that stage `index` reads; goes there first. A stage that nobody asks about costs nothing."""
        with self._lock:  # of two groups that are factorized side by side one goes, the other waits
            if self._broken:  # half-made sums must not become factors in the cache
                raise RuntimeError("the walk ended in another thread")
            self._broken = True
            while self._at < index:
                self._at += 1
                self._go(self.stages[self._at], last=self._at == index)
            self._broken = False
        return _sums(self._moments[tap], tap)

    def _go(self, stage: Stage, last: bool) -> None:
        taps = {tap_of(s): s for g in stage.groups for s in g.sites}
        inner = [s.data.name or "" for g in stage.groups for s in g.sites if s not in watched(g)]
        for carrier, model in ((self._dense, self._source.model), (self._live, self._compressed.model)):
            carrier.advance(model, stage.frontier)
            if last and inner:
                carrier.compute(model, inner)
        self._moments = {}
        if not last:
            return
        folder = new_folder(self._folder / f"moments-{self._at}")
        self._moments = {tap: new_folder(folder / str(i)) for i, tap in enumerate(taps)}
        names = [tap.value for tap in taps]
        for index, feed in enumerate(self._feeds):
            fed = {n: a for n, a in feed.items() if n in names or "mask" in n.lower() or "past" in n.lower()}
            self._child.call(
                "lrcompile.refit:watch", fed, {t: str(p) for t, p in self._moments.items()},
                self._dense.files(index, names), self._live.files(index, names),
            )  # fmt: skip

    def close(self) -> None:
        remove_folder(self._folder)


def watch(
    feed: Feed,
    taps: Mapping[Tap, str],
    dense: Mapping[str, tuple[str, str]],
    live: Mapping[str, tuple[str, str]],
) -> None:
    """Runs in the child: one feed's share of every moment."""
    masks = masks_of(feed)
    before, after = {**feed, **read_all(dense)}, {**feed, **read_all(live)}
    for tap, folder in taps.items():
        sums = _sums(Path(folder), tap)
        Z, X = rows_of(before[tap.value], tap, masks), rows_of(after[tap.value], tap, masks)
        for z, x in zip(blocks_of(Z), blocks_of(X), strict=True):
            finite = np.isfinite(x).all(axis=1) & np.isfinite(z).all(axis=1)
            z, x = z[finite], x[finite]
            sums["second"] += x.T @ x
            sums["cross"] += x.T @ z
            sums["mean"] += x.sum(axis=0)
            sums["dense_mean"] += z.sum(axis=0)
            sums["count"] += len(x)


def _sums(folder: Path, tap: Tap) -> dict[str, Array]:
    K = tap.size
    shapes = {"second": (K, K), "cross": (K, K), "mean": (K,), "dense_mean": (K,), "count": (1,)}
    return {name: open_array(folder / name, shape) for name, shape in shapes.items()}


class LiveStatistics:
    """The `interfaces.StatisticsSource` of one stage: of what it reads behind the compressed part."""

    def __init__(self, walk: Walk, index: int, key: str) -> None:
        self._walk, self._index, self._key = walk, index, key
        self._sites = {s.name for g in walk.stages[index].groups for s in g.sites}

    def of(self, site: Site) -> InputStatistics | None:
        stored = self._walk.statistics.of(site)
        if site.name not in self._sites or stored is None or stored.second is None:
            return stored
        tap = tap_of(site)
        sums = self._walk.moments(self._index, tap)
        count = int(sums["count"][0])
        if count == 0:
            return stored
        second = sums["second"] / count
        spread = float(np.trace(second)) / tap.size or 1.0
        return InputStatistics(
            count, shrunk(second, count, spread), sums["mean"] / count, shrinkage=shrinkage_of(count, tap.size),
            cross=shrunk(sums["cross"] / count, count, spread), dense_mean=sums["dense_mean"] / count,
            reaction=stored.reaction, low=stored.low, high=stored.high,
        )  # fmt: skip

    def key(self, site: Site) -> str:
        return f"live-{self._key}-{self._walk.statistics.key(site)}"


class LiveWeights(ModelWeights):
    """M and b* in the place of W and b."""

    def __init__(
        self, dense: ModelWeights, live: LiveStatistics, stage: Stage, centred: Collection[str]
    ) -> None:
        """centred: sites whose b* will be written back; the others get the M that is best with b as it is."""
        super().__init__(dense.cache, dense.opset)
        self._centred = centred
        self._dense, self._live = dense, live
        self._target = threading.local()  # each thread's last M
        self._fitted = {s.name for g in stage.groups for s in (g.sites[-1:] if g.kind in CHAINS else g.sites)}

    def matrix(self, site: Site) -> Array:
        W = self._dense.matrix(site)
        known = self._live.of(site) if site.name in self._fitted else None
        if known is None or known.cross is None:
            return W
        last: tuple[str, Array] | None = getattr(self._target, "last", None)
        if last is None or last[0] != site.name:
            self._target.last = last = site.name, _target(W, known, site.name in self._centred)
        return last[1]

    def bias(self, site: Site) -> Array | None:
        b = self._dense.bias(site)
        known = (
            self._live.of(site)
            if b is not None and site.name in self._fitted and site.name in self._centred
            else None
        )
        if known is None or known.cross is None:
            return b
        assert b is not None and known.mean is not None and known.dense_mean is not None
        share = _share(known)
        between = (1 - share) * known.mean + share * known.dense_mean
        moved: Array = b + between @ self._dense.matrix(site) - known.mean @ self.matrix(site)
        return moved

    def key(self, site: Site) -> str:
        live = f"{self._live.key(site)}{site.name in self._centred}" if site.name in self._fitted else ""
        return self._dense.key(site) + live


def _share(known: InputStatistics) -> float:
    assert known.second is not None
    return SHARE * known.count / (known.count + _ENOUGH * len(known.second))


def _target(W: Array, known: InputStatistics, centred: bool) -> Array:
    """M (K, N)."""
    assert known.second is not None and known.cross is not None
    C, D = known.second, known.cross
    if centred:
        assert known.mean is not None and known.dense_mean is not None
        C = known.centred
        D = D - (1.0 - known.shrinkage) * known.mean[:, None] * known.dense_mean
    ridged = C.copy()
    diagonal = np.diagonal(C)
    ridged[np.diag_indices(len(C))] += _RIDGE * np.maximum(diagonal, _LEAST * float(diagonal.max()))
    moved = scipy.linalg.cho_solve(
        scipy.linalg.cho_factor(ridged, lower=True, check_finite=False), (D - C) @ W
    )
    made: Array = W + _share(known) * moved
    made.flags.writeable = False
    return made
