"""Sensitivity: how far the model's outputs move when a group errs, measured by letting it err.

Each weight is replaced, alone, by what its factorization makes of it at two ranks, and the model runs on a few calibration feeds.
x is what is known of such a form without running it (`strength`): the squared relative error of the group, or where gradients
are known the movement that they predict. What was seen is laid through the two points as a power law, movement = a x^q.

Not the whole model runs each time: activations are carried to some places in the graph (`walk`, `carrier`), and from the last one
before a weight only the rest runs, with that weight overridden. All is kept in the cache under the model's hash.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrcompile.activations import stand_in
from lrcompile.carrier import Carrier, read_all
from lrcompile.coding import rounded
from lrcompile.cost import stored_bytes
from lrcompile.curves import Curve, Problem
from lrcompile.feeds import mask_over, masks_of
from lrcompile.figures import Movement
from lrcompile.interfaces import Array, BuildOptions, Constant, Engine, Factorization, StatisticsSource
from lrcompile.oracle import Reconstruction, as_operands
from lrcompile.progress import Progress, silent
from lrcompile.records import Candidate, Group, Site, Source
from lrcompile.store import load_array, new_folder, remove_folder, save_array, save_model
from lrcompile.walk import part, stages_of

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feed, Feeds
    from lrcompile.weights import ModelWeights

logger = logging.getLogger(__name__)

_SHARES = (0.75, 0.4)  # of a group's parameters: the forms that are tried
_BITS_SHARES = (0.13, 0.07)  # of a group's bytes, where forms differ by storage
_PASSES = 4.0  # runs of the whole calibration data that all trials together may cost
_PLACES = 6  # in the graph, from which the rest is run
_LOGITS = 256  # rows of logits that are compared
_EXPONENTS = (0.5, 2.0)  # what a power law of a movement may have
_LEAST = 1e-12


@dataclass(frozen=True, slots=True)
class Response:
    """movement = scale x^exponent, x a form's `strength`."""

    scale: float
    exponent: float = 1.0

    def __call__(self, x: float) -> float:
        return float(self.scale * max(x, 0.0) ** self.exponent)


def strength(candidate: Candidate) -> float:
    """What is known of a form without running it."""
    return candidate.movement if candidate.movement is not None else candidate.error**2


def predicted(
    problem: Problem,
    source: Source,
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
) -> Problem:
    """The problem with every candidate's predicted movement."""
    trials = [(c, form) for c in problem.open if _is_tried(c.group) for form in _forms(c)]
    few = _few(feeds, len(trials))
    if trials and len(few) == 1 and len(trials) / len(feeds) > 1.5 * _PASSES:  # too dear: one form each
        trials = [t for i, t in enumerate(trials) if i == 0 or trials[i - 1][0] is not t[0]]
    known = source.key + feeds.key + target + repr((len(few), seed))

    def key(curve: Curve, form: Candidate) -> tuple[str, ...]:
        of = [weights.key(s) + statistics.key(s) for s in curve.group.sites]
        what = repr(
            (curve.group.name, form.method, form.rank, form.structure, form.storage, form.activations, of)
        )
        return ("movement-2", hashlib.sha256((known + what).encode()).hexdigest())

    missing = [t for t in trials if not weights.cache.has(key(*t))]
    if missing:

        def changed(curve: Curve, form: Candidate) -> Mapping[Constant, Array]:
            method = methods[form.method]
            factors, _ = rounded(method, curve.group, weights, statistics, form, seed, sweeps=0)
            made = dict(method.reconstruct(curve.group, factors))
            site = curve.group.sites[0]
            if form.activations is not None and (seen := statistics.of(site)) is not None:
                W = weights.matrix(site)
                made[site.name, "weight"] = made[site.name, "weight"] + stand_in(
                    W, form.activations, seen, seed
                )
            return made

        bench = _Bench(source, weights, few, child, target, scratch, progress)
        for (curve, form), movement in bench.run(missing, changed):
            weights.remember(key(curve, form), lambda m=movement: {"movement": np.array([m])})  # type: ignore[misc]
    seen: dict[str, list[tuple[float, float]]] = {}
    for curve, form in trials:
        measured = float(weights.remember(key(curve, form), _gone)["movement"][0])
        seen.setdefault(curve.group.name, []).append((strength(form), measured))
    coded = {c.group.name for c in problem.open if any(f.storage is not None for f in c.candidates)}
    # rounding errors are noise: they add up in squares, and what strays from that is the few rows of the trials
    responses = {
        name: power_law(points, (1.0, 1.0)) if name in coded else power_law(points)
        for name, points in seen.items()
    }
    return _with_movements(problem, responses)


