"""Seconds and peak memory of a whole compile, against onnx-graphsurgeon that only loads and saves the same file.

    python benchmarks/compile_time.py [--models minilm,smollm2,generated] [--data DIR] [--runs 1] [-o docs/compile-time.md]

Every line is a process of its own, started cold with an empty cache; compile and graphsurgeon take turns, so that a busy
machine slows both. Memory is what the kernel calls RssAnon + RssShmem, summed over the process and all that it started,
looked at every 50 ms: pages of mapped files are not counted, because the kernel takes them back when it wants to.
Models that are not in DIR (build/models) are made there by their recipes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLICE = 0.05  # seconds between two looks at the memory
ORDER = ("load", "calibrate", "plan", "factorize", "verify", "prove", "publish")

# recipe; then, a line each, what is asked of the compile: a name, and options of `Options`
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "minilm": (
        "models/minilm.py",
        {
            "--rank full": "rank=full",
            "--keep 0.9, svd, 448 rows": "keep=0.9 data=calib.npz verify_data=heldout_other.npz",
        },
    ),
    "smollm2": (
        "models/smollm2.py",
        {"--keep 0.9, svd, 12288 tokens": "keep=0.9 data=calib verify_data=heldout"},
    ),
    "generated": (
        "models/generated.py",
        {
            "--keep 0.75, svd-plain": "keep=0.75 methods=svd-plain",
            "--keep 0.75, svd, 64 rows": "keep=0.75 data=calib.npz verify_data=heldout.npz",
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a process took. cpu: processor seconds. peak: bytes of RssAnon + RssShmem over its tree. log: what it printed."""

    seconds: float
    cpu: float
    peak: int
    code: int
    log: str


def measure(command: Sequence[str], timeout: float | None = None) -> Cost:
    """Run a command in its own process and watch its tree. One BLAS thread a process, as the Makefile has it."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    start, used, peak = time.monotonic(), _cpu(), 0
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **threads},
        cwd=ROOT,
    )
    try:
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            if timeout is not None and time.monotonic() - start > timeout:
                raise TimeoutError(f"{' '.join(command)} took more than {timeout:g} s")
            time.sleep(SLICE)
    finally:
        process.kill()  # nothing happens when it has ended; lrcompile's child ends with it
        log = process.communicate()[0]
    return Cost(time.monotonic() - start, _cpu() - used, peak, process.returncode, log)


def _cpu() -> float:
    """Processor seconds of all processes that we waited for, and of all that they waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree_memory(root: int) -> int:
    """RssAnon + RssShmem of a process and all its descendants, in bytes."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status = (folder / "status").read_text()
            except OSError:  # it has just ended
                continue
            if (parent := re.search(r"^PPid:\s+(\d+)", status, re.M)) is not None:
                parents[int(folder.name)] = int(parent[1])
                found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.M)
                sizes[int(folder.name)] = sum(map(int, found)) << 10
    total, level = 0, {root}
    while level:
        total += sum(sizes.get(pid, 0) for pid in level)
        level = {pid for pid, parent in parents.items() if parent in level}
    return total


# -- what runs in the processes that are measured ------------------------------------------------------------------


def compile_command(model: Path, out: Path, cache: Path, options: str = "") -> list[str]:
    """The command that compiles a model with options written as `keep=0.9 data=calib.npz`; paths are the model's neighbours."""
    return [sys.executable, __file__, "worker-compile", str(model), str(out), str(cache), options]


def surgeon_command(model: Path, out: Path) -> list[str]:
    """The command with which onnx-graphsurgeon loads and saves a model."""
    return [sys.executable, __file__, "worker-surgeon", str(model), str(out)]


def work_compile(model: Path, out: Path, cache: Path, text: str) -> None:
    import logging

    import lrcompile
    from lrcompile.records import Budget

    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(name)s: %(message)s")
    given = dict(term.split("=", 1) for term in text.split())
    budget = Budget(
        keep=float(given["keep"]) if "keep" in given else None,
        rank="full" if given.get("rank") == "full" else None,
    )
    options = lrcompile.Options(
        budget=budget,
        methods=tuple(given.get("methods", "auto").split(",")),
        data=model.parent / given["data"] if "data" in given else None,
        verify_data=model.parent / given["verify_data"] if "verify_data" in given else None,
        metric=given.get("metric"),
        include=given.get("include"),
        cache=cache,
    )
    moments: dict[str, float] = {}  # when each stage first said something

    def note(stage: str, done: int, total: int) -> None:
        moments.setdefault(stage, time.monotonic())

    start = time.monotonic()
    result = lrcompile.compile(model, out, options, progress=note)
    ends = [*moments.values(), time.monotonic()]
    for stage, began, ended in zip(["start", *moments], [start, *moments.values()], ends, strict=True):
        print(f"stage {stage}: {ended - began:.1f}")
    print(f"metric: {result.evidence.metric}")
    for name, figures in result.evidence.outputs[:2]:
        print(f"{name}: {figures}")
    totals = result.totals
    print(
        f"verdict: {result.evidence.verdict}, parameters {totals.parameters_before} -> {totals.parameters_after}"
    )


