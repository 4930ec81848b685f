"""Refit against its formula on raw samples, limits of the share, what is carried, caches; and that it helps on data not seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lrcompile import refit as module
from lrcompile.calibrate import StoredStatistics, calibrate
from lrcompile.curves import decision_of
from lrcompile.factorize import factorize
from lrcompile.factors import FactorSet
from lrcompile.feeds import Feeds, inputs_of, open_feeds
from lrcompile.interfaces import CandidateOptions
from lrcompile.oracle import reconstructed
from lrcompile.records import Finding, InputStatistics, Plan, Source
from lrcompile.refit import refit
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache, load_array
from lrcompile.weights import ModelWeights
from tests import blocks
from tests.graphs import Array, OneProcess, model, node, normal

SVD, PLAIN, SLICING = (factorization(n) for n in ("svd", "svd-plain", "slicing"))
Forms = Mapping[str, tuple[Any, int]]


@dataclasses.dataclass(frozen=True)
class Study:
    made: ir.Model
    finding: Finding
    feeds: Feeds
    weights: ModelWeights
    statistics: StoredStatistics
    folder: Path
    target: str

    def plan(self, forms: Forms) -> Plan:
        by_name = {g.name: g for g in self.finding.groups}
        decisions = []
        for name, (method, rank) in forms.items():
            options = CandidateOptions(ranks=(rank,))
            (form,) = method.candidates(by_name[name], self.weights, self.statistics, options)
            decisions.append(decision_of(by_name[name], form, ""))
        return Plan(self.target, tuple(decisions))

    def refit(self, forms: Forms, child: Any = None, seed: int = 0) -> tuple[FactorSet, ...]:
        source = Source(Path("m.onnx"), self.made, "source", (), 18)
        groups, methods = {g.name: g for g in self.finding.groups}, {m.name: m for m, _ in forms.values()}
        scratch = self.folder / f"scratch-{len(list(self.folder.iterdir()))}"
        scratch.mkdir()
        return refit(
            source, self.plan(forms), groups, self.weights, self.statistics, methods, self.feeds,
            child=child or OneProcess(), target=self.target, scratch=scratch, seed=seed,
        )  # fmt: skip

    def plain(self, forms: Forms) -> tuple[FactorSet, ...]:
        groups, methods = {g.name: g for g in self.finding.groups}, {m.name: m for m, _ in forms.values()}
        return factorize(self.plan(forms), groups, self.weights, self.statistics, methods, 0)


def study(
    made: ir.Model, data: Sequence[Mapping[str, Array]], folder: Path, target: str = "reference"
) -> Study:
    folder.mkdir(exist_ok=True)
    finding, feeds, cache = find(made), open_feeds(list(data), inputs_of(made)), Cache(folder / "cache")
    statistics = calibrate(
        made, finding, feeds, "source", target=target, child=OneProcess(), cache=cache  # type: ignore[arg-type]
    )  # fmt: skip
    return Study(made, finding, feeds, ModelWeights(cache, 18), statistics, folder, target)


def arrays(sets: Sequence[FactorSet]) -> dict[tuple[str, str], Array]:
    return {(s.decision.group, n): np.array(a) for s in sets for n, a in s.load().items()}


def product(factors: FactorSet) -> Array:
    made = factors.load()
    result: Array = made["a"].astype(np.float64) @ made["b"].astype(np.float64)
    return result


class Spy:
    """A factorization that writes down which W and b it was given."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.given: dict[str, tuple[Array, Array | None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def factorize(self, group: Any, weights: Any, *rest: Any) -> Any:
        for site in group.sites:
            bias = weights.bias(site)
            self.given[site.name] = np.array(weights.matrix(site)), None if bias is None else np.array(bias)
        return self.method.factorize(group, weights, *rest)


