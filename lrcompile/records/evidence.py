"""Of verify and publish: how far the outputs moved, what was tried on the way, and what the user gets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lrcompile.records.plans import Amount, Budget, Limit, Plan


@dataclass(frozen=True, slots=True)
class OutputEvidence:
    """How far one output moved. noise_floor: relative L2 that the original moves by itself in the same runtime."""

    relative_l2: float
    snr_db: float | None  # None: nothing moved at all
    cosine: float
    max_abs: float
    noise_floor: float = 0.0
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The answers to both questions of verification. nodes: what ran, ``OpType (domain) on Provider``, and how often."""

    outputs: tuple[tuple[str, OutputEvidence], ...]
    engine: str  # "ran" or "built, not run: <reason>"
    held_out: str  # where the data of the second question came from
    verdict: Literal["passed", "failed", "unchanged"]
    metric: tuple[float, float] | None = None  # original's and compiled's
    failures: tuple[str, ...] = ()
    nodes: tuple[tuple[str, int], ...] = ()

    def with_noise(self, relative: Mapping[str, float]) -> Evidence:
        """The same with each output's noise floor filled in."""
        outputs = tuple(
            (n, dataclasses.replace(o, noise_floor=relative.get(n, 0.0))) for n, o in self.outputs
        )
        return dataclasses.replace(self, outputs=outputs)

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        document["outputs"] = {name: dataclasses.asdict(value) for name, value in self.outputs}
        document["nodes"] = dict(self.nodes)
        return document


@dataclass(frozen=True, slots=True)
class TradeoffPoint:
    """A plan: what it keeps, how far it was predicted to move the outputs, and, once it was compiled and verified, how far it did.

    kept: parameters of the eligible weights after / before. bytes: of all constants; flops: 2 MAC of the sites at the first feed
    (None: not counted). movement: predicted; moved: the same measured (relative squared, KL of logits; the mean over outputs).
    cosine to max_abs: of the output where it is worst, None where there is no such figure. metric: original's and compiled's.
    verdict: of the error limits; None: only predicted, nothing was measured. failures: what did not hold.
    """

    kept: float
    parameters: int
    bytes: int
    flops: int | None = None
    movement: float | None = None
    moved: float | None = None
    cosine: float | None = None
    snr_db: float | None = None
    kl: float | None = None
    top1: float | None = None
    relative_l2: float | None = None
    max_abs: float | None = None
    metric: tuple[float, float] | None = None
    verdict: Literal["passed", "failed", "unchanged"] | None = None
    failures: tuple[str, ...] = ()

    def figure(self, limit: Limit) -> float | None:
        """The measured figure that a limit is about; None: there is none, or nothing moved at all."""
        if limit.name == "metric":
            if self.metric is None:
                return None
            before, after = self.metric
            return after / before if limit.relative and before else after
        value: float | None = getattr(self, "snr_db" if limit.name == "snr" else limit.name)
        return value

    @property
    def size(self) -> str:
        """In words, as in ``0.620 of the eligible parameters, 54.1 MB``."""
        return f"{self.kept:.3f} of the eligible parameters, {self.bytes / 1e6:,.{1 if self.bytes >= 1e6 else 4}f} MB"


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """The curve of size against error that a compile saw.

    budget: what was asked for. points: every plan that was compiled and verified, in the order of the trials; predicted: plans
    that were only planned, the smallest first. chosen: which of the points is published, None: none of them. searched: whether
    the smallest plan that holds the error limits was looked for.
    """

    budget: Budget
    points: tuple[TradeoffPoint, ...]
    predicted: tuple[TradeoffPoint, ...] = ()
    chosen: int | None = None
    searched: bool = False

    @property
    def best(self) -> TradeoffPoint | None:
        """What is published; where no plan held the limits, the one that came nearest to the first that it broke."""
        if self.chosen is not None:
            return self.points[self.chosen]
        limit = next(iter(self.budget.max_error), Limit("cosine", 1.0))

        def far(point: TradeoffPoint) -> float:
            value = point.figure(limit)
            if value is None or math.isnan(value):
                return math.inf
            return -value if limit.floor else value

        return min(self.points, key=far, default=None)

    @property
    def outcome(self) -> str:
        """How a search ended, or what a budget reached, in a sentence; empty where nothing was measured."""
        best, asked = self.best, ",".join(map(str, self.budget.max_error))
        if best is None:
            return ""
        if self.chosen is None:
            return f"no smaller plan holds {asked}; the best reached, with {best.size}: {'; '.join(best.failures)}"
        if not self.searched:
            return f"{self.budget}: {best.size}"
        if best.verdict == "unchanged":
            return f"nothing smaller was found that holds {asked}: the model stays as it is"
        counts_flops = self.budget.objective == "flops" and best.flops is not None
        flops = f", {Amount(float(best.flops or 0))} FLOPs" if counts_flops else ""
        return f"smallest that holds {asked}: {best.size}{flops}"

    def to_json(self) -> dict[str, Any]:
        """``points`` and ``predicted`` as lists of objects; what was not measured is null."""
        return {
            "budget": str(self.budget),
            "limits": [dataclasses.asdict(limit) for limit in self.budget.max_error],
            "points": [dataclasses.asdict(p) for p in self.points],
            "chosen": self.chosen,
            "searched": self.searched,
            "outcome": self.outcome,
            "predicted": [dataclasses.asdict(p) for p in self.predicted],
        }


