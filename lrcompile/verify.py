"""Verify: is the rewrite right, and how far did the outputs move? Run and compared through Polygraphy; the policy is ours.

Polygraphy's own comparison passes an element when the absolute OR the relative error is small, pairs outputs whose names differ
by position, and calls an empty result a pass. Here: the same set of output names, at least one number compared, non-finite
values in the same places, and (first question) ``max|a-b| <= max(10 noise, 1e-5 max|b| + 1e-6)`` for every output.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from lrcompile.errors import LrcompileError, UsageError, VerificationError
from lrcompile.feeds import Feed, Feeds, mask_over, masks_of
from lrcompile.figures import Movement
from lrcompile.interfaces import Array, BuildOptions, Runs
from lrcompile.lean import without_torch
from lrcompile.records import Evidence, Limit, OutputEvidence

if TYPE_CHECKING:
    from lrcompile.child import Child

logger = logging.getLogger(__name__)

_NAMES = ("snr", "cosine", "kl", "top1", "relative_l2", "max_abs", "metric")
Metric = Callable[[Callable[[Feed], Mapping[str, Array]], Iterable[Feed]], float]


@dataclass(frozen=True, slots=True)
class Noise:
    """What the original moves by itself, per output: largest difference, and relative L2.

    drifts: outputs in which NaN and Inf already change places by themselves.
    """

    largest: Mapping[str, float]
    relative: Mapping[str, float]
    drifts: frozenset[str] = frozenset()

    def or_larger(self, other: Noise) -> Noise:
        """Of every output the larger of both."""

        def larger(mine: Mapping[str, float], its: Mapping[str, float]) -> Mapping[str, float]:
            return {name: max(value, its.get(name, 0.0)) for name, value in mine.items()}

        return Noise(
            larger(self.largest, other.largest),
            larger(self.relative, other.relative),
            self.drifts | other.drifts,
        )


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """One of our engines as a Polygraphy runner. Activation and release are the engine owner's business.

    eps: by output, the relative distance of two neighbouring numbers of its type.
    """

    def __init__(self, engine: Runs, like: Feed, name: str) -> None:
        super().__init__(name=name)
        self._engine, self._like = engine, like
        self.eps: dict[str, float] = {}

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for name, array in self._like.items():
            metadata.add(name, array.dtype, (None,) * array.ndim)
        return metadata

    def infer(self, feed_dict: Feed, check_inputs: bool = True, *args: Any, **kwargs: Any) -> Any:
        # Our feeds were checked when they were opened; Polygraphy's own check knows no bfloat16.
        return self.infer_impl(feed_dict)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, Array]:
        self.inference_time = 0.0  # never a figure of ours: times come from interleaved runs
        outputs = self._engine.run(dict(feed_dict))
        self.eps = {n: float(ml_dtypes.finfo(a.dtype).eps) for n, a in outputs.items() if _is_float(a)}
        return OrderedDict((n, _widened(a)) for n, a in outputs.items())


class Strict:
    """Our policy: gathers the movement of every output over all feeds, and what makes two runs incomparable."""

    def __init__(self) -> None:
        self.movements: dict[str, Movement] = {}
        self.failures: list[str] = []

    def add(
        self, first: Mapping[str, Array], second: Mapping[str, Array], masks: Sequence[Array] = ()
    ) -> None:
        """One feed's outputs of both; of outputs (batch, sequence, ..) only the rows that a mask lets through."""
        a, b = dict(first.items()), dict(second.items())
        if set(a) != set(b):
            missing, extra = sorted(set(a) - set(b)), sorted(set(b) - set(a))
            self.failures.append(f"output names differ: missing {missing}, not expected {extra}")
        for name in a:
            if name in b:
                keep = (
                    mask_over(a[name], masks) if a[name].ndim > 2 and a[name].shape == b[name].shape else None
                )
                pair = (a[name], b[name]) if keep is None else (a[name][keep], b[name][keep])
                self.movements.setdefault(name, Movement(name)).add(*pair)


