"""Tables as tensor trains: an id is written in digits, and its row is a product of one small matrix for each of them.

    row = G1[i1] G2[i2] .. Gk[ik],    id = (i1 n2 + i2) n3 + i3,    G_j[i] (r_{j-1}, d_j r_j),   the d_j multiply up to D

V is padded to n1 n2 n3; digits come by Div and Mod, matrices by Gather. A core meets what is on its left as a batched product,
(.., d_1 .. d_{j-1}, r_{j-1}) times (.., r_{j-1}, d_j r_j): 2 d_1 .. d_j r_{j-1} r_j FLOPs an id. Two forms:

    cloud    rows are points: three gathered cores of d = 1, then B (r_3, D), as a low-rank table has one
    matrix   three cores, each with a share of the columns

Which ids share digits decides what a train can say, so they may be put in order first: `bisection` halves the rows again and again along
their main direction, so that like rows share leading digits. That takes an int table, the place of every id; it also counts negative ids
from the end, and leaves ids outside of the table to the runtime, as the original Gather does. For ids as they are (`natural`) such a table
is made when the model is loaded, and counts as bytes too.

Rows are multiplied by s, the root of how often they are asked for, decomposed, and divided by it (`scale`): TT-SVD minimises what lookups
see, and loses at most what all cuts lose together. Ranks lose alike at every cut, within the parameters of a pair of the candidate's rank.

Sources: Oseledets, Tensor-train decomposition, 2011 (TT-SVD and its bound); Hrinchuk et al., 2020 (TT embeddings); Novikov et al., 2021 (a
table as a point cloud). Refuses what is no table, and heads tied to one: a product with all rows contracts all cores, which takes
more than the dense one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import scipy.linalg

from lrcompile.interfaces import (
    Array,
    Call,
    CandidateOptions,
    Constant,
    Factorization,
    Factors,
    Op,
    StatisticsSource,
    Weights,
)
from lrcompile.records import Candidate, Cost, Group, Refusal
from lrcompile.spectra import eigh
from lrcompile.weighing import frequencies, known_by

_FORMS = (("cloud", "natural"), ("cloud", "bisection"), ("matrix", "bisection"))
_DIGITS = 3
_INDEX_BYTES = 4
_OPSET = 14  # before it, Reshape cannot give a dimension of nothing: ids may be none
_LEAF = 16  # rows that are only sorted along their main direction
_POWER_STEPS = 8
# A row is scaled as if it were asked for at least this share of what is usual: its scale must fit float16.
_RAREST = 1e-6
# A claim covers the rounding of float64 in the eigenproblems, whose error is relative to the largest eigenvalue.
_CLAIM_SLACK = 1e-7


@dataclass(frozen=True, slots=True)
class _Core:
    """n: the base of its digit, 0 where it has none. d: its share of the columns. before, after: the ranks on both sides."""

    n: int
    d: int
    before: int
    after: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored: a matrix for each value of the digit; the first one lies as the product starts."""
        matrix = (self.d, self.after) if self.before == 0 else (self.before, self.d * self.after)
        return (self.n, *matrix) if self.n else matrix


