"""A model opened for experiments: plans within a budget, carried out to the file a user would get, and scored on held-out text.

Everything goes through the stages of `lrcompile.compile`; only which statistics and methods they are given is chosen here.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import lrcompile
from accuracy_parts.baselines import Diagonal, Uncentred, absolute_means, fisher_rows
from lrcompile.build import build
from lrcompile.calibrate import calibrate
from lrcompile.child import Child
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import Feed, Feeds, inputs_of, mask_over, masks_of, open_feeds
from lrcompile.figures import Movement
from lrcompile.interfaces import Array, Factorization, StatisticsSource
from lrcompile.lower import lower
from lrcompile.plan import Problem, choose, group_by_name, prepare
from lrcompile.publish import save_lowered
from lrcompile.reactions import reacting
from lrcompile.records import Budget, Finding, Plan, Source
from lrcompile.refit import refit
from lrcompile.registry import methods_of, runtime_of
from lrcompile.rewrite import rewrite
from lrcompile.sensitivity import judged_outputs, predicted
from lrcompile.store import Cache, load_function, remove_folder, sha256
from lrcompile.weights import ModelWeights

ROOT = Path(__file__).resolve().parents[2]
TARGET = "ort-cpu"
EMBEDDING = "sentence_embedding"
BATCH = 16  # held-out rows of like length that run together

Run = Callable[[Feed], Mapping[str, Array]]


@dataclass(frozen=True)
class Model:
    """A model of `models/`. title: of its section. cosine: judged by the mean cosine of its embedding, else by perplexity relative to dense.

    texts: held-out data, a file or a folder beside the model, by the name of its column.
    """

    name: str
    title: str
    recipe: str
    keeps: tuple[float, ...]
    data: str
    texts: Mapping[str, str]
    cosine: bool
    plans: bool = False  # whether predictions are compared with 20 plans
    ffn: bool = False  # whether the FFN part is timed


@dataclass(frozen=True)
class Refused:
    """Statistics that cannot be had, in words."""

    reason: str


@dataclass(eq=False)
class Lab:
    """An opened model. statistics: by what they know of the inputs, made when they are first asked for."""

    model: Model
    source: Source
    finding: Finding
    weights: ModelWeights
    calibration: Feeds
    texts: Mapping[str, Sequence[Feed]]
    child: Child
    cache: Cache
    scratch: Path
    seed: int
    say: Callable[[str], None]
    _statistics: dict[str, StatisticsSource | Refused | None] = field(default_factory=dict)
    _dense: dict[str, Any] = field(default_factory=dict)
    _files: int = 0

    # --- what is known ------------------------------------------------------------------------------------------------

    def statistics(self, kind: str) -> StatisticsSource | Refused | None:
        """none, plain (mean and second moment), reacting (and how the outputs react), second, absolute, fisher."""
        if kind not in self._statistics:
            self.say(f"statistics: {kind}")
            self._statistics[kind] = self._make(kind)
        return self._statistics[kind]

    def _make(self, kind: str) -> StatisticsSource | Refused | None:
        if kind == "none":
            return None
        if kind == "plain":
            return calibrate(
                self.source.model, self.finding, self.calibration, self.source.key, target=TARGET, child=self.child,
                cache=self.cache,
            )  # fmt: skip
        plain = self.statistics("plain")
        assert plain is not None
        assert not isinstance(plain, Refused)
        if kind == "reacting":
            made, told = reacting(
                self.source, self.finding, plain, self.calibration, child=self.child, cache=self.cache, seed=self.seed
            )  # fmt: skip
            return Refused(f"no gradients: {told}") if told else made
        if kind == "second":
            return Uncentred(plain)
        if kind == "absolute":
            return Diagonal(
                plain,
                kind,
                absolute_means(self.source, self.finding, self.calibration, self.cache, self.scratch),
            )
        rows = fisher_rows(self.source, self.finding, self.calibration, self.cache, self.seed)
        return Refused(f"no gradients: {rows}") if isinstance(rows, str) else Diagonal(plain, kind, rows)

    # --- plans --------------------------------------------------------------------------------------------------------

    def problem(
        self, methods: Sequence[str], statistics: StatisticsSource | None, allocated: bool
    ) -> Problem:
        """All forms of all groups; with measured sensitivities where ranks are to be allocated by them."""
        known = methods_of(methods)
        problem = self.prepared(known, statistics)
        if not allocated:
            return problem
        assert statistics is not None
        return self.predicted(problem, known, statistics)

    def prepared(self, methods: Mapping[str, Factorization], statistics: StatisticsSource | None) -> Problem:
        runtime = runtime_of(TARGET)
        return prepare(
            self.finding, self.weights, statistics, tuple(methods.values()), Budget(keep=1.0), target=TARGET,
            supports=lambda d: runtime.supports(d, TARGET),
        )  # fmt: skip

    def predicted(
        self, problem: Problem, methods: Mapping[str, Factorization], statistics: StatisticsSource
    ) -> Problem:
        return predicted(
            problem, self.source, self.weights, statistics, methods, self.calibration, child=self.child, target=TARGET,
            scratch=self.scratch, seed=self.seed,
        )  # fmt: skip

    def factors(
        self, plan: Plan, methods: Sequence[str], statistics: StatisticsSource | None, refitted: bool
    ) -> tuple[FactorSet, ...]:
        groups, known = group_by_name(self.finding), methods_of(methods)
        if not refitted:
            return factorize(plan, groups, self.weights, statistics, known, self.seed)
        assert statistics is not None
        return refit(
            self.source, plan, groups, self.weights, statistics, known, self.calibration, child=self.child, target=TARGET,
            scratch=self.scratch, seed=self.seed,
        )  # fmt: skip

    def lowered(self, sets: Sequence[FactorSet]) -> ir.Model:
        return lower(rewrite(self.source.model, sets), runtime_of(TARGET).lowering(TARGET))

    @contextlib.contextmanager
    def written(self, sets: Sequence[FactorSet]) -> Iterator[Path]:
        """The file of the compiled model, for as long as it is looked at."""
        self._files += 1
        path = save_lowered(self.lowered(sets), self.source, self.scratch / f"file-{self._files}")
        yield path
        remove_folder(path.parent)

    # --- scores -------------------------------------------------------------------------------------------------------

    def scores(self, path: Path) -> dict[str, float]:
        """By text: mean cosine to the dense embedding, or perplexity relative to dense. A file that was scored before is known."""
        digest = "".join(sha256(file) for file in sorted(path.parent.iterdir()) if file.is_file())
        known = self.cache.remember(
            (
                "benchmark-scores",
                self.source.key,
                digest,
                *(f"{t}:{key_of(f)}" for t, f in self.texts.items()),
            ),
            lambda: {text: np.array([value]) for text, value in self._scored(path).items()},
        )
        return {text: float(known[text][0]) for text in self.texts}

    def _scored(self, path: Path) -> dict[str, float]:
        if not self._dense:
            with build(self.child, TARGET, self.source.path) as dense:
                self._dense = {text: self._read(dense.run, feeds) for text, feeds in self.texts.items()}
        with build(self.child, TARGET, path) as engine:
            found = {text: self._read(engine.run, feeds) for text, feeds in self.texts.items()}
        judge = mean_cosine if self.model.cosine else ratio
        return {text: judge(self._dense[text], found[text]) for text in found}

    def _read(self, run: Run, feeds: Sequence[Feed]) -> Any:
        if self.model.cosine:
            return np.concatenate([run(feed)[EMBEDDING] for feed in feeds])
        return load_function(ROOT / "models" / "perplexity.py", "perplexity")(run, feeds)

    def outputs(self, path: Path, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
        """What a file gives on each feed, of the outputs by which plans are judged; without padding."""
        found = []
        with build(self.child, TARGET, path) as engine:
            for feed in feeds:
                given = engine.run(feed)
                found.append({n: unpadded(given[n], feed) for n in judged_outputs(list(given))})
        return found


def unpadded(array: Array, feed: Feed) -> Array:
    keep = mask_over(array, masks_of(feed)) if array.ndim > 2 else None
    return array if keep is None else array[keep]


def movement(before: Sequence[Mapping[str, Array]], after: Sequence[Mapping[str, Array]]) -> float:
    """How far outputs moved, counted as predictions count it: relative squared, KL of logits; the mean over outputs."""
    movements: dict[str, Movement] = {}
    for a, b in zip(before, after, strict=True):
        for name in a:
            movements.setdefault(name, Movement(name)).add(a[name], b[name])
    sizes = [m.divergence / m.rows if m.is_logits else min(m.relative_l2**2, 4.0) for m in movements.values()]
    return float(np.mean(sizes))


def key_of(feeds: Sequence[Feed]) -> str:
    """SHA-256 of the contents."""
    digest = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            digest.update(repr((name, feed[name].dtype.str, feed[name].shape)).encode())
            digest.update(np.ascontiguousarray(feed[name]).tobytes())
    return digest.hexdigest()


def mean_cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.einsum("ij,ij->i", a, b) / norms))


def ratio(dense: float, found: float) -> float:
    return found / dense


def within(problem: Problem, keep: float) -> Plan:
    """The plan for this share of the eligible parameters. Raises BudgetError."""
    return choose(replace(problem, budget=Budget(keep=keep)))


# --- opening ----------------------------------------------------------------------------------------------------------


def open_lab(
    model: Model,
    data: Path,
    child: Child,
    cache: Cache,
    scratch: Path,
    limit: int | None,
    seed: int,
    say: Callable[[str], None],
    held_out: int | None = None,
) -> Lab:
    """The model's folder under `data`, made by its recipe when it is not there. limit: rows or feeds of each data file; held_out: of those
    that are scored, if not the same.
    """
    folder = data / model.name
    if not (folder / "model.onnx").is_file() or not all((folder / t).exists() for t in model.texts.values()):
        say(f"{ROOT / model.recipe} -o {folder}")
        subprocess.run([sys.executable, str(ROOT / model.recipe), "-o", str(folder)], check=True)
    source = lrcompile.load(folder / "model.onnx")
    inputs = inputs_of(source.model)
    given = folder / model.data if limit is None else few(folder / model.data, limit)
    texts = {}
    for text, name in model.texts.items():
        feeds = few(folder / name, held_out or limit)
        texts[text] = by_length(feeds) if model.cosine else list(open_feeds(feeds, inputs))
    return Lab(
        model, source, lrcompile.find(source.model), ModelWeights(cache, source.opset), open_feeds(given, inputs), texts, child,
        cache, scratch, seed, say,
    )  # fmt: skip


def few(path: Path, limit: int | None, batch: int = 8) -> list[Feed]:
    """Feeds of a `.npz` (rows, in batches) or of a folder (a feed a file); of so many rows or files, spread over all, where there is a limit."""
    if path.is_dir():
        files = spread(sorted(path.glob("*.npz")), limit)
        return [dict(np.load(file)) for file in files]
    with np.load(path) as stored:
        arrays = dict(stored)
    rows = spread(range(len(next(iter(arrays.values())))), limit)
    return [{n: a[rows[i : i + batch]] for n, a in arrays.items()} for i in range(0, len(rows), batch)]


def spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    """So many of the items, from all over them."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[int((i + 0.5) * len(items) / limit)] for i in range(limit)]


def by_length(feeds: Sequence[Feed]) -> list[Feed]:
    """The same rows, those of like length together and cut to the longest: padding is not computed."""
    arrays = {n: np.concatenate([feed[n] for feed in feeds]) for n in feeds[0]}
    lengths = arrays["attention_mask"].sum(axis=1)
    parts = np.array_split(np.argsort(lengths, kind="stable"), max(1, len(lengths) // BATCH))
    return [{n: a[rows, : int(lengths[rows].max())] for n, a in arrays.items()} for rows in parts]
