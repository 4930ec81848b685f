"""Publish: what lies in the folder and what its manifest says, counted by hand; equal bytes; nothing of this machine; the original kept."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml
from polygraphy.json import load_json

from lrcompile.errors import ModelError
from lrcompile.factorize import factorize
from lrcompile.load import load
from lrcompile.lower import lower
from lrcompile.options import Options
from lrcompile.plan import choose, dense_plan, prepare
from lrcompile.publish import Package, configuration, publish, result_of, save_lowered, small_enough
from lrcompile.records import Budget, Evidence, OutputEvidence, Source
from lrcompile.registry import factorization
from lrcompile.rewrite import rewrite
from lrcompile.sites import find
from lrcompile.store import Cache, check_folder, fingerprints
from lrcompile.weights import ModelWeights
from tests.graphs import Array, node, normal, proto, run

PLAIN = factorization("svd-plain")
FEEDS = [{"x": normal(3, 5, 12, seed=i)} for i in range(3)]


def original() -> onnx.ModelProto:
    """12 x 10 (rewritten), the same weight once more, and a stack (refused)."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="one"),
        node("Relu", ["x"], ["r"]),
        node("MatMul", ["r", "w"], ["q"], name="two"),
        node("Add", ["p", "q"], ["y"]),
        node("MatMul", ["stack", "x"], ["z"], name="stack"),
    ]
    return proto(nodes, {"x": ("b", 5, 12)}, ["y", "z"], {"w": normal(12, 10), "stack": normal(3, 2, 5)})


def package(folder: Path, dense: bool = False) -> Package:
    path = folder / "in.onnx"
    onnx.save(original(), path)
    source = load(path)
    finding, weights = find(source.model), ModelWeights(Cache(folder / "cache"), 18)
    budget = Budget(rank=2)
    problem = prepare(finding, weights, None, (PLAIN,), budget, target="reference")
    plan = dense_plan(problem, "because") if dense else choose(problem)
    sets = factorize(plan, {g.name: g for g in finding.groups}, weights, None, {"svd-plain": PLAIN}, 0)
    neutral = rewrite(source.model, sets) if sets else None
    model = lower(neutral.clone(), ()) if neutral is not None else None
    figures = OutputEvidence(0.1, None, 0.9, float("inf"))
    evidence = Evidence((("y", figures),), "ran", "here", "passed")
    return Package(
        source, finding, plan, sets, model, neutral, evidence, Options(target="reference", budget=budget), ()
    )


def report(document: Mapping[str, Any], notes: Sequence[str]) -> str:
    return f"<p>{document['format']}</p>"


def written(tmp_path: Path, name: str = "out", **options: Any) -> tuple[Path, Mapping[str, Any], Package]:
    (tmp_path / name).mkdir(parents=True)
    made = package(tmp_path / name, **options)
    folder = tmp_path / name / "staged"
    path = save_lowered(made.model, made.source, folder)
    document = publish(made, folder, FEEDS, lambda feed: run(onnx.load(path), feed), report)
    return folder, document, made


def test_what_lies_there(tmp_path: Path) -> None:
    folder, document, _ = written(tmp_path)
    names = {"model.onnx", "neutral.onnx", "inputs.json", "outputs.json", "config.yaml", "report.html"}
    assert {p.name for p in folder.iterdir()} == names | {"lrcompile.json"}
    assert set(document["files"]) == names
    assert (
        check_folder(folder)
        == json.loads((folder / "lrcompile.json").read_text())
        == json.loads(json.dumps(document))
    )
    assert document["files"] == fingerprints(folder)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx")))


def test_stored_feeds_and_outputs(tmp_path: Path) -> None:
    folder, _, _ = written(tmp_path)
    feeds = load_json(str(folder / "inputs.json"))
    assert [f["x"].tolist() for f in feeds] == [f["x"].tolist() for f in FEEDS]
    ((_, results),) = load_json(str(folder / "outputs.json")).items()
    model = onnx.load(folder / "model.onnx")
    for feed, result in zip(FEEDS, results, strict=True):
        np.testing.assert_array_equal(result["y"], run(model, feed)["y"])


