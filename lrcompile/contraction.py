"""Contraction: a network of small arrays between x and y becomes a short list of MatMul, Reshape and Transpose. Pure.

    y[t, outputs] = sum over all other axes of  x[t, inputs] * core_1[..] * core_2[..] * ..

x takes up one core after the other, never core meets core: what is constant on both sides a runtime would multiply out again,
and the searches of opt_einsum would not leave it alone. So the order is the cheapest of these, by opt_einsum's count, found over
subsets of the cores: the axes that are left depend on which cores were taken, not on their order. An axis that both sides of a
step have is contracted when nobody needs it later, else it is a batch of the product:

    left [batch, rows, contracted] @ core [batch, contracted, free] = [batch, rows, free]

x always stands on the left. Cores are stored as the step reads them, so that only activations are ever transposed; what two
neighbouring steps reshape or transpose is done once, or not at all. No shape holds the number of rows t: there stands -1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from opt_einsum.helpers import flop_count

ROWS = ""  # the axis t

Axes = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """Axes of x (without t) and of y in order, of every core, and their sizes.

    folded: there is no x, y is the matrix itself. cropped: the K and N of the matrix where the axes hold more: x is padded, y cut.
    """

    inputs: Axes
    outputs: Axes
    cores: tuple[Axes, ...]
    sizes: Mapping[str, int]
    folded: bool = False
    cropped: tuple[int, int] | None = None

    def size(self, axes: Iterable[str]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def shape(self, axes: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.sizes[a] for a in axes)

    @property
    def parameters(self) -> int:
        return sum(self.size(core) for core in self.cores)

    @property
    def start(self) -> Axes:
        """Axes of what the cores are multiplied into: x, or of a folded network its first core."""
        return self.cores[0] if self.folded else (ROWS, *self.inputs)

    @property
    def end(self) -> Axes:
        return (*self.inputs, *self.outputs) if self.folded else (ROWS, *self.outputs)


@dataclass(frozen=True, slots=True)
class Step:
    """One node. argument: the shape (-1: rows), the permutation, or (the number of the core,)."""

    op: Literal["Reshape", "Transpose", "MatMul"]
    argument: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """steps: what is done to x. stored: of every core its axes in the order, and the shape, in which a step reads it.

    flops: 2 a multiplication, for one row. path: the cores in the order in which x meets them.
    """

    steps: tuple[Step, ...]
    stored: tuple[tuple[Axes, tuple[int, ...]], ...]
    flops: int
    path: tuple[int, ...]


def flops(network: Network) -> int:
    """FLOPs for one row of x, in the cheapest order."""
    return _cheapest(network)[0]


def compiled(network: Network) -> Contraction:
    """The steps for the cheapest order."""
    spent, path = _cheapest(network)
    tape = _Tape(network)
    stored = {0: (network.cores[0], network.shape(network.cores[0]))} if network.folded else {}
    for i, core in enumerate(path):
        axes, pending = _solid(network, network.cores[core]), path[i + 1 :]
        needed = {*network.end, *(a for n in pending for a in network.cores[n])}
        batch = tuple(a for a in tape.at if a in axes and a in needed)
        contracted = tuple(a for a in tape.at if a in axes and a not in needed)
        rows = tuple(a for a in tape.at if a not in axes)
        free = _by_need(network, [a for a in axes if a not in tape.at], pending)
        groups = (rows, contracted) if not batch else (batch, rows, contracted)
        tape.arrange((*batch, *rows, *contracted))
        tape.group(groups)
        tape.multiply(core, free)
        trivial = tuple(a for a in network.cores[core] if network.sizes[a] == 1)
        read = (contracted, free) if not batch else (batch, contracted, free)
        stored[core] = (*trivial, *batch, *contracted, *free), tuple(map(network.size, read))
    tape.arrange(_solid(network, network.end))
    left = network.inputs if network.folded else (ROWS,)
    tape.group((_solid(network, left), _solid(network, network.outputs)))
    return Contraction(tuple(tape.steps), tuple(stored[i] for i in range(len(network.cores))), spent, path)


def _solid(network: Network, axes: Axes) -> Axes:
    """Without those of size one."""
    return tuple(a for a in axes if a == ROWS or network.sizes[a] > 1)


def _by_need(network: Network, axes: Sequence[str], pending: Sequence[int]) -> Axes:
    """What is met last, or stays, stands first: then it need not be moved when its neighbours are contracted."""

    def met(axis: str) -> tuple[int, int]:
        if axis in network.end:
            return -len(pending), network.end.index(axis)
        return -max(i for i, core in enumerate(pending) if axis in network.cores[core]), 0

    return tuple(sorted(axes, key=met))


def _cheapest(network: Network) -> tuple[int, tuple[int, ...]]:
    """FLOPs a row and the order of the cores, by dynamic programming over which were taken."""
    sizes = {**network.sizes, ROWS: 1}
    first = 1 if network.folded else 0
    count = len(network.cores)
    whole = (1 << count) - 1
    cores = [frozenset(core) for core in network.cores]
    end = frozenset(network.end)
    best: dict[int, tuple[int, tuple[int, ...], frozenset[str]]] = {first: (0, (), frozenset(network.start))}
    for taken in range(first, whole):
        if taken not in best:
            continue
        spent, path, at = best[taken]
        for core in range(count):
            if taken >> core & 1:
                continue
            after = taken | 1 << core
            involved = at | cores[core]
            left = end.union(*(cores[i] for i in range(count) if not after >> i & 1))
            cost = spent + int(flop_count(involved, True, 2, sizes))
            if after not in best or cost < best[after][0]:
                best[after] = cost, (*path, core), involved & left
    spent, path, _ = best[whole]
    return spent, path


class _Tape:
    """Steps as they are made, a Reshape only where the shape changes and never two in a row. at: the axes as they lie."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.at = _solid(network, network.start)
        self.steps: list[Step] = []
        self._grouped: tuple[Axes, ...] = tuple((a,) for a in self.at)
        self._shape: tuple[int, ...] = network.shape(network.start) if network.folded else ()
        if not network.folded:  # x comes in any rank
            self.group(((ROWS,), self.at[1:]))

    def arrange(self, wanted: Axes) -> None:
        """Bring the axes into this order."""
        if wanted != self.at:
            self.group(tuple((a,) for a in self.at))
            perm = tuple(self.at.index(a) for a in wanted)
            self.steps.append(Step("Transpose", perm))
            self.at, self._grouped = wanted, tuple((a,) for a in wanted)
            self._shape = tuple(self._shape[p] for p in perm)

    def group(self, groups: tuple[Axes, ...]) -> None:
        """Let axes that lie side by side share a dimension."""
        self._grouped = groups
        shape = tuple(-1 if ROWS in g else self.network.size(g) for g in groups)
        if shape == self._shape:
            return
        if self.steps and self.steps[-1].op == "Reshape":
            self.steps.pop()
        self.steps.append(Step("Reshape", shape))
        self._shape = shape

    def multiply(self, core: int, free: Axes) -> None:
        """The last dimension is contracted, and the core's own axes stand there instead."""
        self.steps.append(Step("MatMul", (core,)))
        kept = self._grouped[:-1]
        self.at, self._grouped = (*(a for group in kept for a in group), *free), (*kept, free)
        self._shape = (*self._shape[:-1], self.network.size(free))
