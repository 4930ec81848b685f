"""What a rewritten model is compared with: the original with its changed constants reconstructed, or moved by rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from lrcompile.factors import FactorSet, bias_in_place
from lrcompile.graph import Names, dims, tensor_of
from lrcompile.in_place import constant, copied, edit_bias, replace_weight
from lrcompile.interfaces import Array, Constant
from lrcompile.records import Site

_ROWS = 256  # of a matrix, moved at a time


def reconstructed(model: ir.Model, sets: Sequence[FactorSet], jitter: int | None = None) -> ir.Model:
    """A copy of the model in which every changed constant is its reconstruction, rounded to its type: the oracle.

    jitter: a seed by which its weights are moved as `jittered` moves the original's.
    """
    oracle = Reconstruction(model)
    oracle.put(sets, jitter)
    return oracle.model


class Reconstruction:
    """A copy of a model that takes reconstructed constants, group by group. model: the copy as it stands."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self._twins = copied(model)
        self._names = Names(self.model)

    def put(self, sets: Sequence[FactorSet], jitter: int | None = None) -> None:
        for factors in sets:
            changed = factors.method.reconstruct(factors.group, factors.load())
            for site in factors.group.sites:
                node = self._twins[site.node]
                if (site.name, "weight") in changed:
                    made = _reconstruction(factors, site)
                    if jitter is not None:
                        made = _jitter(made, site, _coarser(site, factors.storage), jitter)
                    replace_weight(self.model, site, node, self._names, site.layout.shape, made)
                edit_bias(self.model, site, self._twins, changed, self._names)

    def free(self, site: Site, matrix: Callable[[], Array]) -> dict[str, ir.Value]:
        """Give a site a weight (and a bias) that a caller may override, and keep its value as the default."""
        node = self._twins[site.node]
        replace_weight(self.model, site, node, self._names, site.layout.shape, matrix)
        weight = node.inputs[site.operand]
        assert weight is not None
        freed = {"weight": weight}
        if site.bias is not None:
            reader = self._twins[site.bias.node]
            old = reader.inputs[site.bias.index]
            tensor = tensor_of(old)
            assert old is not None and tensor is not None
            name = self._names.value(f"{site.name}/bias")
            value = constant(self.model, name, tensor.dtype, dims(tensor), tensor.numpy)
            reader.replace_input_with(site.bias.index, value)
            freed["bias"] = value
        return freed


def as_operands(site: Site, changed: Mapping[Constant, Array]) -> dict[str, Array]:
    """A site's changed weight and bias in the shapes and types in which its nodes read them."""
    made: dict[str, Array] = {}
    dtype = ir.DataType[site.dtype.upper()].numpy()
    if (matrix := changed.get((site.name, "weight"))) is not None:
        made["weight"] = site.operand_layout.apply(site.layout.invert(matrix)).astype(dtype)
    if (bias := changed.get((site.name, "bias"))) is not None and site.bias is not None:
        assert site.bias.value.dtype is not None
        made["bias"] = bias_in_place(site, bias).astype(site.bias.value.dtype.numpy())
    return made


def jittered(
    model: ir.Model, sets: Sequence[FactorSet], read: Callable[[Site], Array], seed: int
) -> ir.Model:
    """A copy in which every rewritten weight (N, K) is moved by half a unit in the last place, up or down by chance."""
    copy, twins = copied(model)
    names = Names(copy)
    for factors in sets:
        for site in factors.group.sites:
            moved = _jitter(partial(read, site), site, _coarser(site, factors.storage), seed)
            replace_weight(copy, site, twins[site.node], names, site.layout.shape, moved)
    return copy


def _reconstruction(factors: FactorSet, site: Site) -> Callable[[], Array]:
    return lambda: factors.method.reconstruct(factors.group, factors.load())[site.name, "weight"]


def _jitter(read: Callable[[], Array], site: Site, storage: ir.DataType, seed: int) -> Callable[[], Array]:
    """W moved by half a unit in the last place of each entry, or of a typical one where the entry is smaller.

    Factors are as exact as the whole matrix allows, not each entry: beside an outlier a small entry has no digits of its own.
    """

    def weight() -> Array:
        W = read()
        typical = np.linalg.norm(W) / np.sqrt(max(W.size, 1))
        # half a unit of float64 is nothing, because it is what we compute in
        half = 1.0 if storage == ir.DataType.DOUBLE else 0.5
        rng = np.random.default_rng((seed, site.elements))
        moved = np.empty_like(W)
        for start in range(0, len(W), _ROWS):  # a large matrix would be copied six times
            part = W[start : start + _ROWS]
            ulp = np.spacing(np.maximum(np.abs(part), typical).astype(storage.numpy())).astype(np.float64)
            moved[start : start + _ROWS] = (
                part + half * (2.0 * rng.integers(2, size=part.shape, dtype=np.int8) - 1.0) * ulp
            )
        return moved

    return weight


def _coarser(site: Site, storage: ir.DataType) -> ir.DataType:
    """Of the stored and the computing type the one with fewer digits: factors pass through both."""
    by_digits = (ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return max(storage, ir.DataType[site.dtype.upper()], key=by_digits.index)