class Watching(OneProcess):
    """Keeps what refit saw: live values by name, all feeds together."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, list[Array]] = {}
        self.dense: dict[str, list[Array]] = {}

    def call(self, function: str, *args: Any) -> object:
        if function == "lrcompile.refit:watch":
            for into, files in ((self.dense, args[2]), (self.live, args[3])):
                for name, (path, dtype) in files.items():
                    into.setdefault(name, []).append(np.array(load_array(path, dtype)))
        return super().call(function, *args)


def run_ort(made: ir.Model, feed: Mapping[str, Array], more: Sequence[str] = ()) -> list[Array]:
    return blocks.run(made, feed, more)


# --- the formula --------------------------------------------------------------------------------------------------

K, H, N = 10, 9, 7


def chain(bias: bool) -> ir.Model:
    """Two layers of float64, nothing between them: all that stands in the formula can be computed by hand."""
    constants: dict[str, Array] = {
        "w1": normal(K, H, dtype=np.float64), "w2": normal(H, N, seed=1, dtype=np.float64),
    }  # fmt: skip
    nodes = [node("MatMul", ["x", "w1"], ["p"], name="one")]
    at = "p"
    if bias:
        constants |= {"b1": normal(H, dtype=np.float64), "b2": normal(N, dtype=np.float64)}
        nodes.append(node("Add", ["p", "b1"], ["h"]))
        at = "h"
    nodes.append(node("MatMul", [at, "w2"], ["q" if bias else "y"], name="two"))
    if bias:
        nodes.append(node("Add", ["q", "b2"], ["y"]))
    return model(nodes, {"x": (("n", K), np.float64)}, {"y": np.float64}, constants)


DATA = [
    {"x": normal(60, K, seed=i, dtype=np.float64) @ normal(K, K, seed=7, dtype=np.float64) + 1.5}
    for i in range(3)
]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_target_is_that_of_the_samples(
    bias: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M and b* by least squares over raw samples: |X M - Z W|^2 / n + |ridge (M - W)|^2, means apart where there is a bias."""
    monkeypatch.setattr(module, "SHARE", share)
    monkeypatch.setattr(module, "_ENOUGH", 0)  # as of many samples
    spy = Spy(SVD)
    one, _ = study(chain(bias), DATA, tmp_path).refit({"one": (spy, 3), "two": (spy, 3)})
    M, moved = spy.given["two"]
    x = np.concatenate([f["x"] for f in DATA])
    W1, W2 = normal(K, H, dtype=np.float64), normal(H, N, seed=1, dtype=np.float64)
    Z, X = x @ W1, x @ product(one)
    if bias:
        Z = Z + normal(H, dtype=np.float64)
        X = X + one.load()["bias.0"]
    n = len(x)
    a = H / (H + 100 * n)  # documented shrinkage towards the mean eigenvalue
    spread = np.sum(X**2) / n / H
    mx, mz = X.mean(axis=0), Z.mean(axis=0)
    Xc, Zc = (X - mx, Z - mz) if bias else (X, Z)
    diagonal = (1 - a) * np.sum(Xc**2, axis=0) / n + a * spread
    ridge = np.diag(np.sqrt(a * spread + module._RIDGE * diagonal))
    left = np.concatenate([np.sqrt((1 - a) / n) * Xc, ridge])
    right = np.concatenate([np.sqrt((1 - a) / n) * Zc @ W2, ridge @ W2])
    wanted = (1 - share) * W2 + share * np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(M, wanted, rtol=0, atol=1e-8 * np.abs(W2).max())
    if bias:
        b = normal(N, dtype=np.float64) + ((1 - share) * mx + share * mz) @ W2 - mx @ wanted
        np.testing.assert_allclose(moved, b, rtol=0, atol=1e-8 * np.abs(b).max())
    else:
        assert moved is None
    # nothing stands before the first layer
    np.testing.assert_allclose(spy.given["one"][0], W1, atol=1e-9)
    if share == 0.0:
        np.testing.assert_allclose(M, W2, atol=1e-12)


