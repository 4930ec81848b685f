"""The frozen values that travel between the stages.

Arrays are never inside a plan: only names, numbers and sentences are. Names of types follow the stages:
``Source`` (load), ``Site`` and ``Group`` (find), ``InputStatistics`` (calibrate), ``Candidate``, ``Decision``
and ``Plan`` (plan), ``Evidence`` (verify), ``Result`` (publish).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `lrcompile --help` imports neither
    import numpy as np
    import onnx_ir as ir

    Array = np.ndarray[Any, np.dtype[Any]]

# What a site asks of its weight: x @ W, rows W[ids], a convolution, or something that we only list.
Kind = Literal["linear", "lookup", "conv", "other"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A "no" with its sentence. Falsy, so that ``if refusal := check(...)`` would never hide it: compare with None."""

    reason: str

    def __str__(self) -> str:
        return self.reason


# --- load ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A checked model.

    path: the ``.onnx`` file. model: its graph, weights mapped on disk, local functions inlined.
    sha256: of the ``.onnx`` file. weights: each external file (relative name) with its SHA-256.
    opset: version of the default domain. notes: sentences for the report (what was changed on the way in).
    """

    path: Path
    model: ir.Model
    sha256: str
    weights: tuple[tuple[str, str], ...]
    opset: int
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names model and weights in caches."""
        return "|".join((self.sha256, *(f"{name}:{sha}" for name, sha in self.weights)))


