"""Keep sums apart from the norms behind them, where ONNX Runtime's fused kernel is the slower one.

ONNX Runtime fuses Add and LayerNormalization to SkipLayerNormalization, whose kernel for CPUs takes 15 times as long as the two
(1024 rows of 384 numbers, one thread, 1.31.1: 10.4 ms against 0.7 ms). Of a Sum it knows no such pattern: the same numbers, two nodes.
"""

from __future__ import annotations

import onnx_ir as ir

from lrcompile.graph import nodes, tensor_of


class NormsApart:
    """Turn every Add of two computed values that a LayerNormalization reads into a Sum, in place."""

    name = "norms-apart"

    def __call__(self, model: ir.Model) -> int:
        found = [node for _, node in nodes(model) if _is_fused(node)]
        for node in found:
            node.op_type = "Sum"
        return len(found)


def _is_fused(node: ir.Node) -> bool:
    """Whether ONNX Runtime would take an Add into the norm that reads it. The Add of a bias it takes into the product before it."""
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return False
    if any(tensor_of(value) is not None for value in node.inputs):
        return False
    return any(
        reader.op_type == "LayerNormalization" and index == 0 for reader, index in node.outputs[0].uses()
    )
