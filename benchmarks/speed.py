"""What the speed gate publishes: ratios to the dense engine, predictions against measurements, and whether "unchanged" is unchanged.

    python benchmarks/speed.py blocks --target ort-cuda -o docs/speed-blocks.json      transformer blocks, random float16 weights
    python benchmarks/speed.py models --target ort-cpu --threads 2 -o FILE.json        MiniLM and SmolLM2, prefill and decode
    python benchmarks/speed.py table FILE.json ...                                     the tables of docs/speed.md

Every case is a whole `lrcompile.compile` with ``--objective latency``: forms are timed in the runtime, a plan is made of those that pay,
and the engine is raced against the dense one, interleaved, on the shape of the case. A case that gains too little must come out as the
original, byte for byte. Weights need no data here: it is time that is asked for, not accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lrcompile
from lrcompile.build import build
from lrcompile.child import Child
from lrcompile.compile import study
from lrcompile.config import options_from
from lrcompile.cost import rows_of
from lrcompile.errors import LrcompileError
from lrcompile.plan import group_by_name
from lrcompile.progress import silent
from lrcompile.records import Candidate, Cost, Decision, Plan
from lrcompile.registry import runtime_of
from lrcompile.speed import fast, speed_feeds
from lrcompile.store import sha256
from lrcompile.study import at_hand, workshop
from lrcompile.timing import Clock, CostTable, Form, Timing, forms_of
from lrcompile.tune import table_of, tune

ROOT = Path(__file__).resolve().parents[1]
ROWS = {1: (1, 1), 128: (1, 128), 1024: (8, 128), 4096: (32, 128), 16384: (128, 128)}  # batch and sequence
KEEPS = (0.5, 0.25)
RECIPES = {"minilm": "models/minilm.py", "smollm2": "models/smollm2.py"}
HEADS, HEAD_SIZE, LAYERS, CACHE = 3, 64, 30, 512  # of SmolLM2


def block_cases(width: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for keep in KEEPS:
        for rows, (batch, sequence) in ROWS.items():
            yield f"{rows} rows, keep {keep:g}", {"keep": keep, "shape": [f"x:[{batch},{sequence},{width}]"]}


def model_cases(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if name == "minilm":
        for batch in (1, 8):
            shapes = [f"{n}:[{batch},128]" for n in ("input_ids", "attention_mask")]
            yield f"{batch}x128", {"keep": 0.5, "shape": shapes}
        return
    for words, rows, past in (("prefill 512", 512, 0), ("decode, cache 512", 1, CACHE)):
        shapes = [f"input_ids:[1,{rows}]", f"position_ids:[1,{rows}]", f"attention_mask:[1,{rows + past}]"]
        shapes += [
            f"past_key_values.{i}.{part}:[1,{HEADS},{past},{HEAD_SIZE}]"
            for i in range(LAYERS)
            for part in ("key", "value")
        ]
        yield words, {"keep": 0.5, "shape": shapes}


def run(
    model: Path, cases: Sequence[tuple[str, dict[str, Any]]], given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each case, printed as it comes."""
    for name, asked in cases:
        start = time.monotonic()
        said = {
            "target": given.target, "methods": "svd-plain", "objective": "latency", "threads": given.threads, "cache": str(given.cache),
            "cuda_graph": (given.target == "ort-cuda" and given.cuda_graph) or None, "force": True, "timeout": 900.0, **asked,
        }  # fmt: skip
        options = options_from(said)
        out = given.scratch / "out"
        try:
            result = lrcompile.compile(model, out, options)
        except LrcompileError as error:
            yield {"model": model.parent.name, "case": name, "error": str(error)}
            continue
        row = {
            "model": model.parent.name, "case": name, "verdict": result.evidence.verdict, "kept": result.plan.kept,
            "rewritten": len(result.plan.rewritten), "weights": len(result.plan.decisions),
            "reasons": sorted({d.reason for d in result.plan.decisions if not d.rewrites}),
            "speed": [[s.ratio, s.low, s.high] for s in result.speed],
            "same_bytes": same_bytes(model, out), "seconds": round(time.monotonic() - start),
        }  # fmt: skip
        if result.plan.rewritten:
            row |= checked(model, result.plan, options)
        print(json.dumps(row), flush=True)
        yield row


def same_bytes(model: Path, out: Path) -> bool:
    """Whether the published graph and its weights are the original's."""
    pairs = [(model, out / "model.onnx"), *((f, out / f.name) for f in model.parent.glob("*.onnx.data"))]
    return all(b.is_file() and sha256(a) == sha256(b) for a, b in pairs)