def power_law(points: Sequence[tuple[float, float]], exponents: tuple[float, float] = _EXPONENTS) -> Response:
    """Through one point straight from the origin; through two as a power law whose exponent stays sane."""
    points = sorted((max(x, _LEAST), max(y, _LEAST)) for x, y in points)
    (x0, y0), (x1, y1) = points[0], points[-1]
    exponent = 1.0
    if x1 > 1.05 * x0:
        exponent = float(np.clip(math.log(y1 / y0) / math.log(x1 / x0), *exponents))
    scale = float(np.exp(np.mean([math.log(y) - exponent * math.log(x) for x, y in (points[0], points[-1])])))
    return Response(scale, exponent)


def _with_movements(problem: Problem, responses: Mapping[str, Response]) -> Problem:
    """Forms of several weights err where their last site does (chains), or at all their sites.

    Of what could not be tried (inside a body) the worst is assumed.
    """
    worst = max(responses.values(), key=lambda r: r(0.01), default=Response(1.0))

    def moved(curve: Curve) -> Curve:
        group = curve.group
        if group.name in responses:
            members = [responses[group.name]]
        elif group.kind in ("up_down", "value_output"):
            members = [responses[n] for n in (group.sites[-1].name,) if n in responses]
        else:
            members = [responses[s.name] for s in group.sites if s.name in responses]
        members = members or [worst]

        def movement(form: Candidate) -> float:
            x = strength(form) / (len(members) if form.movement is not None else 1)
            return sum(r(x) for r in members)

        return replace(curve, candidates=tuple(replace(c, movement=movement(c)) for c in curve.candidates))

    return replace(problem, curves=tuple(map(moved, problem.curves)), wider=tuple(map(moved, problem.wider)))


def _is_tried(group: Group) -> bool:
    return (group.shares_weight or group.kind == "query_key") and not any(s.path for s in group.sites)


def _forms(curve: Curve) -> list[Candidate]:
    """At most two forms of a group, by the share of its parameters; of those that cost the same the more accurate."""
    chosen: list[Candidate] = []
    front = _front(curve)  # what a plan could choose
    coded = any(c.storage is not None for c in curve.candidates)
    whole = stored_bytes(curve.group)

    def share_of(form: Candidate) -> float:
        return form.cost.bytes / whole if coded else form.cost.parameters / curve.group.elements

    for share in _BITS_SHARES if coded else _SHARES:
        best = min(
            curve.candidates if coded else front,
            key=lambda c: (abs(share_of(c) - share), c.error),
            default=None,
        )
        if best is not None and best not in chosen:
            chosen.append(best)
    return chosen


def _front(curve: Curve) -> list[Candidate]:
    """The candidates of which none that costs no more is more accurate."""
    found: list[Candidate] = []
    for form in sorted(curve.candidates, key=lambda c: (c.cost.parameters, c.error)):
        if not found or form.error < found[-1].error:
            found.append(form)
    return found


def _few(feeds: Feeds, trials: int) -> list[Feed]:
    """Feeds from all over the data, as many as the trials may cost together (each runs about half the model)."""
    wanted = max(1, min(len(feeds), round(_PASSES * len(feeds) / (0.6 * max(trials, 1)))))
    places = {round((i + 0.5) * len(feeds) / wanted - 0.5) for i in range(wanted)}
    return [feed for i, feed in enumerate(feeds) if i in places]


