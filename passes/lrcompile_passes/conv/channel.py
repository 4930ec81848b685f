"""Channel factorization of a kernel: it gives r channels, of which a 1x1 Conv makes the n of the original.

    W = A B,   A (K, r) a kernel of the window,   B (r, n) 1x1;    r (K + n) parameters, 2 r (K + n) FLOPs a position

By the truncation of problem.py with P = I, B the principal directions of what comes out: of E[y y^T] = W^T C W, centred where the bias
absorbs the mean. For a 1x1 Conv it is `svd` at every pixel. At full rank an orthogonal and a triangular factor, exact to rounding.
Source: Zhang et al. 2016, Accelerating very deep convolutional networks. Refuses nothing; for a depthwise Conv no rank is worth it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lrcompile.interfaces import Array, CandidateOptions, Factors, StatisticsSource, Weights
from lrcompile.records import Candidate, Group, Refusal, Window
from lrcompile_passes.conv.chain import Chain, Stage, by_channels, grid, points
from lrcompile_passes.conv.problem import Part, Problem, bias_of, problem_of, truncation

_FULL = (("form", "full"),)


class Channel(Chain):
    """`conv-channel`."""

    exact_at_full_rank = True

    def __init__(self) -> None:
        super().__init__("conv-channel")

    def stages(self, window: Window, names: Sequence[str]) -> tuple[Stage, ...]:
        return Stage("window", frozenset(range(window.rank))), Stage("out", frozenset())

    def refuses(self, window: Window, channels: int) -> Refusal | None:
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        site = group.sites[0]
        assert site.window is not None
        full = min(site.K, site.N // site.window.group)
        if options.full:
            cost = self.cost(group, self._shapes(group, full), weights)
            yield Candidate(self.name, full, cost, 0.0, bound=False, structure=_FULL)
            return
        problem = problem_of(group, weights, statistics)
        found = weights.remember(("conv-channel-1", *problem.key), lambda: _errors(problem))
        for rank in grid(full, options.ranks):
            cost = self.cost(group, self._shapes(group, rank), weights)
            movement = float(found["movements"][rank]) if problem.reacts else None
            yield Candidate(
                self.name,
                rank,
                cost,
                problem.error(float(found["lost"][rank])),
                len(group.sites) == 1,
                movement=movement,
            )

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        assert candidate.rank is not None
        return self._shapes(group, candidate.rank)

    def _shapes(self, group: Group, rank: int) -> Mapping[str, tuple[int, ...]]:
        site = group.sites[0]
        window = site.window
        assert window is not None
        return {
            "window": (window.group * rank, site.K // window.size, *window.kernel),
            "out": (site.N, rank, *(1,) * window.rank),
        }

    def factorize(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, candidate: Candidate, seed: int
    ) -> Factors:  # fmt: skip
        rank = candidate.rank
        assert rank is not None
        window = group.sites[0].window
        assert window is not None
        if candidate.structure == _FULL:
            halves = [_full_rank(W) for W in np.split(weights.matrix(group.sites[0]), window.group, axis=1)]
            biases: dict[str, Array] = {}
        else:
            problem = problem_of(group, weights, statistics)
            halves = [_halves(part, rank) for part in problem.parts]
            biases = bias_of(group, weights, problem, [A @ B for A, B in halves])
        return {
            "window": by_channels(group, np.stack([A for A, _ in halves])),
            "out": points(np.stack([B for _, B in halves]), window.rank),
            **biases,
        }


def _errors(problem: Problem) -> Factors:
    """lost, movements: at rank 0, 1, .., n, over all groups of channels."""
    found = [truncation(p, p.W.T @ p.weighed()) for p in problem.parts]
    movements = np.sum([t.kept[-1] - t.kept for t in found], axis=0)
    return {"lost": np.sum([t.lost for t in found], axis=0), "movements": np.maximum(movements, 0.0)}


def _halves(part: Part, rank: int) -> tuple[Array, Array]:
    found = truncation(part, part.W.T @ part.weighed())
    return part.W @ found.right[:, :rank], found.rows[:, :rank].T


def _full_rank(W: Array) -> tuple[Array, Array]:
    """W = A B exactly, the inner dimension min(K, n)."""
    if W.shape[0] >= W.shape[1]:
        q, r = np.linalg.qr(W)
        return q, r
    q, r = np.linalg.qr(W.T)
    return r.T, q.T
