"""Three measurements beside the table: predictions against what plans did, what all of it costs, and the FFN part on the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import scipy.linalg

from accuracy_parts.lab import TARGET, Lab, Refused, movement, within
from lrcompile.bench import Race, race
from lrcompile.build import build
from lrcompile.child import Child
from lrcompile.curves import Curve, decision_of
from lrcompile.errors import BudgetError
from lrcompile.interfaces import Array
from lrcompile.plan import Problem
from lrcompile.records import Group, Plan
from lrcompile.registry import methods_of
from lrcompile.spectra import eigh
from lrcompile.store import Cache, new_folder, remove_folder, save_model
from lrcompile.walk import part
from lrcompile.weights import side_by_side

METHODS = ("svd", "pivoted", "slicing")
ROWS = 112  # held-out rows on which plans are compared

# --- predicted against measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A plan drawn by chance. methods: that it could take; strength: of the jitter; predicted: of it as it is, without the jitter."""

    plan: Plan
    keep: float
    methods: tuple[str, ...]
    strength: float
    predicted: float


def drawn_plans(
    problem: Problem, count: int, seed: int, lowest: float = 0.5, highest: float = 0.95
) -> Iterator[Drawn]:
    """Seeded plans: a share to keep, a subset of the methods, and the best allocation for sensitivities that chance has changed.

    Every group's movements are multiplied by exp(s n), n ~ N(0, 1), s up to 1.5: plans spend too much here and too little there.
    """
    rng = np.random.default_rng(seed)
    made = 0
    for _ in range(20 * count):
        if made == count:
            return
        keep = float(rng.uniform(lowest, highest))
        chosen = tuple(m for m, taken in zip(METHODS, rng.random(len(METHODS)) < 0.6, strict=True) if taken)
        strength = float(rng.uniform(0.0, 1.5))
        names = [c.group.name for c in (*problem.curves, *problem.wider)]
        factors = dict(zip(names, np.exp(strength * rng.standard_normal(len(names))).tolist(), strict=True))
        if not chosen:
            continue
        try:
            plan = within(jittered(problem, chosen, factors), keep)
        except BudgetError:  # slicing alone cannot make every model so small
            continue
        made += 1
        predicted = sum((d.movement or 0.0) / factors[d.group] for d in plan.rewritten)
        yield Drawn(plan, plan.kept, chosen, strength, predicted)


def jittered(problem: Problem, methods: Sequence[str], factors: Mapping[str, float]) -> Problem:
    """The problem with these methods' forms alone, and each group's movements multiplied by its factor."""

    def changed(curve: Curve) -> Curve:
        kept = [c for c in curve.candidates if c.method in methods]
        by = factors[curve.group.name]
        return replace(
            curve,
            candidates=tuple(
                replace(c, movement=None if c.movement is None else by * c.movement) for c in kept
            ),
        )

    wider = tuple(c for c in map(changed, problem.wider) if c.candidates)
    return replace(problem, curves=tuple(map(changed, problem.curves)), wider=wider)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of ranks; equal values share the mean of theirs."""
    x, y = (np.array([_rank(v, values) for v in values]) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _rank(value: float, values: Sequence[float]) -> float:
    return sum(v < value for v in values) + 0.5 * sum(v == value for v in values)


def plans(lab: Lab, count: int = 20) -> tuple[str, float]:
    """The page's part and the rank correlation."""
    kind = "plain" if isinstance(lab.statistics("reacting"), Refused) else "reacting"
    known = lab.statistics(kind)
    assert known is not None
    assert not isinstance(known, Refused)
    problem = lab.problem(METHODS, known, allocated=True)
    text, feeds = next(iter(lab.texts.items()))
    step = max(1, sum(len(next(iter(f.values()))) for f in feeds) // ROWS)
    feeds = feeds[::step]
    dense = lab.outputs(lab.source.path, feeds)
    found: list[tuple[Drawn, float]] = []
    for drawn in drawn_plans(problem, count, lab.seed):
        with lab.written(lab.factors(drawn.plan, METHODS, known, refitted=False)) as path:
            found.append((drawn, movement(dense, lab.outputs(path, feeds))))
        lab.say(f"plan {len(found)}: predicted {drawn.predicted:.3g}, measured {found[-1][1]:.3g}")
    correlation = spearman([d.predicted for d, _ in found], [m for _, m in found])
    return plans_page(found, correlation, text), correlation


def plans_page(found: Sequence[tuple[Drawn, float]], correlation: float, text: str) -> str:
    lines = ["| kept | forms | jitter | predicted | measured |", "|---:|---|---:|---:|---:|"]
    lines += [
        f"| {d.keep:.3f} | {', '.join(d.methods)} | {d.strength:.2f} | {d.predicted:.3g} | {measured:.3g} |"
        for d, measured in sorted(found, key=lambda pair: pair[1])
    ]
    ratios = sorted(measured / d.predicted for d, measured in found if d.predicted > 0)
    return "\n".join(
        [
            f"{len(found)} plans without refitting, drawn by seed; movement of the outputs (relative squared, without padding) on "
            f"the {text}.\n",
            *lines,
            f"\nSpearman's rank correlation **{correlation:.3f}** (asked: at least 0.9, {'met' if correlation >= 0.9 else '**not met**'}). "
            f"Measured over predicted: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}.",
        ]
    )


# --- cost -------------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Seconds on the wall and of processor, ours and the child's, by name: one entry each time it is used."""

    child: Child
    say: Callable[[str], None]
    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), self._cpu()
        yield
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        self.cpu.setdefault(name, []).append(self._cpu() - cpu)
        self.say(f"{name}: {self.wall[name][-1]:.1f} s, {self.cpu[name][-1]:.1f} s of processor")

    def _cpu(self) -> float:
        theirs: float = self.child.call("time:process_time")
        return time.process_time() + theirs


