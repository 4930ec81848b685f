"""What lies between the sites of a group, and whether it can be cut narrower without another node.

No exporter's template is looked for. The columns of the first site are followed, value by value in the graph's order, to the last one's
rows (or, of queries and keys, to the product where they are contracted), with a rule an operator; `axes` says what an axis is.

FFN: a column passes element-wise operators alone, so any columns may be kept; constants with an entry a column follow.
Heads: the numbers of a head are mixed by a matrix before they are cut, so nothing on the way may tell one from another or add to them:
scalar factors, shuffles of axes, masks of rows, probabilities from the left, copies for grouped queries. Where queries and keys are
turned by a rotary embedding (`rotations`) nothing is mixed, and whole planes may be kept.

Shapes: an entry that holds the size as a number becomes a follower; one computed by Shape from a value on the way follows by itself, and
may go nowhere but into such shapes. `width_of` answers with a sentence where it meets anything else.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import onnx_ir as ir

from lrcompile.axes import Axis, Part, innermost, number, ours
from lrcompile.crossings import FUSED, Way, fused, label
from lrcompile.extents import Extents
from lrcompile.followers import shape_followers
from lrcompile.graph import dims, tensor_of
from lrcompile.records import Site, Width


def width_of(
    kind: str, sites: Sequence[Site], extents: Extents, scores: ir.Node | None = None
) -> Width | str:
    """What can be cut between the sites of an ``up_down``, ``value_output`` or ``query_key``, or why it cannot be.

    scores: the product of queries and keys.
    """
    for site in sites:
        if reason := _unfit(site):
            return reason
    if len({s.node.graph for s in sites}) > 1:
        return f"{sites[0].name} and {sites[-1].name} stand in different bodies"
    way = Way(kind, tuple(sites), extents)
    last = scores if scores is not None else sites[-1].node
    return _run(way, last) or _measure(way, last)


def _unfit(site: Site) -> str:
    """Why a site's weight cannot be made narrower, empty where it can."""
    wiring = site.wiring
    if wiring is None or site.op not in ("MatMul", "Gemm"):
        return f"{site.name} is an {site.op}: only MatMul and Gemm are cut"
    if wiring.before or wiring.after:
        return f"{site.name} multiplies from the left or transposes its input: only plain products are cut"
    if any(perm is None for perm, _ in (*site.layout.steps, *site.operand_layout.steps)):
        return f"{site.name} reads its weight through a Reshape, which would need another shape"
    if wiring.scale == 0.0:
        return f"{site.name} multiplies its product by zero"
    if wiring.addend is not None and site.bias is None:
        value = site.node.inputs[wiring.addend]
        tensor = tensor_of(value)
        if tensor is None or (dims(tensor) or (1,))[-1] != 1:
            return f"{site.name} adds a C that is no vector of constants"
    return ""


def _run(way: Way, last: ir.Node) -> str:
    """Follow the columns to the end; a sentence where that fails, else empty."""
    graph = way.sites[0].node.graph
    assert isinstance(graph, ir.Graph)
    order = way.extents.order(graph)
    pending: list[int] = []
    nodes: dict[int, ir.Node] = {}

    def enter(value: ir.Value) -> str:
        if value.is_graph_output():
            return f"{value.name!r} is an output of the graph, whose shape would change"
        for node in value.consumers():
            if node not in order:
                return f"{value.name!r} is read inside a body by {label(node)}"
            if order[node] not in nodes:
                nodes[order[node]] = node
                heapq.heappush(pending, order[node])
        return ""

    for i, site in enumerate(way.firsts):
        output = site.node.outputs[0]
        rank = way.extents.rank(output) or way.extents.rank(site.data)
        if rank is None and way.heads:
            return f"the rank of {output.name!r} is not known"
        lead = tuple(way.extents.axis(output, a) for a in range((rank or 1) - 1))
        way.axes[output] = (*lead, (Part(site.N, "width", 1, i if way.kind == "query_key" else 0),))
        if refusal := enter(output):
            return refusal
    ended = False
    while pending:
        node = nodes[heapq.heappop(pending)]
        if node is last:
            if refusal := _check_end(way, node):
                return refusal
            ended = True
            continue
        made = way.step(node)
        if isinstance(made, str):
            return made
        for value in made:
            if refusal := enter(value):
                return refusal
    return "" if ended else f"the way from {way.sites[0].name} ends before {label(last)}"


# --- the end -----------------------------------------------------------------------------------------------------


def _check_end(way: Way, node: ir.Node) -> str:
    if node.op_type in FUSED:
        return fused(node)
    if way.kind == "query_key":
        unread = [i for i, v in enumerate(node.inputs) if v not in way.axes]
        if unread:
            return f"{label(node)} reads {node.inputs[unread[0]].name!r}, which is not on the way"  # type: ignore[union-attr]
        return ""
    wiring = way.sites[-1].wiring
    assert wiring is not None
    if [i for i, v in enumerate(node.inputs) if v in way.axes or v in way.carriers] != [wiring.data]:
        return f"{label(node)} reads it as something else than its data"
    return ""


