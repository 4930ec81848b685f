"""Allocate against brute force on small problems: what it costs, how far from the best it is, covers of overlapping groups, budgets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lrcompile.allocate import Options, allocate, cheapest, covers_of
from lrcompile.records import Group
from tests.graphs import Array

# Sums of a dozen float64 numbers of size one in another order.
ROUNDED = 1e-12

Ways = Sequence[Sequence[Sequence[str]]]


def group(name: str, *sites: str, kind: str = "") -> Group:
    """Only names matter here."""
    members: Any = tuple(SimpleNamespace(name=s) for s in sites)
    kind = kind or ("alone" if len(sites) == 1 else "qkv")
    return Group(name, kind, members, (False,) * len(sites))


def partitions(groups: Sequence[Group]) -> list[frozenset[str]]:
    """Every set of groups that holds each site once, by looking at all sets."""
    sites = sorted(s.name for g in groups for s in g.sites)
    found = []
    for size in range(len(groups) + 1):
        for some in itertools.combinations(groups, size):
            if sorted(s.name for g in some for s in g.sites) == sorted(set(sites)):
                found += [frozenset(g.name for g in some)]
    return found


def together(ways: Ways) -> list[frozenset[str]]:
    """Every way to take all blocks."""
    return [frozenset(itertools.chain(*choice)) for choice in itertools.product(*ways)]


def everything(options: Mapping[str, Options], ways: Ways) -> Iterator[tuple[float, float]]:
    """(cost, movement) of each allocation that there is."""
    for names in together(ways):
        for picked in itertools.product(*(range(len(options[n].costs)) for n in names)):
            pairs = list(zip(names, picked, strict=True))
            yield (
                sum(options[n].costs[i] for n, i in pairs),
                sum(options[n].movements[i] for n, i in pairs),
            )


BLOCK = [
    group("q", "q"), group("k", "k"), group("v", "v"), group("o", "o"), group("qkv", "q", "k", "v"),
    group("vo", "v", "o", kind="value_output"), group("qk", "q", "k", kind="query_key"),
]  # fmt: skip
FFN = [
    group("up", "up"), group("gate", "gate"), group("down", "down"), group("gate_up", "gate", "up", kind="gate_up"),
    group("up_down", "up", "gate", "down", kind="up_down"),
]  # fmt: skip


# --- covers -------------------------------------------------------------------------------------------------------


def test_covers_of_an_attention_block() -> None:
    (covers,) = covers_of(BLOCK)
    assert {frozenset(c) for c in covers} == {
        frozenset(c) for c in (("q", "k", "v", "o"), ("qkv", "o"), ("q", "k", "vo"), ("qk", "v", "o"), ("qk", "vo"))
    }  # fmt: skip


def test_blocks_are_apart() -> None:
    other = [group("head", "head"), group("tied", "table", "lm", kind="tied")]
    covers = covers_of([*BLOCK, *FFN, *other])
    assert len(covers) == 4
    assert {frozenset(c) for c in covers[1]} == {
        frozenset(c) for c in (("up", "gate", "down"), ("gate_up", "down"), ("up_down",))
    }
    assert covers[2:] == ((("head",),), (("tied",),))


@pytest.mark.parametrize("seed", range(20))
def test_covers_are_all_exact_covers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = [f"s{i}" for i in range(6)]
    groups = [group(s, s) for s in sites if rng.random() < 0.9]
    groups += [
        group(f"g{i}", *rng.choice(sites, int(rng.integers(2, 4)), replace=False))
        for i in range(int(rng.integers(0, 5)))
    ]
    if not groups:
        pytest.skip("no group was drawn")
    rng.shuffle(groups)  # type: ignore[arg-type]
    covers = covers_of(groups)
    seen = [s.name for g in groups for s in g.sites]
    assert all(len(c) == len(set(c)) for block in covers for c in block)
    wanted = partitions(groups)
    assert sorted(map(sorted, together(covers))) == sorted(map(sorted, wanted))
    assert covers == covers_of(groups)
    # no site stands in two blocks
    of = {g.name: {s.name for s in g.sites} for g in groups}
    places = [set().union(*(of[n] for c in block for n in c)) for block in covers]
    assert sum(map(len, places)) == len(set().union(*places)) <= len(set(seen))


# --- against brute force ------------------------------------------------------------------------------------------


def drawn(seed: int) -> tuple[dict[str, Options], Ways]:
    """Falling movements over rising costs, as curves are, with a few that are not; two overlapping blocks or lone groups."""
    rng = np.random.default_rng(seed)
    groups = [[*BLOCK], [group(f"w{i}", f"w{i}") for i in range(5)], [*FFN, group("x", "x")]][seed % 3]
    options = {}
    for g in groups:
        n = int(rng.integers(2, 4 if len(groups) > 6 else 5))
        costs = np.sort(rng.integers(1, 40, n)).astype(np.float64) * len(g.sites)
        movements = np.sort(rng.exponential(1.0, n) * 10.0 ** rng.uniform(-3, 0))[::-1] * len(g.sites)
        if rng.random() < 0.3:
            rng.shuffle(movements)  # a form that costs more and moves more
        options[g.name] = Options(movements.copy(), costs)
    return options, covers_of(groups)


def span(options: Mapping[str, Options], ways: Ways) -> float:
    """The most that one block can move: what a knapsack's last item may cost."""
    return max(
        max(sum(options[n].movements.max() for n in c) for c in block)
        - min(sum(options[n].movements.min() for n in c) for c in block)
        for block in ways
    )


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_and_never_beyond_the_limit(seed: int) -> None:
    options, ways = drawn(seed)
    all_ = np.array(list(everything(options, ways)))
    least, most = all_[:, 0].min(), all_[:, 0].max()
    for limit in np.linspace(least, most, 8):
        found = allocate(options, ways, float(limit))
        assert found is not None and found.cost <= limit + ROUNDED
        # what it says of itself is so
        assert frozenset(found.chosen) in together(ways)
        assert found.cost == pytest.approx(
            sum(options[n].costs[i] for n, i in found.chosen.items()), abs=ROUNDED
        )
        assert found.movement == pytest.approx(
            sum(options[n].movements[i] for n, i in found.chosen.items()), abs=ROUNDED
        )
        best = all_[all_[:, 0] <= limit, 1].min()
        assert best - ROUNDED <= found.movement <= best + span(options, ways) + ROUNDED
    assert allocate(options, ways, float(least) - 1e-6) is None
    assert cheapest(options, ways).cost == pytest.approx(least, abs=ROUNDED)
    free = allocate(options, ways, float(most) + 1)
    assert free is not None and free.movement == pytest.approx(all_[:, 1].min(), abs=ROUNDED)


