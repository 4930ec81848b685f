"""What refit costs: time grows with the model and not with its square, memory grows neither with the data nor with the depth."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("onnxruntime")

# In a process of its own: peaks are then this run's. Arguments: model, work folder, feeds, rows of a feed.
SCRIPT = """
import json, resource, sys, threading, time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from lrcompile.calibrate import calibrate
from lrcompile.child import Child
from lrcompile.curves import decision_of
from lrcompile.feeds import inputs_of, open_feeds
from lrcompile.interfaces import CandidateOptions
from lrcompile.load import load
from lrcompile.records import Plan
from lrcompile.refit import refit
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights

path, work, count, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
work.mkdir(parents=True)
source = load(path)
width = source.model.graph.inputs[0].shape[1]
svd = factorization("svd")


def data():  # made when asked for: the data itself is in nobody's memory
    for seed in range(count):
        yield {"x": np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)}


peak, done = [0, 0], False


def watch(child):
    while not done:
        try:
            peak[0] = max(peak[0], child._used())
        except (OSError, AssertionError, AttributeError):
            pass
        status = Path("/proc/self/status").read_text()
        peak[1] = max(peak[1], int(status.split("RssAnon:")[1].split()[0]) << 10)
        time.sleep(0.005)


with Child() as child, threadpool_limits(1):
    finding, feeds, cache = find(source.model), open_feeds(data, inputs_of(source.model)), Cache(work / "cache")
    seen = calibrate(source.model, finding, feeds, source.key, target="ort-cpu", child=child, cache=cache)
    weights, decisions = ModelWeights(cache, source.opset), []
    for group in finding.units:
        (form,) = svd.candidates(group, weights, seen, CandidateOptions(ranks=(width // 4,)))
        decisions.append(decision_of(group, form, ""))
    plan, groups = Plan("ort-cpu", tuple(decisions)), {g.name: g for g in finding.groups}
    scratch = work / "scratch"
    scratch.mkdir()
    peak[:] = 0, 0
    threading.Thread(target=watch, args=(child,), daemon=True).start()
    start = time.perf_counter()
    sets = refit(source, plan, groups, weights, seen, {"svd": svd}, feeds, child=child, target="ort-cpu", scratch=scratch, seed=0)
    seconds, done = time.perf_counter() - start, True
    left = sum(1 for _ in scratch.iterdir())
print(json.dumps({"seconds": seconds, "child": peak[0], "parent": peak[1], "sets": len(sets), "left": left,
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}))
"""


def generated(folder: Path, layers: int, width: int) -> Path:
    recipe = str(ROOT / "models" / "generated.py")
    command = [sys.executable, recipe, "-o", str(folder), "--layers", str(layers), "--width", str(width)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "model.onnx"


def cost(model: Path, work: Path, feeds: int, rows: int) -> dict[str, float]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(model), str(work), str(feeds), str(rows)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    assert found["left"] == 0
    return found


@pytest.mark.slow
def test_twice_the_layers_take_twice_the_time(tmp_path: Path) -> None:
    """Interleaved, so that a busy machine slows both; the ratio of medians. Quadratic work would be four."""
    models = {n: generated(tmp_path / str(n), n, 256) for n in (12, 24)}
    seconds: dict[int, list[float]] = {n: [] for n in models}
    for repeat in range(3):
        for n, model in models.items():
            found = cost(model, tmp_path / f"work-{n}-{repeat}", 8, 256)
            assert found["sets"] == n
            seconds[n].append(found["seconds"])
    ratio = statistics.median(seconds[24]) / statistics.median(seconds[12])
    sys.stdout.write(
        f"refit of 12 and 24 layers: {', '.join(f'{statistics.median(s):.2f} s' for s in seconds.values())}, ratio {ratio:.2f}\n"
    )
    assert ratio <= 2.3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_nor_with_the_depth(tmp_path: Path) -> None:
    """Ten times the feeds of 2 MB each would be 75 MB and more were they held; so would four times the layers of 1 MB."""
    small, deep = generated(tmp_path / "small", 4, 512), generated(tmp_path / "deep", 24, 512)
    few, many = (cost(small, tmp_path / f"feeds-{n}", n, 1024) for n in (4, 40))
    depth = cost(deep, tmp_path / "depth", 4, 1024)
    for name, found in (("4 feeds", few), ("40 feeds", many), ("six times as deep", depth)):
        sys.stdout.write(
            f"{name}: child {found['child'] / 1e6:.0f} MB, parent {found['parent'] / 1e6:.0f} MB, {found['seconds']:.1f} s\n"
        )
    for key in ("child", "parent"):
        assert many[key] <= few[key] + 20e6
        assert depth[key] <= few[key] + 20e6  # one weight is 1 MB, in float64 2 MB; moments lie in files