def compare(first: Runs, second: Runs, feeds: Iterable[Feed], padding: bool = True) -> Strict:
    """Both engines on the same feeds, one feed at a time. Raises VerificationError when nothing could be compared.

    padding: whether rows of outputs that an input mask takes out are compared too: what the model makes of them nobody reads.
    """
    policy = Strict()
    at_hand: list[Feed] = []

    def remembered() -> Iterator[Feed]:
        for feed in feeds:
            at_hand[:] = [feed]
            yield feed

    stream_of_feeds = remembered()
    like = next(stream_of_feeds, None)
    if like is not None:
        runners = [EngineRunner(first, like, "original"), EngineRunner(second, like, "compiled")]
        with without_torch(), G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            # not Comparator.compare_accuracy: it prints statistics of every output, and takes minutes over logits to make them
            for results in Comparator.run(
                runners, data_loader=itertools.chain([like], stream_of_feeds), streaming=True
            ):
                masks = () if padding else masks_of(at_hand[0])
                policy.add(results[0][1][0], results[1][1][0], masks)
        for name, moved in policy.movements.items():
            moved.eps = runners[0].eps.get(name, 0.0)
    if not policy.failures and not any(m.count or m.problem for m in policy.movements.values()):
        raise VerificationError(
            "nothing was compared: no feed, no output, or outputs without a single number"
        )
    return policy


def noise_of(
    child: Child, target: str, original: Path, jittered: Path | None, feeds: Iterable[Feed]
) -> Noise:
    """The larger of two movements of the original: its optimisations off against on, and its rewritten weights jittered.

    Never less than one unit in the last place of an output's own type, by which two right answers may differ.
    """
    largest: dict[str, float] = {}
    relative: dict[str, float] = {}
    drifts: set[str] = set()
    others = [(original, BuildOptions(target, optimize=False))]
    others += [(jittered, BuildOptions(target))] if jittered is not None else []
    with child.build(target, original, BuildOptions(target)) as first:
        for path, options in others:
            with child.build(target, path, options) as second:
                for name, moved in compare(first, second, feeds).movements.items():
                    drifts |= {name} if moved.drift or moved.problem else set()
                    largest[name] = max(largest.get(name, 0.0), moved.largest, moved.resolution)
                    relative[name] = max(relative.get(name, 0.0), moved.relative_l2)
    return Noise(largest, relative, frozenset(drifts))


def check_rewrite(
    child: Child,
    target: str,
    oracle: Path,
    lowered: Path,
    noise: Noise,
    feeds: Iterable[Feed],
    building: BuildOptions | None = None,
) -> tuple[str, ...]:
    """First question: the published model against the original graph with reconstructed weights. Sentences of what failed.

    building: how the published one is built or loaded.
    """
    with (
        child.build(target, oracle, BuildOptions(target)) as a,
        child.build(target, lowered, building or BuildOptions(target)) as b,
    ):
        return differences(a, b, noise, feeds, "the original with reconstructed weights")


def differences(first: Runs, second: Runs, noise: Noise, feeds: Iterable[Feed], what: str) -> tuple[str, ...]:
    """Where two engines differ by more than noise and rounding allow, in sentences. what: the first one's name in them."""
    policy = compare(first, second, feeds)
    return (*policy.failures, *(f for m in policy.movements.values() for f in _wrong(m, noise, what)))


def _wrong(moved: Movement, known: Noise, what: str) -> Iterator[str]:
    noise = known.largest.get(moved.name, 0.0)
    allowed = max(10.0 * noise, 1e-5 * moved.peak + 1e-6)
    if moved.problem and moved.name not in known.drifts:
        yield f"output {moved.name!r}: {moved.problem}"
    elif moved.drift and moved.name not in known.drifts:
        yield f"output {moved.name!r}: NaN or infinite values stand in other places"
    elif not moved.largest <= allowed:
        yield (
            f"output {moved.name!r} differs by {moved.largest:.3e} from {what}, "
            f"{allowed:.3e} is allowed (noise floor {noise:.1e}, largest value {moved.peak:.3g})"
        )


