"""What a smaller embedding table costs: every table method beside plain SVD, int8 and int4, on one axis of bytes.

    python benchmarks/embeddings.py [--models minilm,smollm2] [--keep 0.5] [--rows N] [--feeds N] [--data DIR] [--cache DIR]

Only the word table is rewritten (with the head that is tied to it, in SmolLM2). Each method is asked twice: for --keep of the table's
parameters, and for as many bytes as int4 takes. Its factors are rounded to float16, so a number is two bytes, and an index four. int8 is
symmetric with a scale a row, int4 symmetric with a scale for 32 numbers, both rounded to nearest, scales float16. Figures are those of the file
that a user would get, run by ONNX Runtime on held-out text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from accuracy_parts.lab import ROOT, Lab, Model, Refused, open_lab, spread
from threadpoolctl import threadpool_limits

from lrcompile.child import Child
from lrcompile.curves import decision_of
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import inputs_of, open_feeds
from lrcompile.interfaces import Array, CandidateOptions, Factorization
from lrcompile.records import Candidate, Cost, Group, Plan
from lrcompile.registry import factorization
from lrcompile.store import Cache

METHODS = ("svd-plain", "svd", "grouped", "tt-table", "tt-vector")
SAME, OTHER = "other half", "docstrings"
MODELS = {
    "minilm": Model(
        "minilm", "MiniLM", "models/minilm.py", (), "calib.npz", {SAME: "heldout.npz", OTHER: "heldout_other.npz"}, cosine=True
    ),
    "smollm2": Model(
        "smollm2", "SmolLM2-135M", "models/smollm2.py", (), "calib", {SAME: "heldout", OTHER: "heldout_other"}, cosine=False
    ),
    "tiny_llama": Model("tiny_llama", "tiny_llama", "models/tiny_llama.py", (), "calib", {SAME: "heldout"}, cosine=False),
}  # fmt: skip
HALF = 2  # bytes of a float16
BLOCK = 32  # numbers that share a scale in int4


@dataclass(frozen=True)
class Row:
    """A form of the table. kept: its numbers relative to the table's. size: its bytes, relative to the table's in float32. error: relative, of what is looked up."""

    label: str
    kept: float
    size: float
    error: float
    sets: tuple[FactorSet, ...]


def table_of(lab: Lab) -> Group:
    """The largest table, with the head that is tied to it."""
    tables = [g for g in lab.finding.units if any(s.kind == "lookup" for s in g.sites)]
    return max(tables, key=lambda g: g.elements)


def rows_of(lab: Lab, group: Group, keep: float, say: Callable[[str], None]) -> Iterator[Row | str]:
    """int8 and int4, then each method at `keep` and at the bytes of int4; a sentence where there is no such form."""
    yield quantized(lab, group, 8, group.sites[0].N)
    smallest = quantized(lab, group, 4, BLOCK)
    yield smallest
    shares = (keep, smallest.size * 4 / HALF)
    for name in METHODS:
        method = factorization(name)
        if (refusal := method.serves(group)) is not None:
            yield f"{name}: {refusal.reason}"
            continue
        for share in shares:
            start = time.monotonic()
            row = best(lab, group, method, share)
            say(f"{name} at {share:.3f}: {time.monotonic() - start:.1f} s")
            yield row


def best(lab: Lab, group: Group, method: Factorization, share: float) -> Row | str:
    """The most accurate form within a share of the table's bytes in float16."""
    statistics = lab.statistics("plain")
    assert not isinstance(statistics, Refused)
    weights = lab.weights
    within = [
        c
        for c in method.candidates(group, weights, statistics, CandidateOptions(multiple=8))
        if bytes_of(c) <= share * HALF * group.elements
    ]
    if not within:
        return f"{method.name}: no form within {share:.3f} of the parameters"
    chosen = min(within, key=lambda c: c.error)
    plan = Plan("ort-cpu", (decision_of(group, chosen, ""),))
    sets = factorize(plan, {group.name: group}, weights, statistics, {method.name: method}, lab.seed)
    form = ", ".join(f"{k} {v}" for k, v in chosen.structure if k in ("form", "order", "fold"))
    return Row(
        f"{method.name}{f' ({form})' if form else ''}", chosen.cost.parameters / group.elements,
        bytes_of(chosen) / (4 * group.elements), sets[0].measured, tuple(map(halved, sets)),
    )  # fmt: skip


def bytes_of(candidate: Candidate) -> float:
    """Of its factors in float16; the table itself is float32, so what is more than four bytes a number are indices."""
    return HALF * candidate.cost.parameters + candidate.cost.bytes - 4 * candidate.cost.parameters


