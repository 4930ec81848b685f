"""Bytes of TensorRT-RTX engines, built without a GPU: for each compute capability alone, and for all in one file.

    python benchmarks/engines.py [--models minilm,tiny_llama,...] [--capabilities 8.0,8.6,8.9,12.0] [--data DIR]

prints a Markdown table. "weights" is what the builder says that the engine keeps in memory of the constants. Every build has
a child process of its own. Dynamic dimensions are 1 to 8 for the batch, 1 to 512 for sequences and, in decoders, 0 to 512
for what is cached. Models that are not in DIR (build/models) are made there by their recipes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import onnx

from lrcompile.child import Child
from lrcompile.interfaces import BuildOptions
from lrcompile.records import Built, EngineOptions, ShapeRange
from lrcompile.registry import runtime_of

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("minilm", "tiny_llama", "tiny_vlm", "open_nsfw", "smollm2")
# least, usual and largest of a dimension, by its name in the models' own words
DIMS = {"batch": (1, 1, 8), "sequence": (1, 128, 512), "past": (0, 128, 512)}
OTHER = (1, 8, 32)


def ranges(model: Path) -> tuple[ShapeRange, ...]:
    """Shapes for every dynamic input. A dimension may be a sum of names: ``past + sequence``."""
    found = []
    for port in onnx.load(model, load_external_data=False).graph.input:
        dims = port.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            continue
        sizes = [
            [dim.dim_value] * 3
            if dim.HasField("dim_value")
            else [sum(DIMS.get(name, OTHER)[i] for name in dim.dim_param.split(" + ")) for i in range(3)]
            for dim in dims
        ]
        found.append(ShapeRange(port.name, *zip(*sizes, strict=True)))
    return tuple(found)


def serialize(model: str, out: str, capabilities: tuple[str, ...], shapes: tuple[ShapeRange, ...]) -> Built:
    """Runs in the child."""
    options = BuildOptions("trt-rtx", engine=EngineOptions(shapes=shapes, capabilities=capabilities))
    return runtime_of("trt-rtx").serialize(Path(model), Path(out), options)


def build(model: Path, out: Path, capabilities: Sequence[str], child: Child) -> Built:
    """An engine of the model, in the child. Raises BuildError in the builder's words."""
    args = (str(model), str(out), tuple(capabilities), ranges(model))
    built: Built = child.call("engines:serialize", *args, what=f"building {model.parent.name} for trt-rtx")
    return built


def row(model: Path, capabilities: Sequence[str], folder: Path) -> str:
    """A line of the table."""
    sizes, seconds, weights = [], 0.0, ""
    for wanted in (*((c,) for c in capabilities), capabilities):
        out, start = folder / "engine.rtx", time.monotonic()
        with Child() as child:
            built = build(model, out, wanted, child)
        seconds = time.monotonic() - start
        sizes.append(f"{out.stat().st_size:,}")
        weights = f"{int(dict(built.describe)['weights'].split()[0]):,}"
        print(f"{model.parent.name} {','.join(wanted)}: {sizes[-1]} bytes, {seconds:.1f} s", file=sys.stderr)
    return f"| {model.parent.name} | {model.stat().st_size:,} | {weights} | {' | '.join(sizes)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), metavar="LIST")
    parser.add_argument("--capabilities", default="8.0,8.6,8.9,12.0", metavar="LIST")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "models", metavar="DIR")
    arguments = parser.parse_args()
    capabilities = arguments.capabilities.split(",")
    heads = [
        "model",
        "model.onnx",
        "weights",
        *(f"SM{c.replace('.', '')}" for c in capabilities),
        "all in one",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in arguments.models.split(","):
        model = arguments.data / name / "model.onnx"
        if not model.is_file():
            recipe = [sys.executable, str(ROOT / "models" / f"{name}.py"), "-o", str(model.parent)]
            subprocess.run(recipe, check=True, stdout=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            lines.append(row(model, capabilities, Path(folder)))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
