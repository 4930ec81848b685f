"""What a legal model is: versions that runtimes read, names that are made before they are read, operators that exist."""

from __future__ import annotations

import contextlib
import graphlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from lrcompile.errors import LrcompileError, ModelError
from lrcompile.load.tensors import every_graph, every_tensor, node_label
from lrcompile.store import wire

# What ONNX Runtime 1.31 reads, and what it can still be compared with.
OPSETS, IR_VERSIONS = range(7, 27), range(3, 14)
# Domains that onnx does not know and runtimes do.
RUNTIME_DOMAINS = ("com.microsoft", "com.ms.", "org.pytorch.aten", "ai.onnx.contrib")

# What ONNX Runtime keeps in the default domain although onnx has never heard of it (its own exporters write it).
RUNTIME_OPERATORS = frozenset({"SimplifiedLayerNormalization"})

MAX_NODES = 250_000  # functions expanded; about 20 s of checks, and several times what real models have
MAX_CALLS = 100  # functions in functions: onnx.checker's own limit
MAX_ELEMENTS = 2**33  # of an input or output whose shape is fixed: it must fit into memory to be tried

Function = tuple[str, str, str]


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Around a call of a library that reads what others wrote: whatever it raises is the model's fault."""
    try:
        yield
    except (LrcompileError, RecursionError, MemoryError, OSError):
        raise
    except Exception as error:
        raise ModelError(f"{what}: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    while error.__cause__ is not None:  # onnx-ir wraps each level in the text of everything below it
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."


def check_text(model: ModelProto) -> None:
    """Raises ModelError when a string is not UTF-8: protobuf hands such a one out as bytes, which nothing expects."""
    pending: list[Any] = [model]  # any message; protobuf ships no types
    while pending:
        message = pending.pop()
        for field, value in message.ListFields():
            if field.type == field.TYPE_STRING:
                values = value if field.is_repeated else (value,)
                if any(isinstance(v, bytes) for v in values):
                    raise ModelError(
                        f"{field.full_name} is not UTF-8 text: {next(v for v in values if isinstance(v, bytes))[:40]!r}"
                    )
            elif field.type == field.TYPE_MESSAGE:
                pending += value if field.is_repeated else (value,)


def check_header(model: ModelProto) -> None:
    """Raises ModelError when the versions are none that we and the runtimes read."""
    if not model.HasField("graph"):
        raise ModelError("this is not an ONNX model: it holds no graph")
    if model.ir_version not in IR_VERSIONS:
        raise ModelError(
            f"IR version {model.ir_version} is not among {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}, which runtimes read; "
            "export it again"
        )
    for imports, place in (
        (model.opset_import, ""),
        *((f.opset_import, f" of function {f.name!r}") for f in model.functions),
    ):
        versions: dict[str, int] = {}
        for entry in imports:
            if versions.setdefault(_domain(entry.domain), entry.version) != entry.version:
                raise ModelError(f"opset imports{place} name domain {entry.domain!r} with two versions")
        if not place and "" not in versions:
            raise ModelError("the opset imports do not name ONNX's own domain")
        if "" in versions and versions[""] not in OPSETS:
            raise ModelError(
                f"opset {versions['']}{place} is not among {OPSETS[0]} to {OPSETS[-1]}; convert it with onnx.version_converter"
            )


def normalise(model: ModelProto) -> None:
    """Give things that have two spellings the one that the rest of the code reads; the model means the same."""
    for imports in (model.opset_import, *(f.opset_import for f in model.functions)):
        entries = {_domain(entry.domain): entry.version for entry in imports}
        del imports[:]
        for domain, version in entries.items():
            imports.add(domain=domain, version=version)
    for body, _ in every_graph(model):
        for node in body.node:
            if node.domain == "ai.onnx":
                node.domain = ""
        if isinstance(body, GraphProto):
            inputs = {info.name: info for info in body.input}
            for info in body.output:
                if (
                    info.name in inputs
                ):  # handed through: one value, of which onnx-ir would keep what is said last
                    info.CopyFrom(inputs[info.name])
            for info in (*body.input, *body.output, *body.value_info):
                for dim in info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ():
                    if dim.dim_value < 0:  # old exporters write -1 for "unknown"
                        dim.ClearField("dim_value")


def check(model: ModelProto) -> None:
    """Raises ModelError with the first thing that is not legal. Reads no weights."""
    functions = _functions(model)
    _check_size(model, functions)
    opsets = _opsets(model.opset_import)
    _check_interface(model.graph)
    _Names(functions, opsets).graph(model.graph, [], "")
    for function in model.functions:
        _Names(functions, _opsets(function.opset_import)).function(function)
    _check_with_onnx(model)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {entry.domain: entry.version for entry in imports}


def _called(node: NodeProto) -> Function:
    return (node.domain, node.op_type, node.overload)


def _functions(model: ModelProto) -> dict[Function, onnx.FunctionProto]:
    functions: dict[Function, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (_domain(function.domain), function.name, function.overload)
        if key in functions:
            raise ModelError(f"function {function.domain}::{function.name} is there twice")
        functions[key] = function
    return functions


def _check_size(model: ModelProto, functions: dict[Function, onnx.FunctionProto]) -> None:
    """How many nodes there are when every call is expanded, counted without expanding any."""
    own: dict[Function | None, int] = Counter()
    calls: dict[Function | None, Counter[Function]] = {}
    roots: list[tuple[Function | None, GraphProto | onnx.FunctionProto]] = [
        (None, model.graph),
        *functions.items(),
    ]
    for key, root in roots:
        calls[key] = Counter()
        pending: list[GraphProto | onnx.FunctionProto] = [root]
        while pending:
            body = pending.pop()
            own[key] += len(body.node)
            for node in body.node:
                if _called(node) in functions:
                    calls[key][_called(node)] += 1
                for attribute in node.attribute:
                    pending += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())]
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        name = next(f"{key[0]}::{key[1]}" for key in error.args[1] if key is not None)
        raise ModelError(f"function {name} calls itself, directly or through others") from error
    size: dict[Function | None, int] = {}
    depth: dict[Function | None, int] = {}
    for key in order:  # callees come first
        size[key] = own[key] + sum(times * size[callee] for callee, times in calls[key].items())
        depth[key] = 1 + max((depth[callee] for callee in calls[key]), default=-1)
        what = "the graph" if key is None else f"function {key[0]}::{key[1]}"
        if depth[key] > MAX_CALLS:
            raise ModelError(
                f"{what} is the top of a chain of more than {MAX_CALLS} functions that call each other"
            )
        if size[key] > MAX_NODES:
            raise ModelError(f"{what} has more than {MAX_NODES:,} nodes when its functions are expanded")