class TableTrain:
    """Factors: core.j, scale (V, 1, 1), and order (V,), the place of each id, where ids are ordered."""

    name = "tt-table"
    needs_data = True
    only_by_name = False
    exact_at_full_rank = False
    least_opset = _OPSET

    def serves(self, group: Group) -> Refusal | None:
        if not group.shares_weight or any(s.kind != "lookup" for s in group.sites):
            return Refusal("tt-table is for lookups only: a product with all rows would contract all cores")
        if any(group.transposed):
            return Refusal("tt-table keeps a table by rows, and one of its readers wants the columns")
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if options.full or weights.opset < self.least_opset:
            return
        V, D = group.sites[0].K, group.sites[0].N
        full = min(V, D)
        steps = range(options.multiple, full + 1, options.multiple)
        for rank in options.ranks if options.ranks is not None else steps:
            for form, order in _FORMS if 1 <= rank <= full else ():
                tails = _tails(group, weights, statistics, form, order)
                found = _ranks(form, V, D, tails, rank * (V + D) - V)
                if found is None:
                    continue
                ranks, error = found
                structure = (("form", form), ("order", order), ("ranks", "x".join(map(str, ranks))))
                cost = _cost(group, weights, _cores(form, V, D, ranks))
                bound = group.kind == "alone"  # of several readers the error is their mean
                yield Candidate(self.name, rank, cost, error + _CLAIM_SLACK, bound, structure)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        V = group.sites[0].K
        found = {f"core.{j}": core.shape for j, core in enumerate(_cores_of(group, candidate))}
        ordered = dict(candidate.structure)["order"] != "natural"
        order = {"order": np.arange(V, dtype=np.int32)[::-1]} if ordered else {}
        return {**found, "scale": (V, 1, 1), **order}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        chosen = dict(candidate.structure)
        scaled, s = _scaled(group, weights, statistics)
        ids = _ordered(group, weights, statistics, str(chosen["order"]))
        cores = _cores_of(group, candidate)
        arrays = _tt_svd(_tensor(scaled[ids], cores), cores)
        factors = {
            f"core.{j}": a.reshape(c.shape) for j, (a, c) in enumerate(zip(arrays, cores, strict=True))
        }
        factors["scale"] = 1.0 / s[:, None, None]
        if chosen["order"] != "natural":
            factors["order"] = np.argsort(ids).astype(np.int32)
        return factors

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        V, D = group.sites[0].K, group.sites[0].N
        names = _names(factors)
        rows = factors[names[0]].astype(np.float64)  # (P, c, r), P: all values of the digits so far
        for name, after in zip(names[1:], _afters(factors), strict=True):
            core = factors[name].astype(np.float64)
            core = core if core.ndim == 3 else core[None]
            P, c, r = rows.shape
            made = rows.reshape(P * c, r) @ core.transpose(1, 0, 2).reshape(r, -1)
            rows = made.reshape(P, c, len(core), -1).swapaxes(1, 2).reshape(P * len(core), -1, after)
        order = factors["order"] if "order" in factors else slice(V)
        table = rows.reshape(-1, D)[order] * factors["scale"].astype(np.float64).reshape(V, 1)
        return {(s.name, "weight"): table for s in group.sites}

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return {}

    def emit(self, op: Op, call: Call) -> ir.Value:
        if "order" in call.shapes:
            order = call.factors["order"]
        else:
            V = call.shapes["scale"][0]
            order = op("Range", *(op.constant(np.asarray(n, np.int32)) for n in (0, V, 1)), name="ids")
        flat = op("Reshape", call.x, op.constant(np.array([-1], np.int64)), name="flat")
        place = op("Gather", order, flat, name="place", axis=0)
        scale = op("Gather", call.factors["scale"], flat, name="scale", axis=0)
        cores = []
        for name, below in zip(_names(call.shapes), _places(call.shapes), strict=True):
            core = call.factors[name]
            if below:  # as many ids share this digit and those above it
                digit = place
                if below > 1:
                    count = op.constant(np.asarray(below, np.int32))
                    digit = op("Div", place, count, name=f"digit_{name}")
                    place = op("Mod", place, count, name=f"below_{name}")
                core = op("Gather", core, digit, name=name, axis=0)
            cores.append(core)
        cores[0] = op("Mul", cores[0], scale, name="scaled")
        return _product(op, call, cores)


def _product(op: Op, call: Call, cores: Sequence[ir.Value]) -> ir.Value:
    """The cores of every id multiplied, (ids, d_1, r_1) times (ids, r_1, d_2 r_2) and so on, in the shape of the ids and D."""
    y, columns = cores[0], call.shapes["core.0"][-2]
    for j, (core, after) in enumerate(zip(cores[1:], _afters(call.shapes), strict=True), 1):
        y = op("MatMul", y, core, name=f"product.{j}")
        d = call.shapes[f"core.{j}"][-1] // after
        columns *= d
        if d > 1 and j + 1 < len(cores):
            y = op("Reshape", y, op.constant(np.array([-1, columns, after], np.int64)), name=f"split.{j}")
    shape = op("Concat", op("Shape", call.x), op.constant(np.array([columns], np.int64)), axis=0)
    return op("Reshape", y, shape, name="rows", allowzero=1)


def _names(factors: Mapping[str, object]) -> list[str]:
    """core.0, core.1, .."""
    return [f"core.{j}" for j in range(sum(n.startswith("core.") for n in factors))]