def _measure(way: Way, last: ir.Node) -> Width | str:
    """The sizes, once the end is reached."""
    found = _of_scores(way, last) if way.kind == "query_key" else _of_rows(way)
    if isinstance(found, str):
        return found
    size, heads, repeat = found
    if any(n != size for n in way.turned):
        return "rotary embedding: it turns the numbers of several heads, or of a part of one, as if they were a head"
    shapes = shape_followers(way, size)
    if isinstance(shapes, str):
        return shapes
    followers = (*way.followers, *shapes)
    return Width(size, heads, repeat, followers, planes=bool(way.turned), values=tuple(way.narrower))


def _size(way: Way, site: int) -> int:
    """Of a head: the fewest columns that lie on an axis together anywhere on the way."""
    runs = [
        innermost(axis)
        for axes in way.axes.values()
        for axis in axes
        if any(p.role == "width" and p.stride == 1 and p.site == site for p in axis)
    ]
    return min(runs)


def _of_rows(way: Way) -> tuple[int, int, int] | str:
    """(size, heads, repeat) from the axis that the last site contracts."""
    last = way.sites[-1]
    axis = way.axes[last.data][-1]
    first, size = way.firsts[0], _size(way, 0)
    heads = first.N // size
    if not way.heads:
        alone = axis == (Part(first.N, "width", 1),) and size == first.N
        return (size, 1, 1) if alone else f"{last.name} does not read the hidden columns in their order"
    repeat = _repeat(axis, size, heads)
    if repeat is None or heads * size != first.N or heads * size * repeat != last.K:
        return f"{last.name} does not read whole heads one after the other"
    return size, heads, repeat


def _of_scores(way: Way, scores: ir.Node) -> tuple[int, int, int] | str:
    """(size, heads of the keys, how many queries share one) from the product that contracts the numbers of a head."""
    name = label(scores)
    left, right = (way.axes[v] for v in scores.inputs)  # type: ignore[index]
    if len(left) < 2 or len(right) < 2:
        return f"{name} multiplies vectors"
    contracted = (left[-1], right[-2])
    if {p.site for axis in contracted for p in axis} != {0, 1} or any(
        p.role != "width" for a in contracted for p in a
    ):
        return f"{name} does not contract queries with keys over the numbers of a head"
    size = innermost(contracted[0])
    q, k = (left, right) if contracted[0][0].site == 0 else (right, left)
    if {size} != {
        innermost(contracted[1]),
        number(contracted[0]),
        number(contracted[1]),
        _size(way, 0),
        _size(way, 1),
    }:
        return f"{name} does not contract whole heads"
    if ours(left[-2]) or ours(right[-1]):
        return f"{name} has heads among its rows"
    rank = max(len(q), len(k))
    pairs = zip(((),) * (rank - len(q)) + q[:-2], ((),) * (rank - len(k)) + k[:-2], strict=True)
    asked: list[Part] = []
    read: list[Part] = []
    for mine, theirs in pairs:
        asked += ours(mine)
        read += ours(theirs) if theirs else tuple(_copy(p) for p in ours(mine))
    heads, total = way.sites[1].N // size, way.sites[0].N // size
    queries = _strides_fall(asked, size, total) and all(p.role == "width" for p in asked)
    sizes = [p.size for p in asked]
    repeat = _repeat((*read, Part(size, "width", 1, 1)), size, heads)
    if (
        not queries
        or repeat is None
        or heads * repeat != total
        or math.prod(s for s in sizes if isinstance(s, int)) != total
    ):
        return f"{name} does not pair each query head with the key head of its group"
    return size, heads, repeat


def _copy(part: Part) -> Part:
    return Part(part.size, "repeat")


def _repeat(axis: Axis, size: int, heads: int) -> int | None:
    """How often each head is copied, on an axis of heads, copies of a head, numbers of a head, in this order; else None."""
    run, numbers = 1, list(axis)
    while numbers and run < size:
        part = numbers.pop()
        if part.role != "width" or part.stride != run or not isinstance(part.size, int):
            return None
        run *= part.size
    copies = 1
    while numbers and numbers[-1].role == "repeat":
        n = numbers.pop().size
        assert isinstance(n, int)
        copies *= n
    return copies if run == size and _strides_fall(numbers, size, heads) else None


def _strides_fall(parts: Sequence[Part], size: int, heads: int) -> bool:
    """Whether parts count `heads` heads of a size in their order."""
    run = size
    for part in reversed(parts):
        if part.role != "width" or part.stride != run or not isinstance(part.size, int):
            return False
        run *= part.size
    return run == size * heads
