"""How long stages say how far they are. The command line draws bars; libraries hear nothing unless they ask."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the stage's name, what is done and what there is to do."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def silent(stage: str, done: int, total: int) -> None:
    """Says nothing."""