class _Bench:
    """Runs the rest of the model with one group's weights overridden, again and again."""

    def __init__(
        self, source: Source, weights: ModelWeights, feeds: Sequence[Feed], child: Child, target: str, scratch: Path,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._source, self._weights, self._feeds = source, weights, feeds
        self._child, self._target, self._progress = child, target, progress
        self._folder = new_folder(scratch / "sensitivity")

    def run(
        self,
        trials: Sequence[tuple[Curve, Candidate]],
        changed: Callable[[Curve, Candidate], Mapping[Constant, Array]],
    ) -> Iterator[tuple[tuple[Curve, Candidate], float]]:
        """Each trial with the movement that it caused."""
        stages = stages_of(self._source.model, list({t[0].group.name: t[0].group for t in trials}.values()))
        step = max(1, math.ceil(len(stages) / _PLACES))
        carrier = Carrier(self._feeds, self._child, self._target, self._folder / "carried")
        done = 0
        for start in range(0, len(stages), step):
            names = {g.name for stage in stages[start : start + step] for g in stage.groups}
            here = [t for t in trials if t[0].group.name in names]
            carrier.advance(self._source.model, stages[start].frontier)
            for trial, movement in self._here(here, carrier, stages[start].ahead, changed):
                done += 1
                self._progress("sensitivity", done, len(trials))
                yield trial, movement
        remove_folder(self._folder)

    def _here(
        self,
        trials: Sequence[tuple[Curve, Candidate]],
        carrier: Carrier,
        outputs: Sequence[str],
        changed: Callable[[Curve, Candidate], Mapping[Constant, Array]],
    ) -> Iterator[tuple[tuple[Curve, Candidate], float]]:
        import onnx_ir as ir

        judged = judged_outputs([v.name or "" for v in self._source.model.graph.outputs])
        wanted = [name for name in outputs if name in judged]
        sites: dict[str, Site] = {s.name: s for c, _ in trials for s in c.group.sites}
        freed = Reconstruction(self._source.model)
        values = {n: freed.free(s, lambda s=s: self._weights.matrix(s)) for n, s in sites.items()}  # type: ignore[misc]
        types = {n: ir.DataType.from_numpy(np.dtype(t)) for n, t in carrier.types.items()}
        free = [v for kinds in values.values() for v in kinds.values()]
        rest = part(freed.model, types, wanted, free)
        if rest is None:
            yield from ((trial, 0.0) for trial in trials)
            return
        read = {v.name or "" for v in rest.graph.inputs}
        folder = new_folder(self._folder / "rest")
        path = save_model(rest, folder)
        with self._child.build(self._target, path, BuildOptions(self._target)) as engine:
            feeds = [
                (
                    {n: a for n, a in feed.items() if n in read},
                    carrier.files(i, read),
                    masks_of(feed),
                    str(folder / f"reference-{i}"),
                )
                for i, feed in enumerate(self._feeds)
            ]
            self._child.call("lrcompile.sensitivity:refer", engine, feeds, wanted)
            for curve, form in trials:
                new = changed(curve, form)
                overrides = {
                    name: array
                    for s in curve.group.sites
                    for kind, array in as_operands(s, new).items()
                    if (name := values[s.name][kind].name or "") in read  # what no output needs is not there
                }
                moved = self._child.call("lrcompile.sensitivity:moved", engine, feeds, overrides)
                yield (curve, form), float(sum(moved.values())) / len(judged)
        remove_folder(folder)


def judged_outputs(names: Sequence[str]) -> tuple[str, ...]:
    """Which outputs a plan is to keep: logits where there are any, else all."""
    logits = tuple(n for n in names if Movement(n).is_logits)
    return logits or tuple(names)


Ready = tuple[Mapping[str, Array], Mapping[str, tuple[str, str]], Sequence[Array], str]


def refer(engine: Engine, feeds: Sequence[Ready], wanted: Sequence[str]) -> None:
    """Runs in the child: what the outputs are when nothing is overridden, into files."""
    for fed, files, masks, place in feeds:
        outputs = engine.run({**fed, **read_all(files)})
        for i, name in enumerate(wanted):
            if outputs[name].dtype.kind in "fV":
                save_array(f"{place}-{i}.npy", _judged_rows(name, outputs[name], masks))


def moved(engine: Engine, feeds: Sequence[Ready], overrides: Mapping[str, Array]) -> dict[str, float]:
    """Runs in the child: by output, how far it moved under these constants: relative squared, or KL for logits."""
    movements: dict[str, Movement] = {}
    for fed, files, masks, place in feeds:
        outputs = engine.run({**fed, **read_all(files), **overrides})
        for i, (name, array) in enumerate(outputs.items()):
            if array.dtype.kind in "fV":  # V: bfloat16
                before = load_array(f"{place}-{i}.npy", array.dtype.name)
                movements.setdefault(name, Movement(name)).add(before, _judged_rows(name, array, masks))
    return {name: _size(m) for name, m in movements.items()}


def _judged_rows(name: str, array: Array, masks: Sequence[Array]) -> Array:
    """The rows that count: without padding, and of logits some from all over."""
    if array.ndim > 2 and (keep := mask_over(array, masks)) is not None:
        array = array[keep]
    if Movement(name).is_logits:
        array = array.reshape(-1, array.shape[-1])
        array = array[:: max(1, len(array) // _LOGITS)]
    return array


def _size(moved: Movement) -> float:
    if moved.problem or not moved.rows:
        return 1.0
    return moved.divergence / moved.rows if moved.is_logits else min(moved.relative_l2**2, 4.0)


def _gone() -> Mapping[str, Array]:
    raise RuntimeError("measured movements vanished from the cache while they were in use")
