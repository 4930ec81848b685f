"""Feeds: how files are cut, what is refused and in which words, the held-out quarter, keys; and inputs drawn from the graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from lrcompile.errors import UsageError
from lrcompile.feeds import STYLES, Feeds, Input, Style, calibration_and_held_out, draw, inputs_of, open_feeds
from tests.graphs import Array, model, node, normal, run

X = Input("x", np.dtype(np.float32), ("batch", 3))
IDS = Input("ids", np.dtype(np.int64), ("batch", "sequence"))


def rows(n: int) -> Array:
    return np.arange(3 * n, dtype=np.float32).reshape(n, 3)


def saved(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)
    return path


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "batch", "sizes"), [(16, 8, [8, 8]), (20, 8, [8, 8, 4]), (3, 8, [3]), (4, 1, [1, 1, 1, 1])]
)
def test_arrays_are_cut_along_axis_0(tmp_path: Path, n: int, batch: int, sizes: list[int]) -> None:
    feeds = open_feeds(saved(tmp_path / "d.npz", x=rows(n)), [X], batch)
    assert [len(f["x"]) for f in feeds] == sizes and len(feeds) == len(sizes)
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), rows(n))
    assert feeds.origin == "d.npz"


def test_a_fixed_batch_is_kept_to(tmp_path: Path) -> None:
    """The model reads two rows at a time: what is left over is no feed."""
    fixed = Input("x", np.dtype(np.float32), (2, 3))
    feeds = open_feeds(saved(tmp_path / "d.npz", x=rows(5)), [fixed], 8)
    assert [f["x"].tolist() for f in feeds] == [rows(5)[:2].tolist(), rows(5)[2:4].tolist()]


def test_one_axis_more_is_a_feed_an_entry(tmp_path: Path) -> None:
    x, ids = normal(4, 2, 3), np.ones((4, 2, 7), np.int64)
    feeds = list(open_feeds(saved(tmp_path / "d.npz", x=x, ids=ids), [X, IDS]))
    assert len(feeds) == 4
    for i, feed in enumerate(feeds):
        np.testing.assert_array_equal(feed["x"], x[i])
        assert feed["ids"].shape == (2, 7)


def test_a_scalar_makes_the_file_one_feed(tmp_path: Path) -> None:
    scalar = Input("s", np.dtype(np.float32), ())
    feeds = list(open_feeds(saved(tmp_path / "d.npz", x=rows(20), s=np.float32(2)), [X, scalar]))
    assert [f["x"].shape for f in feeds] == [(20, 3)]


def test_a_folder_is_a_feed_a_file_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "calib"
    folder.mkdir()
    for i in (2, 0, 1):
        saved(folder / f"{i:03}.npz", x=rows(2) + i)
    (folder / "readme.txt").write_text("not data")
    feeds = open_feeds(folder, [X], 1)
    assert [f["x"][0, 0] for f in feeds] == [0, 1, 2] and feeds.origin == "calib/"


def test_a_function_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.py"
    path.write_text(
        "import numpy as np\n"
        "def load_data():\n    for i in range(3): yield {'x': np.full((2, 3), i, np.float32)}\n"
        "def other():\n    return [{'x': np.zeros((1, 3), np.float32)}]\n"
    )
    feeds = open_feeds(path, [X])
    assert [f["x"][0, 0] for f in feeds] == [0, 1, 2]
    assert [f["x"][0, 0] for f in feeds] == [0, 1, 2]  # and again: it is called anew
    assert len(open_feeds(f"{path}:other", [X])) == 1


def test_feeds_in_memory() -> None:
    data = [{"x": rows(2)}, {"x": rows(1)}]
    assert len(open_feeds(data, [X])) == 2
    assert len(open_feeds(iter(data), [X])) == 2
    feeds = open_feeds(lambda: iter(data), [X])
    assert [len(list(feeds)) for _ in range(2)] == [2, 2]


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "d.npz holds no array"),
        ({"y": rows(2)}, "input 'x' is missing; the model reads x"),
        ({"x": rows(2), "z": rows(2)}, "the model has no input 'z'; it reads x"),
        ({"x": rows(2).astype(np.float64)}, "input 'x' is float64, the model reads float32"),
        ({"x": rows(2).astype(np.int64)}, "input 'x' is int64, the model reads float32"),
        ({"x": normal(2, 4)}, r"input 'x' has shape \(2, 4\), the model reads \('batch', 3\)"),
        ({"x": normal(3)}, r"input 'x' has shape \(3,\), the model reads"),
        ({"x": normal(2, 2, 2, 3)}, r"input 'x' has shape \(2, 2, 2, 3\)"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, arrays: dict[str, Array], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_feeds(saved(tmp_path / "d.npz", **arrays), [X])


def test_a_narrower_type_is_widened(tmp_path: Path) -> None:
    (feed,) = open_feeds(saved(tmp_path / "d.npz", x=rows(2).astype(np.float16)), [X])
    assert feed["x"].dtype == np.float32
    (feed,) = open_feeds([{"ids": np.ones((1, 2), np.int32)}], [IDS])
    assert feed["ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": rows(4), "ids": np.ones((3, 2), np.int64)}, r"differ along axis 0: \[3, 4\]"),
        (
            {"x": normal(4, 2, 3), "ids": np.ones((3, 2, 2), np.int64)},
            r"different numbers of feeds: \[3, 4\]",
        ),
        (
            {"x": normal(4, 2, 3), "ids": np.ones((4, 2), np.int64)},
            "x has one axis more than its input, other arrays have not",
        ),
    ],
)
def test_arrays_that_do_not_agree(tmp_path: Path, arrays: dict[str, Array], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_feeds(saved(tmp_path / "d.npz", **arrays), [X, IDS])


def test_which_feed_is_wrong() -> None:
    with pytest.raises(UsageError, match="the given feeds, feed 1: input 'x' has shape"):
        open_feeds([{"x": rows(2)}, {"x": normal(2, 2)}], [X])


@pytest.mark.parametrize("name", ["missing.npz", "d.txt", "empty"])
def test_paths_that_hold_no_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.txt").write_text("1 2 3")
    with pytest.raises(UsageError, match=name):
        open_feeds(tmp_path / name, [X])


def test_no_feed_at_all() -> None:
    with pytest.raises(UsageError, match="the given feeds holds no feed"):
        open_feeds([], [X])


def test_zero_size_arrays_are_legal() -> None:
    cache = Input("past", np.dtype(np.float32), ("batch", 2, "past", 4))
    (feed,) = open_feeds([{"past": np.zeros((1, 2, 0, 4), np.float32)}], [cache])
    assert feed["past"].shape == (1, 2, 0, 4)


# --- held out, keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "held"), [(2, 1), (3, 1), (4, 1), (7, 1), (8, 2), (16, 4), (17, 4)])
def test_the_last_quarter_is_held_out(n: int, held: int) -> None:
    data = [{"x": np.full((1, 3), i, np.float32)} for i in range(n)]
    first, last = calibration_and_held_out(data, None, [X], 8)
    assert first is not None and last is not None
    seen = [[f["x"][0, 0] for f in part] for part in (first, last)]
    assert seen == [list(range(n - held)), list(range(n - held, n))]
    assert (len(first), len(last)) == (n - held, held)
    assert first.key != last.key and last.origin == "last quarter of the given feeds"
    if len(first) > 1:  # a part of a part is still within it
        assert [f["x"][0, 0] for f in first.split()[1]] == list(range(n - held))[-len(first.split()[1]) :]


def test_one_feed_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="has one feed: give --verify-data"):
        calibration_and_held_out([{"x": rows(1)}], None, [X], 8)


def test_data_of_ones_own_to_verify_on() -> None:
    first, last = calibration_and_held_out([{"x": rows(1)}], [{"x": rows(2)}], [X], 8)
    assert first is not None and last is not None and (len(first), len(last)) == (1, 1)
    assert calibration_and_held_out(None, None, [X], 8) == (None, None)
    first, last = calibration_and_held_out(None, [{"x": rows(2)}], [X], 8)
    assert first is None and last is not None


def test_keys_are_of_the_contents(tmp_path: Path) -> None:
    def key(*arrays: Array) -> str:
        return open_feeds([{"x": a} for a in arrays], [X]).key

    one = key(rows(4))
    assert key(rows(4).copy()) == one
    assert key(rows(4) + 1) != one
    assert key(rows(2), rows(4)[2:]) != one  # the same numbers, cut elsewhere
    assert open_feeds(saved(tmp_path / "a.npz", x=rows(4)), [X]).key == one  # wherever it lies
    strings = Input("s", np.dtype(object), ("n",))
    keys = {
        open_feeds([{"s": np.array(v, object)}], [strings]).key for v in (["a", "b"], ["ab", ""], ["a", "b "])
    }
    assert len(keys) == 3


# --- drawn --------------------------------------------------------------------------------------------------------


def decoder() -> ir.Model:
    """Two tables of other sizes on one input, masks, positions, a cache, and a bool."""
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"]),
        node("Cast", ["input_ids"], ["narrow"], to=6),
        node("Gather", ["small", "narrow"], ["f"]),
        node("Gather", ["positions", "position_ids"], ["p"]),
        node("Identity", ["attention_mask"], ["m"]),
        node("Identity", ["past_key"], ["k"]),
        node("Identity", ["flag"], ["b"]),
        node("Identity", ["steps"], ["n"]),
        node("Identity", ["fixed"], ["o"]),
    ]
    inputs: dict[str, Any] = {
        "attention_mask": (("batch", "past + sequence"), np.int64), "input_ids": (("batch", "sequence"), np.int64),
        "position_ids": (("batch", "sequence"), np.int64), "past_key": ("batch", 2, "past", 4), "flag": ((), np.bool_),
        "steps": ((1,), np.int64), "fixed": (3, None, 5),
    }  # fmt: skip
    outputs = {
        "e": np.float32,
        "f": np.float32,
        "p": np.float32,
        "m": np.int64,
        "k": np.float32,
        "b": np.bool_,
        "n": np.int64,
        "o": np.float32,
    }
    return model(
        nodes, inputs, outputs, {"table": normal(50, 3), "small": normal(7, 3), "positions": normal(6, 3)}
    )


def one(
    style: Style = STYLES[0], seed: int = 0, dims: Mapping[str, int] | None = None, like: Any = None
) -> dict[str, Array]:
    return dict(next(iter(draw(decoder(), style, seed, 1, dims or {}, like))))


def test_drawn_feeds_are_legal() -> None:
    feeds = draw(decoder(), STYLES[0], 0, 20, {})
    assert len(feeds) == 20
    for feed in feeds:
        assert run(decoder(), feed)["e"].shape == (2, 8, 3)
        ids = feed["input_ids"]
        assert (
            ids.shape == (2, 8) and ids.min() >= 0 and ids.max() < 7
        )  # the smaller table binds, through the Cast
        assert feed["past_key"].shape == (2, 2, 0, 4)
        assert feed["attention_mask"].shape == (2, 8) and (feed["attention_mask"] == 1).all()
        assert feed["position_ids"].max() < 6 and feed["position_ids"][0, :3].tolist() == [0, 1, 2]
        assert feed["fixed"].shape == (3, 8, 5) and feed["flag"].dtype == np.bool_
        assert {a.dtype for n, a in feed.items() if n in ("past_key", "fixed")} == {np.dtype(np.float32)}
    assert max(int(f["input_ids"].max()) for f in feeds) == 6  # and all of it is used


def test_dims_are_used() -> None:
    feed = one(dims={"batch": 5, "sequence": 3, "past": 4})
    assert feed["input_ids"].shape == (5, 3) and feed["past_key"].shape == (5, 2, 4, 4)
    assert feed["attention_mask"].shape == (5, 7)  # "past + sequence"
    assert one(dims={"past + sequence": 9})["attention_mask"].shape == (2, 9)


def test_seeds() -> None:
    a, b, c = one(seed=1), one(seed=1), one(seed=2)
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert not np.array_equal(a["fixed"], c["fixed"])
    first, second = draw(decoder(), STYLES[0], 1, 2, {})
    assert not np.array_equal(first["fixed"], second["fixed"])
    assert draw(decoder(), STYLES[0], 1, 2, {}).key != draw(decoder(), STYLES[0], 2, 2, {}).key


def test_integers_without_a_bound() -> None:
    like = {**one(seed=77), "steps": np.array([41])}
    for style in STYLES:
        if style.needs_data and style.integers != "copy":
            continue
        steps = one(style, like=like)["steps"]
        assert {"copy": steps == 41, "ones": steps == 1, "zeros": steps == 0, "random": 0 <= steps < 3}[
            style.integers
        ]


def test_nothing_else_of_the_users_data_is_copied() -> None:
    """Only shapes, and integers that steer: floats and ids are drawn."""
    like = one(dims={"batch": 3, "sequence": 5, "past": 2}, seed=77)
    feed = one(Style(None, None, "copy"), like=like)
    assert all(feed[n].shape == like[n].shape for n in feed)
    for name in ("past_key", "fixed", "input_ids"):
        assert not np.array_equal(feed[name], like[name]), name


def test_inputs_of() -> None:
    made = model(
        [node("MatMul", ["x", "w"], ["y"])], {"x": (("n", None, 2), np.float64)}, {"y": np.float64}, {"w": normal(2, 2, dtype=np.float64)},
        defaults=["w"],
    )  # fmt: skip
    assert inputs_of(made) == (Input("x", np.dtype(np.float64), ("n", None, 2)),)  # a default need not be fed
    bf16 = model(
        [node("Identity", ["x"], ["y"])], {"x": ((1,), ml_dtypes.bfloat16)}, {"y": ml_dtypes.bfloat16}
    )
    (given,) = inputs_of(bf16)
    assert given.dtype == ml_dtypes.bfloat16
    feed = next(iter(draw(bf16, STYLES[0], 0, 1, {})))
    assert feed["x"].dtype == ml_dtypes.bfloat16


def test_strings_are_drawn() -> None:
    text = model([node("Identity", ["s"], ["y"])], {"s": (("n",), object)}, {"y": object})
    assert next(iter(draw(text, STYLES[0], 0, 1, {})))["s"].tolist() == ["text", "text"]


def test_feeds_can_be_read_again() -> None:
    feeds: Feeds = draw(decoder(), STYLES[0], 0, 3, {})
    first, second = ([f["fixed"][0, 0, 0] for f in feeds] for _ in range(2))
    assert first == second and len(first) == 3
