"""Carrier: values from frontier to frontier in files, of every type; what is no longer needed is gone; nothing stale is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from lrcompile.carrier import Carrier, read_all
from lrcompile.feeds import Feeds, inputs_of, open_feeds
from tests.graphs import Array, OneProcess, kind_of, model, node, normal, run

K = 5


def carrier(made: ir.Model, data: list[dict[str, Array]], folder: Path, child: Any = None) -> Carrier:
    feeds = open_feeds(data, inputs_of(made))
    return Carrier(feeds, child or OneProcess(), "reference", folder / "carried")


def held(c: Carrier, index: int) -> dict[str, Array]:
    return {n: np.array(a) for n, a in read_all(c.files(index, c.types)).items()}


def chain() -> ir.Model:
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="one"),
        node("Tanh", ["a"], ["b"]),
        node("MatMul", ["b", "w2"], ["c"], name="two"),
        node("Add", ["c", "b"], ["d"]),
        node("MatMul", ["d", "w3"], ["y"], name="three"),
    ]
    return model(nodes, {"x": ("n", K)}, ["y"], {f"w{i}": normal(K, K, seed=i) for i in (1, 2, 3)})


DATA = [{"x": normal(3, K, seed=i)} for i in range(3)]


def inner(made: ir.Model, names: list[str], feed: Mapping[str, Array]) -> dict[str, Array]:
    copy = made.clone()
    by_name = {v.name: v for n in copy.graph for v in n.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(by_name[n] for n in names)
    return run(copy, feed)


def test_from_frontier_to_frontier(tmp_path: Path) -> None:
    made, child = chain(), OneProcess()
    c = carrier(made, DATA, tmp_path, child)
    for frontier in (["b"], ["b", "c"], ["d"], ["y"]):
        c.advance(made, frontier)
        assert set(c.types) == set(frontier)
        for index, feed in enumerate(DATA):
            wanted = inner(made, frontier, feed)
            for name, array in held(c, index).items():
                np.testing.assert_array_equal(array, wanted[name])
        assert len(list((tmp_path / "carried").iterdir())) == len(frontier) * len(
            DATA
        )  # files of the others are gone
    assert child.calls.count("lrcompile.carrier:run_part") == 4 * len(DATA)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    made, child = chain(), OneProcess()
    c = carrier(made, DATA, tmp_path, child)
    c.advance(made, ["b", "c"])
    before = list(child.calls)
    c.advance(made, ["b"])
    c.compute(made, ["b"])
    assert child.calls == before and set(c.types) == {"b"}


def test_values_beside_the_frontier_are_not_trusted_later(tmp_path: Path) -> None:
    """`compute` looks ahead with weights that may change before the next frontier is reached."""
    made = chain()
    c = carrier(made, DATA, tmp_path)
    c.advance(made, ["b"])
    c.compute(made, ["c"])
    assert set(c.types) == {"b", "c"}
    changed = made.clone()
    changed.graph.initializers["w2"].const_value = ir.tensor(normal(K, K, seed=9))
    c.advance(changed, ["d"])
    for index, feed in enumerate(DATA):
        b = inner(made, ["b"], feed)["b"]
        np.testing.assert_allclose(held(c, index)["d"], b @ normal(K, K, seed=9) + b, rtol=1e-6, atol=1e-6)
    assert set(c.types) == {"d"}


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int64, np.int32, np.bool_, np.uint8]
)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 4)])
def test_types_and_shapes(dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Values go through files bit by bit: scalars and empty ones too."""
    nodes = [node("Identity", ["x"], ["a"]), node("Identity", ["a"], ["b"]), node("Identity", ["b"], ["y"])]
    made = model(nodes, {"x": (shape, dtype)}, {"y": dtype})
    x = (np.random.default_rng(0).standard_normal(shape) * 3).astype(dtype)
    c = carrier(made, [{"x": np.asarray(x)}], tmp_path)
    c.advance(made, ["a"])
    c.advance(made, ["b"])
    array = held(c, 0)["b"]
    assert array.dtype == np.dtype(dtype) and array.shape == shape
    assert array.tobytes() == np.asarray(x).tobytes()


def test_mixed_types_in_one_frontier(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        node("Cast", ["x"], ["g"], to=kind_of(ml_dtypes.bfloat16)),
        node("Greater", ["x", "zero"], ["m"]),
        node("Shape", ["x"], ["s"]),
        node("Cast", ["h"], ["hf"], to=TensorProto.FLOAT),
        node("Cast", ["g"], ["gf"], to=TensorProto.FLOAT),
        node("Where", ["m", "hf", "gf"], ["p"]),
        node("Reshape", ["p", "s"], ["y"]),
    ]
    made = model(nodes, {"x": ("n", K)}, ["y"], {"zero": np.float32(0)})
    c = carrier(made, DATA, tmp_path)
    c.advance(made, ["h", "g", "m", "s"])
    assert c.types == {"h": "float16", "g": "bfloat16", "m": "bool", "s": "int64"}
    c.advance(made, ["y"])
    for index, feed in enumerate(DATA):
        np.testing.assert_array_equal(held(c, index)["y"], run(made, feed)["y"])


def test_feeds_are_read_one_at_a_time(tmp_path: Path) -> None:
    """No more than one feed and what is made of it is alive at a time."""
    import weakref

    alive: list[Any] = []
    most = [0]

    class Marked(np.ndarray):
        pass

    def opened() -> Any:
        for i in range(6):
            array = normal(3, K, seed=i).view(Marked)
            alive.append(weakref.ref(array))
            most[0] = max(most[0], sum(r() is not None for r in alive))
            yield {"x": array}
            del array

    made = chain()
    c = Carrier(Feeds(opened, 6, "k", "test"), OneProcess(), "reference", tmp_path / "carried")  # type: ignore[arg-type]
    c.advance(made, ["b"])
    c.advance(made, ["d"])
    assert most[0] <= 2 and len(list((tmp_path / "carried").iterdir())) == 6
