"""Walk: parts one after another compute what the whole model computes, also while weights change from stage to stage.

What a frontier holds is compared with a brute-force search over the file's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from lrcompile.allocate import covers_of
from lrcompile.load import load
from lrcompile.records import Group
from lrcompile.sites import find
from lrcompile.walk import CHAINS, Stage, part, stages_of, watched
from tests import blocks
from tests.graphs import Array, model, node, normal, run
from tests.odd_graphs import corpus

K = 6


def values_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """The same nodes on the same numbers in the same evaluator: not a bit may differ."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.asarray(a[name]), np.asarray(b[name])
        assert x.dtype == y.dtype and x.shape == y.shape, name
        if x.dtype.kind in "OUS":
            assert (x == y).all(), name
        else:
            np.testing.assert_array_equal(x.astype(np.float64) if x.dtype.kind == "V" else x, y.astype(np.float64) if y.dtype.kind == "V" else y, err_msg=name)  # fmt: skip


def in_parts(
    of_stage: Callable[[int], ir.Model], stages: Sequence[Stage], feed: Mapping[str, Array]
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """All outputs and all frontiers, computed part by part. of_stage: the model as it stands at a stage."""
    known: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    frontiers: list[dict[str, Array]] = []
    last = of_stage(len(stages))
    for k in range(len(stages) + 1):
        now = of_stage(k)
        ahead = stages[k].ahead if k < len(stages) else ()
        final = [v.name or "" for v in last.graph.outputs if v.name not in {*ahead, *outputs}]
        kept = stages[k].frontier if k < len(stages) else ()
        inputs = {v.name for v in now.graph.inputs}
        outputs |= {n: feed[n] for n in final if n in inputs and n in feed}
        made = part(
            now,
            {n: ir.DataType.from_numpy(a.dtype) for n, a in known.items()},
            list(dict.fromkeys([*kept, *(n for n in final if n not in outputs)])),
        )
        seen = dict(known)
        if made is not None:
            names = {v.name for v in made.graph.inputs}
            assert names <= {*known, *feed}, "a part asks for what nobody has"
            seen |= run(made, {n: a for n, a in {**feed, **known}.items() if n in names})
        outputs |= {n: seen[n] for n in final if n in seen}
        known = {n: seen[n] for n in kept}
        frontiers.append(known)
    return outputs, frontiers


def check(made: ir.Model, groups: Sequence[Group], feed: Mapping[str, Array]) -> tuple[Stage, ...]:
    """The parts give what the whole gives: as it is, and with weights that change when their stage has come."""
    stages = stages_of(made, groups)
    assert sorted(g.name for s in stages for g in s.groups) == sorted(g.name for g in groups)
    assert all(s.groups for s in stages)
    whole = run(made, feed)
    values_equal(in_parts(lambda k: made, stages, feed)[0], whole)

    index = {n: i for i, n in enumerate(made.graph)}

    def changed(k: int) -> ir.Model:
        """Each site of the stages before k, and nobody else, reads three quarters of its weight."""
        copy = made.clone()
        twins = list(copy.graph)
        for number, site in enumerate(s for stage in stages[:k] for g in stage.groups for s in g.sites):
            reader = twins[index[site.node]]
            old = reader.inputs[site.operand]
            assert old is not None
            factor = ir.tensor(
                np.array(0.75, ir.DataType[site.dtype.upper()].numpy()), name=f"factor{number}"
            )
            value = ir.Value(name=f"factor{number}", const_value=factor)
            copy.graph.register_initializer(value)
            scaled = ir.node("Mul", [old, value])
            scaled.outputs[0].name = f"scaled{number}"
            copy.graph.insert_before(reader, scaled)
            reader.replace_input_with(site.operand, scaled.outputs[0])
        return copy

    with np.errstate(all="ignore"):
        values_equal(in_parts(changed, stages, feed)[0], run(changed(len(stages)), feed))
    check_frontiers(made, stages)
    return stages


def check_frontiers(made: ir.Model, stages: Sequence[Stage]) -> None:
    """Each frontier holds exactly: what no later weight reaches, is not fixed or fed, and is read by what a later weight reaches."""
    proto = ir.to_proto(made).graph
    fixed = {t.name for t in proto.initializer} | {t.values.name for t in proto.sparse_initializer}
    fed = {v.name for v in proto.input} - fixed

    def reads(n: onnx.NodeProto) -> set[str]:
        names = set(n.input)
        for a in n.attribute:
            for body in [*([a.g] if a.type == onnx.AttributeProto.GRAPH else []), *a.graphs]:
                own = {v.name for v in body.input} | {t.name for t in body.initializer}
                for inner in body.node:
                    names |= reads(inner) - own
                    own |= set(inner.output)
                names |= {o.name for o in body.output} - own
        return names - {""}

    places = [(reads(n), {o for o in n.output if o}) for n in proto.node]
    for (read, out), n in zip(places, proto.node, strict=True):
        if read <= fixed and (read or n.op_type == "Constant") and "Random" not in n.op_type:
            fixed |= out
    order = {id(n): i for i, n in enumerate(made.graph)}
    for k, stage in enumerate(stages):
        later = {order[id(s.node)] for st in stages[k:] for g in st.groups for s in g.sites}
        reached: set[str] = set()
        needed: set[str] = set()
        for i, (read, out) in enumerate(places):
            if i in later or read & reached:
                reached |= out
                needed |= read
        assert set(stage.frontier) == needed - reached - fixed - fed, f"frontier {k}"
        assert set(stage.ahead) == {o.name for o in proto.output} & reached
        for group in stage.groups:  # all that is watched is there, and has its final value
            for site in watched(group):
                if not group.shares_weight or site is group.sites[0]:  # other readers may come later
                    assert (site.data.name or "") in {*stage.frontier, *fed}
        if k:
            earlier = {order[id(s.node)] for st in stages[:k] for g in st.groups for s in g.sites}
            behind: set[str] = set()
            for i, (read, out) in enumerate(places):
                if i in earlier or read & behind:
                    behind |= out
            assert any(s.data.name in behind for g in stage.groups for s in g.sites), "a stage comes too late"


def lone(made: ir.Model) -> tuple[Group, ...]:
    return tuple(g for g in find(made).units if not any(s.path for s in g.sites))


# --- by hand ------------------------------------------------------------------------------------------------------


def test_a_chain() -> None:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="one"),
        node("Tanh", ["a"], ["b"]),
        node("MatMul", ["b", "w2"], ["c"], name="two"),
        node("Add", ["c", "x"], ["d"]),
        node("MatMul", ["d", "w3"], ["y"], name="three"),
    ]
    made = model(nodes, {"x": ("n", K)}, ["y"], {f"w{i}": normal(K, K, seed=i) for i in (1, 2, 3)})
    stages = check(made, lone(made), {"x": normal(4, K)})
    assert [[g.name for g in s.groups] for s in stages] == [["one"], ["two"], ["three"]]
    assert [s.frontier for s in stages] == [(), ("b",), ("d",)]
    assert [s.ahead for s in stages] == [("y",)] * 3


