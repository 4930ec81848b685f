"""What a form keeps in the file as a product of constants, multiplied out before an engine is built.

ONNX Runtime does it when it loads a file; TensorRT would leave the product in the engine and compute it at every call.
"""

from __future__ import annotations

import onnx_ir as ir

from lrcompile.graph import Names, bodies, drop, opset_of, tensor_of
from lrcompile.weights import evaluate


def folded_constants(model: ir.Model) -> int:
    """Put the matrix in the place of every product of constants among our nodes. In place; says how many there were."""
    names, opset, folded = Names(model), opset_of(model), 0
    for body in bodies(model):
        for value in _products(body.graph):
            tensor = ir.Tensor(evaluate(value, opset), name=names.value(f"{value.name}/folded"))
            made = ir.val(tensor.name, const_value=tensor)
            body.graph.register_initializer(made)
            ir.convenience.replace_all_uses_with(value, made)
            drop(model, value)
            folded += 1
    return folded


def _products(graph: ir.Graph) -> list[ir.Value]:
    """Values of ours that only constants make, by at least one product, and that something else than such a value reads."""
    constant: dict[ir.Value, bool] = {}  # and whether there is a product among what makes it
    for node in graph:
        if "lrcompile.method" in node.metadata_props and node.op_type != "Constant":
            read = [v for v in node.inputs if v is not None]
            if all(v in constant or tensor_of(v) is not None for v in read):
                constant[node.outputs[0]] = node.op_type == "MatMul" or any(
                    constant.get(v, False) for v in read
                )
    return [
        value
        for value, product in constant.items()
        if product and any(reader.outputs[0] not in constant for reader, _ in value.uses())
    ]
