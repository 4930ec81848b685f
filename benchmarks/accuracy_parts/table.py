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


def table(
    rows: Sequence[Row], keeps: Sequence[float], texts: Sequence[str], cells: Cells, higher: bool
) -> str:
    """Methods down; for each keep a column a text; what was really kept at the end. The best of each column is bold, whoever's it is.

    higher: whether more is better.
    """
    columns = [(keep, text) for keep in keeps for text in texts]
    lines = [
        "| method | " + " | ".join(f"{keep:g}, {text}" for keep, text in columns) + " | really kept |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    best = {}
    for column in columns:
        values = [v for row in rows if (v := score(cells, row.name, *column)) is not None]
        best[column] = (max if higher else min)(values, default=None)
    for row in rows:
        shown = [
            _shown(cells.get((row.name, column[0])), column[1], best[column], higher) for column in columns
        ]
        found = [cells[row.name, k] for k in keeps if (row.name, k) in cells]
        kept = " / ".join(f"{c.kept:.3f}" if c.scores else "-" for c in found)
        lines.append(f"| {row.name} | " + " | ".join(shown) + f" | {kept} |")
    reasons = dict.fromkeys(f"{name}: {c.failure}" for (name, _), c in cells.items() if c.failure)
    return "\n".join([*lines, *(f"\n{reason}" for reason in reasons)])


def score(cells: Cells, row: str, keep: float, text: str) -> float | None:
    cell = cells.get((row, keep))
    return None if cell is None or cell.scores is None else cell.scores.get(text)


def _shown(cell: Cell | None, text: str, best: float | None, higher: bool) -> str:
    if cell is None:
        return ""
    if cell.scores is None:
        return "no gradients" if "no gradients" in cell.failure else "none"
    value = cell.scores[text]
    shown = number(value, higher)
    return f"**{shown}**" if best is not None and shown == number(best, higher) else shown


def number(value: float, higher: bool) -> str:
    """Cosines to four digits; perplexities relative to dense, which may be in the thousands."""
    if higher:
        return f"{value:.4f}"
    return f"x{value:.3f}" if value < 10 else f"x{value:.4g}" if value < 1e4 else f"x{value:.1e}"


def verdicts(promises: Sequence[Promise], cells: Cells, higher: bool) -> str:
    """What was promised of these cells, what came out, and the goals beside them; met is said of what is printed."""
    sign = ">=" if higher else "<="
    lines = ["| what | asked | reached | | goal | |", "|---|---:|---:|---|---:|---|"]
    for p in promises:
        value = score(cells, p.row, p.keep, p.text)
        reached = "not measured" if value is None else number(value, higher)
        goal = "" if p.goal is None else f"{p.goal:g}"
        lines.append(
            f"| {p.row}: keep {p.keep:g}, {p.text} | {sign} {p.limit:g} | {reached} | {verdict(value, p.limit, higher)} | {goal} | "
            f"{verdict(value, p.goal, higher)} |"
        )
    return "\n".join(lines)


def verdict(value: float | None, limit: float | None, higher: bool) -> str:
    if value is None or limit is None:
        return ""
    holds = value >= limit if higher else value <= limit
    return "met" if holds else "**not met**"