def test_a_long_shortcut_is_carried_all_the_way() -> None:
    nodes = [node("Tanh", ["x"], ["t"])]
    nodes += [node("MatMul", [f"h{i}" if i else "t", f"w{i}"], [f"h{i + 1}"], name=f"m{i}") for i in range(3)]
    nodes.append(node("Add", ["h3", "t"], ["y"]))
    made = model(nodes, {"x": ("n", K)}, ["y"], {f"w{i}": normal(K, K, seed=i) for i in range(3)})
    stages = check(made, lone(made), {"x": normal(4, K)})
    assert [set(s.frontier) for s in stages] == [{"t"}, {"h1", "t"}, {"h2", "t"}]


def test_side_by_side_is_one_stage() -> None:
    nodes = [node("MatMul", ["x", f"w{i}"], [f"h{i}"], name=f"m{i}") for i in range(3)]
    nodes += [node("Sum", ["h0", "h1", "h2"], ["s"]), node("MatMul", ["s", "w3"], ["y"], name="m3")]
    made = model(nodes, {"x": ("n", K)}, ["y"], {f"w{i}": normal(K, K, seed=i) for i in range(4)})
    stages = check(made, lone(made), {"x": normal(4, K)})
    assert [len(s.groups) for s in stages] == [3, 1]


