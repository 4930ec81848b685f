"""Canonical polyadic form of a kernel: r channels, each one seen along one axis after the other.

    What = sum_i a_i (x) b1_i (x) b2_i .. (x) d_i,   a (c, r) 1x1,  b1 (k1, r), b2 (k2, r) .. depthwise,  d (n, r) 1x1

r (c + k1 + k2 + .. + n) parameters. Alternating least squares in the measure of the data, c by the mean block of its second moment, n by
the outputs' reaction: linear maps of one mode leave a CP form a CP form. Then d anew by regression through all of C (problem.py).

Best approximations of a rank need not exist: components that cancel each other may grow without limit (degeneracy; de Silva and Lim 2008,
Phan et al. 2020). Here they cannot: a, b1, b2 .. have unit columns and d is ridged, which minimises |T - That|^2 + t |d|^2 and so
keeps |d|^2 <= |T|^2 / t. Several starts, the first from the leading singular vectors; the best goes on. The four parts get equal
column norms, for 16-bit storage.

Each rank is a fit of its own, so only a few are looked at. On trained kernels it is the nearest form at equal parameters (docs/conv.md).
Needs no data: without it, it is the kernel itself that is approximated.
Source: Lebedev et al. 2015. Refuses windows of one axis or a point, and depthwise Conv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import scipy.linalg

from lrcompile.interfaces import Array, CandidateOptions, Factors, StatisticsSource, Weights
from lrcompile.records import Candidate, Group, Refusal, Window
from lrcompile_passes.conv.chain import Chain, Stage, points
from lrcompile_passes.conv.problem import Part, Problem, Split, basis, bias_of, mean_block, problem_of

_SHARES = (0.25, 0.4, 0.6, 0.8)  # of the kernel's parameters: a fit each
_STARTS = 2
_TRIAL, _SWEEPS = 5, 30
_RIDGE = 1e-4  # t, relative to the mean squared norm of the components that d weighs
_ENOUGH = 1e-5  # a sweep that gains less of |T|^2 is the last


class Cp(Chain):
    """`cp`."""

    needs_data = False

    def __init__(self) -> None:
        super().__init__("cp")

    def stages(self, window: Window, names: Sequence[str]) -> tuple[Stage, ...]:
        wide = [i for i, k in enumerate(window.kernel) if k > 1]
        flat = frozenset(range(window.rank)) - set(wide)  # strides and padding there, too, are somebody's
        along = [
            Stage(f"axis{i}", frozenset({i}) | (flat if i == wide[0] else set()), depthwise=True)
            for i in wide
        ]
        return Stage("in", frozenset()), *along, Stage("out", frozenset())

    def refuses(self, window: Window, channels: int) -> Refusal | None:
        if sum(k > 1 for k in window.kernel) < 2:
            return Refusal("the window has no two axes to be taken apart")
        return super().refuses(window, channels)

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if options.full:
            return
        site = group.sites[0]
        problem = problem_of(group, weights, statistics)
        one = len(problem.parts) * (
            problem.channels + sum(k for k in problem.window.kernel if k > 1) + problem.outputs
        )
        ranks = options.ranks or sorted({max(1, round(share * site.elements / one)) for share in _SHARES})
        for rank in ranks:
            found = _remembered(problem, weights, rank, 0)
            lost, felt = (float(found[n][0]) for n in ("lost", "movement"))
            cost = self.cost(group, self._shapes(group, rank), weights)
            movement = felt if problem.reacts else None
            yield Candidate(self.name, rank, cost, problem.error(lost), bound=False, movement=movement)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        assert candidate.rank is not None
        return self._shapes(group, candidate.rank)

    def _shapes(self, group: Group, rank: int) -> Mapping[str, tuple[int, ...]]:
        site = group.sites[0]
        window = site.window
        assert window is not None
        point = (1,) * window.rank
        along = [(i, k) for i, k in enumerate(window.kernel) if k > 1]
        return {
            "in": (window.group * rank, site.K // window.size, *point),
            **{f"axis{i}": (window.group * rank, 1, *window.along({i}).kernel) for i, _ in along},
            "out": (site.N, rank, *point),
        }

    def factorize(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, candidate: Candidate, seed: int
    ) -> Factors:  # fmt: skip
        rank = candidate.rank
        assert rank is not None
        problem = problem_of(group, weights, statistics)
        found = _remembered(problem, weights, rank, seed)
        shapes = self._shapes(group, rank)
        along = {
            n: np.swapaxes(found[n], 1, 2).reshape(shapes[n]) for n in shapes if n.startswith("axis")
        }  # (groups, k, r) -> (groups * r, 1, .., k, ..)
        made = [
            _columns([found[n][i] for n in ("in", *along)]) @ found["out"][i].T
            for i in range(len(problem.parts))
        ]
        rank_of_window = problem.window.rank
        return {
            "in": points(found["in"], rank_of_window),
            **along,
            "out": points(np.swapaxes(found["out"], 1, 2), rank_of_window),
            **bias_of(group, weights, problem, made),
        }


def _remembered(problem: Problem, weights: Weights, rank: int, seed: int) -> Factors:
    key = ("cp-1", str(rank), str(seed), *problem.key)
    return weights.remember(key, lambda: _all_parts(problem, rank, seed))


def _all_parts(problem: Problem, rank: int, seed: int) -> Factors:
    """in (groups, c, r), axisI (groups, k, r), out (groups, n, r); lost, movement: over all groups."""
    names = ["in", *(f"axis{i}" for i, k in enumerate(problem.window.kernel) if k > 1), "out"]
    fits = [_fitted(problem, part, rank, (seed, i)) for i, part in enumerate(problem.parts)]
    lost = movement = 0.0
    for part, modes in zip(problem.parts, fits, strict=True):
        D = part.W - _columns(modes[:-1]) @ modes[-1].T
        CD = D if part.C is None else part.C @ D
        gram = D.T @ CD
        lost += float(np.trace(gram))
        movement += float(np.vdot(part.R, gram @ part.R)) if part.R is not None else 0.0
    stacked = {n: np.stack([fit[i] for fit in fits]) for i, n in enumerate(names)}
    return {**stacked, "lost": np.array([lost]), "movement": np.array([movement])}


def _columns(modes: Sequence[Array]) -> Array:
    """(K, r): the products of a, b1, b2 .. at each place of the window, in the order of W's rows."""
    made = modes[0]
    for mode in modes[1:]:
        made = (made[:, None, :] * mode).reshape(-1, mode.shape[1])
    return made


