"""Coded matrices in ONNX compute what the codes mean, and stay small in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from lrcompile.encoding import OPSET, decode, decode_rows, parts_of, size_of
from lrcompile.graph import Builder
from lrcompile.interfaces import Array
from lrcompile.quantize import Coded, searched, storage
from lrcompile.quantize.formats import round_scales
from lrcompile.unpacking import coded_of

LINEAR = (
    "int8", "int8-32", "int4", "int4-64", "int4-128s32", "uint4", "uint4-32s16", "uint4-16", "int3", "uint3", "uint3-64", "int2",
    "uint2", "uint2-16", "ternary", "sign", "float8",
)  # fmt: skip
# all that `--storage` takes there, and groups of their own
ON_CPU = (
    "int8", "int4", "int4-64", "int4-128s32", "int4-32s32+", "uint4", "uint4-16s16", "int3", "uint3", "uint3-64", "int2", "uint2",
    "quarters", "sign", "ternary",
)  # fmt: skip
TABLES = ("int8", "int4s16", "uint4-32s16", "int4-16s32")


def model_of(coded: Coded, *, lookup: bool, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """x @ W, or W[ids] of a table whose transpose is coded."""
    K, N = coded.codes.shape
    op, given, held = Builder("g"), {}, []
    for suffix, part in parts_of(coded, by_row=lookup).items():
        tensor = ir.Tensor(
            np.ascontiguousarray(part.array).reshape(part.array.shape), dtype=part.dtype, name=f"w.{suffix}"
        )
        given[suffix] = ir.Value(
            name=f"w.{suffix}",
            type=ir.TensorType(part.dtype),
            shape=ir.Shape(part.array.shape),
            const_value=tensor,
        )
        held.append(given[suffix])
    if lookup:
        x = ir.val("x", ir.DataType.INT64, ir.Shape(["rows", 2]))
        y = decode_rows(op, given, coded.storage, (N, K), x, dtype, "w")
    else:
        x = ir.val("x", dtype, ir.Shape(["rows", K]))
        y = op("MatMul", x, decode(op, given, coded.storage, (K, N), dtype, "w"))
    y.type, y.shape = ir.TensorType(dtype), ir.Shape([None] * (3 if lookup else 2))
    graph = ir.Graph([x], [y], nodes=op.nodes, initializers=held, opset_imports={"": OPSET}, name="g")
    return ir.Model(graph, ir_version=10)


def tensors_of(coded: Coded, *, by_row: bool) -> dict[str, ir.Tensor]:
    parts = parts_of(coded, by_row=by_row)
    return {
        n: ir.Tensor(np.ascontiguousarray(p.array).reshape(p.array.shape), dtype=p.dtype)
        for n, p in parts.items()
    }


@pytest.mark.parametrize("name", LINEAR)
@given(K=st.integers(1, 70), N=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=6, deadline=None)
def test_codes_are_read_back(name: str, K: int, N: int, seed: int) -> None:
    coded = searched(weight(K, N, seed), storage(name))
    found = coded_of(tensors_of(coded, by_row=False), coded.storage, (K, N))
    assert found is not None
    np.testing.assert_array_equal(found.codes, coded.codes)
    np.testing.assert_array_equal(found.values, coded.values)


@pytest.mark.parametrize("name", TABLES)
def test_codes_of_tables_are_read_back(name: str) -> None:
    coded = searched(weight(64, 20), storage(name))
    found = coded_of(tensors_of(coded, by_row=True), coded.storage, (64, 20), by_row=True)
    assert found is not None
    np.testing.assert_array_equal(found.values, coded.values)


def joint(K: int = 30, N: int = 4) -> Coded:
    """Two matrices with one code."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (K, N)).astype(np.int16)
    scales, levels = rng.uniform(1, 2, (1, N)), rng.standard_normal((16, 2))
    return Coded(
        storage("pairs4"), codes, round_scales(scales, "float32"), None, round_scales(levels, "float32")
    )


def test_common_codes_are_decoded_and_read_back() -> None:
    coded = joint()
    assert coded.values.shape == (30, 4, 2)
    np.testing.assert_array_equal(coded.values[3, 1], coded.levels[coded.codes[3, 1]] * coded.scales[0, 1])
    held = tensors_of(coded, by_row=False)
    found = coded_of(held, coded.storage, (30, 4, 2))
    assert found is not None
    np.testing.assert_array_equal(found.values, coded.values)
    assert sum(t.size * t.dtype.bitwidth for t in held.values()) == coded.bits
    op, given = (
        Builder("g"),
        {n: ir.Value(name=f"w.{n}", const_value=t, type=ir.TensorType(t.dtype)) for n, t in held.items()},
    )
    y = decode(op, given, coded.storage, (30, 4, 2), ir.DataType.FLOAT, "w")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([30, 4, 2])
    graph = ir.Graph(
        [], [y], nodes=op.nodes, initializers=list(given.values()), opset_imports={"": OPSET}, name="g"
    )
    np.testing.assert_allclose(
        session_of(ir.Model(graph, ir_version=10)).run(None, {})[0], coded.values, rtol=1e-6
    )


@pytest.mark.parametrize("name", ("int8", "int4", "uint4", "uint3", "int2", "sign"))
def test_every_constant_counts_in_what_is_read_back(name: str) -> None:
    """Negative control: a code, a scale, a zero point that is another one, and constants of another form."""
    coded = searched(weight(64, 8), storage(name))
    held = tensors_of(coded, by_row=False)
    for part, tensor in held.items():
        array = tensor.numpy().copy()
        array.reshape(-1).view(np.uint8)[-1] ^= 1
        found = coded_of({**held, part: ir.Tensor(array, dtype=tensor.dtype)}, coded.storage, (64, 8))
        assert found is not None and not np.array_equal(found.values, coded.values), part
        assert coded_of({n: t for n, t in held.items() if n != part}, coded.storage, (64, 8)) is None
    assert coded_of(held, storage("int4-16"), (64, 8)) is None