def test_the_whole_target_undoes_what_can_be_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """s = 1, full rank in the second layer: no better linear map of what the first layer gives exists, but for the ridge."""
    monkeypatch.setattr(module, "SHARE", 1.0)
    monkeypatch.setattr(module, "_RIDGE", 1e-6)
    known = study(chain(True), DATA, tmp_path)
    sets = known.refit({"one": (SVD, 4), "two": (SVD, N)})
    x = np.concatenate([f["x"] for f in DATA])
    from tests.graphs import run

    y, made = run(known.made, {"x": x})["y"], run(reconstructed(known.made, sets), {"x": x})["y"]
    one = sets[0].load()
    X = np.concatenate([x @ product(sets[0]) + one["bias.0"], np.ones((len(x), 1))], axis=1)
    best = X @ np.linalg.lstsq(X, y, rcond=None)[0]
    # the ridge pulls towards W where the four directions carry next to nothing: a hundredth of what is lost
    assert np.linalg.norm(y - made) <= 1.01 * np.linalg.norm(y - best)
    np.testing.assert_allclose((made - y).mean(axis=0), 0, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_behind_a_lossless_layer_it_is_the_plain_factorization(bias: bool, tmp_path: Path) -> None:
    known = study(chain(bias), DATA, tmp_path)
    forms = {"one": (SVD, H), "two": (SVD, 3)}
    for ours, plain in zip(known.refit(forms), known.plain(forms), strict=True):
        np.testing.assert_allclose(product(ours), product(plain), atol=1e-7, rtol=0)
        if bias:
            np.testing.assert_allclose(ours.load()["bias.0"], plain.load()["bias.0"], atol=1e-7, rtol=0)


# --- what is carried ----------------------------------------------------------------------------------------------


def transformer(layers: int = 2, keys_biased: bool = True) -> ir.Model:
    """Attention of four heads and feed-forward, with biases, without norms."""
    W = blocks.WIDTH
    b, at = blocks.Block(), "x"
    for i in range(layers):
        heads = []
        for j, n in enumerate("qkv"):
            made = b.linear(at, f"w{n}{i}", W, W, seed=10 * i + j, bias=n != "k" or keys_biased)
            split = b.op("Reshape", made, blocks.ints(0, 0, blocks.HEADS, blocks.SIZE))
            heads.append(b.op("Transpose", split, perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3]))
        scores = b.op(
            "Div", b.op("MatMul", heads[0], heads[1]), np.float32(blocks.SIZE**0.5) * np.ones((), np.float32)
        )
        mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), heads[2])
        together = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), blocks.ints(0, 0, W))
        at = b.op("Add", b.linear(together, f"o{i}", W, W, seed=10 * i + 3), at)
        hidden = b.op("Tanh", b.linear(at, f"up{i}", W, 2 * W, seed=10 * i + 4))
        at = b.op("Add", b.linear(hidden, f"down{i}", 2 * W, W, seed=10 * i + 5), at)
    return b.made(at)