def measure(first: Runs, second: Runs, feeds: Feeds, metric: tuple[Metric, float] | None) -> Evidence:
    """Second question: figures of every output on held-out data, without the rows of padding. The verdict is `judge`'s.

    metric: the user's function and what it says of the original.
    """
    policy = compare(first, second, feeds, padding=False)
    problems = [f"output {m.name!r}: {m.problem}" for m in policy.movements.values() if m.problem]
    figures = tuple((n, m.evidence(0.0)) for n, m in policy.movements.items())
    values = (metric[1], score(metric[0], second, feeds)) if metric is not None else None
    return Evidence(figures, "ran", feeds.origin, "passed", values, (*policy.failures, *problems))


def score(metric: Metric, engine: Runs, feeds: Feeds) -> float:
    """The user's metric of an engine. Raises UsageError with what the function raised."""
    try:
        return float(metric(engine.run, feeds))
    except LrcompileError:
        raise
    except Exception as error:
        raise UsageError(f"--metric failed: {type(error).__name__}: {error}") from error


def judge(evidence: Evidence, limits: Sequence[Limit], unchanged: bool) -> Evidence:
    """The verdict: what ``--max-error`` says of the figures, a sentence for each limit that does not hold. The worst output counts."""
    failures = list(evidence.failures)
    for limit in limits:
        name, worst = _worst(evidence, limit)
        if not limit.holds(worst):
            failures.append(f"{name}: {limit.name} is {worst:.4g}, {limit} was asked for")
    verdict: Literal["passed", "failed", "unchanged"] = (
        "failed" if failures else "unchanged" if unchanged else "passed"
    )
    return replace(evidence, verdict=verdict, failures=tuple(failures))


def _worst(evidence: Evidence, limit: Limit) -> tuple[str, float]:
    """The figure a limit is about, of the output where it is worst. Raises UsageError where there is none."""
    if limit.name == "metric":
        if evidence.metric is None:
            raise UsageError("--max-error metric=.. needs --metric f.py:func")
        before, after = evidence.metric
        return "--metric", after / before if limit.relative and before else after
    name = "snr_db" if limit.name == "snr" else limit.name
    values = [
        (n, _figure(o, name))
        for n, o in evidence.outputs
        if name not in ("kl", "top1") or getattr(o, name) is not None
    ]
    if not values:
        raise UsageError(f"--max-error {limit.name} needs an output named like 'logits'; there is none")
    lost = next(
        (v for v in values if math.isnan(v[1])), None
    )  # infinite sums: worse than any number, and neither min nor max sees it
    return lost or (min if limit.floor else max)(values, key=lambda pair: pair[1])


def _figure(outputs: OutputEvidence, name: str) -> float:
    value = getattr(outputs, name)
    return float("inf") if value is None else float(value)  # an SNR of None: nothing moved at all


def parse_limits(text: str) -> tuple[Limit, ...]:
    """``snr=30,cosine=0.99,metric=1.05x``. Raises UsageError naming the term that is wrong."""
    limits = []
    for term in filter(None, (t.strip() for t in text.split(","))):
        name, _, value = term.partition("=")
        relative = value.endswith("x")
        try:
            number = float(value.removesuffix("x"))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"--max-error {term!r}: write NAME=NUMBER, NAME one of {', '.join(_NAMES)}")
        if name not in _NAMES:
            raise UsageError(f"--max-error does not know {name!r}; it knows {', '.join(_NAMES)}")
        if relative and name != "metric":
            raise UsageError(f"--max-error {term!r}: only metric takes the form 1.05x")
        limits.append(Limit(name, number, relative))
    if not limits:
        raise UsageError("--max-error is empty: write for example cosine=0.99 or snr=30,kl=0.05")
    return tuple(limits)


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def _widened(array: Array) -> Array:
    """bfloat16, float8 and 4-bit types as float32: Polygraphy's comparator knows none of them."""
    return (
        array.astype(np.float32)
        if array.dtype.name.startswith(("bfloat", "float8", "float4", "int4", "uint4", "int2", "uint2"))
        else array
    )
