"""The trade-off of size and error: what every plan kept and how far it moved the outputs; written as JSON or as a picture.

A point is measured (the plan was compiled and verified) or only predicted; the two are never mixed up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lrcompile.cost import bytes_of
from lrcompile.errors import UsageError
from lrcompile.plan import Problem, flops_after, traced
from lrcompile.records import Evidence, OutputEvidence, Plan, Tradeoff, TradeoffPoint
from lrcompile.report import tradeoff_file
from lrcompile.store import write_json, write_text

# Shares for which a curve is predicted.
SHARES = tuple(i / 20 for i in range(6, 21))
_FAR = 4.0  # relative squared: what moved further is lost, however far


def point_of(problem: Problem, plan: Plan, evidence: Evidence, model: ir.Model) -> TradeoffPoint:
    """A plan that was compiled and verified. model: what came out, whose bytes are counted."""
    outputs = [o for _, o in evidence.outputs]
    return TradeoffPoint(
        kept=plan.kept,
        parameters=_parameters(plan),
        bytes=bytes_of(model),
        flops=flops_after(problem, plan),
        movement=plan.movement,
        moved=_moved(outputs),
        cosine=min((o.cosine for o in outputs), default=None),
        snr_db=min((o.snr_db for o in outputs if o.snr_db is not None), default=None),
        kl=max((o.kl for o in outputs if o.kl is not None), default=None),
        top1=min((o.top1 for o in outputs if o.top1 is not None), default=None),
        relative_l2=max((o.relative_l2 for o in outputs), default=None),
        max_abs=max((o.max_abs for o in outputs), default=None),
        metric=evidence.metric,
        verdict=evidence.verdict,
        failures=evidence.failures,
    )


def predicted(problem: Problem) -> Iterator[TradeoffPoint]:
    """What is predicted of plans at many shares, the smallest first; nothing where nothing is predicted."""
    for plan in traced(problem, SHARES):
        saved = sum(d.bytes_before - d.bytes_after for d in plan.rewritten)
        assert problem.whole is not None
        yield TradeoffPoint(
            kept=plan.kept, parameters=_parameters(plan), bytes=problem.whole.bytes - saved,
            flops=flops_after(problem, plan), movement=plan.movement,
        )  # fmt: skip


def check_pareto(path: Path | None, out: Path | str | None) -> None:
    """A published folder holds only what it lists: the curve goes beside it. Raises UsageError."""
    if path is None or out is None:
        return
    folder = Path(out).resolve()
    if path.resolve() == folder or folder in path.resolve().parents:
        raise UsageError(
            f"--pareto {path} lies in the folder that is published, which holds only files of its own: write it beside {out}"
        )


def write_tradeoff(path: Path, curve: Tradeoff) -> None:
    """The curve as JSON or SVG, by the path's suffix. Raises UsageError or BuildError where it cannot be written."""
    document = plain(curve)
    if path.suffix.lower() == ".svg":
        write_text(path, tradeoff_file(document))
    else:
        write_json(path, document)


def plain(curve: Tradeoff) -> Mapping[str, Any]:
    """The curve in JSON's types: numbers that JSON cannot say are null."""
    return dict(_plain(curve.to_json()))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parameters(plan: Plan) -> int:
    return (plan.eligible or 0) - sum(d.parameters_before - d.parameters_after for d in plan.rewritten)


def _moved(outputs: Sequence[OutputEvidence]) -> float | None:
    """As `Plan.movement` counts it: KL of the logits where there are any, else relative squared; the mean over outputs."""
    logits = [o.kl for o in outputs if o.kl is not None]
    sizes = logits or [min(o.relative_l2**2, _FAR) for o in outputs]
    return sum(sizes) / len(sizes) if sizes else None