def _check_interface(graph: GraphProto) -> None:
    for kind, infos in (("input", graph.input), ("output", graph.output)):
        for info in infos:
            if not info.name:
                raise ModelError(f"a graph {kind} has no name")
            if kind == "input" and info.type.WhichOneof("value") is None:
                raise ModelError(f"input {info.name!r} has no type")
            if not info.type.HasField("tensor_type"):
                continue
            elements = 1
            for dim in info.type.tensor_type.shape.dim:
                elements *= dim.dim_value if dim.HasField("dim_value") else 1
            if elements > MAX_ELEMENTS:
                raise ModelError(
                    f"{kind} {info.name!r} has {elements:,} elements, more than can be held in memory"
                )
        if repeated := [name for name, times in Counter(info.name for info in infos).items() if times > 1]:
            raise ModelError(f"{kind} {repeated[0]!r} is listed twice")


class _Names:
    """Every name is made once, and before it is read; every operator exists. One object for a graph or a function."""

    def __init__(self, functions: dict[Function, onnx.FunctionProto], opsets: dict[str, int]) -> None:
        self._functions, self._opsets = functions, opsets
        self._known: set[tuple[str, str]] = set()

    def graph(self, graph: GraphProto, outer: list[set[str]], place: str) -> set[str]:
        """Gives the names that it, or what is in it, reads from the graphs around it."""
        made = {info.name for info in graph.input}
        if len(made) != len(graph.input):
            raise ModelError(f"two inputs have the same name{place}")
        seen: set[str] = set()
        for tensor in graph.initializer:
            if not tensor.name:
                raise ModelError(f"an initializer has no name{place}")
            if tensor.name in seen:
                raise ModelError(f"initializer {tensor.name!r} is there twice{place}")
            seen.add(tensor.name)
        made |= seen
        borrowed = self._nodes(graph.node, made, outer, place)
        for info in graph.output:
            if info.name not in made:
                raise ModelError(f"output {info.name!r} is made by no node{place}")
        return borrowed

    def function(self, function: onnx.FunctionProto) -> None:
        place = f" in function {function.domain}::{function.name}"
        made = set(function.input)
        if len(made) != len(function.input):
            raise ModelError(f"two inputs have the same name{place}")
        self._nodes(function.node, made, [], place)
        for name in function.output:
            if name not in made:
                raise ModelError(f"output {name!r} is made by no node{place}")

    def _nodes(
        self, nodes: Sequence[NodeProto], made: set[str], outer: list[set[str]], place: str
    ) -> set[str]:
        borrowed: set[str] = set()
        for node in nodes:
            self._operator(node, place)
            for name in node.input:
                if not name or name in made:
                    continue
                if not any(name in names for names in outer):
                    raise ModelError(f"{node_label(node)}{place} reads {name!r}, {_why_missing(name, nodes)}")
                borrowed.add(name)
            for attribute in node.attribute:
                inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())]
                for graph in inner:
                    where = f" in {attribute.name} of {node.name or node.op_type}{place}"
                    borrowed |= self.graph(graph, [*outer, made], where) - made
            for name in node.output:
                if not name:
                    continue
                if name in made or name in borrowed:
                    raise ModelError(
                        f"{node_label(node)}{place} makes {name!r}, which is the name of something else"
                    )
                made.add(name)
        return borrowed

    def _operator(self, node: NodeProto, place: str) -> None:
        domain = node.domain
        if function := self._functions.get(_called(node)):
            if len(node.input) > len(function.input) or len(node.output) > len(function.output):
                raise ModelError(
                    f"{node_label(node)}{place} gives its function {len(node.input)} inputs and {len(node.output)} "
                    f"outputs; it has {len(function.input)} and {len(function.output)}"
                )
            return
        if (domain, node.op_type) in self._known or (domain == "" and node.op_type in RUNTIME_OPERATORS):
            return
        if domain in _onnx_domains():
            version = self._opsets.get(domain)
            if version is None:
                raise ModelError(
                    f"{node_label(node)}{place} is of domain {domain!r}, which no opset import names"
                )
            try:
                deprecated = onnx.defs.get_schema(node.op_type, version, domain).deprecated
            except onnx.defs.SchemaError:
                deprecated = True
            if deprecated:
                named = f"opset {version}" + (f" of {domain}" if domain else "")
                raise ModelError(f"{node_label(node)}{place}: there is no operator {node.op_type} in {named}")
        elif not domain.startswith(RUNTIME_DOMAINS):
            raise ModelError(
                f"{node_label(node)}{place}: operator {domain}::{node.op_type} is unknown; "
                "only operators of ONNX, of ONNX Runtime and local functions can be compiled"
            )
        self._known.add((domain, node.op_type))


