"""Legal but odd ONNX models with what a compiler should find in them; built with onnx.helper, knowing nothing of lrcompile.

`odd_graphs()` is a hypothesis strategy, `corpus(seed, n)` a fixed list in which every feature comes round.

| to add | write | in the table |
|---|---|---|
| MatMul, Gemm | ``def f(b: Builder) -> None`` | `PRODUCTS` in products.py |
| another operator | the same | `SITES` in sites.py (an equation: `EINSUM`) |
| a site in a body or a function | the same | `BODIES` in bodies.py |
| a way to hide a weight | ``def f(b, shape, dtype, inner) -> Stored`` | `HIDINGS` in weights.py |
| values of a weight | ``def f(b, shape) -> Array`` | `VALUES` in weights.py |
| anything else in the graph | ``def f(b) -> None`` or ``def f(b, model) -> None`` | `BEFORE`, `AFTER` in decorations.py |

Every key is a feature: it stands in `OddGraph.label` and can be asked for: ``build(Seeded(7), "scan_own_weight")``.

Left out, because the runtimes fail on legal models: onnxruntime 1.31.1 refuses nodes of equal names in one graph, and
MatMul of (0, K) with (K) and of (M, K) with (0, K, N); it has no `block_size` for a vector of one block, no Mul nor Abs
of bfloat16, no NumPy form of bfloat16 outputs. onnx.reference 1.23.2 has no DequantizeLinear below opset 19, no Flatten
of an empty batch, no grouped ConvTranspose, and does not know "ai.onnx" as the name of the default domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper

from .bodies import BODIES
from .builder import BF16, F16, F32, F64, REAL, STYLES, Builder, Choices, Feature, Seeded, Setting
from .decorations import AFTER, BEFORE, NOT_ON_ORT, NOT_ON_REFERENCE
from .products import matmul
from .records import REASONS, Expected, OddGraph
from .sites import SITES
from .weights import FATES, HIDINGS, VALUES

__all__ = ["FEATURES", "REASONS", "Expected", "OddGraph", "build", "corpus", "odd_graphs"]

T = TypeVar("T")

BLOCKS: dict[str, Feature] = {**SITES, **BODIES}
DTYPES = {"float32": F32, "float16": F16, "float64": F64, "bfloat16": BF16}
STORAGE = ("initializer", "constant_node", "mixed")

# Every feature, as the block that is built first and what it must contain.
_PLAIN = Feature(matmul)
_HIDDEN_BF16 = {n for n, h in HIDINGS.items() if "dequantize" not in n}
FEATURES: dict[str, tuple[Feature, dict[str, str]]] = {
    **{name: (block, {}) for name, block in BLOCKS.items()},
    **{
        n: (Feature(matmul, h.opset, h.ir, (*REAL, BF16) if n in _HIDDEN_BF16 else REAL), {"hidden": n})
        for n, h in HIDINGS.items()
    },
    **{n: (_PLAIN, {"values": n}) for n in VALUES if n != "normal"},
    **{n: (Feature(matmul, ir=4 if n == "overridable" else 3), {"fate": n}) for n in FATES if n != "alone"},
    **{n: (_PLAIN, {"decoration": n}) for n in (*BEFORE, *AFTER)},
    **{n: (Feature(matmul, 13 if n == "bfloat16" else 7, dtypes=(d,)), {}) for n, d in DTYPES.items()},
    **{f"names_{s}": (_PLAIN, {"style": s}) for s in STYLES},
    "ir3": (_PLAIN, {"ir": "3"}),
    "chain": (_PLAIN, {"hidden": "chain"}),
    "constant_node": (_PLAIN, {"storage": "constant_node"}),
    "batch_0": (Feature(matmul, dtypes=(F32,)), {"batch": "0"}),
}
_FIRST_IR = {
    7: 3,
    8: 3,
    9: 4,
    10: 5,
    11: 6,
    12: 7,
    13: 7,
    14: 7,
    15: 8,
    19: 9,
    21: 10,
    23: 11,
    24: 12,
    25: 13,
}


def build(choices: Choices, feature: str) -> OddGraph:
    """A model with this feature and, as `choices` have it, up to three more sites and a few decorations."""
    first, wanted = FEATURES[feature]
    setting = _setting(choices, first, wanted)
    b = Builder(choices, setting)
    b.reference = b.dtype == BF16 or wanted.get("decoration") in NOT_ON_ORT
    b.wanted = {k: v for k, v in wanted.items() if k in ("hidden", "values", "fate")}
    names = {v: k for k, v in DTYPES.items()}
    b.tag(feature, names[b.dtype], f"ir{b.ir}", f"opset{b.opset}", f"names_{setting.style}")
    first.build(b)
    legal = [n for n, f in BLOCKS.items() if _legal(f, b)]
    for _ in range(
        0 if "batch" in wanted or wanted.get("decoration") in NOT_ON_ORT else choices.pick([0, 0, 1, 1, 2, 3])
    ):
        extra = choices.pick(legal)
        b.tag(extra)
        BLOCKS[extra].build(b)
    decorations = [wanted["decoration"]] if "decoration" in wanted else []
    others = [n for n in (*BEFORE, *AFTER) if n not in NOT_ON_ORT]
    decorations += [choices.pick(others) for _ in range(choices.pick([0, 0, 1, 2]))]
    if b.reference:
        decorations = [d for d in decorations if d in AFTER and d not in NOT_ON_REFERENCE]
    before = [n for n in BEFORE if n in decorations]
    after = [n for n in AFTER if n in decorations]
    for name in before:
        BEFORE[name](b)
    batch = (
        int(wanted["batch"])
        if "batch" in wanted
        else choices.pick([None, None, 1, 7] if b.reference else [None, None, 0, 0, 1, 7])
    )
    if batch is not None and not b.frozen:
        b.tag(f"batch_{batch}")
    model = _model(b)
    for name in after:
        AFTER[name](b, model)
    b.tag(*before, *after)
    if "unknown_rank" in after or BODIES.keys() & set(b.tags):  # what a body gives back has no shape
        b.expected = [
            replace(e, certain=e.certain and n not in b.needs_rank) for n, e in enumerate(b.expected)
        ]
    feeds = [_feed(b, seed, batch if seed else None) for seed in range(2)]
    checked = "unknown_rank" not in after
    return OddGraph(model, feeds, tuple(b.expected), " ".join(b.tags), not b.reference, checked)


def _legal(feature: Feature, b: Builder) -> bool:
    if feature in BODIES.values() and b.opset < 9 and b.ir < 4:
        return False  # neither initializers nor Constants of integers are legal in a body
    return b.opset >= feature.opset and b.ir >= feature.ir and b.dtype in feature.dtypes


def _setting(choices: Choices, first: Feature, wanted: dict[str, str]) -> Setting:
    dtype = choices.pick([d for d in (F32, F32, F32, F16, F64, BF16) if d in first.dtypes])
    least = max(first.opset, 13 if dtype == BF16 else 7)
    opset = choices.pick([o for o in (17, *range(7, 26)) if o >= least])
    natural = next(ir for o, ir in reversed(_FIRST_IR.items()) if o <= opset)
    ir = choices.pick(
        [
            i
            for i in (natural, natural, 8, 3, 4, 10, 13)
            if i >= max(first.ir, 4 if opset < 9 and first in BODIES.values() else 3)
        ]
        or [max(first.ir, natural)]
    )
    return Setting(
        opset=opset,
        ir=int(wanted.get("ir", ir)),
        dtype=dtype,
        style=wanted.get("style") or choices.pick(["plain", "plain", *STYLES]),
        storage=wanted.get("storage") or choices.pick(["initializer", "initializer", *STORAGE]),
        seed=choices.integer(0, 2**31),
    )


def _model(b: Builder) -> onnx.ModelProto:
    for x in b.open:
        b.output(x)
    if not b.outputs:
        b.output(b.input((2, 3)))
    infos = []
    for n, i in enumerate(b.inputs):
        shape: list[int | str] = list(i.shape)
        if i.free and (not b.frozen or b.choices.chance(30)):
            shape[0] = f"batch_{n}"
        infos.append(helper.make_tensor_value_info(i.name, i.dtype, shape))
    extra = [t for t in b.main.initializers if b.ir < 4 or t.name in b.defaults]
    infos += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in extra]
    given = {i.name for i in b.inputs}
    outputs = []
    for n, (name, dtype, shape_) in enumerate(b.outputs):
        known = b.frozen and b.choices.chance(50)
        dims: list[int | str | None] = [s if known else f"out{n}_{d}" for d, s in enumerate(shape_)]
        if name in given:
            outputs.append(next(i for i in infos if i.name == name))
        else:
            outputs.append(helper.make_tensor_value_info(name, dtype, dims))
    graph = helper.make_graph(b.main.nodes, b.name("graph"), infos, outputs, b.main.initializers)
    opsets = [helper.make_opsetid("", b.opset)]
    if b.functions:
        opsets.append(helper.make_opsetid("odd.functions", 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=b.ir, functions=b.functions)


def _feed(b: Builder, seed: int, batch: int | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([b.setting.seed, seed])
    shapes = {
        i.name: i.shape if batch is None or b.frozen or not i.free else (batch, *i.shape[1:])
        for i in b.inputs
    }
    return {i.name: np.asarray(i.make(rng, shapes[i.name])) for i in b.inputs}


def corpus(seed: int, n: int) -> list[OddGraph]:
    """n models; the features come round in turn. Equal seeds give equal bytes."""
    names = list(FEATURES)
    return [build(Seeded(f"{seed}/{i}"), names[i % len(names)]) for i in range(n)]


class _Drawn:
    """Choices from hypothesis, which shrinks them."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def pick(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent


@st.composite
def odd_graphs(draw: st.DrawFn, features: Sequence[str] = tuple(FEATURES)) -> OddGraph:
    """Any model of the family; features: only those that have one of these."""
    return build(_Drawn(draw), draw(st.sampled_from(list(features))))
