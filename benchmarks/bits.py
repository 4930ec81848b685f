"""Few bits on MiniLM: quantizers at equal total bits, on text that nobody calibrated on.

    python benchmarks/bits.py [--recipes a,b] [--rows N] [--data DIR] [--cache DIR] [-o docs/bits.md]

Every linear weight of the blocks is replaced by what a recipe makes of it, and the model runs in ONNX Runtime; tables stay as they are. Bits
are all that is stored for those weights (codes, scales, zero points, levels, corrections), over their numbers. Errors are means over
the weights: of the weight itself, and of what it makes of its input. Recipes that see data use the second moment of the dense
model's inputs; `compile` is what a user gets from `--bits`: mixed types, each layer fitted to what the coded ones before it give.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from accuracy import MODELS, OTHER, SAME, talker
from accuracy_parts.lab import ROOT, TARGET, Lab, open_lab
from threadpoolctl import threadpool_limits

from lrcompile.child import Child
from lrcompile.curves import decision_of
from lrcompile.factors import FactorSet
from lrcompile.interfaces import Array, CandidateOptions, StatisticsSource
from lrcompile.plan import choose, group_by_name, prepare
from lrcompile.publish import save_lowered
from lrcompile.quantize import (
    correction,
    fed_back,
    loss,
    orthogonal,
    plain,
    rounded_by,
    searched,
    storage,
    sweep,
)
from lrcompile.quantize import kashin as k
from lrcompile.quantize.feedback import damped
from lrcompile.quantize.pairs import free_pairs, refitted_pairs, scales_of
from lrcompile.records import Budget, Group, Plan
from lrcompile.refit import refit
from lrcompile.registry import methods_of, runtime_of
from lrcompile.rewrite import reconstructed
from lrcompile.sensitivity import predicted
from lrcompile.store import Cache, write_text
from lrcompile.storing import types_of

# What a recipe makes of W (K, N) whose input has the moment C: the matrix, and the bits that it takes.
Recipe = Callable[[Array, Array], tuple[Array, float]]


@dataclass(frozen=True)
class Row:
    """A line of the table. corrects: the bias absorbs the mean of what was changed."""

    name: str
    make: Recipe
    corrects: bool = False


def by_plain(name: str) -> Row:
    def make(W: Array, C: Array) -> tuple[Array, float]:
        made = plain(W, storage(name))
        return made.values, made.bits

    return Row(f"plain {name}", make)


def by_search(name: str) -> Row:
    def make(W: Array, C: Array) -> tuple[Array, float]:
        made = searched(W, storage(name))
        return made.values, made.bits

    return Row(f"clipped {name}", make)


def by_feedback(name: str) -> Row:
    def make(W: Array, C: Array) -> tuple[Array, float]:
        made = sweep(W, C, fed_back(W, C, storage(name)))
        return made.values, made.bits

    return Row(f"feedback {name}", make, corrects=True)


def with_correction(name: str, rank: int, kind: str) -> Row:
    """The factors of the correction in 8 bits."""

    def make(W: Array, C: Array) -> tuple[Array, float]:
        base = sweep(W, C, fed_back(W, C, storage(name)))
        A, B = (searched(X, storage("int8")) for X in correction(W - base.values, C, rank, kind))
        return base.values + A.values @ B.values, base.bits + A.bits + B.bits

    return Row(f"feedback {name} + rank {rank}, {kind}", make, corrects=True)


def kashin_joint(two_sided: bool) -> Row:
    def make(W: Array, C: Array) -> tuple[Array, float]:
        K, N = W.shape
        left, right = orthogonal(K, "random", 0), orthogonal(N, "random", 1) if two_sided else None
        made = k.joint(W, k.decompose(W, left, right, steps=60), 16, 0)[0]
        return made.values, 4 * W.size + 16 * 2 * 32 + _bits(left) + (
            _bits(right) if right is not None else 0
        )

    return Row(f"Kashin {'two' if two_sided else 'one'}-sided, 16 joint levels", make)


def kashin_columns(name: str, rounds: k.Rounds | None, levels: int) -> Row:
    """Two bits a factor, four sizes a column. rounds: of the refits; None: as the four steps give it."""

    def make(W: Array, C: Array) -> tuple[Array, float]:
        left = orthogonal(len(W), "dct", 0)
        made = k.four_steps(W, left)[0]
        if rounds is not None:
            made = k.refitted(W, made, rounds, rounds, 6)
        return made.values, 2 * np.log2(levels) * W.size + 4 * 32 * W.shape[1] + len(W)

    return Row(f"Kashin by column, {name}", make)


def kashin_seeing(name: str, turns: int) -> Row:
    """The forms of factorization ``kashin``: 16 joint pairs with a scale a column, or uniform levels, refitted to the loss by C."""

    def make(W: Array, C: Array) -> tuple[Array, float]:
        left, seen = orthogonal(len(W), "random", 0), damped(C, 1e-3)
        if name == "pairs4":
            scales = scales_of(W)
            pairs = free_pairs(k.decompose(W / scales, left, steps=60), scales, 16, 0)
            return refitted_pairs(W, seen, pairs, turns).values, storage(name).size(*W.shape) + _bits(left)
        u, v = k.refitted_codes(W, k.four_steps(W, left)[0], storage(name), seen, turns)
        return u.values + k.rotated_back(v.values, left, None), u.bits + v.bits + _bits(left)

    return Row(f"Kashin {name}, {turns} refits by the data", make, corrects=True)


def lqer(name: str, rank: int) -> Row:
    """A correction in two bits, as factorization ``lqer`` has it, in one turn."""

    def make(W: Array, C: Array) -> tuple[Array, float]:
        base = rounded_by(W, C, storage(name))
        A = rounded_by(correction(W - base.values, C, rank)[0], C, storage("uint2"))
        seen = C @ A.values
        inner = A.values.T @ seen
        B = rounded_by(
            np.linalg.lstsq(inner, seen.T @ (W - base.values), rcond=None)[0], inner, storage("uint2")
        )
        return base.values + A.values @ B.values, base.bits + A.bits + B.bits

    return Row(f"lqer {name}, rank {rank} in 2 bits", make, corrects=True)


def _bits(q: object) -> float:
    return float(len(q.signs) + 32 * sum(f.size for f in q.factors))  # type: ignore[attr-defined]


ROWS = (
    by_plain("tensor4"), by_plain("kmeans4"), kashin_joint(False), kashin_joint(True), kashin_columns("four steps", None, 4),
    kashin_columns("refitted", k.column_levels, 4), kashin_columns("k-means 4", k.to_kmeans(4), 4),
    kashin_columns("k-means 3", k.to_kmeans(3), 3), kashin_columns("uniform 4", k.to_uniform(4), 4), by_plain("int4-128s16"), by_plain("int4-32s16"),
    by_plain("uint4-32s16"), by_plain("nf4"), by_search("uint4"), by_feedback("uint4-128"), by_feedback("uint4"),
    with_correction("uint4-128", 8, "plain"), with_correction("uint4-128", 8, "exact"), lqer("uint4-128", 16), lqer("uint4", 32), lqer("uint3", 32),
    kashin_seeing("quarters", 6), kashin_seeing("pairs4", 6), kashin_seeing("int4-0s32", 6), by_plain("int3-32s16"), by_feedback("int3"),
    by_feedback("uint3"), by_plain("int2-32s16"), by_plain("uint2"), by_feedback("uint2"), by_feedback("ternary"), by_feedback("sign"),
    by_plain("int8"), by_feedback("int8"),
)  # fmt: skip
BUDGETS = {8.5: (), 4.5: ((SAME, 0.990), (OTHER, 0.985)), 3.25: ((SAME, 0.93), (OTHER, 0.90)), 2.4: ()}


def replaced(lab: Lab, row: Row, statistics: StatisticsSource) -> tuple[ir.Model, float, float, float]:
    """The model of a recipe, bits a number, and mean errors of weights and of their products."""
    dense = methods_of(("dense",))["dense"]
    sets, bits, numbers, errors = [], 0.0, 0, []
    for group in linear_groups(lab):
        site = group.sites[0]
        W, known = lab.weights.matrix(site), statistics.of(site)
        assert known is not None and known.mean is not None
        C = known.centred if row.corrects and site.bias is not None else known.second
        assert C is not None
        made, taken = row.make(W, C)
        arrays = {"w": made}
        bias = lab.weights.bias(site)
        if row.corrects and bias is not None:
            arrays["bias.0"] = bias + known.mean @ (W - made)
        bits, numbers = bits + taken, numbers + W.size
        errors.append(
            (
                float(np.linalg.norm(W - made) / np.linalg.norm(W)),
                (loss(W, C, made) / loss(W, C, 0 * W)) ** 0.5,
            )
        )
        form = next(iter(dense.candidates(group, lab.weights, None, CandidateOptions())))
        decision = replace(decision_of(group, form, row.name), storage="float")
        sets.append(
            FactorSet(
                decision,
                group,
                dense,
                ir.DataType.FLOAT,
                {n: a.shape for n, a in arrays.items()},
                0.0,
                lambda a=arrays: a,
            )  # type: ignore[misc]
        )
    weight, product = np.mean(errors, axis=0)
    return reconstructed(lab.source.model, sets), bits / numbers, float(weight), float(product)


def linear_groups(lab: Lab) -> list[Group]:
    return [g for g in lab.finding.units if g.kind == "alone" and g.sites[0].kind == "linear"]


def compiled(lab: Lab, bits: float, statistics: StatisticsSource) -> tuple[Path, Plan]:
    """What ``--methods dense --bits B`` gives."""
    methods = methods_of(("dense",))
    runtime = runtime_of(TARGET)
    problem = prepare(
        lab.finding, lab.weights, statistics, tuple(methods.values()), Budget(bits=bits), target=TARGET,
        supports=lambda d: runtime.supports(d, TARGET), storages=types_of(("auto",), TARGET),
    )  # fmt: skip
    problem = predicted(
        problem, lab.source, lab.weights, statistics, methods, lab.calibration, child=lab.child, target=TARGET, scratch=lab.scratch,
        seed=lab.seed,
    )  # fmt: skip
    plan = choose(problem)
    sets = refit(
        lab.source, plan, group_by_name(lab.finding), lab.weights, statistics, methods, lab.calibration, child=lab.child, target=TARGET,
        scratch=lab.scratch, seed=lab.seed,
    )  # fmt: skip
    return save_lowered(lab.lowered(sets), lab.source, lab.scratch / f"bits-{bits}"), plan


def table(lab: Lab, names: str | None) -> Iterator[str]:
    yield f"| recipe | bits | weight error | product error | {SAME} | {OTHER} |\n|---|---|---|---|---|---|"
    statistics = lab.statistics("plain")
    assert statistics is not None and hasattr(statistics, "of")
    for row in ROWS:
        if names is not None and not any(n in row.name for n in names.split(",")):
            continue
        model, bits, weight, product = replaced(lab, row, statistics)
        scores = lab.scores(
            save_lowered(model, lab.source, lab.scratch / f"recipe-{row.name.replace(' ', '-')}")
        )
        lab.say(f"{row.name}: {bits:.3f} bits, {scores}")
        yield f"| {row.name} | {bits:.2f} | {weight:.4f} | {product:.4f} | {scores[SAME]:.4f} | {scores[OTHER]:.4f} |"
    for budget, promises in BUDGETS.items():
        if names is not None and "compile" not in names:
            continue
        path, plan = compiled(lab, budget, statistics)
        scores = lab.scores(path)
        size = (
            8 * sum(d.bytes_after for d in plan.rewritten) / sum(d.parameters_before for d in plan.rewritten)
        )
        held = "; ".join(
            f"{scores[t]:.4f} {'>=' if scores[t] >= least else 'MISSES'} {least} ({t})"
            for t, least in promises
        )
        lab.say(f"compile --bits {budget}: {size:.3f} bits, {scores} {held}")
        yield f"| **compile --bits {budget:g}** {held} | {size:.2f} | | | {scores[SAME]:.4f} | {scores[OTHER]:.4f} |"


def page(rows: Mapping[str, str], command: str, lab: Lab) -> str:
    counts = ", ".join(
        f"{sum(len(next(iter(f.values()))) for f in feeds)} rows ({text})"
        for text, feeds in lab.texts.items()
    )
    return (
        f"# Few bits\n\n    {command}\n\nMiniLM, float32, the 36 linear weights of its blocks; mean cosine of the sentence embedding to the original's. "
        f"Calibrated on {len(lab.calibration)} feeds; held out: {counts}. Bits are all that is stored for those weights, over their "
        "numbers; errors are means over the weights. *feedback* sees the second moment of the inputs and lets biases absorb means.\n\n"
        + "\n".join(rows.values())
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--recipes", metavar="A,B", help="parts of names; compile: the compiler itself. All by default"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="of each data file: quicker, and worse")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="kept between runs")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the page there")
    options = parser.parse_args()
    data: Path = options.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    cache = Cache(options.cache or data / "accuracy-cache")
    with threadpool_limits(1), Child() as child, cache.scratch() as scratch:
        lab = open_lab(MODELS["minilm"], data, child, cache, scratch, options.rows, 0, talker())
        rows: dict[str, str] = {}
        for line in table(lab, options.recipes):
            print(line, flush=True)
            rows[str(len(rows))] = line
        if options.output is not None:
            given = "".join(
                f" --{n} {v}" for n in ("recipes", "rows") if (v := getattr(options, n)) is not None
            )
            write_text(options.output, page(rows, f"python benchmarks/bits.py{given}", lab))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%H:%M')}", file=sys.stderr)


if __name__ == "__main__":
    main()
