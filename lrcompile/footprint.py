"""How much memory a model takes to load and to run, in a process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lrcompile.child import Child
from lrcompile.interfaces import Array, BuildOptions
from lrcompile.registry import runtime_of

_RUNS = 3


def peak_memory(
    path: Path, options: BuildOptions, feed: Mapping[str, Array], timeout: float | None
) -> int | None:
    """Bytes that building and running the model add at the peak: of the process, or of the device where it computes on one.

    None where it cannot be told: a device without nvidia-smi.
    """
    with Child(timeout=timeout) as child:
        used: int | None = child.call(
            "lrcompile.footprint:measure", path, options, dict(feed), threads=options.threads, what="measuring memory"
        )  # fmt: skip
    return used


def measure(path: Path, options: BuildOptions, feed: Mapping[str, Array]) -> int | None:
    """Runs in the child. Of a process the kernel keeps the peak; a runtime on a device keeps what it once took."""
    runtime = runtime_of(options.target)
    runtime.availability(options.target)  # its libraries are loaded, and are not counted
    before, device_before = process_peak(), device_memory()
    with runtime.build(path, options) as engine:
        engine.bound(feed)(_RUNS)
        if "cpu" in engine.describe().get("device", "cpu").lower():
            return max(process_peak() - before, 0)
        after = device_memory()
    return None if after is None or device_before is None else max(after - device_before, 0)


def process_peak() -> int:
    """Most bytes that this process ever had resident."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmHWM:\s+(\d+)", status, re.M)
    assert found is not None
    return int(found[1]) << 10


def device_memory() -> int | None:
    """Bytes in use on the first GPU, as nvidia-smi says; None without one."""
    text = nvidia_smi("memory.used")
    return int(text.split(",")[0]) << 20 if text else None


def nvidia_smi(fields: str) -> str:
    """What nvidia-smi says of the first GPU, without units; empty without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""