def _fitted(problem: Problem, part: Part, rank: int, seed: tuple[int, int]) -> list[Array]:
    """The modes a, b1, b2 .., d."""
    S = mean_block(part, Split(problem.shape, (0,)))
    T = part.reacting(np.tensordot(S.T, part.W.reshape(problem.channels, -1), 1).reshape(-1, problem.outputs))
    tensor = T.reshape(problem.channels, *(k for k in problem.window.kernel if k > 1), problem.outputs)
    trials = [
        alternated(tensor, start(tensor, rank, (*seed, i), spectral=i == 0), _TRIAL) for i in range(_STARTS)
    ]
    modes, _ = alternated(tensor, min(trials, key=lambda found: found[1])[0], _SWEEPS)
    modes[0] = scipy.linalg.solve_triangular(S, modes[0], lower=True, trans="T")
    if part.R is not None:
        modes[-1] = scipy.linalg.solve_triangular(part.R, modes[-1], lower=True, trans="T")
    return _balanced(_regressed(part, modes))


def start(tensor: Array, rank: int, seed: tuple[int, ...], *, spectral: bool) -> list[Array]:
    """Unit columns: the leading singular vectors of each unfolding where they last, then random ones."""
    draw = np.random.default_rng(seed)
    modes = []
    for axis, size in enumerate(tensor.shape):
        mode = draw.standard_normal((size, rank))
        if spectral:
            unfolded = np.moveaxis(tensor, axis, 0).reshape(size, -1)
            vectors = basis(unfolded @ unfolded.T, np.eye(size))[:, :rank]
            mode[:, : vectors.shape[1]] = vectors
        modes.append(mode / np.linalg.norm(mode, axis=0))
    return modes