def work_surgeon(model: Path, out: Path) -> None:
    import onnx
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(onnx.load(model))
    made = gs.export_onnx(graph)
    out.mkdir(parents=True)
    size = sum(t.values.nbytes for t in graph.tensors().values() if isinstance(t, gs.Constant))
    onnx.save(made, out / "model.onnx", save_as_external_data=size > 1 << 30, location="model.onnx.data")


# -- the table ---------------------------------------------------------------------------------------------------------


def model_of(name: str, data: Path) -> Path:
    """The model's file, made by its recipe when it is not there."""
    recipe, path = CASES[name][0], data / name / "model.onnx"
    if not path.is_file():
        subprocess.run([sys.executable, str(ROOT / recipe), "-o", str(path.parent)], check=True, cwd=ROOT)
    return path


def rows_of(name: str, data: Path, scratch: Path, runs: int) -> list[tuple[str, str, list[Cost]]]:
    """What each kind of run of a model cost, in the order of the table: (model, what, costs)."""
    model = model_of(name, data)
    kinds = ["graphsurgeon load + save", *CASES[name][1]]
    costs: dict[str, list[Cost]] = {kind: [] for kind in kinds}
    for _ in range(runs):
        for kind in kinds:
            out, cache = scratch / "out", scratch / "cache"
            if kind == kinds[0]:
                command = surgeon_command(model, out)
            else:
                command = compile_command(model, out, cache, CASES[name][1][kind])
            cost = measure(command)
            shutil.rmtree(scratch)
            scratch.mkdir()
            if cost.code:
                raise SystemExit(f"{name}, {kind}: exit code {cost.code}\n{cost.log[-3000:]}")
            print(
                f"{name}, {kind}: {cost.seconds:.1f} s, {cost.cpu:.1f} s of processor, {cost.peak / 1e9:.2f} GB",
                file=sys.stderr,
            )
            costs[kind].append(cost)
    sizes = sum(f.stat().st_size for f in model.parent.glob("model.onnx*"))
    label = f"{name}, {sizes / 1e6:,.0f} MB"
    return [(label, kind if kind == kinds[0] else f"compile {kind}", costs[kind]) for kind in kinds]


def table(rows: Sequence[tuple[str, str, Sequence[Cost]]]) -> str:
    """The rows as markdown; of several runs the median, and the largest peak."""
    lines = ["| model | what | seconds | of processor | peak memory, GB |", "|---|---|---:|---:|---:|"]
    for model, what, costs in rows:
        seconds, cpu = (statistics.median(getattr(c, name) for c in costs) for name in ("seconds", "cpu"))
        peak = max(c.peak for c in costs)
        lines.append(f"| {model} | {what} | {seconds:.1f} | {cpu:.1f} | {peak / 1e9:.2f} |")
    return "\n".join(lines)


def stages(rows: Sequence[tuple[str, str, Sequence[Cost]]]) -> str:
    """Seconds of each stage, from its first sign of life to the next stage's, in the last run of each kind."""
    found = {(m, w): dict(re.findall(r"^stage (\w+): ([\d.]+)", c[-1].log, re.M)) for m, w, c in rows}
    names = list(dict.fromkeys(name for seconds in found.values() for name in seconds if name != "start"))
    names.sort(key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))
    lines = ["| model | what | " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(names)]
    lines += [
        f"| {model} | {what} | " + " | ".join(seconds.get(name, "") for name in names) + " |"
        for (model, what), seconds in found.items()
        if seconds
    ]
    return "\n".join(lines)


def page(text: str, by_stage: str, arguments: str) -> str:
    """The page of the documentation."""
    import onnx
    import onnx_graphsurgeon
    import onnxruntime

    names = {"onnx": onnx, "onnx-graphsurgeon": onnx_graphsurgeon, "onnxruntime": onnxruntime}
    versions = ", ".join(f"{name} {module.__version__}" for name, module in names.items())
    return f"""# What a compile costs

    python benchmarks/compile_time.py{arguments}

{text}

A compile is everything: load, calibrate, factorize, build, verify both questions, publish; the first run, with an empty
cache. graphsurgeon loads the file and saves it, nothing else. Memory is RssAnon + RssShmem of the process and all that it
started, looked at every {1000 * SLICE:.0f} ms. `--rank full` and `svd-plain` need no data.

Seconds from a stage's first sign of life to the next one's (`plan` holds the eigenproblems, `prove` verification's first
question, `verify` its second):

{by_stage}

Measured with {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}. Other work may have run beside it: compare
lines of this table with each other.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=",".join(CASES), help="which of %(default)s")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each kind, taking turns")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the page there as well")
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"no model {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    data: Path = options.data.absolute()
    scratch = data / f"scratch-{os.getpid()}"
    scratch.mkdir(parents=True)
    try:
        rows = [row for name in names for row in rows_of(name, data, scratch, options.runs)]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(text := table(rows))
    print(by_stage := stages(rows))
    if options.output is not None:
        arguments = "".join(
            f" --{n} {getattr(options, n)}"
            for n in ("models", "runs")
            if getattr(options, n) != parser.get_default(n)
        )
        options.output.write_text(page(text, by_stage, arguments))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker-compile"]:
        work_compile(*map(Path, sys.argv[2:5]), sys.argv[5])
    elif sys.argv[1:2] == ["worker-surgeon"]:
        work_surgeon(*map(Path, sys.argv[2:4]))
    else:
        main()
