"""Verification's first question, put together: is the rewrite right?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from lrcompile.build import set_limits
from lrcompile.errors import VerificationError
from lrcompile.factors import FactorSet
from lrcompile.feeds import Feeds
from lrcompile.interfaces import BuildOptions
from lrcompile.lower import lower
from lrcompile.oracle import jittered, reconstructed
from lrcompile.publish import save_lowered
from lrcompile.rewrite import rewrite
from lrcompile.study import Study, typed
from lrcompile.verify import Noise, check_rewrite, noise_of


def prove(
    path: Path,
    sets: Sequence[FactorSet],
    known: Study,
    original: Path,
    drawn: Feeds,
    *,
    widen: bool = False,
    building: BuildOptions | None = None,
    what: str = "the rewritten graph",
) -> Noise:
    """Verification's first question, asked of a rewritten model's file. Raises VerificationError: a failure is our bug.

    The noise of the original in the same precision (widen: see `typed`); that is all there is where nothing was rewritten.
    building: how the file is built or loaded.
    """
    judge_in, child, source = known.places.judge, known.child, known.source
    set_limits(child, known.options, source.model, 8 * len(drawn))
    if not sets:
        return noise_of(child, judge_in, original, None, drawn)

    def saved(model: ir.Model, name: str) -> Path:
        return save_lowered(typed(model, known, widen), source, known.scratch / name, known.large)

    known.progress("prove", 0, 2)
    plain = original if known.options.precision is None else saved(source.model, "plain")
    moved = saved(jittered(source.model, sets, known.weights.matrix, known.options.seed), "jittered")
    noise = noise_of(child, judge_in, plain, moved, drawn)
    known.progress("prove", 1, 2)
    # of rounded inputs the second question judges; of all else, these weights' biases too, this one
    if any(s.decision.activations for s in sets):
        what, building = f"{what}, were no input rounded,", None
        unrounded = lower(
            rewrite(source.model, [s.unrounded for s in sets]), known.runtime.lowering(known.options.target)
        )
        path = saved(unrounded, "unrounded")
    oracle = saved(reconstructed(source.model, sets), "oracle")
    wrong = check_rewrite(child, judge_in, oracle, path, noise, drawn, building)
    if wrong:  # what was compressed may feel rounding more than the original does
        shaken = saved(reconstructed(source.model, sets, known.options.seed), "oracle-jittered")
        more = noise.or_larger(noise_of(child, judge_in, oracle, shaken, drawn))
        wrong = check_rewrite(child, judge_in, oracle, path, more, drawn, building)
    if wrong:
        raise VerificationError(f"{what} does not compute what its factors say: {'; '.join(wrong)}")
    return noise
