"""Configuration: a YAML file and the command line's options, checked as one pydantic model, become `Options`.

The file has the names of the options with underscores (``max_error: snr=30``) and forbids unknown ones; what the command line
says goes before it. Paths are relative to the folder that the command runs in, in the file too. What is published as
``config.yaml`` is such a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lrcompile.errors import UsageError
from lrcompile.options import Options
from lrcompile.records import Amount, Budget, EngineOptions, Limit, Plan, Precision, ShapeRange
from lrcompile.shapes import parse_ranges
from lrcompile.store import read_json, read_text
from lrcompile.verify import parse_limits

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_memory(given: object) -> object:
    """``4GB``, ``512MiB`` or a number of bytes, in bytes. Raises ValueError."""
    if not isinstance(given, str):
        return given
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", given.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ValueError("give a number of bytes, or one with KB, MB, GB, KiB, MiB or GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_amount(given: object, unit: str = "") -> object:
    """``60MB``, ``1.2G``, a number, or ``0.5x``: a share of the original's; decimal units unless spelled KiB. Raises ValueError."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        given = repr(given)
    if not isinstance(given, str):
        return given
    words = given.strip().upper()
    found = re.fullmatch(rf"(\d+(?:\.\d*)?(?:E[+-]?\d+)?)\s*(X|(?:[KMGT]I?)?{unit}?)", words)
    try:
        if found is not None and found[2] == "X":
            return Amount(float(found[1]), relative=True)
        if found is not None:
            return Amount(float(found[1]) * _UNITS[found[2].removesuffix(unit) if unit else found[2]])
    except (KeyError, OverflowError):
        pass
    names = ", ".join(f"{u}{unit}" for u in ("K", "M", "G", "T"))
    raise ValueError(
        f"an amount such as 60M{unit} (a number, or one with {names}), or such as 0.5x, a share of the original's"
    )


def _size(given: object) -> object:
    return parse_amount(given, "B")


def parse_latency(given: object) -> object:
    """``5ms``, ``0.5s``, ``800us``, a number of seconds, or ``0.7x``. Raises ValueError."""
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return Amount(float(given))
    if not isinstance(given, str):
        return given
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(x|us|ms|s)?", given.strip().lower())
    if found is None:
        raise ValueError("a time such as 5ms, 800us or 0.1s, or such as 0.7x, a share of the original's")
    if found[2] == "x":
        return Amount(float(found[1]), relative=True)
    return Amount(float(found[1]) * {"us": 1e-6, "ms": 1e-3}.get(found[2] or "s", 1.0))


def _pairs(given: object) -> object:
    """``NAME=VALUE`` each, or a mapping."""
    if isinstance(given, Mapping):
        return tuple((str(k), str(v)) for k, v in given.items())
    if not isinstance(given, (list, tuple)) or not all(isinstance(g, str) for g in given):
        return given
    if wrong := [g for g in given if "=" not in g]:
        raise ValueError(f"NAME=VALUE each, not {wrong[0]}")
    return tuple((name, value) for name, _, value in (g.partition("=") for g in given))


def _shapes(given: object) -> object:
    """``x:1x64`` or ``x:[1,64]``; ``x:1x8,1x64,8x64`` is the smallest, the usual and the largest. Raises ValueError."""
    if isinstance(given, (list, tuple)) and all(isinstance(g, str) for g in given):
        return parse_ranges(given)
    return given


def _words(given: object) -> object:
    return tuple(filter(None, (w.strip() for w in given.split(",")))) if isinstance(given, str) else given


def _limits(given: object) -> object:
    try:
        return parse_limits(given) if isinstance(given, str) else given
    except UsageError as error:  # pydantic wants a ValueError, and says where
        raise ValueError(str(error)) from error