def test_outputs_in_the_middle() -> None:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="one"),
        node("Tanh", ["x"], ["early"]),
        node("MatMul", ["a", "w2"], ["b"], name="two"),
        node("Identity", ["b"], ["y"]),
    ]
    made = model(nodes, {"x": ("n", K)}, ["a", "early", "y"], {f"w{i}": normal(K, K, seed=i) for i in (1, 2)})
    stages = check(made, lone(made), {"x": normal(4, K)})
    assert [s.ahead for s in stages] == [("a", "y"), ("y",)]
    assert [s.frontier for s in stages] == [(), ("a",)]


def test_weights_behind_other_nodes_are_not_carried() -> None:
    """What is made of constants alone every part makes anew: carried, it would be a copy of the weight for each feed."""
    scale, zero = np.float32(0.05), np.int8(0)
    nodes = [
        node("Transpose", ["w1"], ["t1"]),
        node("MatMul", ["x", "t1"], ["a"], name="one"),
        node("DequantizeLinear", ["w2", "s", "z"], ["t2"]),
        node("MatMul", ["a", "t2"], ["b"], name="two"),
        node("Constant", [], ["c"], value=numpy_helper.from_array(normal(K, K, seed=5).T.copy())),
        node("Transpose", ["c"], ["t3"]),
        node("MatMul", ["b", "t3"], ["y"], name="three"),
    ]
    ints = np.random.default_rng(0).integers(-100, 100, (K, K)).astype(np.int8)
    made = model(
        nodes, {"x": ("n", K)}, ["y"], {"w1": normal(K, K), "w2": ints, "s": scale, "z": zero}, opset=19
    )
    stages = check(made, lone(made), {"x": normal(4, K)})
    assert [s.frontier for s in stages] == [(), ("a",), ("b",)]


@pytest.mark.parametrize("op", ["Gather", "MatMul"])
def test_one_weight_read_again_by_what_it_made(op: str) -> None:
    """ALBERT's layers, or a table and its head: all change when the first is reached."""
    first = node("Gather", ["w", "ids"], ["h0"], name="first") if op == "Gather" else node("MatMul", ["x", "w"], ["h0"], name="first")  # fmt: skip
    nodes, at = [first], "h0"
    for i in range(1, 5):
        nodes += [
            node("MatMul", [at, f"u{i}"], [f"t{i}"], name=f"u{i}"),
            node("MatMul", [f"t{i}", "w"], [f"h{i}"], name=f"again{i}"),
        ]
        at = f"h{i}"
    nodes.append(node("Identity", [at], ["y"]))
    inputs: dict[str, Any] = {"ids": (("n",), np.int64)} if op == "Gather" else {"x": ("n", K)}
    made = model(
        nodes, inputs, ["y"], {"w": normal(K, K), **{f"u{i}": normal(K, K, seed=i) for i in range(1, 5)}}
    )
    feed = {"ids": np.array([0, 3, 1])} if op == "Gather" else {"x": normal(3, K)}
    groups = lone(made)
    assert {g.kind for g in groups} == {"alone", "tied" if op == "Gather" else "shared"}
    stages = check(made, groups, feed)
    assert len(stages) == 5 and [g.name for g in stages[0].groups] == ["first"]
    assert set(stages[0].ahead) == {"y"}


def test_groups_that_overlap() -> None:
    """Trials of sensitivity: a query by itself and with its key. Each has its own place in the order."""
    made = blocks.attention()
    found = find(made)
    query_key = blocks.groups(made)["query_key"]
    stages = stages_of(made, [*found.units, query_key])
    of = {g.name: k for k, s in enumerate(stages) for g in s.groups}
    assert of["wq"] == of["wk"] == of["wv"] == of[query_key.name] == 0 and of["wo"] == 1
    deep = two_layers()
    units = find(deep).units
    pair = Group("query_key:b", "query_key", tuple(g.sites[0] for g in units[1:]), (False, False))
    of = {g.name: k for k, s in enumerate(stages_of(deep, [*units, pair])) for g in s.groups}
    assert of == {"a": 0, "b": 1, "c": 1, "query_key:b": 1}


def two_layers() -> ir.Model:
    nodes = [
        node("MatMul", ["x", "wa"], ["h"], name="a"),
        node("MatMul", ["h", "wb"], ["q"], name="b"),
        node("MatMul", ["h", "wc"], ["k"], name="c"),
        node("Mul", ["q", "k"], ["y"]),
    ]
    return model(nodes, {"x": ("n", K)}, ["y"], {f"w{n}": normal(K, K, seed=i) for i, n in enumerate("abc")})


