"""Tucker-2 of a kernel: q of the channels' mixtures go into the window, r come out of it, 1x1 Conv on both sides.

    What = (U (x) I) A B,   U (c, q) 1x1,   A (q s, r) the window's kernel,   B (r, n) 1x1;    q c + q r s + r n parameters

U starts as HOSVD in the measure of the data; A and B are regression and truncation behind it (problem.py), so the error of every (q, r) is
known before anything is factorized. `factorize` then turns U and B against each other (HOOI: U from the kernel as B leaves it), up to
three times, as long as that makes the error smaller: it never exceeds the claim.
Sources: Kim et al. 2016; De Lathauwer et al. 2000. Refuses 1x1 windows, where both mixtures are one (conv-channel), and depthwise Conv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrcompile.interfaces import Array, CandidateOptions, Factors, StatisticsSource, Weights
from lrcompile.records import Candidate, Group, Refusal, Window
from lrcompile_passes.conv.chain import Chain, Stage, grid, points
from lrcompile_passes.conv.problem import (
    Part,
    Problem,
    Split,
    basis,
    bias_of,
    energy,
    leading,
    mean_block,
    problem_of,
    product,
    regression,
    truncation,
)

_SWEEPS = 3
_STEPS = 12  # ranks on each side that are looked at


class Tucker2(Chain):
    """`tucker2`."""

    def __init__(self) -> None:
        super().__init__("tucker2")

    def stages(self, window: Window, names: Sequence[str]) -> tuple[Stage, ...]:
        return (
            Stage("in", frozenset()),
            Stage("core", frozenset(range(window.rank))),
            Stage("out", frozenset()),
        )

    def refuses(self, window: Window, channels: int) -> Refusal | None:
        if window.size == 1:
            return Refusal("the window is a point: conv-channel factorizes what is a matrix")
        return super().refuses(window, channels)

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if options.full:
            return
        problem = problem_of(group, weights, statistics)
        inner = grid(problem.channels, None, _STEPS)
        key = ("tucker2-1", str(inner), *problem.key)
        found = weights.remember(key, lambda: _errors(problem, inner))
        outer = grid(problem.outputs, options.ranks, None if options.ranks else _STEPS)
        for i, q in enumerate(inner):
            for r in outer:
                if r > q * problem.window.size:
                    continue
                cost = self.cost(group, self._shapes(group, q, r), weights)
                movement = float(found["movements"][i, r]) if problem.reacts else None
                yield Candidate(
                    self.name, r, cost, problem.error(float(found["lost"][i, r])), len(group.sites) == 1,
                    (("in", q),), movement=movement,
                )  # fmt: skip

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        assert candidate.rank is not None
        return self._shapes(group, _inner(candidate), candidate.rank)

    def _shapes(self, group: Group, q: int, r: int) -> Mapping[str, tuple[int, ...]]:
        site = group.sites[0]
        window = site.window
        assert window is not None
        point = (1,) * window.rank
        return {
            "in": (window.group * q, site.K // window.size, *point),
            "core": (window.group * r, q, *window.kernel),
            "out": (site.N, r, *point),
        }

    def factorize(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, candidate: Candidate, seed: int
    ) -> Factors:  # fmt: skip
        q, r = _inner(candidate), candidate.rank
        assert r is not None
        problem = problem_of(group, weights, statistics)
        split = Split(problem.shape, (0,))
        made = [_fitted(part, split, q, r) for part in problem.parts]
        window = problem.window
        core = np.stack([t.A for t in made]).transpose(0, 2, 1)
        return {
            "in": points(np.stack([t.U for t in made]), window.rank),
            "core": core.reshape(len(made) * r, q, *window.kernel),
            "out": points(np.stack([t.B for t in made]), window.rank),
            **bias_of(group, weights, problem, [product(split, t.U, t.A @ t.B) for t in made]),
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Tucker:
    """U (c, q), A (q s, r), B (r, n). right: M right = A. held, kept: of tr W^T C W (less what truncation loses), of tr W^T C W G."""

    U: Array
    A: Array
    B: Array
    right: Array
    held: float
    kept: float


def _inner(candidate: Candidate) -> int:
    return int(dict(candidate.structure)["in"])


def _errors(problem: Problem, inner: Sequence[int]) -> Factors:
    """lost, movements (len(inner), n + 1): for each q at r = 0, 1, .., over all groups of channels."""
    split = Split(problem.shape, (0,))
    lost: Array = np.zeros((len(inner), problem.outputs + 1))
    movements: Array = np.zeros_like(lost)
    for part in problem.parts:
        fit = regression(part, split, leading(part, split))
        plain, felt = energy(part, False), energy(part, True)
        for i, q in enumerate(inner):
            B = fit.B[: q * problem.window.size]
            cut = truncation(part, B.T @ B)
            lost[i] += plain - float(np.vdot(B, B)) + cut.lost
            movements[i] += felt - cut.kept
    return {"lost": lost, "movements": np.maximum(movements, 0.0)}


def _fitted(part: Part, split: Split, q: int, r: int) -> _Tucker:
    """HOSVD, then HOOI while it helps by both measures."""
    best = _behind(part, split, leading(part, split)[:, :q], r)
    S = mean_block(part, split)
    for _ in range(_SWEEPS):
        seen = (part.W[split.index] @ best.right).reshape(split.mixed, -1)
        turned = _behind(part, split, basis(seen @ seen.T, S)[:, :q], r)
        if turned.held <= best.held or turned.kept <= best.kept:
            break
        best = turned
    return best


def _behind(part: Part, split: Split, U: Array, r: int) -> _Tucker:
    """The best A and B behind this U."""
    fit = regression(part, split, U)
    cut = truncation(part, fit.B.T @ fit.B)
    right, rows = cut.right[:, :r], cut.rows[:, :r]
    held = float(np.vdot(fit.B, fit.B)) - float(cut.lost[r])
    return _Tucker(U, fit.coefficients() @ right, rows.T, right, held, float(cut.kept[r]))
