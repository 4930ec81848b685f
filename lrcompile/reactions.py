"""Reactions: how the model's outputs feel an error of each weight, from derivatives pulled back through the model.

With probes v such that E |v^T dz|^2 is how far the outputs move (`gradients.default_cotangents`) and g the derivative of v^T z with
respect to what a site gives, an error E of its weight moves v^T z, over one sequence with inputs X and derivatives G, by <X^T G, E>. Two
simplifications of its second moment are each known to be too bold alone, so both are used: rows that err independently,

    C = E[x x^T],  G0 = E[g g^T],

and sequences whose errors add up, D = X^T G, A = E[D D^T], B = E[D^T D] (x centred where a bias absorbs the mean). Traces made equal,

    C' = (1 - a) C + a A tr C / tr A,     output = tr B ((1 - a) G0 / tr G0 + a B / tr B) / tr C

a grows to a half with the number of sequences that are seen: of few of them B knows few directions, and where a would be below a
tenth A and B, which cost most, are left out.
Of a Conv rows are positions, which err independently: of a weight that is met at thousands of positions of one picture D would cost
far more. Its input side is what its window sees, known from calibration, so only derivatives are gathered.
Sources: K-FAC (Martens and Grosse 2015), Shampoo (Gupta et al. 2018); the blend is measured (docs/accuracy.md).
Needs torch, and operators that `gradients` covers; where it has neither, plans go by measured sensitivity alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrcompile.calibrate import blocks_of
from lrcompile.errors import BuildError
from lrcompile.feeds import masks_of
from lrcompile.interfaces import Array, StatisticsSource
from lrcompile.progress import Progress, silent
from lrcompile.records import Finding, InputStatistics, Reaction, Refusal, Site, Source
from lrcompile.sensitivity import judged_outputs
from lrcompile.store import new_folder, open_array, save_model

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feed, Feeds
    from lrcompile.store import Cache

logger = logging.getLogger(__name__)

_SHARE = 0.25  # of the calibration feeds; forward and backward together cost three runs of them
_PROBES = 2
_WIDEST = 8192  # outputs of a site; a head over a vocabulary has too many for a square matrix
# Added to the diagonal of `output`, relative to its mean: so much where the derivatives seen are as many as outputs.
_RIDGE, _RIDGES = 0.15, (0.01, 0.3)
_LEAST_SHARE = 0.1
_PER_OUTPUT = 0.25  # sequences per output of a site at which a is a quarter


@dataclass(frozen=True, slots=True)
class Watch:
    """A site whose derivative is wanted. x, y: names of its values. scale: of its product (Gemm's alpha). share: a.

    pictures: y is (batch, N, ..), of a Conv.
    """

    x: str
    y: str
    K: int
    N: int
    centred: bool
    scale: float
    share: float = 0.0
    pictures: bool = False


class ReactingStatistics:
    """Calibration's statistics with the reactions of the sites for which they are known."""

    def __init__(
        self,
        stored: StatisticsSource,
        cache: Cache,
        keys: Mapping[str, tuple[str, str]],
        shares: Mapping[str, float],
    ) -> None:
        self._stored, self._cache, self._keys, self._shares = stored, cache, keys, shares

    def of(self, site: Site) -> InputStatistics | None:
        known = self._stored.of(site)
        if known is None or site.name not in self._keys or known.second is None:
            return known
        sums = self._cache.remember(self._keys[site.name], _gone)
        return replace(known, reaction=_reaction(sums, self._shares[site.name], known))

    def key(self, site: Site) -> str:
        return self._stored.key(site) + "".join(self._keys.get(site.name, ()))


def reacting(
    source: Source,
    finding: Finding,
    statistics: StatisticsSource,
    feeds: Feeds,
    *,
    child: Child,
    cache: Cache,
    seed: int,
    progress: Progress = silent,
) -> tuple[StatisticsSource, str]:
    """The statistics with reactions, or as they are and a sentence why. Cached under the model's and the data's hash."""
    few = _few(feeds)
    sequences = _PROBES * sum(_sequences(feed) for feed in few)
    watches = {s.name: w for s in finding.sites if (w := _watch(s, sequences)) is not None}
    outputs = judged_outputs([v.name or "" for v in source.model.graph.outputs])
    known = repr((source.key, feeds.key, seed, _SHARE, _PROBES, outputs, "reactions-3"))
    keys = {
        name: ("reaction", hashlib.sha256((known + repr(w)).encode()).hexdigest())
        for name, w in watches.items()
    }
    missing = tuple(name for name in watches if not cache.has(keys[name]))
    if missing:
        with cache.scratch() as scratch:
            path = save_model(source.model, new_folder(scratch / "model"), external=True)
            for done, feed in enumerate(few):
                try:
                    told = child.call(
                        "lrcompile.reactions:accumulate", str(path), feed, outputs, tuple(watches[n] for n in missing),
                        str(scratch), (seed, done),
                    )  # fmt: skip
                except BuildError as error:  # derivatives take more memory and time than the model alone
                    told = str(error)
                if told:
                    told = f"plans go by measured sensitivity alone: {told}"
                    logger.info(told)
                    return statistics, told
                progress("reactions", done + 1, len(few))
            for index, name in enumerate(missing):
                cache.remember(keys[name], partial(_sums, scratch, index, watches[name]))
    return ReactingStatistics(statistics, cache, keys, {n: w.share for n, w in watches.items()}), ""


def _sequences(feed: Feed) -> int:
    """The length of the first axis of the inputs that have two axes and more; one where they disagree."""
    lengths = {len(a) for a in feed.values() if a.ndim > 1 and a.size}
    return lengths.pop() if len(lengths) == 1 else 1


def _watch(site: Site, sequences: int) -> Watch | None:
    """What is watched of a site that reads rows or pictures as they are; None of all others."""
    if site.refusal is not None or site.kind not in ("linear", "conv") or site.path or site.wiring is None:
        return None
    if site.wiring.before or site.wiring.after or site.N > _WIDEST:
        return None
    y = site.node.outputs[0].name or ""
    if site.kind == "conv":
        if site.window is None or site.window.group > 1:
            return None
        return Watch(site.data.name or "", y, site.K, site.N, site.bias is not None, 1.0, pictures=True)
    share = 0.5 * sequences / (sequences + _PER_OUTPUT * site.N)
    return Watch(
        site.data.name or "", y, site.K, site.N, site.bias is not None, site.wiring.scale,
        share if share >= _LEAST_SHARE else 0.0,
    )  # fmt: skip


def _few(feeds: Feeds) -> list[Feed]:
    """Some feeds from all over the data."""
    wanted = max(1, round(_SHARE * len(feeds)))
    places = {round((i + 0.5) * len(feeds) / wanted - 0.5) for i in range(wanted)}
    return [feed for i, feed in enumerate(feeds) if i in places]


def accumulate(
    path: str,
    feed: Feed,
    outputs: Sequence[str],
    watches: Sequence[Watch],
    folder: str,
    seed: tuple[int, int],
) -> str:
    """Runs in the child: one feed's share of every sum. A sentence when derivatives cannot be had."""
    import onnx_ir as ir

    from lrcompile.gradients import Differentiable, default_cotangents, refusal

    model = ir.load(path)
    if (no := refusal(model)) is not None:
        return no.reason
    import torch

    torch.set_num_threads(1)
    mask = next(iter(masks_of(feed)), None)

    def consume(number: int, pairs: Sequence[tuple[Array, Array]]) -> None:
        for index, (watch, (x, g)) in enumerate(zip(watches, pairs, strict=True)):
            _add(_sums(Path(folder), index, watch), watch, x, g * np.float32(watch.scale))

    draw = partial(default_cotangents, count=_PROBES, seed=seed[0] * 100_003 + seed[1], mask=mask)
    answer: Refusal | None = Differentiable(model, [(w.x, w.y) for w in watches]).pull(
        feed, outputs, draw, consume
    )
    return answer.reason if answer is not None else ""


def _add(sums: Mapping[str, Array], watch: Watch, x: Array, g: Array) -> None:
    """x (.., K) and g (.., N) of one feed and probe; the first axis holds sequences where there are three."""
    if watch.pictures:
        _add_rows(sums, np.moveaxis(g, 1, -1).reshape(len(g), -1, watch.N))
        return
    if watch.centred:
        x = x - x.reshape(-1, watch.K).mean(axis=0)
    if x.ndim < 3:
        X, G = x.reshape(-1, watch.K), g.reshape(-1, watch.N)
        for a, b in zip(blocks_of(X), blocks_of(G), strict=True) if watch.share else ():
            sums["input"] += (a * np.sum(b * b, axis=1, keepdims=True)).T @ a
            sums["output"] += (b * np.sum(a * a, axis=1, keepdims=True)).T @ b
        sums["sequences"] += len(X)
        sums["together"] += float(np.vdot(G, G))
    else:
        for a, b in zip(x.reshape(len(x), -1, watch.K), g.reshape(len(g), -1, watch.N), strict=True):
            if watch.share:
                D = a.T @ b  # of one sequence, so float32 is enough; what grows is float64
                sums["input"] += D @ D.T
                sums["output"] += D.T @ D
            sums["together"] += float(np.sum(b.sum(axis=0, dtype=np.float64) ** 2))
        sums["sequences"] += len(x)
    _add_outputs(sums, g.reshape(-1, watch.N))


def _add_rows(sums: Mapping[str, Array], g: Array) -> None:
    """g (pictures, positions, N)."""
    sums["sequences"] += len(g)
    sums["together"] += float(np.sum(g.sum(axis=1, dtype=np.float64) ** 2))
    _add_outputs(sums, g.reshape(-1, g.shape[-1]))


def _add_outputs(sums: Mapping[str, Array], g: Array) -> None:
    for block in blocks_of(g):
        sums["row_output"] += block.T @ block
        sums["rows"] += np.count_nonzero(block.any(axis=1))


def _sums(folder: Path, index: int, watch: Watch) -> dict[str, Array]:
    K, N = (watch.K, watch.N) if watch.share else (1, 1)
    shapes = {
        "input": (K, K), "output": (N, N), "row_output": (watch.N, watch.N), "sequences": (1,), "together": (1,), "rows": (1,),
    }  # fmt: skip
    return {name: open_array(folder / f"{index}.{name}", shape) for name, shape in shapes.items()}


def _reaction(sums: Mapping[str, Array], share: float, known: InputStatistics) -> Reaction | None:
    """None where no output depends on the site."""
    assert known.second is not None
    G0, count, spread = sums["row_output"], float(sums["sequences"][0]), float(np.trace(known.second))
    whole = float(np.trace(G0))
    if not (whole > 0 and spread > 0 and count > 0):
        return None
    A, output, scale = known.second, G0 / whole, whole
    if share:
        A, B = sums["input"], sums["output"]
        if not (np.trace(A) > 0 and np.trace(B) > 0):
            return None
        output = (1 - share) * output + share * B / np.trace(B)
        scale = float(np.trace(B)) / spread
    # rows of a sequence whose derivatives are alike count as one: of so few directions the rest is not free
    size = len(output)
    alike = float(sums["together"][0]) / whole
    ridge = float(np.clip(_RIDGE * size * alike / float(sums["rows"][0]), *_RIDGES))
    output[np.diag_indices(size)] += ridge / size
    return Reaction(A / np.trace(A), output * (scale / count), share)


def _gone() -> Mapping[str, Array]:
    raise RuntimeError("reactions vanished from the cache while they were in use")
