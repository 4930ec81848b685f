"""A compile in a process of its own, for tests that end it from outside."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

# Processes are forked from one that has imported what a compile needs: importing takes longer than these compiles.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["lrcompile.compile", "lrcompile_passes.svd", "matplotlib.backends.backend_svg", "tests.struck"]
)


def start(model: Path, out: Path, cache: Path, said: Path, force: bool) -> ForkServerProcess:
    """A compile without data to half of the parameters. said: the file that its stderr goes to."""
    process = _SERVER.Process(target=_compile, args=(model, out, cache, said, force))
    process.start()
    return process


def _compile(model: Path, out: Path, cache: Path, said: Path, force: bool) -> None:
    import lrcompile
    from lrcompile.errors import LrcompileError

    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    options = lrcompile.Options(
        budget=lrcompile.Budget(keep=0.5), methods=("svd-plain",), cache=cache, force=force
    )
    try:
        lrcompile.compile(model, out, options)
    except LrcompileError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)