def test_the_manifest_by_hand(tmp_path: Path) -> None:
    _, document, made = written(tmp_path)
    sites = {s["name"]: s for s in document["sites"]}
    assert list(sites) == ["one", "two", "stack"]
    one, two, stack = sites.values()
    assert (
        one["method"],
        one["rank"],
        one["storage"],
        one["parameters_before"],
        one["parameters_after"],
    ) == ("svd-plain", 2, "float", 120, 44)
    assert (two["method"], two["parameters_before"], two["parameters_after"]) == (
        "svd-plain",
        0,
        0,
    )  # the weight counts once
    assert (
        stack["method"],
        stack["rank"],
        stack["storage"],
        stack["parameters_before"],
        stack["parameters_after"],
    ) == ("dense", None, None, 30, 30)
    assert stack["reason"] == "the weight is a stack of 3 matrices" and stack["measured_error"] is None
    assert one["measured_error"] == made.sets[0].measured and one["weight_shape"] == [12, 10]
    # 15 rows at the first feed, two readers: 2 * 120 a row dense, 2 * 2 * 22 as factors; the stack is not ours and not counted
    assert document["totals"] == {
        "parameters_before": 150, "parameters_after": 74, "bytes_before": 600, "bytes_after": 296,
        "flops_before": 2 * 15 * 240, "flops_after": 2 * 15 * 88,
    }  # fmt: skip
    assert document["format"] == 1 and document["target"] == "reference"
    assert document["source"] == {"sha256": made.source.sha256, "weights_sha256": {}}
    assert document["evidence"]["outputs"]["y"]["max_abs"] is None  # JSON knows no infinity
    assert result_of(made, document, Path("x")).totals.flops_after == 2 * 15 * 88


def test_equal_bytes_wherever_it_is_written(tmp_path: Path) -> None:
    (a, one, _), (b, two, _) = written(tmp_path, "here"), written(tmp_path, "there/else")
    assert (
        one["files"] == two["files"]
        and (a / "lrcompile.json").read_bytes() == (b / "lrcompile.json").read_bytes()
    )


def test_nothing_of_this_machine(tmp_path: Path) -> None:
    folder, _, _ = written(tmp_path)
    for path in folder.iterdir():
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data, path.name
        assert len(platform.node()) < 5 or platform.node().encode() not in data, (
            path.name
        )  # a short one may stand in base64
        if path.suffix in (".json", ".yaml"):
            assert not re.search(rb"20\d\d-\d\d-\d\d", data), path.name


def test_the_configuration_reproduces_the_run() -> None:
    options = Options(budget=Budget(keep=0.5), include="a.*", dims={"batch": 3}, seed=7)
    known = configuration(options)
    assert yaml.safe_load(yaml.safe_dump(known)) == known
    assert (known["keep"], known["include"], known["dims"], known["seed"]) == (0.5, "a.*", {"batch": 3}, 7)
    assert "energy" not in known and "data" not in known and "cache" not in known


def test_unchanged_is_the_original_byte_for_byte(tmp_path: Path) -> None:
    folder, document, made = written(tmp_path, dense=True)
    assert (folder / "model.onnx").read_bytes() == made.source.path.read_bytes()
    assert "neutral.onnx" not in document["files"]
    assert document["totals"]["flops_before"] == document["totals"]["flops_after"]
    assert all(s["method"] == "dense" and s["reason"] for s in document["sites"])


@pytest.mark.parametrize("name", ["weights.bin", "sub/weights.bin"])
def test_external_files_keep_their_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    onnx.save(original(), tmp_path / "m.onnx", save_as_external_data=True, location=name, size_threshold=0)
    source = load(tmp_path / "m.onnx")
    save_lowered(None, source, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert (tmp_path / "out/model.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    feed = FEEDS[0]
    np.testing.assert_array_equal(
        run(onnx.load(tmp_path / "out/model.onnx"), feed)["y"], run(original(), feed)["y"]
    )


@pytest.mark.parametrize("name", ["report.html", "lrcompile.json", "model.onnx.data", "inputs.json"])
def test_external_files_that_clash_with_ours(name: str, tmp_path: Path) -> None:
    onnx.save(original(), tmp_path / "m.onnx", save_as_external_data=True, location=name, size_threshold=0)
    with pytest.raises(ModelError, match=f"its external file '{name}' has the name of one that is published"):
        save_lowered(None, load(tmp_path / "m.onnx"), tmp_path / "out")


def test_a_model_in_memory_has_no_bytes_to_keep(tmp_path: Path) -> None:
    source: Source = load(ir.from_proto(original()))
    path = save_lowered(None, source, tmp_path / "out")
    np.testing.assert_array_equal(run(onnx.load(path), FEEDS[0])["y"], run(original(), FEEDS[0])["y"])


@pytest.mark.parametrize(
    ("count", "megabytes", "kept"), [(3, 1, 3), (20, 1, 8), (8, 5, 3), (4, 4, 4), (2, 9, 1), (0, 1, 0)]
)
def test_as_many_feeds_as_may_be_published(count: int, megabytes: int, kept: int) -> None:
    feeds: list[dict[str, Array]] = [{"x": np.empty(megabytes * 1_000_000, np.int8)} for _ in range(count)]
    chosen = small_enough(feeds)
    assert len(chosen) == kept
    assert sum(f["x"].nbytes for f in chosen) <= 16_000_000
