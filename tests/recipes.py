"""Models of the recipes in `models/`, made once: the recipes write to `build/models`, where every test finds them again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
# what a recipe writes last
_LAST = {
    "minilm": "heldout_other.npz",
    "smollm2": "heldout_other",
    "tiny_llama": "heldout",
    "tiny_vlm": "heldout.npz",
}


def exported(name: str) -> Path:
    """The folder with a recipe's model.onnx and data. Of several processes that ask for it one makes it."""
    folder = ROOT / "build" / "models" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / _LAST.get(name, "model.onnx")).exists():
            command = [sys.executable, str(ROOT / "models" / f"{name}.py"), "-o", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
    return folder
