"""Lower: from the neutral form to the one encoding that a target likes best. In place.

Our functions are inlined, so that what is published is plain ONNX; permutations of the pivoted form are folded into their
neighbours; what several sites of a group compute alike is computed once; then the runtime's own list of named rewrites is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from lrcompile.graph import DOMAIN, bodies
from lrcompile.interfaces import Rewrite
from lrcompile.permutations import fold

logger = logging.getLogger(__name__)


def lower(model: ir.Model, rewrites: Sequence[Rewrite]) -> ir.Model:
    """Inline our functions, then apply the target's rewrites; gives back the same model."""
    common.InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    for body in bodies(model):
        body.graph.opset_imports.pop(DOMAIN, None)
    logger.info("%d permutations folded away", fold(model))
    logger.info("%d nodes merged", _merge(model))
    for rewrite in rewrites:
        logger.info("%s applied %d times", rewrite.name, rewrite(model))
    return model


def _merge(model: ir.Model) -> int:
    """Nodes of ours that compute the same of the same values become one; the user's own nodes stay as they are."""
    merged = 0
    for body in bodies(model):
        made: dict[object, ir.Node] = {}
        for node in list(body.graph):
            # runtimes keep codes small where each DequantizeLinear has one reader
            if "lrcompile.method" not in node.metadata_props or node.op_type in (
                "Constant",
                "DequantizeLinear",
            ):
                continue
            attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values()))
            first = made.setdefault((node.op_type, tuple(map(id, node.inputs)), attributes), node)
            if first is not node and not any(v.is_graph_output() for v in node.outputs):
                ir.convenience.replace_all_uses_with(node.outputs, first.outputs)
                body.graph.remove(node, safe=True)
                merged += 1
    return merged
