"""Which sites are best taken together.

``shared`` and ``tied``: one stored weight, several readers. ``qkv``, ``gate_up``: different weights that read one input.
``up_down``: an FFN, hidden = act(x Wu) (times x Wg), y = hidden Wd. ``value_output``: x Wv, attention over positions, Wo.
``query_key``: x Wq and x Wk, which meet in the product that a softmax over keys reads.

The last three are found generously, and `widths` says of each what can be cut between its sites, or why nothing can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from lrcompile.crossings import ELEMENTWISE, FUSED
from lrcompile.extents import Extents
from lrcompile.graph import tensor_of
from lrcompile.records import Group, Site
from lrcompile.widths import width_of

_HEAD_SHUFFLES = frozenset({"Reshape", "Transpose", "Identity", "Cast", "Squeeze", "Unsqueeze", "Expand"})
# What may lie between a projection and the scores, whether it can be cut through or not: rotations, norms, caches.
_QUERY_WAY = _HEAD_SHUFFLES | frozenset(
    "Mul Div Add Sub Neg Concat Slice Split Gather Where Pow Sqrt ReduceMean Reciprocal Dropout Tile RotaryEmbedding "
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization".split()
)
# Between the scores and their softmax: what is added to or multiplied with them, and Reshapes, which keep the keys last.
_SCORE_WAY = frozenset("Add Sub Mul Div Where Cast Identity Reshape Max Dropout".split())
_FEW = 64  # nodes that a way has at most


def groups_of(sites: Sequence[Site], shapes: Mapping[ir.Value, ir.Shape] | None = None) -> tuple[Group, ...]:
    """Every group of the sites that can be taken; first the partition by stored weight, then the overlapping ones.

    shapes: of the model's values, as far as they are known; without them nothing can be cut that depends on more than the file says.
    """
    taken = [s for s in sites if s.refusal is None]
    by_weight: dict[object, list[Site]] = defaultdict(list)
    for site in taken:
        by_weight[_identity(site.root)].append(site)
    units = [group for members in by_weight.values() for group in _units(members)]
    linear = [s for s in taken if s.kind == "linear"]
    extents = Extents(shapes or {})
    wide = [*_with_width(_ffns(linear), units, extents), *_with_width(_value_outputs(linear), units, extents)]
    return (*units, *_siblings(linear), *wide, *_query_keys(linear, units, extents))


def _with_width(groups: Iterable[Group], units: Sequence[Group], extents: Extents) -> Iterator[Group]:
    for group in groups:
        yield _measured(group, units, extents)


def _measured(group: Group, units: Sequence[Group], extents: Extents, scores: ir.Node | None = None) -> Group:
    """The group with what can be cut between its sites, or why nothing can."""
    for site in group.sites:
        unit = next(u for u in units if site in u.sites)
        if unit.keeper or len(unit.sites) > 1:
            other = unit.keeper or next(s.name for s in unit.sites if s is not site)
            return replace(
                group, refusal=f"{other!r} reads the weight of {site.name} too, and needs it whole"
            )
    found = width_of(group.kind, group.sites, extents, scores)
    return replace(group, refusal=found) if isinstance(found, str) else replace(group, width=found)


def _units(members: list[Site]) -> Iterable[Group]:
    """Readers of one constant: one group where their matrices are the same or transposes, else one each."""
    first, *others = members
    together, flags, apart = [first], [False], []
    for site in others:
        flag = _relation(first, site)
        if flag is None:
            apart.append(site)
        else:
            together.append(site)
            flags.append(flag)
    kind = "alone"
    if len(together) > 1:
        kind = "tied" if {s.kind for s in together} == {"linear", "lookup"} else "shared"
    yield Group(first.name, kind, tuple(together), tuple(flags), _keeper(together))
    for site in apart:
        yield Group(site.name, "alone", (site,), (False,), _keeper([site]))


def _keeper(sites: Sequence[Site]) -> str:
    """Who else reads the weight of these sites, or what was made of it on the way to them; empty when nobody does."""
    ours: set[tuple[ir.Node, int]] = {(s.node, s.operand) for s in sites}
    values: set[ir.Value] = set()
    pending = [s.node.inputs[s.operand] for s in sites]
    while pending:
        value = pending.pop()
        if value is None or value in values:
            continue
        values.add(value)
        node = value.producer()
        if node is not None and node.op_type != "Mul":  # of a product we do not know which side the weight is
            ours.update((node, i) for i in range(len(node.inputs)))
            pending.append(node.inputs[0] if node.inputs else None)
    uses = sorted(
        (u.node.name or u.node.op_type) for v in values for u in v.uses() if (u.node, u.idx) not in ours
    )
    return uses[0] if uses else ""


def _relation(a: Site, b: Site) -> bool | None:
    """False: the same matrix. True: each is the other's transpose. None: read in a way that does not tell."""
    if a.layout.steps == b.layout.steps:
        return False
    if a.layout.transpose((1, 0)).steps == b.layout.steps:
        return True
    return None