# --- chains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_up_and_down(gated: bool) -> None:
    made = blocks.ffn("silu" if gated else "Relu", gated=gated)
    group = blocks.groups(made)["up_down"]
    feed = blocks.feeds(made)
    stages = check(made, [group], feed)
    assert (
        len(stages) == 1 and stages[0].frontier == ()
    )  # its data is the graph's input, and nothing inside is carried
    assert group.kind in CHAINS and watched(group) == group.sites[:-1]


def test_value_and_output_come_after_query_and_key() -> None:
    """What the last site reads is complete only when queries and keys are."""
    made = blocks.attention()
    found = blocks.groups(made)
    units = {g.name: g for g in find(made).units}
    for others in (["wq", "wk"], []):
        groups = [found["value_output"], *(units[n] for n in others)]
        if not others:
            groups.append(found["query_key"])
        stages = check(made, groups, blocks.feeds(made))
        assert [sorted(g.kind for g in s.groups) for s in stages][-1] == ["value_output"] and len(stages) == 2


def test_every_cover_of_a_transformer_layer() -> None:
    made = transformer(2)
    found = find(made)
    kinds = set()
    for take in range(3):
        chosen = [ways[min(take, len(ways) - 1)] for ways in covers_of(found.groups)]
        by_name = {g.name: g for g in found.groups}
        groups = [by_name[n] for way in chosen for n in way]
        kinds |= {g.kind for g in groups}
        check(made, groups, {"x": normal(2, 5, blocks.WIDTH)})
    assert {"alone", "qkv", "up_down"} <= kinds or {"alone", "query_key", "value_output"} <= kinds


def transformer(layers: int) -> ir.Model:
    """Attention and feed-forward, without norms, of one head."""
    W = blocks.WIDTH
    b = blocks.Block()
    at = "x"
    for i in range(layers):
        q, k, v = (b.linear(at, f"w{n}{i}", W, W, seed=j) for j, n in enumerate("qkv"))
        scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]), name=f"scores{i}")
        mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v, name=f"mix{i}")
        at = b.op("Add", b.linear(mixed, f"o{i}", W, W, seed=3), at)
        up = b.op("Relu", b.linear(at, f"up{i}", W, 2 * W, seed=4))
        at = b.op("Add", b.linear(up, f"down{i}", 2 * W, W, seed=5), at)
    return b.made(at)


# --- bodies, parts ------------------------------------------------------------------------------------------------