def rows(seed: int, batch: int = 8) -> dict[str, Array]:
    """Correlated, with a mean: as activations are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 6, 8)) @ normal(8, blocks.WIDTH, seed=3, dtype=np.float64)
    return {"x": (0.4 * x + 0.3 * rng.standard_normal((batch, 6, blocks.WIDTH)) + 0.3).astype(np.float32)}


COVERS: dict[str, dict[str, tuple[Any, int]]] = {
    "alone": {f"{n}{i}": (SVD, 8) for i in range(2) for n in ("wq", "wk", "wv", "o", "up", "down")},
    "q, k, v together; neurons cut": {
        **{f"qkv:wq{i}": (SVD, 12) for i in range(2)}, **{f"o{i}": (SVD, 8) for i in range(2)},
        **{f"up_down:up{i}": (SLICING, 24) for i in range(2)},
    },
    "heads cut": {
        **{f"query_key:wq{i}": (SLICING, 3) for i in range(2)},
        **{f"value_output:wv{i}": (SLICING, 3) for i in range(2)},
        **{f"up{i}": (SVD, 10) for i in range(2)}, **{f"down{i}": (SVD, 10) for i in range(2)},
    },
}  # fmt: skip


ONE_LAYER = {n: f for n, f in COVERS["alone"].items() if n.endswith("0")}


@pytest.mark.parametrize("name", COVERS)
def test_live_values_are_those_of_the_compressed_model(name: str, tmp_path: Path) -> None:
    """What every group was fitted to, against the whole compressed model run at once."""
    made, data = transformer(), [rows(i) for i in range(2)]
    known, child = study(made, data, tmp_path, "ort-cpu"), Watching()
    sets = known.refit(COVERS[name], child)
    groups = [s.group for s in sets]
    inside = {g.sites[-1].data.name: g for g in groups if g.kind in ("up_down", "value_output")}
    names = sorted(child.live)
    assert len(names) >= 6
    # before a chain is taken, what its last weight reads is still whole
    whole = {None: [n for n in names if n not in inside], **{g: [n] for n, g in inside.items()}}
    for group, values in whole.items():
        compressed = reconstructed(made, [s for s in sets if s.group is not group])
        for index, feed in enumerate(data):
            dense, live = (run_ort(m, feed, values)[1:] for m in (made, compressed))
            for value, z, x in zip(values, dense, live, strict=True):
                # float32, two runs of kernels that need not be the same ones
                np.testing.assert_allclose(child.dense[value][index], z, atol=2e-5 * np.abs(z).max(), rtol=0)
                np.testing.assert_allclose(
                    child.live[value][index], x, atol=1e-4 * np.abs(x).max(), rtol=0, err_msg=value
                )


@pytest.mark.parametrize("name", COVERS)
def test_it_helps_on_data_not_seen(name: str, tmp_path: Path) -> None:
    made = transformer()
    known = study(made, [rows(i, 40) for i in range(2)], tmp_path, "ort-cpu")
    held_out = rows(100, 64)
    wanted = run_ort(made, held_out)[0]

    def lost(sets: Sequence[FactorSet]) -> float:
        return float(
            np.linalg.norm(run_ort(reconstructed(made, sets), held_out)[0] - wanted) / np.linalg.norm(wanted)
        )

    ours, plain = lost(known.refit(COVERS[name])), lost(known.plain(COVERS[name]))
    assert 0.01 < plain < 0.9  # or there is nothing to help
    assert ours < plain


def test_it_helps_a_deep_mlp(tmp_path: Path) -> None:
    """Errors grow from layer to layer: there most is to be had."""
    nodes, constants, at = [], {}, "x"
    for i in range(5):
        constants[f"w{i}"] = normal(24, 24, seed=i) / np.float32(24**0.5) * np.float32(1.5)
        nodes += [node("MatMul", [at, f"w{i}"], [f"p{i}"], name=f"l{i}"), node("Tanh", [f"p{i}"], [f"h{i}"])]
        at = f"h{i}"
    made = model(nodes, {"x": ("n", 24)}, [at], constants)
    low = normal(8, 24, seed=2)
    data = [
        {"x": (normal(200, 8, seed=i) @ low * 0.4 + 0.1 * normal(200, 24, seed=i + 50))} for i in range(4)
    ]
    known = study(made, data, tmp_path, "ort-cpu")
    forms = {f"l{i}": (SVD, 10) for i in range(5)}
    held_out = {"x": normal(500, 8, seed=99) @ low * 0.4 + 0.1 * normal(500, 24, seed=98)}
    wanted = run_ort(made, held_out)[0]
    ours, plain = (
        float(np.linalg.norm(run_ort(reconstructed(made, s), held_out)[0] - wanted) / np.linalg.norm(wanted))
        for s in (known.refit(forms), known.plain(forms))
    )
    assert ours < 0.97 * plain


def bias_of(name: str) -> Forms:
    return {"plain svd": {f"{n}0": (PLAIN, 8) for n in ("wq", "wk", "wv", "o", "up", "down")},
            "one of three without": {"wq0": (SVD, 6), "o0": (SVD, 4), "up0": (SVD, 6), "down0": (SVD, 6), "qkv:wq1": (SVD, 10)}}[name]  # fmt: skip


@pytest.mark.parametrize("name", ["plain svd", "one of three without"])
def test_biases_that_nobody_corrects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that leaves biases alone gets a target that needs none: mean outputs stay where they were, as far as they can."""
    monkeypatch.setattr(module, "_ENOUGH", 0)  # as of many samples
    made = transformer(2, keys_biased=name != "one of three without")
    known = study(made, [rows(i, 32) for i in range(4)], tmp_path, "ort-cpu")
    spy = Spy(PLAIN if name == "plain svd" else SVD)
    forms = {n: (spy, r) for n, (_, r) in bias_of(name).items()}
    sets = known.refit(forms)
    by_name = {s.name: s for s in known.finding.sites}
    last = "wq1" if name != "plain svd" else "down0"
    site = by_name[last]
    factors = next(s for s in sets if last in s.decision.sites)
    assert not any(n.startswith("bias") for n in factors.shapes)
    M, _ = spy.given[last]
    # the target is the best map without another bias, half-way: raw moments, not centred ones
    X, Z = (np.concatenate([run_ort(m, f, [site.data.name or ""])[-1].reshape(-1, site.K) for f in known.feeds]).astype(np.float64)
            for m in (reconstructed(made, [s for s in sets if s is not factors]), made))  # fmt: skip
    W = np.asarray(known.weights.matrix(site))
    ridge = np.diag(np.sqrt(module._RIDGE * np.sum(X**2, axis=0)))
    best = np.linalg.lstsq(np.concatenate([X, ridge]), np.concatenate([Z @ W, ridge @ W]), rcond=None)[0]
    wanted = (1 - module.SHARE) * W + module.SHARE * best
    # shrinkage (K / 100 n) and float32 activations are left out here: together below a hundredth
    assert np.linalg.norm(M - wanted) <= 0.01 * np.linalg.norm(wanted - W) + 1e-3 * np.linalg.norm(W)