def _identity(value: ir.Value | None) -> object:
    """Equal for values that hold the same numbers for the same reason: same tensor, same operators on it."""
    if value is None:
        return None
    tensor = tensor_of(value)
    if tensor is not None:
        return id(tensor)
    node = value.producer()
    if node is None:
        return id(value)
    attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values()))
    return (node.op_type, attributes, tuple(_identity(v) for v in node.inputs))


def _group(kind: str, sites: Sequence[Site]) -> Group:
    return Group(f"{kind}:{sites[0].name}", kind, tuple(sites), (False,) * len(sites))


def _siblings(sites: list[Site]) -> Iterable[Group]:
    readers: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        readers[id(site.data)].append(site)
    for members in readers.values():
        members = [s for s in members if s.wiring is not None and not s.wiring.before]
        if len({s.weight for s in members}) != len(members):
            continue
        if len(members) == 2 and _meet(members[0], members[1]):
            yield _group("gate_up", members)
        elif len(members) >= 3:
            yield _group("qkv", members)


def _meet(a: Site, b: Site) -> bool:
    """Whether the outputs of two sites are multiplied with each other, through element-wise operators only."""
    ahead = [_forward(s.node.outputs[0]) for s in (a, b)]
    return any(n.op_type == "Mul" and n in ahead[1] for n in ahead[0])


def _forward(value: ir.Value) -> set[ir.Node]:
    found: set[ir.Node] = set()
    pending = [value]
    while pending and len(found) < 32:
        for node in pending.pop().consumers():
            if node.op_type in ELEMENTWISE and node not in found:
                found.add(node)
                pending.extend(node.outputs)
    return found


def _ffns(sites: list[Site]) -> Iterable[Group]:
    made_by = {s.node.outputs[0]: s for s in sites}
    for down in sites:
        ups = _behind(down.data, made_by, ELEMENTWISE)
        if not ups or down in ups or len({id(u.data) for u in ups}) != 1:
            continue
        if all(u.N == down.K for u in ups) and all(_only_feeds(u, down) for u in ups):
            yield _group("up_down", [*ups, down])


def _behind(value: ir.Value, made_by: dict[ir.Value, Site], through: frozenset[str]) -> list[Site]:
    """Sites from which alone a value is made, through the given operators and constants; [] when anything else mixes in."""
    found: list[Site] = []
    pending, seen = [value], {value}
    while pending:
        at = pending.pop()
        if at in made_by:
            found.append(made_by[at])
            continue
        if tensor_of(at) is not None:
            continue
        node = at.producer()
        if node is None or node.op_type not in through or len(seen) > 64:
            return []
        for v in node.inputs:
            if v is not None and v not in seen:
                seen.add(v)
                pending.append(v)
    return sorted(found, key=lambda s: s.name)


def _only_feeds(up: Site, down: Site) -> bool:
    """Whether a hidden activation goes nowhere but to the down projection."""
    pending, seen = [up.node.outputs[0]], set()
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return False
        for node in value.consumers():
            if node is down.node or node in seen:
                continue
            if node.op_type not in ELEMENTWISE:
                return False
            seen.add(node)
            pending.extend(node.outputs)
    return True


