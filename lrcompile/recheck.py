"""A published folder, asked again: what it stores against what it computes, and its factors out of its own graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from polygraphy.json import load_json

from lrcompile.build import REFERENCE, build
from lrcompile.child import Child
from lrcompile.coding import FLOATS, decoded, type_of
from lrcompile.cost import is_large
from lrcompile.errors import BuildError, VerificationError
from lrcompile.factors import FactorSet, candidate_of
from lrcompile.feeds import Feed, inputs_of
from lrcompile.graph import dims
from lrcompile.interfaces import Array, BuildOptions, Factorization, Factors
from lrcompile.lean import without_torch
from lrcompile.precision import refloated
from lrcompile.quantize import Coded
from lrcompile.records import Decision, Group, Precision, Site
from lrcompile.registry import runtime_of
from lrcompile.store import new_folder, save_model
from lrcompile.unpacking import coded_of
from lrcompile.verify import differences, noise_of
from lrcompile.weights import storage_of

logger = logging.getLogger(__name__)


class Stored:
    """Outputs read from a file, with the face of an engine: they come in the order in which they were stored."""

    def __init__(self, outputs: Sequence[Mapping[str, Array]]) -> None:
        self._left: Iterator[Mapping[str, Array]] = iter(outputs)

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return next(self._left)

    def describe(self) -> Mapping[str, str]:
        return {}

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def stored_feeds(out: Path) -> list[Feed]:
    """``inputs.json``. Raises VerificationError when it is not what we write."""
    return [dict(feed) for feed in _read(out / "inputs.json")]


def stored_outputs(out: Path) -> list[Mapping[str, Array]]:
    """The one runner's results in ``outputs.json``."""
    runs = list(_read(out / "outputs.json").items())
    if len(runs) != 1:
        raise VerificationError(
            f"{out} is damaged: outputs.json holds the outputs of {len(runs)} runners, not of one"
        )
    return [{name: iteration[name] for name in iteration} for iteration in runs[0][1]]


