"""Which sites are best taken together.

``shared`` and ``tied``: one stored weight, several readers. ``qkv``, ``gate_up``: different weights that read one input.
``up_down``: an FFN, hidden = act(x Wu) (times x Wg), y = hidden Wd. ``value_output``: x Wv, attention over positions, Wo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence

import onnx_ir as ir

from lrcompile.graph import tensor_of
from lrcompile.records import Group, Site

_ELEMENTWISE = frozenset(
    "Add Sub Mul Div Pow Sqrt Erf Exp Tanh Sigmoid Relu LeakyRelu Elu Selu Celu Gelu Swish HardSigmoid HardSwish Mish Softplus "
    "Softsign Clip Abs Neg Min Max Cast Identity Dropout PRelu ThresholdedRelu".split()
)
_HEAD_SHUFFLES = frozenset({"Reshape", "Transpose", "Identity", "Cast", "Squeeze", "Unsqueeze", "Expand"})


def groups_of(sites: Sequence[Site]) -> tuple[Group, ...]:
    """Every group of the sites that can be taken; first the partition by stored weight, then the overlapping ones."""
    taken = [s for s in sites if s.refusal is None]
    by_weight: dict[object, list[Site]] = defaultdict(list)
    for site in taken:
        by_weight[_identity(site.root)].append(site)
    units = [group for members in by_weight.values() for group in _units(members)]
    linear = [s for s in taken if s.kind == "linear"]
    return (*units, *_siblings(linear), *_ffns(linear), *_value_outputs(linear))


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
            if node.op_type in _ELEMENTWISE and node not in found:
                found.add(node)
                pending.extend(node.outputs)
    return found


def _ffns(sites: list[Site]) -> Iterable[Group]:
    made_by = {s.node.outputs[0]: s for s in sites}
    for down in sites:
        ups = _behind(down.data, made_by, _ELEMENTWISE)
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
            if node.op_type not in _ELEMENTWISE:
                return False
            seen.add(node)
            pending.extend(node.outputs)
    return True


def _value_outputs(sites: list[Site]) -> Iterable[Group]:
    """Wo's input traced back through head shuffles to probabilities @ values, and the values to Wv."""
    made_by = {s.node.outputs[0]: s for s in sites}
    for out in sites:
        mix = _back(out.data, _HEAD_SHUFFLES | {"Where"}).producer()
        if mix is None or mix.domain or mix.op_type != "MatMul" or mix is out.node or mix.inputs[1] is None:
            continue
        values = made_by.get(_back(mix.inputs[1], _HEAD_SHUFFLES | {"Add", "Concat"}, made_by))
        if values is not None and values is not out:
            yield _group("value_output", [values, out])


def _back(value: ir.Value, through: frozenset[str], stop: Container[ir.Value] = ()) -> ir.Value:
    """Where a value comes from: before these operators, of which one operand moves.

    The others are shapes, a bias (Add), what masked rows get (Where), a cache that the caller gives (Concat).
    """
    while (
        value not in stop
        and (node := value.producer()) is not None
        and node.op_type in through
        and not node.domain
    ):
        moving = list(node.inputs[:1])
        if node.op_type in ("Add", "Where"):
            moving = [v for v in node.inputs[-2:] if tensor_of(v) is None]
        elif node.op_type == "Concat":
            moving = [v for v in node.inputs if v is not None and v.producer() is not None]
        if len(moving) != 1 or moving[0] is None:
            break
        value = moving[0]
    return value
