"""Readable names for what torch exported: nodes by layer path, weights by parameter, dimensions by meaning.

Each function changes the model in place and leaves what it computes untouched.
torch writes the module path of a node into its metadata `pkg.torch.onnx.name_scopes`:
`['', 'encoder', 'encoder.layer.0', ..., 'linear_3']`, whose last entry is torch's own name for the operation.
"""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lrcompile.errors import ModelError

__all__ = ["module_path", "name_cache", "name_dimensions", "name_nodes", "name_weights", "strip_metadata"]

logger = logging.getLogger(__name__)

SCOPES = "pkg.torch.onnx.name_scopes"
_CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
_RANGES = "pkg.torch.export.ExportedProgram.range_constraints"
_FIXED = re.compile(r"(\w+): VR\[(\d+), \2\]")  # how torch says that it took a symbol for one number
_BOUNDED = re.compile(r"(\w+): VR\[\d+, (\d+)\]")
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def module_path(node: ir.Node) -> str:
    """Path of the torch module whose `forward` made this node, such as `encoder.layer.0.attention`; "" if unknown."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def name_nodes(model: ir.Model) -> None:
    """Name every node `module.path/OpType`, and the second of that name `module.path/OpType_1`."""
    counts: dict[str, int] = {}
    for node in _all_nodes(model):
        name = "/".join(filter(None, (module_path(node), node.op_type)))
        count = counts[name] = counts.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name


def name_weights(model: ir.Model, module: Any) -> None:
    """Name `val_NN` constants that are a transposed parameter after it: `encoder.layer.0.output.dense.weight.T`.

    A name is given only where the values agree, so a folded scale or cast keeps torch's name.
    """
    by_module: dict[str, list[str]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())
    for name in parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    taken = {value.name for value in _values(model)}
    for value in list(model.graph.initializers.values()):
        if value.name in parameters or value.const_value is None or len(value.const_value.shape) < 2:
            continue
        found = (name for use in value.uses() for name in by_module.get(module_path(use.node), ()))
        match = next((name for name in found if _is_transpose(value.const_value, parameters[name])), None)
        if match is not None and f"{match}.T" not in taken:
            value.name = value.const_value.name = f"{match}.T"
            taken.add(value.name)


def _is_transpose(tensor: ir.TensorProtocol, parameter: Any) -> bool:
    if parameter.ndim != 2 or tuple(tensor.shape.numpy()) != tuple(parameter.shape)[::-1]:
        return False
    # numpy has no bfloat16 of torch's, and every float type we meet fits in float32
    return np.array_equal(np.asarray(tensor.numpy(), np.float32), parameter.detach().float().numpy().T)


def name_cache(model: ir.Model) -> None:
    """`past_key_values.N.key` for inputs and `present.N.key` for outputs, as every runtime for decoders expects."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if match := _CACHE.fullmatch(value.name or ""):
            side, layer, part = match.groups()
            value.name = f"{'past_key_values' if side == 'input' else 'present'}.{layer}.{part}"


def name_dimensions(model: ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give symbolic dimensions the names in `axes` everywhere, and turn symbols that are numbers into numbers.

    Raises ModelError when the model fixes an axis that `axes` calls dynamic; warns where it bounds one.
    """
    ranges = model.graph.metadata_props.get(_RANGES, "")
    fixed: dict[str, str] = dict(_FIXED.findall(ranges))
    meaning = dict(fixed)
    inputs = {value.name: value for value in model.graph.inputs}
    for name, named in axes.items():
        if name not in inputs:  # the model does not read it
            continue
        shape = inputs[name].shape
        assert shape is not None  # torch always writes the shapes of inputs
        for axis, text in named.items():
            size = _dimension(shape[axis], fixed)
            if isinstance(size, int):
                raise ModelError(
                    f"input {name!r}: axis {axis} ({text}) cannot be dynamic, the model fixes it at {size}"
                )
            meaning.setdefault(str(size), text)
    for symbol, most in _BOUNDED.findall(ranges):
        if symbol not in fixed:  # a table of positions ends there, or the code of the model branches there
            logger.warning(
                "dimension %s: the model was traced for sizes up to %s", meaning.get(symbol, symbol), most
            )
    for value in _values(model):
        if value.shape is not None and not value.is_initializer():
            value.shape = ir.Shape([_dimension(dim, meaning) for dim in value.shape])


def _dimension(dim: int | ir.SymbolicDim, meaning: Mapping[str, str]) -> int | str | None:
    """`s44` -> `batch`, `s36 + s70` -> `past + sequence`, `16` -> 16."""
    text = dim if isinstance(dim, int) else dim.value
    if text is None or isinstance(text, int):
        return text
    if text in meaning:
        text = meaning[text]
    elif not text.isdigit():
        terms = [meaning.get(term, term) for term in text.split(" + ")]
        if all(_SYMBOL.fullmatch(term) for term in terms):
            return " + ".join(sorted(terms))  # torch's order follows its symbols; ours must not
        text = _SYMBOL.sub(lambda symbol: _factor(meaning.get(symbol[0], symbol[0])), text)
    return int(text) if text.isdigit() else text


def _factor(text: str) -> str:
    return text if _SYMBOL.fullmatch(text) or text.isdigit() else f"({text})"


def strip_metadata(model: ir.Model) -> None:
    """Drop what is not the model: stack traces, file paths, torch's signatures. The layer path of each node stays."""
    for node in _all_nodes(model):
        scopes = node.metadata_props.get(SCOPES)
        node.metadata_props.clear()
        node.doc_string = None
        if scopes is not None:
            node.metadata_props[SCOPES] = scopes
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
            value.const_value.doc_string = None
    holders: tuple[ir.Model | ir.Graph | ir.Function, ...] = (model, model.graph, *model.functions.values())
    for holder in holders:
        holder.metadata_props.clear()
        holder.doc_string = None


def _all_nodes(model: ir.Model) -> Iterable[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _values(model: ir.Model) -> Iterable[ir.Value]:
    """Every value of the main graph, of bodies and of functions; some more than once."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    yield from model.graph.outputs
    for node in _all_nodes(model):
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from attribute.as_graph().inputs
                yield from attribute.as_graph().initializers.values()
