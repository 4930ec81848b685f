"""Slicing: what lies between two weights is cut narrower, and both weights with it. Every product becomes smaller, and but for two Gathers
of cos and sin per layer with rotary embeddings no node is added.

    FFN                  neurons are dropped, and the others refitted            `_slicing.neurons`
    values and output    each head's mixed values in fewer directions            `_slicing.values`
    queries and keys     each head's scores in fewer directions, or in fewer     `_slicing.queries`
                         of the planes that a rotary embedding turns

rank: the neurons that stay, or the size of a head that stays.

Sources: Hassibi and Stork 1993 (optimal brain surgeon); Lin et al., MoDeGPT, 2024 (types I, II and III); Tai et al., FLAT-LLM, 2025.
Refuses groups between whose sites the core found no width that can be cut, with the core's sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

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
from lrcompile.records import Candidate, Cost, Group, Refusal, Width
from lrcompile_passes._slicing import neurons, queries, values

# By kind of group.
_CLAIMS = {"up_down": neurons.claims, "value_output": values.claims, "query_key": queries.claims}
_CUTS = {"up_down": neurons.cut, "value_output": values.cut, "query_key": queries.cut}
# A claim covers the rounding of float64 in sums, eigenproblems and downdates.
_CLAIM_SLACK = 1e-6
# Sizes of a head that are offered: so many at most.
_SIZES = 16
# Rows a dimension from which a second moment is called well known.
_ENOUGH = 4


class Slicing:
    """Narrower hidden layers and heads."""

    name = "slicing"
    needs_data = True
    only_by_name = False
    exact_at_full_rank = False

    def serves(self, group: Group) -> Refusal | None:
        if group.width is not None:
            return None
        return Refusal(
            group.refusal or "slicing cuts between two weights that read one another, not one alone"
        )

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        width = group.width
        if options.full or statistics is None or width is None:
            return
        itemsize = weights.itemsize(group.sites[0])
        unit = 2 if width.planes else 1
        step = options.multiple if group.kind == "up_down" else unit * max(1, width.size // _SIZES // unit)
        ranks = options.ranks if options.ranks is not None else range(step, width.size, step)
        note = _note(group, statistics)
        for rank in ranks:
            if 1 <= rank < width.size and rank % unit == 0:
                numbers = sum(s.K * s.N for s in group.sites) * rank // width.size
                cost = Cost(numbers, numbers * itemsize, 2 * numbers)
                error, movement = _CLAIMS[group.kind](group, width, weights, statistics, rank)
                yield Candidate(self.name, rank, cost, error + _CLAIM_SLACK, note=note, movement=movement)

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...] | Array]:
        width = group.width
        assert width is not None and candidate.rank is not None
        found: dict[str, tuple[int, ...] | Array] = {}
        for i, site in enumerate(group.sites):
            contracts = group.kind != "query_key" and i == len(group.sites) - 1
            cut = (site.K if contracts else site.N) // width.size * candidate.rank
            found[f"weight.{i}"] = (cut, site.N) if contracts else (site.K, cut)
        return found

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        assert statistics is not None and group.width is not None and candidate.rank is not None
        return _CUTS[group.kind](group, group.width, weights, statistics, candidate.rank)

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        width = group.width
        assert width is not None
        changed: dict[Constant, Array] = {}
        for i, site in enumerate(group.sites):
            contracts = (
                group.kind != "query_key" and i == len(group.sites) - 1
            )  # the last site's rows are cut
            if contracts:
                changed[site.name, "weight"] = _put_back(
                    factors[f"weight.{i}"].T, site.K, width, factors["kept"]
                ).T
            else:
                changed[site.name, "weight"] = _put_back(
                    factors[f"weight.{i}"], site.N, width, factors["kept"]
                )
            if f"bias.{i}" in factors:
                bias = factors[f"bias.{i}"]
                changed[site.name, "bias"] = (
                    bias.astype(np.float64)
                    if contracts
                    else _put_back(bias[None], site.N, width, factors["kept"])[0]
                )
        return changed

    def emit(self, op: Op, call: Call) -> ir.Value:
        raise AssertionError("slicing puts smaller constants in the place of larger ones, and makes no node")

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        changed: dict[Constant, Array] = {(group.name, "kept"): factors["kept"]}
        for i, site in enumerate(group.sites):
            changed[site.name, "weight"] = factors[f"weight.{i}"].astype(np.float64)
            if f"bias.{i}" in factors:
                changed[site.name, "bias"] = factors[f"bias.{i}"].astype(np.float64)
        return changed


def _put_back(cut: Array, full: int, width: Width, kept: Array) -> Array:
    """Columns (.., heads * r) at their places (.., full) in the original, zeros elsewhere."""
    heads = full // width.size
    wide = np.zeros((len(cut), heads, width.size))
    wide[:, :, kept] = cut.reshape(len(cut), heads, -1)
    return wide.reshape(len(cut), full)


def _note(group: Group, statistics: StatisticsSource) -> str:
    """What a reader of the plan should know about the data behind a width."""
    site = group.sites[-1]
    known = statistics.of(site)
    if known is None or known.count >= _ENOUGH * site.K:
        return ""
    return f"few samples: {known.count} rows for {site.K} inputs, shrunk by {known.shrinkage:.2g}"


factorizations: tuple[Factorization, ...] = (Slicing(),)