def alternated(tensor: Array, modes: Sequence[Array], sweeps: int) -> tuple[list[Array], float]:
    """The modes after so many rounds of least squares, and |T - That|^2 + t |d|^2. All but the last have unit columns."""
    modes = list(modes)
    K, n = tensor.size // tensor.shape[-1], tensor.shape[-1]
    T = tensor.reshape(K, n)
    whole = float(np.vdot(T, T))
    last = np.inf
    for _ in range(sweeps):
        seen = (T @ modes[-1]).reshape(*tensor.shape[:-1], -1)  # T with d contracted, a column a component
        for axis in range(len(modes) - 1):
            moment = _contracted(seen, modes[:-1], axis)
            mode = _solved(_gram(modes, axis), moment)
            modes[axis] = mode / np.maximum(np.linalg.norm(mode, axis=0), np.finfo(np.float64).tiny)
        moment = T.T @ _columns(modes[:-1])
        gram = _gram(modes, len(modes) - 1)
        modes[-1] = _solved(gram, moment)
        size = float(np.vdot(modes[-1], modes[-1])) * _RIDGE * float(np.trace(gram)) / len(gram)
        value = (
            whole
            - 2 * float(np.vdot(moment, modes[-1]))
            + float(np.sum(gram * (modes[-1].T @ modes[-1])))
            + size
        )
        if last - value < _ENOUGH * whole:
            break
        last = value
    return modes, value


def _contracted(seen: Array, modes: Sequence[Array], axis: int) -> Array:
    """(size of axis, r): the other modes contracted too, component by component."""
    for other in reversed(range(len(modes))):
        if other != axis:
            shape = [1] * (seen.ndim - 1) + [seen.shape[-1]]
            shape[other] = modes[other].shape[0]
            seen = np.sum(seen * modes[other].reshape(shape), axis=other, keepdims=True)
    return seen.reshape(modes[axis].shape)


def _gram(modes: Sequence[Array], axis: int) -> Array:
    """(r, r): the inner products of the components without this mode."""
    grams = [m.T @ m for i, m in enumerate(modes) if i != axis]
    found: Array = np.prod(grams, axis=0)
    return found


def _solved(gram: Array, moment: Array) -> Array:
    ridged = gram.copy()
    ridged[np.diag_indices(len(gram))] += _RIDGE * max(
        float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny
    )
    made: Array = scipy.linalg.solve(ridged, moment.T, assume_a="pos", check_finite=False).T
    return made


def _regressed(part: Part, modes: list[Array]) -> list[Array]:
    """d anew, the best behind the other modes by all of C, as long as that is better in spite of its ridge."""
    if part.C is None:
        return modes
    P = _columns(modes[:-1])
    CP = part.C @ P
    moment, gram = part.W.T @ CP, P.T @ CP
    d = _solved(gram, moment)

    def gain(out: Array) -> float:
        return 2 * float(np.vdot(moment, out)) - float(np.sum(gram * (out.T @ out)))

    return [*modes[:-1], d] if gain(d) > gain(modes[-1]) else modes


def _balanced(modes: Sequence[Array]) -> list[Array]:
    """Equal norms of each component's parts."""
    norms = np.maximum([np.linalg.norm(m, axis=0) for m in modes], np.finfo(np.float64).tiny)
    each = np.exp(np.mean(np.log(norms), axis=0))
    alive = np.all(norms > 1e-150, axis=0)
    return [np.where(alive, m / norm * each, 0.0) for m, norm in zip(modes, norms, strict=True)]