# --- what is not walked -------------------------------------------------------------------------------------------


def tied() -> ir.Model:
    nodes = [
        node("Gather", ["e", "ids"], ["h"], name="table"),
        node("MatMul", ["h", "w0"], ["p"], name="l0"),
        node("Tanh", ["p"], ["t"]),
        node("MatMul", ["t", "w1"], ["u"], name="l1"),
        node("Transpose", ["e"], ["et"]),
        node("MatMul", ["u", "et"], ["logits"], name="head"),
    ]
    constants = {"e": normal(20, 8), "w0": normal(8, 8), "w1": normal(8, 8, seed=1)}
    return model(nodes, {"ids": (("n",), np.int64)}, ["logits"], constants)


def test_tables_and_heads_come_first(tmp_path: Path) -> None:
    """They have no place in the graph's order: the others are fitted behind them."""
    rng = np.random.default_rng(0)
    data = [{"ids": rng.integers(0, 20, 200)} for _ in range(3)]
    known, child = study(tied(), data, tmp_path), Watching()
    forms = {"table": (SVD, 3), "l0": (SVD, 4), "l1": (SVD, 4)}
    sets = known.refit(forms, child)
    assert [s.decision.group for s in sets] == list(forms)
    np.testing.assert_array_equal(arrays(sets)["table", "a"], arrays(known.plain(forms))["table", "a"])
    E = product(sets[0]).astype(np.float32)
    for index, feed in enumerate(data):
        np.testing.assert_allclose(child.live["h"][index], E[feed["ids"]], atol=1e-5)
        np.testing.assert_allclose(child.dense["h"][index], normal(20, 8)[feed["ids"]], atol=0)


