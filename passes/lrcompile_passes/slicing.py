"""Slicing: what lies between two weights is cut narrower, and both weights with it. Every product becomes smaller, and but for two Gathers
of cos and sin per layer with rotary embeddings no node is added.

FFN, y = h Wd + b, h (H,) = act(x Wu) (times x Wg): r of the H neurons are kept, set S. With M = E[h h^T] + eps I

    Wd' = M_SS^-1 M_S: Wd (r, D)          what is lost: tr (Wd - E Wd')^T M (Wd - E Wd'),  E (H, r) the columns S of I

What the others did is written into the rows that stay. S by backward elimination (optimal brain surgeon): with P = M_SS^-1 and the
refitted W' the next to go is the j of least |W'_j|^2 / P_jj, which is exactly what the loss grows by; then W' -= P_:j W'_j / P_jj and
P -= P_:j P_j: / P_jj. One sweep gives the nested order and the loss of every r. Neurons go one by one, chosen among the
cheapest of a block; the whole matrices follow a block at a time, so that the work is in matrix products: O(H^2 (H + D)).
Where down has a bias M is the covariance, and b' = b + m Wd - m_S Wd'. Where it is known how the model's outputs react (tr E^T C' E G,
G = R R^T) S is chosen by C' and Wd R. In the nested order L L^T = M gives what is lost at every r: the rows of L^T Wd beyond it.

Values, y = z Wo + b, z the mixed values, per head z_h = p x Wv_h of size s: Wv_h' = Wv_h A_h, A_h (s, r). With C_h = S S^T the moment of
z_h and W_h = [Wo_j ..] (s, D) the rows of all heads that read it, A_h spans the best rank-r part A_h B = W_h V V^T of S^T W_h, which
needs no inverse: A_h = W_h W_h^T S U, U the leading eigenvectors of S^T W_h W_h^T S. Then all heads are refitted together,

    Wo' = (A^T C A)^-1 A^T C Wo,  A the block diagonal of the A_h,  b' = b + m (Wo - A Wo')

Queries and keys, scores q k^T: per key head q' = q A, k' = k B, both (s, r). With Q = sum of E[q q^T] over the queries that share the key
and cov(k) = T T^T: A = T V, B = T^-T V, V the leading eigenvectors of T^T Q T; lost is the sum of the others. The covariance, because
a softmax does not see what is the same for all keys. Each pair of columns is scaled so that q' and k' vary alike.

Behind a rotary embedding, scores q R k^T, R of planes turned by their position: r/2 whole planes are kept, the same of all heads of a
layer, because cos and sin, which all layers and heads share, are cut by one Gather each (the only nodes that slicing adds). Averaged over
angles planes do not mix, and what a plane p adds to the squared scores is sum over the heads of E|q_p|^2 E|k_p|^2 / 2: those that add
least go. Where the reaction is known they go one by one, each time the one whose loss from the queries moves the outputs least.

rank: the neurons that stay, or the size of a head that stays.

Sources: Hassibi and Stork 1993 (optimal brain surgeon); Lin et al., MoDeGPT, 2024 (types I, II and III); Tai et al., FLAT-LLM, 2025.
Refuses groups between whose sites the core found no width that can be cut, with the core's sentence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

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
from lrcompile.records import Candidate, Cost, Group, InputStatistics, Refusal, Site, Width

# Added to a moment's diagonal before it is inverted, relative to its mean: far below what a loss is measured to.
_RIDGE = 1e-9
# The same of the moment that an order is chosen by, of which few sequences tell.
_WEIGHING_RIDGE = 1e-3
# Eigenvalues of the keys' covariance below this share of the largest are raised to it before the root is inverted.
_FLOOR = 1e-10
# A claim covers the rounding of float64 in sums, eigenproblems and downdates.
_CLAIM_SLACK = 1e-6
# Neurons that go before the whole matrices follow, at least, and among how many of the cheapest they are chosen.
_BLOCK, _POOL = 32, 256
# So many blocks at most: each copies a matrix of what is left.
_BLOCKS = 128
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
                error, movement = _claims(group, width, weights, statistics, rank)
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
        make = {"up_down": _cut_neurons, "value_output": _cut_values, "query_key": _cut_queries}[group.kind]
        return make(group, group.width, weights, statistics, candidate.rank)

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


def _claims(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> tuple[float, float | None]:
    """The relative error at this width, and how far it is predicted to move the model's outputs, where that is known."""
    if group.kind == "up_down":
        found, at = _order(group, weights, statistics), rank
    elif width.planes:
        found, at = _turned(group, width, weights, statistics), rank // 2
    elif group.kind == "query_key":
        found, at = _planes(group, width, weights, statistics), rank
    else:
        key = ("slicing", f"values-2-{rank}", *_seen(group, weights, statistics))
        found = weights.remember(key, lambda: _values_claims(group, width, weights, statistics, rank))
        at = 0
    movement = float(found["movement"][at]) if "movement" in found else None
    return float(np.sqrt(max(float(found["lost"][at]), 0.0))), movement


