"""A quantized weight with a low-rank correction of what its rounding lost: few bits for all of it, some more where it counts.

    y = x W + b ~ x w + (x A) B + b',     w (K, N), A (K, r), B (r, N) all coded,     K N + r (K + N) numbers

w is coded first, with error feedback; A B is the best correction of rank r of E = W - w, for what the outputs see of it: it minimises
tr((E - A B)^T C (E - A B) G), C of the input and G of how the outputs react (without data both are identities, which is LQER). A is coded
next, and B fitted to that. Then w is coded once more, for W - A B, and so on; the turn that loses less is kept. Mathematics:
`lrcompile.quantize.correction`. The mean of what is left goes into the bias where there is one.

Rounding A and B loses little beside what their rank cannot reach, so that few bits and a higher rank are better than the reverse: they
take two bits where codes of that size are legal, those of the weight where not (docs/adr/0012 has the figures). Sources: Zhang et al., LQER and QERA, 2024; Liu et al., EoRA, 2024; Saha et al., CALDERA, 2024.

It is used only by name: see docs/adr/0012. Refuses tables, weights read transposed, and groups of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lrcompile.interfaces import (
    Array,
    Call,
    CandidateOptions,
    Codes,
    Constant,
    Factorization,
    Factors,
    Op,
    StatisticsSource,
    Weights,
)
from lrcompile.quantize import Coded, Storage, correction, rounded_by, storage
from lrcompile.records import Candidate, Cost, Group, Refusal
from lrcompile.weighing import Weighing, bias_edits, corrected_biases, known_by, weighing_of

_RANKS = (8, 16, 32, 64, 128)
_TURNS = 2  # of coding the weight and fitting its correction: the second lowers the error by 1 to 2 %, more turns do not


@dataclass(frozen=True)
class Lqer:
    """Factorization ``lqer``."""

    name: str = "lqer"
    needs_data: bool = False
    only_by_name: bool = True
    exact_at_full_rank: bool = False

    def stored_as(self, factor: str, storage_name: str) -> str:
        """A and B in two bits beside a type with zero points, which only targets take that take those."""
        kind = storage(storage_name)
        return "uint2" if factor in ("a", "b") and kind.zero_points and kind.bits < 8 else storage_name

    def serves(self, group: Group) -> Refusal | None:
        if not group.shares_weight or any(group.transposed) or any(s.kind != "linear" for s in group.sites):
            return Refusal("lqer corrects a weight that is only multiplied, not transposed")
        return None

    def candidates(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, options: CandidateOptions
    ) -> Iterator[Candidate]:
        K, N = group.sites[0].K, group.sites[0].N
        for name in options.storages:
            kind = storage(name)
            ranks = _ranks(kind, min(K, N), options)
            found = self._curve(group, weights, statistics, kind, ranks) if ranks else {}
            for i, rank in enumerate(ranks):
                beside = storage(self.stored_as("a", name))
                bits = kind.size(K, N) + beside.size(K, rank) + beside.size(rank, N)
                size = K * N + rank * (K + N)
                movement = float(found["movements"][i]) if "movements" in found else None
                yield Candidate(
                    self.name, rank, Cost(size, math.ceil(bits / 8), 2 * size * len(group.sites)), float(found["errors"][i]),
                    bound=False, storage=name, movement=movement,
                )  # fmt: skip

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        K, N, rank = group.sites[0].K, group.sites[0].N, candidate.rank
        assert rank is not None
        return {"w": (K, N), "a": (K, rank), "b": (rank, N)}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Mapping[str, Array | Codes]:
        assert candidate.rank is not None and candidate.storage is not None
        W, kind = weights.matrix(group.sites[0]), storage(candidate.storage)
        beside, weighing = (
            storage(self.stored_as("a", candidate.storage)),
            weighing_of(group, weights, statistics),
        )
        C, low, least, best = weighing.fitted[0], np.zeros_like(W), np.inf, None
        for _ in range(_TURNS):
            base = rounded_by(W - low, C, kind)
            A, B = _correction(W - base.values, weighing, candidate.rank, beside)
            low = A.values @ B.values
            E = W - base.values - low
            if (lost := weighing.movement(E) or weighing.error(E)) < least:
                least, best = lost, (E, {"w": base, "a": A, "b": B})
        assert best is not None
        return {**best[1], **corrected_biases(group, weights, weighing, best[0])}

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        w, a, b = (factors[n].astype(np.float64) for n in ("w", "a", "b"))
        made = w + a @ b
        return {**{(s.name, "weight"): made for s in group.sites}, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        low = op("MatMul", call.x, call.factors["a"], name="a")
        return op(
            "Add",
            op("MatMul", call.x, call.factors["w"], name="w"),
            op("MatMul", low, call.factors["b"], name="b"),
            name="sum",
        )

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return bias_edits(group, factors)

    def _curve(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        kind: Storage,
        ranks: Sequence[int],
    ) -> Factors:
        """errors and, where they are known, movements at these ranks: of one coding of the weight, without sweeps."""

        def compute() -> Factors:
            W, weighing = weights.matrix(group.sites[0]), weighing_of(group, weights, statistics)
            E = W - rounded_by(W, weighing.fitted[0], kind, sweeps=0).values
            beside = storage(self.stored_as("a", kind.name))
            fits = [_correction(E, weighing, r, beside) for r in ranks]
            left = [E - a.values @ b.values for a, b in fits]
            moved = [m for e in left if (m := weighing.movement(e)) is not None]
            found = {"errors": np.array([weighing.error(e) for e in left])}
            return {**found, "movements": np.array(moved)} if moved else found

        key = ("lqer-1", kind.name, repr(tuple(ranks)), *known_by(group, weights, statistics))
        return weights.remember(key, compute)


def _ranks(kind: Storage, full: int, options: CandidateOptions) -> tuple[int, ...]:
    """Up to an eighth of the full rank, from where finer codes are smaller; none of types that lose too little to be corrected.

    Of types without zero points only whole groups: TensorRT, which asks for such types, refuses others.
    """
    if kind.bits >= 8 or not kind.integers or options.full:
        return ()
    if options.ranks is not None:
        return tuple(r for r in options.ranks if 1 <= r <= full)
    step = 1 if kind.zero_points or not kind.group else kind.group
    return tuple(r for r in _RANKS if 8 * r <= full and r % step == 0)


def _correction(E: Array, weighing: Weighing, rank: int, kind: Storage) -> tuple[Coded, Coded]:
    """A and B, coded: B is fitted to what coding made of A."""
    C, G = weighing.fitted
    moment = np.eye(len(E)) if C is None else C
    A = rounded_by(correction(E, moment, rank, G=G)[0], C, kind)
    seen = moment @ A.values
    inner = A.values.T @ seen  # (r, r): what A makes of the input
    return A, rounded_by(np.linalg.lstsq(inner, seen.T @ E, rcond=None)[0], inner, kind)


factorizations: tuple[Factorization, ...] = (Lqer(),)
