"""Plain-text tables of what people read on a terminal: plans, figures, totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lrcompile.records import Decision, Evidence, Plan, Result, Totals, Tradeoff
from lrcompile.timing import CostTable


def columns(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,)) -> list[str]:
    """Lines of a table whose columns are as wide as they need; those named in `left` start at their left edge."""
    starts = set(left)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = (
            t.ljust(w) if i in starts else t.rjust(w)
            for i, (t, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def counted(reasons: Iterable[str]) -> list[str]:
    """Each reason once, the most frequent first, with how often it was given."""
    return [f"{count:5} x {reason}" for reason, count in Counter(reasons).most_common()]


def plan_table(plan: Plan, why: bool = False) -> str:
    """The groups that are rewritten, then the others: with why each by itself, else counted by reason.

    kept: share of the parameters, of a weight in codes that of its bytes. moves: how far each is predicted to move the outputs, where
    that is known. saves: see `Decision.saves`.
    """
    shown = plan.decisions if why else plan.rewritten
    predicts = any(d.movement is not None for d in shown)
    head = [
        "weight",
        "method",
        "rank",
        "parameters",
        "kept",
        "error",
        *(["moves"] if predicts else []),
        "saves",
        "reason",
    ]
    rows = [head, *(_row(d, predicts) for d in shown)]
    lines = columns(rows, left=(0, 1, len(head) - 2, len(head) - 1)) if shown else []
    if not why and (rest := [d.reason for d in plan.decisions if not d.rewrites]):
        lines += ["left as they are:", *counted(rest)]
    before, after = (sum(getattr(d, f"parameters_{w}") for d in plan.decisions) for w in ("before", "after"))
    lines.append(
        f"{len(plan.rewritten)} of {len(plan.decisions)} weights rewritten for {plan.target}: "
        f"{before:,} -> {after:,} of their parameters ({_share(after, before)})"
    )
    if any(d.storage is not None for d in plan.decisions):
        held = [sum(getattr(d, f"bytes_{w}") for d in plan.decisions) for w in ("before", "after")]
        lines.append(f"{held[0]:,} -> {held[1]:,} of their bytes ({_share(held[1], held[0])})")
    return "\n".join([*lines, *plan.predicted, *plan.notes])


def _row(d: Decision, predicts: bool) -> list[str]:
    error = (
        ""
        if d.claimed_error is None
        else f"{d.claimed_error:.3f}"
        if d.claimed_error >= 5e-4
        else f"{d.claimed_error:.0e}"
    )
    rank = "" if d.rank is None else str(d.rank)
    what = "parameters" if d.storage is None else "bytes"
    after, before = (getattr(d, f"{what}_{w}") for w in ("after", "before"))
    kept = f"{after / before:.3f}" if before else ""
    moves = [_scientific(d.movement)] if predicts else []
    form = d.method if d.storage is None else f"{d.method} in {d.storage}"
    if d.activations is not None:
        form += f", input {d.activations}"
    return [
        d.group,
        form,
        rank,
        f"{d.parameters_before:,}",
        kept,
        error,
        *moves,
        ", ".join(d.saves),
        d.reason,
    ]


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def figures(evidence: Evidence) -> list[str]:
    """How far each output moved, beside how far the original moves by itself."""
    optional = [
        name for name in ("kl", "top1") if any(getattr(o, name) is not None for _, o in evidence.outputs)
    ]
    rows = [["output", "cosine", "relative L2", "noise floor", "SNR dB", "max abs", *optional]]
    for name, o in evidence.outputs:
        snr = "inf" if o.snr_db is None else f"{o.snr_db:.1f}"
        extra = ["" if (v := getattr(o, n)) is None else f"{v:.4f}" for n in optional]
        rows.append(
            [
                name,
                f"{o.cosine:.5f}",
                f"{o.relative_l2:.2e}",
                f"{o.noise_floor:.0e}",
                snr,
                f"{o.max_abs:.2e}",
                *extra,
            ]
        )
    lines = columns(rows)
    if evidence.metric is not None:
        before, after = evidence.metric
        lines.append(f"metric {before:.6g} -> {after:.6g}" + (f" ({after / before:.3f}x)" if before else ""))
    return lines


def totals_lines(totals: Totals) -> list[str]:
    t = totals
    return [
        f"parameters  {t.parameters_before:,} -> {t.parameters_after:,} ({_share(t.parameters_after, t.parameters_before)})",
        f"constants   {t.bytes_before / 1e6:,.2f} MB -> {t.bytes_after / 1e6:,.2f} MB ({_share(t.bytes_after, t.bytes_before)})",
        f"FLOPs       {t.flops_before:,} -> {t.flops_after:,} ({_share(t.flops_after, t.flops_before)}) at the first feed",
    ]


def tradeoff_lines(curve: Tradeoff) -> list[str]:
    """Every plan that was compiled and verified, the smallest first, and in words where the search ended."""
    limits = curve.budget.max_error
    names = [limit.name for limit in limits]
    order = sorted(range(len(curve.points)), key=lambda i: (curve.points[i].kept, i))
    rows = [["kept", "MB", "predicted", "moved by", *names, "verdict"]]
    for i in order:
        p = curve.points[i]
        values = [(n, p.figure(limit)) for n, limit in zip(names, limits, strict=True)]
        figures = [("inf" if n == "snr" else "-") if v is None else f"{v:.5g}" for n, v in values]
        mark = " <" if i == curve.chosen else ""
        size = f"{p.bytes / 1e6:,.{1 if p.bytes >= 1e6 else 4}f}"
        rows.append(
            [
                f"{p.kept:.3f}",
                size,
                _scientific(p.movement),
                _scientific(p.moved),
                *figures,
                f"{p.verdict}{mark}",
            ]
        )
    head = "tried, compiled and verified (kept: of the eligible parameters; moved: relative squared, KL of logits):"
    return [head, *columns(rows, left=(len(rows[0]) - 1,)), curve.outcome]


def result_table(result: Result) -> str:
    """The plan in short, the outputs' figures, the totals, the verdict; what else was tried, where an error limit was searched for."""
    e = result.evidence
    last = f"{e.verdict}: measured on {e.held_out} ({e.engine}); published in {result.path}"
    curve = result.tradeoff
    tried = ["", *tradeoff_lines(curve)] if curve is not None and curve.searched else []
    totals = totals_lines(result.totals)
    return "\n".join(
        [plan_table(result.plan), "", *figures(e), "", *totals, "", *map(str, result.speed), last, *tried]
    )