def _values_claims(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> Factors:
    cut, lost = _refit(group, width, weights, statistics, rank)
    site = group.sites[1]
    reaction = _reaction(site, weights, statistics)
    if reaction is None:
        return {"lost": np.array([lost])}
    A = np.repeat(_bases(group, width, weights, statistics)[:, :, :rank], width.repeat, axis=0)
    rows = np.einsum("hsr,hrn->hsn", A, cut.reshape(len(A), rank, -1), optimize=True)
    gone = weights.matrix(site) - rows.reshape(-1, cut.shape[1])
    return {"lost": np.array([lost]), "movement": np.array([_moves(gone, *reaction)])}


def _reaction(site: Site, weights: Weights, statistics: StatisticsSource) -> tuple[Array, Array] | None:
    """C' (K, K) and G (N, N) by which an error of the site's weight moves the model's outputs; None where that is not known."""
    known = _known(site, statistics)
    if known.reaction is None:
        return None
    return known.weighing(weights.bias(site) is not None), known.reaction.output


def _moves(E: Array, C: Array, G: Array) -> float:
    return float(np.vdot(C @ E, E @ G))


def _seen(group: Group, weights: Weights, statistics: StatisticsSource) -> tuple[str, ...]:
    """All that a cut depends on."""
    width, sites = group.width, group.sites
    assert width is not None
    sizes = hashlib.sha256(repr((width.size, width.heads, width.repeat)).encode())
    for site in sites:
        bias = weights.bias(site)
        sizes.update(b"none" if bias is None else bias.tobytes())
    return (*(weights.key(s) for s in sites), *(statistics.key(s) for s in sites), sizes.hexdigest())


def _known(site: Site, statistics: StatisticsSource) -> InputStatistics:
    known = statistics.of(site)
    assert known is not None and known.second is not None and known.mean is not None
    return known


def _ridged(moment: Array) -> Array:
    ridge = _RIDGE * max(float(np.trace(moment)) / len(moment), np.finfo(np.float64).tiny)
    return moment + ridge * np.eye(len(moment))


def _solve(moment: Array, right: Array) -> Array:
    solution: Array = scipy.linalg.cho_solve(scipy.linalg.cho_factor(moment), right)
    return solution


def _total(W: Array, second: Array) -> float:
    """What a relative loss is relative to."""
    return max(float(np.vdot(W, second @ W)), np.finfo(np.float64).tiny)


# --- FFN ----------------------------------------------------------------------------------------------------------


def _hidden(group: Group, weights: Weights, statistics: StatisticsSource) -> Array:
    """M (H, H), what the last weight's rows are weighted with."""
    known = _known(group.sites[-1], statistics)
    assert known.second is not None
    return _ridged(known.second if weights.bias(group.sites[-1]) is None else known.centred)


def _order(group: Group, weights: Weights, statistics: StatisticsSource) -> Factors:
    """order (H,): the neurons, those that go last first; lost (H + 1,): the relative squared loss of keeping the first r of them."""

    def compute() -> Factors:
        down = group.sites[-1]
        W = weights.matrix(down)
        M, second = _hidden(group, weights, statistics), _known(down, statistics).second
        assert second is not None
        reaction = _reaction(down, weights, statistics)
        if reaction is None:
            order, lost = eliminate(M, W)
            return {"order": order, "lost": lost / _total(W, second)}
        C, G = reaction
        C = C + _WEIGHING_RIDGE * float(np.trace(C)) / len(C) * np.eye(len(C))
        felt = W @ scipy.linalg.cholesky(G, lower=True)
        order, _ = eliminate(C, felt)
        return {
            "order": order,
            "lost": beyond(M, W, order) / _total(W, second),
            "movement": beyond(C, felt, order),
        }

    return weights.remember(("slicing", "neurons-2", *_seen(group, weights, statistics)), compute)


def beyond(M: Array, W: Array, order: Array) -> Array:
    """(H + 1,): what keeping the first r neurons of the order loses once these are refitted, M = L L^T, |rows of L^T W beyond r|^2."""
    L = scipy.linalg.cholesky(M[np.ix_(order, order)], lower=True)
    rows = np.sum((L.T @ W[order]) ** 2, axis=1)
    lost: Array = np.concatenate([np.cumsum(rows[::-1])[::-1], [0.0]])
    return lost


def eliminate(M: Array, W: Array) -> tuple[Array, Array]:
    """Backward elimination of the rows of W (H, D) under the moment M (H, H).

    Returns order (H,), those that go last first, and lost (H + 1,), what keeping the first r loses once the rest is refitted.
    """
    left = np.arange(len(M))
    P = scipy.linalg.lapack.dpotri(scipy.linalg.cholesky(M, lower=True), lower=1)[0]
    P = np.tril(P) + np.tril(P, -1).T
    W = W.copy()
    gone: list[int] = []
    steps: list[float] = []
    block = max(_BLOCK, -(-len(M) // _BLOCKS))
    while len(left):
        scores = np.einsum("ij,ij->i", W, W) / np.diagonal(P)
        pool = np.sort(np.argsort(scores, kind="stable")[: max(_POOL, 4 * block)])
        chosen = _cheapest(P[np.ix_(pool, pool)], W[pool] @ W[pool].T, min(block, len(left)), steps)
        out = pool[chosen]
        gone.extend(left[out])
        stay = np.delete(np.arange(len(left)), out)
        shares = np.linalg.solve(P[np.ix_(out, out)], P[np.ix_(out, stay)])
        W = W[stay] - shares.T @ W[out]
        P = P[np.ix_(stay, stay)] - P[np.ix_(stay, out)] @ shares
        left = left[stay]
    lost = np.concatenate([[0.0], np.cumsum(steps)])[::-1]
    return np.array(gone[::-1]), lost


def _cheapest(P: Array, G: Array, count: int, steps: list[float]) -> list[int]:
    """The next `count` to go, one by one, of a pool with the inverse P and the Gram G = W W^T; appends what each costs to steps."""
    alive = np.ones(len(P), dtype=bool)
    chosen = []
    for _ in range(count):
        diagonal = np.where(alive, np.diagonal(P), 1.0)
        scores = np.where(alive, np.maximum(np.diagonal(G), 0.0) / diagonal, np.inf)
        j = int(np.argmin(scores))
        steps.append(float(scores[j]))
        chosen.append(j)
        alive[j] = False
        u = P[:, j] / P[j, j]
        P = P - np.outer(u, P[j])
        mixed = np.outer(u, G[j])
        G = G - mixed - mixed.T + G[j, j] * np.outer(u, u)
    return chosen


def _cut_neurons(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> Factors:
    *ups, down = group.sites
    kept = np.sort(_order(group, weights, statistics)["order"][:rank].astype(np.int64))
    factors: dict[str, Array] = {"kept": kept.astype(np.int32)}
    for i, up in enumerate(ups):
        factors[f"weight.{i}"] = weights.matrix(up)[:, kept]
        if (bias := weights.bias(up)) is not None:
            factors[f"bias.{i}"] = bias[kept]
    M, W = _hidden(group, weights, statistics), weights.matrix(down)
    cut = _solve(M[np.ix_(kept, kept)], M[kept] @ W)
    factors[f"weight.{len(ups)}"] = cut
    if (bias := weights.bias(down)) is not None:
        mean = _known(down, statistics).mean
        assert mean is not None
        factors[f"bias.{len(ups)}"] = bias + mean @ W - mean[kept] @ cut
    return factors


# --- values and their output ---------------------------------------------------------------------------------------


def _bases(group: Group, width: Width, weights: Weights, statistics: StatisticsSource) -> Array:
    """A (heads, s, s) with orthonormal columns: the leading r of each are A_h of rank r."""

    def compute() -> Factors:
        out, s = group.sites[1], width.size
        C, W = _mixed(group, weights, statistics), weights.matrix(out)
        made = []
        for head in range(width.heads):
            moment, gram = np.zeros((s, s)), np.zeros((s, s))
            for reader in range(head * width.repeat, (head + 1) * width.repeat):
                rows = slice(reader * s, (reader + 1) * s)
                moment += C[rows, rows]
                gram += W[rows] @ W[rows].T
            values, vectors = _eigh(moment)
            S = vectors * np.sqrt(values)
            _, U = _eigh(S.T @ gram @ S)
            made.append(_fix_signs(scipy.linalg.qr(gram @ S @ U)[0]))
        return {"bases": np.array(made)}

    return weights.remember(("slicing", "bases-1", *_seen(group, weights, statistics)), compute)["bases"]


def _mixed(group: Group, weights: Weights, statistics: StatisticsSource) -> Array:
    """C (heads * repeat * s,) squared: the moment of what the output weight reads."""
    known = _known(group.sites[1], statistics)
    assert known.second is not None
    return known.second if weights.bias(group.sites[1]) is None else known.centred


def _refit(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> tuple[Array, float]:
    """Wo' (heads * repeat * r, D), all heads fitted together, and the relative squared loss that it leaves."""
    out = group.sites[1]
    C, W = _mixed(group, weights, statistics), weights.matrix(out)
    A = np.repeat(_bases(group, width, weights, statistics)[:, :, :rank], width.repeat, axis=0)
    right = np.concatenate([C[:, i * width.size : (i + 1) * width.size] @ a for i, a in enumerate(A)], axis=1)
    moment = _gather(A, right)
    wanted = right.T @ W
    cut = _solve(_ridged(moment), wanted)
    second = _known(out, statistics).second
    assert second is not None
    lost = float(np.vdot(W, C @ W)) - 2.0 * float(np.vdot(wanted, cut)) + float(np.vdot(cut, moment @ cut))
    return cut, lost / _total(W, second)


def _gather(A: Array, X: Array) -> Array:
    """A^T X for the block diagonal of A (heads, s, r)."""
    made: Array = np.einsum("hsr,hsn->hrn", A, X.reshape(*A.shape[:2], -1), optimize=True)
    return made.reshape(-1, X.shape[-1])


def _cut_values(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> Factors:
    value, out = group.sites
    A = _bases(group, width, weights, statistics)[:, :, :rank]
    factors = {"kept": np.arange(rank, dtype=np.int32), "weight.0": _mix(weights.matrix(value), A)}
    if (bias := weights.bias(value)) is not None:
        factors["bias.0"] = _mix(bias[None], A)[0]
    cut, _ = _refit(group, width, weights, statistics, rank)
    factors["weight.1"] = cut
    if (bias := weights.bias(out)) is not None:
        mean = _known(out, statistics).mean
        assert mean is not None
        short = _mix(mean[None], np.repeat(A, width.repeat, axis=0))[0]
        factors["bias.1"] = bias + mean @ weights.matrix(out) - short @ cut
    return factors


def _mix(W: Array, A: Array) -> Array:
    """W (K, heads * s) times the block diagonal of A (heads, s, r)."""
    made: Array = np.einsum("khs,hsr->khr", W.reshape(len(W), *A.shape[:2]), A, optimize=True)
    return made.reshape(len(W), -1)


# --- queries and keys ----------------------------------------------------------------------------------------------


def _planes(group: Group, width: Width, weights: Weights, statistics: StatisticsSource) -> Factors:
    """a, b (heads, s, s), whose leading r columns are A and B of rank r; lost (s + 1,), the relative squared loss of rank r."""

    def compute() -> Factors:
        query, key = group.sites
        s, asked = width.size, _known(query, statistics)
        Q = _second_of_output(weights.matrix(query), weights.bias(query), asked)
        Wk = weights.matrix(key)
        K = Wk.T @ _known(key, statistics).centred @ Wk
        made: list[tuple[Array, Array]] = []
        lost, total = np.zeros(s + 1), 0.0
        for head in range(width.heads):
            rows = slice(head * s, (head + 1) * s)
            shared = np.zeros((s, s))
            for reader in range(head * width.repeat, (head + 1) * width.repeat):
                columns = slice(reader * s, (reader + 1) * s)
                shared += Q[columns, columns]
            total += float(np.vdot(shared, K[rows, rows]))
            values, vectors = _eigh(K[rows, rows])
            root = np.sqrt(np.maximum(values, _FLOOR * max(values[0], np.finfo(np.float64).tiny)))
            T, inverse = vectors * root, vectors / root
            energy, V = _eigh(T.T @ shared @ T)
            lost[:-1] += np.cumsum(energy[::-1])[::-1]
            alike = (
                np.maximum(energy / width.repeat, _FLOOR * max(energy[0], np.finfo(np.float64).tiny)) ** 0.25
            )
            made.append((T @ V / alike, inverse @ V * alike))
        a, b = (np.array(m) for m in zip(*made, strict=True))
        found = {"a": a, "b": b, "lost": lost / max(total, np.finfo(np.float64).tiny)}
        if (reaction := _reaction(query, weights, statistics)) is None:
            return found
        Wq = weights.matrix(query)
        movement = np.zeros(s + 1)
        for r in range(s):  # q' k'^T = (q A B^T) k^T: as if the queries alone had erred
            gone = np.repeat(np.eye(s) - a[:, :, :r] @ b[:, :, :r].transpose(0, 2, 1), width.repeat, axis=0)
            movement[r] = _moves(_mix(Wq, gone), *reaction)
        return {**found, "movement": movement}

    return weights.remember(("slicing", "planes-2", *_seen(group, weights, statistics)), compute)


def _second_of_output(W: Array, bias: Array | None, known: InputStatistics) -> Array:
    """E[y y^T] (N, N) of y = x W + b."""
    assert known.second is not None and known.mean is not None
    moment: Array = W.T @ known.second @ W
    if bias is None:
        return moment
    mixed = np.outer(known.mean @ W, bias)
    moment += mixed + mixed.T + np.outer(bias, bias)
    return moment


def _turned(group: Group, width: Width, weights: Weights, statistics: StatisticsSource) -> Factors:
    """order (s/2,): the planes, those that go last first; lost (s/2 + 1,), the relative squared loss of keeping the first of them."""

    def compute() -> Factors:
        query = group.sites[0]
        asked, heard = (
            _squares(weights.matrix(s), weights.bias(s), _known(s, statistics))
            .reshape(width.heads, -1, 2, width.size // 2)
            .sum(axis=2)
            for s in group.sites
        )
        energy = np.einsum("hrp,hp->p", asked, heard[:, 0])
        reaction = _reaction(query, weights, statistics)
        if reaction is None:
            order, _ = _least(np.diag(energy))
        else:
            (C, G), W = reaction, weights.matrix(query)
            felt = ((W.T @ C @ W) * G.T).reshape(-1, width.size // 2, len(G))
            felt = felt.sum(axis=0).reshape(width.size // 2, -1, width.size // 2).sum(axis=1)
            order, movement = _least(felt)
        lost = np.concatenate([np.cumsum(energy[order][::-1])[::-1], [0.0]])
        found = {"order": order, "lost": lost / max(float(energy.sum()), np.finfo(np.float64).tiny)}
        return found if reaction is None else {**found, "movement": movement}

    return weights.remember(("slicing", "turned-1", *_seen(group, weights, statistics)), compute)


def _squares(W: Array, bias: Array | None, known: InputStatistics) -> Array:
    """E[y^2] (N,) of y = x W + b."""
    assert known.second is not None and known.mean is not None
    found: Array = np.einsum("kn,kn->n", W, known.second @ W)
    return found if bias is None else found + bias * (2.0 * (known.mean @ W) + bias)


def _least(T: Array) -> tuple[Array, Array]:
    """Which go last first, and what keeping the first r costs: the sum of T over the rows and columns of those that went."""
    gone: list[int] = []
    costs = [0.0]
    steps = np.diagonal(T).copy()
    for _ in range(len(T)):
        j = int(np.argmin(steps))
        costs.append(costs[-1] + float(steps[j]))
        gone.append(j)
        steps += T[:, j] + T[j]
        steps[j] = np.inf
    return np.array(gone[::-1]), np.array(costs[::-1])


def _cut_planes(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> Factors:
    planes = np.sort(_turned(group, width, weights, statistics)["order"][: rank // 2].astype(np.int64))
    kept = np.concatenate([planes, planes + width.size // 2])
    factors = {"kept": kept.astype(np.int32)}
    for i, site in enumerate(group.sites):
        columns = (np.arange(site.N // width.size)[:, None] * width.size + kept).reshape(-1)
        factors[f"weight.{i}"] = weights.matrix(site)[:, columns]
        if (bias := weights.bias(site)) is not None:
            factors[f"bias.{i}"] = bias[columns]
    return factors


def _cut_queries(
    group: Group, width: Width, weights: Weights, statistics: StatisticsSource, rank: int
) -> Factors:
    if width.planes:
        return _cut_planes(group, width, weights, statistics, rank)
    query, key = group.sites
    planes = _planes(group, width, weights, statistics)
    A = np.repeat(planes["a"][:, :, :rank], width.repeat, axis=0)
    B = planes["b"][:, :, :rank]
    factors = {"kept": np.arange(rank, dtype=np.int32)}
    for i, (site, mix) in enumerate(((query, A), (key, B))):
        factors[f"weight.{i}"] = _mix(weights.matrix(site), mix)
        if (bias := weights.bias(site)) is not None:
            factors[f"bias.{i}"] = _mix(bias[None], mix)[0]
    return factors


# --- small algebra -------------------------------------------------------------------------------------------------


def _eigh(G: Array) -> tuple[Array, Array]:
    """Eigenvalues (falling, never negative) and eigenvectors (signs fixed) of a symmetric matrix."""
    values, vectors = np.linalg.eigh(0.5 * (G + G.T))
    return np.maximum(values[::-1], 0.0), _fix_signs(vectors[:, ::-1])


def _fix_signs(V: Array) -> Array:
    """Columns with their largest entry positive: LAPACK leaves the sign to chance."""
    largest = V[np.abs(V).argmax(axis=0), np.arange(V.shape[1])]
    return V * np.where(largest < 0, -1.0, 1.0)


factorizations: tuple[Factorization, ...] = (Slicing(),)
