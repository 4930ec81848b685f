"""What a plugin must offer, and what it is given. Structural: nothing needs to be inherited.

A file under ``passes/lrcompile_passes`` ends with ``factorizations: tuple[Factorization, ...] = (...)``, one under
``runtimes/lrcompile_runtimes`` with ``runtimes: tuple[Runtime, ...] = (...)``: that is the whole registration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from lrcompile.records import (
    Built,
    Candidate,
    Decision,
    EngineOptions,
    Group,
    InputStatistics,
    Kind,
    Refusal,
    Site,
    Window,
)

if TYPE_CHECKING:  # half a second, which every child process would pay
    import onnx_ir as ir

Array = np.ndarray[Any, np.dtype[Any]]
Factors = Mapping[str, Array]


class Codes(Protocol):
    """A matrix that is coded already: `lrcompile.quantize.Coded`."""

    @property
    def values(self) -> Array: ...


# A constant that a decision changes: the site's name and "weight" or "bias"; the group's name and "kept" (see `edits`).
Constant = tuple[str, str]


class StatisticsSource(Protocol):
    """What calibration knows. Stored today; live ones (the compressed part's own activations) have the same face."""

    def of(self, site: Site) -> InputStatistics | None:
        """Statistics of the site's input, or None without data."""
        ...

    def key(self, site: Site) -> str:
        """A hash of what `of` would return, for caches; empty without data."""
        ...


class Weights(Protocol):
    """Weights of the model as matrices, read when asked for. opset: version of the default domain in which they are used."""

    opset: int

    def matrix(self, site: Site) -> Array:
        """W of the site, float64, (K, N) for linear sites and Conv, (V, D) for lookups."""
        ...

    def bias(self, site: Site) -> Array | None:
        """The bias that is ours to correct, float64, (N,), or None."""
        ...

    def remember(self, key: tuple[str, ...], compute: Callable[[], Factors]) -> Factors:
        """Arrays that are costly to compute, kept on disk under a key that names all they depend on."""
        ...

    def low_rank_errors(self, group: Group, statistics: StatisticsSource | None) -> Array:
        """(n + 1,): the least relative error of the group at rank 0, 1, .., n = min(K, N).

        Of sites that read one value (qkv, gate_up) N is the sum, their weights standing side by side.
        """
        ...

    def low_rank_movements(self, group: Group, statistics: StatisticsSource | None) -> Array | None:
        """(n + 1,): how far these approximations are predicted to move the model's outputs; None where that is not known."""
        ...

    def low_rank(self, group: Group, statistics: StatisticsSource | None, rank: int) -> Factors:
        """The best approximation of that rank: a (K, r), b (r, N), b with orthonormal rows unless a tied head reads W^T.

        And ``bias.i`` (N_i,) of each site i whose bias absorbs the mean of what is left out.
        """
        ...

    def key(self, site: Site) -> str:
        """A hash of the site's weight and of how it is read."""
        ...

    def itemsize(self, site: Site) -> int:
        """Bytes of one factor element at the site's own storage type."""
        ...


@dataclass(frozen=True, slots=True)
class CandidateOptions:
    """Which candidates are wanted. ranks: these; None: a grid in steps of multiple. full: the exact form only.

    storages: types that may be stored, for those that have forms of their own in them (see `Factorization.factorize`).
    """

    ranks: tuple[int, ...] | None = None
    multiple: int = 1
    full: bool = False
    storages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One use of factors inside a graph, brought to its plain form by the core.

    kind "linear": x is (.., K), wanted is x W (.., N). kind "lookup": x holds ids (any shape, int32 or int64, negative
    ones count from the end), wanted are rows W[ids] (.., D). kind "conv": x is (batch, channels, ..), wanted is what the node gives,
    by Conv nodes, with `bias` (a value, or None) added by the last of them; window: what the node saw of x. transposed: W is the transpose of what was factorized.
    factors: values that hold the arrays of `Factors`, of the type that the node computes in (integers as they are); those that
    are not asked for do not enter the function. shapes: their shapes. opset: version of the default domain. index: which site
    of the group this is; equal nodes on equal inputs of several sites become one.
    """

    kind: Kind
    transposed: bool
    x: ir.Value
    factors: Mapping[str, ir.Value]
    shapes: Mapping[str, tuple[int, ...]]
    opset: int
    index: int = 0
    window: Window | None = None
    bias: ir.Value | None = None


class Op(Protocol):
    """Makes nodes: ``op("MatMul", x, a, name="a")`` gives the node's output; attributes are keywords."""

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any
    ) -> ir.Value: ...

    def constant(self, array: Array, name: str = "") -> ir.Value:
        """A small constant inside the function."""
        ...


