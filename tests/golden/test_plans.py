"""Printed plans of a generated decoder, word for word. After a change that is meant: `pytest tests/golden --update-golden`, and read the diff."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lrcompile.plan import choose, prepare
from lrcompile.records import Budget, Plan
from lrcompile.registry import factorization
from lrcompile.sites import find
from lrcompile.store import Cache
from lrcompile.weights import ModelWeights
from tests.graphs import Array, model, node, normal

FOLDER = Path(__file__).parent
WIDTH, FEW, HIDDEN, VOCABULARY = 32, 16, 80, 100


def decoder(layers: int = 2) -> ir.Model:
    """The weights of a Llama of two layers and a tied head, without its positions: what a plan can see of it."""
    nodes = [node("Gather", ["table", "ids"], ["h0"], name="model.embed_tokens/Gather")]
    constants: dict[str, Array] = {"table": weight(VOCABULARY, WIDTH, 0)}

    def linear(x: str, path: str, shape: tuple[int, int], y: str) -> onnx.NodeProto:
        constants[f"{path}.weight"] = weight(*shape, seed=len(constants))
        return node("MatMul", [x, f"{path}.weight"], [y], name=f"{path}/MatMul")

    for i in range(layers):
        at, h = f"model.layers.{i}", f"h{i}"
        nodes += [
            linear(h, f"{at}.self_attn.q_proj", (WIDTH, WIDTH), f"q{i}"),
            linear(h, f"{at}.self_attn.k_proj", (WIDTH, FEW), f"k{i}"),
            linear(h, f"{at}.self_attn.v_proj", (WIDTH, FEW), f"v{i}"),
            node("Concat", [f"k{i}", f"v{i}"], [f"kv{i}"], axis=-1),
            node("Add", [f"q{i}", f"kv{i}"], [f"mix{i}"]),
            linear(f"mix{i}", f"{at}.self_attn.o_proj", (WIDTH, WIDTH), f"o{i}"),
            node("Add", [f"o{i}", h], [f"r{i}"]),
            linear(f"r{i}", f"{at}.mlp.gate_proj", (WIDTH, HIDDEN), f"g{i}"),
            linear(f"r{i}", f"{at}.mlp.up_proj", (WIDTH, HIDDEN), f"u{i}"),
            node("Sigmoid", [f"g{i}"], [f"s{i}"]),
            node("Mul", [f"s{i}", f"u{i}"], [f"m{i}"]),
            linear(f"m{i}", f"{at}.mlp.down_proj", (HIDDEN, WIDTH), f"d{i}"),
            node("Add", [f"d{i}", f"r{i}"], [f"h{i + 1}"]),
        ]
    nodes += [
        node("Transpose", ["table"], ["table_t"], perm=[1, 0]),
        node("MatMul", [f"h{layers}", "table_t"], ["logits"], name="lm_head/MatMul"),
        node("MatMul", ["stack", f"h{layers}"], ["odd"], name="probe/MatMul"),
    ]
    constants["stack"] = normal(3, 5, 7)
    return model(nodes, {"ids": (("batch", 7), np.int64)}, ["logits", "odd"], constants)


def weight(K: int, N: int, seed: int) -> Array:
    """Singular values that fall like 0.8^i: exact enough in float64 that no error lies near where its printing rounds."""
    rng = np.random.default_rng((seed, K, N))
    k = min(K, N)
    u, _ = np.linalg.qr(rng.standard_normal((K, k)))
    v, _ = np.linalg.qr(rng.standard_normal((N, k)))
    return ((u * 0.8 ** np.arange(k)) @ v.T).astype(np.float32)


def plan(cache: Path, predicted: bool = False, **budget: object) -> Plan:
    """predicted: as if it were known that later layers move the outputs more."""
    finding = find(decoder())
    problem = prepare(
        finding,
        ModelWeights(Cache(cache), 18),
        None,
        (factorization("svd-plain"),),
        Budget(**budget),
        target="ort-cpu",  # type: ignore[arg-type]
    )
    if predicted:
        curves = [
            replace(c, candidates=tuple(replace(x, movement=x.error**2 * (i + 1)) for x in c.candidates))
            for i, c in enumerate(problem.curves)
        ]
        problem = replace(problem, curves=tuple(curves))
    return choose(problem)


PLANS = {
    "keep_0.5_predicted": {"keep": 0.5, "predicted": True},
    "keep_0.5": {"keep": 0.5},
    "rank_full": {"rank": "full"},
    "energy_0.9": {"energy": 0.9},
    "rank_4": {"rank": 4},
}


@pytest.mark.parametrize("name", PLANS)
def test_plans(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    printed = str(plan(tmp_path, **PLANS[name])) + "\n"
    path = FOLDER / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(printed)
    assert path.is_file(), "run pytest tests/golden --update-golden, and read what it wrote"
    assert printed == path.read_text()


def test_no_text_without_a_test() -> None:
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(PLANS)
