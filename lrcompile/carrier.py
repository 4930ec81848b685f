"""Activations of one version of the model, carried in files from frontier to frontier (`walk`), a feed at a time.

Parts of the model run in the child process, and what they compute stays there and on disk: memory does not grow with the number
of feeds, nor with the depth of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from lrcompile.cost import is_large
from lrcompile.interfaces import Array, BuildOptions, Engine
from lrcompile.store import load_array, new_folder, remove_folder, save_array, save_model
from lrcompile.walk import part

if TYPE_CHECKING:
    from lrcompile.child import Child
    from lrcompile.feeds import Feed


class Carrier:
    """The values of the last frontier, of every feed. folder: where their files lie, removed by its owner."""

    def __init__(self, feeds: Iterable[Feed], child: Child, target: str, folder: Path) -> None:
        self.types: dict[str, str] = {}  # NumPy's name of each carried value's type
        self._feeds, self._child, self._target = feeds, child, target
        self._folder = new_folder(folder)
        self._numbers: dict[str, int] = {}
        self._held: set[str] = set()  # the last frontier
        self._parts = 0

    def advance(self, model: ir.Model, frontier: Sequence[str]) -> None:
        """Compute the values of the next frontier from those of the last one, then forget what it does not hold."""
        self._keep(self._held)  # what `compute` added may be made of weights that have changed since
        self.compute(model, frontier)
        self._held = set(frontier)
        self._keep(self._held)

    def _keep(self, kept: Collection[str]) -> None:
        for name in [n for n in self.types if n not in kept]:
            for path in self._folder.glob(f"*-{self._numbers[name]}.npy"):
                path.unlink()
            del self.types[name]

    def compute(self, model: ir.Model, wanted: Collection[str]) -> None:
        """Compute values from those that are carried, and keep them beside these."""
        given = {name: _onnx_type(dtype) for name, dtype in self.types.items()}
        cut = part(model, given, wanted)
        if cut is None:
            return
        read = [v.name or "" for v in cut.graph.inputs]
        made = [v.name or "" for v in cut.graph.outputs]
        for name in made:
            self._numbers.setdefault(name, len(self._numbers))
        self._parts += 1
        folder = new_folder(self._folder / f"part-{self._parts}")
        path = save_model(cut, folder, external=is_large(cut) or None)
        with self._child.build(self._target, path, BuildOptions(self._target)) as engine:
            for index, feed in enumerate(self._feeds):
                fed = {n: feed[n] for n in read if n in feed and n not in self.types}
                paths = {n: str(self.path(index, n)) for n in made}
                types = self._child.call(
                    "lrcompile.carrier:run_part", engine, fed, self.files(index, read), paths
                )
        self.types |= types
        remove_folder(folder)

    def files(self, index: int, names: Iterable[str]) -> dict[str, tuple[str, str]]:
        """Path and type of those of these values that are carried."""
        return {n: (str(self.path(index, n)), self.types[n]) for n in names if n in self.types}

    def path(self, index: int, name: str) -> Path:
        return self._folder / f"{index}-{self._numbers[name]}.npy"


def run_part(
    engine: Engine, fed: Mapping[str, Array], given: Mapping[str, tuple[str, str]], wanted: Mapping[str, str]
) -> dict[str, str]:
    """Runs in the child: one feed through one part. given: file and type of each carried value. Gives the types of what came out."""
    outputs = engine.run({**fed, **read_all(given)})
    for name, path in wanted.items():
        save_array(path, outputs[name])
    return {name: outputs[name].dtype.name for name in wanted}


def read_all(files: Mapping[str, tuple[str, str]]) -> dict[str, Array]:
    return {name: load_array(path, dtype) for name, (path, dtype) in files.items()}


def _onnx_type(dtype: str) -> ir.DataType:
    import numpy as np

    return ir.DataType.from_numpy(np.dtype(dtype))
