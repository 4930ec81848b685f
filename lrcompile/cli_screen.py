"""What a command shows: results on stdout, progress and logs on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_EVERY = 3.0  # seconds between two lines about progress where there is no terminal
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class Screen:
    """stdout for results, stderr for all else. As a function it is a `progress.Progress`."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet = json, quiet
        self._out, self._err = Console(highlight=False), Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._err,
            transient=True,
        )
        self._stage: tuple[str, TaskID] | None = None
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if self._err.is_terminal:
            self._draw(stage, done, total)
        elif time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            self.note(f"{stage} {done}/{total}")

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._stage is None or self._stage[0] != stage:
            if self._stage is not None:
                self._bars.remove_task(self._stage[1])
            self._stage = stage, self._bars.add_task(stage, total=total)
            self._bars.start()
        self._bars.update(self._stage[1], completed=done, total=total)

    def note(self, text: str) -> None:
        """A line on stderr, above the bars."""
        self._err.print(text, markup=False, soft_wrap=True)

    def show(self, text: object, document: Mapping[str, Any] | list[Any]) -> None:
        """The result: its text, or under --json its document, and nothing else."""
        self.close()
        if self.json:
            shown = json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)
            self._out.out(shown, highlight=False)
        else:
            self._out.print(str(text), markup=False, highlight=True, soft_wrap=True)

    def close(self) -> None:
        """The bars vanish."""
        if self._stage is not None:
            self._bars.stop()
            self._bars.remove_task(self._stage[1])
            self._stage = None


class _Handler(logging.Handler):
    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        name = record.levelname.lower()
        self._screen.note(f"{name}: {self.format(record)}")


@contextlib.contextmanager
def screen(*, json: bool, verbose: int, quiet: bool) -> Iterator[Screen]:
    """A screen, with our loggers speaking through it, for the time of a command."""
    made = Screen(json=json, quiet=quiet)
    handler = _Handler(made)
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in ("lrcompile", "lrcompile_passes", "lrcompile_runtimes")]
    levels = [logger.level for logger in ours]
    for logger in ours:
        logger.setLevel(logging.ERROR if quiet else _LEVELS[min(verbose, 2)])
    root.addHandler(handler)
    try:
        yield made
    finally:
        made.close()
        root.removeHandler(handler)
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
