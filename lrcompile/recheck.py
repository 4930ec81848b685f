"""A published folder, asked again: what it stores against what it computes, and its factors out of its own graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from polygraphy.json import load_json

from lrcompile.child import Child, RemoteEngine
from lrcompile.errors import BuildError, VerificationError
from lrcompile.factors import FactorSet
from lrcompile.feeds import Feed, inputs_of
from lrcompile.graph import dims
from lrcompile.interfaces import Array, BuildOptions, Factorization, Factors
from lrcompile.lean import without_torch
from lrcompile.records import Decision, Group, Site
from lrcompile.verify import differences, noise_of
from lrcompile.weights import storage_of

REFERENCE = "ort-cpu"  # what the stored outputs were computed in, whatever the target


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


def check_stored(out: Path, model: ir.Model, target: str, child: Child) -> int:
    """Compute the stored outputs again and hold them against the file, strictly. Returns how many feeds there were.

    Raises VerificationError with all that differs.
    """
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
    path = out / "model.onnx"
    engine, target = _engine(path, target, child)
    with engine:
        noise = noise_of(child, target, path, None, feeds)
        wrong = differences(Stored(outputs), engine, noise, feeds, "outputs.json")
    if wrong:
        raise VerificationError(
            f"{out}: model.onnx does not compute what outputs.json holds: {'; '.join(wrong)}"
        )
    return len(feeds)


def _engine(path: Path, target: str, child: Child) -> tuple[RemoteEngine, str]:
    """In ONNX Runtime on the CPU, and where that has no kernel for a type in the target's own runtime: as when published."""
    try:
        return child.build(REFERENCE, path, BuildOptions(REFERENCE)), REFERENCE
    except BuildError:
        if target == REFERENCE:
            raise
        return child.build(target, path, BuildOptions(target)), target


def published_factors(
    decisions: Sequence[Decision],
    groups: Mapping[str, Group],
    methods: Mapping[str, Factorization],
    published: ir.Model,
) -> tuple[FactorSet, ...] | None:
    """The factors of every decision as the published graph holds them; None when it holds one in another form."""
    # folded into neighbours, whose factors are not in their own order any more; or codes, whose factors stand in several constants
    if any(d.permutes or d.storage for d in decisions):
        return None
    constants = published.graph.initializers
    sets = []
    for decision in decisions:
        group = groups[decision.group]
        prefix = f"{group.sites[0].name}/{decision.method}/"
        found = {n.removeprefix(prefix): v.const_value for n, v in constants.items() if n.startswith(prefix)}
        factors = {n: t for n, t in found.items() if t is not None and "/" not in n}
        if not factors:
            return None
        biases = {k: a for i, s in enumerate(group.sites) for k, a in _bias(i, s, constants).items()}
        shapes = {n: dims(t) for n, t in factors.items()}
        method = methods[decision.method]
        sets.append(
            FactorSet(
                decision, group, method, storage_of(group.sites[0]), shapes, 0.0,
                lambda f=factors, b=biases: _load(f, b),  # type: ignore[misc]
                frozenset(n for n, t in factors.items() if t.dtype == ir.DataType.INT32),
            )
        )  # fmt: skip
    return tuple(sets)


def _load(factors: Mapping[str, ir.TensorProtocol], biases: Factors) -> Factors:
    return {**{name: tensor.numpy() for name, tensor in factors.items()}, **biases}


def _bias(index: int, site: Site, constants: Mapping[str, ir.Value]) -> Factors:
    """The corrected bias b of y = scale (x W + b), when the published graph has one."""
    value = constants.get(f"{site.name}/bias")
    if value is None or value.const_value is None or site.bias is None or site.wiring is None:
        return {}
    stored = value.const_value.numpy().astype("float64").reshape(-1)
    return {f"bias.{index}": stored * (site.bias.scale / site.wiring.scale)}
