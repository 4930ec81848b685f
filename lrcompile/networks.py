"""What all factorizations into networks of cores have in common: a family gives the mathematics, the rest stands here.

Each structure of a family (how K and N are split) has one curve over its rank. Plain energies, which are quick, say whether a structure
can win against a low rank at all. If so it is decomposed, and what blocks or cores lose together under the real moments is measured at
a few ranks and interpolated (`weighing.scaled`). Factors start from that decomposition and are fitted (`fitting`). A form that takes more multiplications than the weight itself is also offered folded:
its cores save the file, and are multiplied out when the file is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir

from lrcompile.blocks import block_energy
from lrcompile.contraction import Network, flops
from lrcompile.cores import dense, emit, packed, product, shapes
from lrcompile.fitting import fitted
from lrcompile.interfaces import (
    Array,
    Call,
    CandidateOptions,
    Constant,
    Factors,
    Op,
    StatisticsSource,
    Weights,
)
from lrcompile.records import FOLD, Candidate, Cost, Group, Refusal
from lrcompile.weighing import Weighing, bias_edits, corrected_biases, scaled, weighing_of

_TINY = np.finfo(np.float64).tiny
# Below this share of the parameters a form is compared with others.
_SAVES = 0.95
# A claim covers the rounding of float64 in the eigenproblems.
_CLAIM_SLACK = 1e-7
_FULL = ("form", "full")
_FOLDED = "folded to the dense weight when it is loaded: it saves the file only"

Structure = tuple[tuple[str, int | str], ...]

# A structure, the ranks at which it is offered, and its network at each.
Offer = tuple[Structure, Sequence[int], Sequence[Network]]


class Family(Protocol):
    """How a weight (K, N) is written as cores."""

    @property
    def name(self) -> str: ...

    @property
    def exact_at_full_rank(self) -> bool: ...

    def structures(self, K: int, N: int) -> Sequence[Structure]:
        """Few ways to split K and N, each worth a curve. The first one serves the full-rank form where there is one."""
        ...

    def largest(self, K: int, N: int, structure: Structure) -> int:
        """The rank from which on more changes nothing."""
        ...

    def network(self, K: int, N: int, structure: Structure, rank: int) -> Network: ...

    def energy(self, W: Array, structure: Structure) -> Array:
        """(R + 1,): what is lost of W at rank 0, 1, .., R, squared, for C = G = I, or a bound of it; quick."""
        ...

    def decompose(self, W: Array, weighing: Weighing, structure: Structure) -> Factors:
        """energy, about the same as `Weighing.fitted` counts; and all that `cores` needs."""
        ...

    def cores(self, W: Array, found: Factors, structure: Structure, rank: int) -> Sequence[Array]:
        """The cores at a rank, in the axes of the network; exact at the largest where there is a full-rank form."""
        ...


@dataclass(frozen=True)
class NetworkFactorization:
    """The `interfaces.Factorization` of a family."""

    family: Family
    only_by_name: bool = False
    needs_data: bool = False

    @property
    def name(self) -> str:
        return self.family.name

    @property
    def exact_at_full_rank(self) -> bool:
        return self.family.exact_at_full_rank

    def serves(self, group: Group) -> Refusal | None:
        if not group.shares_weight:
            return Refusal(f"{self.name} factorizes one weight at a time, not a {group.kind} group")
        if any(group.transposed) or any(s.kind != "linear" for s in group.sites):
            return Refusal(
                f"{self.name} serves weights that are multiplied as they are, not tables nor transposes"
            )
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        K, N = group.sites[0].K, group.sites[0].N
        family = self.family
        if options.full:
            for structure in family.structures(K, N)[:1]:
                rank, form = family.largest(K, N, structure), (*structure, _FULL)
                network = family.network(K, N, structure, rank)
                yield Candidate(
                    self.name, rank, _cost(group, weights, network), 0.0, bound=False, structure=form
                )
            return
        offered: list[Offer] = []
        for structure in family.structures(K, N):
            ranks = _ranks(options, min(family.largest(K, N, structure), K, N))
            networks = [family.network(K, N, structure, r) for r in ranks]
            small = [n for n in networks if options.ranks is not None or n.parameters < K * N]
            if small:
                offered.append((structure, ranks[: len(small)], small))
        curves = self._curves(group, weights, statistics, offered) if offered else []
        for (structure, at, forms), curve in zip(offered, curves, strict=True):
            for rank, network in zip(at, forms, strict=True):
                yield from self._forms(group, weights, structure, rank, network, curve, statistics is None)

    def _forms(
        self, group: Group, weights: Weights, structure: Structure, rank: int, network: Network, curve: Factors, bound: bool
    ) -> Iterator[Candidate]:  # fmt: skip
        cost = _cost(group, weights, network)
        error = float(curve["errors"][rank]) + _CLAIM_SLACK
        movement = float(curve["movements"][rank]) if "movements" in curve else None
        made = Candidate(self.name, rank, cost, error, bound, structure, movement=movement)
        yield made
        site = group.sites[0]
        whole = 2 * site.K * site.N * len(group.sites)
        if cost.flops > whole:
            yield replace(made, cost=replace(cost, flops=whole), structure=(*structure, FOLD), note=_FOLDED)

    def _curves(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, offered: Sequence[Offer]
    ) -> list[Factors]:
        """Of each structure errors, and movements where they are known, at rank 0, 1, ..; kept between plans.

        A structure that could win is decomposed and measured under the real moments, at three ranks. Of the others that is done with
        the most promising one, at one rank; they are taken to lose as much more than without the moments as it does.
        """
        seen = [statistics.key(s) for s in group.sites] if statistics is not None else []
        asked = repr([(structure, ranks[0], ranks[-1], len(ranks)) for structure, ranks, _ in offered])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        key = ("networks-1", self.name, digest, *(weights.key(s) for s in group.sites), *seen)

        def compute() -> Factors:
            W = weights.matrix(group.sites[0])
            weighing = weighing_of(group, weights, statistics)
            plain = [self.family.energy(W, structure) for structure, _, _ in offered]
            if weighing.lost is None:
                return _numbered([{"errors": np.sqrt(e / max(weighing.total, _TINY))} for e in plain])
            low_rank = weights.remember(
                ("plain-energy", weights.key(group.sites[0])), lambda: {"energy": block_energy(W, 1, 1)}
            )["energy"]
            chances = [_chance(e, n, r, low_rank) for e, (_, r, n) in zip(plain, offered, strict=True)]
            curves = self._typical(W, weighing, offered, plain, int(np.argmin(chances)))
            for i, (structure, ranks, _) in enumerate(offered):
                if chances[i] < 1.0:
                    curves[i] = self._measured(W, weighing, structure, ranks)
            return _numbered(curves)

        found = weights.remember(key, compute)
        return [
            {n: found[f"{n}.{i}"] for n in ("errors", "movements") if f"{n}.{i}" in found}
            for i in range(len(offered))
        ]

    def _measured(self, W: Array, weighing: Weighing, structure: Structure, ranks: Sequence[int]) -> Factors:
        """The curve of a structure, measured at its lowest, middle and highest rank."""
        at = sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
        found = self.family.decompose(W, weighing, structure)
        gone = {r: W - self._product(W, found, structure, r) for r in at}
        curve = {"errors": np.sqrt(scaled(found["energy"], at, lambda r: weighing.error(gone[r]) ** 2))}
        if weighing.reacts is not None:
            curve["movements"] = scaled(found["energy"], at, lambda r: weighing.movement(gone[r]) or 0.0)
        return curve

    def _typical(
        self, W: Array, weighing: Weighing, offered: Sequence[Offer], plain: Sequence[Array], best: int
    ) -> list[Factors]:
        """Curves in proportion to the plain ones, by the best structure at its middle rank."""
        structure, ranks, _ = offered[best]
        middle = ranks[len(ranks) // 2]
        gone = W - self._product(W, self.family.decompose(W, weighing, structure), structure, middle)
        lost = max(float(plain[best][middle]), _TINY)
        errors, movement = weighing.error(gone) ** 2 / lost, weighing.movement(gone)
        return [
            {"errors": np.sqrt(errors * e)} | ({} if movement is None else {"movements": movement / lost * e})
            for e in plain
        ]

    def _product(self, W: Array, found: Factors, structure: Structure, rank: int) -> Array:
        network = self.family.network(W.shape[0], W.shape[1], structure, rank)
        return product(network, self.family.cores(W, found, structure, rank))

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        return shapes(self._network(group, candidate))

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        W, network = weights.matrix(group.sites[0]), self._network(group, candidate)
        structure = _plain(candidate.structure)
        full = _FULL in candidate.structure
        weighing = weighing_of(group, weights, None if full else statistics)
        found = self.family.decompose(W, weighing, structure)
        cores = self.family.cores(W, found, structure, self._rank(group, candidate))
        if weighing.lost is not None:
            cores = fitted(W, network, cores, *weighing.fitted)
        gone = W - product(network, cores)
        return {**packed(network, cores), **corrected_biases(group, weights, weighing, gone)}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        w = dense(factors)
        return {**{(s.name, "weight"): w for s in group.sites}, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        return emit(op, call)

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return bias_edits(group, factors)

    def _network(self, group: Group, candidate: Candidate) -> Network:
        site, structure = group.sites[0], _plain(candidate.structure)
        network = self.family.network(site.K, site.N, structure, self._rank(group, candidate))
        return replace(network, folded=candidate.folds)

    def _rank(self, group: Group, candidate: Candidate) -> int:
        """A full form is named by the rank of the weight; its bonds may have to be larger."""
        assert candidate.rank is not None
        if _FULL not in candidate.structure:
            return candidate.rank
        return self.family.largest(group.sites[0].K, group.sites[0].N, _plain(candidate.structure))


def _chance(energy: Array, networks: Sequence[Network], ranks: Sequence[int], low_rank: Array) -> float:
    """The least share, over ranks that save something, of what a low rank in pivoted form loses at as many parameters."""
    (K, N) = (networks[0].size(side) for side in (networks[0].inputs, networks[0].outputs))
    shares = [np.inf]
    for rank, network in zip(ranks, networks, strict=True):
        if network.parameters < _SAVES * K * N:
            rival = int((K + N - math.sqrt((K + N) ** 2 - 4 * network.parameters)) / 2)
            shares.append(float(energy[rank] / max(low_rank[min(rival, len(low_rank) - 1)], _TINY)))
    return min(shares)


def _numbered(curves: Sequence[Factors]) -> Factors:
    return {f"{name}.{i}": array for i, curve in enumerate(curves) for name, array in curve.items()}


def _plain(structure: Structure) -> Structure:
    return tuple(entry for entry in structure if entry not in (_FULL, FOLD))


def _cost(group: Group, weights: Weights, network: Network) -> Cost:
    numbers = network.parameters
    return Cost(numbers, numbers * weights.itemsize(group.sites[0]), flops(network) * len(group.sites))


def _ranks(options: CandidateOptions, largest: int) -> list[int]:
    """Those that are asked for, or about twelve that grow by the same ratio."""
    if options.ranks is not None:
        return sorted({r for r in options.ranks if 1 <= r <= largest})
    grid = np.unique(np.round(np.geomspace(1, largest, 16)).astype(int))
    step = options.multiple
    return sorted({int(r) if r <= step else int(r) // step * step for r in grid})
