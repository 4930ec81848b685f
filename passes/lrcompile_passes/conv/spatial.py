"""Spatial factorization of a kernel: one axis of the window first, the others behind it, r channels between.

    What = (U (x) I) M,   U (c k, r) along the first axis,   M (r s / k, n) along the others;    r (c k + n s / k) parameters

U by HOSVD in the measure of the data, M by regression (problem.py): the second stage is the best that there is behind the first, so the
error is known for every rank. Either outer axis may come first (structure ``first``); with strides the order decides FLOPs too.
Source: Jaderberg et al. 2014. Refuses windows that are a point along all axes but one, and depthwise Conv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from lrcompile.interfaces import Array, CandidateOptions, Factors, StatisticsSource, Weights
from lrcompile.records import Candidate, Group, Refusal, Window
from lrcompile_passes.conv.chain import Chain, Stage, grid
from lrcompile_passes.conv.problem import (
    Problem,
    Split,
    bias_of,
    energy,
    leading,
    problem_of,
    product,
    regression,
)


class Spatial(Chain):
    """`conv-spatial`."""

    def __init__(self) -> None:
        super().__init__("conv-spatial")

    def stages(self, window: Window, names: Sequence[str]) -> tuple[Stage, ...]:
        first = next(int(n.removeprefix("axis")) for n in names if n.startswith("axis"))
        return Stage(f"axis{first}", frozenset({first})), Stage(
            "rest", frozenset(range(window.rank)) - {first}
        )

    def refuses(self, window: Window, channels: int) -> Refusal | None:
        if sum(k > 1 for k in window.kernel) < 2:
            return Refusal("the window has no two axes to be taken one after the other")
        return super().refuses(window, channels)

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if options.full:
            return
        problem = problem_of(group, weights, statistics)
        kernel = problem.window.kernel
        wide = [axis for axis, k in enumerate(kernel) if k > 1]
        for first in (wide[0], wide[-1]):
            key = ("conv-spatial-1", str(first), *problem.key)
            found = weights.remember(key, partial(_errors, problem, first))
            full = min(
                problem.channels * kernel[first], problem.outputs * (problem.window.size // kernel[first])
            )
            for rank in grid(full, options.ranks):
                cost = self.cost(group, self._shapes(group, rank, first), weights)
                movement = float(found["movements"][rank]) if problem.reacts else None
                yield Candidate(
                    self.name, rank, cost, problem.error(float(found["lost"][rank])), len(group.sites) == 1,
                    (("first", first),), movement=movement,
                )  # fmt: skip

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        assert candidate.rank is not None
        return self._shapes(group, candidate.rank, _first(candidate))

    def _shapes(self, group: Group, rank: int, first: int) -> Mapping[str, tuple[int, ...]]:
        site = group.sites[0]
        window = site.window
        assert window is not None
        before, after = window.along({first}), window.along(set(range(window.rank)) - {first})
        return {
            f"axis{first}": (window.group * rank, site.K // window.size, *before.kernel),
            "rest": (site.N, rank, *after.kernel),
        }

    def factorize(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, candidate: Candidate, seed: int
    ) -> Factors:  # fmt: skip
        rank, first = candidate.rank, _first(candidate)
        assert rank is not None
        problem = problem_of(group, weights, statistics)
        split = _split(problem, first)
        made = []
        for part in problem.parts:
            U = leading(part, split)[:, :rank]
            made.append((U, regression(part, split, U).coefficients()))
        shapes = self._shapes(group, rank, first)
        before = [U.T.reshape(rank, *shapes[f"axis{first}"][1:]) for U, _ in made]
        after = [M.T.reshape(problem.outputs, *shapes["rest"][1:]) for _, M in made]
        return {
            f"axis{first}": np.concatenate(before),
            "rest": np.concatenate(after),
            **bias_of(group, weights, problem, [product(split, U, M) for U, M in made]),
        }


def _first(candidate: Candidate) -> int:
    return int(dict(candidate.structure)["first"])


def _split(problem: Problem, first: int) -> Split:
    return Split(problem.shape, (0, 1 + first))


def _errors(problem: Problem, first: int) -> Factors:
    """lost, movements: at rank 0, 1, .., over all groups of channels."""
    split = _split(problem, first)
    full = min(split.mixed, problem.outputs * (problem.window.size // problem.window.kernel[first]))
    lost: Array = np.zeros(full + 1)
    movements: Array = np.zeros(full + 1)
    for part in problem.parts:
        B = regression(part, split, leading(part, split)[:, :full]).B
        lost += energy(part, False) - _held(B, full)
        movements += energy(part, True) - _held(part.reacting(B), full)
    return {"lost": lost, "movements": np.maximum(movements, 0.0)}


def _held(B: Array, full: int) -> Array:
    """||B||^2 of the rows that belong to the first 0, 1, .. columns of U."""
    return np.concatenate([[0.0], np.cumsum(np.sum(B.reshape(full, -1) ** 2, axis=1))])