@pytest.mark.parametrize("hidden", ["Transpose", "DequantizeLinear", "Cast"])
def test_weights_behind_other_nodes(hidden: str, tmp_path: Path) -> None:
    nodes, constants, at = [], {}, "x"
    for i in range(3):
        w = normal(8, 8, seed=i)
        if hidden == "Transpose":
            nodes.append(node("Transpose", [f"w{i}"], [f"t{i}"]))
        elif hidden == "Cast":
            nodes.append(node("Cast", [f"w{i}"], [f"t{i}"], to=TensorProto.FLOAT))
            w = w.astype(np.float16)
        else:
            nodes.append(node("DequantizeLinear", [f"w{i}", "s"], [f"t{i}"]))
            w = np.clip(w * 40, -127, 127).astype(np.int8)
            constants["s"] = np.array(0.02, np.float32)
        constants[f"w{i}"] = w
        nodes += [node("MatMul", [at, f"t{i}"], [f"p{i}"], name=f"l{i}"), node("Tanh", [f"p{i}"], [f"h{i}"])]
        at = f"h{i}"
    made = model(nodes, {"x": ("n", 8)}, [at], constants, opset=19)
    known, child = study(made, [{"x": normal(50, 8, seed=i)} for i in range(3)], tmp_path), Watching()
    sets = known.refit({f"l{i}": (SVD, 3) for i in range(3)}, child)
    assert len(sets) == 3 and set(child.live) == {
        "h0",
        "h1",
    }  # no weight is carried as if it were an activation


def test_sites_in_a_body_are_not_refitted(tmp_path: Path) -> None:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("ty", "ey")]
    then = helper.make_graph([node("MatMul", ["h", "w2"], ["ty"], name="inside")], "t", [], info[:1])
    other = helper.make_graph([node("Tanh", ["h"], ["ey"])], "e", [], info[1:])
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="first"),
        node("If", ["c"], ["f"], then_branch=then, else_branch=other),
        node("MatMul", ["f", "w3"], ["y"], name="last"),
    ]
    made = model(
        nodes, {"x": ("n", 8), "c": ((), np.bool_)}, ["y"], {f"w{i}": normal(8, 8, seed=i) for i in (1, 2, 3)}
    )
    data = [{"x": normal(40, 8, seed=i), "c": np.asarray(i % 2 == 0)} for i in range(4)]
    known = study(made, data, tmp_path)
    forms = {"first": (SVD, 3), "last": (SVD, 3), "inside": (PLAIN, 3)}
    ours, plain = arrays(known.refit(forms)), arrays(known.plain(forms))
    np.testing.assert_array_equal(ours["inside", "a"], plain["inside", "a"])
    assert not np.allclose(
        ours["last", "a"] @ ours["last", "b"], plain["last", "a"] @ plain["last", "b"], atol=1e-3
    )


