"""slicing: the cut graph against the original with reconstructed constants, the claims, and the selection against others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lrcompile.curves import decision_of
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.graph import shapes_of
from lrcompile.interfaces import CandidateOptions
from lrcompile.loss import group_loss
from lrcompile.oracle import reconstructed
from lrcompile.records import Candidate, Group, InputStatistics, Plan
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests import blocks
from tests.blocks import HEADS, HIDDEN, SIZE, WIDTH
from tests.graphs import Array
from tests.graphs import weights as new_weights

SLICING = factorization("slicing")
eliminate: Any = __import__("lrcompile_passes._slicing.neurons", fromlist=["eliminate"]).eliminate
# Float32 products of a few dozen terms, a softmax between them.
ROUNDED = 2e-5

JOINED = "heads joined to the batch (fairseq)"
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without biases": {"bias": False},
    "one shape for q, k, v, of -1; keys flattened; rows masked (torch)": {
        "split": "shared", "merge": "shared", "keys": "flattened", "scale": "both", "mask": True,
    },
    "shapes from Shape, Gather, Concat (TorchScript)": {"split": "computed", "merge": "computed", "keys": "one transpose", "opset": 14},
    "shapes as numbers": {"split": "numbers", "keys": "one transpose"},
    "the size as -1": {"split": "last", "merge": "shared"},
    "grouped queries": {"repeat": 2, "bias": False},
    "one key head": {"repeat": 4, "split": "computed"},
    JOINED: {"form": "3d"},
}  # fmt: skip
TURNED: dict[str, dict[str, Any]] = {
    "rotary": {"turn": "slices"},
    "rotary, grouped queries, without biases (Llama)": {"turn": "slices", "repeat": 2, "bias": False, "scale": "both", "mask": True},
    "rotary, shapes from Shape, Gather, Concat": {"turn": "slices", "repeat": 2, "split": "computed", "merge": "computed", "opset": 14},
    "rotary, one key head": {"turn": "slices", "repeat": 4, "split": "last"},
    "rotary, halves by Split": {"turn": "split", "split": "shared", "merge": "shared"},
    "rotary, halves by Split of given sizes": {"turn": "sizes", "repeat": 2},
    "rotary, a table in the file": {"turn": "table", "split": "numbers"},
}  # fmt: skip
FFNS: dict[str, dict[str, Any]] = {
    "Gelu": {},
    "without biases": {"bias": False},
    "Gelu by Erf": {"act": "erf", "opset": 14},
    "Gelu by Tanh": {"act": "tanh", "opset": 14},
    "gated": {"act": "silu", "gated": True, "bias": False},
    "gated with biases": {"act": "silu", "gated": True},
    "Gemm, transposed weights": {"act": "Relu", "gemm": True},
    "Gemm without biases": {"act": "Relu", "gemm": True, "bias": False},
    "a slope a channel": {"act": "prelu"},
    "constants a channel": {"act": "channels"},
    "Where": {"act": "where"},
}


def cut(
    made: ir.Model, group: Group, rank: int, cache: Cache
) -> tuple[FactorSet, Candidate, blocks.Statistics]:
    """The stored factors of one rank, by the way that a plan takes: claims are checked there."""
    weights = ModelWeights(cache, 18)
    statistics = blocks.statistics(made, group.sites)
    (candidate,) = SLICING.candidates(group, weights, statistics, CandidateOptions(ranks=(rank,)))
    plan = Plan("reference", (decision_of(group, candidate, ""),))
    (factors,) = factorize(plan, {group.name: group}, weights, statistics, {"slicing": SLICING}, 0)
    return factors, candidate, statistics


def check(made: ir.Model, group: Group, rank: int, cache: Cache) -> FactorSet:
    """The cut graph computes what the original with reconstructed constants computes."""
    factors, candidate, _ = cut(made, group, rank, cache)
    arrays = factors.load()
    assert sum(a.size for n, a in arrays.items() if n.startswith("weight")) == candidate.cost.parameters
    assert candidate.bound and factors.measured <= candidate.error + 1e-6
    ours, oracle = rewrite(made, (factors,)), reconstructed(made, (factors,))
    assert group.width is not None and not ours.functions
    # no node is added, but of cos and of sin the planes are taken
    takes = [n for n in ours.graph if n.name is not None and n.name.startswith(f"{group.name}/take")]
    assert len(takes) == (2 if group.width.planes else 0)
    assert len(list(ours.graph)) - len(takes) <= len(list(made.graph))
    for seed in range(2):
        given = blocks.feeds(made, seed, batch=2 + seed)
        a, b = blocks.run(oracle, given)[0], blocks.run(ours, given)[0]
        np.testing.assert_allclose(b, a, atol=ROUNDED * float(np.abs(a).max()), rtol=0)
    check_shapes(made, factors)
    return factors


def check_shapes(made: ir.Model, factors: FactorSet) -> None:
    """Of what the file says of shapes exactly that is forgotten which is no longer true."""
    sizes = {name: array.shape for name, array in blocks.feeds(made).items()}
    before = {v.name: shape for v, shape in shapes_of(made, sizes).items()}
    values = [v for n in made.graph for v in n.outputs if not v.is_graph_output()]
    said = {v: v.shape for v in values}
    for value in values:
        value.shape = before.get(value.name)
    ours = rewrite(made, (factors,))
    for value, shape in said.items():
        value.shape = shape
    after = {v.name: shape for v, shape in shapes_of(ours, sizes).items()}
    told = {
        v.name: v.shape for n in ours.graph for v in n.outputs if v.name in before and not v.is_graph_output()
    }
    narrower = {name for name, shape in before.items() if name in after and after[name] != shape}
    assert narrower
    assert {name for name, shape in told.items() if shape is None} == narrower


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


@pytest.mark.parametrize("kind", ["value_output", "query_key"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, kind: str, cache: Cache) -> None:
    made = blocks.attention(**ATTENTIONS[name])
    group = blocks.groups(made)[kind]
    assert group.refusal == "" and group.width is not None
    repeat = ATTENTIONS[name].get("repeat", 1)
    assert (group.width.size, group.width.heads, group.width.repeat) == (SIZE, HEADS // repeat, repeat)
    check(made, group, 4, cache)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("name", TURNED)
def test_rotary_attention(name: str, rank: int, cache: Cache) -> None:
    made = blocks.attention(**TURNED[name])
    group = blocks.groups(made)["query_key"]
    assert group.width is not None and group.width.planes, group.refusal
    kept = check(made, group, rank, cache).load()["kept"]
    assert np.array_equal(
        kept[rank // 2 :], kept[: rank // 2] + SIZE // 2
    )  # whole planes, the first halves first


@pytest.mark.parametrize(
    "options",
    [ATTENTIONS["shapes from Shape, Gather, Concat (TorchScript)"], {"turn": "slices", "repeat": 2}],
)
def test_both_cuts_of_one_attention(options: dict[str, Any], cache: Cache) -> None:
    made = blocks.attention(**options)
    found = blocks.groups(made)
    sets = [cut(made, found[kind], rank, cache)[0] for kind, rank in (("value_output", 4), ("query_key", 2))]
    given = blocks.feeds(made)
    a, b = blocks.run(reconstructed(made, sets), given)[0], blocks.run(rewrite(made, sets), given)[0]
    np.testing.assert_allclose(b, a, atol=ROUNDED * float(np.abs(a).max()), rtol=0)


@pytest.mark.parametrize("name", FFNS)
def test_feed_forward(name: str, cache: Cache) -> None:
    made = blocks.ffn(**FFNS[name])
    group = blocks.groups(made)["up_down"]
    assert group.refusal == "" and group.width is not None
    assert (group.width.size, group.width.heads, group.width.repeat) == (HIDDEN, 1, 1)
    factors = check(made, group, 23, cache)
    assert factors.shapes["weight.0"] == (WIDTH, 23) and factors.indices == {"kept"}


# --- the choice of neurons -----------------------------------------------------------------------------------------


def moment(H: int, seed: int = 0) -> Array:
    """A second moment with a falling spectrum, of full rank."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * H, H)) * np.geomspace(1, 0.1, H) @ rng.standard_normal((H, H))
    return np.asarray(X.T @ X / len(X))


