"""The error of every kind of group against samples that go through the computation itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lrcompile.loss import group_loss
from lrcompile.records import Group, InputStatistics, Site
from lrcompile.sites import find
from tests import blocks
from tests.blocks import HEADS, HIDDEN, SIZE, WIDTH
from tests.graphs import Array, model, node, normal
from tests.graphs import weights as new_weights

# Moments of the very samples, in float64: only the order of sums differs.
EXACT = 1e-9


@dataclass(frozen=True)
class Statistics:
    known: Mapping[str, InputStatistics]

    def of(self, site: Site) -> InputStatistics | None:
        return self.known.get(site.name)

    def key(self, site: Site) -> str:
        return ""


def seen(X: Array) -> InputStatistics:
    return InputStatistics(len(X), X.T @ X / len(X), X.mean(axis=0))


def matrix(site: Site) -> Array:
    return np.array(new_weights().matrix(site))


def bias(site: Site) -> Array:
    made = new_weights().bias(site)
    return np.zeros(site.N) if made is None else made


def relative(wanted: Array, made: Array) -> float:
    return float(np.linalg.norm(wanted - made) / np.linalg.norm(wanted))


def inputs(n: int, seed: int = 0, K: int = WIDTH) -> Array:
    rng = np.random.default_rng((seed, n))
    X: Array = rng.standard_normal((n, K)) @ normal(K, K, seed=4, dtype=np.float64) * 0.3 + 0.4
    return X


def disturbed(W: Array, seed: int, share: float = 0.2) -> Array:
    made: Array = W + share * np.random.default_rng(seed).standard_normal(W.shape) * W.std()
    return made


# --- sites by themselves, and those that read one value -----------------------------------------------------------


def readers(kind: str, biased: bool) -> Group:
    widths = {"alone": (7,), "qkv": (9, 4, 4), "gate_up": (12, 12)}[kind]
    nodes, constants, ends = [], {}, []
    for i, n in enumerate(widths):
        constants[f"w{i}"] = normal(WIDTH, n, seed=i, dtype=np.float64)
        nodes.append(node("MatMul", ["x", f"w{i}"], [f"p{i}"], name=f"s{i}"))
        if biased:
            constants[f"b{i}"] = normal(n, seed=i, dtype=np.float64)
            nodes.append(node("Add", [f"p{i}", f"b{i}"], [f"h{i}"]))
        ends.append(f"h{i}" if biased else f"p{i}")
    if kind == "gate_up":
        nodes.append(node("Mul", ends, ["y"]))
        ends = ["y"]
    found = find(
        model(nodes, {"x": (("n", WIDTH), np.float64)}, dict.fromkeys(ends, np.float64), constants)
    ).groups
    return next(g for g in found if g.kind == kind)


@pytest.mark.parametrize("kind", ["alone", "qkv", "gate_up"])
@pytest.mark.parametrize("biased", [False, True])
def test_readers_of_one_value(kind: str, biased: bool) -> None:
    """All outputs side by side. The products without their biases are what errors are relative to."""
    group, X = readers(kind, biased), inputs(300)
    statistics = Statistics({s.name: seen(X) for s in group.sites})
    changed: dict[tuple[str, str], Array] = {}
    wanted, made = [], []
    for i, site in enumerate(group.sites):
        W = matrix(site)
        changed[site.name, "weight"] = What = disturbed(W, i)
        moved = np.zeros(site.N)
        if biased:  # the correction that keeps the mean
            moved = X.mean(axis=0) @ (W - What)
            changed[site.name, "bias"] = bias(site) + moved
        wanted.append(X @ W)
        made.append(X @ What + moved)
    ours = group_loss(group, new_weights(), statistics, changed)
    assert ours == pytest.approx(relative(np.hstack(wanted), np.hstack(made)), rel=EXACT)
    assert group_loss(group, new_weights(), statistics, {}) == 0.0


def test_without_data_it_is_the_weights() -> None:
    group = readers("qkv", True)
    changed = {(s.name, "weight"): disturbed(matrix(s), i) for i, s in enumerate(group.sites)}
    Ws, made = (np.hstack([f(s) for s in group.sites]) for f in (matrix, lambda s: changed[s.name, "weight"]))
    assert group_loss(group, new_weights(), None, changed) == pytest.approx(relative(Ws, made), rel=EXACT)


def test_some_of_them() -> None:
    """A site that was not changed loses nothing, and counts in what all is."""
    group, X = readers("qkv", False), inputs(300)
    statistics = Statistics({s.name: seen(X) for s in group.sites})
    k = group.sites[1]
    changed = {(k.name, "weight"): disturbed(matrix(k), 0)}
    lost = np.linalg.norm(X @ (matrix(k) - changed[k.name, "weight"]))
    all_ = np.linalg.norm(np.hstack([X @ matrix(s) for s in group.sites]))
    assert group_loss(group, new_weights(), statistics, changed) == pytest.approx(lost / all_, rel=EXACT)


def test_tied_readers_are_averaged() -> None:
    nodes = [
        node("Gather", ["w", "ids"], ["e"], name="table"),
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["z", "t"], ["q"], name="head"),
    ]
    W, rng = normal(11, 6, dtype=np.float64), np.random.default_rng(0)
    made = model(
        nodes,
        {"ids": (("n",), np.int64), "z": (("m", 6), np.float64)},
        {"e": np.float64, "q": np.float64},
        {"w": W},
    )
    (group,) = find(made).units
    ids, Z = rng.integers(0, 11, 200), rng.standard_normal((50, 6)) + 1
    statistics = Statistics(
        {"table": InputStatistics(200, frequencies=np.bincount(ids, minlength=11) / 200), "head": seen(Z)}
    )
    What = disturbed(W, 1)
    table, head = relative(W[ids], What[ids]), relative(Z @ W.T, Z @ What.T)
    ours = group_loss(
        group, new_weights(), statistics, {("table", "weight"): What, ("head", "weight"): What.T}
    )
    assert ours == pytest.approx(np.sqrt((table**2 + head**2) / 2), rel=EXACT)


# --- up and down --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_up_and_down(gated: bool, biased: bool) -> None:
    """y = act(x Wu) Wd with neurons cut out of both, against y' of the smaller layer: what stays of the hidden layer is the same."""
    made = blocks.ffn("silu" if gated else "Relu", gated=gated, bias=biased)
    group = blocks.groups(made)["up_down"]
    *ups, down = group.sites
    X, kept = inputs(400), np.arange(0, HIDDEN, 2)

    def hidden(change: Any) -> Array:
        h = {s.name: change(X @ matrix(s) + bias(s)) for s in ups}
        if not gated:
            return np.maximum(h["up"], 0)
        return h["gate"] / (1 + np.exp(-h["gate"])) * h["up"]

    H, small = hidden(lambda h: h), hidden(lambda h: h[:, kept])
    W = matrix(down)
    cut = disturbed(np.linalg.lstsq(small, H @ W, rcond=None)[0], 3, 0.05)
    wide = np.zeros_like(W)
    wide[kept] = cut
    changed: dict[tuple[str, str], Array] = {(down.name, "weight"): wide}
    for s in ups:
        zeros = np.zeros((s.K, s.N))
        zeros[:, kept] = matrix(s)[:, kept]
        changed[s.name, "weight"] = zeros
    moved = np.zeros(WIDTH)
    if biased:
        moved = H.mean(axis=0) @ W - small.mean(axis=0) @ cut
        changed[down.name, "bias"] = bias(down) + moved
    statistics = Statistics({down.name: seen(H), **{s.name: seen(X) for s in ups}})
    ours = group_loss(group, new_weights(), statistics, changed)
    assert ours == pytest.approx(relative(H @ W, small @ cut + moved), rel=1e-7)


