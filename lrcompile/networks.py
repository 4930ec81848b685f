"""What all factorizations into networks of cores have in common: a family gives the mathematics, the rest stands here.

Each structure of a family (how K and N are split) has one curve over its rank, from one decomposition of the weight; what blocks or
cores lose together under the real moments is measured at a few ranks and interpolated (`weighing.scaled`). Factors start from that
decomposition and are fitted (`fitting`). A form that takes more multiplications than the weight itself is also offered folded:
its cores save the file, and are multiplied out when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir

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
from lrcompile.weighing import Weighing, corrected_biases, scaled, weighing_of

# A claim covers the rounding of float64 in the eigenproblems.
_CLAIM_SLACK = 1e-7
_FULL = ("form", "full")
_FOLDED = "folded to the dense weight when it is loaded: it saves the file only"

Structure = tuple[tuple[str, int | str], ...]


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

    def decompose(self, W: Array, weighing: Weighing, structure: Structure) -> Factors:
        """energy (R + 1,): about what is lost, squared, at rank 0, 1, .., R, as `Weighing.fitted` counts; and all that `cores` needs."""
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
        for structure in family.structures(K, N):
            ranks = _ranks(options, min(family.largest(K, N, structure), K, N))
            networks = [family.network(K, N, structure, r) for r in ranks]
            small = [n for n in networks if options.ranks is not None or n.parameters < K * N]
            if not small:
                continue
            curve = self._curve(group, weights, statistics, structure, ranks[: len(small)])
            for rank, network in zip(ranks, small, strict=False):
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

    def _curve(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, structure: Structure, ranks: Sequence[int]
    ) -> Factors:  # fmt: skip
        """errors, and movements where they are known, at rank 0, 1, ..; kept between plans."""
        at = sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
        seen = (statistics.key(s) for s in group.sites) if statistics is not None else ()
        key = ("network-1", self.name, repr((structure, at)), *(weights.key(s) for s in group.sites), *seen)

        def compute() -> Factors:
            W = weights.matrix(group.sites[0])
            weighing = weighing_of(group, weights, statistics)
            found = self.family.decompose(W, weighing, structure)
            energy = found["energy"]
            if weighing.lost is None:
                return {"errors": np.sqrt(energy / max(weighing.total, np.finfo(np.float64).tiny))}
            gone = {r: W - self._product(W, found, structure, r) for r in at}
            errors = np.sqrt(scaled(energy, at, lambda r: weighing.error(gone[r]) ** 2))
            if weighing.reacts is None:
                return {"errors": errors}
            return {
                "errors": errors,
                "movements": scaled(energy, at, lambda r: weighing.movement(gone[r]) or 0.0),
            }

        return weights.remember(key, compute)

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
        return {
            (s.name, "bias"): factors[f"bias.{i}"].astype(np.float64)
            for i, s in enumerate(group.sites)
            if f"bias.{i}" in factors
        }

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
