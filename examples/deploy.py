"""A deployment step: compile, look at the evidence, and only then put the folder where the service reads it.

    python examples/deploy.py [FOLDER]        0: deployed; 1: the model was refused; 2, 3, 4: as the command line

What is deployed is checked again where it lies, and a second run replaces it in one rename.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import tiny_model

import lrcompile
from lrcompile import Budget, Limit, LrcompileError, Options, Result


def accepted(result: Result) -> bool:
    """The team's own rules, on top of `max_error`: the engine really ran, and the model got smaller."""
    evidence, totals = result.evidence, result.totals
    return (
        evidence.verdict == "passed"
        and evidence.engine == "ran"
        and totals.bytes_after < 0.8 * totals.bytes_before
    )


def deploy(model: Path, data: Path, folder: Path) -> int:
    options = Options(
        budget=Budget(keep=0.6, max_error=(Limit("cosine", 0.98), Limit("snr", 15.0))), data=data
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:  # beside the target: a rename must not copy
        staged = Path(name, "new")
        try:
            result = lrcompile.compile(model, staged, options)
            if not accepted(result):
                print(
                    f"refused: {result.evidence.verdict}, {result.totals.bytes_after:,} bytes",
                    file=sys.stderr,
                )
                return 1
            print(lrcompile.verify(staged))  # every file is as its manifest says, and computes what it did
        except LrcompileError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        if folder.exists():
            folder.rename(Path(name, "old"))
        staged.rename(folder)
    for output, moved in result.evidence.outputs:
        print(
            f"{output}: cosine {moved.cosine:.4f}, relative L2 {moved.relative_l2:.1e}, noise {moved.noise_floor:.1e}"
        )
    print(f"deployed: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return 0


def main() -> int:
    scratch = Path(tempfile.mkdtemp())
    try:
        model = tiny_model.write(scratch / "work")
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else scratch / "service"
        return deploy(model, model.with_name("calib.npz"), folder)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