def _places(shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """What a digit of each core counts: the product of the bases behind it; 0 where the core has no digit."""
    bases = [shapes[n][0] for n in _names(shapes) if len(shapes[n]) == 3]
    places = [math.prod(bases[j + 1 :]) for j in range(len(bases))]
    return places + [0] * (len(_names(shapes)) - len(bases))


def _afters(factors: Mapping[str, Array] | Mapping[str, tuple[int, ...]]) -> list[int]:
    """The rank behind each core but the first: what the next one begins with, 1 behind the last."""
    shapes = [getattr(factors[n], "shape", factors[n]) for n in _names(factors)]
    return [*(shape[-2] for shape in shapes[2:]), 1]


def _modes(form: str, V: int, D: int) -> list[tuple[int, int]]:
    """n_j and d_j of every core."""
    base = next(n for n in range(1, V + 1) if n**_DIGITS >= V)
    digits = [base] * _DIGITS
    for j in range(_DIGITS):  # as little padding as near-equal bases allow
        while digits[j] > 1 and math.prod(digits) // digits[j] * (digits[j] - 1) >= V:
            digits[j] -= 1
    if form == "cloud":
        return [*((n, 1) for n in digits), (0, D)]
    return list(zip(digits, _split(D, _DIGITS), strict=True))


def _split(D: int, parts: int) -> tuple[int, ...]:
    """D as a product of factors as equal as its divisors allow, rising."""
    if parts == 1:
        return (D,)
    first = max(d for d in range(1, D + 1) if d**parts <= D and D % d == 0)
    return (first, *_split(D // first, parts - 1))


def _cores(form: str, V: int, D: int, ranks: Sequence[int]) -> list[_Core]:
    sides = zip([0, *ranks], [*ranks, 1], strict=True)
    return [_Core(n, d, a, b) for (n, d), (a, b) in zip(_modes(form, V, D), sides, strict=True)]


def _cores_of(group: Group, candidate: Candidate) -> list[_Core]:
    chosen = {name: str(value) for name, value in candidate.structure}
    ranks = [int(r) for r in chosen["ranks"].split("x")]
    return _cores(chosen["form"], group.sites[0].K, group.sites[0].N, ranks)


def _cost(group: Group, weights: Weights, cores: Sequence[_Core]) -> Cost:
    """Of cores, scale and the int table."""
    V = group.sites[0].K
    parameters = sum(math.prod(c.shape) for c in cores) + V
    columns, flops = cores[0].d, 0
    for core in cores[1:]:
        columns *= core.d
        flops += 2 * columns * core.before * core.after
    size = parameters * weights.itemsize(group.sites[0]) + _INDEX_BYTES * V
    return Cost(parameters, size, flops * len(group.sites))


def _ranks(
    form: str, V: int, D: int, tails: Sequence[Array], budget: int
) -> tuple[tuple[int, ...], float] | None:
    """Ranks that lose about alike at every cut, within so many parameters, and the bound of their error; None if none fit.

    tails: of every cut, what is lost (relative, squared) at rank 0, 1, ..
    """
    modes = _modes(form, V, D)

    def within(share: float) -> tuple[int, ...]:
        ranks = [1]
        for (n, d), lost in zip(modes, tails, strict=False):
            found = int(np.searchsorted(-lost, -share))
            ranks.append(max(1, min(found, ranks[-1] * max(n, 1) * d)))
        return tuple(ranks[1:])

    def size(ranks: tuple[int, ...]) -> int:
        return sum(math.prod(c.shape) for c in _cores(form, V, D, ranks))

    if size(within(1.0)) > budget:
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if size(within(middle)) <= budget else (middle, high)
    best = within(high)
    return best, math.sqrt(sum(float(t[min(r, len(t) - 1)]) for t, r in zip(tails, best, strict=True)))


def _tensor(rows: Array, cores: Sequence[_Core]) -> Array:
    """(n_1 d_1, n_2 d_2, ..) of ordered rows (V, D), with zeros up to the product of the digits' bases."""
    bases = [max(c.n, 1) for c in cores]
    padded = np.zeros((math.prod(bases), rows.shape[1]))
    padded[: len(rows)] = rows
    k = len(cores)
    axes = [axis for j in range(k) for axis in (j, k + j)]
    tensor = padded.reshape([*bases, *(c.d for c in cores)]).transpose(axes)
    return tensor.reshape([max(c.n, 1) * c.d for c in cores])


def _tt_svd(tensor: Array, cores: Sequence[_Core]) -> list[Array]:
    """Cores (r_{j-1}, n_j, d_j r_j) but for the order of axes: from left to right the leading left singular vectors of what is left."""
    made = []
    rest = tensor.reshape(1, -1)
    for core, size in zip(cores, tensor.shape, strict=True):
        before = len(rest)
        rest = rest.reshape(before * size, -1)
        left = rest
        if core is not cores[-1]:
            left = _leading(rest, core.after)
            rest = left.T @ rest
        cube = left.reshape(before, max(core.n, 1), core.d * left.shape[1])
        made.append(cube.swapaxes(0, 1).reshape(core.shape))
    return made


def _leading(M: Array, rank: int) -> Array:
    """(m, rank): an orthonormal basis of the leading left singular vectors."""
    if len(M) <= M.shape[1]:
        return eigh(M @ M.T)[1][:, :rank]
    left: Array = scipy.linalg.qr(M @ eigh(M.T @ M)[1][:, :rank], mode="economic")[0]
    return left


def _tails(
    group: Group, weights: Weights, statistics: StatisticsSource | None, form: str, order: str
) -> list[Array]:
    """What each cut loses at every rank, relative to the whole, squared."""

    def compute() -> Factors:
        scaled, _ = _scaled(group, weights, statistics)
        V, D = scaled.shape
        modes = _modes(form, V, D)
        cores = [_Core(n, d, 0, 1) for n, d in modes]
        tensor = _tensor(scaled[_ordered(group, weights, statistics, order)], cores)
        whole = float(
            frequencies(group, statistics) @ np.einsum("ij,ij->i", *[weights.matrix(group.sites[0])] * 2)
        )
        found = {}
        for j in range(1, tensor.ndim):
            M = tensor.reshape(math.prod(tensor.shape[:j]), -1)
            energy = eigh(M @ M.T if len(M) <= M.shape[1] else M.T @ M)[0]
            lost = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
            found[f"tail.{j}"] = lost / (V * whole) if whole > 0 else lost
        return found

    kept = weights.remember((f"tt-tails-1-{form}-{order}", *known_by(group, weights, statistics)), compute)
    return [kept[f"tail.{j}"] for j in range(1, len(kept) + 1)]


def _ordered(group: Group, weights: Weights, statistics: StatisticsSource | None, order: str) -> Array:
    """(V,): the ids in the order in which they get their digits."""
    if order == "natural":
        return np.arange(group.sites[0].K)
    key = ("tt-bisection-1", *known_by(group, weights, statistics))
    return weights.remember(key, lambda: {"ids": _bisection(_scaled(group, weights, statistics)[0])})["ids"]


def _bisection(rows: Array) -> Array:
    """Rows sorted along their main direction and halved, and each half again: (V,) int64."""
    done: list[Array] = []
    pending = [np.arange(len(rows))]
    while pending:
        part = pending.pop()
        centred = rows[part] - rows[part].mean(axis=0)
        along = centred[np.einsum("ij,ij->i", centred, centred).argmax()]
        for _ in range(_POWER_STEPS):
            along = centred.T @ (centred @ along)
            along /= max(float(np.linalg.norm(along)), np.finfo(np.float64).tiny)
        part = part[np.argsort(centred @ along, kind="stable")]
        if len(part) <= _LEAF:
            done.append(part)
        else:
            pending += [part[len(part) // 2 :], part[: len(part) // 2]]
    return np.concatenate(done)


def _scaled(group: Group, weights: Weights, statistics: StatisticsSource | None) -> tuple[Array, Array]:
    """The rows by the root of how often they are asked for, relative to once in V, and these roots (V,)."""
    W, f = weights.matrix(group.sites[0]), frequencies(group, statistics)
    s = np.sqrt(np.maximum(f * len(W), _RAREST))
    return W * s[:, None], s


factorizations: tuple[Factorization, ...] = (TableTrain(),)
