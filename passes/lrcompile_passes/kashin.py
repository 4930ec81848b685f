"""Kashin's decomposition: two spread-out factors of two bits instead of one weight of four.

    y = x W + b ~ x U + (x Q) V + b,     U, V (K, N) of the levels (-3, -1, 1, 3) c, one c a column: +-c1 +-c2 with c1 = 2 c2

Q is orthogonal and a product of small ones, Q = diag(s) (Q1 kron Q2 ..): x Q is a chain of small MatMuls, K (k1 + k2 + ..) MACs a row, never
a K x K matrix. U and V come from two sign steps each on every column, and are refitted by turns after rounding: U <- round(W - Q V),
V <- round(Q^T (W - U)). Both codes together take four bits a number. Levels and the infinity norms: `lrcompile.quantize.kashin`.

At equal bits it loses to int4 in groups of 32 on every real weight that was tried (docs/bits.md): it is here to be compared, and used
only by name. Sources: Kashin, 1977; Merkulov et al., UAI 2024; Cherniuk et al., 2026.
Refuses tables, weights read transposed, and groups of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
from lrcompile.quantize import Orthogonal, orthogonal, searched, storage
from lrcompile.quantize.kashin import four_steps, refitted, rotated_back
from lrcompile.records import Candidate, Cost, Group, Refusal

STORAGE = "quarters"
_REFITS = 6
_ERROR = 0.15  # of Gaussian numbers 0.12: an estimate, which factorize replaces
_BITS = 32  # of Q and of scales


@dataclass(frozen=True)
class Kashin:
    """Factorization ``kashin``."""

    name: str = "kashin"
    needs_data: bool = False
    only_by_name: bool = True
    exact_at_full_rank: bool = False

    def serves(self, group: Group) -> Refusal | None:
        if not group.shares_weight or any(group.transposed) or any(s.kind != "linear" for s in group.sites):
            return Refusal("kashin takes a weight that is only multiplied, not transposed")
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        site = group.sites[0]
        K, N, q = site.K, site.N, _orthogonal(site.K, 0)
        small = K + sum(len(f) ** 2 for f in q.factors)
        bits = 2 * storage(STORAGE).size(K, N) + _BITS * small
        flops = len(group.sites) * (4 * K * N + 2 * q.macs)
        yield Candidate(
            self.name, None, Cost(2 * K * N + small, math.ceil(bits / 8), flops), _ERROR, bound=False, storage=STORAGE,
            note="an experiment: int4 in groups is smaller at this error",
        )  # fmt: skip

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        K, N = group.sites[0].K, group.sites[0].N
        small = {f"orthogonal.{i}": f.shape for i, f in enumerate(_orthogonal(K, 0).factors)}
        return {"u": (K, N), "v": (K, N), "signs": (K,), **small}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Factors:
        W = weights.matrix(group.sites[0])
        q = _orthogonal(len(W), seed)
        made = refitted(W, four_steps(W, q)[0], _rounded, _rounded, _REFITS)
        small = {f"orthogonal.{i}": f for i, f in enumerate(q.factors)}
        return {"u": made.U, "v": made.V, "signs": q.signs, **small}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        small = [n for n in factors if n.startswith("orthogonal.")]
        q = Orthogonal(
            factors["signs"].astype(np.float64),
            tuple(
                factors[n].astype(np.float64) for n in sorted(small, key=lambda n: int(n.rpartition(".")[2]))
            ),
        )
        w = factors["u"].astype(np.float64) + rotated_back(factors["v"].astype(np.float64), q, None)
        return {**{(s.name, "weight"): w for s in group.sites}, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        K = call.shapes["u"][0]
        turned = op("Mul", call.x, call.factors["signs"], name="signed")
        for i in range(sum(n.startswith("orthogonal.") for n in call.shapes)):
            n = call.shapes[f"orthogonal.{i}"][0]
            # the axis of this factor goes to the end, and after all of them each is where it was
            apart = op.constant(np.array([-1, n, K // n], np.int64), f"apart_{i}")
            together = op.constant(np.array([-1, K], np.int64), f"together_{i}")
            axis = op(
                "Transpose",
                op("Reshape", turned, apart, name=f"axes_{i}"),
                name=f"turned_{i}",
                perm=(0, 2, 1),
            )
            product = op("MatMul", axis, call.factors[f"orthogonal.{i}"], name=f"q_{i}")
            turned = op("Reshape", product, together, name=f"rows_{i}")
        turned = op("Reshape", turned, op("Shape", call.x, name="shape"), name="xq")
        return op(
            "Add",
            op("MatMul", call.x, call.factors["u"], name="u"),
            op("MatMul", turned, call.factors["v"], name="v"),
            name="sum",
        )

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return {
            (s.name, "bias"): factors[f"bias.{i}"].astype(np.float64)
            for i, s in enumerate(group.sites)
            if f"bias.{i}" in factors
        }


def _orthogonal(K: int, seed: int) -> Orthogonal:
    return orthogonal(K, "random", seed)


def _rounded(X: Array) -> Array:
    return searched(X, storage(STORAGE)).values


factorizations: tuple[Factorization, ...] = (Kashin(),)
