"""Real models that several files test; the recipes write to `build/models`, where they are used again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder with model.onnx, calib.npz, heldout.npz and heldout_other.npz."""
    folder = ROOT / "build" / "models" / "minilm"
    if not (folder / "heldout_other.npz").is_file():
        command = [sys.executable, str(ROOT / "models" / "minilm.py"), "-o", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder
