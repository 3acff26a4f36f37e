"""What is reported of an evaluation: mean, last and best of n in-context episodes, with intervals."""

import dataclasses

import numpy as np
from scipy import stats

from ring_rl.typing import Float64

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% confidence interval (Student's t; NaN bounds for a single seed)."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.mean:.0f}"
        return f"{self.mean:.0f} [{self.low:.0f}, {self.high:.0f}]"


@dataclasses.dataclass(frozen=True)
class Scores:
    """The three rules by which n episodes become one number; every agent is reported under all of them.

    Attributes:
        mean: The average episode: what to expect of the agent.
        last: The last episode, with the whole context behind it.
        best: The best of the n, which the Ring Attention paper reports. It flatters: chance alone raises it.
    """

    mean: Estimate
    last: Estimate
    best: Estimate


def estimate(values: Float64[np.ndarray, " seeds"]) -> Estimate:
    """The mean of one value a seed, mean ± t_{0.975, n-1} s / √n."""
    values = np.asarray(values, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, float("nan"), float("nan"), count)
    half_width = stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * values.std(ddof=1) / np.sqrt(count)
    return Estimate(mean, float(mean - half_width), float(mean + half_width), count)


def score(returns: Float64[np.ndarray, "rows episodes"]) -> Scores:
    """Scores of the returns of n episodes in each of several rows; a row, not an episode, is a sample."""
    return Scores(estimate(returns.mean(axis=1)), estimate(returns[:, -1]), estimate(returns.max(axis=1)))