def session_of(model: ir.Model, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def weight(K: int, N: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((K, N))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shape", ((64, 48), (50, 7), (33, 1), (1, 5), (130, 6)))
def test_products(name: str, shape: tuple[int, int]) -> None:
    """Whole groups and not, one column, one row."""
    coded = searched(weight(*shape), storage(name))
    X = np.random.default_rng(1).standard_normal((3, shape[0])).astype(np.float32)
    (y,) = session_of(model_of(coded, lookup=False)).run(None, {"x": X})
    np.testing.assert_allclose(y, X.astype(np.float64) @ coded.values, atol=1e-4)  # sums of 130 in float32


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_tables(name: str) -> None:
    coded = searched(weight(64, 20), storage(name))
    ids = np.array([[0, 19], [-1, 7], [3, 3]])
    (y,) = session_of(model_of(coded, lookup=True)).run(None, {"x": ids})
    np.testing.assert_allclose(y, coded.values.T[ids], atol=1e-6)


@pytest.mark.parametrize("dtype", (ir.DataType.FLOAT16, ir.DataType.DOUBLE))
def test_other_computing_types(dtype: ir.DataType) -> None:
    coded = searched(weight(64, 8), storage("uint4"))
    X = np.random.default_rng(1).standard_normal((3, 64)).astype(dtype.numpy())
    (y,) = session_of(model_of(coded, lookup=False, dtype=dtype)).run(None, {"x": X})
    np.testing.assert_allclose(
        y, X.astype(np.float64) @ coded.values, atol=0.1 if dtype == ir.DataType.FLOAT16 else 1e-5
    )


@pytest.mark.parametrize(
    ("name", "lookup"), [*((n, False) for n in (*LINEAR, *TABLES)), *((n, True) for n in TABLES)]
)
@pytest.mark.parametrize("shape", ((96, 32), (32, 1), (160, 3)))
def test_the_file_holds_the_bits_that_are_counted(name: str, lookup: bool, shape: tuple[int, int]) -> None:
    coded = searched(weight(*shape), storage(name))
    model = model_of(coded, lookup=lookup)
    held = sum(
        v.const_value.size * v.const_value.dtype.bitwidth
        for v in model.graph.initializers.values()
        if v.const_value
    )
    assert held == size_of(coded.storage, *shape, by_row=lookup)
    # what is told of a type is the least that it could be: no bytes are filled up, and zero points are as wide as codes
    assert coded.bits <= held


@pytest.mark.parametrize("name", [n for n in LINEAR if not n.startswith("float8")])
@pytest.mark.parametrize("shape", ((50, 7), (33, 1), (1, 5)))
def test_bytes_that_are_not_full_are_counted(name: str, shape: tuple[int, int]) -> None:
    coded = searched(weight(*shape), storage(name))
    held = sum(part.array.size * part.dtype.bitwidth for part in parts_of(coded).values())
    assert held == size_of(coded.storage, *shape)


@pytest.mark.parametrize("name", ON_CPU)
def test_onnx_runtime_keeps_codes(name: str, tmp_path: Path) -> None:
    """The graph that runs multiplies by the very codes that were stored, at most 8 bits a number: 4 where there were fewer."""
    K, N = 256, 128
    coded = searched(weight(K, N), storage(name))
    session_of(model_of(coded, lookup=False), tmp_path / "optimized.onnx")
    ran = onnx.load(tmp_path / "optimized.onnx")
    assert Counter(n.op_type for n in ran.graph.node) == {"MatMulNBits": 1}
    bits = 8 if coded.storage.bits == 8 else 4
    np.testing.assert_allclose(multiplied(ran), coded.values, rtol=1e-6, atol=0)
    size = sum(numpy_helper.to_array(i).nbytes for i in ran.graph.initializer)
    scales = max(coded.scales.size, K * N // 32)  # one scale a column becomes one for 32 rows of it
    assert size <= K * N * bits // 8 + scales * (4 + bits / 8)


def multiplied(model: onnx.ModelProto) -> Array:
    """(K, N): what the one MatMulNBits of a model multiplies by, from its own constants."""
    (made,) = model.graph.node
    held = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    k, n, bits, block = (
        next(a.i for a in made.attribute if a.name == x) for x in ("K", "N", "bits", "block_size")
    )
    codes = unpacked(held[made.input[1]], bits).reshape(n, -1)[:, :k]
    scales = held[made.input[2]].reshape(n, -1)
    zeros = np.full(scales.shape, 1 << (bits - 1))
    if len(made.input) > 3 and made.input[3]:
        zeros = unpacked(held[made.input[3]].reshape(n, -1), bits)[:, : scales.shape[1]]
    spread = [np.repeat(a.astype(np.float64), block, axis=1)[:, :k] for a in (zeros, scales)]
    return ((codes - spread[0]) * spread[1]).T


def unpacked(array: Array, bits: int) -> Array:
    """Along the last axis, the lower half of a byte first."""
    if bits == 8:
        return array
    return np.stack([array & 15, array >> 4], axis=-1).reshape(*array.shape[:-1], -1)


def test_a_wrong_code_is_seen() -> None:
    """Negative control: one code off, and the product is not the one that the codes mean."""
    coded = searched(weight(64, 8), storage("uint4"))
    wrong = coded.codes.copy()
    wrong[5, 3] ^= 1
    X = np.eye(64, dtype=np.float32)
    model = model_of(replace(coded, codes=wrong), lookup=False)
    (y,) = session_of(model).run(None, {"x": X})
    assert np.abs(y - coded.values).max() > 0.01
