"""Of build: what a user may ask of an engine, and what was built."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16"]
# Onnx's names of the types that these are.
STORED: dict[Precision, str] = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """Shapes of one input that an engine must take: the smallest, the one that it is tuned for, the largest."""

    input: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]

    def __str__(self) -> str:
        shapes = (self.usual,) if self.least == self.most else (self.least, self.usual, self.most)
        return f"{self.input}:{','.join('[' + ','.join(map(str, s)) + ']' for s in shapes)}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is built, where a target has a choice. A runtime refuses by name what it has no use for.

    shapes: ranges of dynamic inputs; without one for an input it is what the first feed has, and what the graph fixes. workspace: bytes
    of scratch memory. level: the builder's optimisation level. capabilities: compute capabilities to build for (``8.6``), instead of that
    of the GPU at hand. streaming: bytes of weights that stay on the device, the rest is streamed. version_compatible, refittable: of the
    engine. cuda_graph: record one launch of all kernels and replay it. provider: options of an execution provider, as name and value.
    cpu_nodes: let single nodes of a GPU target run on the CPU.
    """

    shapes: tuple[ShapeRange, ...] = ()
    workspace: int | None = None
    level: int | None = None
    capabilities: tuple[str, ...] = ()
    streaming: int | None = None
    version_compatible: bool = False
    refittable: bool = False
    cuda_graph: bool = False
    provider: tuple[tuple[str, str], ...] = ()
    cpu_nodes: bool = False

    @property
    def said(self) -> tuple[str, ...]:
        """Names of the fields of which something was said."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)


def flag_of(name: str) -> str:
    """What a field of `EngineOptions` is called on the command line."""
    return f"--{_FLAGS.get(name, name.replace('_', '-'))}"


_FLAGS = {
    "shapes": "shape",
    "capabilities": "compute-capability",
    "streaming": "weight-streaming",
    "provider": "provider-option",
}


@dataclass(frozen=True, slots=True)
class Built:
    """A serialized engine. path: its file. describe: version, devices it is for. layers: each layer of it with the types it computes in,
    ``gemm: float16, float16 -> float32``.
    """

    path: Path
    describe: tuple[tuple[str, str], ...] = ()
    layers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """What was built, for whom, and in which types its layers compute."""
        said = dict(self.describe)
        types = Counter(_types(layer) for _, layer in self.layers if "nothing" not in layer)
        words = ", ".join(f"{n} x {kind}" for kind, n in types.most_common())
        parts = [f"{self.path.name} is an engine of {said.get('library', 'this target')}"]
        parts += [f"for compute capability {said['devices']}"] if "devices" in said else []
        layers = f"; its layers ({said.get('layers', 'as built')}): {words}" if words else ""
        return " ".join(parts) + layers + (f"; {said['widened']}" if "widened" in said else "")


def _types(layer: str) -> str:
    """``float16 -> float32``, each type once."""
    sides = layer.partition(": ")[2].split(" -> ")
    return " -> ".join("+".join(dict.fromkeys(side.split(", "))) for side in sides)