def test_close_to_the_best_on_average() -> None:
    """Over all problems and limits: what is lost to the best, relative to what lies between the best and the cheapest."""
    lost = []
    for seed in range(12):
        options, ways = drawn(seed)
        all_ = np.array(list(everything(options, ways)))
        worst = cheapest(options, ways).movement
        for limit in np.linspace(all_[:, 0].min(), all_[:, 0].max(), 8)[1:]:
            found = allocate(options, ways, float(limit))
            assert found is not None
            best = all_[all_[:, 0] <= limit, 1].min()
            lost.append((found.movement - best) / max(worst - best, 1e-9))
    assert np.mean(lost) < 0.04 and np.median(lost) < 0.001


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("price", [1e-3, 1e-2])
def test_exact_for_the_budget_that_a_price_spends(seed: int, price: float) -> None:
    """Everett: what minimises movement + price cost is the best of all that cost no more."""
    options, ways = drawn(seed)
    all_ = np.array(list(everything(options, ways)))
    at = np.argmin(all_[:, 1] + price * all_[:, 0])
    found = allocate(options, ways, float(all_[at, 0]))
    assert found is not None and found.movement == pytest.approx(all_[at, 1], rel=1e-9, abs=ROUNDED)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_units_of_cost_do_not_matter(scale: float) -> None:
    """Parameters, bytes, FLOPs of a large model."""
    for seed in range(6):
        options, ways = drawn(seed)
        limit = 1.4 * cheapest(options, ways).cost
        scaled = {n: Options(o.movements, o.costs * scale) for n, o in options.items()}
        one, two = allocate(options, ways, limit), allocate(scaled, ways, limit * scale * (1 + 1e-12))
        assert one is not None and two is not None and one.chosen == two.chosen


