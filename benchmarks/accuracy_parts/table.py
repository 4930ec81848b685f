"""The table of methods: what each row is, one cell after another, and what was promised of some of them. Printing is pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from accuracy_parts.lab import Lab, Refused, within

from lrcompile.errors import BudgetError


@dataclass(frozen=True)
class Row:
    """A method. statistics: what it knows of the data, by `Lab.statistics`; allocated: by measured sensitivity, not one ratio for all."""

    name: str
    methods: tuple[str, ...]
    statistics: str
    allocated: bool = False
    refitted: bool = False


@dataclass(frozen=True)
class Cell:
    """What a row gave at one keep. kept: of the eligible parameters. scores: by text. failure: why there are none."""

    kept: float = 0.0
    scores: Mapping[str, float] | None = None
    failure: str = ""


@dataclass(frozen=True)
class Promise:
    """What the project said it would show: at least (cosine) or at most (perplexity) `limit`; goal: what it would like to."""

    row: str
    keep: float
    text: str
    limit: float
    goal: float | None = None


Cells = Mapping[tuple[str, float], Cell]

SVD, PIVOTED, AUTO = ("svd",), ("pivoted",), ("auto",)
PAIRS_ONLY, DEFAULT = "pairs only: all of this", "everything: the default, `auto`"
BASELINES = (
    Row("plain SVD", ("svd-plain",), "none"),
    Row("ASVD scaling", SVD, "absolute"),
    Row("Fisher-weighted SVD", SVD, "fisher"),
    Row("SVD-LLM whitening", SVD, "second"),
)
OURS = (
    Row("pairs, whitened with bias, one ratio", SVD, "plain"),
    Row("pivoted, one ratio", PIVOTED, "plain"),
    Row("+ measured sensitivity, pairs only", SVD, "plain", allocated=True),
    Row("+ measured sensitivity, pivoted", PIVOTED, "plain", allocated=True),
    Row("+ measured sensitivity, every form", AUTO, "plain", allocated=True),
    Row("+ reactions, pairs only", SVD, "reacting", allocated=True),
    Row("+ reactions, pivoted", PIVOTED, "reacting", allocated=True),
    Row("+ reactions, every form", AUTO, "reacting", allocated=True),
    Row(PAIRS_ONLY, SVD, "reacting", allocated=True, refitted=True),
    Row("pivoted: all of this", PIVOTED, "reacting", allocated=True, refitted=True),
    Row(DEFAULT, AUTO, "reacting", allocated=True, refitted=True),
)
ROWS = (*BASELINES, *OURS)


def fill(lab: Lab, rows: Sequence[Row], keeps: Sequence[float]) -> Iterator[tuple[tuple[str, float], Cell]]:
    """Every cell, carried out and scored, row by row."""
    for row in rows:
        known = lab.statistics(row.statistics)
        if isinstance(known, Refused):
            for keep in keeps:
                yield (row.name, keep), Cell(failure=known.reason)
            continue
        problem = lab.problem(row.methods, known, row.allocated)
        for keep in keeps:
            try:
                plan = within(problem, keep)
            except BudgetError as error:
                yield (row.name, keep), Cell(failure=str(error))
                continue
            with lab.written(lab.factors(plan, row.methods, known, row.refitted)) as path:
                cell = Cell(plan.kept, lab.scores(path))
            lab.say(f"{row.name}, keep {keep:g}: {cell}")
            yield (row.name, keep), cell


def table(rows: Sequence[Row], keeps: Sequence[float], texts: Sequence[str], cells: Cells) -> str:
    """Methods down; for each keep a column a text; what was really kept at the end. The best of each column is bold, whoever's it is."""
    columns = [(keep, text) for keep in keeps for text in texts]
    lines = [
        "| method | " + " | ".join(f"{keep:g}, {text}" for keep, text in columns) + " | really kept |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    best = {c: best_of([v for row in rows if (v := value(cells, row.name, *c)) is not None], len(texts) and None) for c in columns}
    for row in rows:
        shown = [shown_as(cells.get((row.name, keep), Cell()), text, best[keep, text]) for keep, text in columns]
        kept = " / ".join(f"{cells.get((row.name, k), Cell()).kept:.3f}" for k in keeps)
        lines.append(f"| {row.name} | " + " | ".join(shown) + f" | {kept} |")
    return "\n".join(lines)
