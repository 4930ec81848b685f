"""Which factorizations and runtimes there are.

Built-ins are found by listing the folder of a package, third parties by entry points; a file or an entry point gives a
tuple of plugins (or one). What cannot be imported fails only when it is asked for. Nothing is kept between two calls:
modules are kept by Python, and listing takes a few milliseconds.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from lrcompile.errors import PluginError, UsageError

if TYPE_CHECKING:  # so that importing this module costs nothing
    from lrcompile.interfaces import Factorization, Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Where plugins of a kind are: in a package, under an attribute of its modules, and in an entry point group."""

    noun: str
    package: str
    attribute: str

    @property
    def group(self) -> str:
        return f"lrcompile.{self.attribute}"


_FACTORIZATIONS = _Kind("factorization", "lrcompile_passes", "factorizations")
_RUNTIMES = _Kind("runtime", "lrcompile_runtimes", "runtimes")


def factorizations() -> Mapping[str, Factorization]:
    """All that can be imported, by name."""
    return _collect(_FACTORIZATIONS)[0]


def factorization(name: str) -> Factorization:
    """The one of this name. Raises PluginError that names the package to install, or what there is instead."""
    found: dict[str, Factorization]
    found, missing = _collect(_FACTORIZATIONS)
    return found[name] if name in found else _unknown("factorization", name, found, missing)


def methods_of(names: Sequence[str]) -> Mapping[str, Factorization]:
    """What ``--methods`` names; ``auto`` stands for all that need not be named. Dense is always among them."""
    chosen: dict[str, Factorization] = {}
    for name in (*names, "dense"):
        if name == "auto":
            chosen |= {n: f for n, f in factorizations().items() if not f.only_by_name}
        else:
            chosen[name] = factorization(name)
    return chosen


def runtimes() -> Mapping[str, Runtime]:
    """All that can be imported, by name; whether they work here, their `availability` says."""
    return _collect(_RUNTIMES)[0]


def runtime_of(target: str) -> Runtime:
    """The runtime that builds for this target. Raises PluginError or UsageError that names what there is instead."""
    found, missing = _collect(_RUNTIMES)
    offers: dict[str, Runtime] = {}
    for runtime in found.values():
        for offer in runtime.targets():
            if offer in offers:
                raise PluginError(
                    f"target {offer!r} is offered by two runtimes, {offers[offer].name} and {runtime.name}"
                )
            offers[offer] = runtime
    return offers[target] if target in offers else _unknown("target", target, offers, missing)


def missing() -> Mapping[str, str]:
    """Plugins that could not be imported, each with its reason: what `doctor` prints."""
    return {**_collect(_FACTORIZATIONS)[1], **_collect(_RUNTIMES)[1]}


def _collect(kind: _Kind) -> tuple[dict[str, Any], dict[str, str]]:
    """Plugins by name, and reasons by the name of the file or entry point that failed."""
    plugins: dict[str, Any] = {}
    origins: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name, origin, load in _sources(kind):
        try:
            offered = load()
        except ImportError as error:
            missing[name] = f"{error}{_remedy(error)}"
            continue
        for plugin in offered if isinstance(offered, tuple) else (offered,):
            if not isinstance(getattr(plugin, "name", None), str):
                raise PluginError(f"{origin} offers {plugin!r}, which is no {kind.noun}: it has no name")
            if plugin.name in plugins:
                raise PluginError(
                    f"two {kind.noun}s are named {plugin.name!r}: {origins[plugin.name]} and {origin}"
                )
            plugins[plugin.name], origins[plugin.name] = plugin, origin
    return plugins, missing


def _sources(kind: _Kind) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Name, origin and loader of each built-in file, then of each third party's entry point."""
    for module in sorted(pkgutil.iter_modules(importlib.import_module(kind.package).__path__)):
        if not module.name.startswith("_"):
            path = f"{kind.package}.{module.name}"
            yield module.name, path, partial(_exported, path, kind.attribute)
    for entry in sorted(importlib.metadata.entry_points(group=kind.group)):
        owner = f" of {entry.dist.name}" if entry.dist else ""
        yield entry.name, f"entry point {entry.name} = {entry.value}{owner}", partial(_third_party, entry)


def _exported(path: str, attribute: str) -> object:
    module = importlib.import_module(path)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise PluginError(f"{path} does not end with `{attribute} = (...)`") from None


def _third_party(entry: importlib.metadata.EntryPoint) -> object:
    """Load it; whatever its code raises is that plugin's trouble, not ours."""
    try:
        return entry.load()
    except ImportError:
        raise
    except Exception as error:
        logger.debug("entry point %s cannot be loaded", entry.name, exc_info=True)
        raise ImportError(f"{type(error).__name__}: {error}") from error


def _remedy(error: ImportError) -> str:
    """How to get the module that is missing: the extra of ours that brings it, or the package itself."""
    if not error.name:
        return ""
    package = re.sub(r"[._]", "-", error.name.partition(".")[0]).lower()
    try:
        requirements = importlib.metadata.requires("lrcompile") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        requirements = []
    for requirement in requirements:
        needs, _, extra = requirement.partition("extra ==")
        if extra and re.match(rf"{re.escape(package)}\b(?!-)", needs.lower()):
            return f'; pip install "lrcompile[{re.sub("[^a-z-]", "", extra)}]"'
    return f"; pip install {package}"


def _unknown(noun: str, name: str, known: Iterable[str], missing: Mapping[str, str]) -> NoReturn:
    if name in missing:
        raise PluginError(f"{noun} {name!r} cannot be loaded: {missing[name]}")
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    message = f"unknown {noun} {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    message += f"; known: {', '.join(known) or 'none'}"
    if missing:
        message += "; not loaded: " + ", ".join(f"{file} ({reason})" for file, reason in missing.items())
    raise UsageError(message)