class Config(BaseModel):
    """What a file or the command line may say; None: nothing was said, and the default of `Options` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str | None = None
    methods: Annotated[tuple[str, ...] | None, BeforeValidator(_words), Field(min_length=1)] = None
    storage: Annotated[tuple[str, ...] | None, BeforeValidator(_words), Field(min_length=1)] = None
    activations: Annotated[tuple[str, ...] | None, BeforeValidator(_words), Field(min_length=1)] = None
    keep: Annotated[float | None, Field(gt=0, le=1)] = None
    size: Annotated[Amount | None, BeforeValidator(_size)] = None
    flops: Annotated[Amount | None, BeforeValidator(parse_amount)] = None
    latency: Annotated[Amount | None, BeforeValidator(parse_latency)] = None
    bits: Annotated[float | None, Field(gt=0, le=64)] = None
    energy: Annotated[float | None, Field(gt=0, le=1)] = None
    rank: Annotated[int, Field(ge=1)] | Literal["full"] | None = None
    max_error: Annotated[tuple[Limit, ...] | None, BeforeValidator(_limits)] = None
    objective: Literal["size", "disk", "latency", "flops"] | None = None
    plan: Path | None = None
    data: str | None = None
    verify_data: str | None = None
    metric: str | None = None
    include: str | None = None
    exclude: str | None = None
    batch: Annotated[int | None, Field(ge=1)] = None
    dims: dict[str, Annotated[int, Field(ge=0)]] | None = None
    seed: Annotated[int | None, Field(ge=0)] = None
    refit: bool | None = None
    precision: Precision | None = None
    margin: Annotated[float | None, Field(ge=1)] = None
    shapes: Annotated[tuple[ShapeRange, ...] | None, BeforeValidator(_shapes)] = None
    workspace: Annotated[int | None, BeforeValidator(parse_memory), Field(gt=0)] = None
    level: Annotated[int | None, Field(ge=0, le=5)] = None
    capabilities: Annotated[tuple[str, ...] | None, BeforeValidator(_words)] = None
    streaming: Annotated[int | None, BeforeValidator(parse_memory), Field(ge=0)] = None
    version_compatible: bool | None = None
    refittable: bool | None = None
    cuda_graph: bool | None = None
    provider: Annotated[tuple[tuple[str, str], ...] | None, BeforeValidator(_pairs)] = None
    cpu_nodes: bool | None = None
    pareto: Path | None = None
    gradients: bool | None = None
    threads: Annotated[int | None, Field(ge=1)] = None
    timeout: Annotated[float | None, Field(gt=0)] = None
    memory: Annotated[int | None, BeforeValidator(parse_memory), Field(gt=0)] = None
    allow_hardlinks: bool | None = None
    external_data: bool | None = None
    keep_functions: bool | None = None
    gs_script: str | None = None
    force: bool | None = None
    cache: Path | None = None


_SIZE = {"keep", "size", "flops", "latency", "bits", "energy", "rank", "plan"}  # only one of these can hold
_BUDGET = ("keep", "size", "flops", "latency", "bits", "energy", "rank", "max_error", "objective")
_ENGINE = tuple(f.name for f in fields(EngineOptions) if f.name != "shapes")


def options_from(flags: Mapping[str, Any], file: Path | str | None = None) -> Options:
    """Options of what the command line says (None: nothing) before what the file says. Raises UsageError.

    What bounds the size on the command line takes the place of what bounds it in the file.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    written = _read(Path(file)) if file is not None else {}
    if _SIZE & set(said):
        written = {n: v for n, v in written.items() if n not in _SIZE}
    config = _validated({**written, **_flags(said)})
    values = {n: v for n in Config.model_fields if (v := getattr(config, n)) is not None}
    budget: dict[str, Any] = {n: values.pop(n) for n in _BUDGET if n in values}
    engine = {n: values.pop(n) for n in ("shapes", *_ENGINE) if n in values}
    if engine:
        values["engine"] = EngineOptions(**engine)
    if "plan" in values:
        values["plan"] = read_plan(values["plan"])
    options = Options(budget=Budget(**budget), **values)
    options.check()
    return options


def published_options(out: Path, flags: Mapping[str, Any]) -> Options:
    """Options that a published folder was made with, as verify needs them; flags go before. Raises UsageError.

    A limit on the user's own metric holds only where that metric is given again: the folder names no files.
    """
    said = dict(flags)
    if said.get("metric") is None and said.get("max_error") is None:
        limits = _read(out / "config.yaml").get("max_error", ())
        said["max_error"] = tuple(limit for limit in limits if limit.name != "metric")
    return options_from(said, out / "config.yaml")


def asked_again(out: Path, options: Options | None) -> Options:
    """The given options for a published folder: its target, and where they say nothing its precision and engine options."""
    published = published_options(out, {})
    if options is None:
        return published
    engine = published.engine if options.engine == EngineOptions() else options.engine
    precision = options.precision or published.precision
    return replace(options, target=published.target, precision=precision, engine=engine)


def _read(path: Path) -> dict[str, Any]:
    """The checked content of a YAML file, without what is null."""
    try:
        document = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: not YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{path}: a configuration is a mapping of option names to values")
    config = _validated(document, path)
    return {name: value for name in Config.model_fields if (value := getattr(config, name)) is not None}


def _flags(said: Mapping[str, Any]) -> dict[str, Any]:
    """The command line's words in the file's terms: ``--dim name=value`` more than once is one mapping."""
    flags = dict(said)
    if "rank" in flags and isinstance(flags["rank"], str) and flags["rank"].isdigit():
        flags["rank"] = int(flags["rank"])
    if shapes := flags.pop("shape", None):
        flags["shapes"] = shapes
    if dims := flags.pop("dim", None):
        flags["dims"] = dict(_dim(text) for text in dims)
    return flags


def _dim(text: str) -> tuple[str, int]:
    name, _, value = text.rpartition("=")
    if not name or not value.isdigit():
        raise UsageError(f"--dim {text!r}: write NAME=NUMBER, for example --dim sequence=128")
    return name, int(value)


def _validated(document: Mapping[str, Any], path: Path | None = None) -> Config:
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise UsageError(_sentence(error, path)) from error


def _sentence(error: ValidationError, path: Path | None) -> str:
    """The first thing that is wrong: where, what was given, what is allowed."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    where = f"{path}: {name}" if path is not None else f"--{name.replace('_', '-')}"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; known: {', '.join(Config.model_fields)}"
    allowed = [
        e["msg"].removeprefix("Value error, ") for e in error.errors() if e["loc"] and e["loc"][0] == name
    ]
    words = " or ".join(dict.fromkeys(m.removeprefix("Input should be ") for m in allowed))
    for theirs, ours in (
        ("valid tuple", "list"),
        ("valid dictionary", "mapping"),
        (", unable to parse string as an integer", ""),
    ):
        words = words.replace(theirs, ours)
    return f"{where} is {first['input']!r}; allowed: {words}"


def read_plan(path: Path) -> Plan:
    """A plan that ``lrcompile plan --json`` wrote, or the one inside a published ``lrcompile.json``. Raises UsageError."""
    document = read_json(path)
    try:
        if "plan" in document:
            document = document["plan"]
        return TypeAdapter(Plan).validate_python(Plan.from_json(document).to_json())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: {where} is {first['input']!r}; {first['msg']}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        words = str(error.args[0]) if error.args else type(error).__name__
        raise UsageError(f"{path} is not a plan (lrcompile plan --json writes one): {words}") from error
