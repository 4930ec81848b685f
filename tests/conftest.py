"""One flag (`pytest tests/golden --update-golden` writes the golden texts anew), and interrupts that reach the tests."""

from __future__ import annotations

import signal

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the texts under tests/golden anew")


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts background jobs with interrupts ignored, and what tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
