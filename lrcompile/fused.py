"""Fused operators: how many a runtime makes of a model, and fusing after factorization where it makes fewer than before.

A runtime fuses patterns of nodes (attention, norms, GELU) when it loads a model, and nodes that are put between them can break a
pattern. `fewer` compares what really runs, `Engine.nodes()`, with what the original gets; `fuse` applies the runtime's own list of
rewrites, `Runtime.fusions`, where that is needed or wanted, and keeps them only if the runtime builds the result and fuses no less.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lrcompile.errors import BuildError
from lrcompile.interfaces import Rewrite

logger = logging.getLogger(__name__)

Nodes = Mapping[str, int]
_KEY = re.compile(r"(?P<op>\S+) \((?P<domain>.*)\) on (?P<provider>.*)")

# Kinds of fused operators. A norm that adds is a norm too, and one that embeds adds.
_KINDS: Mapping[str, frozenset[str]] = {
    kind: frozenset(operators.split())
    for kind, operators in {
        "attention": "Attention MultiHeadAttention GroupQueryAttention PackedAttention PackedMultiHeadAttention QAttention "
        "DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention LongformerAttention SparseAttention PagedAttention",
        "normalization": "LayerNormalization SimplifiedLayerNormalization RMSNormalization SkipLayerNormalization "
        "SkipSimplifiedLayerNormalization EmbedLayerNormalization",
        "skip normalization": "SkipLayerNormalization SkipSimplifiedLayerNormalization EmbedLayerNormalization",
        "embedding normalization": "EmbedLayerNormalization",
        "GELU": "Gelu FastGelu BiasGelu QuickGelu GemmFastGelu",
        "GELU with bias": "BiasGelu FastGelu GemmFastGelu",
        "rotary embedding": "RotaryEmbedding GemmaRotaryEmbedding",
        "fused product": "FusedMatMul TransposeMatMul",
        "product with activation": "FusedGemm FusedConv",
        "softmax with bias": "BiasSoftmax",
        "group normalization": "GroupNorm SkipGroupNorm",
        "integer product": "DynamicQuantizeMatMul MatMulIntegerToFloat",
    }.items()
}
# What attention takes in: the two products around its softmax; turned queries and keys, where it groups them.
_HELD_BY_ATTENTION = {"fused product": 2, "softmax with bias": 1, "rotary embedding": 2}
# A product of integers adds its bias itself, and leaves a GELU behind it without one.
_HELD_BY_INTEGER_PRODUCT = {"GELU with bias": 1}


@dataclass(frozen=True, slots=True)
class Ran:
    """A key of `Engine.nodes()` taken apart: ``MatMul (ai.onnx) on CPUExecutionProvider``."""

    op: str
    domain: str
    provider: str

    @classmethod
    def of(cls, key: str) -> Ran:
        match = _KEY.fullmatch(key)
        if match is None:
            raise AssertionError(f"{key!r} is no `OpType (domain) on Provider`")
        return cls(**match.groupdict())

    def __str__(self) -> str:
        return f"{self.op} ({self.domain}) on {self.provider}"


def kinds(nodes: Nodes) -> dict[str, int]:
    """Fused operators by kind; kinds of which there are none are left out."""
    operators = Counter[str]()
    for key, count in nodes.items():
        operators[Ran.of(key).op] += count
    counts = {kind: sum(operators[op] for op in members) for kind, members in _KINDS.items()}
    return {kind: count for kind, count in counts.items() if count}


def fewer(before: Nodes, after: Nodes, factored_table: bool = False) -> tuple[str, ...]:
    """Kinds of fused operators of which there are fewer after than before, each with both counts.

    Attention and MultiHeadAttention are one kind. What attention, or a product of integers, has taken in is not lost. factored_table: the embedding table is
    factored itself, so that an EmbedLayerNormalization has nothing to read from, and may become another norm.
    """
    had, has = kinds(before), kinds(after)
    if factored_table and (lost := had.pop("embedding normalization", 0)):
        had["skip normalization"] = had.get("skip normalization", 0) - lost

    def grown(kind: str) -> int:
        return max(0, has.get(kind, 0) - had.get(kind, 0))

    wanted = {
        kind: count
        - grown("attention") * _HELD_BY_ATTENTION.get(kind, 0)
        - grown("integer product") * _HELD_BY_INTEGER_PRODUCT.get(kind, 0)
        for kind, count in had.items()
    }
    return tuple(
        f"{kind}: {had[kind]} before, {has.get(kind, 0)} after"
        for kind, count in wanted.items()
        if has.get(kind, 0) < count
    )


@dataclass(frozen=True, slots=True, eq=False)
class Fused:
    """A lowered model, fused or as it was. nodes: what runs of it; applied: fusions by name and count; lost: what `fewer` still says."""

    model: ir.Model
    nodes: Nodes
    applied: tuple[tuple[str, int], ...] = ()
    lost: tuple[str, ...] = ()


def fuse(
    model: ir.Model,
    fusions: Sequence[Rewrite],
    before: Nodes,
    nodes_of: Callable[[ir.Model], Nodes],
    *,
    factored_table: bool = False,
    always: bool = False,
) -> Fused:
    """Count what runs of a lowered model, and where there are fewer fused operators than before, or `always`, apply the fusions.

    nodes_of: builds an engine of a model and gives its `nodes()`. The given model stays as it is. Fusions are dropped where the
    runtime refuses their result, or fuses less of it. Raises BuildError where it refuses the model itself.
    """
    plain = Fused(model, nodes := nodes_of(model), lost=fewer(before, nodes, factored_table))
    if not fusions or not (always or plain.lost):
        return plain
    twin = model.clone()
    applied = tuple((fusion.name, count) for fusion in fusions if (count := fusion(twin)))
    if not applied:
        return plain
    try:
        fused = nodes_of(twin)
    except BuildError as error:
        logger.warning("fusions left out: %s", error)
        return plain
    if worse := fewer(nodes, fused):
        logger.info("fusions left out, they cost others: %s", "; ".join(worse))
        return plain
    return Fused(twin, fused, applied, fewer(before, fused, factored_table))