def loss_of(M: Array, W: Array, kept: Array) -> float:
    """What is lost when W is refitted on the kept rows, by least squares."""
    L = np.linalg.cholesky(M)
    fit = np.linalg.lstsq(L.T[:, kept], L.T @ W, rcond=None)[0]
    return float(np.sum((L.T @ W - L.T[:, kept] @ fit) ** 2))


@pytest.mark.parametrize("H", [1, 7, 40, 300])  # 300: more than one block, more than the pool
def test_losses_of_the_sweep_are_those_of_a_refit(H: int) -> None:
    M, W = moment(H), np.random.default_rng(1).standard_normal((H, 5))
    order, lost = eliminate(M, W)
    assert sorted(order) == list(range(H)) and lost[H] == 0.0
    assert lost[0] == pytest.approx(float(np.vdot(W, M @ W)), rel=1e-6)
    for r in {1, H // 3, H // 2, H - 1} - {0}:
        assert lost[r] == pytest.approx(loss_of(M, W, order[:r]), rel=1e-6)
    assert np.all(np.diff(lost) <= 0)


def test_each_step_takes_the_cheapest_neuron() -> None:
    """Against brute force: of all neurons that are left, the one whose loss is least."""
    M, W = moment(12, 3), np.random.default_rng(4).standard_normal((12, 3))
    order, _ = eliminate(M, W)
    left = list(range(12))
    for gone in order[:0:-1]:
        losses = {j: loss_of(M, W, np.array([i for i in left if i != j])) for j in left}
        assert gone == min(losses, key=losses.__getitem__)
        left.remove(int(gone))


def test_better_than_the_largest_weights() -> None:
    M, W = moment(60, 5), np.random.default_rng(6).standard_normal((60, 8))
    _, lost = eliminate(M, W)
    magnitude = np.argsort(-np.sum(W**2, axis=1))
    energy = np.argsort(-np.diagonal(M) * np.sum(W**2, axis=1))
    for r in (15, 30, 45):
        assert lost[r] < loss_of(M, W, energy[:r]) and lost[r] < loss_of(M, W, magnitude[:r])


@pytest.mark.parametrize("bias", [True, False])
def test_dead_neurons_cost_nothing(bias: bool, cache: Cache) -> None:
    """Neurons that never fire, or whose value never changes where a bias can take it: exact without them."""
    made = blocks.ffn("Relu", bias=bias)
    dead = [3, 11, 12, 30]
    W = made.graph.initializers["up"].const_value.numpy().copy()  # type: ignore[union-attr]
    W[:, dead] = 0.0
    made.graph.initializers["up"].const_value = ir.tensor(W)
    group = blocks.groups(made)["up_down"]
    factors, candidate, _ = cut(made, group, HIDDEN - len(dead), cache)
    assert set(range(HIDDEN)) - set(factors.load()["kept"].tolist()) == set(dead)
    assert candidate.error < 1e-4 and factors.measured < 1e-6
    given = blocks.feeds(made)
    before, after = blocks.run(made, given)[0], blocks.run(rewrite(made, (factors,)), given)[0]
    np.testing.assert_allclose(after, before, atol=ROUNDED * float(np.abs(before).max()), rtol=0)


# --- claims and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["up_down", "value_output", "query_key"])
def test_claims_fall_and_hold(kind: str) -> None:
    made = blocks.ffn() if kind == "up_down" else blocks.attention(repeat=2)
    group, weights = blocks.groups(made)[kind], new_weights()
    statistics = blocks.statistics(made, group.sites)
    found = list(SLICING.candidates(group, weights, statistics, CandidateOptions()))
    assert group.width is not None and [c.rank for c in found] == list(range(1, group.width.size))
    errors = [c.error for c in found]
    assert errors == sorted(errors, reverse=True) and 0.0 < errors[0] < 1.0
    for candidate in found[:: max(1, len(found) // 5)]:
        factors = SLICING.factorize(group, weights, statistics, candidate, 0)
        measured = group_loss(group, weights, statistics, SLICING.reconstruct(group, factors))
        # closed forms: a claim is what comes out, but for the ridge and the slack
        assert candidate.error - 1e-4 < measured <= candidate.error


@pytest.mark.parametrize("kind", ["up_down", "value_output", "query_key"])
def test_a_corrupted_factor_is_noticed(kind: str, cache: Cache) -> None:
    made = blocks.ffn() if kind == "up_down" else blocks.attention()
    group = blocks.groups(made)[kind]
    factors, candidate, statistics = cut(made, group, 4, cache)
    arrays = {n: np.array(a) for n, a in factors.load().items()}
    arrays["weight.1"][0, 0] += 0.5
    weights = new_weights()
    assert group_loss(group, weights, statistics, SLICING.reconstruct(group, arrays)) > candidate.error + 1e-3
    spoiled = replace(factors, load=lambda: arrays)
    given = blocks.feeds(made)
    a, b = (blocks.run(m, given)[0] for m in (reconstructed(made, (factors,)), rewrite(made, (spoiled,))))
    assert float(np.abs(a - b).max()) > 100 * ROUNDED


def test_a_shift_of_all_keys_costs_nothing() -> None:
    """A softmax does not see it: a huge bias of the keys changes neither the choice nor the claim."""

    def claims(shift: float) -> list[float]:
        made = blocks.attention()
        by_name = {n.name: n for n in made.graph}
        bias = next(
            n.inputs[1] for n in made.graph if n.op_type == "Add" and n.inputs[0] is by_name["wk"].outputs[0]
        )
        assert bias is not None and bias.const_value is not None
        statistics = blocks.statistics(made, blocks.groups(made)["query_key"].sites)
        bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(shift))
        group = blocks.groups(made)["query_key"]
        return [c.error for c in SLICING.candidates(group, new_weights(), statistics, CandidateOptions())]

    assert claims(0.0) == claims(100.0)


# --- planes of a rotary embedding ----------------------------------------------------------------------------------


def test_planes_are_claimed_as_measured() -> None:
    """The loss is made of moments of both weights, the claim of traces: they agree at every size, and only even ones are offered."""
    made = blocks.attention(turn="slices", repeat=2)
    group, weights = blocks.groups(made)["query_key"], new_weights()
    statistics = blocks.statistics(made, group.sites)
    found = list(SLICING.candidates(group, weights, statistics, CandidateOptions(ranks=tuple(range(SIZE)))))
    assert [c.rank for c in found] == [2, 4]
    for candidate in found:
        changed = SLICING.reconstruct(group, SLICING.factorize(group, weights, statistics, candidate, 0))
        measured = group_loss(group, weights, statistics, changed)
        assert candidate.error - 1e-5 < measured <= candidate.error


def test_the_loss_of_turned_scores_is_an_average_over_angles() -> None:
    """Against q R k^T with angles drawn for each plane, the moments being those of drawn rows, and any changed weights."""
    made = blocks.attention(turn="slices", bias=False)
    group, weights = blocks.groups(made)["query_key"], new_weights()
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2, 200, WIDTH))
    known = {
        s.name: InputStatistics(200, x.T @ x / 200, x.mean(axis=0))
        for s, x in zip(group.sites, X, strict=True)
    }
    changed = {
        (s.name, "weight"): weights.matrix(s) + 0.1 * rng.standard_normal((WIDTH, WIDTH)) for s in group.sites
    }
    planes = (200, HEADS, 2, SIZE // 2)
    q, k = (x @ weights.matrix(s) for s, x in zip(group.sites, X, strict=True))
    p, m = (x @ changed[s.name, "weight"] for s, x in zip(group.sites, X, strict=True))
    q, k, p, m = (np.moveaxis(v.reshape(planes), 2, -1) @ np.array([1, 1j]) for v in (q, k, p, m))
    lost = all_ = 0.0
    for _ in range(200):
        R = np.exp(2j * np.pi * rng.random((HEADS, SIZE // 2)))
        exact = np.einsum("ahp,bhp->abh", q * R, k.conj()).real
        lost += float(np.sum((exact - np.einsum("ahp,bhp->abh", p * R, m.conj()).real) ** 2))
        all_ += float(np.sum(exact**2))
    measured = group_loss(group, weights, blocks.Statistics(known), changed)
    assert measured == pytest.approx(np.sqrt(lost / all_), rel=0.02)


def test_planes_go_by_what_they_add() -> None:
    """A plane that is dead in all key heads goes first and costs nothing."""
    made = blocks.attention(turn="slices", bias=False, repeat=2)
    W = made.graph.initializers["wk"].const_value.numpy().copy()  # type: ignore[union-attr]
    W.reshape(WIDTH, -1, 2, SIZE // 2)[..., 1] = 0.0
    made.graph.initializers["wk"].const_value = ir.tensor(W)
    group, weights = blocks.groups(made)["query_key"], new_weights()
    statistics = blocks.statistics(made, group.sites)
    (candidate,) = SLICING.candidates(group, weights, statistics, CandidateOptions(ranks=(4,)))
    assert candidate.error < 2e-6
    assert SLICING.factorize(group, weights, statistics, candidate, 0)["kept"].tolist() == [0, 2, 3, 5]


def test_planes_go_one_by_one_with_what_went() -> None:
    """Errors of planes that went add up, or cancel: against brute force at each step."""
    rng = np.random.default_rng(3)
    V = rng.standard_normal((8, 5))
    T = V @ V.T
    order, costs = __import__("lrcompile_passes._slicing.queries", fromlist=["_least"])._least(T)
    gone: list[int] = []
    for r in range(8, 0, -1):
        assert costs[r] == pytest.approx(T[np.ix_(gone, gone)].sum(), abs=1e-9)
        left = [j for j in range(8) if j not in gone]
        assert order[r - 1] == min(left, key=lambda j: T[np.ix_([*gone, j], [*gone, j])].sum())
        gone.append(int(order[r - 1]))


def test_what_is_offered() -> None:
    made = blocks.ffn()
    group, weights = blocks.groups(made)["up_down"], new_weights()
    statistics = blocks.statistics(made, group.sites)

    def ranks(**options: Any) -> list[int | None]:
        return [c.rank for c in SLICING.candidates(group, weights, statistics, CandidateOptions(**options))]

    assert ranks(multiple=16) == [16, 32]
    assert ranks(ranks=(0, 3, HIDDEN - 1, HIDDEN, 999)) == [3, HIDDEN - 1]  # the full width is no cut
    assert ranks(full=True) == []
    assert list(SLICING.candidates(group, weights, None, CandidateOptions())) == []
    few = blocks.Statistics({n: replace(k, count=10, shrinkage=0.5) for n, k in statistics.known.items()})
    (candidate,) = SLICING.candidates(group, weights, few, CandidateOptions(ranks=(8,)))
    assert candidate.note == f"few samples: 10 rows for {HIDDEN} inputs, shrunk by 0.5"


def test_refusals() -> None:
    group = blocks.groups(blocks.ffn())["up_down"]
    assert SLICING.serves(group) is None
    said = SLICING.serves(replace(group, width=None, refusal="because of this"))
    assert said is not None and said.reason == "because of this"
    alone = SLICING.serves(replace(group, kind="alone", width=None))
    assert alone is not None and "not one alone" in alone.reason


def test_deterministic(tmp_path: Path) -> None:
    made = blocks.attention(repeat=2)
    sets: list[Mapping[str, Array]] = []
    for turn in ("a", "b"):
        group = blocks.groups(made)["value_output"]
        sets.append(cut(made, group, 3, Cache(tmp_path / turn))[0].load())
    assert all(np.array_equal(sets[0][n], sets[1][n]) for n in sets[0])


def test_a_huge_hidden_layer_takes_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for 12,288 neurons: the losses stay those of a refit."""
    module = __import__("lrcompile_passes._slicing.neurons", fromlist=["_BLOCKS"])
    monkeypatch.setattr(module, "_BLOCKS", 2)
    M, W = moment(120, 7), np.random.default_rng(8).standard_normal((120, 5))
    order, lost = eliminate(M, W)
    assert lost[40] == pytest.approx(loss_of(M, W, order[:40]), rel=1e-6)
