"""Configuration files and flags: what they may say, which one holds, and the sentence when they may not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lrcompile.config import Config, options_from, parse_memory, published_options, read_plan
from lrcompile.errors import UsageError
from lrcompile.options import Options
from lrcompile.publish import configuration
from lrcompile.records import Amount, Budget, Decision, EngineOptions, Limit, Plan, ShapeRange


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_nothing_said_is_the_defaults() -> None:
    assert options_from({}) == Options()
    assert options_from(dict.fromkeys(Config.model_fields)) == Options()


def test_the_file_has_the_names_of_the_options() -> None:
    inside = set(Budget.__dataclass_fields__) | set(EngineOptions.__dataclass_fields__)
    assert set(Config.model_fields) == set(Options.__dataclass_fields__) - {"budget", "engine"} | inside


def test_what_is_published_can_be_read_back(tmp_path: Path) -> None:
    budget = Budget(keep=0.5, max_error=(Limit("snr", 30.0), Limit("cosine", 0.99)))
    options = Options(
        methods=("svd", "dense"), budget=budget, include="a.*", batch=3, dims={"n": 4}, seed=7, threads=2
    )
    file = written(tmp_path, yaml.safe_dump(configuration(options)))
    assert options_from({}, file) == options


def test_what_is_published_of_an_engine_can_be_read_back(tmp_path: Path) -> None:
    engine = EngineOptions(
        shapes=(ShapeRange("x", (1, 8), (1, 64), (8, 64)),), workspace=1 << 30, level=3, capabilities=("8.6", "12.0"),
        cuda_graph=True, provider=(("arena", "small"),),
    )  # fmt: skip
    budget = Budget(latency=Amount(0.7, relative=True), objective="latency")
    options = Options(budget=budget, precision="fp16", engine=engine, margin=1.1)
    file = written(tmp_path, yaml.safe_dump(configuration(options)))
    assert options_from({}, file) == options


# What a folder says elsewhere (plan, the hash of data), names a file, or changes nothing of what is published.
NOT_PUBLISHED = {
    "plan", "data", "verify_data", "metric", "pareto", "timeout", "memory", "allow_hardlinks", "external_data", "keep_functions",
    "gs_script", "force", "cache",
}  # fmt: skip


def test_every_option_that_decides_is_published(tmp_path: Path) -> None:
    """Each is given a value of its own, and found again."""
    engine = EngineOptions(
        shapes=(ShapeRange("x", (1,), (2,), (3,)),), workspace=1 << 20, level=2, capabilities=("8.9",), streaming=1 << 21,
        version_compatible=True, refittable=True, cuda_graph=True, provider=(("a", "b"),), cpu_nodes=True,
    )  # fmt: skip
    given = Options(
        target="ort-cuda", methods=("svd",), storage=("int8", "uint4-64"), activations=("int8",), include="a", exclude="b", batch=3,
        dims={"n": 4}, seed=5, refit=False, gradients=False, precision="fp32", margin=1.5, threads=2, engine=engine,
    )  # fmt: skip
    budgets = [
        Budget(**{name: value}, max_error=(Limit("snr", 30.0),), objective="latency")  # type: ignore[arg-type]
        for name, value in {
            "keep": 0.5, "size": Amount(100), "flops": Amount(100), "latency": Amount(0.5, relative=True), "bits": 4.5, "energy": 0.9,
            "rank": 4,
        }.items()
    ]  # fmt: skip
    said: set[str] = set()
    for budget in budgets:
        options = replace(given, budget=budget)
        document = configuration(options)
        assert options_from({}, written(tmp_path, yaml.safe_dump(document))) == options
        said |= set(document)
    assert said == set(Config.model_fields) - NOT_PUBLISHED


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("5ms", Amount(5e-3)),
        ("800us", Amount(8e-4)),
        ("0.1s", Amount(0.1)),
        ("0.7x", Amount(0.7, relative=True)),
    ],
)
def test_latency(text: str, amount: Amount) -> None:
    budget = options_from({"latency": text}).budget
    assert budget.latency is not None
    assert budget.latency.relative == amount.relative
    assert budget.latency.value == pytest.approx(amount.value, rel=1e-12)
    assert budget.asks_speed


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "seed: 1\nbatch: 2\nkeep: 0.5\n")
    assert options_from({"seed": 9}, file) == Options(seed=9, batch=2, budget=Budget(keep=0.5))


def test_a_bound_among_the_flags_takes_the_place_of_the_files(tmp_path: Path) -> None:
    file = written(tmp_path, "keep: 0.5\nmax_error: snr=30\n")
    assert options_from({"rank": "8"}, file).budget == Budget(rank=8, max_error=(Limit("snr", 30.0),))
    assert options_from({"rank": "full"}, file).budget.rank == "full"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kep: 3", "kep: unknown key; known: target, "),
        ("keep: 2", "keep is 2; allowed: less than or equal to 1"),
        ("keep: much", "keep is 'much'; allowed: a valid number"),
        ("max_error: cosinus=1", "it knows snr, cosine"),
        ("objective: beauty", "'size'"),
        ("methods: 3", "methods is 3; allowed: a list"),
        ("dims: {n: x}", "dims is 'x'"),
        ("memory: lots", "GiB"),
        ("- keep", "mapping"),
        ("keep: [", "not YAML"),
        ("keep: 0.5\nrank: 3", "give one of them"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, words: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        options_from({}, file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value) or "give one of them" in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"keep": 3.0}, "--keep is 3.0; allowed: less than or equal to 1"),
        ({"rank": "most"}, "--rank is 'most'; allowed: a valid integer or 'full'"),
        ({"max_error": "snr"}, "--max-error"),
        ({"dim": ["n"]}, "--dim 'n': write NAME=NUMBER"),
        ({"threads": 0}, "--threads is 0"),
        ({"objective": "speed"}, "--objective is 'speed'; allowed: 'size', 'disk', 'latency' or 'flops'"),
        (
            {"latency": "1.5x"},
            "--latency 1.5x: give a time such as 5ms, or a share of the original's, below 1x",
        ),
        ({"latency": "fast"}, "a time such as 5ms, 800us or 0.1s"),
        ({"margin": 0.9}, "--margin is 0.9"),
        ({"shape": ["x=3"]}, "'x=3' is no shape"),
        ({"shape": ["x:4,2,8"]}, "must rise"),
        ({"provider": ["fast"]}, "NAME=VALUE each, not fast"),
        ({"precision": "int8"}, "--precision is 'int8'; allowed: 'fp32', 'fp16' or 'bf16'"),
        ({"latency": "0.7x", "keep": 0.5}, "--keep and --latency both bound what is kept"),
        ({"max_error": "metric=1.05x"}, "needs --metric"),
    ],
)
def test_what_flags_may_not_say(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        options_from(flags)
    assert words in str(caught.value)


def test_words_in_both_spellings() -> None:
    assert options_from({"methods": "svd, dense"}).methods == ("svd", "dense")
    assert options_from({"dim": ["a.b=3", "c=4"]}).dims == {"a.b": 3, "c": 4}


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 k", 1500), ("7", 7), ("2G", 2 * 10**9)]
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("60MB", Amount(60e6)), ("1.2GB", Amount(1.2e9)), ("500KB", Amount(5e5)), ("500 kb", Amount(5e5)), ("3MiB", Amount(3 * 2**20)),
        ("0.5x", Amount(0.5, relative=True)), ("1e6", Amount(1e6)), (2_000_000, Amount(2e6)), ("1X", Amount(1.0, relative=True)),
    ],
)  # fmt: skip
def test_amounts(text: object, amount: Amount) -> None:
    assert options_from({"size": text}).budget == Budget(size=amount)
    if "B" not in str(text).upper():
        assert options_from({"flops": text}).budget == Budget(flops=amount)


@pytest.mark.parametrize(
    "text", ["", "MB", "60MX", "-3MB", "0.5 of it", "x", "nan", "60GFLOPs", "0.5x0.5x", "1..2MB"]
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"--size is '.*'; allowed: an amount such as 60MB .* 0\.5x, a share"
    ):
        options_from({"size": text})


@pytest.mark.parametrize("text", ["0", "0.5", "0x", "1.5x", "1e999"])
def test_amounts_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match=r"--flops .*: give an amount such as 1\.2G, or a share"):
        options_from({"flops": text})


@pytest.mark.parametrize("pair", list(itertools.combinations(("keep", "size", "flops", "energy", "rank"), 2)))
def test_one_bound_at_a_time(tmp_path: Path, pair: tuple[str, str]) -> None:
    """Both are named, on the command line and in a file; a flag takes the place of the file's."""
    values = {"keep": 0.5, "size": "0.5x", "flops": "0.5x", "energy": 0.9, "rank": "2"}
    first, second = pair
    with pytest.raises(
        UsageError, match=f"--{first} and --{second} both bound what is kept: give one of them"
    ):
        options_from({n: values[n] for n in pair})
    file = written(tmp_path, f"{first}: {values[first]}\n")
    assert getattr(options_from({second: values[second]}, file).budget, first) is None