class Factorization(Protocol):
    """One way to store a group of weights, with its mathematics and its subgraph.

    It is asked about matrices and tables; one for kernels says so by `kinds`, the `Kind` of sites that it is for: ``("conv",)``;
    one whose nodes came late says so by `least_opset`; one whose coded factors are not all of the decision's storage type
    says so by ``stored_as(factor, storage)``, the name of the factor's type.
    """

    @property
    def name(self) -> str:
        """What ``--methods`` takes."""
        ...

    @property
    def exact_at_full_rank(self) -> bool:
        """Whether the full-rank candidate reproduces the weight to rounding; only such serve ``--rank full``."""
        ...

    @property
    def needs_data(self) -> bool:
        """Whether it is refused without calibration data (full rank excepted)."""
        ...

    @property
    def only_by_name(self) -> bool:
        """Whether ``--methods auto`` leaves it out."""
        ...

    def serves(self, group: Group) -> Refusal | None:
        """None, or why this group is not for this factorization."""
        ...

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        """Candidates by rising rank, each with its cost and error."""
        ...

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        """What `factorize` will give, biases and kept channels left out: a form is timed before it is computed.

        The shape of each array; of an index an example, int32, of that shape. ``weight.i`` is what stands in the place of site i's weight.
        """
        ...

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Mapping[str, Array | Codes]:
        """The arrays of a candidate: float64, or int32 for indices. ``bias.i`` among them is site i's corrected bias, (N,).

        In a storage type the core codes them one by one. A factorization whose factors are fitted to what coding left of others, or
        share their codes, gives `Codes` in their place, and then corrects biases itself.
        """
        ...

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        """Every constant that the decision changes, float64, as the matrix (K, N) or bias (N,) of its site: the oracle.

        Always of the original's shape: where something is cut stand zeros.
        """
        ...

    def emit(self, op: Op, call: Call) -> ir.Value:
        """The function body: what `call` wants, from the factors."""
        ...

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        """New values for constants that stay constants: biases, and weights that are cut.

        With (site, "weight") among them, of any size, the site stays the node that it is; (group, "kept") are then the channels that
        are left, by which the group's followers are cut.
        """
        ...


# --- runtimes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether engines for a target can be built here; reason says what is missing and how to get it, versions what is there.

    unrunnable: why an engine that is built cannot run here (no such GPU), empty where it can.
    """

    ok: bool
    reason: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    unrunnable: str = ""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built and loaded. optimize: False switches the runtime's graph optimisations off (noise floor).

    cache: a folder for what builders keep between runs (timing and kernel caches); None: nothing is kept. serialized: an engine
    file of ours to load instead of building, whose SHA-256 must be `sha256`.
    """

    target: str
    threads: int = 1
    optimize: bool = True
    exact: bool = (
        True  # ask the runtime for its accurate kernels: we compare, so it must not add errors of its own
    )
    engine: EngineOptions = field(default_factory=EngineOptions)
    cache: Path | None = None
    serialized: Path | None = None
    sha256: str = ""


class Runs(Protocol):
    """What gives outputs for feeds: an engine, one in another process, or outputs that were stored. A context manager."""

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs by name, in the model's order. feeds: one array an input."""
        ...

    def describe(self) -> Mapping[str, str]:
        """What really runs: provider, device, version."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class Engine(Runs, Protocol):
    """A loaded model that runs. Lives in a child process."""

    def bound(self, feeds: Mapping[str, Array]) -> Callable[[int], None]:
        """A function that runs the engine so many times in a row on these feeds, and returns when the last run has ended.

        Feeds lie, and outputs stay, where the engine computes: what is timed is the engine, not the way there and back.
        """
        ...

    def nodes(self) -> Mapping[str, int]:
        """``OpType (domain) on Provider`` -> count: what really runs, after the runtime's own optimisations."""
        ...


class Rewrite(Protocol):
    """A named step from the neutral form to a target's best encoding, in place."""

    @property
    def name(self) -> str: ...

    def __call__(self, model: ir.Model) -> int:
        """Apply everywhere; returns how often it applied."""
        ...


class Runtime(Protocol):
    """Something that builds and runs ONNX models."""

    @property
    def name(self) -> str: ...

    def targets(self) -> tuple[str, ...]:
        """What ``--target`` takes: NAME or NAME-DEVICE."""
        ...

    def availability(self, target: str) -> Availability: ...

    def lowering(self, target: str) -> tuple[Rewrite, ...]: ...

    def fusions(self, target: str) -> tuple[Rewrite, ...]:
        """Rewrites of a lowered model to fused operators that the target has kernels for; each may leave the model as it is."""
        ...

    def supports(self, decision: Decision, target: str) -> Refusal | None: ...

    def engine_file(self, target: str) -> str | None:
        """Name of the file that a serialized engine is published under; None where the ``.onnx`` file itself is what runs."""
        ...

    def serialize(self, model: Path, out: Path, options: BuildOptions) -> Built:
        """Build the engine and write it to `out`; needs no device that could run it. Only asked of targets with an engine file."""
        ...

    def build(self, model: Path, options: BuildOptions) -> Engine:
        """Load the file, ready to run. Raises BuildError with the runtime's own words."""
        ...
