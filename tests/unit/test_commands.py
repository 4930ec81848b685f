"""inspect, plan, verify and bench from Python: what they find, and folders forged so that every hash still fits."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from polygraphy.comparator import RunResults
from polygraphy.json import load_json, save_json

import lrcompile
from lrcompile import Budget, Child, Limit, Options, UsageError, VerificationError
from lrcompile.inspection import write_curves
from lrcompile.store import MANIFEST
from tests.graphs import node, normal, proto, run

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child() as made:
        yield made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, child: Child) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="table"),
        node("MatMul", ["e", "a"], ["h"], name="up"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "b"], ["y"], name="down"),
    ]
    constants = {"table": normal(40, 16), "a": normal(16, 24), "b": normal(24, 16)}
    onnx.save(proto(nodes, {"ids": (("n", "s"), np.int64)}, ["y"], constants), folder / "model.onnx")
    np.savez(folder / "data.npz", ids=np.random.default_rng(0).integers(0, 40, (32, 6)))
    result = lrcompile.compile(folder / "model.onnx", folder / "out", options(folder, rank=6), child=child)
    assert len(result.plan.rewritten) == 2
    return folder


def options(home: Path, **budget: Any) -> Options:
    """Pairs only: what is forged and counted below are their factors."""
    return Options(data=home / "data.npz", methods=("svd",), budget=Budget(**budget), cache=home / "cache")


@pytest.fixture
def forged(home: Path, tmp_path: Path) -> Callable[..., Path]:
    """The published folder with a file changed, and with the manifest that fits it."""

    def forge(**changes: Callable[[Path], None]) -> Path:
        out = tmp_path / "out"
        shutil.copytree(home / "out", out)
        document = json.loads((out / MANIFEST).read_text())
        for name, change in changes.items():
            path = out / {"model": "model.onnx", "inputs": "inputs.json", "outputs": "outputs.json"}[name]
            change(path)
            document["files"][path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        (out / MANIFEST).write_text(json.dumps(document))
        return out

    return forge


def recomputed(path: Path) -> None:
    """outputs.json as a model that was tampered with gives them."""
    model = onnx.load(path.parent / "model.onnx")
    results = RunResults()
    results.add(
        [run(model, dict(feed)) for feed in load_json(str(path.parent / "inputs.json"))], runner_name="forger"
    )
    path.write_text(results.to_json())


def edited(change: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        model = onnx.load(path)
        change(model.graph)
        onnx.save(model, path)

    return edit


def corrupt_factor(graph: onnx.GraphProto) -> None:
    factor = next(t for t in graph.initializer if t.name.endswith("svd/a"))
    array = numpy_helper.to_array(factor).copy()
    array[:8] *= -2
    factor.CopyFrom(numpy_helper.from_array(array, factor.name))


def drop_relu(graph: onnx.GraphProto) -> None:
    relu = next(n for n in graph.node if n.op_type == "Relu")
    relu.op_type = "Identity"


# --- inspect and plan ---------------------------------------------------------------------------------------------


def test_inspect_without_data_uses_what_needs_none(home: Path, child: Child) -> None:
    found = lrcompile.inspect(home / "model.onnx", Options(cache=home / "cache"), child=child)
    assert found.data is None
    served = {c.method: c.refusal is None for c in found.groups[0].curves}
    assert served["svd-plain"] and not any(served[n] for n in ("svd", "pivoted", "slicing"))
    assert "without data" in str(found)
    json.dumps(found.to_json(), allow_nan=False)


def test_inspect_curves_are_those_of_the_weight(home: Path, child: Child) -> None:
    found = lrcompile.inspect(home / "model.onnx", Options(cache=home / "cache"), child=child)
    (up,) = (g for g in found.groups if g.sites == ("up",))
    (curve,) = (c for c in up.curves if c.method == "svd-plain")
    energy = np.linalg.svd(normal(16, 24).astype(np.float64), compute_uv=False) ** 2
    held = np.cumsum(energy) / energy.sum()
    ranks = [int(np.argmax(held >= share)) + 1 for share in (0.5, 0.9, 0.99)]
    assert [p.rank for p in curve.at_energy if p] == ranks
    (_, at, half) = curve.at_share
    assert at is not None and at.rank == 7 and at.parameters == 7 * 40  # 0.75 x 16 x 24 = 288
    assert half is not None and half.error == pytest.approx(np.sqrt(1 - held[3]), abs=1e-5)


def test_inspect_with_data_counts_rows_and_marks_what_budgets_leave_out(home: Path, child: Child) -> None:
    found = lrcompile.inspect(home / "model.onnx", options(home), child=child)
    rows = {g.name: g.rows for g in found.groups if g.kind == "alone"}
    assert set(rows.values()) == {24 * 6}  # three quarters of 32 rows of six ids
    assert [g.reason is None for g in found.groups if g.sites in (("table",), ("up",))] == [False, True]
    assert "* a Gather weight takes part only when --include names it" in str(found)


def test_inspect_of_a_site_has_the_whole_curves(home: Path, child: Child, tmp_path: Path) -> None:
    asked = Options(cache=home / "cache", methods=("svd-plain", "btt"))
    found = lrcompile.inspect(home / "model.onnx", asked, site="^up$", child=child)
    assert {s.name for s in found.sites} == {"up"} and all("up" in g.sites for g in found.groups)
    curves = {c.method: c for c in next(g for g in found.groups if g.sites == ("up",)).curves}
    assert set(curves) == {"svd-plain", "btt"}
    energy = np.linalg.svd(normal(16, 24).astype(np.float64), compute_uv=False) ** 2
    lost = 1 - np.cumsum(energy) / energy.sum()
    points = curves["svd-plain"].points
    assert [p.parameters for p in points] == [40 * r for r in range(1, 10)]  # 40 x 10 > 16 x 24
    np.testing.assert_allclose([p.error for p in points], np.sqrt(lost[:9]), atol=1e-5)
    for curve in curves.values():
        assert curve.points
        assert all(
            a.parameters <= b.parameters <= 384 and a.error > b.error
            for a, b in itertools.pairwise(curve.points)
        )
    (row,) = (line for line in str(found).splitlines() if line.startswith("0.5"))
    assert f"{np.sqrt(lost[3]):.3g} ({4 * 40 / 384:.2g})" in row
    json.dumps(found.to_json(), allow_nan=False)
    write_curves(tmp_path / "curve.svg", found)
    drawn = (tmp_path / "curve.svg").read_text()
    ET.fromstring(drawn)
    assert all(f">{word}<" in drawn for word in ("svd-plain", "btt", "up")) and "§" not in drawn
    write_curves(tmp_path / "again.svg", found)
    assert (tmp_path / "again.svg").read_text() == drawn


def test_inspect_of_a_site_that_is_not_there(home: Path, child: Child, tmp_path: Path) -> None:
    asked = Options(cache=home / "cache")
    with pytest.raises(UsageError, match="--site 'nowhere' matches no weight"):
        lrcompile.inspect(home / "model.onnx", asked, site="nowhere", child=child)
    with pytest.raises(UsageError, match="regular expression"):
        lrcompile.inspect(home / "model.onnx", asked, site="(", child=child)
    found = lrcompile.inspect(home / "model.onnx", asked, child=child)
    assert not any(c.points for g in found.groups for c in g.curves)
    with pytest.raises(UsageError, match="nothing to draw"):
        write_curves(tmp_path / "curve.svg", found)
    with pytest.raises(UsageError, match=r"\.svg file"):
        write_curves(tmp_path / "curve.png", found)


def test_plan_is_what_compile_does(home: Path, child: Child, tmp_path: Path) -> None:
    for budget in ({"keep": 0.7}, {"max_error": (Limit("cosine", 0.9),)}):
        planned = lrcompile.plan(home / "model.onnx", options(home, **budget), child=child)
        compiled = lrcompile.compile(
            home / "model.onnx", tmp_path / str(len(budget)), options(home, **budget), child=child
        )
        # what is refitted is measured when it is made: until then its error is that of the form without it
        forms = [
            [(d.group, d.method, d.rank, d.movement) for d in p.decisions] for p in (planned, compiled.plan)
        ]
        assert forms[0] == forms[1]
        shutil.rmtree(compiled.path)


def test_a_plan_for_another_target(home: Path, child: Child) -> None:
    plan = lrcompile.plan(home / "model.onnx", options(home, keep=0.7), child=child)
    other = Options(data=home / "data.npz", plan=plan, target="reference", cache=home / "cache")
    with pytest.raises(UsageError, match="for ort-cpu, not for reference"):
        lrcompile.plan(home / "model.onnx", other, child=child)


def test_a_plan_that_needs_data(home: Path, child: Child) -> None:
    plan = lrcompile.plan(home / "model.onnx", options(home, keep=0.7), child=child)
    with pytest.raises(UsageError, match="give --data"):
        lrcompile.plan(home / "model.onnx", Options(plan=plan, cache=home / "cache"), child=child)


def test_a_plan_names_its_methods(home: Path, child: Child) -> None:
    plain = Options(methods=("svd-plain",), budget=Budget(keep=0.7), cache=home / "cache")
    plan = lrcompile.plan(home / "model.onnx", plain, child=child)
    again = lrcompile.plan(home / "model.onnx", Options(plan=plan, cache=home / "cache"), child=child)
    assert again == plan


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify_says_what_it_asked(home: Path, child: Child) -> None:
    held = lrcompile.verify(home / "out", child=child)
    assert len(held.checks) == 2 and held.evidence is None


def test_verify_with_the_original(home: Path, child: Child) -> None:
    held = lrcompile.verify(home / "out", original=home / "model.onnx", data=home / "data.npz", child=child)
    assert held.evidence is not None and held.evidence.verdict == "passed"
    assert held.evidence.held_out == "data.npz"
    assert any("2 sets of factors" in check for check in held.checks)


def test_verify_judges_by_the_limits_that_were_asked_for(home: Path, child: Child) -> None:
    strict = Options(budget=Budget(max_error=(Limit("cosine", 0.99999),)))
    with pytest.raises(VerificationError, match="cosine"):
        lrcompile.verify(
            home / "out", original=home / "model.onnx", data=home / "data.npz", options=strict, child=child
        )


def test_verify_with_another_model(home: Path, child: Child, tmp_path: Path) -> None:
    shutil.copy(home / "model.onnx", tmp_path)
    edited(lambda graph: graph.node[0].__setattr__("doc_string", "changed"))(tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="not the model"):
        lrcompile.verify(home / "out", original=tmp_path / "model.onnx", child=child)


def test_data_without_the_original(home: Path, child: Child) -> None:
    with pytest.raises(UsageError, match="--original"):
        lrcompile.verify(home / "out", data=home / "data.npz", child=child)


def rename_output(path: Path) -> None:
    path.write_text(path.read_text().replace('"y"', '"z"'))


def nan_in_outputs(path: Path) -> None:
    results = load_json(str(path))
    for iteration in next(iter(results.values())):
        iteration["y"] = np.full_like(iteration["y"], np.nan)
    path.write_text(results.to_json())


def fewer_inputs(path: Path) -> None:
    save_json(load_json(str(path))[:-1], str(path))


def other_inputs(path: Path) -> None:
    save_json([{"x": next(iter(feed.values()))} for feed in load_json(str(path))], str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outputs": rename_output}, "outputs.json holds"),
        ({"outputs": nan_in_outputs}, "does not compute what outputs.json holds"),
        ({"outputs": lambda path: path.write_text("{}")}, "outputs.json"),
        ({"inputs": fewer_inputs}, "feeds"),
        ({"inputs": other_inputs}, "inputs.json feeds"),
        ({"model": edited(corrupt_factor)}, "does not compute what outputs.json holds"),
        ({"model": edited(drop_relu)}, "does not compute what outputs.json holds"),
        ({"model": lambda path: path.write_bytes(b"nothing")}, "damaged"),
    ],
)
def test_forged_folders(
    forged: Callable[..., Path], child: Child, changes: dict[str, Callable[[Path], None]], words: str
) -> None:
    with pytest.raises(VerificationError, match=words):
        lrcompile.verify(forged(**changes), child=child)


def test_a_node_that_was_dropped_everywhere(home: Path, forged: Callable[..., Path], child: Child) -> None:
    """Outputs that fit the changed graph: only the original gives it away."""
    out = forged(model=edited(drop_relu), outputs=recomputed)
    lrcompile.verify(out, child=child)
    with pytest.raises(VerificationError, match="does not compute what its factors say"):
        lrcompile.verify(out, original=home / "model.onnx", child=child)


def test_a_factor_that_was_changed_everywhere(home: Path, forged: Callable[..., Path], child: Child) -> None:
    out = forged(model=edited(corrupt_factor), outputs=recomputed)
    limit = Options(budget=Budget(max_error=(Limit("cosine", 0.8),)), data=home / "data.npz")
    lrcompile.verify(home / "out", original=home / "model.onnx", options=limit, child=child)
    with pytest.raises(VerificationError, match="cosine"):
        lrcompile.verify(out, original=home / "model.onnx", options=limit, child=child)


# --- verify, where weights are stored as codes ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=("uint3", "float16"))
def coded_home(
    home: Path, tmp_path_factory: pytest.TempPathFactory, child: Child, request: pytest.FixtureRequest
) -> Path:
    """The same model with its table and both weights in a storage type."""
    folder = tmp_path_factory.mktemp(request.param)
    types, bits = (("uint3", "int8"), 7.0) if request.param == "uint3" else (("float16",), 16.0)
    asked = Options(
        data=home / "data.npz", methods=("dense",), storage=types, include="", cache=home / "cache",
        budget=Budget(bits=bits),
    )  # fmt: skip
    result = lrcompile.compile(home / "model.onnx", folder / "out", asked, child=child)
    assert len(result.plan.rewritten) == 3
    return folder


def changed(suffix: str) -> Callable[[onnx.GraphProto], None]:
    """One number of the first constant of ours of that name: a code, a scale, a zero point."""

    def change(graph: onnx.GraphProto) -> None:
        held = next(t for t in graph.initializer if t.name.endswith(suffix))
        data = bytearray(held.raw_data)
        data[-1] ^= 0x41
        held.raw_data = bytes(data)

    return change


def forged_from(folder: Path, home: Path, **changes: Callable[[Path], None]) -> Path:
    out = folder / f"forged-{len(list(folder.iterdir()))}"
    shutil.copytree(home / "out", out)
    document = json.loads((out / MANIFEST).read_text())
    for name, change in changes.items():
        path = out / {"model": "model.onnx", "outputs": "outputs.json"}[name]
        change(path)
        document["files"][path.name] = {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }  # fmt: skip
    (out / MANIFEST).write_text(json.dumps(document))
    return out


def test_codes_are_asked_again(home: Path, coded_home: Path, tmp_path: Path, child: Child) -> None:
    """The first question is asked of codes too: a node that was dropped everywhere is noticed, and one code or scale."""
    held = lrcompile.verify(coded_home / "out", original=home / "model.onnx", child=child)
    assert any("3 sets of factors" in check for check in held.checks)
    out = forged_from(tmp_path, coded_home, model=edited(drop_relu), outputs=recomputed)
    with pytest.raises(VerificationError, match="does not compute what its factors say"):
        lrcompile.verify(out, original=home / "model.onnx", child=child)
    parts = ("dense/w",) if "float16" in coded_home.name else ("dense/w", "dense/w.scale", "dense/w.zero")
    for suffix in parts:
        out = forged_from(tmp_path, coded_home, model=edited(changed(suffix)))
        with pytest.raises(VerificationError, match=r"does not compute what outputs\.json holds"):
            lrcompile.verify(out, original=home / "model.onnx", child=child)


# --- bench --------------------------------------------------------------------------------------------------------


def test_bench_on_the_folders_own_feeds(home: Path, child: Child) -> None:
    (row,) = lrcompile.bench(home / "out", home / "model.onnx", seconds=0, child=child).rows
    race = row.race
    assert race.target == "ort-cpu" and race.shapes == ("ids:2x8",)
    assert race.original.median > 0 and race.rounds >= 20


def test_bench_on_data_and_shapes(home: Path, child: Child) -> None:
    on_data = lrcompile.bench(
        home / "out", home / "model.onnx", seconds=0, options=options(home), child=child
    )
    assert on_data.rows[0].race.shapes == ("ids:8x6",)
    shaped = lrcompile.bench(home / "out", home / "model.onnx", seconds=0, shapes=["ids:1x5"], child=child)
    assert [row.race.shapes for row in shaped.rows] == [("ids:1x5",)]


def test_bench_against_another_model(home: Path, child: Child, tmp_path: Path) -> None:
    onnx.save(proto([node("Relu", ["x"], ["y"])], {"x": (2,)}, ["y"]), tmp_path / "other.onnx")
    with pytest.raises(VerificationError, match="not the model"):
        lrcompile.bench(home / "out", tmp_path / "other.onnx", child=child)


# --- doctor -------------------------------------------------------------------------------------------------------


def test_doctor_runs_every_target_that_there_is(tmp_path: Path) -> None:
    checks = lrcompile.doctor(tmp_path / "cache")
    assert len({(c.kind, c.name) for c in checks}) == len(checks)
    assert all(c.ok for c in checks if c.needed)
    missing = [c for c in checks if not c.ok]
    assert all(c.remedy or c.kind == "plugin" for c in missing)
    done = [c.detail for c in checks if c.kind == "target" and c.ok]
    assert all(words.startswith(("ran a model of ten", "built a model of ten")) for words in done)
