"""How far a compile moves a model: every method here against published ones, at equal parameters, on text that nobody calibrated on.

    python benchmarks/accuracy.py [--models minilm,smollm2] [--keeps 0.9,0.5] [--rows N] [--data DIR] [--cache DIR] [-o docs/accuracy.md]

Every figure is that of a file which a user would get: factorized, rewritten, lowered, and run by ONNX Runtime. All methods see the
same eligible weights and the same calibration data (`pydoc_data.topics`); held out are the other half of that text and docstrings of
the standard library. Besides the table: predictions against 20 plans, what all of it costs, and the FFN part on the clock.
Models that are not in DIR (build/models) are made there by their recipes. `-o` writes the sections of the models that were run, and
leaves those of others as they stand.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accuracy_parts import checks
from accuracy_parts.lab import ROOT, Lab, Model, open_lab
from accuracy_parts.table import DEFAULT, PAIRS_ONLY, ROWS, Promise, fill, table, verdicts
from threadpoolctl import threadpool_limits

from lrcompile.child import Child
from lrcompile.store import Cache, read_text, write_text

SAME, OTHER = "other half", "docstrings"
BLOCKS = ("cost", "table", "plans", "ffn")

MODELS = {
    m.name: m
    for m in (
        Model(
            "minilm", "MiniLM",
            "models/minilm.py", (0.9, 0.75, 0.5), "calib.npz", {SAME: "heldout.npz", OTHER: "heldout_other.npz"},
            cosine=True, plans=True, ffn=True,
        ),
        Model("smollm2", "SmolLM2-135M", "models/smollm2.py", (0.9, 0.8, 0.6), "calib", {SAME: "heldout", OTHER: "heldout_other"}, cosine=False),
        # random weights: to see that the script runs, in a minute
        Model("tiny_llama", "tiny_llama", "models/tiny_llama.py", (0.9, 0.6), "calib", {SAME: "heldout"}, cosine=False, plans=True, ffn=True),
    )
}  # fmt: skip

PROMISES: Mapping[str, tuple[Promise, ...]] = {
    "minilm": (
        Promise(DEFAULT, 0.9, SAME, 0.990, 0.993),
        Promise(DEFAULT, 0.75, SAME, 0.968, 0.98),
        Promise(DEFAULT, 0.5, SAME, 0.905, 0.94),
        Promise(PAIRS_ONLY, 0.75, SAME, 0.94),
        Promise(DEFAULT, 0.9, OTHER, 0.985),
        Promise(DEFAULT, 0.75, OTHER, 0.945),
        Promise(DEFAULT, 0.5, OTHER, 0.85),
        Promise(PAIRS_ONLY, 0.75, OTHER, 0.90),
    ),
    "smollm2": (
        Promise(DEFAULT, 0.9, SAME, 1.15),
        Promise(DEFAULT, 0.8, SAME, 1.40),
        Promise(DEFAULT, 0.6, SAME, 2.4),
    ),
}

INTRODUCTION = f"""# How far a compile moves a model

    python benchmarks/accuracy.py -o docs/accuracy.md

Every method at equal parameters of the same eligible weights (the linear layers), without training. Calibrated on every second
paragraph of Python's language reference (`pydoc_data.topics`); *{SAME}*: the paragraphs between; *{OTHER}*: docstrings of the standard
library. Every figure is that of the file that a user would get, run by ONNX Runtime on the CPU. The best of a column is bold, whoever's
it is. One ratio for all takes ranks in eights, so that it may keep a little less than it was allowed: the last column says what.

