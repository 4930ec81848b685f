"""Local functions inlined, and every name made unique, so that later stages see one graph and its bodies."""

from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from lrcompile import graph
from lrcompile.load.legal import foreign

_SKIPPED = "lrcompile.skipped"  # marks an output that the user left out


def flatten(model: ir.Model) -> list[str]:
    """Inline the model's functions and make its names unique, in place. Raises ModelError.

    Gives a note for each function that cannot be inlined and is left.
    """
    own = {node for _, node in graph.nodes(model)}
    notes = _inline(model) if model.functions else []
    _make_names_unique(model, own)
    return notes


def _inline(model: ir.Model) -> list[str]:
    kept = _kept(model)
    for function in model.functions.values():
        _add_identities(function)
    for _, node in graph.nodes(model):
        called = model.functions.get(node.op_identifier())
        if called is not None and called.identifier() not in kept:
            node.resize_outputs(len(called.outputs))  # the pass wants a value for each
        for output in node.outputs:
            if not output.name and called is not None:
                output.name = None  # "take what the function calls it", which may be read inside
            elif not output.name:
                output.meta[_SKIPPED] = True
    with foreign("its functions cannot be inlined"):
        _InlinePass(lambda f: f.identifier() not in kept)(model)
    for _, node in graph.nodes(model):
        for output in node.outputs:
            if output.meta.pop(_SKIPPED, False):
                output.name = ""  # the pass has given it a name, which would ask the operator for it
    return [f"function {key[0]}::{key[1]} was left as it is: {reason}" for key, reason in kept.items()]


class _InlinePass(ir.passes.common.InlinePass):
    """onnx-ir's pass without its own way to unique names, which takes n^2 steps for n calls; ours comes afterwards."""

    def _reset(self, model: ir.Model) -> None:
        super()._reset(model)
        self._used_value_names = _Forgetful()
        self._used_node_names = _Forgetful()


class _Forgetful(set[str]):
    """A set that holds nothing, whatever is put in."""

    def add(self, element: str) -> None: ...


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


def _make_names_unique(model: ir.Model, own: set[ir.Node]) -> None:
    """Rename, in place, nodes and inner values whose name another bears: ONNX Runtime refuses such nodes, and a name
    that shadows one of an outer graph reads differently in different runtimes.

    Names of the interface stay; own nodes keep theirs before those that come out of functions.
    """
    values, nodes = _Unique(), _Unique()
    bodies = [
        body for body in graph.bodies(model) if body.function is None
    ]  # a function is a name space of its own
    for value in (*model.graph.inputs, *model.graph.outputs):
        values.name(value)
    for body in bodies:
        for value in (*body.graph.inputs, *body.graph.initializers.values()):
            values.name(value)
    for inlined in (False, True):
        for body in bodies:
            for node in body.graph:
                if (node not in own) == inlined:
                    nodes.name(node)
                    for value in node.outputs:
                        values.name(value)


class _Unique:
    """Names that were given out, each once, and to whom."""

    def __init__(self) -> None:
        self._taken: dict[str, ir.Node | ir.Value] = {}
        self._counts: Counter[str] = Counter()

    def name(self, thing: ir.Node | ir.Value) -> None:
        """Give a thing its own name if it has one and nobody else bears it, else the next that is free."""
        if not (wish := thing.name) or self._taken.get(wish) is thing:
            return
        name = wish
        while name in self._taken:
            self._counts[wish] += 1
            name = f"{wish}_{self._counts[wish] + 1}"
        self._taken[name] = thing
        if name != wish:
            thing.name = name
