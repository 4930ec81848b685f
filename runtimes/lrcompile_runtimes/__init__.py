"""Runtimes of lrcompile: one file each. This one holds what they share: checking feeds before a runtime sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrcompile.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Port:
    """An input of a model. dtype: None for what is no tensor. shape: None for any rank; a dimension that is no int may vary."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    optional: bool = False

    def __str__(self) -> str:
        dims = (
            "any shape"
            if self.shape is None
            else "x".join("?" if d is None else str(d) for d in self.shape) or "scalar"
        )
        return f"{self.name!r} ({'string' if self.dtype == object else self.dtype}, {dims})"

    def check(self, array: Array) -> None:
        """Raise UsageError unless the array fits."""
        if self.dtype is None:
            return
        import numpy as np

        array = np.asarray(array)
        text = array.dtype.kind in "OUTS"
        if array.dtype != self.dtype and not (text and self.dtype == object):
            raise UsageError(f"input {self} was given {array.dtype}: convert it first")
        if self.shape is None:
            return
        wrong = len(array.shape) != len(self.shape) or any(
            isinstance(wanted, int) and wanted != given
            for wanted, given in zip(self.shape, array.shape, strict=True)
        )
        if wrong:
            raise UsageError(f"input {self} was given shape {array.shape}")


def check_feeds(ports: Iterable[Port], feeds: Mapping[str, Array]) -> None:
    """Raise UsageError unless there is one fitting array for every input that has no default, and no other."""
    known = {port.name: port for port in ports}
    if unknown := sorted(set(feeds) - set(known)):
        raise UsageError(
            f"the model has no input {unknown[0]!r}; its inputs: {', '.join(map(str, known.values())) or 'none'}"
        )
    for port in known.values():
        if port.name in feeds:
            port.check(feeds[port.name])
        elif not port.optional:
            raise UsageError(
                f"no array was given for input {port}; given: {', '.join(sorted(feeds)) or 'none'}"
            )


def repeated(
    run: Callable[[Mapping[str, Array]], object], feeds: Mapping[str, Array]
) -> Callable[[int], None]:
    """`interfaces.Engine.bound` of an engine that computes where its feeds lie."""

    def times(count: int) -> None:
        for _ in range(count):
            run(feeds)

    return times


def words(error: Exception, limit: int = 500) -> str:
    """What a runtime said, in one line."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