def _onnx_domains() -> frozenset[str]:
    return frozenset(onnx.defs.C.schema_version_map())


def _why_missing(name: str, nodes: Sequence[NodeProto]) -> str:
    for node in nodes:
        if name in node.output:
            return f"which {node_label(node)} makes only later: the nodes form a cycle or are not sorted"
    return "which nothing makes"


def _check_with_onnx(model: ModelProto) -> None:
    """onnx's own checker and type inference, on a copy without weights."""
    bare = ModelProto()
    bare.CopyFrom(model)
    for tensor, _ in every_tensor(bare):
        if tensor.data_location == tensor.EXTERNAL or tensor.ByteSize() > 4096:
            bare_tensor = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            tensor.CopyFrom(bare_tensor)
    mismatch = _type_mismatch(bare)
    _satisfy(bare)
    with foreign("onnx.checker refuses it"):
        onnx.checker.check_model(bare)
    if mismatch:
        raise ModelError(f"types do not fit: {mismatch}")


def _type_mismatch(model: ModelProto) -> str | None:
    """What type inference says about types that do not fit. What it says of shapes is left to the runtime to judge."""
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:
        complaints = ("inconsistent type", "unsupported type", "elem type differs")
        return next(
            (_sentence(Exception(x)) for x in str(error).splitlines() if any(c in x for c in complaints)),
            None,
        )
    return None


def _satisfy(model: ModelProto) -> None:
    """Add what the checker demands and runtimes do without, to the copy that it sees."""
    for tensor, _ in every_tensor(model):
        if tensor.ByteSize() and not any(len(getattr(tensor, f)) for f in ("raw_data", *wire.TYPED)):
            del tensor.dims[:]
            tensor.dims.append(0)
    for body, _ in every_graph(model):
        for node in body.node:
            if node.domain == "" and node.op_type in RUNTIME_OPERATORS:
                node.domain = RUNTIME_DOMAINS[0]
                if not any(o.domain == node.domain for o in model.opset_import):
                    model.opset_import.add(domain=node.domain, version=1)
        if isinstance(body, GraphProto):
            body.name = body.name or "graph"
            for info in (*body.input, *body.output, *body.value_info):
                if info.type.WhichOneof("value") is None:
                    info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
                if info.type.HasField("tensor_type"):
                    info.type.tensor_type.shape.SetInParent()