# --- find ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stored constant is read as a matrix: steps of (permutation or None, shape afterwards)."""

    stored: tuple[int, ...]
    steps: tuple[tuple[tuple[int, ...] | None, tuple[int, ...]], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.steps[-1][1] if self.steps else self.stored

    def transpose(self, perm: tuple[int, ...]) -> Layout:
        if perm == tuple(range(len(perm))):
            return self
        if self.steps and self.steps[-1][0] is not None:  # two permutations in a row are one, or none
            last, _ = self.steps[-1]
            assert last is not None
            return Layout(self.stored, self.steps[:-1]).transpose(tuple(last[p] for p in perm))
        return Layout(self.stored, (*self.steps, (perm, tuple(self.shape[p] for p in perm))))

    def reshape(self, shape: tuple[int, ...]) -> Layout:
        if shape == self.shape:
            return self
        return Layout(self.stored, (*self.steps, (None, shape)))

    def over(self, stored: tuple[int, ...]) -> Layout:
        """The same reading of a constant of another size. Only permutations can be carried over."""
        layout = Layout(stored)
        for perm, _ in self.steps:
            if perm is None:
                raise ValueError("a reshaped weight has no other size")
            layout = layout.transpose(perm)
        return layout

    def stored_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the constant that this reading makes `shape` of; permutations only, as in `over`."""
        for perm, _ in reversed(self.steps):
            if perm is None:
                raise ValueError("a reshaped weight has no other size")
            shape = tuple(shape[perm.index(axis)] for axis in range(len(perm)))
        return shape

    def apply(self, array: Array) -> Array:
        """The constant as the matrix that a factorization sees."""
        for perm, shape in self.steps:
            array = array.transpose(perm) if perm is not None else array.reshape(shape)
        return array

    def invert(self, array: Array) -> Array:
        """A matrix back in the shape of the stored constant."""
        shapes = [self.stored, *(shape for _, shape in self.steps)]
        for (perm, _), before in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            if perm is None:
                array = array.reshape(before)
            else:
                inverse = sorted(range(len(perm)), key=perm.__getitem__)
                array = array.transpose(inverse)
        return array


# A permutation of axes, or a shape in which 0 keeps the dimension as it is.
Step = tuple[Literal["transpose", "reshape"], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a node's other input becomes x (.., K) or ids, and how y (.., N) becomes the node's output.

    data: index of that input. before, after: steps around the product. scale: what the product is multiplied by (Gemm's
    alpha). addend, addend_scale: index of what is added at the end, and its factor (Gemm's C and beta).
    """

    data: int
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    scale: float = 1.0
    addend: int | None = None
    addend_scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """A constant added to what a site computes, ours to correct: only this site's output meets it.

    node, index: who reads it. value: the constant. shape: its shape, of N elements. scale: the factor before it (Gemm's beta).
    """

    node: ir.Node
    index: int
    value: ir.Value
    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A constant weight and a node that multiplies or gathers it.

    name: unique and readable; what ``--include`` matches. node, operand: who reads the weight, at which input.
    weight, weight_shape, stored: name, shape and type of the constant in the file; root: the value from which on only
    transposes and reshapes follow (the constant itself, or what Cast or DequantizeLinear make of it).
    layout: how root is read as the matrix W (K, N) with y = x W (linear) or as the table W (V, D) with rows W[ids] (lookup).
    operand_layout: how root is read as the node's operand.
    dtype: what the node computes in. wiring: how the node's data meets W; None when the site is only listed.
    refusal: why it is not taken, or None. path: where the node stands (``then_branch of If_3``), empty in the main graph.
    """

    name: str
    op: str
    kind: Kind
    node: ir.Node
    operand: int
    weight: str
    weight_shape: tuple[int, ...]
    stored: str
    root: ir.Value
    layout: Layout
    operand_layout: Layout
    dtype: str
    wiring: Wiring | None = None
    bias: Bias | None = None
    refusal: str | None = None
    path: str = ""

    @property
    def K(self) -> int:  # noqa: N802
        """Length of what is contracted; rows of a table."""
        return self.layout.shape[0]

    @property
    def N(self) -> int:  # noqa: N802
        """Length of what comes out; columns of a table."""
        return self.layout.shape[1]

    @property
    def elements(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def data(self) -> ir.Value:
        """What the weight is multiplied with, or the ids that it is asked for."""
        assert self.wiring is not None
        value = self.node.inputs[self.wiring.data]
        assert value is not None
        return value


@dataclass(frozen=True, slots=True, eq=False)
class Follower:
    """A constant that must follow when the width between the sites of a group is cut.

    node, index: who reads it. axis: of a constant with one entry a channel, the axis that is cut to the kept channels; None for the
    shape of a Reshape, which becomes `shape`: 0 keeps a dimension, None is the new size of a head.
    """

    node: ir.Node
    index: int
    axis: int | None = None
    shape: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Width:
    """What lies between the sites of a group that can be cut narrower without another node.

    size: of a head (of the whole hidden layer of an FFN, heads being 1). heads: of the first site (of a key: its own). repeat: how
    many heads of the last site read one of the first (grouped queries). followers: constants on the way that must follow.
    """

    size: int
    heads: int = 1
    repeat: int = 1
    followers: tuple[Follower, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Sites that are best taken together, or one site alone.

    kind: ``alone``, ``shared`` (one weight, several nodes), ``tied`` (a table and a head), ``qkv``, ``gate_up``,
    ``up_down`` (the last site is down), ``value_output``, ``query_key``. transposed: for each site whether its matrix is the first
    one's transpose (weights that are shared only; False elsewhere). keeper: a node outside the group that reads the weight too, which
    so stays in the file whatever becomes of the group; empty when there is none (weights that are shared only).
    width: what can be cut between the sites of ``up_down``, ``value_output`` and ``query_key``; refusal: why it cannot be.
    """

    name: str
    kind: str
    sites: tuple[Site, ...]
    transposed: tuple[bool, ...]
    keeper: str = ""
    width: Width | None = None
    refusal: str = ""

    @property
    def shares_weight(self) -> bool:
        return self.kind in ("alone", "shared", "tied")

    @property
    def elements(self) -> int:
        """Numbers in the weights, each counted once."""
        return sum({s.weight: s.elements for s in self.sites}.values())


@dataclass(frozen=True, slots=True)
class Finding:
    """All constant weight uses (also refused ones) and all groups; groups may overlap, ``alone``, ``shared`` and ``tied`` do not."""

    sites: tuple[Site, ...]
    groups: tuple[Group, ...]

    @property
    def units(self) -> tuple[Group, ...]:
        """The groups that partition the sites which can be taken."""
        return tuple(g for g in self.groups if g.shares_weight)

    @property
    def overlapping(self) -> tuple[Group, ...]:
        """The groups of several weights, which are taken instead of their members."""
        return tuple(g for g in self.groups if not g.shares_weight)


# --- calibrate ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Reaction:
    """How the model's outputs react to an error E (K, N) of a site's weight: they move by about tr(E^T C' E output).

    C' (`InputStatistics.weighing`) is the second moment of the input, of which `share` is replaced by `input` (K, K), of trace one:
    what the errors of a whole sequence, which add up, see of it. output: (N, N).
    """

    input: Array
    output: Array
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """What the calibration data showed at a site's input.

    count: rows seen. second: (K, K) float64, mean of x x^T; mean: (K,) float64 (linear sites).
    frequencies: (V,) float64, the share of lookups that asked for each row (lookup sites).
    cross, dense_mean: of live statistics, where x is what the compressed part gives and z the dense model's input, (K, K), mean of
    x z^T, shrunk as `second` is, and (K,), mean of z. reaction: of the model's outputs, None where that is not known.
    shrinkage: a in [0, 1]; second is (1 - a) times what was measured plus a times its mean eigenvalue on the diagonal,
    and frequencies likewise lean towards 1 / V, so that few samples make no direction free.
    """

    count: int
    second: Array | None = None
    mean: Array | None = None
    frequencies: Array | None = None
    shrinkage: float = 0.0
    cross: Array | None = None
    dense_mean: Array | None = None
    reaction: Reaction | None = None

    def weighing(self, centred: bool) -> Array:
        """(K, K): by which an error of the weight is weighed on its input side, as the outputs would."""
        assert self.second is not None
        moment = self.centred if centred else self.second
        if self.reaction is None or not self.reaction.share:
            return moment
        share, spread = self.reaction.share, float(moment.trace())
        return (1.0 - share) * moment + share * spread * self.reaction.input

    @property
    def centred(self) -> Array:
        """(K, K), the covariance, shrunk alike: what is left of `second` once a bias absorbs the mean."""
        assert self.second is not None and self.mean is not None
        return self.second - (1.0 - self.shrinkage) * self.mean[:, None] * self.mean


# --- plan ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with a group, and why. movement: as the candidate's."""

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

    @property
    def rewrites(self) -> bool:
        return self.method != "dense" or self.storage is not None


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
    """What the user asked for. At most one of keep, size, flops, energy, rank binds; max_error judges (or steers when alone)."""

    keep: float | None = None
    size: Amount | None = None
    flops: Amount | None = None
    energy: float | None = None
    rank: int | Literal["full"] | None = None
    max_error: tuple[Limit, ...] = ()
    objective: str = "size"

    @property
    def bounds_size(self) -> bool:
        """Whether something other than the error limit binds."""
        return any(v is not None for v in (self.keep, self.size, self.flops, self.energy, self.rank))

    @property
    def bounds(self) -> tuple[str, ...]:
        """What binds, as it is written on the command line: ``--size 60MB``."""
        names = ("keep", "size", "flops", "energy", "rank")
        given = [(n, v) for n in names if (v := getattr(self, n)) is not None]
        return tuple(
            f"--{n} {v}{'B' if n == 'size' and not v.relative else ''}"
            if isinstance(v, Amount)
            else f"--{n} {v}"
            for n, v in given
        )

    def __str__(self) -> str:
        parts = list(self.bounds)
        if self.max_error:
            parts.append("--max-error " + ",".join(map(str, self.max_error)))
        return ", ".join(parts) or "none"


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


# --- verify -------------------------------------------------------------------------------------------------------


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
    """The answers to both questions of verification."""

    outputs: tuple[tuple[str, OutputEvidence], ...]
    engine: str  # "ran" or "built, not run: <reason>"
    held_out: str  # where the data of the second question came from
    verdict: Literal["passed", "failed", "unchanged"]
    metric: tuple[float, float] | None = None  # original's and compiled's
    failures: tuple[str, ...] = ()

    def with_noise(self, relative: Mapping[str, float]) -> Evidence:
        """The same with each output's noise floor filled in."""
        outputs = tuple(
            (n, dataclasses.replace(o, noise_floor=relative.get(n, 0.0))) for n, o in self.outputs
        )
        return dataclasses.replace(self, outputs=outputs)

    def to_json(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        document["outputs"] = {name: dataclasses.asdict(value) for name, value in self.outputs}
        return document


# --- the trade-off of size and error ------------------------------------------------------------------------------


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


# --- publish ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiteReport:
    """A line of ``sites`` in ``lrcompile.json``."""

    name: str
    op: str
    weight_shape: tuple[int, ...]
    method: str
    rank: int | None
    storage: str | None
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
class Result:
    """What `lrcompile.compile` gives back: where the folder is, and what its manifest says; tradeoff: every plan it tried."""

    path: Path
    plan: Plan
    evidence: Evidence
    totals: Totals
    manifest: Mapping[str, Any] = field(repr=False)
    tradeoff: Tradeoff | None = field(default=None, repr=False)

    def __str__(self) -> str:
        t = self.totals
        lines = [str(self.plan), ""]
        lines += [
            f"{name}: cosine {o.cosine:.4f}  relative L2 {o.relative_l2:.2e}  "
            f"SNR {'inf' if o.snr_db is None else f'{o.snr_db:.1f}'} dB  noise {o.noise_floor:.1e}"
            for name, o in self.evidence.outputs
        ]
        lines.append(
            f"{self.evidence.verdict}: {t.parameters_before:,} -> {t.parameters_after:,} parameters, "
            f"{t.bytes_before / 1e6:.1f} -> {t.bytes_after / 1e6:.1f} MB, in {self.path}"
        )
        return "\n".join(lines)
