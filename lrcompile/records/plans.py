"""Of plan: what a group could become, what the user asked for, and what was decided."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The entry of a structure that says so; see `Candidate.folds`.
FOLD = ("fold", 1)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a form of a group's weights costs. flops: 2 MACs for one row of input (one id for tables) at each of its readers."""

    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store a group: the factorization, its rank or structure, its cost and its error.

    error: relative, as `docs` define it; bound says whether it is an upper bound or an estimate. movement: how far it is predicted
    to move the model's outputs (relative squared; KL for logits), None where nothing is known of that. index_bytes: of its cost,
    what an index of permuted outputs takes, and does not take where neighbours absorb the permutation; permutes: whether they do.
    activations: the type that the input is rounded to before it is multiplied, None where it stays as it is.
    """

    method: str
    rank: int | None
    cost: Cost
    error: float
    bound: bool = True
    structure: tuple[tuple[str, int | str], ...] = ()
    storage: str | None = None
    note: str = ""
    movement: float | None = None
    index_bytes: int = 0
    permutes: Literal["in", "out"] | None = None
    activations: str | None = None

    @property
    def folds(self) -> bool:
        """Whether the factors are multiplied out to the weight when the file is loaded: then they save the file only."""
        return FOLD in self.structure


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with a group, and why. movement, activations: as the candidate's."""

    group: str
    sites: tuple[str, ...]
    method: str
    rank: int | None
    storage: str | None
    claimed_error: float | None
    bound: bool
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    reason: str
    structure: tuple[tuple[str, int | str], ...] = ()
    permutes: Literal["in", "out"] | None = None
    movement: float | None = None
    activations: str | None = None

    @property
    def folds(self) -> bool:
        return FOLD in self.structure

    @property
    def rewrites(self) -> bool:
        return self.method != "dense" or self.storage is not None

    @property
    def saves(self) -> tuple[str, ...]:
        """Of "disk", "memory" and "time" what becomes less: bytes in the file and in the engine, and FLOPs, by which no time was measured yet."""
        if not self.rewrites:
            return ()
        smaller, quicker = self.bytes_after < self.bytes_before, self.flops_after < self.flops_before
        kept = ("disk", "memory") if not self.folds else ("disk",)
        return (*(kept if smaller else ()), *(("time",) if quicker and not self.folds else ()))


