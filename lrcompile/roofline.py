"""How fast a model could be on a device: its weights read once and its products computed at the best rates that were measured there.

    seconds = sum over sites of max(weight bytes / bandwidth, 2 rows K N / peak)

Sites run one after the other, so each is bound by the slower of the two; activations are left out, for a cache may hold them. Both
ceilings are measured inside the runtime itself, once a device, by two micro graphs: the maximum of every row of a large array, and a
product of large matrices. Small weights may stay in a cache and so be read faster than memory could: then the share exceeds one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from lrcompile.cost import dense_flops, rows_of
from lrcompile.interfaces import Array, BuildOptions, Engine
from lrcompile.records import Finding, ShapeRange
from lrcompile.registry import runtime_of
from lrcompile.store import new_folder, read_json, save_model, write_json

if TYPE_CHECKING:
    from lrcompile.child import Child

_SAMPLES, _SAMPLE = 7, 0.02  # how often, and for how many seconds each
# Rows and columns of the array that is read, and the size of the matrices: beyond any cache, and large enough to fill the device.
_ON_CPU, _ON_GPU = ((4096, 8192), 1024), ((8192, 32768), 8192)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best rates that were measured. bandwidth: bytes a second; peak: FLOPs a second, in the type `dtype`."""

    dtype: str
    bandwidth: float
    peak: float

    def seconds(self, weight_bytes: int, flops: int) -> float:
        return max(weight_bytes / self.bandwidth, flops / self.peak)


def roofline(model: ir.Model, finding: Finding, feed: Mapping[str, Array], ceilings: Ceilings) -> float:
    """Seconds that the model's sites take at least on this feed."""
    rows = rows_of(model, finding, feed)
    total, seen = 0.0, set[str]()
    for site in finding.sites:
        if site.refusal is not None:
            continue
        bits = ir.DataType[site.stored.upper()].bitwidth
        elements = rows[site.name] * site.N if site.kind == "lookup" else site.elements
        size = 0 if site.weight in seen and site.kind != "lookup" else elements * bits // 8
        seen.add(site.weight)
        total += ceilings.seconds(size, rows[site.name] * dense_flops(site))
    return total


def computing_type(finding: Finding) -> str:
    """The type that most of the model's products are computed in."""
    weight: dict[str, int] = {}
    for site in finding.sites:
        if site.refusal is None and site.kind == "linear":
            weight[site.dtype] = weight.get(site.dtype, 0) + site.elements
    return max(weight, key=lambda t: (weight[t], t), default="float")


def ceilings_of(
    child: Child,
    options: BuildOptions,
    described: Mapping[str, str],
    dtype: str,
    *,
    cache: Path,
    scratch: Path,
) -> Ceilings:
    """The device's ceilings in a type: those that are kept in the cache folder, else measured now. described: of an engine there."""
    key = json.dumps([sorted(described.items()), options.target, options.threads, dtype])
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.is_file():
        return Ceilings(**read_json(path))
    (rows, columns), size = _ON_CPU if "cpu" in described.get("device", "cpu").lower() else _ON_GPU
    itemsize = ir.DataType[dtype.upper()].itemsize
    reading = _seconds(child, options, _reader(dtype), {"x": (rows, columns)}, dtype, scratch / "read")
    product = _seconds(
        child, options, _product(dtype), {"x": (size, size), "w": (size, size)}, dtype, scratch / "product"
    )
    found = Ceilings(dtype, rows * columns * itemsize / reading, 2 * size**3 / product)
    new_folder(cache)
    write_json(path, asdict(found))
    return found


def _seconds(
    child: Child, options: BuildOptions, model: ir.Model, shapes: Mapping[str, tuple[int, ...]], dtype: str, folder: Path
) -> float:  # fmt: skip
    path = save_model(model, new_folder(folder))
    builds = runtime_of(options.target).engine_file(options.target) is not None
    ranges = tuple(ShapeRange(n, s, s, s) for n, s in shapes.items()) if builds else ()
    options = replace(options, engine=replace(options.engine, shapes=ranges))
    with child.build(options.target, path, options) as engine:
        seconds: float = child.call(
            "lrcompile.roofline:quickest",
            engine,
            dict(shapes),
            dtype,
            threads=options.threads,
            what="measuring the device",
        )
    return seconds


def quickest(engine: Engine, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> float:
    """Runs in the child: seconds of a run, the shortest of a few samples."""
    tile = np.random.default_rng(0).standard_normal(1 << 16).astype(ir.DataType[dtype.upper()].numpy())
    run = engine.bound({name: np.resize(tile, shape) for name, shape in shapes.items()})
    run(2)
    start = time.perf_counter()
    run(1)
    repeats = max(1, round(_SAMPLE / max(time.perf_counter() - start, 1e-7)))
    samples = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        run(repeats)
        samples.append((time.perf_counter() - start) / repeats)
    return min(samples)  # a ceiling: what else runs on the machine can only make it look lower


def _reader(dtype: str) -> ir.Model:
    kind, tape = ir.DataType[dtype.upper()], ir.tape.Tape()
    x = ir.val("x", kind, ir.Shape(["rows", "columns"]))
    y = tape.op("ReduceMax", [x], {"axes": [1], "keepdims": 0}, name="read")
    return _model([x], y, kind, ["rows"], tape)


def _product(dtype: str) -> ir.Model:
    kind, tape = ir.DataType[dtype.upper()], ir.tape.Tape()
    x, w = ir.val("x", kind, ir.Shape(["m", "k"])), ir.val("w", kind, ir.Shape(["k", "n"]))
    return _model([x, w], tape.op("MatMul", [x, w], name="product"), kind, ["m", "n"], tape)


def _model(
    inputs: list[ir.Value], y: ir.Value, kind: ir.DataType, shape: list[str], tape: ir.tape.Tape
) -> ir.Model:
    y.name, y.type, y.shape = "y", ir.TensorType(kind), ir.Shape(shape)
    return ir.Model(
        ir.Graph(inputs, [y], nodes=tape.nodes, opset_imports={"": 17}, name="ceiling"), ir_version=8
    )
