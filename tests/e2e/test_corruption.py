"""The verifier itself is tested: a planted corruption of each kind makes compile or verify fail, and nothing is published.

A factor is corrupted between factorize and rewrite: the graph holds the wrong one, `reconstruct` sees the right one, as if the
rewrite were at fault.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lrcompile
from lrcompile.errors import LrcompileError, PluginError, VerificationError
from lrcompile.factors import FactorSet
from lrcompile.records import Budget
from lrcompile.verify import Noise
from tests.graphs import Array, node, normal, proto


def network() -> onnx.ModelProto:
    """Table, two layers with a bias, a skip, and two outputs."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("MatMul", ["e", "w1"], ["p1"], name="up"),
        node("Add", ["p1", "b1"], ["a1"], name="up_bias"),
        node("Relu", ["a1"], ["h"], name="act"),
        node("MatMul", ["h", "w2"], ["p2"], name="down"),
        node("Add", ["p2", "b2"], ["a2"], name="down_bias"),
        node("Add", ["a2", "e"], ["hidden"], name="skip"),
        node("MatMul", ["hidden", "w3"], ["logits"], name="head"),
    ]
    constants = {
        "table": normal(20, 12),
        "w1": normal(12, 16, seed=1) / 3,
        "b1": normal(16, seed=2),
        "w2": normal(16, 12, seed=3) / 4,
        "b2": normal(12, seed=4),
        "w3": normal(12, 20, seed=5) / 3,
    }
    return proto(nodes, {"ids": (("batch", "sequence"), np.int64)}, ["logits", "hidden"], constants)


DATA = [{"ids": np.random.default_rng(i).integers(0, 20, (3, 5))} for i in range(8)]


@pytest.fixture(scope="module")
def child() -> Iterator[lrcompile.Child]:
    with lrcompile.Child() as child:
        yield child


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def compiled(folder: Path, child: lrcompile.Child, cache: Path, **budget: Any) -> lrcompile.Result:
    onnx.save(network(), folder / "model.onnx")
    methods = budget.pop("methods", ("svd",))
    given = Budget(**(budget or {"rank": 4}))
    options = lrcompile.Options(methods=methods, budget=given, data=DATA, cache=cache)
    return lrcompile.compile(folder / "model.onnx", folder / "out", options, child=child)


def nothing_published(folder: Path) -> None:
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]


def test_without_corruption_it_passes(tmp_path: Path, child: lrcompile.Child, cache: Path) -> None:
    """The control: the same model, options and child, untouched."""
    result = compiled(tmp_path, child, cache)
    assert result.evidence.verdict == "passed"
    assert {d.method for d in result.plan.rewritten} == {"svd"} and len(result.plan.rewritten) == 3
    assert lrcompile.verify(tmp_path / "out", options=lrcompile.Options(cache=cache), child=child).checks


# --- a factor -----------------------------------------------------------------------------------------------------


def flipped(a: Array) -> Array:
    return -a


def zeroed(a: Array) -> Array:
    return np.zeros_like(a)


def zeroed_column(a: Array) -> Array:
    a = a.copy()
    a[:, -1] = 0  # the least of the components
    return a


def one_number(a: Array) -> Array:
    a = a.copy()
    a[tuple(0 for _ in a.shape)] += np.float32(0.5)
    return a


def spoiled(value: float) -> Callable[[Array], Array]:
    def change(a: Array) -> Array:
        a = a.copy()
        a[tuple(0 for _ in a.shape)] = value
        return a

    return change


FACTORS: dict[str, Callable[[Array], Array]] = {
    "doubled": lambda a: 2 * a,
    "1 percent larger": lambda a: a * np.float32(1.01),
    "0.1 percent larger": lambda a: a * np.float32(1.001),
    "flipped": flipped,
    "zeroed": zeroed,
    "the least component zeroed": zeroed_column,
    "one number": one_number,
    "rows swapped": lambda a: np.ascontiguousarray(a[::-1]),
    "NaN": spoiled(np.nan),
    "infinite": spoiled(np.inf),
}


