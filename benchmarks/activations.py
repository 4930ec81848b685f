"""MiniLM with inputs in 8 bits against ONNX Runtime's stock dynamic int8, per channel: accuracy on another source, and time, interleaved.

    python benchmarks/activations.py --model build/models/minilm --threads 2 -o FILE.json

One compile (``--objective latency --max-error cosine=0.997 --storage auto --activations auto``, judged on `heldout_other.npz`) against
`quantize_dynamic(per_channel=True)` of the same file and against float32, raced in turns at 1 and 8 rows of 128
tokens. Cosines are means over rows of the last axis, padding left out. Docs: `docs/activations.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lrcompile
from lrcompile.child import Child
from lrcompile.config import options_from
from lrcompile.interfaces import Array, BuildOptions
from lrcompile.registry import runtime_of
from lrcompile.verify import compare

ROOT = Path(__file__).resolve().parents[1]
BATCHES, BATCH = (1, 8), 8
TARGET = "ort-cpu"


def stock(model: Path, folder: Path) -> Path:
    """ONNX Runtime's own dynamic quantization, a scale a column."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(model, folder / "stock.onnx", per_channel=True)
    return folder / "stock.onnx"


def ours(model: Path, folder: Path, given: argparse.Namespace) -> lrcompile.Result:
    options = options_from(
        {
            "target": TARGET, "data": str(model.parent / "calib.npz"), "verify_data": str(model.parent / "heldout_other.npz"),
            "objective": "latency", "max_error": f"cosine={given.cosine:g}", "storage": "auto", "activations": "auto",
            "methods": given.methods, "threads": given.threads, "cache": str(given.cache), "timeout": given.timeout, "force": True,
        }
    )  # fmt: skip
    return lrcompile.compile(model, folder / "out", options)


def batches(data: Path, rows: int) -> Iterator[Mapping[str, Array]]:
    """Rows from all over a file, in feeds of eight."""
    with np.load(data) as arrays:
        count = len(arrays["input_ids"])
        places = np.linspace(0, count - 1, min(rows, count)).astype(int)
        whole = {name: arrays[name][places] for name in arrays}
    for start in range(0, len(places), BATCH):
        yield {name: array[start : start + BATCH] for name, array in whole.items()}


def cosines(child: Child, original: Path, other: Path, data: Path, rows: int) -> dict[str, float]:
    """Of every output."""
    options = BuildOptions(TARGET, exact=False)
    with child.build(TARGET, original, options) as a, child.build(TARGET, other, options) as b:
        moved = compare(a, b, batches(data, rows), padding=False).movements
    return {name: m.evidence(0.0).cosine for name, m in moved.items()}


def raced(
    contestants: Mapping[str, Path], feed: Mapping[str, Array], threads: int, rounds: int
) -> dict[str, Any]:
    """All of them in turns, each round beginning with the next: milliseconds, and how many times the stock's speed, round by round."""
    options = BuildOptions(TARGET, threads=threads, exact=False)
    with contextlib.ExitStack() as stack:
        runtime = runtime_of(TARGET)
        runs = {n: stack.enter_context(runtime.build(p, options)).bound(feed) for n, p in contestants.items()}
        for run in runs.values():
            run(2)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                runs[name](1)
                seconds[name].append(time.perf_counter() - start)
    made: dict[str, Any] = {}
    for name, times in seconds.items():
        ratios = np.array(seconds["stock"]) / np.array(times)
        low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        made[name] = {"ms": 1e3 * float(np.median(times)), "ratio": median, "quartiles": [low, high]}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=ROOT / "build/models/minilm", help="folder of models/minilm.py"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cosine", type=float, default=0.997)
    parser.add_argument("--methods", default="auto")
    parser.add_argument(
        "--rows", type=int, default=224, help="of heldout_other.npz that cosines are means over"
    )
    parser.add_argument("--rounds", type=int, default=40, help="of each race")
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("--cache", type=Path, default=ROOT / "build/models/activations-cache")
    parser.add_argument(
        "--compiled", type=Path, help="a folder that was compiled before, instead of compiling now"
    )
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    model, data = given.model / "model.onnx", given.model / "heldout_other.npz"
    with tempfile.TemporaryDirectory() as scratch, Child() as child:
        folder = Path(scratch)
        out = given.compiled or ours(model, folder, given).out
        contestants = {"float32": model, "stock": stock(model, folder), "ours": out / "model.onnx"}
        row: dict[str, Any] = {"threads": given.threads, "rows": given.rows}
        row["bytes"] = {name: path.stat().st_size for name, path in contestants.items()}
        row["cosines"] = {
            name: cosines(child, model, path, data, given.rows)
            for name, path in contestants.items()
            if path != model
        }
        for batch in BATCHES:
            feed = {n: a[:batch] for n, a in next(batches(data, BATCH)).items()}
            row[f"{batch}x128"] = raced(contestants, feed, given.threads, given.rounds)
    text = json.dumps(row, indent=1)
    sys.stdout.write(text + "\n")
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
