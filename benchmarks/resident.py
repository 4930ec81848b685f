"""What stays in memory of weights in few bits: bytes of ONNX Runtime on the CPU after loading, and of TensorRT-RTX engines.

    python benchmarks/resident.py [--layers 24 --width 2048] [--storage float,int8,int4,...] [--capabilities 8.9,12.0]

prints a Markdown table for a chain of MatMul, each weight stored in the type as the compiler stores it. "resident" is what a process
holds after it has loaded the model, less what it holds after it has loaded one without weights; "engine" the bytes of the engine file,
built without a GPU. Each has a child process of its own.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lrcompile.child import Child
from lrcompile.encoding import OPSET, decode, parts_of
from lrcompile.graph import Builder
from lrcompile.interfaces import Array, BuildOptions
from lrcompile.quantize import plain, storage
from lrcompile.records import EngineOptions, ShapeRange
from lrcompile.registry import runtime_of

CPU = ("float", "int8", "int4", "int4-64", "int4-128", "uint4", "uint3", "uint2", "ternary", "sign")
RTX = ("float", "float16", "int8", "float8", "int4-32s32+", "int4-64s32+", "int4-128s32+")
FLOATS = {"float": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def chain(layers: int, width: int, name: str) -> ir.Model:
    """y = x (n, width) after so many turns of Tanh and MatMul, and a last Tanh. In float16 the whole graph is."""
    dtype = FLOATS.get(name, ir.DataType.FLOAT)
    weight = np.random.default_rng(0).standard_normal((width, width)) / np.sqrt(width)
    arrays = {"": (dtype, weight.astype(dtype.numpy()))}
    if name not in FLOATS:
        coded = plain(weight, storage(name))
        arrays = {suffix: (part.dtype, part.array) for suffix, part in parts_of(coded).items()}
    op, held = Builder("chain"), []
    x = ir.val("x", dtype, ir.Shape(["n", width]))
    value = op("Tanh", x, name="tanh")
    for layer in range(layers):
        given = {
            s: _constant(f"w{layer}.{s}", kind, _rolled(array, layer)) for s, (kind, array) in arrays.items()
        }
        held += given.values()
        read = (
            given[""]
            if name in FLOATS
            else decode(op, given, coded.storage, weight.shape, dtype, f"w{layer}")
        )
        value = op("Tanh", op("MatMul", value, read, name=f"mul{layer}"), name=f"tanh{layer}")
    value.name, value.type, value.shape = "y", ir.TensorType(dtype), ir.Shape(["n", width])
    graph = ir.Graph([x], [value], nodes=op.nodes, initializers=held, opset_imports={"": OPSET}, name="chain")
    return ir.Model(graph, ir_version=10)


def _rolled(array: Array, layer: int) -> Array:
    """Another array of the same bytes: no two layers share one."""
    return np.roll(array, layer, axis=-1) if array.ndim else array


def _constant(name: str, dtype: ir.DataType, array: Array) -> ir.Value:
    tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)


# --- in the child ----------------------------------------------------------------------------------------------------


def loaded(path: str) -> int:
    """Bytes that the process holds with the model loaded."""
    with runtime_of("ort-cpu").build(Path(path), BuildOptions("ort-cpu")):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def built(path: str, width: int, capability: str) -> tuple[int, int]:
    """Bytes of the engine file, and of the weights in it."""
    shapes = (ShapeRange("x", (1, width), (8, width), (64, width)),)
    options = BuildOptions("trt-rtx", engine=EngineOptions(shapes=shapes, capabilities=(capability,)))
    out = Path(path).with_suffix(".rtx")
    made = runtime_of("trt-rtx").serialize(Path(path), out, options)
    return out.stat().st_size, int(dict(made.describe)["weights"].split()[0])


# --- the figures -----------------------------------------------------------------------------------------------------


def held(layers: int, width: int, name: str, folder: Path) -> int:
    """Bytes that ONNX Runtime holds after loading, less those that it holds of a model without weights."""
    found = []
    for count in (layers, 0):
        ir.save(chain(count, width, name), folder / "model.onnx")
        with Child(timeout=300) as child:
            found.append(int(child.call("resident:loaded", str(folder / "model.onnx"))))
    return found[0] - found[1]


def engine(
    layers: int, width: int, name: str, capability: str, child: Child, folder: Path
) -> tuple[int, int]:
    """Bytes of the TensorRT-RTX engine, and of the weights in it."""
    ir.save(chain(layers, width, name), folder / "model.onnx")
    made: tuple[int, int] = child.call("resident:built", str(folder / "model.onnx"), width, capability)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=24, metavar="N")
    parser.add_argument("--width", type=int, default=2048, metavar="N")
    parser.add_argument("--cpu", default=",".join(CPU), metavar="LIST", help="storage types for ONNX Runtime")
    parser.add_argument("--rtx", default=",".join(RTX), metavar="LIST", help="and for TensorRT-RTX")
    parser.add_argument("--capabilities", default="8.9,12.0", metavar="LIST")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = {n: [held(given.layers, given.width, n, folder)] for n in given.cpu.split(",") if n}
        show(["ONNX Runtime", "resident"], rows, given.layers, given.width)
        with Child(timeout=500) as child:
            rows = {
                n: [
                    engine(given.layers, given.width, n, c, child, folder)[0]
                    for c in given.capabilities.split(",")
                ]
                for n in given.rtx.split(",")
                if n
            }
        show(
            ["TensorRT-RTX", *(f"SM{c.replace('.', '')}" for c in given.capabilities.split(","))],
            rows,
            given.layers,
            given.width,
        )


def show(heads: list[str], rows: dict[str, list[int]], layers: int, width: int) -> None:
    """A Markdown table: MB, and in brackets the part of float32's."""
    if not rows:
        return
    print(f"\n| {' | '.join([heads[0], 'stored', *heads[1:]])} |\n{'|---' * (len(heads) + 1)}|")
    whole = rows.get("float")
    for name, sizes in rows.items():
        cells = [
            f"{size / 1e6:.1f}" + (f" ({size / of:.3f})" if whole else "")
            for size, of in zip(sizes, whole or sizes, strict=True)
        ]
        print(f"| {name} | {stored(layers, width, name) / 1e6:.1f} | {' | '.join(cells)} |")


def stored(layers: int, width: int, name: str) -> int:
    """Bytes of the weights as the compiler counts them."""
    bits = FLOATS[name].bitwidth * width * width if name in FLOATS else storage(name).size(width, width)
    return layers * bits // 8


if __name__ == "__main__":
    main()
