"""Allocate: which option each group takes, so that the predicted movement of the outputs is least within a budget. Pure.

Groups overlap: q, k and v may be taken one by one, or together, or v with the output projection. What overlaps is one block, and
its covers are the ways to take every site of the block exactly once. For a price mu of one unit of cost

    block(mu) = min over covers of  sum over its groups of  min over options of  movement + mu cost

which is the Lagrangian of the budgeted problem: exact for the budget that it happens to spend, and mu is bisected until it spends
no more than there is. What is left over is then spent where it moves the outputs least (a knapsack's last items).
Source: Everett 1963; multiple-choice knapsack by its convex hull.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrcompile.interfaces import Array
from lrcompile.records import Group

_COVERS = 256  # of one block; more than these are not looked at
_LEAST = 1e-9  # what costs nothing more is worth any price
_STEPS = 80  # of bisection, over the logarithm of mu


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """What one group may be: option i moves the outputs by movements[i] and costs costs[i]."""

    movements: Array
    costs: Array


@dataclass(frozen=True, slots=True)
class Allocation:
    """The option of each group that is taken, by the group's name, and what all of them cost and move."""

    chosen: Mapping[str, int]
    cost: float
    movement: float


def covers_of(groups: Sequence[Group]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """For each block of overlapping groups every way to take each of its sites exactly once, as names of groups."""
    return tuple(tuple(_covers(block)) for block in _blocks(groups))


def _blocks(groups: Sequence[Group]) -> list[list[Group]]:
    block_of: dict[str, list[Group]] = {}
    for group in groups:
        merged = [group]
        for site in group.sites:
            other = block_of.get(site.name)
            if other is not None and other is not merged and not any(g in merged for g in other):
                merged = [*other, *merged]
        for member in merged:
            for site in member.sites:
                block_of[site.name] = merged
    found: dict[int, list[Group]] = {id(block): block for block in block_of.values()}
    return list(found.values())


def _covers(block: Sequence[Group]) -> Iterator[tuple[str, ...]]:
    sites = list(dict.fromkeys(s.name for g in block for s in g.sites))

    def extend(taken: frozenset[str], chosen: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        open_ = next((s for s in sites if s not in taken), None)
        if open_ is None:
            yield chosen
            return
        for group in block:
            members = {s.name for s in group.sites}
            if open_ in members and not members & taken:
                yield from extend(taken | members, (*chosen, group.name))

    return itertools.islice(extend(frozenset(), ()), _COVERS)


def cheapest(options: Mapping[str, Options], covers: Sequence[Sequence[Sequence[str]]]) -> Allocation:
    """The least that can be spent."""
    return _at_price(options, covers, None)


def allocate(
    options: Mapping[str, Options], covers: Sequence[Sequence[Sequence[str]]], limit: float
) -> Allocation | None:
    """The allocation of least movement that costs at most `limit`; None when even the cheapest costs more."""
    best = cheapest(options, covers)
    if best.cost > limit:
        return None
    free = _at_price(options, covers, 0.0)
    if free.cost <= limit:
        return free
    low, high = -60.0, 30.0  # exponents of e: prices below and above all that matter
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _at_price(options, covers, float(np.exp(middle)))
        if found.cost <= limit:
            high = middle
            if found.movement <= best.movement:
                best = found
        else:
            low = middle
    return _spend_rest(options, best, limit)


def _at_price(
    options: Mapping[str, Options], covers: Sequence[Sequence[Sequence[str]]], price: float | None
) -> Allocation:
    """price: of a unit of cost; None: cost alone counts."""
    best: dict[str, tuple[float, int]] = {}
    for name, o in options.items():
        value = o.costs if price is None else o.movements + price * o.costs
        index = int(np.argmin(value))
        best[name] = float(value[index]), index
    chosen: dict[str, int] = {}
    for ways in covers:
        way = min(ways, key=lambda w: sum(best[n][0] for n in w))
        chosen |= {n: best[n][1] for n in way}
    return _sum(options, chosen)


def _sum(options: Mapping[str, Options], chosen: Mapping[str, int]) -> Allocation:
    cost = sum(float(options[n].costs[i]) for n, i in chosen.items())
    movement = sum(float(options[n].movements[i]) for n, i in chosen.items())
    return Allocation(dict(chosen), cost, movement)


def _spend_rest(options: Mapping[str, Options], found: Allocation, limit: float) -> Allocation:
    """The better of two: what does most for its cost first, or what does most first; each as long as something fits."""
    ways = (_grown(options, found, limit, by_cost) for by_cost in (True, False))
    return min(ways, key=lambda a: a.movement)


def _grown(options: Mapping[str, Options], found: Allocation, limit: float, by_cost: bool) -> Allocation:
    """The best single change that still fits, again and again."""
    chosen, left = dict(found.chosen), limit - found.cost
    for _ in range(4 * len(chosen)):
        best, name, index = 0.0, "", -1
        for n, i in chosen.items():
            o = options[n]
            more = o.costs - o.costs[i]
            gains = np.where(more <= left, o.movements[i] - o.movements, 0.0)
            if by_cost:
                gains = np.where(gains > 0, gains / np.maximum(more, _LEAST), 0.0)
            j = int(np.argmax(gains))
            if gains[j] > best:
                best, name, index = float(gains[j]), n, j
        if index < 0:
            break
        left -= float(options[name].costs[index] - options[name].costs[chosen[name]])
        chosen[name] = index
    return _sum(options, chosen)