Plain SVD, ASVD scaling, Fisher-weighted SVD and SVD-LLM whitening are pairs of factors at one ratio for all, without bias correction,
as published (`benchmarks/accuracy_parts/baselines.py` has the formulas); their own allocation and fine-tuning are not part of it. Below
them ours, one ingredient after another: *measured sensitivity* allocates ranks by what errors really did to the outputs; *reactions*
weigh an error on both sides, by gradients; *all of this* refits each layer to what the compressed part before it gives."""


def section(lab: Lab, keeps: Sequence[float], blocks: Sequence[str], seconds: float, about: str) -> str:
    """A model's part of the page."""
    model = lab.model
    parts = [f"## {model.title}", about]
    timed = checks.cost(lab, keeps[len(keeps) // 2])[0] if "cost" in blocks else ""
    if "table" in blocks:
        cells = dict(fill(lab, ROWS, keeps))
        what = (
            "Mean cosine of the pooled embedding to the dense one"
            if model.cosine
            else "Perplexity relative to dense"
        )
        parts += [f"{what}, by keep and text:", table(ROWS, keeps, list(model.texts), cells, model.cosine)]
        if promises := [p for p in PROMISES.get(model.name, ()) if p.keep in keeps]:
            parts += ["What it must show:", verdicts(promises, cells, model.cosine)]
    if "plans" in blocks and model.plans:
        parts += ["### Predicted against measured", checks.plans(lab)[0]]
    if timed:
        parts += ["### Cost", timed]
    if "ffn" in blocks and model.ffn:
        parts += ["### The FFN part by slicing, 8 x 128", checks.ffn(lab, 0.5, seconds)[0]]
    return "\n\n".join(parts)


def page(old: str, sections: Mapping[str, str]) -> str:
    """The page with these sections (by title) new, and those of other models as they stand."""
    known = {m[1]: m[0].rstrip() for m in re.finditer(r"^## (\S+)$.*?(?=^## |\Z)", old, re.M | re.S)}
    return "\n\n".join([INTRODUCTION, *{**known, **sections}.values()]) + "\n"


def circumstances(lab: Lab, command: str, load: tuple[float, float]) -> str:
    """What a figure depends on: the command, the seed, versions, how much data there was, and who else used the machine."""
    import numpy as np
    import onnx
    import onnxruntime
    import scipy

    names = {"numpy": np, "scipy": scipy, "onnx": onnx, "onnxruntime": onnxruntime}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in names.items())
    rows = " + ".join(
        f"{sum(len(next(iter(f.values()))) for f in feeds)} ({text})" for text, feeds in lab.texts.items()
    )
    return (
        f"`{command}`, seed {lab.seed}. {len(lab.calibration)} feeds of calibration data; rows held out: {rows}. "
        f"{os.cpu_count()} cores ({platform.machine()}), of which others took part: load {load[0]:.1f} before and {load[1]:.1f} after; one "
        f"thread a worker. Python {platform.python_version()}, {versions}."
    )


def talker() -> Callable[[str], None]:
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:8.1f} s  {text}", file=sys.stderr, flush=True)

    return say


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default="minilm,smollm2", help=f"some of {','.join(MODELS)}")
    parser.add_argument(
        "--keeps", metavar="K,K", help="shares of the eligible parameters; by default each model's own"
    )
    parser.add_argument(
        "--rows", "--feeds", type=int, metavar="N", help="rows or feeds of each data file: quicker, and worse"
    )
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="some of %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of racing the FFN part")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="kept between runs; cost is always measured with an empty one",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the page there as well")
    options = parser.parse_args()
    names, blocks = options.models.split(","), options.blocks.split(",")
    if unknown := [n for n in names if n not in MODELS] + [b for b in blocks if b not in BLOCKS]:
        parser.error(
            f"no {unknown[0]!r}; there are the models {', '.join(MODELS)} and the blocks {', '.join(BLOCKS)}"
        )
    command = "python benchmarks/accuracy.py" + "".join(
        f" --{n} {value}"
        for n in ("models", "keeps", "rows", "blocks", "seed")
        if (value := getattr(options, n)) != parser.get_default(n)
    )
    data: Path = options.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    sections: dict[str, str] = {}
    cache = Cache(options.cache or data / "accuracy-cache")
    with threadpool_limits(1), Child() as child:
        for name in names:
            model, before = MODELS[name], os.getloadavg()[0]
            keeps = tuple(map(float, options.keeps.split(","))) if options.keeps else model.keeps
            with cache.scratch() as scratch:
                lab = open_lab(model, data, child, cache, scratch, options.rows, options.seed, talker())
                text = section(lab, keeps, blocks, options.seconds, "ABOUT")
                about = circumstances(lab, command, (before, os.getloadavg()[0]))
            sections[model.title] = text.replace("ABOUT", about, 1)
            print(sections[model.title], flush=True)
            if options.output is not None:  # after each model: the next one may take hours
                old = read_text(options.output) if options.output.is_file() else ""
                write_text(options.output, page(old, sections))


if __name__ == "__main__":
    main()
