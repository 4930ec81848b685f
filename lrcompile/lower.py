"""Lower: from the neutral form to the one encoding that a target likes best. In place.

Our functions are inlined, so that what is published is plain ONNX; then the runtime's own list of named rewrites is applied.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from lrcompile.graph import DOMAIN, bodies
from lrcompile.interfaces import Rewrite

logger = logging.getLogger(__name__)


def lower(model: ir.Model, rewrites: Sequence[Rewrite]) -> ir.Model:
    """Inline our functions, then apply the target's rewrites; gives back the same model."""
    common.InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    for body in bodies(model):
        body.graph.opset_imports.pop(DOMAIN, None)
    for rewrite in rewrites:
        logger.info("%s applied %d times", rewrite.name, rewrite(model))
    return model
