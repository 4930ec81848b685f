"""Of calibrate: what the data showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `lrcompile --help` does not import it
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Reaction:
    """How the model's outputs react to an error E (K, N) of a site's weight: they move by about tr(E^T C' E output).

    C' (`InputStatistics.weighing`) is the second moment of the input, of which `share` is replaced by `input` (K, K), of trace one:
    what the errors of a whole sequence, which add up, see of it. output: (N, N).
    """

    input: Array
    output: Array
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class InputStatistics:
    """What the calibration data showed at a site's input.

    count: rows seen. second: (K, K) float64, mean of x x^T; mean: (K,) float64 (linear sites). Of a Conv a row is what its window sees
    at one position; with groups each has its own, (g, K, K) and (g, K).
    low, high: (K,) the least and the largest number of each channel; None where they were not watched.
    frequencies: (V,) float64, the share of lookups that asked for each row (lookup sites).
    cross, dense_mean: of live statistics, where x is what the compressed part gives and z the dense model's input, (K, K), mean of
    x z^T, shrunk as `second` is, and (K,), mean of z. reaction: of the model's outputs, None where that is not known.
    shrinkage: a in [0, 1]; second is (1 - a) times what was measured plus a times its mean eigenvalue on the diagonal,
    and frequencies likewise lean towards 1 / V, at least by the share of ids that was seen once, so that few samples make no direction free.
    """

    count: int
    second: Array | None = None
    mean: Array | None = None
    frequencies: Array | None = None
    shrinkage: float = 0.0
    cross: Array | None = None
    dense_mean: Array | None = None
    reaction: Reaction | None = None
    low: Array | None = None
    high: Array | None = None

    def weighing(self, centred: bool) -> Array:
        """(K, K): by which an error of the weight is weighed on its input side, as the outputs would."""
        assert self.second is not None
        moment = self.centred if centred else self.second
        if self.reaction is None or not self.reaction.share:
            return moment
        share, spread = self.reaction.share, float(moment.trace())
        return (1.0 - share) * moment + share * spread * self.reaction.input

    @property
    def centred(self) -> Array:
        """(K, K), the covariance, shrunk alike: what is left of `second` once a bias absorbs the mean."""
        assert self.second is not None and self.mean is not None
        return self.second - (1.0 - self.shrinkage) * self.mean[..., :, None] * self.mean[..., None, :]
