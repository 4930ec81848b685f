"""A row of the page, and where it is kept between runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from lrcompile.store import Cache


@dataclass(frozen=True)
class Figures:
    """What was measured of a model. bits: a number of the weights that count. same, other: mean cosine on both texts.

    weight, product: mean relative error of the weights, and of what they make of their inputs. size: bytes of the files. one, eight: the
    original's time over its own at batch 1 and 8. What was not measured is NaN.
    """

    bits: float = np.nan
    same: float = np.nan
    other: float = np.nan
    weight: float = np.nan
    product: float = np.nan
    size: float = np.nan
    one: float = np.nan
    eight: float = np.nan


@dataclass(frozen=True)
class Kept:
    """Rows by name, in the cache. key: of model and data. wanted: parts of names that are measured, whatever is kept; None: what is not kept.

    A row that is neither wanted nor kept is left out.
    """

    cache: Cache
    key: tuple[str, ...]
    wanted: tuple[str, ...] | None
    say: Callable[[str], None]

    def row(self, name: str, measure: Callable[[], Figures]) -> Figures | None:
        key = ("bits-page", *self.key, name)
        asked = self.wanted is not None and any(w in name for w in self.wanted)
        if asked:
            self.cache.path(key).unlink(missing_ok=True)
        elif self.wanted is not None and not self.cache.has(key):
            return None

        def compute() -> Mapping[str, np.ndarray]:
            made = measure()
            self.say(f"{name}: {made}")
            return {f.name: np.array([getattr(made, f.name)], np.float64) for f in fields(made)}

        return Figures(**{n: float(a[0]) for n, a in self.cache.remember(key, compute).items()})