def test_deterministic() -> None:
    options, ways = drawn(4)
    limit = 1.5 * cheapest(options, ways).cost
    assert allocate(options, ways, limit) == allocate(options, ways, limit)


def test_nothing_to_allocate() -> None:
    found = allocate({}, (), 0.0)
    assert found is not None and (found.chosen, found.cost, found.movement) == ({}, 0.0, 0.0)


def test_the_dense_form_stays_where_nothing_is_gained() -> None:
    options = {"a": Options(np.array([0.0, 0.5]), np.array([10.0, 5.0]))}
    found = allocate(options, ((("a",),),), 10.0)
    assert found is not None and found.chosen == {"a": 0}


@pytest.mark.parametrize("seed", [1, 4, 7, 5, 71])
def test_more_budget_hardly_ever_moves_the_outputs_more(seed: int) -> None:
    """It may, by a part of one group's span, because of what is left over: 71 is the worst of four hundred. Never by more."""
    options, ways = drawn(seed)
    least, most = cheapest(options, ways).cost, sum(o.costs.max() for o in options.values())
    moved = []
    for limit in np.linspace(least, most, 60):
        found = allocate(options, ways, float(limit))
        assert found is not None
        moved.append(found.movement)
    worse = [b - min(moved[: i + 1]) for i, b in enumerate(moved[1:])]
    assert max(worse) <= 0.15 * span(options, ways)
    assert sum(w > ROUNDED for w in worse) <= 6
    assert moved[-1] == pytest.approx(min(moved), abs=ROUNDED)


def test_equal_groups_share_what_is_there() -> None:
    """All flip at one price: what is left must go where it does most for its cost, not to whoever can swallow it."""
    form = Options(np.array([10.0, 5.0, 4.9]), np.array([1.0, 2.0, 10.0]))
    names = [f"g{i}" for i in range(15)]
    found = allocate(dict.fromkeys(names, form), tuple(((n,),) for n in names), 25.0)
    assert found is not None
    best = 10 * 5.0 + 5 * 10.0  # ten of fifteen take the second form
    assert found.movement <= best + 5.1  # one group's span


def layers(count: int) -> tuple[dict[str, Options], Ways]:
    rng = np.random.default_rng(count)
    costs = np.linspace(0.1, 1.0, 40)[::-1] * 1e6
    groups = [group(f"w{i}", f"w{i}") for i in range(count)]
    scales = 10.0 ** rng.uniform(-4, 0, count)
    return (
        {g.name: Options(s * (1 - costs / 1e6) ** 2, costs) for g, s in zip(groups, scales, strict=True)},
        covers_of(groups),
    )


def test_many_groups() -> None:
    """Close to the continuous optimum: by Lagrange, of s (1 - c)^2 where the sum of c is given."""
    options, ways = layers(300)
    limit = 0.6 * 300e6
    found = allocate(options, ways, limit)
    assert found is not None and 0.99 * limit <= found.cost <= limit
    scales: Array = np.array([o.movements[-1] / 0.81 for o in options.values()])
    low, high = 1e-9, 10.0
    for _ in range(200):  # c = 1 - mu / 2s, clipped
        mu = (low * high) ** 0.5
        kept = np.clip(1 - mu / (2 * scales), 0.1, 1.0)
        low, high = (low, mu) if kept.sum() < 0.6 * 300 else (mu, high)
    assert found.movement <= 1.02 * float((scales * (1 - kept) ** 2).sum())
