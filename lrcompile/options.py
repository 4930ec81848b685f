"""Everything a compile can be asked for, with its default. The command line and YAML files fill the same record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrcompile.errors import UsageError
from lrcompile.records import Budget, Limit, Plan

logger = logging.getLogger(__name__)

# What holds when neither a budget nor a plan is given.
DEFAULT_LIMIT = Limit("cosine", 0.99)

Data = str | Path | Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `lrcompile.compile`; see the command line's help for what each means."""

    target: str = "ort-cpu"
    methods: tuple[str, ...] = ("auto",)
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
        if b.energy is not None and not 0 < b.energy <= 1:
            raise UsageError(f"--energy {b.energy:g}: give a share, above 0 and at most 1")
        if isinstance(b.rank, int) and b.rank < 1:
            raise UsageError(f"--rank {b.rank}: give a rank of at least 1, or full")
        given = [f"--{n}" for n in ("keep", "energy", "rank") if getattr(b, n) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} both bound the size: give one of them")
        if self.plan is not None and given:
            raise UsageError(f"--plan already decides every rank: leave {given[0]} out")
        if b.objective != "size":
            raise UsageError(f"--objective {b.objective}: this version minimises size only")
        if self.batch < 1 or self.threads < 1:
            raise UsageError("--batch and --threads are at least 1")
        if self.metric is None and any(limit.name == "metric" for limit in b.max_error):
            raise UsageError("--max-error metric=.. needs --metric f.py:func")

    def completed(self) -> Options:
        """These options, checked, with the default budget where none is given. Raises UsageError where data is missing for it."""
        self.check()
        given = self.budget.bounds_size or self.budget.max_error or self.plan is not None
        if not given and self.data is None and self.verify_data is None:
            raise UsageError(
                f"no budget is given, and the default (--max-error {DEFAULT_LIMIT}) needs --data: give --data, "
                "or --keep, --energy, --rank, --max-error or --plan"
            )
        if not given:
            logger.warning("no budget is given: --max-error %s", DEFAULT_LIMIT)
        options = self if given else replace(self, budget=replace(self.budget, max_error=(DEFAULT_LIMIT,)))
        if self.data is None and "auto" in self.methods and options._changes_weights:
            raise UsageError(
                "without --data there is nothing to weigh the weights by: give --data, or --rank full (identity), "
                "or name a method that needs none, such as --methods svd-plain with --keep, --energy or --rank"
            )
        return options

    @property
    def _changes_weights(self) -> bool:
        """Whether a method must choose what to leave out: not at full rank, nor where everything is kept or a plan decides."""
        return self.plan is None and self.budget.rank != "full" and self.budget.keep != 1.0
