"""Families of cores against low rank: the error at equal parameters, the products they take, and what they cost to compute.

    python benchmarks/families.py errors MODEL.onnx     markdown for docs/families.md: real weights and one structured weight
    python benchmarks/families.py times 1024 2048       seconds of decomposition and factors, in those of an SVD of the same weight
    python benchmarks/families.py forms 1024            the same of tables of this width, and of 3x3 kernels of a quarter of it

Errors are plain relative Frobenius errors at (at most) a share of the weight's parameters, the best structure of each family. Besides
the families of this package it has two that are not in it: the tensor ring (TR-SVD, then the same fit as all) and hierarchical Tucker.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from lrcompile.blocks import block_energy
from lrcompile.contraction import Network, flops
from lrcompile.cores import product
from lrcompile.fitting import fitted
from lrcompile.interfaces import Array, CandidateOptions
from lrcompile.networks import NetworkFactorization
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weighing import Weighing
from lrcompile.weights import ModelWeights
from lrcompile_passes.tensor_train import modes

FAMILIES = ("btt", "monarch", "kronecker", "tt")
TABLES = ("grouped", "tt-table", "tt-vector")
KERNELS = ("conv-channel", "conv-spatial", "tucker2", "cp")
SITES = (
    "layer.0.attention.self.query",
    "layer.3.attention.output",
    "layer.3.intermediate",
    "layer.3.output.dense",
)
Point = tuple[float, float, str]  # relative error, FLOPs in those of the weight, the structure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    errors = commands.add_parser("errors")
    errors.add_argument("model")
    errors.add_argument("--share", type=float, nargs="+", default=[0.5])
    commands.add_parser("times").add_argument("sizes", type=int, nargs="+")
    commands.add_parser("forms").add_argument("sizes", type=int, nargs="+")
    options = parser.parse_args()
    if options.command == "forms":
        print_forms(options.sizes)
    elif options.command == "times":
        print_times(options.sizes)
    else:
        print_errors(options.model, options.share)


def print_errors(path: str, shares: Sequence[float]) -> None:
    cases = [(name, W, share) for name, W in weights_of(path) for share in shares]
    structured, kept = block_train(384, 384)
    cases.append(("block tensor train, 4 x 4 blocks of rank 16, 1 % noise", structured, kept))
    methods = {
        "svd": svd, "pivoted": pivoted, **{n: best_of(n) for n in FAMILIES[:-1]}, "tt, split": best_of("tt", "split"),
        "tt, paired or crossed": best_of("tt", "paired", "crossed"), "tensor ring": ring, "hierarchical Tucker": tucker,
    }  # fmt: skip
    print("| weight | kept |", *(f" {n} |" for n in methods), sep="")
    print("|---|---|", "---|" * len(methods), sep="")
    for name, W, share in cases:
        row = [f"| {name} {W.shape[0]} x {W.shape[1]} | {share:.3f} |"]
        for method in methods.values():
            error, products, structure = method(W, share * W.size)
            row.append(f" {error:.3f} ({products:.2g} x{structure}) |")
            print(row[-1], file=sys.stderr, flush=True)
        print("".join(row), flush=True)


def weights_of(path: str) -> Iterator[tuple[str, Array]]:
    model = ir.load(path)
    with tempfile.TemporaryDirectory() as folder:
        weights = ModelWeights(Cache(folder), 18)
        for site in find(model).sites:
            if site.kind == "linear" and any(wanted in site.name for wanted in SITES):
                yield site.name, weights.matrix(site)


def block_train(K: int, N: int) -> tuple[Array, float]:
    """A weight that has the structure, with 1 % noise; and its share of the parameters."""
    rng = np.random.default_rng(0)
    network = family("btt").network(K, N, (("k", f"4x{K // 4}"), ("n", f"{N // 4}x4")), 16)
    W = product(network, [rng.standard_normal(network.shape(axes)) for axes in network.cores])
    return W + 0.01 * np.sqrt(np.mean(W**2)) * rng.standard_normal(W.shape), network.parameters / (K * N)


def family(name: str):  # type: ignore[no-untyped-def]
    found = factorization(name)
    assert isinstance(found, NetworkFactorization)
    return found.family


def svd(W: Array, parameters: float) -> Point:
    K, N = W.shape
    rank = int(parameters / (K + N))
    return relative(W, block_energy(W, 1, 1)[rank]), rank * (K + N) / W.size, ""


def pivoted(W: Array, parameters: float) -> Point:
    K, N = W.shape
    rank = int((K + N - math.sqrt((K + N) ** 2 - 4 * parameters)) / 2)
    return relative(W, block_energy(W, 1, 1)[rank]), rank * (K + N - rank) / W.size, ""


def best_of(name: str, *orders: str) -> Callable[[Array, float], Point]:
    """The structure of a family that errs least, by its factors."""

    def method(W: Array, parameters: float) -> Point:
        it, found = family(name), []
        K, N = W.shape
        for structure in it.structures(K, N):
            if orders and dict(structure)["order"] not in orders:
                continue
            rank = largest_rank(
                lambda r, s=structure: it.network(K, N, s, r), it.largest(K, N, structure), parameters
            )
            if rank:
                network = it.network(K, N, structure, rank)
                made = it.cores(W, it.decompose(W, Weighing(None, 1.0), structure), structure, rank)
                error = relative(W, float(np.sum((W - product(network, made)) ** 2)))
                found.append((error, flops(network) / (2 * W.size), f", {words(structure)}"))
        return min(found, default=(math.nan, math.nan, ""))

    return method


def ring(W: Array, parameters: float) -> Point:
    """Three paired cores in a ring: TR-SVD with its first bond split evenly, then fitted."""
    (k, n), shape = _three(W), _groups(W)

    def network(rank: int) -> Network:
        sizes = dict(zip(("k0", "k1", "k2", "n0", "n1", "n2"), (*k, *n), strict=True))
        cores = (("s0", "k0", "n0", "s1"), ("s1", "k1", "n1", "s2"), ("s2", "k2", "n2", "s0"))
        first = max(1, round(math.sqrt(rank)))
        return Network(
            ("k0", "k1", "k2"), ("n0", "n1", "n2"), cores, {**sizes, "s0": first, "s1": rank, "s2": rank}
        )

    it = network(largest_rank(network, shape[0], parameters))
    s0, s1, s2 = it.shape(("s0", "s1", "s2"))
    tensor = _paired(W, k, n)
    U, values, Vt = np.linalg.svd(tensor.reshape(shape[0], -1), full_matrices=False)
    U, rest = _wide(U, s0 * s1), _wide((values[:, None] * Vt).T, s0 * s1).T
    first = U.reshape(shape[0], s0, s1).transpose(1, 0, 2)
    rest = rest.reshape(s0, s1 * shape[1], shape[2]).transpose(1, 2, 0).reshape(s1 * shape[1], -1)
    U, values, Vt = np.linalg.svd(rest, full_matrices=False)
    second, third = _wide(U, s2), _wide((values[:, None] * Vt).T, s2).T.reshape(s2, shape[2], s0)
    cores = [c.reshape(it.shape(axes)) for c, axes in zip((first, second, third), it.cores, strict=True)]
    for _ in range(5):
        cores = list(fitted(W, it, cores, None, None))
    return relative(W, float(np.sum((W - product(it, cores)) ** 2))), flops(it) / (2 * W.size), ""


def tucker(W: Array, parameters: float) -> Point:
    """A balanced tree over four paired modes: leaves, two inner nodes and the root, by truncated SVDs from the leaves up."""
    K, N = W.shape
    k, n = modes(K, 4), modes(N, 4)
    tensor = _paired(W, k, n)
    shape = tensor.shape
    ks, ns = tuple(f"k{i}" for i in range(4)), tuple(f"n{i}" for i in range(4))
    leaves = tuple((f"k{i}", f"n{i}", f"r{i}") for i in range(4))
    inner = (("r0", "r1", "a"), ("r2", "r3", "b"), ("a", "b"))

    def network(rank: int) -> Network:
        sizes = {**dict(zip(ks, k, strict=True)), **dict(zip(ns, n, strict=True))}
        r = {f"r{i}": min(rank, shape[i]) for i in range(4)}
        top = min(r["r0"] * r["r1"], r["r2"] * r["r3"], rank)
        return Network(ks, ns, (*leaves, *inner), {**sizes, **r, "a": top, "b": top})

    it = network(largest_rank(network, math.prod(shape[:2]), parameters))
    bases = [leading(np.moveaxis(tensor, i, 0).reshape(shape[i], -1), it.sizes[f"r{i}"]) for i in range(4)]
    small = tensor
    for base in bases:
        small = np.tensordot(small, base, axes=(0, 0))
    pair = small.reshape(small.shape[0] * small.shape[1], -1)
    left, right = leading(pair, it.sizes["a"]), leading(pair.T, it.sizes["b"])
    made = [*bases, left, right, left.T @ pair @ right]
    cores = [c.reshape(it.shape(axes)) for c, axes in zip(made, it.cores, strict=True)]
    return relative(W, float(np.sum((W - product(it, cores)) ** 2))), flops(it) / (2 * W.size), ""


def leading(M: Array, rank: int) -> Array:
    return np.linalg.svd(M, full_matrices=False)[0][:, :rank]


def largest_rank(network: Callable[[int], Network], most: int, parameters: float) -> int:
    """The largest that fits; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if network(middle).parameters <= parameters else (low, middle - 1)
    return low