@pytest.mark.parametrize(
    "budget",
    [Budget(size=Amount(1234567)), Budget(size=Amount(1 / 3, relative=True)), Budget(flops=Amount(2.5e9))],
)
def test_published_amounts_are_exact(tmp_path: Path, budget: Budget) -> None:
    options = Options(budget=budget, refit=False, gradients=False, pareto=Path("elsewhere.svg"))
    document = configuration(options)
    assert "pareto" not in document  # never a path
    file = written(tmp_path, yaml.safe_dump(document))
    assert options_from({}, file) == replace(options, pareto=None)


def test_a_limit_on_a_metric_that_is_not_given_again(tmp_path: Path) -> None:
    written(tmp_path, "max_error: cosine=0.9,metric=1.1x\nseed: 5\n")
    options = published_options(tmp_path, {})
    assert options.budget.max_error == (Limit("cosine", 0.9),) and options.seed == 5
    again = published_options(tmp_path, {"metric": "f.py:g"})
    assert again.budget.max_error == (Limit("cosine", 0.9), Limit("metric", 1.1, relative=True))


# --- plans --------------------------------------------------------------------------------------------------------

DECISION = Decision(
    "g",
    ("g",),
    "svd",
    3,
    None,
    0.1,
    True,
    100,
    60,
    400,
    240,
    200,
    120,
    "because",
    (("form", "full"), ("n", 2)),
)


def test_a_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = Plan("ort-cpu", (DECISION,), ("a note",), 0.5)
    for document in (plan.to_json(), {"plan": plan.to_json(), "format": 1}):
        (tmp_path / "plan.json").write_text(json.dumps(document))
        assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "text",
    ["3", "{}", "[]", "null", '{"target": "t", "decisions": [{}]}', '{"target": 1, "decisions": []}', "{"],
)
def test_what_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=r"plan\.json"):
        read_plan(tmp_path / "plan.json")
