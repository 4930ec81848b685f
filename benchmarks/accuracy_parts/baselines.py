"""Published weighings of a weight's error, as statistics that the project's own `svd` takes: only the moment is another.

    ASVD       C = diag(mean |x|), the square of S = diag(mean |x|)^0.5                      Yuan et al. 2023
    FWSVD      C = diag(sum_j F_ij), the square of row weights sqrt(sum_j F_ij)              Hsu et al. 2022
    SVD-LLM    C = E[x x^T], not centred                                                     Wang et al. 2024

None has a mean, so no bias is corrected, as published. F is the squared derivative of what the model's outputs feel (`gradients`),
by a whole sequence: for logits a sampled log-likelihood to second order, else a random direction of each output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from lrcompile.calibrate import rows_of, tap_of
from lrcompile.feeds import Feeds, masks_of
from lrcompile.gradients import Differentiable, default_cotangents, refusal
from lrcompile.interfaces import Array, StatisticsSource
from lrcompile.records import Finding, InputStatistics, Site, Source
from lrcompile.sensitivity import judged_outputs
from lrcompile.store import Cache, new_folder, remove_folder, save_model


class Uncentred:
    """The second moment alone."""

    def __init__(self, stored: StatisticsSource) -> None:
        self._stored = stored

    def of(self, site: Site) -> InputStatistics | None:
        known = self._stored.of(site)
        return None if known is None or known.second is None else replace(known, mean=None, reaction=None)

    def key(self, site: Site) -> str:
        return f"uncentred-{self._stored.key(site)}"


class Diagonal:
    """A diagonal moment: `rows` holds it for each site by name; of others nothing is known."""

    def __init__(self, stored: StatisticsSource, name: str, rows: Mapping[str, Array]) -> None:
        self._stored, self._name, self._rows = stored, name, rows

    def of(self, site: Site) -> InputStatistics | None:
        known = self._stored.of(site)
        if known is None or site.name not in self._rows:
            return None
        return InputStatistics(known.count, second=np.diag(floored(self._rows[site.name])))

    def key(self, site: Site) -> str:
        rows = self._rows.get(site.name)
        digest = "" if rows is None else hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        return f"{self._name}-{digest}-{self._stored.key(site)}"


def floored(rows: Array) -> Array:
    """No input is free: what was never seen counts a millionth of the mean."""
    rows = rows.astype(np.float64)
    made: Array = np.maximum(rows, 1e-6 * float(rows.mean()) or 1.0)
    return made


def linear_sites(finding: Finding) -> list[Site]:
    """Sites that multiply rows as they are: those whose inputs and derivatives are easy to look at."""
    return [
        s
        for s in finding.sites
        if s.refusal is None and s.kind == "linear" and not s.path and s.wiring is not None and s.operand == 1
        and not (s.wiring.before or s.wiring.after)
    ]  # fmt: skip


def absolute_means(
    source: Source, finding: Finding, feeds: Feeds, cache: Cache, scratch: Path
) -> dict[str, Array]:
    """mean |x| (K,) of each site's input over the calibration data."""
    sites = linear_sites(finding)

    def compute() -> dict[str, Array]:
        import onnxruntime as ort

        taps = {tap_of(s) for s in sites}
        copy = source.model.clone()
        values = {v.name: v for node in copy.graph for v in node.outputs}
        watched = sorted({t.value for t in taps if t.value in values})
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(values[name] for name in watched)
        folder = new_folder(scratch / "taps")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(save_model(copy, folder), options, providers=["CPUExecutionProvider"])
        sums = {tap: np.zeros(tap.size + 1) for tap in taps}
        for feed in feeds:
            seen = {**feed, **dict(zip(watched, session.run(watched, dict(feed)), strict=True))}
            for tap, total in sums.items():
                rows = rows_of(seen[tap.value], tap, masks_of(feed))
                total[:-1] += np.abs(rows).sum(axis=0, dtype=np.float64)
                total[-1] += len(rows)
        remove_folder(folder)
        return {s.name: sums[tap_of(s)][:-1] / max(sums[tap_of(s)][-1], 1.0) for s in sites}

    return dict(cache.remember(("benchmark-absolute", source.key, feeds.key), compute))


def fisher_rows(
    source: Source, finding: Finding, feeds: Feeds, cache: Cache, seed: int
) -> dict[str, Array] | str:
    """sum_j F_ij (K,) of each site's weight, F the mean over sequences of the squared derivative; or why there is none."""
    key = ("benchmark-fisher", source.key, feeds.key, str(seed))
    if (no := refusal(source.model)) is not None and not cache.has(key):
        return no.reason
    sites = linear_sites(finding)
    sums = {s.name: np.zeros(s.K) for s in sites}

    def consume(number: int, pairs: object) -> None:
        for site, (x, g) in zip(sites, pairs, strict=True):  # type: ignore[call-overload]
            sums[site.name] += squared_rows(x, g)

    if not cache.has(key):
        import torch

        torch.set_num_threads(1)
        outputs = judged_outputs([v.name or "" for v in source.model.graph.outputs])
        model = Differentiable(
            source.model, [(s.data.name or "", s.node.outputs[0].name or "") for s in sites]
        )
        for index, feed in enumerate(feeds):
            mask = next(iter(masks_of(feed)), None)
            draw = partial(default_cotangents, count=1, seed=seed + index, mask=mask)
            if (no := model.pull(feed, outputs, draw, consume)) is not None:
                return no.reason
    return dict(cache.remember(key, lambda: sums))


def squared_rows(x: Array, g: Array) -> Array:
    """(K,): sum over sequences and j of (X^T G)_ij^2; rows of two axes are sequences of one."""
    if x.ndim < 3:
        x, g = x.reshape(-1, 1, x.shape[-1]), g.reshape(-1, 1, g.shape[-1])
    total = np.zeros(x.shape[-1])
    for a, b in zip(x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1]), strict=True):
        total += np.square(a.T @ b, dtype=np.float64).sum(axis=1)
    return total