def checked(model: Path, plan: Plan, options: lrcompile.Options) -> dict[str, Any]:
    """Predictions of the table against times measured anew: of every form in the plan, by itself, and of the whole model."""
    with Child() as child, workshop(options, child) as shop:
        known = study(model, options, shop, silent)
        source, finding, methods = known.source, known.finding, known.methods
        path, drawn = at_hand(known)
        rows = rows_of(source.model, finding, speed_feeds(known, path, drawn)[0])
        groups = group_by_name(finding)
        with build(child, options.target, path, fast(options)) as engine:
            table = table_of(options.target, engine.describe(), options.threads, shop.cache.costs)
        forms: dict[tuple[Form, int], int] = {}
        for decision in plan.decisions:
            if (group := groups.get(decision.group)) is not None and group.sites[0].kind == "linear":
                for form, site in forms_of(group, *_form(decision, methods)):
                    forms[form, rows[site]] = forms.get((form, rows[site]), 0) + 1
        again = tune(
            CostTable(table.target, table.device, table.version, table.threads), forms, methods=methods,
            lowering=runtime_of(options.target).lowering(options.target), build=fast(options), opset=source.opset, seed=1,
            child=child, scratch=shop.scratch,
        )  # fmt: skip
    measured = {(t.form, t.rows): t.seconds for t in again.timings}
    known = Clock(CostTable("", "", "", 1, tuple(t for t in table.timings if _other(t, forms))))
    sites = []
    for (form, count), uses in forms.items():
        predicted = known.seconds(form, count)
        if predicted is not None and (form, count) in measured:
            sites.append(
                {"form": form.method, "K": form.K, "N": form.widths[0], "rank": form.rank, "rows": count, "uses": uses,
                 "predicted": predicted, "measured": measured[form, count]}
            )  # fmt: skip
    return {"sites": sites, "device": table.device, "version": table.version}


def _other(timing: Timing, forms: Mapping[tuple[Form, int], int]) -> bool:
    """Factored forms must be predicted from others than themselves; a dense weight has no neighbours to be predicted from."""
    return timing.form.rank is None or (timing.form, timing.rows) not in forms


def _form(decision: Decision, methods: Mapping[str, Any]) -> tuple[Any, Any]:
    if not decision.rewrites:
        return None, None
    made = Candidate(
        decision.method,
        decision.rank,
        Cost(0, 0, 0),
        0.0,
        structure=decision.structure,
        permutes=decision.permutes,
    )
    return made, methods[decision.method]


def table(files: Sequence[Path]) -> str:
    """Markdown of result files."""
    rows = [row for f in files for row in json.loads(f.read_text())["rows"]]
    lines = [
        "| model | case | published | weights rewritten | kept | x dense (80 % of rounds) | bytes of the original |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        speed = min(r["speed"]) if r.get("speed") else None
        ratio = f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})" if speed else "1"
        lines.append(
            f"| {r['model']} | {r['case']} | {r.get('verdict', r.get('error'))} | {r.get('rewritten')} of {r.get('weights')} | "
            f"{r.get('kept', 1):.3f} | {ratio} | {'yes' if r.get('same_bytes') else 'no'} |"
        )
    off = [
        abs(s["predicted"] / s["measured"] - 1)
        for r in rows
        for s in r.get("sites", ())
        for _ in range(s["uses"])
    ]
    if off:
        within = sum(x <= 0.15 for x in off) / len(off)
        lines.append(
            f"\nPredicted within 15 % of measured: {within:.1%} of {len(off)} weights; median off by {statistics.median(off):.1%}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("blocks", "models", "table"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--only", default="", help="words that a case's name must hold")
    parser.add_argument("--no-cuda-graph", dest="cuda_graph", action="store_false")
    parser.add_argument("--models", default="minilm,smollm2")
    parser.add_argument("--data", type=Path, default=ROOT / "build/models")
    parser.add_argument("--cache", type=Path, default=ROOT / "build/speed-cache")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.what == "table":
        print(table(given.files))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(
        dir=given.cache.parent if given.cache.parent.is_dir() else None
    ) as scratch:
        given.scratch = Path(scratch)
        for model, cases in _cases(given):
            for row in run(model, [c for c in cases if given.only in c[0]], given):
                rows.append(row)
                if given.output:
                    given.output.write_text(json.dumps({"rows": rows}, indent=1))
    print(table([given.output]) if given.output else json.dumps(rows))


def _cases(given: argparse.Namespace) -> Iterator[tuple[Path, list[tuple[str, dict[str, Any]]]]]:
    if given.what == "blocks":
        folder = given.data / f"blocks-{given.layers}x{given.width}-{given.dtype}"
        _made(
            folder,
            "models/blocks.py",
            f"--layers={given.layers}",
            f"--width={given.width}",
            f"--dtype={given.dtype}",
        )
        yield folder / "model.onnx", list(block_cases(given.width))
        return
    for name in given.models.split(","):
        _made(given.data / name, RECIPES[name])
        yield given.data / name / "model.onnx", list(model_cases(name))


def _made(folder: Path, recipe: str, *more: str) -> None:
    if not (folder / "model.onnx").is_file():
        subprocess.run([sys.executable, str(ROOT / recipe), "-o", str(folder), *more], check=True)


if __name__ == "__main__":
    main()
