"""Tables in groups: rows that are asked for often keep a high rank, or stay as they are; rare ones share few directions.

    rows by falling frequency f, in groups g of V/2^j .. V/4, V/2 rows       order: the place of every id in the groups
    W[ids of g] ~ A_g B_g,   A_g (V_g, r_g),  B_g (r_g, D)                    or the rows as they are, where that costs no more

B_g holds the leading eigenvectors of W_g^T diag(f) W_g, A_g = W_g B_g^T. Ranks minimise the sum of what is lost, sum_i f_i |w_i - what_i|^2,
within the parameters of a pair of the candidate's rank, r (V + D): on the lower convex hull of every group's curve (its ranks, and the
rows as they are at the end), steepest piece first. Neighbours that stay as they are become one.

    row = sum over g of Gather(A_g, Clip(place - start_g, 0, V_g + 1)) B_g,       place = Gather(order, ids)

A_g has a row of zeros at both ends, which every id of another group meets: no shape depends on the data, and the one int table takes
ids as Gather does: negative ones count from the end, others outside the table are the runtime's error. 2 D sum r_g FLOPs an id.
Gathering a basis for each id instead would move r D numbers an id. A tied head reads the same factors the other way,
logits = Gather(Concat(x B_g^T A_g^T), order). It counts every row, with C = E[x x^T], so both readers together weigh an error of a row of g by

    R R^T = f_g I / sum_i f_i |w_i|^2 + C / tr(W C W^T),    f_g the mean of f in g:    V of (W_g R)^T W_g R,  A_g = W_g R V,  B_g = V^T R^-1

A mean a group, as in other descriptions, is not kept: it is worth less than one rank (docs/embeddings.md).

Source: Chen et al., GroupReduce, 2018. Refuses what is no table, heads that come first, and products that read a table by rows.
"""

from __future__ import annotations

import itertools
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

