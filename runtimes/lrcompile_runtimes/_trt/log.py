"""What the libraries say while they work. Each keeps the first logger of a process and ignores all others, as long as that one lives."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

NOISE = "[checkMacros"  # without a driver, RTX adds to every error that there is none
_LEVELS = (logging.ERROR, logging.ERROR, logging.WARNING, logging.INFO, logging.INFO)


class Words:
    """What was said during one build or load. str() gives the complaints in one line."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.layers = ""
        self.weights = ""

    def take(self, severity: int, message: str) -> None:
        """severity: 0 and 1 are errors, 2 warnings, 3 information, 4 details."""
        if severity <= 1:
            self.errors.append(message.partition(NOISE)[0].strip())
        elif message.startswith("Layers:"):
            self.layers = message
        elif message.startswith("Total Weights Memory: "):
            self.weights = message.removeprefix("Total Weights Memory: ").removesuffix(" bytes")
        # All of it reaches the log of a child process, whose last words then tell where a builder died.
        logger.log(_LEVELS[severity], "%s", message)

    def __str__(self) -> str:
        said = [" ".join(error.split()) for error in self.errors if error]
        return "; ".join(dict.fromkeys(said))[-600:] or "it does not say why"


def log_of(module: Any) -> trt.ILogger:
    """A logger for a library. Which one it really uses, its objects tell: `listen` to that."""

    class Log(module.ILogger):  # type: ignore[misc]  # the base comes with the library
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.words = Words()

        def log(self, severity: Any, message: str) -> None:
            self.words.take(int(severity), message)

    made: trt.ILogger = Log()
    return made


def listen(log: Any) -> Words:
    """All that the logger is told from now on; nothing where it is not one of ours."""
    words = Words()
    if hasattr(log, "words"):
        log.words = words
    return words


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection. The library holds a lock while it logs, and takes the same one when an object of its ends.

    A collection that starts inside `Log.log` and finds an old builder, say in a traceback, would wait for itself.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
