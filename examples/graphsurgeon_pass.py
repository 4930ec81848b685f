"""lrcompile on a graphsurgeon graph: a pass applied to a `gs.Graph` gives a `gs.Graph`.

python examples/graphsurgeon_pass.py
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
import tiny_model

from lrcompile import Budget, LowRankPass, Options, surgeon

graph = gs.import_onnx(tiny_model.model())

# Surgery as usual: an output more, for looking at.
hidden = next(node for node in graph.nodes if node.name == "relu").outputs[0]
hidden.dtype, hidden.shape = "float32", ["batch", tiny_model.HIDDEN]
graph.outputs.append(hidden)

low_rank = LowRankPass(Options(budget=Budget(keep=0.6), data=tiny_model.feeds()))
smaller = surgeon.apply(graph, low_rank)

# And on as usual. Constants read their values when they are asked for, so nothing was loaded yet that was not needed.
smaller.cleanup().toposort()
made = gs.export_onnx(smaller)
onnx.checker.check_model(made, full_check=True)


def numbers(graph: gs.Graph) -> int:
    return sum(t.values.size for t in graph.tensors().values() if isinstance(t, gs.Constant))


print("nodes:", " ".join(node.op for node in graph.nodes), "->", " ".join(node.op for node in smaller.nodes))
print("outputs:", " ".join(output.name for output in smaller.outputs))
print(f"parameters: {numbers(graph):,} -> {numbers(smaller):,}")
