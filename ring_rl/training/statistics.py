"""A mean over seeds and how far it can be trusted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import stats

from ring_rl.typing import Float64

__all__ = ["CONFIDENCE", "Estimate", "estimate"]

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% confidence interval (Student's t; NaN bounds for a single seed).

    `f"{estimate:.3g}"` formats all three numbers alike: `0.137 [0.124, 0.15]`, or `0.137` where one seed has
    no interval.
    """

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return format(self, ".0f")

    def __format__(self, spec: str) -> str:
        # f"{estimate}" asks for the empty spec, not for `str`.
        spec = spec or ".0f"
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def estimate(values: Float64[np.ndarray, " seeds"]) -> Estimate:
    """The mean of one value a seed, mean ± t_{0.975, n-1} s / √n.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        raise ValueError("no values to take the mean of; give one a seed")
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, float("nan"), float("nan"), count)
    half_width = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * values.std(ddof=1) / np.sqrt(count)
    return Estimate(mean, float(mean - half_width), float(mean + half_width), count)