def _read(path: Path) -> Any:
    try:
        with without_torch():
            return load_json(str(path))
    except Exception as error:  # Polygraphy's own, and whatever decoding raises
        raise VerificationError(f"{path.parent} is damaged: {path.name} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Published:
    """A folder whose files are as its manifest lists them. model: what model.onnx holds."""

    path: Path
    document: Mapping[str, Any]
    model: ir.Model

    @property
    def file(self) -> Path:
        return self.path / "model.onnx"

    @property
    def target(self) -> str:
        return str(self.document["target"])

    def loading(self, options: BuildOptions) -> BuildOptions:
        """These options, but that the folder's engine file is loaded, where it has one of this target; its SHA-256 must be as listed."""
        name = runtime_of(options.target).engine_file(options.target) or ""
        listed = self.document["files"].get(name)
        if listed is None or options.target != self.target:
            return options
        return replace(options, serialized=self.path / name, sha256=listed["sha256"])


def runnable(
    folder: Published, building: BuildOptions, precision: Precision | None, child: Child, scratch: Path
) -> Path:
    """The published file, or where its place has no kernels for 16 bits, a copy that computes in float32 with the same weights."""
    if precision in (None, "fp32") or building.serialized is not None:
        return folder.file
    try:
        build(child, building.target, folder.file, building).close()
        return folder.file
    except BuildError as error:
        logger.info("%s; it is judged with float32 kernels", error)
    widened = refloated(folder.model, precision)
    return save_model(widened, new_folder(scratch / "widened"), external=is_large(widened) or None)


def check_stored(folder: Published, precision: Precision | None, child: Child, scratch: Path) -> int:
    """Compute the stored outputs again and hold them against the file, strictly. Returns how many feeds there were.

    In ONNX Runtime on the CPU, and where that has no kernel for a type as it was done when they were published: in the target's own
    runtime, or in float32. Raises VerificationError with all that differs.
    """
    out, model = folder.path, folder.model
    feeds, outputs = stored_feeds(out), stored_outputs(out)
    if len(feeds) != len(outputs):
        raise VerificationError(
            f"{out} is damaged: inputs.json holds {len(feeds)} feeds and outputs.json {len(outputs)}"
        )
    wanted = {i.name for i in inputs_of(model)}
    for feed in feeds:
        if set(feed) != wanted:
            raise VerificationError(
                f"{out} is damaged: inputs.json feeds {sorted(feed)}, model.onnx reads {sorted(wanted)}"
            )
    names = {v.name for v in model.graph.outputs}
    for row in outputs:
        if set(row) != names:
            raise VerificationError(
                f"{out} is damaged: outputs.json holds {sorted(row)}, model.onnx gives {sorted(map(str, names))}"
            )
    place, path = _where_stored(folder, precision, child, scratch)
    with build(child, place, path) as engine:
        noise = noise_of(child, place, path, None, feeds)
        wrong = differences(Stored(outputs), engine, noise, feeds, "outputs.json")
    if wrong:
        raise VerificationError(
            f"{out}: model.onnx does not compute what outputs.json holds: {'; '.join(wrong)}"
        )
    return len(feeds)


def _where_stored(
    folder: Published, precision: Precision | None, child: Child, scratch: Path
) -> tuple[str, Path]:
    if folder.target == REFERENCE or folder.document["evidence"]["engine"] != "ran":
        return REFERENCE, runnable(folder, BuildOptions(REFERENCE), precision, child, scratch)
    try:
        build(child, REFERENCE, folder.file).close()
        return REFERENCE, folder.file
    except BuildError:
        return folder.target, folder.file


def published_factors(
    decisions: Sequence[Decision],
    groups: Mapping[str, Group],
    methods: Mapping[str, Factorization],
    published: ir.Model,
) -> tuple[FactorSet, ...] | None:
    """The factors of every decision as the published graph holds them; None when it holds one in another form."""
    if any(d.permutes for d in decisions):
        return None  # folded into neighbours, whose factors are not in their own order any more
    found = [
        _published(d, groups[d.group], methods[d.method], published.graph.initializers) for d in decisions
    ]
    sets = tuple(s for s in found if s is not None)
    return sets if len(sets) == len(found) else None


def _published(
    decision: Decision, group: Group, method: Factorization, constants: Mapping[str, ir.Value]
) -> FactorSet | None:
    prefix = f"{group.sites[0].name}/{decision.method}/"
    given = {n.removeprefix(prefix): v.const_value for n, v in constants.items() if n.startswith(prefix)}
    tensors = {n: t for n, t in given.items() if t is not None and "/" not in n}
    if not tensors:
        return None
    coded = _coded(tensors, decision, group, method)
    if coded is None:
        return None
    plain = {n: t for n, t in tensors.items() if not any(n == c or n.startswith(f"{c}.") for c in coded)}
    biases = {k: a for i, s in enumerate(group.sites) for k, a in _bias(i, s, constants).items()}

    def load() -> Factors:
        return decoded({**{n: t.numpy() for n, t in plain.items()}, **biases}, coded, group)

    promised = method.shapes(group, candidate_of(decision))
    sizes = {n: promised[n] for n in coded}
    shapes = {n: s if isinstance(s, tuple) else s.shape for n, s in sizes.items()}
    return FactorSet(
        decision, group, method, storage_of(group.sites[0], decision.storage), {**{n: dims(t) for n, t in plain.items()}, **shapes},
        0.0, load, frozenset(n for n, t in plain.items() if t.dtype == ir.DataType.INT32), frozenset(coded), lambda: coded,
    )  # fmt: skip


def _coded(
    tensors: Mapping[str, ir.TensorProtocol], decision: Decision, group: Group, method: Factorization
) -> Mapping[str, Coded] | None:
    """Factors that are stored as codes; None where some are not what the decision's type makes of them."""
    if decision.storage is None or decision.storage in FLOATS:
        return {}
    by_row = group.sites[0].kind == "lookup"
    made: dict[str, Coded] = {}
    for name, shape in method.shapes(group, candidate_of(decision)).items():
        parts = {n[len(name) + 1 :]: t for n, t in tensors.items() if n == name or n.startswith(f"{name}.")}
        if "scale" not in parts:
            continue
        size = shape if isinstance(shape, tuple) else shape.shape
        kind = type_of(method, name, decision.storage)
        coded = coded_of(parts, kind, size[::-1] if by_row else size, by_row=by_row)
        if coded is None:
            return None
        made[name] = coded
    return made


def _bias(index: int, site: Site, constants: Mapping[str, ir.Value]) -> Factors:
    """The corrected bias b of y = scale (x W + b), when the published graph has one."""
    value = constants.get(f"{site.name}/bias")
    if value is None or value.const_value is None or site.bias is None or site.wiring is None:
        return {}
    stored = value.const_value.numpy().astype("float64").reshape(-1)
    return {f"bias.{index}": stored * (site.bias.scale / site.wiring.scale)}
