"""Configuration files and flags: what they may say, which one holds, and the sentence when they may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lrcompile.config import Config, options_from, parse_memory, published_options, read_plan
from lrcompile.errors import UsageError
from lrcompile.options import Options
from lrcompile.publish import configuration
from lrcompile.records import Budget, Decision, Limit, Plan


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_nothing_said_is_the_defaults() -> None:
    assert options_from({}) == Options()
    assert options_from(dict.fromkeys(Config.model_fields)) == Options()


def test_the_file_has_the_names_of_the_options() -> None:
    names = set(Options.__dataclass_fields__) - {"budget"} | set(Budget.__dataclass_fields__)
    assert set(Config.model_fields) == names


def test_what_is_published_can_be_read_back(tmp_path: Path) -> None:
    budget = Budget(keep=0.5, max_error=(Limit("snr", 30.0), Limit("cosine", 0.99)))
    options = Options(
        methods=("svd", "dense"), budget=budget, include="a.*", batch=3, dims={"n": 4}, seed=7, threads=2
    )
    import yaml

    file = written(tmp_path, yaml.safe_dump(configuration(options)))
    assert options_from({}, file) == options


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
        ({"objective": "latency"}, "this version minimises size only"),
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
