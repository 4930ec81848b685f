"""Cores fitted to what counts: alternating least squares on tr(E^T C E G), E = W - What, from a warm start.

What is linear in each core. With the others fixed the best core solves normal equations, which are never formed: a few steps of
conjugate gradients go down, one product C E G each, whatever the network. No step goes up, so the result is no worse than the
start; a start that is exact stays. Source of the alternation: Carroll and Chang 1970; of the descent: Hestenes and Stiefel 1952.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lrcompile.contraction import Network
from lrcompile.cores import einsum, multiplier
from lrcompile.interfaces import Array

_SWEEPS, _STEPS = 2, 4  # a product C E G each: with more a fit would cost more than ten decompositions
# A sweep that gains less is the last one; what is so small beside the weight itself is rounding.
_GAIN, _NOTHING = 1e-2, 1e-24
_TINY = 1e-200  # squares of what is smaller underflow


def fitted(
    W: Array, network: Network, cores: Sequence[Array], left: Array | None, right: Array | None
) -> tuple[Array, ...]:
    """Cores in the network's own axes that err less under C = left (K, K) and G = right (N, N); None stands for an identity."""
    made = list(cores)

    def weighed(E: Array) -> Array:
        E = E if left is None else left @ E
        return E if right is None else E @ right

    multiplied = multiplier(network)
    E = W - multiplied(made)
    lost, whole = float(np.vdot(E, weighed(E))), float(np.vdot(W, weighed(W)))
    for _ in range(_SWEEPS):
        if lost <= _NOTHING * whole:
            break
        before = lost
        for i in range(len(made)):
            made[i], E, lost = _descend(network, made, i, E, multiplied, weighed)
        if lost > (1.0 - _GAIN) * before:
            break
    return tuple(made)


def _descend(
    network: Network, cores: Sequence[Array], index: int, E: Array, multiplied: Callable[[Sequence[Array]], Array],
    weighed: Callable[[Array], Array],
) -> tuple[Array, Array, float]:  # fmt: skip
    """A better core, the error that is left, and what it counts."""

    def effect(step: Array) -> Array:
        return multiplied([*cores[:index], step, *cores[index + 1 :]])

    slope = _adjoint(network, cores, index)
    core, felt = cores[index].copy(), weighed(E)
    down = slope(felt)
    direction, size = down, float(np.vdot(down, down))
    least = max(_NOTHING * size, _TINY)
    for _ in range(_STEPS):
        if size <= least:
            break
        change = effect(direction)
        counts = weighed(change)
        curvature = float(np.vdot(change, counts))
        if curvature <= _TINY:
            break
        length = size / curvature
        core, E, felt = core + length * direction, E - length * change, felt - length * counts
        down = slope(felt)
        size, last = float(np.vdot(down, down)), size
        direction = down + (size / last) * direction
    return core, E, float(np.vdot(E, felt))


def _adjoint(network: Network, cores: Sequence[Array], index: int) -> Callable[[Array], Array]:
    """How a matrix (K, N) is felt by one core: the transpose of the product."""
    whole = (*network.inputs, *network.outputs)
    others = [i for i in range(len(cores)) if i != index]
    terms = [whole, *(network.cores[i] for i in others)]
    expression = einsum(network, terms, network.cores[index])
    K, N = network.size(network.inputs), network.size(network.outputs)

    def felt(M: Array) -> Array:
        if network.cropped is not None:
            M = np.pad(M, ((0, K - M.shape[0]), (0, N - M.shape[1])))
        slope: Array = expression(M.reshape(network.shape(whole)), *(cores[i] for i in others))
        return slope

    return felt