def cost_table(table: CostTable) -> str:
    """Every timing, those of one weight together: milliseconds, their spread, and the share of what the weight itself takes."""
    dense = {(t.form.K, t.form.widths, t.rows): t.seconds for t in table.timings if t.form.method == "dense"}
    rows = [["K", "N", "rows", "form", "rank", "type", "ms", "spread", "of dense"]]
    for t in sorted(
        table.timings, key=lambda t: (t.form.K, t.form.widths, t.rows, t.form.method, t.form.rank or 0)
    ):
        f = t.form
        alone = [dense.get((f.K, (n,), t.rows)) for n in f.widths]
        whole = None if None in alone else sum(a for a in alone if a is not None)
        share = f"{t.seconds / whole:.2f}" if whole else ""
        name = f.method + (", permutation folded" if f.permutes == "out" else "")
        widths = "+".join(map(str, f.widths))
        rank = "" if f.rank is None else str(f.rank)
        rows.append(
            [
                str(f.K),
                widths,
                str(t.rows),
                name,
                rank,
                f.dtype,
                f"{1e3 * t.seconds:.4f}",
                f"{t.spread:.0%}",
                share,
            ]
        )
    threads = f"{table.threads} thread{'s' * (table.threads > 1)}"
    head = f"{len(table.timings)} timings of {table.target} on {table.device}, {table.version}, {threads}"
    return "\n".join([head, *columns(rows, left=(1, 3, 5))])


def _share(after: int, before: int) -> str:
    return f"{after / before:.1%}" if before else "-"
