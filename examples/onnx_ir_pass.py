"""lrcompile inside an onnx-ir pipeline: `LowRankPass` between other passes.

python examples/onnx_ir_pass.py
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import tiny_model

from lrcompile import Budget, LowRankPass, Options

model = ir.from_proto(tiny_model.model())
low_rank = LowRankPass(Options(budget=Budget(keep=0.6), data=tiny_model.feeds()), verify=True)
passes = ir.passes.Sequential(
    common.CommonSubexpressionEliminationPass(),
    low_rank,  # a functional pass: the model above stays as it is
    common.RemoveUnusedNodesPass(),
    common.DeduplicateInitializersPass(),
)
result = passes(model)

# `Sequential` hands on models, not results; the plan lies on the model that came out.
print(result.model.meta["lrcompile.plan"])
print("modified:", result.modified)
print(
    "nodes:",
    " ".join(node.op_type for node in model.graph),
    "->",
    " ".join(n.op_type for n in result.model.graph),
)

# Called alone, the pass gives its whole result. What it made, it leaves alone.
again = low_rank(result.model)
print("a second time:", "modified" if again.modified else "nothing left to do")
