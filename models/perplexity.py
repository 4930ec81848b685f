"""A metric for `--metric models/perplexity.py:perplexity`: how well a decoder guesses the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

CHUNK = 64  # rows of logits held in float64 at a time


def perplexity(
    run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    feeds: Iterable[Mapping[str, np.ndarray]],
) -> float:
    """exp of the mean of -log p(token t+1 | tokens up to t) over all feeds.

    A feed has `input_ids` (batch, sequence) and may have `attention_mask` (batch, past + sequence), whose zeros take out
    padding: a pair counts when both of its tokens are real. `run(feed)["logits"]` is (batch, sequence, vocabulary).
    Raises ValueError when no pair counts.
    """
    total, count = 0.0, 0
    for feed in feeds:
        ids = np.asarray(feed["input_ids"])
        mask = np.asarray(feed.get("attention_mask", np.ones_like(ids)))[:, -ids.shape[1] :].astype(bool)
        logits = run(feed)["logits"]
        batch, position = np.nonzero(mask[:, :-1] & mask[:, 1:])
        for start in range(0, len(batch), CHUNK):
            b, t = batch[start : start + CHUNK], position[start : start + CHUNK]
            rows = np.asarray(logits[b, t], np.float64)
            rows -= rows.max(axis=-1, keepdims=True)  # exp must not overflow
            total += float(np.sum(np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(b)), ids[b, t + 1]]))
        count += len(batch)
    if not count:
        raise ValueError("perplexity needs feeds with at least two tokens in a row")
    return float(np.exp(total / count))
