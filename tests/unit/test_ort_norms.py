"""Sums stay apart from norms on the CPU: the numbers stay what they were, and ONNX Runtime no longer makes its slower kernel of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lrcompile.interfaces import BuildOptions
from lrcompile.registry import runtime_of
from lrcompile.store import new_folder, save_model
from tests.graphs import model, node, normal

D = 32


def norm_of_a_sum() -> ir.Model:
    nodes = [
        node("Add", ["x", "bias"], ["shifted"], name="shift"),
        node("Add", ["shifted", "r"], ["sum"], name="skip"),
        node("LayerNormalization", ["sum", "gamma", "beta"], ["y"], name="norm", axis=-1, epsilon=1e-12),
        node("Add", ["y", "r"], ["z"], name="after"),
    ]
    constants = {"bias": normal(D), "gamma": normal(D), "beta": normal(D)}
    shape = ("batch", "rows", D)
    return model(nodes, {"x": shape, "r": shape}, ["y", "z"], constants)


def test_only_sums_before_a_norm_are_kept_apart(tmp_path: Path) -> None:
    (norms_apart,) = runtime_of("ort-cpu").lowering("ort-cpu")
    before, after = norm_of_a_sum(), norm_of_a_sum()
    assert norms_apart(after) == 1
    assert Counter(n.op_type for n in after.graph) == {"Add": 2, "Sum": 1, "LayerNormalization": 1}
    assert norms_apart(after) == 0  # nothing is left to do
    rng = np.random.default_rng(0)
    feed = {n: rng.standard_normal((2, 5, D)).astype(np.float32) for n in ("x", "r")}
    outputs, kinds = [], []
    for name, made in (("before", before), ("after", after)):
        path = save_model(made, new_folder(tmp_path / name))
        with runtime_of("ort-cpu").build(path, BuildOptions("ort-cpu")) as engine:
            outputs.append(engine.run(feed))
            kinds.append({key.split()[0] for key in engine.nodes()})
    assert "SkipLayerNormalization" in kinds[0]  # else this lowering has become needless
    assert "SkipLayerNormalization" not in kinds[1]
    for name in ("y", "z"):
        np.testing.assert_allclose(
            outputs[1][name], outputs[0][name], rtol=1e-5, atol=1e-5
        )  # sums in another order


def test_a_bias_before_a_norm_stays_with_its_product() -> None:
    """As a Sum it could not be taken into the product."""
    nodes = [
        node("MatMul", ["x", "w"], ["p"], name="product"),
        node("Add", ["p", "b"], ["s"], name="bias"),
        node("LayerNormalization", ["s", "gamma"], ["y"], name="norm", axis=-1),
    ]
    made = model(nodes, {"x": ("rows", D)}, ["y"], {"w": normal(D, D), "b": normal(D), "gamma": normal(D)})
    (norms_apart,) = runtime_of("ort-cpu").lowering("ort-cpu")
    assert norms_apart(made) == 0
    assert [n.op_type for n in made.graph] == ["MatMul", "Add", "LayerNormalization"]


@pytest.mark.parametrize("target", ["ort-cuda", "ort-tensorrt"])
def test_other_devices_keep_the_fused_kernel(target: str) -> None:
    assert runtime_of(target).lowering(target) == ()
