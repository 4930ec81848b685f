"""Rows that the compiler gives: what `lrcompile compile` with these options publishes, scored and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from accuracy_parts.lab import TARGET, Lab

import lrcompile
from bits_parts.row import Figures
from lrcompile.bench import Race, race
from lrcompile.config import options_from
from lrcompile.feeds import Feed
from lrcompile.records import Plan

THREADS = 2
SHAPES = {"one": (1, 128), "eight": (8, 128)}


def compiled(lab: Lab, words: str) -> tuple[Path, Plan]:
    """The file that ``lrcompile compile`` with these options publishes, and the plan."""
    given = words.removeprefix("--").split(" --")
    said = {
        name.removeprefix("no-").replace("-", "_"): value or not name.startswith("no-")
        for name, _, value in (option.partition(" ") for option in given)
    }
    options = replace(
        options_from({**said, "cache": str(lab.cache.root), "force": True, "timeout": 3600.0}),
        data=list(lab.calibration),
        verify_data=list(next(iter(lab.texts.values())))[
            -1:
        ],  # scored below: this asks only whether the rewrite is right
    )
    out = lab.scratch / "compiled"
    result = lrcompile.compile(lab.source.path, out, options, progress=_Talk(lab))
    return out / "model.onnx", result.plan


class _Talk:
    """Stages of a compile, each once."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._stage = lab, ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._lab.say(f"  {stage}")


def bits_of(plan: Plan) -> float:
    """Stored bits a number of all eligible weights; those left dense are float32."""
    assert plan.eligible
    kept = plan.eligible - sum(d.parameters_before for d in plan.rewritten)
    return 8.0 * (sum(d.bytes_after for d in plan.rewritten) + 4 * kept) / plan.eligible


def bytes_of(path: Path) -> float:
    """Of the file and what lies beside it for it."""
    return float(sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")))


def raced(lab: Lab, path: Path, against: Path, seconds: float) -> Mapping[str, Race]:
    """Time of `against` over the file's, interleaved, at each of `SHAPES`."""
    return {
        name: race(lab.child, TARGET, against, path, [cut(lab, *shape)], threads=THREADS, seconds=seconds)
        for name, shape in SHAPES.items()
    }


def cut(lab: Lab, batch: int, length: int) -> Feed:
    """A feed of so many held-out rows of full length."""
    feed = next(iter(lab.calibration))
    made = {n: a[:batch, :length] for n, a in feed.items()}
    made["attention_mask"] = made["attention_mask"] * 0 + 1
    return made


def scored(
    lab: Lab, path: Path, texts: tuple[str, str], seconds: float, bits: float | None = None
) -> Figures:
    """A file's size, its cosines, and its speed where it is to be raced."""
    same, other = (lab.scores(path)[t] for t in texts)
    figures = Figures(
        bits=float("nan") if bits is None else bits, same=same, other=other, size=bytes_of(path)
    )
    if not seconds:
        return figures
    ratios = {n: r.ratio.median for n, r in raced(lab, path, lab.source.path, seconds).items()}
    return Figures(**{**figures.__dict__, **ratios})
