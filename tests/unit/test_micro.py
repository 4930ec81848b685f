"""Micro-graphs: they are the form that a plan would get, nothing more, and compute what its factors say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from lrcompile.micro import copies_of, feed_of, micro
from lrcompile.registry import factorization
from lrcompile.timing import Form
from tests.graphs import FLOAT32, run

DENSE = Form("dense", "linear", 24, (16,), None, "float")
PAIR = Form("svd", "linear", 24, (16,), 5, "float")
FORMS = {
    "dense": DENSE,
    "pair": PAIR,
    "pair in float16": replace(PAIR, dtype="float16"),
    "several": replace(PAIR, widths=(16, 8, 8)),
    "table": replace(PAIR, kind="lookup"),
    "head": replace(PAIR, transposed=True),
    "pivoted": replace(PAIR, method="pivoted"),
    "int8": replace(DENSE, storage="int8"),
    "4 bits in groups": replace(DENSE, storage="uint4"),
    "2 bits": replace(DENSE, storage="uint2"),
    "table in 4 bits": replace(DENSE, kind="lookup", K=16, widths=(32,), storage="uint4s16"),
    "rounded input": replace(DENSE, storage="int8", activations="int8"),
    "folded": replace(PAIR, method="pivoted", permutes="out"),
}


def made(form: Form, copies: int = 2) -> ir.Model:
    return micro(form, copies, factorization(form.method), (), 18, 0)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_every_copy_comes_out(name: str) -> None:
    form = FORMS[name]
    outputs = run(made(form), feed_of(form, 2, 7, 0))
    for copy in range(2):
        for index, N in enumerate(form.widths):
            assert outputs[f"y.{copy}.{index}"].shape == (1, N)
    assert all(np.isfinite(y.astype(np.float64)).all() and np.abs(y).max() > 0 for y in outputs.values())
    assert not np.array_equal(outputs["y.0.0"], outputs["y.1.0"])  # weights and inputs of its own


def test_the_nodes_are_those_of_the_form() -> None:
    assert operators(made(DENSE))["MatMul"] == 2
    assert operators(made(PAIR))["MatMul"] == 4
    assert operators(made(FORMS["several"]))["MatMul"] == 2 * (1 + 3)  # the first factor is shared
    plain, folded = operators(made(FORMS["pivoted"])), operators(made(FORMS["folded"]))
    assert plain["Concat"] == folded["Concat"] == 2
    assert plain["Gather"] - folded["Gather"] == 2  # the permutation of each copy


def test_codes_and_rounded_inputs_are_in_the_graph() -> None:
    assert operators(made(FORMS["4 bits in groups"]))["DequantizeLinear"] == 2
    rounded = operators(made(FORMS["rounded input"]))
    assert rounded["DynamicQuantizeLinear"] == rounded["MatMulInteger"] == 2 and rounded["MatMul"] == 0


def test_it_computes_the_product_of_its_factors() -> None:
    model = made(PAIR, 1)
    feed = feed_of(PAIR, 1, 3, 0)
    a, b = (
        v.const_value.numpy() for v in sorted(model.graph.initializers.values(), key=lambda v: v.name or "")
    )
    np.testing.assert_allclose(
        run(model, feed)["y.0.0"], (feed["x.0"] @ a @ b)[:1], atol=FLOAT32, rtol=FLOAT32
    )


def test_copies_fill_more_than_a_cache_and_no_more_than_memory() -> None:
    assert copies_of(DENSE, 1) == 16
    assert copies_of(Form("dense", "linear", 4096, (16384,), None, "float"), 1) == 1
    assert copies_of(Form("dense", "linear", 1024, (1024,), None, "float"), 1) == 16
    assert (
        copies_of(Form("dense", "linear", 1 << 16, (1,), None, "float16"), 1 << 12) == 2
    )  # inputs of 0.5 GB each
    assert copies_of(Form("dense", "linear", 1024, (1024,), None, "float"), 1 << 12) == 2  # 8.6 GFLOP each


def test_feeds_have_the_rows_that_were_asked_for() -> None:
    assert feed_of(PAIR, 1, 9, 0)["x.0"].shape == (9, 24)
    ids = feed_of(FORMS["table"], 1, 9, 0)["x.0"]
    assert ids.shape == (9,) and ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < 24