_GROUPS = 9  # the first has V / 256 rows
_EDGES = 2  # rows of zeros of each block
_INDEX_BYTES = 4
_OPSET = 12  # before it, Clip is for floats only
# A claim covers the rounding of float64 in the eigenproblem, whose error is relative to the largest eigenvalue.
_CLAIM_SLACK = 1e-7
# Eigenvalues of a weighing below this share of the largest are raised to it before its root is inverted.
_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring rows by frequency: how many, and their rank. As many as columns: they stay as they are. 0: nothing is kept."""

    rows: int
    rank: int

    def cost(self, D: int) -> int:
        """Parameters."""
        stored = self.rows + _EDGES if self.rank else 0
        return stored * self.rank + (self.rank * D if self.rank < D else 0)


@dataclass(frozen=True, slots=True)
class _Step:
    """The next better form of a group: the loss that a parameter saves, how many it takes, the rank that the group has then."""

    gain: float
    group: int
    cost: int
    rank: int


class Grouped:
    """Groups of rows by frequency, a rank for each."""

    name = "grouped"
    needs_data = True
    only_by_name = False
    exact_at_full_rank = False
    least_opset = _OPSET

    def serves(self, group: Group) -> Refusal | None:
        first = group.sites[0]
        if not group.shares_weight or first.kind != "lookup":
            return Refusal("grouped is for tables whose rows are looked up, and for heads tied to one")
        for site, transposed in zip(group.sites, group.transposed, strict=True):
            if transposed != (site.kind == "linear"):
                return Refusal(f"grouped keeps the table by rows, and {site.name} reads it by columns")
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        if options.full or weights.opset < self.least_opset:
            return
        V, D = group.sites[0].K, group.sites[0].N
        found, sizes = _spectra(group, weights, statistics), _sizes(V)
        tails = [found[f"lost.{g}"] for g in range(len(sizes))]
        steps = _steps(sizes, tails, D)
        bound = (
            group.kind == "alone"
        )  # of several readers the error is their mean, which is not what is minimised
        full = min(V, D)
        wanted = range(options.multiple, full + 1, options.multiple)
        for rank in options.ranks if options.ranks is not None else wanted:
            if not 1 <= rank <= full:
                continue
            ranks = _ranks(steps, sizes, D, rank * (V + D))
            if any(ranks):
                lost = sum(float(t[min(r, len(t) - 1)]) for t, r in zip(tails, ranks, strict=True) if r < D)
                blocks = _merged(sizes, ranks, D)
                structure = tuple((str(b.rows), b.rank) for b in blocks)
                error = float(np.sqrt(lost)) + _CLAIM_SLACK
                yield Candidate(self.name, rank, _cost(group, blocks, weights), error, bound, structure)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        V, D = group.sites[0].K, group.sites[0].N
        found: dict[str, tuple[int, ...] | Array] = {"order": np.arange(V, dtype=np.int32)[::-1]}
        for i, block in enumerate(_blocks(candidate)):
            if block.rank:
                found[f"rows.{i}"] = (block.rows + _EDGES, block.rank)
            if 0 < block.rank < D:
                found[f"basis.{i}"] = (block.rank, D)
        return found

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        W = weights.matrix(group.sites[0])
        V, D = W.shape
        found = _spectra(group, weights, statistics)
        by_frequency = found["order"].astype(np.int64)
        place = np.zeros(V, np.int32)  # of rows that are not kept: the first row of zeros
        factors: dict[str, Array] = {"order": place}
        # blocks that stay as they are may be several groups, all others are one
        first, start, groups = 0, 0, iter(enumerate(np.cumsum(_sizes(V))))
        for i, block in enumerate(_blocks(candidate)):
            ids = by_frequency[first : first + block.rows]
            first += block.rows
            g = next(g for g, end in groups if end == first)
            if not block.rank:
                continue
            place[ids] = start + 1 + np.arange(block.rows)
            start += block.rows + _EDGES
            rows = W[ids]
            if block.rank < D:
                rows = rows @ found[f"right.{g}"][:, : block.rank]
                factors[f"basis.{i}"] = found[f"rows.{g}"][:, : block.rank].T
            factors[f"rows.{i}"] = np.pad(rows, ((1, 1), (0, 0)))
        return factors

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        blocks = []
        for name in _rows_of(factors):
            block = factors[name].astype(np.float64)
            basis = factors.get(name.replace("rows", "basis"))
            blocks.append(block if basis is None else block @ basis.astype(np.float64))
        table = np.concatenate(blocks)[factors["order"]]
        return {
            (s.name, "weight"): table.T if t else table
            for s, t in zip(group.sites, group.transposed, strict=True)
        }

    def emit(self, op: Op, call: Call) -> ir.Value:
        return _product(op, call) if call.kind == "linear" else _lookup(op, call)

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return {}


def _lookup(op: Op, call: Call) -> ir.Value:
    """The sum of what each block says of every id; of a block that an id is not in it is zero."""
    place = op("Gather", call.factors["order"], call.x, name="place", axis=0)
    start, result = 0, None
    for name in _rows_of(call.shapes):
        stored, number = call.shapes[name][0], name.partition(".")[2]
        at = place
        if start:
            at = op("Sub", at, op.constant(np.asarray(start, np.int32)), name=f"from_{number}")
        least, most = (op.constant(np.asarray(n, np.int32)) for n in (0, stored - 1))
        at = op("Clip", at, least, most, name=f"at_{number}")
        rows = op("Gather", call.factors[name], at, name=name, axis=0)
        if f"basis.{number}" in call.shapes:
            rows = op("MatMul", rows, call.factors[f"basis.{number}"], name=f"basis.{number}")
        result = rows if result is None else op("Add", result, rows, name=f"sum_{number}")
        start += stored
    assert result is not None
    return result


def _product(op: Op, call: Call) -> ir.Value:
    """x W^T: every block's columns side by side, zeros too, and of them one for each id."""
    columns = []
    for name in _rows_of(call.shapes):
        y, number = call.x, name.partition(".")[2]
        for factor in (f"basis.{number}", name):
            if factor in call.shapes:
                turned = op("Transpose", call.factors[factor], name=f"{factor}_t", perm=(1, 0))
                y = op("MatMul", y, turned, name=factor)
        columns.append(y)
    side = op("Concat", *columns, name="columns", axis=-1) if len(columns) > 1 else columns[0]
    return op("Gather", side, call.factors["order"], name="order", axis=-1)


def _rows_of(names: Mapping[str, object]) -> list[str]:
    """Names of the blocks that are kept, in order."""
    return sorted((n for n in names if n.startswith("rows.")), key=lambda n: int(n.partition(".")[2]))


def _blocks(candidate: Candidate) -> list[_Block]:
    return [_Block(int(rows), int(rank)) for rows, rank in candidate.structure]


