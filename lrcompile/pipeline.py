"""The compile as a pass of onnx-ir: find, calibrate, plan, factorize, rewrite, lower, in somebody else's pipeline.

    passes = ir.passes.Sequential(LowRankPass(Options(budget=Budget(keep=0.7), data="calib.npz")), ...)
    model = passes(ir.load("model.onnx")).model

Nothing is published and no figure is measured: how far the outputs moved is `lrcompile.compile`'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from lrcompile.child import Child
from lrcompile.compile import factors_of, first_plan, problem_of, study
from lrcompile.errors import ModelError, UsageError
from lrcompile.factorize import annotate
from lrcompile.factors import FactorSet
from lrcompile.load import load
from lrcompile.lower import lower
from lrcompile.options import Options
from lrcompile.progress import Progress, silent
from lrcompile.proof import prove
from lrcompile.publish import save_lowered
from lrcompile.records import Finding, Plan
from lrcompile.rewrite import rewrite
from lrcompile.study import Study, at_hand, judged_file, typed, workshop

# Where the plan lies on the model that a pass gives: `Sequential` and `PassManager` hand on models, not results.
PLAN = "lrcompile.plan"


@dataclass
class LowRankResult(ir.passes.PassResult):
    """What a `LowRankPass` gives: the model, whether it differs, and how it came about.

    plan: a decision with its reason for every group. sets: the factors of those that rewrite, read when asked for.
    notes: what loading changed (functions inlined, sparse tensors made dense), or a script.
    """

    plan: Plan
    sets: tuple[FactorSet, ...] = field(repr=False)
    notes: tuple[str, ...] = ()


class LowRankPass(ir.passes.FunctionalPass):
    """Factorize the constant weights of a model, as `lrcompile.compile` does with the same options.

    The model given stays as it is; the one that comes out shares its unchanged tensors, and reads its factors from the cache
    folder when it is used, so keep that until the model is saved. The last quarter of the data is held out, as in a compile,
    for whoever judges the result. What an earlier `LowRankPass` made is left alone, so repeated passes come to an end.

    options: budget, methods, data, include, exclude, plan, seed, target, cache and limits; those about publishing are not
    looked at. precision: what the whole graph computes in. inline: plain ONNX for the target; else each rewritten site is a call of a local function.
    verify: ask in another process, before anything is returned, whether the rewritten model computes what its factors say.
    child: that process, one of our own when none is given.

    Raises, when made, UsageError for options that need a built engine or make no sense; when called, PreconditionError for a
    model that is not legal, VerificationError when the rewrite is wrong (our bug), and the other errors of `lrcompile.errors`.
    """

    def __init__(
        self,
        options: Options,
        *,
        inline: bool = True,
        verify: bool = False,
        child: Child | None = None,
        progress: Progress = silent,
    ) -> None:
        if options.budget.max_error or options.metric is not None:
            raise UsageError("a pass measures no outputs: leave max_error and metric to lrcompile.compile")
        if not options.budget.bounds_size and options.plan is None:
            raise UsageError(
                "a pass needs a budget that bounds the size (keep, size, flops, energy or rank) or a plan"
            )
        if options.precision is not None and not inline:
            raise UsageError(
                "a graph changes its precision without local functions: leave precision or inline=False out"
            )
        self._options = options.completed()
        self._inline, self._verify = inline, verify
        self._child, self._progress = child, progress

    def requires(self, model: ir.Model) -> None:
        """The loader's checks. They are made again on the way in: a pass must not keep what it learns of a model."""
        try:
            load(model, allow_hardlinks=self._options.allow_hardlinks)
        except ModelError as error:
            raise ir.passes.PreconditionError(str(error)) from error

    def call(self, model: ir.Model) -> LowRankResult:
        options = self._options
        with workshop(options, self._child) as shop:
            known = study(model, options, shop, self._progress)
            known = replace(known, finding=_untouched(known.finding))
            plan = first_plan(problem_of(known), known)
            sets = factors_of(plan, known)
            plan = annotate(plan, sets)
            made = model.clone()
            if sets:
                made = rewrite(known.source.model, sets)
                if self._inline:
                    made = lower(made, known.runtime.lowering(options.target))
            lowered, made = made, typed(made, known)
            if sets and self._verify:
                _check(made, lowered, sets, known)
        made.meta.update(model.meta)
        if sets or PLAN not in made.meta:  # a second time round the plan that rewrote stays
            made.meta[PLAN] = plan
        return LowRankResult(made, bool(sets) or made is not lowered, plan, sets, known.source.notes)


def _untouched(finding: Finding) -> Finding:
    """The finding without what a pass of ours made: factors are not factorized again, nor counted in a second budget."""
    ours = {site for site in finding.sites if "lrcompile.method" in site.node.metadata_props}
    groups = tuple(group for group in finding.groups if ours.isdisjoint(group.sites))
    return Finding(tuple(site for site in finding.sites if site not in ours), groups)


def _check(made: ir.Model, lowered: ir.Model, sets: tuple[FactorSet, ...], known: Study) -> None:
    """Verification's first question. Raises VerificationError, and BuildError where nothing here can run the model."""
    original, drawn = at_hand(known)
    path = save_lowered(made, known.source, known.scratch / "made", known.large)
    judged = judged_file(path, lowered, known)
    prove(judged, sets, known, original, drawn, widen=judged != path)
