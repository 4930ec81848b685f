"""Local functions inlined, and every name made unique, so that later stages see one graph and its bodies."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from lrcompile import graph
from lrcompile.load.legal import foreign

_SKIPPED = "lrcompile.skipped"  # marks an output that the user left out


def inline(model: ir.Model) -> list[str]:
    """Inline the model's functions, in place. One that cannot be is left, with a note. Raises ModelError."""
    if not model.functions:
        return []
    kept = _kept(model)
    for function in model.functions.values():
        _add_identities(function)
    for _, node in graph.nodes(model):
        for output in node.outputs:
            if not output.name:
                output.meta[_SKIPPED] = True
    with foreign("its functions cannot be inlined"):
        ir.passes.common.InlinePass(lambda f: f.identifier() not in kept)(model)
    for _, node in graph.nodes(model):
        for output in node.outputs:
            if output.meta.pop(_SKIPPED, False):
                output.name = ""  # the pass has given it a name, which would ask the operator for it
    return [f"function {key[0]}::{key[1]} was left as it is: {reason}" for key, reason in kept.items()]


def _kept(model: ir.Model) -> dict[ir.OperatorIdentifier, str]:
    """Functions that cannot be inlined, with the reason. Brings imports that mean the same to one version."""
    kept: dict[ir.OperatorIdentifier, str] = {}
    opsets = dict(model.opset_imports)
    for key, function in model.functions.items():
        for domain, version in function.opset_imports.items():
            if opsets.setdefault(domain, version) == version:
                continue
            if _same(function, domain, version, opsets[domain], model):
                function.opset_imports[domain] = opsets[domain]
            else:
                kept[key] = (
                    f"it is written for opset {version} of {domain or 'ONNX'}, the model for {opsets[domain]}"
                )
        if any(_is_graph(attribute) for attribute in function.attributes.values()):
            kept[key] = "it takes a graph as an attribute"
    for _, node in graph.nodes(model):
        if (key := node.op_identifier()) in model.functions and any(map(_is_graph, node.attributes.values())):
            kept[key] = "it takes a graph as an attribute"
    pending = list(kept)
    while pending:  # what is inlined into a function would have to fit that function's opset
        for node in model.functions[pending.pop()].all_nodes():
            if (key := node.op_identifier()) in model.functions and key not in kept:
                kept[key] = "it is called by one that is left"
                pending.append(key)
    return kept


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _same(function: ir.Function, domain: str, old: int, new: int, model: ir.Model) -> bool:
    """Whether the function's operators of a domain are the same in both versions of it."""
    for node in function.all_nodes():
        if node.domain != domain or node.op_identifier() in model.functions:
            continue
        try:
            versions = [onnx.defs.get_schema(node.op_type, v, domain).since_version for v in (old, new)]
        except onnx.defs.SchemaError:
            return False
        if versions[0] != versions[1]:
            return False
    return True


def _add_identities(function: ir.Function) -> None:
    """Give each output a node of its own: the pass would rename an input that is handed through."""
    seen: set[ir.Value] = set()
    for index, output in enumerate(function.outputs):
        if output.producer() is None or output in seen:
            node = ir.Node("", "Identity", [output], name=f"{output.name}_out")
            node.outputs[0].name = f"{output.name}_out"
            function.append(node)
            function.outputs[index] = node.outputs[0]
        seen.add(function.outputs[index])


def make_names_unique(model: ir.Model) -> None:
    """Rename, in place, nodes and inner values whose name another bears: ONNX Runtime refuses such nodes, and a name
    that shadows one of an outer graph reads differently in different runtimes. Names of the interface stay.
    """
    values, nodes = _Unique(), _Unique()
    for body in graph.bodies(model):
        if body.function is not None:
            continue  # a name space of its own
        named = [
            *body.graph.inputs,
            *body.graph.initializers.values(),
            *(o for n in body.graph for o in n.outputs),
        ]
        for value in dict.fromkeys(named):
            if value.name and (name := values.take(value.name)) != value.name:
                value.name = name
        for node in body.graph:
            if node.name:
                node.name = nodes.take(node.name)


class _Unique:
    """Names that were given out, each once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._counts: Counter[str] = Counter()

    def take(self, wish: str) -> str:
        name = wish
        while name in self._taken:
            self._counts[wish] += 1
            name = f"{wish}_{self._counts[wish] + 1}"
        self._taken.add(name)
        return name
