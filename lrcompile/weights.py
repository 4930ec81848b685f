"""Weights as matrices: read from the mapped file when asked for, one at a time."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from lrcompile import spectra
from lrcompile.graph import FLOATS, dims, tensor_of
from lrcompile.interfaces import Array, Factors, StatisticsSource
from lrcompile.records import Group, Site

if TYPE_CHECKING:
    from lrcompile.store import Cache

T = TypeVar("T")
S = TypeVar("S")

_WORKERS = 2  # of one BLAS thread each: faster than one of two, and twice the memory
_SMALL = 8 << 20  # elements of a matrix (64 MB in float64) of which two may be in memory at once


class ModelWeights:
    """The `interfaces.Weights` of one model. Each thread holds on to its last matrix only; hashes are kept."""

    def __init__(self, cache: Cache, opset: int) -> None:
        self.cache, self.opset = cache, opset
        self._hashes: dict[int, str] = {}
        self._kept = threading.local()
        self._writing = threading.Lock()

    def matrix(self, site: Site) -> Array:
        last: tuple[str, Array] | None = getattr(self._kept, "last", None)
        if last is None or last[0] != site.name:
            self._kept.last = last = None  # gone before the next one is made
            stored = evaluate(site.root, self.opset)
            matrix = np.ascontiguousarray(
                site.layout.apply(stored), dtype=np.float64
            ).view()  # perhaps of the mapped file
            matrix.flags.writeable = False
            self._kept.last = last = (site.name, matrix)
        return last[1]

    def bias(self, site: Site) -> Array | None:
        """b with output = scale (x W + b), whatever factors the node has before its addend."""
        if site.bias is None or site.wiring is None:
            return None
        tensor = tensor_of(site.bias.value)
        assert tensor is not None
        b: Array = tensor.numpy().astype(np.float64).reshape(-1)
        return b * (site.bias.scale / site.wiring.scale) if site.wiring.scale else None

    def remember(self, key: tuple[str, ...], compute: Callable[[], Factors]) -> Factors:
        if self.cache.has(key):
            return self.cache.remember(key, compute)
        arrays = compute()
        with self._writing:  # a new scratch folder must not look like an abandoned one to another thread
            return self.cache.remember(key, lambda: arrays)

    def low_rank_errors(self, group: Group, statistics: StatisticsSource | None) -> Array:
        errors: Array = self._spectrum(group, statistics)["errors"]
        return errors

    def low_rank_movements(self, group: Group, statistics: StatisticsSource | None) -> Array | None:
        return self._spectrum(group, statistics).get("movements")

    def low_rank(self, group: Group, statistics: StatisticsSource | None, rank: int) -> Factors:
        return spectra.low_rank(group, self, statistics, self._spectrum(group, statistics), rank)

    def _spectrum(self, group: Group, statistics: StatisticsSource | None) -> Factors:
        """Kept between ranks, methods and runs."""
        seen = tuple(statistics.key(s) for s in group.sites) if statistics is not None else ()
        centred = str(spectra.centres(group, statistics))
        key = ("spectrum-4", group.kind, *(self.key(s) for s in group.sites), centred, *seen)
        return self.remember(key, lambda: spectra.spectrum(group, self, statistics))

    def key(self, site: Site) -> str:
        bias = None
        if site.bias is not None and site.wiring is not None:
            bias = (self._identity(site.bias.value), site.bias.scale, site.wiring.scale)
        known = (self._identity(site.root), site.layout, bias, *filter(None, [site.window]))
        digest = hashlib.sha256(repr(known).encode())
        return digest.hexdigest()

    def itemsize(self, site: Site) -> int:
        return storage_of(site).bitwidth // 8

    def _identity(self, value: ir.Value | None) -> object:
        tensor = tensor_of(value)
        if tensor is not None:
            if id(tensor) not in self._hashes:
                array = np.ascontiguousarray(tensor.numpy())
                self._hashes[id(tensor)] = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
            return (tensor.dtype.name, dims(tensor), self._hashes[id(tensor)])
        node = value.producer() if value is not None else None
        if node is None:
            return None
        attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values()))
        return (node.op_type, attributes, tuple(self._identity(v) for v in node.inputs))


def side_by_side(work: Callable[[T], S], items: Iterable[T], group_of: Callable[[T], Group]) -> Iterator[S]:
    """What work makes of each item, in order: two at a time, each in a thread of its own, where the group's matrices are small.

    A large one is alone in memory. What comes out does not depend on it: an item's arrays are made by one thread.
    """
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        ahead: deque[Future[S]] = deque()
        try:
            for item in items:
                if sum(s.K * s.N for s in group_of(item).sites) > _SMALL:
                    while ahead:
                        yield ahead.popleft().result()
                    yield pool.submit(work, item).result()
                else:
                    ahead.append(pool.submit(work, item))
                    if len(ahead) > _WORKERS:
                        yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # interrupted, or one failed: what has not begun never will
            for future in ahead:
                future.cancel()


def storage_of(site: Site, asked: str | None = None) -> ir.DataType:
    """The float type that factors of this site are stored in: what was asked for, else the weight's own, or the computing type where that
    is no float."""
    if asked is not None and (dtype := ir.DataType.__members__.get(asked.upper())) in FLOATS:
        return dtype
    stored = ir.DataType[site.stored.upper()]
    return stored if stored in FLOATS else ir.DataType[site.dtype.upper()]


def evaluate(value: ir.Value, opset: int) -> Array:
    """What a constant value holds: the tensor, or what Cast, DequantizeLinear and the like make of it."""
    tensor = tensor_of(value)
    if tensor is not None:
        array: Array = tensor.numpy()
        return array
    node = value.producer()
    assert node is not None
    inputs = {v.name: evaluate(v, opset) for v in node.inputs if v is not None}
    outputs = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, inputs)
    result: Array = outputs[node.outputs.index(value)]
    return result