# --- attention ----------------------------------------------------------------------------------------------------


def per_head(rng: Any, heads: int, rank: int) -> tuple[Array, Array]:
    """A (heads, s, s) whose last columns are zero, and where they are."""
    A = rng.standard_normal((heads, SIZE, SIZE)) * 0.4 + np.eye(SIZE)
    A[:, :, rank:] = 0
    return A, np.arange(rank)


def mixed_by(W: Array, A: Array) -> Array:
    """Each head's columns times its A."""
    made: Array = np.einsum("khs,hsr->khr", W.reshape(len(W), len(A), SIZE), A).reshape(len(W), -1)
    return made


@pytest.mark.parametrize("repeat", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_output(repeat: int, biased: bool) -> None:
    """z Wo with random attention probabilities, z = P (x Wv + bv) a head: cut values go through the same probabilities."""
    made = blocks.attention(bias=biased, repeat=repeat)
    group = blocks.groups(made)["value_output"]
    value, out = group.sites
    few, rng = HEADS // repeat, np.random.default_rng(0)
    A, _ = per_head(rng, few, 4)
    Wv, bv, Wo = matrix(value), bias(value), matrix(out)
    Wo_cut = disturbed(Wo, 2, 0.3)
    Z, Z_cut = [], []
    for _ in range(60):
        x = inputs(7, seed=int(rng.integers(1 << 30)))
        P = rng.dirichlet(np.ones(7), (HEADS, 7))  # rows sum to one: biases pass through
        for into, w, b in ((Z, Wv, bv), (Z_cut, mixed_by(Wv, A), mixed_by(bv[None], A)[0])):
            v = (x @ w + b).reshape(7, few, SIZE)
            into.append(np.concatenate([P[h] @ v[:, h // repeat] for h in range(HEADS)], axis=1))
    z, z_cut = np.concatenate(Z), np.concatenate(Z_cut)
    changed: dict[tuple[str, str], Array] = {
        (value.name, "weight"): mixed_by(Wv, A),
        (out.name, "weight"): Wo_cut,
    }
    moved = np.zeros(WIDTH)
    if biased:
        moved = z.mean(axis=0) @ Wo - z_cut.mean(axis=0) @ Wo_cut
        changed |= {(value.name, "bias"): mixed_by(bv[None], A)[0], (out.name, "bias"): bias(out) + moved}
    # only the moment of what the output weight reads is asked for
    statistics = Statistics({out.name: seen(z)})
    ours = group_loss(group, new_weights(), statistics, changed)
    assert ours == pytest.approx(relative(z @ Wo, z_cut @ Wo_cut + moved), rel=1e-7)


@pytest.mark.parametrize("repeat", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_queries_and_keys(repeat: int, biased: bool) -> None:
    """Scores of every query with every key, less each query's mean over the keys, which the softmax does not see."""
    made = blocks.attention(bias=biased, repeat=repeat)
    group = blocks.groups(made)["query_key"]
    query, key = group.sites
    few, rng, X = HEADS // repeat, np.random.default_rng(1), inputs(120)
    A, _ = per_head(rng, few, 4)
    B, _ = per_head(rng, few, 4)
    Wq, Wk = matrix(query), matrix(key)
    wide = np.repeat(A, repeat, axis=0)
    changed: dict[tuple[str, str], Array] = {
        (query.name, "weight"): mixed_by(Wq, wide), (key.name, "weight"): mixed_by(Wk, B),
    }  # fmt: skip
    if biased:
        changed |= {
            (query.name, "bias"): mixed_by(bias(query)[None], wide)[0], (key.name, "bias"): mixed_by(bias(key)[None], B)[0],
        }  # fmt: skip

    def scores(new: bool) -> Array:
        q, k = (
            (X @ (changed[s.name, "weight"] if new else matrix(s)) + changed.get((s.name, "bias"), bias(s)) if new else X @ matrix(s) + bias(s))
            for s in (query, key)
        )  # fmt: skip
        q, k = q.reshape(-1, HEADS, SIZE), k.reshape(-1, few, SIZE)
        made = np.array([q[:, h] @ k[:, h // repeat].T for h in range(HEADS)])
        return np.asarray(made - made.mean(axis=2, keepdims=True))

    statistics = Statistics({query.name: seen(X), key.name: seen(X)})
    ours = group_loss(group, new_weights(), statistics, changed)
    assert ours == pytest.approx(relative(scores(False), scores(True)), rel=1e-7)


def test_what_all_keys_have_in_common_does_not_count() -> None:
    """Shifting every key by the same vector shifts each query's scores alike: other means of x, the same error."""
    made = blocks.attention(bias=True)
    group = blocks.groups(made)["query_key"]
    query, key = group.sites
    rng = np.random.default_rng(1)
    A, B = per_head(rng, HEADS, 4)[0], per_head(rng, HEADS, 4)[0]
    changed = {
        (query.name, "weight"): mixed_by(matrix(query), A),
        (key.name, "weight"): mixed_by(matrix(key), B),
    }
    X = inputs(200)
    losses = []
    for shift in (0.0, 5.0):
        moved = X + shift * normal(WIDTH, seed=3, dtype=np.float64)
        statistics = Statistics({query.name: seen(X), key.name: seen(moved)})
        losses.append(group_loss(group, new_weights(), statistics, changed))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_queries_and_keys_of_other_values() -> None:
    """Cross attention: the keys have moments of their own, and inputs of another width."""
    b = blocks.Block()
    b.inputs["z"] = ("b", "t", 10)
    q = b.op(
        "Transpose",
        b.op("Reshape", b.linear("x", "wq", WIDTH, WIDTH), blocks.ints(0, 0, HEADS, SIZE)),
        perm=[0, 2, 1, 3],
    )
    k = b.op(
        "Transpose",
        b.op("Reshape", b.linear("z", "wk", 10, WIDTH, seed=1), blocks.ints(0, 0, HEADS, SIZE)),
        perm=[0, 2, 3, 1],
    )
    made = b.made(b.op("Softmax", b.op("MatMul", q, k), axis=-1))
    group = blocks.groups(made)["query_key"]
    query, key = group.sites
    rng, X, Z = np.random.default_rng(1), inputs(90), inputs(70, K=10)
    A, B = per_head(rng, HEADS, 3)[0], per_head(rng, HEADS, 3)[0]
    changed = {
        (query.name, "weight"): mixed_by(matrix(query), A), (query.name, "bias"): mixed_by(bias(query)[None], A)[0],
        (key.name, "weight"): mixed_by(matrix(key), B), (key.name, "bias"): mixed_by(bias(key)[None], B)[0],
    }  # fmt: skip
    found = []
    for new in (False, True):
        Q, Ks = (
            rows @ (changed[s.name, "weight"] if new else matrix(s))
            + (changed[s.name, "bias"] if new else bias(s))
            for rows, s in ((X, query), (Z, key))
        )
        scores = np.einsum("ahs,bhs->hab", Q.reshape(-1, HEADS, SIZE), Ks.reshape(-1, HEADS, SIZE))
        found.append(scores - scores.mean(axis=2, keepdims=True))
    ours = group_loss(group, new_weights(), Statistics({query.name: seen(X), key.name: seen(Z)}), changed)
    assert ours == pytest.approx(relative(*found), rel=1e-7)


@pytest.mark.parametrize("kind", ["value_output", "query_key"])
def test_nothing_lost(kind: str) -> None:
    """An invertible change between the sites, undone in the other one."""
    made = blocks.attention(bias=False)
    group = blocks.groups(made)[kind]
    first, last = group.sites
    rng, X = np.random.default_rng(0), inputs(300)
    A = rng.standard_normal((HEADS, SIZE, SIZE)) + 2 * np.eye(SIZE)
    inverse = np.linalg.inv(A)
    if kind == "value_output":
        other = np.einsum("hrs,hsn->hrn", inverse, matrix(last).reshape(HEADS, SIZE, -1)).reshape(WIDTH, -1)
    else:
        other = mixed_by(matrix(last), inverse.transpose(0, 2, 1))
    changed = {(first.name, "weight"): mixed_by(matrix(first), A), (last.name, "weight"): other}
    statistics = Statistics({s.name: seen(X) for s in group.sites})
    assert group_loss(group, new_weights(), statistics, changed) < 1e-7