def corrupt(factors: FactorSet, name: str, change: Callable[[Array], Array]) -> FactorSet:
    def load() -> dict[str, Array]:
        return {n: change(a) if n == name else a for n, a in factors.load().items()}

    return dataclasses.replace(factors, load=load)


def turned(a: Array) -> Array:
    """Indices in another order, which is as legal as the right one."""
    return np.ascontiguousarray(np.roll(a, 1))


OTHERS: dict[str, dict[str, Callable[[Array], Array]]] = {
    "pivoted": {"p": flipped, "c": one_number, "order": turned, "bias.0": flipped},
    "slicing": {"weight.0": flipped, "weight.1": one_number, "bias.0": flipped},
}


@pytest.mark.parametrize(("method", "factor"), [(m, f) for m, factors in OTHERS.items() for f in factors])
def test_a_factor_of_another_form(
    method: str,
    factor: str,
    tmp_path: Path,
    child: lrcompile.Child,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = import_module("lrcompile.compile")
    rewrite = stages.rewrite
    met: list[FactorSet] = []

    def wrong(model: ir.Model, sets: Sequence[FactorSet]) -> ir.Model:
        met[:] = [s for s in sets if factor in s.shapes][:1]
        return rewrite(model, [corrupt(s, factor, OTHERS[method][factor]) if s in met else s for s in sets])

    monkeypatch.setattr(stages, "rewrite", wrong)
    with pytest.raises(VerificationError, match="output"):
        compiled(tmp_path, child, cache, methods=(method,), keep=0.7)
    assert met
    nothing_published(tmp_path)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        (k, f)
        for k in FACTORS
        for f in ("a", "b", "bias.0")
        if (k, f) != ("the least component zeroed", "bias.0")
    ],
)
def test_a_factor(
    kind: str,
    factor: str,
    tmp_path: Path,
    child: lrcompile.Child,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = import_module("lrcompile.compile")
    rewrite = stages.rewrite

    def wrong(model: ir.Model, sets: Sequence[FactorSet]) -> ir.Model:
        assert sets[0].group.name == "up" and factor in sets[0].shapes
        return rewrite(model, [corrupt(sets[0], factor, FACTORS[kind]), *sets[1:]])

    monkeypatch.setattr(stages, "rewrite", wrong)
    with pytest.raises(VerificationError) as caught:
        compiled(tmp_path, child, cache)
    words = str(caught.value)
    assert "output 'logits'" in words or "output 'hidden'" in words or "moved" in words
    nothing_published(tmp_path)


def amplifier() -> onnx.ModelProto:
    """h = x W, y = h without its mean, of length one. W has one large direction, the same for all columns: at rank 1 all that is left of h is
    its mean, and y is rounding."""
    u = normal(16) / np.linalg.norm(normal(16))
    small = normal(16, 12, seed=1) / 10
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="first"),
        node("LayerNormalization", ["h", "one"], ["y"], name="norm", axis=-1, epsilon=1e-30),
    ]
    w = 10 * np.outer(u, np.ones(12)) + small - np.outer(u, u @ small)
    constants = {"w": w.astype(np.float32), "one": np.ones(12, np.float32)}
    return proto(nodes, {"x": (("rows", 16), np.float32)}, ["h", "y"], constants, opset=17)


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_amplifies_rounding_more_than_the_original(
    spoilt: bool, tmp_path: Path, child: lrcompile.Child, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own noise counts, and hides no wrong factor: h has none."""
    stages = import_module("lrcompile.compile")
    rewrite = stages.rewrite
    larger = FACTORS["0.1 percent larger"]
    if spoilt:
        monkeypatch.setattr(
            stages, "rewrite", lambda m, sets: rewrite(m, [corrupt(s, "a", larger) for s in sets])
        )
    onnx.save(amplifier(), tmp_path / "model.onnx")
    options = lrcompile.Options(methods=("svd-plain",), budget=Budget(rank=1), cache=cache)
    if spoilt:
        with pytest.raises(VerificationError, match="output 'h'"):
            lrcompile.compile(tmp_path / "model.onnx", tmp_path / "out", options, child=child)
        nothing_published(tmp_path)
        return
    result = lrcompile.compile(tmp_path / "model.onnx", tmp_path / "out", options, child=child)
    assert result.evidence.verdict == "passed" and len(result.plan.rewritten) == 1
    # the control: by the original's movement alone it would be called wrong
    monkeypatch.setattr(Noise, "or_larger", lambda self, other: self)
    with pytest.raises(VerificationError, match="output 'y'"):
        lrcompile.compile(tmp_path / "model.onnx", tmp_path / "again", options, child=child)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_factorization_that_gives_nan(
    value: float, tmp_path: Path, child: lrcompile.Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is the plugin that broke its contract: before anything is written into a graph. The cache must be a fresh one."""
    method = type(lrcompile.registry.factorization("svd"))
    factorize = method.factorize

    def wrong(self: Any, *args: Any) -> dict[str, Array]:
        made = dict(factorize(self, *args))
        return {**made, "a": spoiled(value)(made["a"])}

    monkeypatch.setattr(method, "factorize", wrong)
    with pytest.raises(PluginError, match="svd gave NaN or Inf in factor 'a' of up"):
        compiled(tmp_path, child, tmp_path.parent / f"cache-{value}")
    nothing_published(tmp_path)


# --- the graph ----------------------------------------------------------------------------------------------------


def by_name(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def drop(model: ir.Model, name: str) -> None:
    """Take a node out: who read its output reads its first input."""
    gone = by_name(model, name)
    kept = gone.inputs[0]
    assert kept is not None
    name = gone.outputs[0].name
    ir.convenience.replace_all_uses_with(gone.outputs[0], kept, replace_graph_outputs=True)
    model.graph.remove(gone, safe=True)
    if kept.is_graph_output():
        kept.name = name


def rename(model: ir.Model) -> None:
    model.graph.outputs[0].name = "logits_renamed"


def swap_names(model: ir.Model) -> None:
    a, b = model.graph.outputs
    a.name, b.name = "other", a.name
    a.name = "hidden"


def after(model: ir.Model, op: str, *constants: Array, **attributes: Any) -> None:
    """One more node before the first output."""
    old = model.graph.outputs[0]
    values = []
    for i, array in enumerate(constants):
        value = ir.val(f"planted_{i}", const_value=ir.tensor(array, name=f"planted_{i}"))
        model.graph.register_initializer(value)
        values.append(value)
    made = ir.node(op, [old, *values], attributes)
    model.graph.append(made)
    made.outputs[0].name, old.name = old.name, "planted"
    made.outputs[0].dtype = old.dtype
    model.graph.outputs[0] = made.outputs[0]


def double_constant(model: ir.Model) -> None:
    value = model.graph.initializers["b2" if "b2" in model.graph.initializers else "down/bias"]
    value.const_value = ir.tensor(value.const_value.numpy() * 1.01, name=value.name)


def to_float64(model: ir.Model) -> None:
    after(model, "Cast", to=ir.DataType.DOUBLE)
    model.graph.outputs[0].dtype = ir.DataType.DOUBLE


def keep_first_row(model: ir.Model) -> None:
    after(model, "Slice", np.array([0]), np.array([1]), np.array([0]))


def drop_output(model: ir.Model) -> None:
    del model.graph.outputs[1]


GRAPHS: dict[str, Callable[[ir.Model], None]] = {
    "a node dropped (Relu)": lambda m: drop(m, "act"),
    "a node dropped (a bias)": lambda m: drop(m, "down_bias"),
    "a node dropped (the skip)": lambda m: drop(m, "skip"),
    "an output renamed": rename,
    "outputs exchanged": swap_names,
    "an output missing": drop_output,
    "an output doubled": lambda m: after(m, "Mul", np.float32(2)),
    "an output moved by 0.01": lambda m: after(m, "Add", np.float32(0.01)),
    "an output of another type": to_float64,
    "an output of another shape": keep_first_row,
    "an output of NaN": lambda m: after(m, "Mul", np.float32(np.nan)),
    "an output infinite": lambda m: after(m, "Add", np.float32(np.inf)),
    "a bias changed by 1 percent": double_constant,
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graph(
    kind: str, tmp_path: Path, child: lrcompile.Child, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = import_module("lrcompile.compile")
    lower = stages.lower

    def wrong(model: ir.Model, rewrites: Any) -> ir.Model:
        lowered = lower(model, rewrites)
        GRAPHS[kind](lowered)
        return lowered

    monkeypatch.setattr(stages, "lower", wrong)
    with pytest.raises(VerificationError):
        compiled(tmp_path, child, cache)
    nothing_published(tmp_path)


def test_the_graph_under_full_rank(
    tmp_path: Path, child: lrcompile.Child, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identity mode has no data-driven judge at all: the first question alone must notice."""
    stages = import_module("lrcompile.compile")
    lower = stages.lower

    def wrong(model: ir.Model, rewrites: Any) -> ir.Model:
        lowered = lower(model, rewrites)
        GRAPHS["an output moved by 0.01"](lowered)
        return lowered

    monkeypatch.setattr(stages, "lower", wrong)
    with pytest.raises(VerificationError, match=r"'logits' differs by 1\.0+e-02"):
        compiled(tmp_path, child, cache, rank="full")
    nothing_published(tmp_path)


# --- the published folder -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, child: lrcompile.Child, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("published")
    compiled(folder, child, cache)
    return folder / "out"


def manifest(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "lrcompile.json").read_text()))


def rehash(out: Path, name: str) -> None:
    """Whoever altered a file knows about the manifest, too."""
    document = manifest(out)
    data = (out / name).read_bytes()
    document["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / "lrcompile.json").write_text(json.dumps(document))


def flip_byte(out: Path) -> None:
    data = bytearray((out / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "model.onnx").write_bytes(data)


def change_hash(out: Path) -> None:
    document = manifest(out)
    entry = document["files"]["model.onnx"]
    entry["sha256"] = ("0" if entry["sha256"][0] != "0" else "1") + entry["sha256"][1:]
    (out / "lrcompile.json").write_text(json.dumps(document))


def stored_arrays(document: Any, change: Callable[[Array], Array]) -> int:
    """Change every float array in a document of Polygraphy's; how many there were."""
    import io

    count = 0
    if isinstance(document, dict):
        if isinstance(document.get("array"), str):
            array = np.load(
                io.BytesIO(base64.b64decode(document["array"], validate=True)), allow_pickle=False
            )
            if array.dtype.kind == "f":
                file = io.BytesIO()
                np.save(file, change(array), allow_pickle=False)
                document["array"] = base64.b64encode(file.getvalue()).decode()
                count += 1
        return count + sum(stored_arrays(v, change) for v in document.values())
    if isinstance(document, list):
        return sum(stored_arrays(v, change) for v in document)
    return 0


def edit_outputs(change: Callable[[Array], Array]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        document = json.loads((out / "outputs.json").read_text())
        assert stored_arrays(document, change) > 0
        (out / "outputs.json").write_text(json.dumps(document))
        rehash(out, "outputs.json")

    return edit


def rename_stored(out: Path) -> None:
    text = (out / "outputs.json").read_text()
    assert '"hidden"' in text
    (out / "outputs.json").write_text(text.replace('"hidden"', '"hidden2"'))
    rehash(out, "outputs.json")


def another_model(change: Callable[[ir.Model], None]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        model = ir.load(out / "model.onnx")
        change(model)
        onnx.save(ir.to_proto(model), out / "model.onnx")
        rehash(out, "model.onnx")

    return edit


def no_feeds(out: Path) -> None:
    for name in ("inputs.json", "outputs.json"):
        document = json.loads((out / name).read_text())
        if isinstance(document, list):
            document.clear()
        else:
            document["lst"] = [[n, []] for n, _ in document["lst"]]
        (out / name).write_text(json.dumps(document))
        rehash(out, name)


def truncate(name: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[: len(data) // 2])
        rehash(out, name)

    return edit


def link_away(out: Path) -> None:
    (out / "model.onnx").rename(out.parent / "elsewhere.onnx")
    (out / "model.onnx").symlink_to(out.parent / "elsewhere.onnx")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of the model": (flip_byte, "model.onnx was altered"),
    "a hash in the manifest": (change_hash, "model.onnx was altered"),
    "an extra file": (lambda out: (out / "notes.txt").write_text("hello"), "notes.txt is not listed"),
    "an extra file below": (
        lambda out: ((out / "sub").mkdir(), (out / "sub/x").write_text("")),
        "sub/x is not listed",
    ),
    "a missing file": (lambda out: (out / "report.html").unlink(), "report.html is missing"),
    "no manifest": (lambda out: (out / "lrcompile.json").unlink(), "lrcompile.json is missing"),
    "a manifest of nonsense": (
        lambda out: (out / "lrcompile.json").write_text("[]"),
        "lrcompile.json is not readable",
    ),
    "a link instead of a file": (link_away, "model.onnx is not a regular file"),
    "stored outputs doubled": (edit_outputs(lambda a: 2 * a), "output '"),
    "stored outputs 1 percent off": (edit_outputs(lambda a: a * np.float32(1.01)), "output '"),
    "stored outputs NaN": (edit_outputs(lambda a: a * np.float32(np.nan)), "output '"),
    "stored outputs of another type": (edit_outputs(lambda a: a.astype(np.float64)), "output '"),
    "a stored output renamed": (rename_stored, "hidden"),
    "stored feeds and outputs emptied": (no_feeds, ""),
    "stored outputs cut short": (truncate("outputs.json"), ""),
    "stored inputs cut short": (truncate("inputs.json"), ""),
    "the model cut short": (truncate("model.onnx"), ""),
    "the model doubles an output": (another_model(GRAPHS["an output doubled"]), "output '"),
    "the model gives NaN": (another_model(GRAPHS["an output of NaN"]), "output '"),
    "the model has another output": (another_model(rename), "logits"),
    "the model lost a node": (another_model(GRAPHS["a node dropped (Relu)"]), "output '"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_published_folder(
    kind: str, published: Path, tmp_path: Path, child: lrcompile.Child, cache: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(published, out)
    plant, words = FOLDERS[kind]
    plant(out)
    with pytest.raises(VerificationError) as caught:
        lrcompile.verify(out, options=lrcompile.Options(cache=cache), child=child)
    assert words in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


def test_a_copy_of_the_folder_passes(
    published: Path, tmp_path: Path, child: lrcompile.Child, cache: Path
) -> None:
    """The control of the above: copying alone does no harm, and the files that are hashed again are not the reason."""
    shutil.copytree(published, tmp_path / "out")
    for name in ("outputs.json", "inputs.json", "model.onnx"):
        rehash(tmp_path / "out", name)
    lrcompile.verify(tmp_path / "out", options=lrcompile.Options(cache=cache), child=child)


def test_factors_changed_behind_the_manifest(
    published: Path, tmp_path: Path, child: lrcompile.Child, cache: Path
) -> None:
    """Outputs and hashes made to fit a damaged graph: only the comparison with the original can notice."""
    out, original = tmp_path / "out", published.parent / "model.onnx"
    shutil.copytree(published, out)
    another_model(GRAPHS["an output moved by 0.01"])(out)
    edit_outputs(lambda a: a)(out)
    options = lrcompile.Options(cache=cache)
    lrcompile.verify(published, original=original, options=options, child=child)  # the control
    with pytest.raises(LrcompileError):
        lrcompile.verify(out, original=original, options=options, child=child)
