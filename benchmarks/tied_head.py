"""A tied head of two factors, read through Transpose or by FusedMatMul(transB=1): memory of a session, and time.

    python benchmarks/tied_head.py [--target ort-cpu] [--rows 1,16,128] [--rank 144]

The table is SmolLM2's, 49152 x 576, as a pair a (V, r), b (r, D): rows are looked up in it and multiplied with its transpose again.
Weights are random. Peak memory is that of a process (or of the device) of its own; times are interleaved, the ratio is Transpose over
FusedMatMul, above 1 where the latter is faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lrcompile.footprint import peak_memory
from lrcompile.interfaces import Array, BuildOptions
from lrcompile.registry import runtime_of

VOCABULARY, WIDTH = 49152, 576
ROUNDS = 15


def head(rank: int, fused: bool) -> ir.Model:
    """ids (1, rows) -> scores (1, rows, V)."""
    rng = np.random.default_rng(0)
    ids, tape = ir.val("ids", ir.DataType.INT64, ir.Shape([1, "rows"])), ir.tape.Tape()
    a, b = (
        tape.initializer(ir.tensor((rng.standard_normal(shape) / 12).astype(np.float32), name=name))
        for name, shape in (("a", (VOCABULARY, rank)), ("b", (rank, WIDTH)))
    )
    y = tape.op("MatMul", [tape.op("Gather", [a, ids]), b])
    for factor in (b, a):
        if fused:
            y = tape.op("FusedMatMul", [y, factor], {"transB": 1}, domain="com.microsoft")
        else:
            y = tape.op("MatMul", [y, tape.op("Transpose", [factor], {"perm": [1, 0]})])
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([1, "rows", VOCABULARY])
    graph = ir.Graph(
        [ids], [y], nodes=tape.nodes, initializers=[a, b], opset_imports={"": 20, "com.microsoft": 1}, name="head"
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def feed(rows: int) -> dict[str, Array]:
    return {"ids": np.arange(rows)[None] * 977 % VOCABULARY}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--rows", default="1,16,128")
    parser.add_argument("--rank", type=int, default=144)
    given = parser.parse_args()
    options = BuildOptions(given.target)
    build = runtime_of(given.target).build
    with tempfile.TemporaryDirectory() as work:
        paths = {}
        for name, fused in (("Transpose", False), ("FusedMatMul", True)):
            for place, data in (("inside", None), ("external", "weights.bin")):
                folder = Path(work) / f"{name}-{place}"
                folder.mkdir()
                paths[name] = folder / "model.onnx"
                ir.save(head(given.rank, fused), paths[name], external_data=data)
                peak = peak_memory(paths[name], options, feed(1), None)
                told = "not known" if peak is None else f"{peak / 1e6:.0f} MB"
                sys.stdout.write(f"{name}, weights {place}: peak {told}\n")
        with build(paths["Transpose"], options) as one, build(paths["FusedMatMul"], options) as other:
            for rows in map(int, given.rows.split(",")):
                x = feed(rows)
                want, got = one.run(x)["y"], other.run(x)["y"]
                times = np.array([[seconds(e.bound(x)) for e in (one, other)] for _ in range(ROUNDS)])
                ratio = np.percentile(times[:, 0] / times[:, 1], (25, 50, 75))
                moved = float(np.abs(got - want).max() / np.abs(want).max())
                sys.stdout.write(
                    f"{rows} rows: {np.median(times[:, 0]) * 1e3:.2f} and {np.median(times[:, 1]) * 1e3:.2f} ms, "
                    f"ratio {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f}), outputs differ by {moved:.1e}\n"
                )


def seconds(runs: Callable[[int], None]) -> float:
    """A run's, of three after two that warm up."""
    runs(2)
    start = time.perf_counter()
    runs(3)
    return (time.perf_counter() - start) / 3


if __name__ == "__main__":
    main()
