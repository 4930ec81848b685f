"""What ONNX Runtime makes of a model: which operators run, and where.

ONNX Runtime hands out nodes to providers after its first, general optimisations, and says how (session option
``session.record_ep_graph_assignment_info``); what it fuses afterwards stands in the optimized model that it can write. A node
made by fusion bears the value that the last of its parts computed, and by it the provider of that part is found.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.errors import BuildError
from lrcompile.interfaces import BuildOptions
from lrcompile_runtimes._ort_devices import CPU, TARGETS, open_session

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

_RECORD = "session.record_ep_graph_assignment_info"
_WEIGHTS, _SMALL = (
    "weights",
    "1024",
)  # where weights of the optimized model go, and from how many bytes; nobody reads them


def record(settings: onnxruntime.SessionOptions) -> None:
    """Ask a session for `assigned`."""
    settings.add_session_config_entry(_RECORD, "1")


def assigned(session: onnxruntime.InferenceSession) -> list[tuple[str, Any]]:
    """Each node that a provider was given, as (provider, node); a node has name, op_type and domain."""
    return [
        (part.ep_name, node)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def count_nodes(ort: Any, model: Path, options: BuildOptions) -> dict[str, int]:
    """``OpType (domain) on Provider`` -> count, after all optimisations.

    Of what a provider compiles as a whole (TensorRT) the nodes that it was given: what becomes of them there, only it knows.
    A session is made for this and let go. ONNX Runtime writes the weights of an optimized model anew, external ones too: those above
    1 KiB go to the null device.
    """
    with tempfile.TemporaryDirectory(prefix="lrcompile-") as folder:
        written = Path(folder) / "optimized.onnx"
        (Path(folder) / _WEIGHTS).symlink_to(os.devnull)

        def adjust(settings: onnxruntime.SessionOptions) -> None:
            record(settings)
            for key, value in {
                "session.disable_prepacking": "1",
                "session.optimized_model_external_initializers_file_name": _WEIGHTS,
                "session.optimized_model_external_initializers_min_size_in_bytes": _SMALL,
            }.items():
                settings.add_session_config_entry(key, value)
            if not _compiles(options):
                settings.optimized_model_filepath = str(written)

        session = open_session(ort, model, options, adjust)
        given = assigned(session)
        del session
        if _compiles(options):
            return _counted((node.op_type, node.domain, provider) for provider, node in given)
        import onnx_ir as ir

        return _placed(_read(written), ir.load(model), given, TARGETS[options.target].provider)


def _read(path: Path) -> ir.Model:
    """An optimized model. In bodies ONNX Runtime writes some constants twice, as initializer and as node: these nodes never run."""
    import onnx
    import onnx_ir as ir

    def mend(graph: onnx.GraphProto) -> None:
        held = {tensor.name for tensor in graph.initializer}
        for node in [n for n in graph.node if n.op_type == "Constant" and n.output[0] in held]:
            graph.node.remove(node)
        for attribute in (a for n in graph.node for a in n.attribute if a.HasField("g")):
            mend(attribute.g)

    proto = onnx.load(path, load_external_data=False)
    mend(proto.graph)
    return ir.from_proto(proto)


def _compiles(options: BuildOptions) -> bool:
    return TARGETS[options.target].provider not in (CPU, "CUDAExecutionProvider")


def _placed(
    optimized: ir.Model, original: ir.Model, given: list[tuple[str, Any]], usual: str
) -> dict[str, int]:
    """Count the nodes of the optimized model, each with the provider of the node that computed its value before."""
    from lrcompile.graph import nodes

    provider_of = {node.name: provider for provider, node in given if node.name}
    maker = {value.name: node.name for _, node in nodes(original) for value in node.outputs if value.name}

    def provider(node: ir.Node) -> str:
        names = (node.name, *(maker.get(value.name or "") for value in node.outputs))
        return next((provider_of[name] for name in names if name and name in provider_of), usual)

    return _counted((node.op_type, node.domain, provider(node)) for _, node in nodes(optimized))


def _counted(ran: Iterable[tuple[str, str, str]]) -> dict[str, int]:
    counts = Counter(f"{op} ({domain or 'ai.onnx'}) on {provider}" for op, domain, provider in ran)
    return dict(sorted(counts.items()))


def check_placement(session: onnxruntime.InferenceSession, model: Path, target: str) -> None:
    """Raise BuildError where a node that computes floating-point numbers from the model's data was put on the CPU.

    What may stay there is what ONNX Runtime itself puts there: integers and booleans, and numbers that come from shapes and
    constants alone. Nodes that it made itself, say to reorder a shape, are on the CPU by choice where others of their type are not.
    """
    given = assigned(session)
    on_cpu = [node for provider, node in given if provider == CPU]
    if not on_cpu:
        return
    import onnx_ir as ir

    named, typed = _harmless(ir.load(model))
    elsewhere = {node.op_type for provider, node in given if provider != CPU}
    wrong = [node for node in on_cpu if not _may_stay(node, named, typed, elsewhere)]
    if wrong:
        listed = ", ".join(f"{node.op_type} {node.name!r}" for node in wrong[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BuildError(
            f"{target} has no kernel for {listed}{more} of {model.name}, which would run on the CPU; "
            "allow that with cpu_nodes, or choose another target"
        )


def _may_stay(
    node: Any, named: Mapping[str, bool], typed: Mapping[str, bool], elsewhere: Collection[str]
) -> bool:
    """Whether a node may run on the CPU: as `_harmless` says by its name, or by its type if the model has no such node."""
    if node.name in named:
        return named[node.name]
    made = bool(node.name)  # those of the model without a name may be anything
    return typed.get(node.op_type, False) or (made and node.op_type in elsewhere)


def _harmless(model: ir.Model) -> tuple[dict[str, bool], dict[str, bool]]:
    """Whether nodes, by name and by operator type, compute no floating-point numbers, or none from the values of the inputs."""
    import onnx_ir.passes.common as common

    from lrcompile.graph import nodes

    typed = model.clone()
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(typed)
    reached = _from_data(typed)
    named: dict[str, bool] = {}
    by_type: dict[str, bool] = {}
    for _, node in nodes(typed):
        floats = any(v.dtype is None or v.dtype.is_floating_point() for v in node.outputs)
        fine = not (floats and node in reached)
        by_type[node.op_type] = by_type.get(node.op_type, True) and fine
        if node.name:
            named[node.name] = fine
    return named, by_type


def _from_data(model: ir.Model) -> set[ir.Node]:
    """Nodes that read what the inputs hold; behind Shape and Size lies only what shapes they have. Bodies count as reading it."""
    from lrcompile.graph import bodies

    pending = [node for value in model.graph.inputs for node in value.consumers()]
    reached: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node in reached or node.op_type in ("Shape", "Size"):
            continue
        reached.add(node)
        pending.extend(user for value in node.outputs for user in value.consumers())
    for body in bodies(model):
        if body.path:
            reached.update(node for node in body.graph if node.op_type not in ("Shape", "Size"))
    return reached
