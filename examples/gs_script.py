"""A script for ``--gs-script``: the product with a constant before a MatMul goes into the MatMul's weight.

    lrcompile compile model.onnx -o out --gs-script examples/gs_script.py:fold_scale --keep 0.6 --data calib.npz

    python examples/gs_script.py        the same through the Python API, on a tiny model

(x * s) W = x (diag(s) W). The script runs on the loaded model, before sites are found; what it made is what the compiled model is
compared with. It changes the graph that it is given, or returns another one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_graphsurgeon as gs


def fold_scale(graph: gs.Graph) -> None:
    for node in graph.nodes:
        if node.op != "MatMul" or not isinstance(node.inputs[1], gs.Constant):
            continue
        scaled, weight = node.inputs
        if (
            len(scaled.inputs) != 1
            or scaled.inputs[0].op != "Mul"
            or len(scaled.outputs) != 1
            or scaled in graph.outputs
        ):
            continue  # made by something else, or read by somebody else
        x, scale = scaled.inputs[0].inputs
        if isinstance(scale, gs.Constant) and scale.values.shape == weight.values.shape[:1]:
            folded = gs.Constant(f"{weight.name}_folded", scale.values[:, None] * weight.values)
            node.inputs = [x, folded]
    graph.cleanup().toposort()  # the Mul goes, with the constants that nobody reads any more


def main() -> None:
    import onnx
    import tiny_model

    from lrcompile import Budget, Options, compile  # noqa: A004

    with tempfile.TemporaryDirectory() as name:
        path = tiny_model.write(Path(name))
        options = Options(
            budget=Budget(keep=0.6), data=path.with_name("calib.npz"), gs_script=f"{__file__}:fold_scale"
        )
        result = compile(path, Path(name, "out"), options)
        before, after = onnx.load(path), onnx.load(result.path / "model.onnx")
    print(
        "nodes:",
        " ".join(n.op_type for n in before.graph.node),
        "->",
        " ".join(n.op_type for n in after.graph.node),
    )
    print(
        f"{result.evidence.verdict}: cosine {result.evidence.outputs[0][1].cosine:.4f} with what the script made"
    )


if __name__ == "__main__":
    main()
