"""The model cut where weights stand, so that activations can be carried from part to part and no node runs twice a pass.

The taken groups are put into stages: a group's stage comes after those of all groups whose outputs reach it. A value *needs* k
stages when it cannot be known before k of them have their final weights. Between two stages lies a frontier, the values that
the later part still reads; part k of the graph computes frontier k from frontier k - 1 and the graph's inputs.

    inputs -> part 0 -> frontier 0 -> [stage 0] -> part 1 -> frontier 1 -> [stage 1] -> ..

Everything here is about values by name; nothing is run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lrcompile.records import Group, Site

# Of these the last site reads what the others gave: they are complete when it is.
CHAINS = frozenset({"up_down", "value_output"})


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups that can be taken at the same time.

    frontier: names of the values from which all that follows can be computed (with the graph's inputs). ahead: the graph's
    outputs that follow.
    """

    groups: tuple[Group, ...]
    frontier: tuple[str, ...]
    ahead: tuple[str, ...]


def stages_of(model: ir.Model, groups: Sequence[Group]) -> tuple[Stage, ...]:
    """The groups in the order in which data reaches them. All sites stand in the main graph."""
    needs, stage_of = _needs(model, groups)
    count = max(stage_of.values(), default=-1) + 1
    frontiers: list[dict[str, None]] = [{} for _ in range(count)]
    inputs, fixed = set(model.graph.inputs), _fixed(model)

    def carry(value: ir.Value, reader: int) -> None:
        """A value that something behind `reader - 1` stages reads is in every frontier from its own on."""
        if value in inputs or value in fixed:
            return
        for k in range(needs.get(value, 0), min(reader, count)):
            frontiers[k][value.name or ""] = None

    for node in model.graph:
        reader = max((needs[v] for v in node.outputs if v in needs), default=0)
        for value in _read_by(node):
            carry(value, reader)
    members: list[list[Group]] = [[] for _ in range(count)]
    for group in groups:
        members[stage_of[group.name]].append(group)
        for site in watched(group):
            carry(site.data, stage_of[group.name] + 1)
    outputs = [(v.name or "", needs.get(v, 0)) for v in model.graph.outputs]
    return tuple(
        Stage(tuple(m), tuple(f), tuple(name for name, need in outputs if need > k))
        for k, (m, f) in enumerate(zip(members, frontiers, strict=True))
    )


def watched(group: Group) -> tuple[Site, ...]:
    """The sites whose input is known before the group is taken: all of them, but for what a chain makes itself."""
    return group.sites[:-1] if group.kind in CHAINS else group.sites


def _needs(model: ir.Model, groups: Sequence[Group]) -> tuple[dict[ir.Value, int], dict[str, int]]:
    """How many stages each value needs, and each group's stage: a fixed point, reached in the first round unless groups interlock."""
    owners: dict[ir.Node, list[Group]] = defaultdict(list)  # groups may overlap
    for group in groups:
        for site in group.sites:
            owners[site.node].append(group)
    stage_of = {group.name: 0 for group in groups}

    def spread(final: bool) -> dict[ir.Value, int]:
        """final: inside a chain too, values need what made them."""
        needs: dict[ir.Value, int] = {}
        met: set[str] = set()
        for node in model.graph:
            need = known = max((needs.get(v, 0) for v in _read_by(node)), default=0)
            for group in owners.get(node, ()):
                # a weight with several readers changes when the first is reached: the others may read what that one gave
                if not final and not (group.shares_weight and group.name in met):
                    stage_of[group.name] = max(stage_of[group.name], known)
                met.add(group.name)
                if final or group.kind not in CHAINS or node is group.sites[-1].node:
                    need = max(need, stage_of[group.name] + 1)
            for value in node.outputs:
                needs[value] = need
        return needs

    for _ in range(len(groups) + 1):
        before = dict(stage_of)
        spread(final=False)
        if stage_of == before:
            break
    return spread(final=True), stage_of


def _fixed(model: ir.Model) -> set[ir.Value]:
    """Values that no input of the graph has a part in: weights, and what is made of them alone. They are made anew in every part."""
    fixed = set(model.graph.initializers.values())
    for node in model.graph:
        drawn = node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")
        if not drawn and all(v in fixed or v.graph is not model.graph for v in _read_by(node)):
            fixed.update(node.outputs)
    return fixed


def _read_by(node: ir.Node) -> Iterable[ir.Value]:
    """A node's inputs, and what its bodies read of the graph around them."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)


def part(
    model: ir.Model, given: Mapping[str, ir.DataType], wanted: Collection[str], free: Iterable[ir.Value] = ()
) -> ir.Model | None:
    """The part of the model that computes `wanted` from the values `given` (name: type) and the graph's inputs.

    free: constants of the model that a caller may override, each keeping its default. None when nothing must be computed.
    """
    outputs = [name for name in wanted if name not in given]
    if not outputs:
        return None
    fed = [v.name for v in model.graph.inputs if not v.is_initializer() and v.name]
    names = list(dict.fromkeys([*given, *fed]))
    graph = ir.convenience.extract(model.graph, names, outputs)
    for value in list(graph.inputs):
        if not value.uses() and value not in graph.outputs:
            graph.inputs.remove(value)
            continue
        if (dtype := given.get(value.name or "")) is not None:
            value.dtype, value.shape = dtype, None
    for value in graph.outputs:
        value.shape = None
    for value in free:
        if (name := value.name or "") in graph.initializers:
            graph.inputs.append(graph.initializers[name])
    return ir.Model(graph, ir_version=max(model.ir_version or 4, 4))
