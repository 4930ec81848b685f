"""Kashin's decomposition: two spread-out factors of few bits instead of one weight of more.

    y = x W + b ~ x U + (x Q) V + b',     U, V (K, N) of few levels,     Q = diag(s) (Q1 kron Q2 ..) orthogonal, each Q_i small

Q is applied as a chain of small MatMuls, K (k1 + k2 + ..) MACs a row, never as a K x K matrix. Structures are the levels of U and V:

    uniform 4      (-3, -1, 1, 3) c, one c a column: +-c1 +-c2 with c1 = 2 c2                    2 + 2 bits
    uniform 16     (-8, .., 7) c                                                                 4 + 4 bits
    kmeans 3, 4    all pairs of 3 or 4 centroids of each factor, one joint code, a scale a column      4 bits
    kmeans 16      the same of 16                                                                8 bits
    pairs 16       16 free pairs of centroids (Merkulov et al.), likewise                        4 bits

Uniform levels are integers that DequantizeLinear scales: engines keep both codes. Centroids are gathered from a table: an engine would keep its
places in 32 bits (TensorRT) or decode it at load (ONNX Runtime, unless optimization.constant_folding_max_output_size_in_bytes
forbids it), so these forms are folded: U + Q V is made when the file is loaded, Q again as small MatMuls, and only the file is
smaller (--objective disk).

U and V start from sign steps (`lrcompile.quantize.kashin`) and are refitted after rounding to what the outputs see of the error, tr(E^T C E),
by turns. The mean of what is left goes into the bias where there is one. The orthogonal DCT of the column form has no operator that
targets share: that form is in the library and in benchmarks/bits.py.

At equal bits it loses to int4 in groups of 32 on every real weight that was tried: it is here to be compared, and used only by name.
Sources: Kashin, 1977; Merkulov et al., UAI 2024; Cherniuk et al., 2026.
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
    Codes,
    Constant,
    Factorization,
    Factors,
    Op,
    StatisticsSource,
    Weights,
)
from lrcompile.quantize import Coded, Orthogonal, orthogonal, storage
from lrcompile.quantize import kashin as mathematics
from lrcompile.quantize.formats import round_scales
from lrcompile.quantize.pairs import all_pairs, free_pairs, refitted_pairs, scales_of
from lrcompile.records import FOLD, Candidate, Cost, Group, Refusal
from lrcompile.weighing import Weighing, bias_edits, corrected_biases, known_by, weighing_of

Structure = tuple[tuple[str, int | str], ...]

_STEPS = 60  # of the decomposition: centroids leave more than is left then
_REFITS = 6
_BITS = 32  # of Q and of signs


@dataclass(frozen=True)
class Levels:
    """Of U and V. folded: whether they are gathered from a table, and the weight is made when the file is loaded."""

    kind: str
    count: int
    storage: str

    @property
    def folded(self) -> bool:
        return self.kind != "uniform"

    @property
    def structure(self) -> Structure:
        return (("levels", self.kind), ("count", self.count), *((FOLD,) if self.folded else ()))


_LEVELS = (
    Levels("uniform", 4, "quarters"), Levels("uniform", 16, "int4-0s32+"), Levels("pairs", 16, "pairs4"), Levels("kmeans", 3, "pairs4"),
    Levels("kmeans", 4, "pairs4"), Levels("kmeans", 16, "pairs8"),
)  # fmt: skip


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
        for levels in _LEVELS if not options.full else ():
            found = self._claim(group, weights, statistics, levels)
            bits = (1 if levels.folded else 2) * storage(levels.storage).size(K, N) + _BITS * small
            flops = len(group.sites) * (2 * K * N if levels.folded else 4 * K * N + 2 * q.macs)
            yield Candidate(
                self.name, None, Cost(2 * K * N + small, math.ceil(bits / 8), flops), float(found["error"][0]), bound=False,
                structure=levels.structure, storage=levels.storage, note=_note(found, levels),
                movement=float(found["movement"][0]) if "movement" in found else None,
            )  # fmt: skip

    def shapes(self, group: Group, candidate: Candidate) -> Mapping[str, tuple[int, ...]]:
        K, N = group.sites[0].K, group.sites[0].N
        both = {"uv": (K, N, 2)} if candidate.folds else {"u": (K, N), "v": (K, N)}
        small = {f"orthogonal.{i}": f.shape for i, f in enumerate(_orthogonal(K, 0).factors)}
        return {**both, "signs": (K,), **small}

    def factorize(
        self,
        group: Group,
        weights: Weights,
        statistics: StatisticsSource | None,
        candidate: Candidate,
        seed: int,
    ) -> Mapping[str, Array | Codes]:
        W, weighing = weights.matrix(group.sites[0]), weighing_of(group, weights, statistics)
        levels = next(n for n in _LEVELS if n.structure == candidate.structure)
        q = _orthogonal(len(W), seed)
        made = _coded(W, _start(W, q, levels), weighing, levels, seed, _REFITS)
        small = {f"orthogonal.{i}": f for i, f in enumerate(q.factors)}
        return {
            **made,
            "signs": q.signs,
            **small,
            **corrected_biases(group, weights, weighing, W - _matrix(_values(made), q)),
        }

    def reconstruct(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        small = sorted(
            (n for n in factors if n.startswith("orthogonal.")), key=lambda n: int(n.rpartition(".")[2])
        )
        arrays = {n: f.astype(np.float64) for n, f in factors.items()}
        w = _matrix(arrays, Orthogonal(arrays["signs"], tuple(arrays[n] for n in small)))
        return {**{(s.name, "weight"): w for s in group.sites}, **self.edits(group, factors)}

    def emit(self, op: Op, call: Call) -> ir.Value:
        if "uv" in call.shapes:
            return op("MatMul", call.x, _weight(op, call), name="product")
        return op(
            "Add",
            op("MatMul", call.x, call.factors["u"], name="u"),
            op("MatMul", _turned(op, call), call.factors["v"], name="v"),
            name="sum",
        )

    def edits(self, group: Group, factors: Factors) -> Mapping[Constant, Array]:
        return bias_edits(group, factors)

    def _claim(
        self, group: Group, weights: Weights, statistics: StatisticsSource | None, levels: Levels
    ) -> Factors:
        """error and, where it is known, movement without refits, which lower both; residual, rate and peaks of the decomposition."""

        def compute() -> Factors:
            W, weighing = weights.matrix(group.sites[0]), weighing_of(group, weights, statistics)
            q = _orthogonal(len(W), 0)
            start = _start(W, q, levels)
            E = W - _matrix(_values(_coded(W, start, weighing, levels, 0, 0)), q)
            movement = weighing.movement(E)
            found = {
                "error": np.array([weighing.error(E)]),
                "rate": np.array([start.rate]),
                "peaks": np.array(start.peaks),
            }
            return found if movement is None else {**found, "movement": np.array([movement])}

        return weights.remember(("kashin-1", repr(levels), *known_by(group, weights, statistics)), compute)


def _orthogonal(K: int, seed: int) -> Orthogonal:
    return orthogonal(K, "random", seed)


def _start(W: Array, q: Orthogonal, levels: Levels) -> mathematics.Kashin:
    """Four sign steps for levels of each column, the decomposition itself for levels of the whole matrix."""
    if levels.kind == "uniform":
        return mathematics.four_steps(W, q)[0]
    return mathematics.decompose(W / scales_of(W), q, steps=_STEPS)


def _coded(
    W: Array, start: mathematics.Kashin, weighing: Weighing, levels: Levels, seed: int, refits: int
) -> dict[str, Coded]:
    C = weighing.fitted[0]
    if levels.kind == "uniform":
        u, v = mathematics.refitted_codes(W, start, storage(levels.storage), C, refits)
        return {"u": u, "v": v}
    if levels.kind == "pairs":
        pairs = free_pairs(start, scales_of(W), levels.count, seed)
    else:
        pairs = all_pairs(start, scales_of(W), levels.count)
    made = refitted_pairs(W, np.eye(len(W)) if C is None else C, pairs, refits)
    kind = storage(levels.storage)
    table = np.zeros((1 << kind.bits, 2))
    table[: len(made.levels)] = made.levels.astype(np.float32)
    scales = round_scales(made.scales[None], kind.scale)
    return {"uv": Coded(kind, made.codes.astype(np.int16), scales, None, table)}


def _values(made: Mapping[str, Coded]) -> Factors:
    return {n: c.values for n, c in made.items()}


def _matrix(factors: Factors, q: Orthogonal) -> Array:
    """U + Q V."""
    u, v = np.moveaxis(factors["uv"], 2, 0) if "uv" in factors else (factors["u"], factors["v"])
    made: Array = u + mathematics.rotated_back(v, q, None)
    return made


def _note(found: Factors, levels: Levels) -> str:
    u, v = found["peaks"]
    kept = (
        "made into the weight when the file is loaded" if levels.folded else "both codes stay in the engine"
    )
    return (
        f"an experiment; U and V reach {u:.1f} and {v:.1f} times the weight's mean size, the residual fell to {float(found['rate'][0]):.2f} of "
        f"itself a step; {kept}"
    )


def _turned(op: Op, call: Call) -> ir.Value:
    """x Q: the axis of each small factor goes to the end, and after all of them each is where it was."""
    K = call.shapes["u"][0]
    turned = op("Mul", call.x, call.factors["signs"], name="signed")
    for i, n in enumerate(_orders(call)):
        apart = op.constant(np.array([-1, n, K // n], np.int64), f"apart_{i}")
        together = op.constant(np.array([-1, K], np.int64), f"together_{i}")
        axis = op(
            "Transpose", op("Reshape", turned, apart, name=f"axes_{i}"), name=f"turned_{i}", perm=(0, 2, 1)
        )
        product = op("MatMul", axis, call.factors[f"orthogonal.{i}"], name=f"q_{i}")
        turned = op("Reshape", product, together, name=f"rows_{i}")
    return op("Reshape", turned, op("Shape", call.x, name="shape"), name="xq")


def _weight(op: Op, call: Call) -> ir.Value:
    """U + Q V of constants: each small factor multiplies its own axis of V from the left."""
    K, N, _ = call.shapes["uv"]
    u, v = (
        op("Gather", call.factors["uv"], op.constant(np.array(i, np.int64), f"which_{n}"), name=n, axis=2)
        for i, n in enumerate(("u", "v"))
    )
    behind = K
    for i, n in enumerate(_orders(call)):
        behind //= n
        axes = op.constant(np.array([K // (n * behind), n, behind * N], np.int64), f"axes_{i}")
        v = op(
            "MatMul",
            call.factors[f"orthogonal.{i}"],
            op("Reshape", v, axes, name=f"apart_{i}"),
            name=f"q_{i}",
        )
    v = op("Reshape", v, op.constant(np.array([K, N], np.int64), "matrix"), name="turned")
    signs = op(
        "Reshape", call.factors["signs"], op.constant(np.array([K, 1], np.int64), "column"), name="rows"
    )
    return op("Add", u, op("Mul", v, signs, name="qv"), name="weight")


def _orders(call: Call) -> list[int]:
    """Of the small factors."""
    return [
        call.shapes[f"orthogonal.{i}"][0]
        for i in range(sum(n.startswith("orthogonal.") for n in call.shapes))
    ]


factorizations: tuple[Factorization, ...] = (Kashin(),)
