"""Real models that several files test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes import exported


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder with model.onnx, calib.npz, heldout.npz and heldout_other.npz."""
    return exported("minilm")