def halved(factors: FactorSet) -> FactorSet:
    """The same, with every number one of float16."""

    def load() -> dict[str, Array]:
        return {
            n: a if a.dtype.kind == "i" else a.astype(np.float16).astype(a.dtype)
            for n, a in factors.load().items()
        }

    return replace(factors, load=load)


def quantized(lab: Lab, group: Group, bits: int, block: int) -> Row:
    """The table rounded to nearest, symmetric, a float16 scale for every so many numbers of a row."""
    W = lab.weights.matrix(group.sites[0])
    most = 2 ** (bits - 1) - 1
    blocks = W.reshape(-1, block)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / most).astype(np.float16).astype(np.float64)
    rounded = np.clip(np.rint(blocks / np.maximum(scales, 1e-8)), -most, most) * scales
    table = rounded.reshape(W.shape).astype(np.float32)
    size = W.size * bits / 8 + HALF * scales.size
    statistics = lab.statistics("plain")
    assert statistics is not None
    assert not isinstance(statistics, Refused)
    known = statistics.of(group.sites[0])
    assert known is not None
    assert known.frequencies is not None
    f, lost = known.frequencies, np.square(table - W).sum(axis=1)
    error = float(np.sqrt((f @ lost) / (f @ np.square(W).sum(axis=1))))
    dense = factorization("dense")
    form = Candidate("dense", None, Cost(W.size, int(size), 0), error, bound=False, storage=f"int{bits}")
    chosen = decision_of(group, form, "")
    made = FactorSet(chosen, group, dense, ir.DataType.FLOAT, {"w": table.shape}, error, lambda: {"w": table})
    return Row(f"int{bits}, a scale for {block}", 1.0, size / (4 * W.size), error, (made,))


def section(lab: Lab, keep: float, calibrated: str, say: Callable[[str], None]) -> str:
    """The table of one model, by falling quality."""
    group = table_of(lab)
    lab.finding = replace(lab.finding, sites=group.sites, groups=(group,))  # nothing else is calibrated
    texts = list(lab.texts)
    found, notes = [], []
    for row in rows_of(lab, group, keep, say):
        if isinstance(row, str):
            notes.append(row)
            continue
        with lab.written(row.sets) as path:
            scores = lab.scores(path)
        say(f"{row.label}: {scores}")
        found.append((row, scores))
    found.sort(key=lambda pair: (pair[0].size < 0.2, (-1 if lab.model.cosine else 1) * pair[1][texts[0]]))
    what = "mean cosine" if lab.model.cosine else "perplexity relative to the original"
    site = group.sites[0]
    lines = [
        f"## {lab.model.title}",
        f"{site.weight}, {site.K} x {site.N}, {group.kind}; {what}. {calibrated}",
        "| form | numbers kept | bytes, of float32 | error of what is looked up | "
        + " | ".join(texts)
        + " |\n|---|---:|---:|---:|"
        + "---:|" * len(texts),
    ]
    body = [
        f"| {r.label} | {r.kept:.3f} | {r.size:.3f} | {r.error:.3f} | "
        + " | ".join(f"{scores[t]:.4f}" for t in texts)
        + " |"
        for r, scores in found
    ]
    return "\n\n".join(lines) + "\n" + "\n".join(body) + "".join(f"\n\n{n}" for n in notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default="minilm,smollm2", help=f"some of {','.join(MODELS)}")
    parser.add_argument(
        "--keep", type=float, default=0.5, help="share of the table's parameters (%(default)s)"
    )
    parser.add_argument("--rows", type=int, default=160, metavar="N", help="held-out rows a text, or feeds")
    parser.add_argument("--feeds", type=int, metavar="N", help="of calibration; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="kept between runs")
    options = parser.parse_args()
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:8.1f} s  {text}", file=sys.stderr, flush=True)

    data: Path = options.data.absolute()
    cache = Cache(options.cache or data / "embeddings-cache")
    with threadpool_limits(1), Child() as child:
        for name in options.models.split(","):
            model = MODELS[name]
            with cache.scratch() as scratch:
                lab = open_lab(model, data, child, cache, scratch, None, options.seed, say)
                batch = len(next(iter(lab.texts[SAME][0].values())))
                lab.texts = {t: spread(f, max(1, options.rows // batch)) for t, f in lab.texts.items()}
                if options.feeds is not None:
                    chosen = spread(list(lab.calibration), options.feeds)
                    lab.calibration = open_feeds(chosen, inputs_of(lab.source.model))
                judged = {
                    t: sum(int(f["attention_mask"].sum()) for f in feeds) for t, feeds in lab.texts.items()
                }
                calibrated = f"{len(lab.calibration)} feeds of calibration; tokens held out: " + ", ".join(
                    f"{n} ({t})" for t, n in judged.items()
                )
                print(section(lab, options.keep, calibrated, say), flush=True)


if __name__ == "__main__":
    main()