STAGES = ("calibrate", "reactions", "plan", "sensitivity", "refit")
PASS, SVD, EIGH = "a bare pass", "bare SVD", "bare eigh"


def cost(lab: Lab, keep: float) -> tuple[str, bool]:
    """The page's part: every stage of the default, from an empty cache, against bare passes and bare decompositions between them."""
    clock = Clock(lab.child, lab.say)
    cache = Cache(new_folder(lab.scratch / "empty-cache"))
    fresh = replace(lab, cache=cache, weights=type(lab.weights)(cache, lab.source.opset), _statistics={})
    methods = methods_of(("auto",))
    _pass(fresh, clock)
    with clock.time("calibrate"):
        known = fresh.statistics("plain")
    with clock.time("reactions"):
        reacting = fresh.statistics("reacting")
    known = known if isinstance(reacting, Refused) else reacting
    assert known is not None
    assert not isinstance(known, Refused)
    _pass(fresh, clock)
    with clock.time("plan"):
        problem = fresh.prepared(methods, known)
    groups = [c.group for c in problem.curves if c.candidates]
    _decompose(fresh, groups, clock)
    with clock.time("sensitivity"):
        problem = fresh.predicted(problem, methods, known)
    _pass(fresh, clock)
    with clock.time("refit"):
        fresh.factors(within(problem, keep), ("auto",), known, refitted=True)
    _decompose(fresh, groups, clock)
    _pass(fresh, clock)
    remove_folder(cache.root)
    return cost_page(
        {n: _mean(t) for n, t in clock.wall.items()}, {n: _mean(t) for n, t in clock.cpu.items()}, keep
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pass(lab: Lab, clock: Clock) -> None:
    """The original over the calibration data, in the child, where its outputs stay."""
    with build(lab.child, TARGET, lab.source.path) as engine, clock.time(PASS):
        for feed in lab.calibration:
            lab.child.call("lrcompile.bench:_time", engine, feed, 1)


def _decompose(lab: Lab, groups: Sequence[Group], clock: Clock) -> None:
    """Every eligible weight once, side by side as the planner works: by SVD, and by the eigenproblem of its smaller Gram matrix."""

    def svd(group: Group) -> None:
        scipy.linalg.svd(lab.weights.matrix(group.sites[0]), full_matrices=False, check_finite=False)

    def gram(group: Group) -> None:
        W = lab.weights.matrix(group.sites[0])
        eigh(W.T @ W if W.shape[1] <= W.shape[0] else W @ W.T)

    work: tuple[tuple[str, Callable[[Group], None]], ...] = ((SVD, svd), (EIGH, gram))
    for name, one in work:
        with clock.time(name):
            for _ in side_by_side(one, groups, lambda g: g):
                pass


def cost_page(wall: Mapping[str, float], cpu: Mapping[str, float], keep: float) -> tuple[str, bool]:
    """wall, cpu: seconds of each stage, of a bare pass and of the bare decompositions."""
    lines = ["| stage | seconds | of processor | in bare passes, of processor |", "|---|---:|---:|---:|"]
    lines += [f"| {n} | {wall[n]:.1f} | {cpu[n]:.1f} | {cpu[n] / cpu[PASS]:.2f} |" for n in STAGES]
    spent = {"wall": sum(wall[n] for n in STAGES), "cpu": sum(cpu[n] for n in STAGES)}
    lines.append(f"| together | {spent['wall']:.1f} | {spent['cpu']:.1f} | {spent['cpu'] / cpu[PASS]:.2f} |")
    lines += [f"| {n} | {wall[n]:.1f} | {cpu[n]:.1f} | {cpu[n] / cpu[PASS]:.2f} |" for n in (PASS, SVD, EIGH)]
    allowed = {"wall": 12 * wall[PASS] + 3 * wall[SVD], "cpu": 12 * cpu[PASS] + 3 * cpu[SVD]}
    met = {k: "met" if spent[k] <= allowed[k] else "**not met**" for k in spent}
    by_gram = 12 * cpu[PASS] + 3 * cpu[EIGH]
    text = (
        f"At most 12 forward passes + 3 x the bare decompositions: {spent['wall'] / 60:.1f} minutes of {allowed['wall'] / 60:.1f} "
        f"({met['wall']}), {spent['cpu'] / 60:.1f} of {allowed['cpu'] / 60:.1f} minutes of processor ({met['cpu']}; were a bare "
        f"decomposition the eigenproblem of the smaller Gram matrix, of {by_gram / 60:.1f}: "
        f"{'met' if spent['cpu'] <= by_gram else '**not met**'})."
    )
    intro = (
        f"The default at keep {keep:g}, from an empty cache. A bare pass is the original over all calibration data, nothing taken "
        "from it; a bare decomposition the SVD of each eligible weight as it is. Both are timed between the stages, several times, and "
        "the mean counts. `plan` holds the decompositions of all forms, `refit` the fitting and its own.\n"
    )
    return "\n".join([intro, *lines, "", text]), spent["cpu"] <= allowed["cpu"]


# --- the FFN part -----------------------------------------------------------------------------------------------------


def ffn(lab: Lab, keep: float, seconds: float, shape: tuple[int, int] = (8, 128)) -> tuple[str, float]:
    """The page's part and the median ratio: all FFNs of the model one after another, dense and sliced, raced by turns."""
    known = lab.statistics("reacting")
    if isinstance(known, Refused):
        known = lab.statistics("plain")
    assert known is not None
    assert not isinstance(known, Refused)
    problem = lab.prepared(methods_of(("slicing",)), known)
    chosen = [c for c in problem.wider if c.group.kind == "up_down"]
    plan = sliced(problem, chosen, keep)
    sets = lab.factors(plan, ("slicing",), known, refitted=False)
    with lab.written(sets) as path:
        scores = lab.scores(path)
    folder = new_folder(lab.scratch / "ffn")
    groups = [c.group for c in chosen]
    dense, cut = [
        save_model(ffn_part(model, groups), new_folder(folder / name))
        for name, model in (("dense", lab.source.model), ("sliced", lab.lowered(sets)))
    ]
    found = race(lab.child, TARGET, dense, cut, [ffn_feed(groups, shape, lab.seed)], seconds=seconds)
    remove_folder(folder)
    kept = sum(d.parameters_after for d in plan.decisions) / sum(d.parameters_before for d in plan.decisions)
    return ffn_page(found, len(groups), kept, scores), found.ratio.median


def sliced(problem: Problem, curves: Sequence[Curve], keep: float) -> Plan:
    """Each of these groups cut to the widest form within its share."""
    decisions = []
    for curve in curves:
        within_share = [
            c
            for c in curve.candidates
            if c.method == "slicing" and c.cost.parameters <= keep * curve.group.elements
        ]
        widest = max(within_share, key=lambda c: c.cost.parameters)
        decisions.append(decision_of(curve.group, widest, f"keep {keep:g} of the FFN"))
    return Plan(problem.target, tuple(decisions), eligible=problem.total)


def ffn_part(model: ir.Model, groups: Sequence[Group]) -> ir.Model:
    """From what each FFN reads to what its last weight (and bias) gives."""
    given = {g.sites[0].data.name or "": ir.DataType[g.sites[0].dtype.upper()] for g in groups}
    ends = [
        (g.sites[-1].bias.node if g.sites[-1].bias is not None else g.sites[-1].node).outputs[0]
        for g in groups
    ]
    cut = part(model, given, [v.name or "" for v in ends])
    assert cut is not None
    return cut


def ffn_feed(groups: Sequence[Group], shape: tuple[int, int], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    sites = [g.sites[0] for g in groups]
    return {
        s.data.name or "": rng.standard_normal((*shape, s.K)).astype(ir.DataType[s.dtype.upper()].numpy())
        for s in sites
    }


def ffn_page(found: Race, count: int, kept: float, scores: Mapping[str, float]) -> str:
    r, n = found.ratio, found.noise
    return (
        f"{count} FFNs cut out of the original and of the sliced file ({kept:.3f} of their parameters), ONNX Runtime CPU, "
        f"{found.threads} thread, {found.rounds} rounds by turns: dense {1e3 * found.original.median:.1f} ms, sliced "
        f"{1e3 * found.compiled.median:.1f} ms, ratio **{r.median:.2f}** (80 % of rounds {r.p10:.2f} to {r.p90:.2f}; dense against "
        f"itself {n.p10:.2f} to {n.p90:.2f}). Asked: at least 1.8, {'met' if r.median >= 1.8 else '**not met**'}.\n\n"
        f"The whole model with its FFNs so sliced, one ratio for all and without refitting: "
        + ", ".join(f"{value:.4f} on the {text}" for text, value in scores.items())
        + "."
    )
