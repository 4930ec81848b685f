"""Few bits on MiniLM: quantizers at equal total bits, and the whole model beside stock ones, on text that nobody calibrated on.

    python benchmarks/bits.py [--recipes a,b] [--rows N] [--held-out N] [--seconds S] [--data DIR] [--cache DIR] [-o docs/bits.md]

First every linear weight of the blocks is replaced by what a recipe makes of it; tables stay as they are. Bits are all that is stored
for those weights (codes, scales, zero points, levels, corrections), over their numbers. Errors are means over the weights: of the weight
itself, and of what it makes of its input. Recipes that see data use the second moment of the dense model's inputs. Rows that begin with -- are
what a user gets from `lrcompile compile` with these options. Then the same of the whole model, tables included, with its size and speed.

Figures are kept in the cache, so that a run that was ended goes on where it was; --recipes measures rows again whose names hold one of
these words, and shows the others as far as they are kept.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from accuracy import MODELS, OTHER, SAME, talker
from accuracy_parts.lab import ROOT, Lab, Refused, key_of, open_lab
from bits_parts import ours
from bits_parts.page import Promise, Rows, missing, picture, table, verdicts
from bits_parts.row import Figures, Kept
from bits_parts.stock import STOCK, Stock
from threadpoolctl import threadpool_limits

from lrcompile.child import Child
from lrcompile.curves import decision_of
from lrcompile.factors import FactorSet
from lrcompile.interfaces import Array, CandidateOptions, StatisticsSource
from lrcompile.oracle import reconstructed
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
from lrcompile.records import Group
from lrcompile.registry import methods_of
from lrcompile.store import Cache, new_folder, remove_folder, write_text

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
    by_plain("uint4-32s16"), by_plain("nf4"), by_search("uint4"), by_feedback("uint4-128"), by_feedback("uint4-64"), by_feedback("uint4"),
    with_correction("uint4-128", 8, "plain"), with_correction("uint4-128", 8, "exact"), lqer("uint4-128", 16), lqer("uint4", 32), lqer("uint3", 32),
    kashin_seeing("quarters", 6), kashin_seeing("pairs4", 6), kashin_seeing("int4-0s32", 6), by_plain("int3-32s16"), by_feedback("int3"),
    by_feedback("uint3-128"), by_feedback("uint3"), by_plain("int2-32s16"), by_plain("uint2"), by_feedback("uint2-128"), by_feedback("uint2"), by_feedback("ternary"), by_feedback("sign"),
    by_plain("int8"), by_feedback("int8"),
)  # fmt: skip
UNIFORM, MIXED = (
    "--bits 3.1 --methods dense --no-refit --storage uint3-128",
    "--bits 3.1 --methods dense --no-refit",
)
LINEAR = (
    "--bits 8.5 --methods dense", "--bits 4.5 --methods dense", "--bits 3.25 --methods dense", "--bits 2.25 --methods dense", UNIFORM, MIXED,
)  # fmt: skip
WHOLE = tuple(f"--size {size}MB --storage auto --methods dense --include ." for size in (22.3, 14, 10, 8))
TEXTS, TWO = (SAME, OTHER), "--bits 2.25 --methods dense"
DRAWN = ("--bits 4.5 --methods dense", "--bits 3.25 --methods dense", TWO)
PROMISES = (
    Promise("--bits 4.5 --methods dense", 0.985, 0.990, goals=(0.995, 0.98)),
    Promise("--bits 3.25 --methods dense", 0.90, 0.93, goals=(0.995, 0.98)),
    Promise(WHOLE[0], 0.996, size=22.8e6),
    Promise(WHOLE[1], 0.985, size=14.5e6),
)
EXPLAINED = (
    "Bits are all that is stored for those weights, over their numbers; errors are means over the weights, relative: of the weight, and of its product "
    "with its input. *feedback* sees the second moment of the inputs and lets biases absorb means; *clipped* searches the scales. Rows that begin "
    "with `--` are files that `lrcompile compile` published with these options: types mixed over the layers by what each moves the outputs by, and "
    "each layer fitted to what the coded ones before it give, but for `--no-refit`. `--storage` with one type is the same without mixing. The bits of "
    "recipes are the least that they could be stored in; those of files are what lies in them."
)
ABOUT_WHOLE = (
    "MB are the bytes of `model.onnx`; the original has {size:.1f}. x fp32: the original's time over the file's, interleaved, 2 threads, ONNX Runtime "
    "on the CPU. Stock quantizers are those of `onnxruntime.quantization`, each at its defaults but for what its row says. In the picture lower is better."
)


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


def measured(lab: Lab, row: Row) -> Figures:
    statistics = lab.statistics("plain")
    assert statistics is not None
    assert not isinstance(statistics, Refused)
    model, bits, weight, product = replaced(lab, row, statistics)
    path = save_lowered(model, lab.source, lab.scratch / "recipe")
    scores = lab.scores(path)
    remove_folder(path.parent)
    return Figures(bits, scores[SAME], scores[OTHER], weight, product)


def compiled_figures(lab: Lab, words: str, seconds: float) -> Figures:
    path, plan = ours.compiled(lab, words)
    return ours.scored(lab, path, TEXTS, seconds, ours.bits_of(plan))


def stock_figures(lab: Lab, make: Stock, seconds: float) -> Figures:
    path = new_folder(lab.scratch / "stock") / "model.onnx"
    make(lab.source.path, path, lab.calibration)
    figures = ours.scored(lab, path, TEXTS, seconds)
    remove_folder(path.parent)
    return figures


def tables(lab: Lab, kept: Kept, seconds: float) -> tuple[Rows, Rows, Rows, Rows]:
    """Recipes, ours of the linear weights, ours of the whole model, and stock quantizers."""

    def rows(made: Mapping[str, Callable[[], Figures]]) -> Rows:
        return {n: f for n, make in made.items() if (f := kept.row(n, make)) is not None}

    return (
        rows({r.name: partial(measured, lab, r) for r in ROWS}),
        rows({w: partial(compiled_figures, lab, w, 0.0) for w in LINEAR}),
        rows({w: partial(compiled_figures, lab, w, seconds) for w in WHOLE}),
        rows({n: partial(stock_figures, lab, make, seconds) for n, make in STOCK.items()}),
    )


def page(lab: Lab, made: tuple[Rows, Rows, Rows, Rows], command: str) -> str:
    recipes, linear, whole, stock = made
    counts = ", ".join(
        f"{sum(len(next(iter(f.values()))) for f in feeds)} rows ({t})" for t, feeds in lab.texts.items()
    )
    errors = {"bits": "bits", "weight": "weight error", "product": "product error"}
    speeds = {"size": "MB", "bits": "bits", "one": "x fp32, 1x128", "eight": "x fp32, 8x128"}
    everything = {**linear, **whole}
    return "\n\n".join(
        [
            f"# Few bits\n\n    {command}",
            f"MiniLM in float32; mean cosine of the sentence embedding to the original's. Calibrated on {sum(len(f['input_ids']) for f in lab.calibration)} "
            f"rows of Python's language reference; held out: {counts}.",
            "## What was asked",
            verdicts(PROMISES, everything, TEXTS),
            *margin(recipes, linear),
            *mixing(linear),
            "## The 36 linear weights of the blocks",
            EXPLAINED,
            table({**recipes, **linear}, errors, TEXTS),
            *missing([*(r.name for r in ROWS), *LINEAR], {**recipes, **linear}),
            "## The whole model, tables included",
            ABOUT_WHOLE.format(size=ours.bytes_of(lab.source.path) / 1e6),
            "![Size against error](bits.svg)",
            table({**whole, **stock}, speeds, TEXTS),
            *missing([*WHOLE, *STOCK], {**whole, **stock}),
        ]
    ) + "\n"  # fmt: skip


def margin(recipes: Rows, linear: Rows) -> list[str]:
    """What is gained over plain rounding to two bits, by how much on each text."""
    ours_, plain_ = (
        linear.get(TWO),
        {n: f for n, f in recipes.items() if n.startswith(("plain int2", "plain uint2"))},
    )
    if ours_ is None or not plain_:
        return []
    name, best = max(plain_.items(), key=lambda row: row[1].other)
    return [
        f"`{TWO}` ({ours_.bits:.2f} bits) against the better plain rounding to two bits ({name}, {best.bits:.2f} bits): "
        f"{ours_.same:.4f} against {best.same:.4f} ({SAME}, {ours_.same - best.same:+.4f}), {ours_.other:.4f} against {best.other:.4f} "
        f"({OTHER}, {ours_.other - best.other:+.4f})."
    ]  # fmt: skip


def mixing(linear: Rows) -> list[str]:
    """What types mixed over the layers are worth, at equal bits."""
    mixed, uniform = linear.get(MIXED), linear.get(UNIFORM)
    if mixed is None or uniform is None:
        return []
    return [
        f"Mixed types against one type at equal bits, without refit: {mixed.same:.4f} against {uniform.same:.4f} ({SAME}), {mixed.other:.4f} against "
        f"{uniform.other:.4f} ({OTHER}), at {mixed.bits:.2f} and {uniform.bits:.2f} bits."
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--recipes", metavar="A,B", help="measure again the rows whose names hold these words, and no others"
    )
    parser.add_argument("--kept", action="store_true", help="measure nothing: the page of what is kept")
    parser.add_argument("--rows", type=int, metavar="N", help="of each data file: quicker, and worse")
    parser.add_argument("--held-out", type=int, metavar="N", help="of each held-out file only")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each race; 0: no races")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="kept between runs")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.md", help="write the page there, and its picture beside it"
    )
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)  # stock quantizers tell of every node
    data: Path = options.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    cache = Cache(options.cache or data / "accuracy-cache")
    wanted = () if options.kept else tuple(options.recipes.split(",")) if options.recipes else None
    with threadpool_limits(1), Child() as child, cache.scratch() as scratch:
        lab = open_lab(
            MODELS["minilm"], data, child, cache, scratch, options.rows, 0, talker(), options.held_out
        )
        key = (lab.source.key, lab.calibration.key, *map(key_of, lab.texts.values()))
        made = tables(lab, Kept(cache, key, wanted, lab.say), options.seconds)
        given = [
            f"--{n.replace('_', '-')} {v}"
            for n in ("rows", "held_out")
            if (v := getattr(options, n)) is not None
        ]
        text = page(lab, made, " ".join(["python benchmarks/bits.py", *given, "-o docs/bits.md"]))
        print(text)
        if options.output is not None:
            write_text(options.output, text)
            _, linear, whole, stock = made
            drawn = picture(
                whole, {n: f for n, f in linear.items() if n in DRAWN}, stock, ours.bytes_of(lab.source.path)
            )
            write_text(options.output.with_suffix(".svg"), drawn)


if __name__ == "__main__":
    main()