def _sizes(V: int) -> list[int]:
    """Rows of each group, the most frequent ones first: halves from the rare end."""
    sizes: list[int] = []
    while V > 1 and len(sizes) < _GROUPS - 1:
        sizes.insert(0, V // 2)
        V -= V // 2
    return [V, *sizes]


def _cost(group: Group, blocks: Sequence[_Block], weights: Weights) -> Cost:
    V, D = group.sites[0].K, group.sites[0].N
    parameters = sum(b.cost(D) for b in blocks)
    looked_up = 2 * D * sum(b.rank for b in blocks if b.rank < D)
    flops = sum(looked_up if s.kind == "lookup" else 2 * parameters for s in group.sites)
    return Cost(parameters, parameters * weights.itemsize(group.sites[0]) + _INDEX_BYTES * V, flops)


def _steps(sizes: Sequence[int], tails: Sequence[Array], D: int) -> list[_Step]:
    """All steps from one form of a group to the next that is best at some price of a parameter, those that gain most for it first."""
    steps = []
    for g, (size, lost) in enumerate(zip(sizes, tails, strict=True)):
        for before, after in itertools.pairwise(_hull(size, lost, D)):
            gain = (before[1] - after[1]) / (after[0] - before[0])
            if gain > 0:
                steps.append(_Step(gain, g, after[0] - before[0], after[2]))
    return sorted(steps, key=lambda step: (-step.gain, step.group))


def _ranks(steps: Sequence[_Step], sizes: Sequence[int], D: int, budget: int) -> list[int]:
    """Rank of every group within the budget of parameters; D: the rows as they are."""
    ranks = [0] * len(sizes)
    for step in steps:
        if step.cost > budget:  # as many of its ranks as there is room for, and no more
            size = sizes[step.group]
            more = min(budget // (size + _EDGES + D), min(size, D) - ranks[step.group])
            if ranks[step.group] + more < step.rank:
                ranks[step.group] += more
            break
        ranks[step.group] = step.rank
        budget -= step.cost
    return ranks


def _hull(size: int, lost: Array, D: int) -> list[tuple[int, float, int]]:
    """Parameters, loss and rank of the forms of a group on the lower convex hull of loss over parameters."""
    whole = _Block(size, D).cost(D)
    pairs = ((_Block(size, r).cost(D), float(lost[r]), r) for r in range(min(len(lost), D)))
    hull: list[tuple[int, float, int]] = []
    for form in (*(p for p in pairs if p[0] < whole), (whole, 0.0, D)):
        while len(hull) > 1 and _steeper(hull[-2], hull[-1], form):
            hull.pop()
        hull.append(form)
    return hull


def _steeper(a: tuple[int, float, int], b: tuple[int, float, int], c: tuple[int, float, int]) -> bool:
    """Whether the way from b to c falls at least as steeply as the one from a to b: then b is best nowhere."""
    return (b[1] - c[1]) * (b[0] - a[0]) >= (a[1] - b[1]) * (c[0] - b[0])


def _merged(sizes: Sequence[int], ranks: Sequence[int], D: int) -> list[_Block]:
    """A block a group, neighbours that stay as they are, or are not kept, together."""
    blocks: list[_Block] = []
    for size, rank in zip(sizes, ranks, strict=True):
        if blocks and blocks[-1].rank == rank and rank in (0, D):
            blocks[-1] = _Block(blocks[-1].rows + size, rank)
        else:
            blocks.append(_Block(size, rank))
    return blocks


def _spectra(group: Group, weights: Weights, statistics: StatisticsSource | None) -> Factors:
    """order (V,): ids by falling frequency. Of each group right and rows (D, n), A = W_g right and B = rows^T, and lost (n + 1,):
    what it loses at rank 0, 1, .., squared, relative to the whole table.
    """
    key = ("grouped-4", group.kind, *known_by(group, weights, statistics))

    def compute() -> Factors:
        W, f, C = weights.matrix(group.sites[0]), frequencies(group, statistics), _head(group, statistics)
        order = np.argsort(-f, kind="stable")
        found: dict[str, Array] = {"order": order.astype(np.int32)}
        asked = float(f @ np.einsum("ij,ij->i", W, W)) or 1.0
        multiplied = (float(np.vdot(W, W @ C)) or 1.0) if C is not None else 1.0
        first = 0
        for g, size in enumerate(_sizes(len(W))):
            ids = order[first : first + size]
            first += size
            rows = W[ids]
            if C is None:
                energy, V = _right(rows * np.sqrt(f[ids, None] / asked))
                right, left = V, V
            else:  # within a group all rows are asked for about alike
                values, vectors = eigh(C / multiplied + np.eye(len(C)) * (f[ids].mean() / asked))
                roots = np.sqrt(np.maximum(values, values[0] * _FLOOR))
                energy, V = _right(rows @ (vectors * roots))
                right, left = (vectors * roots) @ V, (vectors / roots) @ V
            found[f"lost.{g}"] = np.concatenate([np.cumsum(energy[::-1])[::-1], [0.0]])
            found[f"right.{g}"], found[f"rows.{g}"] = right, left
        whole = sum(float(a[0]) for n, a in found.items() if n.startswith("lost.")) or 1.0
        return {n: a / whole if n.startswith("lost.") else a for n, a in found.items()}

    return weights.remember(key, compute)


def _head(group: Group, statistics: StatisticsSource | None) -> Array | None:
    """(D, D): the second moment of what tied heads multiply, the identity where it is not known; None where there is no head."""
    heads = [s for s in group.sites if s.kind == "linear"]
    known = [statistics.of(s) for s in heads] if statistics is not None else []
    moments = [s.second for s in known if s is not None and s.second is not None]
    if not heads:
        return None
    moment: Array = np.mean(moments, axis=0) if moments else np.eye(group.sites[0].N)
    return moment


def _right(M: Array) -> tuple[Array, Array]:
    """Squared singular values (n,), falling, and right singular vectors (D, n) of M (m, D), n = min(m, D)."""
    if len(M) >= M.shape[1]:
        return eigh(M.T @ M)
    energy, U = eigh(M @ M.T)
    return energy, scipy.linalg.qr(M.T @ U, mode="economic")[0]


factorizations: tuple[Factorization, ...] = (Grouped(),)
