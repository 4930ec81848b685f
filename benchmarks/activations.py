"""MiniLM with inputs in 8 bits against ONNX Runtime's stock dynamic int8, per channel: accuracy on another source, and time, interleaved.

    python benchmarks/activations.py --model build/models/minilm --threads 2 -o FILE.json

One compile (``--objective latency --max-error cosine=0.997 --storage auto --activations auto``, judged on `heldout_other.npz`) against
`quantize_dynamic(per_channel=True)` of the same file and against float32, raced two by two (`lrcompile.bench`) at 1 and 8 rows of 128
tokens. Cosines are means over rows of the last axis, padding left out. Docs: `docs/activations.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lrcompile
from lrcompile.bench import Race, race
from lrcompile.child import Child
from lrcompile.config import options_from
from lrcompile.interfaces import Array, BuildOptions
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


def figures(race: Race) -> dict[str, Any]:
    """Of a race: how many times faster the second is, with its quartiles, and the noise of the machine."""
    r = race.ratio
    return {"ratio": r.median, "quartiles": [r.p25, r.p75], "rounds": race.rounds, "noise": list(race.band)}


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
    parser.add_argument("--seconds", type=float, default=20.0, help="of each race")
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
            for first, second in (("stock", "ours"), ("float32", "ours"), ("float32", "stock")):
                raced = race(
                    child, TARGET, contestants[first], contestants[second], [feed], threads=given.threads, seconds=given.seconds
                )  # fmt: skip
                row[f"{second} over {first}, {batch}x128"] = figures(raced)
        text = json.dumps(row, indent=1)
        sys.stdout.write(text + "\n")
        if given.output:
            given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
