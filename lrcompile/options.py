"""Everything a compile can be asked for, with its default. The command line and YAML files fill the same record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrcompile.errors import UsageError
from lrcompile.records import Amount, Budget, EngineOptions, Limit, Plan, Precision

logger = logging.getLogger(__name__)

# What holds when neither a budget nor a plan is given.
DEFAULT_LIMIT = Limit("cosine", 0.99)

# What --objective can make small.
OBJECTIVES = ("size", "disk", "latency", "flops")

Data = str | Path | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lrcompile.compile`; see the command line's help for what each means."""

    target: str = "ort-cpu"
    methods: tuple[str, ...] = ("auto",)
    storage: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    budget: Budget = field(default_factory=Budget)
    plan: Plan | None = None
    data: Data | None = None
    verify_data: Data | None = None
    metric: str | Callable[..., float] | None = None
    include: str | None = None
    exclude: str | None = None
    batch: int = 8
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    refit: bool = True
    precision: Precision | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    margin: float = 1.02
    pareto: Path | None = None
    gradients: bool = True
    threads: int = 1
    timeout: float | None = None
    memory: int | None = None
    allow_hardlinks: bool = False
    external_data: bool | None = None
    keep_functions: bool = False
    gs_script: str | None = None
    force: bool = False
    cache: Path | None = None

    def check(self) -> None:
        """Raises UsageError naming the option whose value makes no sense."""
        b = self.budget
        if b.keep is not None and not 0 < b.keep <= 1:
            raise UsageError(
                f"--keep {b.keep:g}: give the share of parameters to keep, above 0 and at most 1"
            )
        _check_amount("size", b.size, "60MB")
        _check_amount("flops", b.flops, "1.2G")
        if b.latency is not None and not 0 < b.latency.value < (1 if b.latency.relative else float("inf")):
            raise UsageError(
                f"--latency {b.latency}: give a time such as 5ms, or a share of the original's, below 1x, such as 0.7x"
            )
        if b.bits is not None and not 0 < b.bits <= 64:
            raise UsageError(f"--bits {b.bits:g}: give stored bits per number, above 0, such as 4.5")
        if b.energy is not None and not 0 < b.energy <= 1:
            raise UsageError(f"--energy {b.energy:g}: give a share, above 0 and at most 1")
        if isinstance(b.rank, int) and b.rank < 1:
            raise UsageError(f"--rank {b.rank}: give a rank of at least 1, or full")
        given = b.bounds
        if len(given) > 1:
            names = [words.split()[0] for words in given]
            raise UsageError(f"{' and '.join(names)} both bound what is kept: give one of them")
        if self.plan is not None and given:
            raise UsageError(f"--plan already decides every rank: leave {given[0].split()[0]} out")
        if b.objective not in OBJECTIVES:
            raise UsageError(f"--objective {b.objective}: it is one of {', '.join(OBJECTIVES)}")
        if not 1 <= self.margin < float("inf"):
            raise UsageError(f"--margin {self.margin:g}: how many times faster an engine must be, at least 1")
        if self.activations and self.precision not in (None, "fp32"):
            raise UsageError(
                f"--activations: inputs are rounded where they are float32, leave --precision {self.precision} out"
            )
        self._check_pareto()
        if self.batch < 1 or self.threads < 1:
            raise UsageError("--batch and --threads are at least 1")
        if self.metric is None and any(limit.name == "metric" for limit in b.max_error):
            raise UsageError("--max-error metric=.. needs --metric f.py:func")

    def _check_pareto(self) -> None:
        if self.pareto is None:
            return
        if self.pareto.suffix.lower() not in (".json", ".svg"):
            raise UsageError(f"--pareto {self.pareto}: the file's name ends in .json or .svg")
        if not self.pareto.absolute().parent.is_dir():
            raise UsageError(f"--pareto {self.pareto}: there is no folder {self.pareto.parent}")
        if not self.searches:
            decided = "--plan" if self.plan is not None else self.budget.bounds[0]
            raise UsageError(
                f"{decided} already decides every form: there is no trade-off to trace, leave --pareto out"
            )

    def completed(self) -> Options:
        """These options, checked, with the default budget where none is given. Raises UsageError where data is missing for it."""
        self.check()
        given = self.budget.bounds_size or self.budget.max_error or self.plan is not None
        if not given and self.data is None and self.verify_data is None:
            raise UsageError(
                f"no budget is given, and the default (--max-error {DEFAULT_LIMIT}) needs --data: give --data, "
                "or --keep, --size, --flops, --latency, --energy, --rank, --max-error or --plan"
            )
        if not given:
            logger.warning("no budget is given: --max-error %s", DEFAULT_LIMIT)
        options = self if given else replace(self, budget=replace(self.budget, max_error=(DEFAULT_LIMIT,)))
        if self.data is None and "auto" in self.methods and options._changes_weights:
            raise UsageError(
                "without --data there is nothing to weigh the weights by: give --data, or --rank full (identity), "
                "or name a method that needs none, such as --methods svd-plain with --keep, --size, --flops, --latency, --energy or --rank"
            )
        if self.pareto is not None and self.data is None and not options.budget.max_error:
            raise UsageError(
                "--pareto needs --data: without it nothing predicts how far a smaller plan moves the outputs"
            )
        return options

    @property
    def storages(self) -> tuple[str, ...]:
        """What factors and weights may be stored in, besides their own type; ``--bits`` implies auto."""
        return self.storage or (("auto",) if self.budget.bits is not None else ())

    @property
    def refits(self) -> bool:
        """Whether factors are refitted. The plans that an error limit tries are not: each would cost three runs of the model more, and
        where outputs must stay close refitting changes next to nothing (docs/accuracy.md).
        """
        return self.refit and (self.budget.bounds_size or self.plan is not None)

    @property
    def searches(self) -> bool:
        """Whether forms of different groups compete: not where a plan, one rank or one energy says what each becomes."""
        b = self.budget
        return self.plan is None and b.rank is None and b.energy is None and not self._keeps_all

    @property
    def _changes_weights(self) -> bool:
        """Whether a method must choose what to leave out: not at full rank, nor where everything is kept or a plan decides."""
        return self.plan is None and self.budget.rank != "full" and not self._keeps_all

    @property
    def _keeps_all(self) -> bool:
        b = self.budget
        return b.keep == 1.0 or Amount(1.0, relative=True) in (b.size, b.flops)


def _check_amount(name: str, amount: Amount | None, example: str) -> None:
    if amount is None:
        return
    legal = 0 < amount.value <= 1 if amount.relative else 1 <= amount.value < float("inf")
    if not legal:
        raise UsageError(
            f"--{name} {amount}: give an amount such as {example}, or a share of the original's, above 0x and at most 1x, such as 0.5x"
        )