def relative(W: Array, lost: float) -> float:
    return math.sqrt(max(float(lost), 0.0) / float(np.vdot(W, W)))


def words(structure: Sequence[tuple[str, int | str]]) -> str:
    return " ".join(f"{name}={value}" for name, value in structure)


def _three(W: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return modes(W.shape[0], 3), modes(W.shape[1], 3)


def _groups(W: Array) -> tuple[int, ...]:
    k, n = _three(W)
    return tuple(a * b for a, b in zip(k, n, strict=True))


def _paired(W: Array, k: Sequence[int], n: Sequence[int]) -> Array:
    order = [i for pair in zip(range(len(k)), range(len(k), 2 * len(k)), strict=True) for i in pair]
    return W.reshape(*k, *n).transpose(order).reshape([a * b for a, b in zip(k, n, strict=True)])


def _wide(U: Array, columns: int) -> Array:
    """The first columns, zeros where there are fewer."""
    return np.pad(U[:, :columns], ((0, 0), (0, max(0, columns - U.shape[1]))))


def print_times(sizes: Sequence[int]) -> None:
    print("| size | SVD, s |", *(f" {n} |" for n in FAMILIES), sep="")
    print("|---|---|", "---|" * len(FAMILIES), sep="")
    for size in sizes:
        rng = np.random.default_rng(0)
        W = rng.standard_normal((size, size))
        X = rng.standard_normal((2 * size, size)) * np.geomspace(2, 0.1, size)
        C = X.T @ X / len(X)
        weighing = Weighing(C, float(np.vdot(W, C @ W)))
        whole = seconds(lambda W=W: np.linalg.svd(W, full_matrices=False))
        row = [f"| {size} | {whole:.1f} |"]
        for name in FAMILIES:
            row.append(f" {seconds(lambda W=W, w=weighing, n=name: work(n, W, w)) / whole:.2f} |")
            print(row[-1], file=sys.stderr, flush=True)
        print("".join(row), flush=True)


def print_forms(sizes: Sequence[int]) -> None:
    print("| weight | SVD, s |", *(f" {n} |" for n in (*TABLES, *KERNELS)), sep="")
    print("|---|---|", "---|" * len((*TABLES, *KERNELS)), sep="")
    for size in sizes:
        rng, channels = np.random.default_rng(0), size // 4
        table = rng.standard_normal((size, size), dtype=np.float32)
        kernel = rng.standard_normal((channels, channels, 3, 3), dtype=np.float32)
        row("table", table, table, TABLES, KERNELS)
        row("kernel", kernel, kernel.reshape(channels, -1), KERNELS, TABLES)


def row(kind: str, weight: Array, matrix: Array, served: Sequence[str], others: Sequence[str]) -> None:
    """One weight alone in a model: all candidates of a method, and the factors of the one nearest half of the parameters."""
    op, x = ("Gather", ir.DataType.INT64) if kind == "table" else ("Conv", ir.DataType.FLOAT)
    shape = ["n"] if kind == "table" else ["n", weight.shape[1], 16, 16]
    ids, w = ir.val("x", x, ir.Shape(shape)), ir.val("w", const_value=ir.tensor(weight, name="w"))
    tape = ir.tape.Tape()
    y = tape.op(op, [w, ids] if kind == "table" else [ids, w])
    y.name, y.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([ids], [y], nodes=tape.nodes, initializers=[w], opset_imports={"": 18}, name="g")
    (group,) = find(ir.Model(graph, ir_version=9)).groups
    whole = seconds(lambda: np.linalg.svd(matrix.astype(np.float64), full_matrices=False))
    cells = {}
    for name in served:
        with tempfile.TemporaryDirectory() as folder:
            weights, method = ModelWeights(Cache(folder), 18), factorization(name)

            def all_of_it(method=method, weights=weights) -> None:  # type: ignore[no-untyped-def]
                found = list(method.candidates(group, weights, None, CandidateOptions(multiple=8)))
                half = min(found, key=lambda c: abs(c.cost.parameters - weight.size / 2))
                method.factorize(group, weights, None, half, 0)

            cells[name] = f" {seconds(all_of_it) / whole:.2f} |"
    cells |= dict.fromkeys(others, " |")
    shown = "x".join(map(str, weight.shape))
    print(f"| {kind} {shown} | {whole:.2f} |", *(cells[n] for n in (*TABLES, *KERNELS)), sep="", flush=True)


def work(name: str, W: Array, weighing: Weighing) -> None:
    """What a plan and then the factors cost at most: every structure priced, one measured at three ranks, its factors fitted."""
    it, (K, N) = family(name), W.shape
    for structure in it.structures(K, N):
        it.energy(W, structure)
    structure = it.structures(K, N)[0]
    found = it.decompose(W, weighing, structure)
    ranks = [max(1, it.largest(K, N, structure) // part) for part in (64, 16, 4)]
    for rank in ranks:
        network = it.network(K, N, structure, rank)
        cores = it.cores(W, found, structure, rank)
        weighing.error(W - product(network, cores))
    fitted(W, network, cores, *weighing.fitted)


def seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
