"""Returns on a scale that tasks share: 0 is chance, 100 the best of the data."""

import dataclasses
import math

import numpy as np

from ring_rl.training.statistics import Estimate
from ring_rl.typing import Float64

__all__ = ["ReturnScale"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReturnScale:
    """score = 100 (return - random) / (best - random).

    Not the D4RL scale, whose 100 is an expert: 100 here says that an agent is as good as the best episode it was
    shown. Both ends count as known: intervals hold no doubt about them.

    Attributes:
        random: The mean return of uniformly random actions, a new one every control step.
        best: The highest return in the data.
    """

    random: float
    best: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.random) and math.isfinite(self.best)):
            raise ValueError(f"a return scale needs finite ends, got random={self.random}, best={self.best}")
        if self.best <= self.random:
            raise ValueError(
                f"the data's best return {self.best:g} is not above the random policy's {self.random:g}; there is "
                "nothing to normalise by: report raw returns (random_policy=false), or collect better data"
            )

    def scores(self, returns: Float64[np.ndarray, "*shape"] | float) -> Float64[np.ndarray, "*shape"]:
        """Normalised returns."""
        return 100.0 * (np.asarray(returns, np.float64) - self.random) / (self.best - self.random)

    def differences(self, returns: Float64[np.ndarray, "*shape"] | float) -> Float64[np.ndarray, "*shape"]:
        """Differences of returns as differences of scores."""
        return 100.0 * np.asarray(returns, np.float64) / (self.best - self.random)

    def estimate(self, returns: Estimate) -> Estimate:
        """An estimate of a mean return as one of the mean score."""
        mean, low, high = (float(self.scores(each)) for each in (returns.mean, returns.low, returns.high))
        return Estimate(mean, low, high, returns.seeds)