def test_masked_rows_count_neither_here_nor_there(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w1"], ["h"], name="one"),
        node("MatMul", ["h", "w2"], ["y"], name="two"),
        node("Identity", ["attention_mask"], ["m"]),
    ]
    made = model(
        nodes, {"x": ("b", "s", 8), "attention_mask": (("b", "s"), np.int64)}, {"y": np.float32, "m": np.int64},
        {"w1": normal(8, 8), "w2": normal(8, 8, seed=1)},
    )  # fmt: skip
    mask = np.array([[1, 1, 1, 0, 0]] * 20)
    garbage = normal(20, 5, 8) * np.where(mask[..., None] == 1, 1, 1000).astype(np.float32)
    clean = normal(20, 5, 8) * mask[..., None].astype(np.float32)
    forms = {"one": (SVD, 3), "two": (SVD, 3)}
    seen = [
        arrays(study(made, [{"x": x, "attention_mask": mask}], tmp_path / n).refit(forms))
        for n, x in (("garbage", garbage), ("clean", clean))
    ]
    for key in seen[0]:
        np.testing.assert_allclose(seen[0][key], seen[1][key], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_types(dtype: Any, tmp_path: Path) -> None:
    nodes, constants, at = [], {}, "x"
    for i in range(3):
        constants[f"w{i}"] = (normal(8, 8, seed=i) / 2).astype(dtype)
        nodes += [node("MatMul", [at, f"w{i}"], [f"p{i}"], name=f"l{i}"), node("Tanh", [f"p{i}"], [f"h{i}"])]
        at = f"h{i}"
    made = model(nodes, {"x": (("n", 8), dtype)}, {at: dtype}, constants)
    known = study(made, [{"x": normal(60, 8, seed=i).astype(dtype)} for i in range(2)], tmp_path)
    sets = known.refit({f"l{i}": (SVD, 3) for i in range(3)})
    assert {a.dtype for s in sets for a in s.load().values()} == {np.dtype(dtype)}
    assert all(s.measured < 0.9 for s in sets)


# --- the cache ----------------------------------------------------------------------------------------------------


def test_a_second_run_runs_nothing(tmp_path: Path) -> None:
    known = study(transformer(1), [rows(i) for i in range(2)], tmp_path, "ort-cpu")
    forms, child, again = (
        {n: f for n, f in COVERS["heads cut"].items() if n.endswith("0")},
        OneProcess(),
        OneProcess(),
    )
    first = arrays(known.refit(forms, child))
    assert child.calls and not [f for d in tmp_path.glob("scratch*") for f in d.iterdir()]
    second = arrays(known.refit(forms, again))
    assert again.calls == []
    assert all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("watched", [2, 5])
def test_a_killed_run_goes_on_where_it_was(watched: int, tmp_path: Path) -> None:
    """A child that dies in the middle of a stage: what was made stays, half-made sums do not, and the end is the same.

    q, k and v are factorized side by side: when one thread's walk fails, another one waits for its sums.
    """

    class Dying(OneProcess):
        def call(self, function: str, *args: Any) -> object:
            if function == "lrcompile.refit:watch" and self.calls.count(function) == watched - 1:
                raise ConnectionError
            return super().call(function, *args)

    data, forms = [rows(i) for i in range(3)], ONE_LAYER
    whole = arrays(
        study(transformer(1), data, tmp_path / "whole", "ort-cpu").refit(forms, all_ := OneProcess())
    )
    known = study(transformer(1), data, tmp_path / "killed", "ort-cpu")
    with pytest.raises((ConnectionError, RuntimeError)):
        known.refit(forms, Dying())
    rest = OneProcess()
    made = arrays(known.refit(forms, rest))
    assert [k for k in whole if not np.array_equal(whole[k], made[k])] == []
    assert len(rest.calls) <= len(all_.calls)


def test_other_ranks_before_it_are_another_fit(tmp_path: Path) -> None:
    """The same decision behind another one is not found in the cache; a decision behind it changes nothing."""
    known = study(transformer(1), [rows(i) for i in range(2)], tmp_path, "ort-cpu")
    forms = ONE_LAYER
    one = arrays(known.refit(forms))
    two = arrays(known.refit({**forms, "up0": (SVD, 4)}))
    for group in forms:
        same = np.array_equal(one[group, "a"], two[group, "a"])
        assert same == (group in ("wq0", "wk0", "wv0", "o0")), group


def test_deterministic(tmp_path: Path) -> None:
    data = [rows(i) for i in range(2)]
    forms = {n: f for n, f in COVERS["heads cut"].items() if n.endswith("0")}
    one, two = (
        arrays(study(transformer(1), data, tmp_path / n, "ort-cpu").refit(forms)) for n in ("one", "two")
    )
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def test_the_models_run_two_to_three_times(tmp_path: Path) -> None:
    """Child calls grow with stages and feeds, not with their product of depth: each part runs once a feed for each of both."""
    calls = []
    for layers in (1, 2):
        known = study(transformer(layers), [rows(i) for i in range(2)], tmp_path / str(layers), "ort-cpu")
        forms = {n: f for n, f in COVERS["alone"].items() if int(n[-1]) < layers}
        known.refit(forms, child := OneProcess())
        calls.append(len(child.calls))
        # stages: q k v | o | up | down a layer
        assert child.calls.count("lrcompile.refit:watch") == 4 * layers * 2
        assert child.calls.count("lrcompile.carrier:run_part") <= 2 * 4 * layers * 2
    assert calls[1] <= 2 * calls[0] + 2 * 4


def test_of_few_samples_little_is_learned() -> None:
    """s = SHARE n / (n + 4 K)."""
    moment = np.eye(10)
    shares = [module._share(InputStatistics(n, moment, np.zeros(10))) for n in (0, 40, 4_000_000)]
    np.testing.assert_allclose(shares, [0.0, module.SHARE / 2, module.SHARE], rtol=1e-4)