@dataclass(frozen=True, slots=True)
class SiteReport:
    """A line of ``sites`` in ``lrcompile.json``."""

    name: str
    op: str
    weight_shape: tuple[int, ...]
    method: str
    rank: int | None
    storage: str | None
    activations: str | None
    parameters_before: int
    parameters_after: int
    claimed_error: float | None
    measured_error: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Whole-model counts. parameters: elements of float and <= 8-bit constants; bytes: of all constants; flops: 2 MAC at the first feed."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int


@dataclass(frozen=True, slots=True)
class Speed:
    """A race against the original in the same precision. ratio: time of the original over ours, the median of the rounds, above 1 ours is
    faster; low, high: what 80 % of the rounds lie between. same: the ratio lies within the noise of the machine.
    """

    shapes: str
    ratio: float
    low: float
    high: float
    same: bool

    def __str__(self) -> str:
        noise = ", within the noise of this machine" if self.same else ""
        return f"{self.ratio:.3f} x the original's speed (80 % of rounds {self.low:.3f} to {self.high:.3f}{noise}) at {self.shapes}"


@dataclass(frozen=True, slots=True)
class Result:
    """What `lrcompile.compile` gives back: where the folder is, and what its manifest says; tradeoff: every plan it tried; speed: races
    against the original, where speed was asked for.
    """

    path: Path
    plan: Plan
    evidence: Evidence
    totals: Totals
    manifest: Mapping[str, Any] = field(repr=False)
    tradeoff: Tradeoff | None = field(default=None, repr=False)
    speed: tuple[Speed, ...] = ()

    def __str__(self) -> str:
        t = self.totals
        lines = [str(self.plan), ""]
        lines += [
            f"{name}: cosine {o.cosine:.4f}  relative L2 {o.relative_l2:.2e}  "
            f"SNR {'inf' if o.snr_db is None else f'{o.snr_db:.1f}'} dB  noise {o.noise_floor:.1e}"
            for name, o in self.evidence.outputs
        ]
        lines += map(str, self.speed)
        lines.append(
            f"{self.evidence.verdict}: {t.parameters_before:,} -> {t.parameters_after:,} parameters, "
            f"{t.bytes_before / 1e6:.1f} -> {t.bytes_after / 1e6:.1f} MB, in {self.path}"
        )
        return "\n".join(lines)
