"""What is reported of an evaluation: mean, last and best of n in-context episodes, with intervals."""

import dataclasses

import numpy as np

from ring_rl.training.statistics import Estimate, estimate
from ring_rl.typing import Float64


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


def score(returns: Float64[np.ndarray, "rows episodes"]) -> Scores:
    """Scores of the returns of n episodes in each of several rows; a row, not an episode, is a sample."""
    return Scores(estimate(returns.mean(axis=1)), estimate(returns[:, -1]), estimate(returns.max(axis=1)))
