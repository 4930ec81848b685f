"""Which settings a benchmark runs in, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from lrcompile.errors import UsageError
from lrcompile.feeds import Input
from lrcompile.workloads import Workload, numbers, workloads_of

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
PLAIN = (Input("x", FLOAT, ("batch", 16)), Input("y", FLOAT, ("batch", None)))
DECODER = (
    Input("input_ids", INT, ("batch", "sequence")),
    Input("attention_mask", INT, ("batch", "past + sequence")),
    Input("past_key_values.0.key", FLOAT, ("batch", 2, "past", 32)),
)


def dims(*workloads: Workload) -> list[dict[str, int]]:
    return [dict(w.dims) for w in workloads]


def test_an_input_named_again_begins_another_setting() -> None:
    found = workloads_of(PLAIN, shapes=["x:2x16", "y:2x3", "x:4x16,y:[4,5]"])
    assert dims(*found) == [{"batch": 2, "y#1": 3}, {"batch": 4, "y#1": 5}]
    assert [w.name for w in found] == ["x:2x16, y:2x3", "x:4x16, y:4x5"]


def test_batches_multiply() -> None:
    assert dims(*workloads_of(PLAIN, batches=[1, 8])) == [{"batch": 1}, {"batch": 8}]
    found = workloads_of(PLAIN, shapes=["y:2x3", "y:2x5"], batches=[1, 8])
    assert dims(*found) == [{"batch": b, "y#1": n} for n in (3, 5) for b in (1, 8)]


def test_prefill_and_decode() -> None:
    found = workloads_of(DECODER, prefill=[512], decode=[512], batches=[2])
    assert dims(*found) == [
        {"batch": 2, "sequence": 512, "past": 0},
        {"batch": 2, "sequence": 1, "past": 512},
    ]
    feed = {"input_ids": np.zeros((2, 512), np.int64), "attention_mask": np.zeros((2, 512), np.int64)}
    assert found[0].count(feed) == 1024
    assert Workload("", {}).count(feed) == 2
    assert Workload("", {}, "run").count(feed) == 1


def test_a_total_length_that_is_free_by_itself() -> None:
    inputs = (DECODER[0], Input("attention_mask", INT, ("batch", "total")), DECODER[2])
    assert dims(*workloads_of(inputs, decode=[7])) == [{"batch": 1, "sequence": 1, "past": 7, "total": 8}]


@pytest.mark.parametrize(
    ("inputs", "asked", "words"),
    [
        (PLAIN, {"prefill": [4]}, "no cache"),
        ((Input("input_ids", INT, (1, 4)), DECODER[2]), {"decode": [4]}, "one length"),
        ((Input("x", FLOAT, (2, 3)),), {"batches": [4]}, "fixed length"),
        (PLAIN, {"shapes": ["x:2x17"]}, "axis 1"),
        (PLAIN, {"shapes": ["z:2"]}, "no input 'z'"),
        (PLAIN, {"shapes": ["x:2x16,y:3x1"]}, "both 2 and 3"),
        (PLAIN, {"shapes": ["x"]}, "--shape"),
    ],
)
def test_refusals(inputs: tuple[Input, ...], asked: dict[str, list[object]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        workloads_of(inputs, **asked)  # type: ignore[arg-type]


def test_numbers() -> None:
    assert numbers("batches", "1, 8") == (1, 8)
    assert numbers("batches", None) == ()
    for text in ("0", "1,,2", "-1", "x"):
        with pytest.raises(UsageError, match="--batches"):
            numbers("batches", text)