def with_body() -> ir.Model:
    """An If whose branches read values of the graph around them, one of them behind a weight."""

    def branch(name: str, *inner: onnx.NodeProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(inner[-1].output[0], TensorProto.FLOAT, None)
        return helper.make_graph(list(inner), name, [], [out])

    then = branch("t", node("Tanh", ["a"], ["ty"]))
    other = branch(
        "e", node("Mul", ["early", "b"], ["e0"]), node("MatMul", ["e0", "w3"], ["ey"], name="inside")
    )
    nodes = [
        node("Abs", ["x"], ["early"]),
        node("MatMul", ["x", "w1"], ["a"], name="one"),
        node("MatMul", ["a", "w2"], ["b"], name="two"),
        node("If", ["c"], ["f"], then_branch=then, else_branch=other),
        node("MatMul", ["f", "w4"], ["y"], name="four"),
    ]
    constants = {f"w{i}": normal(K, K, seed=i) for i in (1, 2, 3, 4)}
    return model(nodes, {"x": ("n", K), "c": ((), np.bool_)}, ["y"], constants)


@pytest.mark.parametrize("flag", [True, False])
def test_bodies_read_what_lies_around_them(flag: bool) -> None:
    made = with_body()
    groups = lone(made)
    assert {g.name for g in groups} == {"one", "two", "four"}
    stages = check(made, groups, {"x": normal(4, K), "c": np.asarray(flag)})
    assert [set(s.frontier) for s in stages] == [{"early"}, {"a", "early"}, {"f"}]


def test_a_part_of_nothing() -> None:
    made = two_layers()
    assert part(made, {}, []) is None
    assert part(made, {"h": ir.DataType.FLOAT}, ["h"]) is None


def test_a_part_has_only_the_inputs_and_weights_that_it_needs() -> None:
    made = two_layers()
    cut = part(made, {"h": ir.DataType.FLOAT}, ["k"])
    assert cut is not None and [v.name for v in cut.graph.inputs] == ["h"]
    assert list(cut.graph.initializers) == ["wc"] and [n.name for n in cut.graph] == ["c"]
    assert len(list(made.graph)) == 4 and [v.name for v in made.graph.inputs] == ["x"]  # left as it was


def test_constants_that_a_caller_may_override() -> None:
    made = two_layers()
    free = [made.graph.initializers[n] for n in ("wb", "wa")]
    cut = part(made, {"h": ir.DataType.FLOAT}, ["y"], free)
    assert cut is not None and [v.name for v in cut.graph.inputs] == ["h", "wb"]  # wa is not in this part
    h, other = normal(3, K), normal(K, K, seed=9)
    wb, wc = normal(K, K, seed=1), normal(K, K, seed=2)
    for given, w in (({}, wb), ({"wb": other}, other)):
        np.testing.assert_allclose(run(cut, {"h": h, **given})["y"], (h @ w) * (h @ wc), rtol=1e-4, atol=1e-5)


def test_nothing_is_taken() -> None:
    assert stages_of(two_layers(), []) == ()


# --- any graph ----------------------------------------------------------------------------------------------------


def random_graph(seed: int) -> ir.Model:
    """A dozen nodes on (n, K): products with weights, own, shared or transposed, element-wise ones, an If, outputs anywhere."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {"shared": normal(K, K, seed=99) * 0.3}
    values = ["x", "z"]
    for i in range(14):
        kind, out = rng.random(), f"v{i}"
        at = values[-1] if rng.random() < 0.6 else str(rng.choice(values))
        other = str(rng.choice(values))
        if kind < 0.45:
            name = f"w{i}"
            if rng.random() < 0.2:
                name = "shared"
            else:
                constants[name] = normal(K, K, seed=i) * np.float32(0.3)
            if rng.random() < 0.2:
                nodes.append(node("Transpose", [name], [f"t{i}"]))
                name = f"t{i}"
            nodes.append(node("MatMul", [at, name], [out], name=f"m{i}"))
        elif kind < 0.75:
            nodes.append(node(str(rng.choice(["Add", "Mul", "Sub"])), [at, other], [out]))
        elif kind < 0.9:
            nodes.append(node("Tanh", [at], [out]))
        else:
            bodies = {}
            for branch, (a, b) in {"then_branch": (at, other), "else_branch": (other, at)}.items():
                info = helper.make_tensor_value_info(f"{branch[0]}{i}", TensorProto.FLOAT, None)
                bodies[branch] = helper.make_graph(
                    [node("Sub", [a, b], [info.name])], f"{branch}{i}", [], [info]
                )
            nodes.append(node("If", ["c"], [out], **bodies))
        values.append(out)
    outputs = sorted({*map(str, rng.choice(values[2:], 3)), values[-1]})
    inputs = {"x": ("n", K), "z": ("n", K), "c": ((), np.bool_)}
    return model(nodes, inputs, outputs, constants)


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed: int) -> None:
    made = random_graph(seed)
    rng = np.random.default_rng(seed)
    found = find(made)
    groups = [g for g in found.groups if not any(s.path for s in g.sites)]
    if not groups:
        return
    by_name = {g.name: g for g in groups}
    ways = [block[int(rng.integers(len(block)))] for block in covers_of(groups)]
    chosen = [by_name[n] for way in ways for n in way if rng.random() < 0.8]
    feed = {"x": normal(3, K), "z": normal(3, K, seed=1), "c": np.asarray(seed % 2 == 0)}
    check(made, chosen, feed)


@pytest.mark.filterwarnings("ignore")
def test_odd_graphs(tmp_path: Path) -> None:
    """Products, tables, bodies, hidden and shared weights as the corpus has them."""
    stages = 0
    for index, odd in enumerate(corpus(3, 80)):
        path = tmp_path / f"{index}.onnx"
        path.write_bytes(odd.model.SerializeToString())
        made = load(path).model
        groups = lone(made)
        if "random" in odd.label.lower() or not odd.feeds:
            continue
        try:
            run(made, odd.feeds[0])
        except Exception:  # what the evaluator does not know, it does not know in parts
            continue
        try:
            stages += len(check(made, groups, odd.feeds[0]))
        except Exception as error:
            raise AssertionError(f"{odd.label}: {error}") from error
    assert stages > 30