def _value_outputs(sites: list[Site]) -> Iterable[Group]:
    """Wo's input traced back through head shuffles to probabilities @ values, and the values to Wv."""
    made_by = {s.node.outputs[0]: s for s in sites}
    for out in sites:
        mix = _back(out.data, _HEAD_SHUFFLES | {"Where", "Mul", "Div", "Neg", "Dropout", "Slice"}).producer()
        if mix is None or mix is out.node:
            continue
        index = 1 if mix.op_type == "MatMul" and not mix.domain else 2 if mix.op_type in FUSED else None
        moving = mix.inputs[index] if index is not None and len(mix.inputs) > index else None
        if moving is None:
            continue
        found = _projections(moving, made_by)
        if len(found) == 1 and out not in found:
            yield _group("value_output", [*found, out])


def _query_keys(sites: list[Site], units: Sequence[Group], extents: Extents) -> Iterator[Group]:
    """Products of two sites' outputs, each behind what may lie between a projection and the scores."""
    made_by = {s.node.outputs[0]: s for s in sites}
    weighted = {s.node for s in sites}
    seen: set[tuple[str, str]] = set()
    for graph in dict.fromkeys(s.node.graph for s in sites):
        for node in graph or ():
            fused = node.op_type in FUSED
            if node in weighted or not (fused or (node.op_type == "MatMul" and not node.domain)):
                continue
            if len(node.inputs) < 2:
                continue
            first, second = (_projections(v, made_by) for v in node.inputs[:2])
            if len(first) != 1 or len(second) != 1 or first == second:
                continue
            (q,), (k,) = first, second
            if not fused and _is_transposed(node):
                q, k = k, q
            if (q.name, k.name) in seen:
                continue
            seen.add((q.name, k.name))
            group = _group("query_key", [q, k])
            if not fused and (reader := _reads_scores(node, extents)):
                yield replace(group, refusal=reader)
            else:
                yield _measured(group, units, extents, node)


def _projections(value: ir.Value | None, made_by: Mapping[ir.Value, Site]) -> set[Site]:
    """The sites that a value is made from, looking back through what may lie between a projection and the scores."""
    found: set[Site] = set()
    pending, seen = [value], {value}
    while pending and len(seen) < 2 * _FEW:
        at = pending.pop()
        if at is None:
            continue
        if at in made_by:
            found.add(made_by[at])
            continue
        node = at.producer()
        if node is None or node.op_type not in _QUERY_WAY:
            continue
        data = (
            node.inputs[:1] if node.op_type in _HEAD_SHUFFLES | {"Slice", "Gather", "Split"} else node.inputs
        )
        pending.extend(v for v in data if v not in seen)
        seen.update(data)
    return found


def _is_transposed(scores: ir.Node) -> bool:
    """Whether the keys are the left operand: then the softmax goes over rows."""
    axes = [n.attributes["axis"].as_int() for n in _softmaxes(scores)[0] if "axis" in n.attributes]
    return axes == [-2]


def _softmaxes(scores: ir.Node) -> tuple[list[ir.Node], str]:
    """The softmaxes that read the scores, and what else reads them."""
    found: list[ir.Node] = []
    pending, seen = [scores.outputs[0]], set[ir.Node]()
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return found, f"the output {value.name!r}"
        for node in value.consumers():
            if node.op_type == "Softmax":
                found.append(node)
            elif node.op_type not in _SCORE_WAY or len(seen) > _FEW:
                return found, f"{node.op_type} {node.name or node.outputs[0].name!r}"
            elif node not in seen:
                seen.add(node)
                pending.extend(node.outputs)
    return found, ""


def _reads_scores(scores: ir.Node, extents: Extents) -> str:
    """A sentence unless a softmax over the keys is all that reads the scores: only that does not see what all keys have in common."""
    found, other = _softmaxes(scores)
    if other or not found:
        return f"{other or 'nobody'} reads the scores, and not a softmax over the keys alone"
    for node in found:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        rank = extents.rank(node.outputs[0])
        if axis not in (-1, -2) and (rank is None or axis != rank - 1):
            return f"the softmax {node.name!r} does not go over the keys"
    return ""


def _back(value: ir.Value, through: frozenset[str]) -> ir.Value:
    """Where a value comes from: before these operators, of which one operand moves; the others are shapes, factors, what masked rows get."""
    while (node := value.producer()) is not None and node.op_type in through and not node.domain:
        moving = list(node.inputs[:1])
        if node.op_type in ("Where", "Mul", "Div"):
            moving = [v for v in node.inputs[-2:] if tensor_of(v) is None]
        if len(moving) != 1 or moving[0] is None:
            break
        value = moving[0]
    return value