@dataclass(frozen=True, slots=True)
class Amount:
    """A size in bytes, a number of FLOPs, or (relative, ``0.5x``) a share of the original's."""

    value: float
    relative: bool = False

    def of(self, whole: float) -> float:
        return self.value * whole if self.relative else self.value

    def __str__(self) -> str:
        if self.relative:
            return f"{self.value:g}x"
        for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
            if size <= self.value < math.inf:
                return f"{self.value / size:.10g}{unit}"
        return f"{self.value:g}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What the user asked for. At most one of keep, size, flops, latency, bits, energy, rank binds; max_error judges (or steers when alone).

    latency: seconds of one run at the first feed, or a share of what the original takes.
    """

    keep: float | None = None
    size: Amount | None = None
    flops: Amount | None = None
    latency: Amount | None = None
    bits: float | None = None
    energy: float | None = None
    rank: int | Literal["full"] | None = None
    max_error: tuple[Limit, ...] = ()
    objective: str = "size"

    @property
    def bounds_size(self) -> bool:
        """Whether something other than the error limit binds."""
        return any(
            v is not None
            for v in (self.keep, self.size, self.flops, self.latency, self.bits, self.energy, self.rank)
        )

    @property
    def asks_speed(self) -> bool:
        """Whether what is published must be measured to be faster than the original."""
        return self.latency is not None or self.objective == "latency"

    @property
    def bounds(self) -> tuple[str, ...]:
        """What binds, as it is written on the command line: ``--size 60MB``."""
        names = ("keep", "size", "flops", "latency", "bits", "energy", "rank")
        given = [(n, v) for n in names if (v := getattr(self, n)) is not None]
        return tuple(f"--{n} {_spelled(n, v)}" for n, v in given)

    def __str__(self) -> str:
        parts = list(self.bounds)
        if self.max_error:
            parts.append("--max-error " + ",".join(map(str, self.max_error)))
        return ", ".join(parts) or "none"


def _spelled(name: str, value: object) -> str:
    """A bound as the command line takes it."""
    if isinstance(value, Amount) and not value.relative:
        return f"{1e3 * value.value:g}ms" if name == "latency" else f"{value}{'B' if name == 'size' else ''}"
    return str(value)


@dataclass(frozen=True, slots=True)
class Limit:
    """One term of ``--max-error``: snr and cosine are floors, all others ceilings; relative is the ``x`` form."""

    name: str
    value: float
    relative: bool = False

    @property
    def floor(self) -> bool:
        return self.name in ("snr", "cosine", "top1")

    def holds(self, value: float) -> bool:
        return value >= self.value if self.floor else value <= self.value

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}{'x' if self.relative else ''}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision for every group. Prints as a table, is JSON, can be edited and given back."""

    target: str
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...] = ()
    ratio: float | None = (
        None  # the share of what the objective counts that a search allowed, when it searched
    )
    eligible: int | None = None  # parameters that the budget counts
    movement: float | None = (
        None  # how far the outputs are predicted to move; relative squared, KL for logits
    )

    def __iter__(self) -> Any:
        return iter(self.decisions)

    @property
    def rewritten(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.rewrites)

    @property
    def kept(self) -> float:
        """Parameters of all eligible weights, after over before, each weight counted once: what ``--keep`` bounds."""
        if not self.eligible:
            return 1.0
        return 1.0 - sum(d.parameters_before - d.parameters_after for d in self.rewritten) / self.eligible

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """Read what `to_json` wrote. Raises KeyError or TypeError on what is not a plan."""
        names = {f.name for f in dataclasses.fields(Decision)}
        decisions = []
        for entry in document["decisions"]:
            if unknown := sorted(set(entry) - names):
                raise KeyError(f"unknown key {unknown[0]!r} in a decision")
            entry = dict(entry)
            entry["sites"] = tuple(entry["sites"])
            if not isinstance(rank := entry["rank"], int | None) or isinstance(rank, bool):
                raise TypeError(f"the rank {rank!r} of {entry['group']!r} is not a whole number")
            entry["structure"] = tuple((str(k), v) for k, v in entry.get("structure", ()))
            decisions.append(Decision(**entry))
        return cls(
            document["target"],
            tuple(decisions),
            tuple(document.get("notes", ())),
            document.get("ratio"),
            document.get("eligible"),
            document.get("movement"),
        )

    def __str__(self) -> str:
        predicts = any(d.movement is not None for d in self.decisions)
        head = f" {'moves':>9}" if predicts else ""
        lines = [f"{'site':44} {'method':10} {'rank':>6} {'kept':>7} {'error':>9}{head}  reason"]
        for d in self.decisions:
            kept = d.parameters_after / d.parameters_before if d.parameters_before else 1.0
            error = "" if d.claimed_error is None else f"{d.claimed_error:9.2e}"
            rank = "" if d.rank is None else str(d.rank)
            if predicts:
                error = f"{error:>9} {'' if d.movement is None else f'{d.movement:.2e}':>9}"
            lines.append(f"{d.group[-44:]:44} {d.method:10} {rank:>6} {kept:7.3f} {error:>9}  {d.reason}")
        before = sum(d.parameters_before for d in self.decisions)
        after = sum(d.parameters_after for d in self.decisions)
        lines.append(
            f"{len(self.rewritten)} of {len(self.decisions)} groups rewritten for {self.target}; "
            f"{after:,} of {before:,} parameters kept ({after / before if before else 1:.3f})"
        )
        return "\n".join([*lines, *self.predicted, *self.notes])

    @property
    def predicted(self) -> tuple[str, ...]:
        """A line about all movements together; none where they are not known."""
        if self.movement is None:
            return ()
        return (
            f"predicted to move the outputs by {self.movement:.1e} in all (relative squared; of logits KL), the sum of what each group does",
        )
