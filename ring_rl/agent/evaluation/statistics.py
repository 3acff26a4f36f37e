"""What is reported of an evaluation: mean, last and best of n in-context episodes, with intervals."""

import dataclasses
from typing import Literal

import numpy as np

from ring_rl.training.statistics import Estimate, estimate
from ring_rl.typing import Float64

__all__ = ["RULES", "Rule", "SampleKind", "Scores", "episode_scores", "independent_samples", "score"]

Rule = Literal["mean", "last", "best"]
RULES: tuple[Rule, ...] = ("mean", "last", "best")
SampleKind = Literal["training seeds", "environment seeds"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The three rules by which n episodes become one number; every agent is reported under all of them.

    Attributes:
        mean: The average episode: what to expect of the agent.
        last: The last episode, with the whole context behind it.
        best: The best of the n, which the Ring Attention paper reports. It flatters: chance alone raises it, for
            agents without a context, too, whose n episodes are independent tries.
        by_episode: Each in-context index by itself.
    """

    mean: Estimate
    last: Estimate
    best: Estimate
    by_episode: tuple[Estimate, ...]


def episode_scores(returns: Float64[np.ndarray, "*samples episodes"], rule: Rule) -> Float64[np.ndarray, "*samples"]:
    """The returns of n episodes in a row as one number."""
    if rule == "mean":
        return returns.mean(axis=-1)
    return returns[..., -1] if rule == "last" else returns.max(axis=-1)


def independent_samples(
    returns: Float64[np.ndarray, "seeds rows episodes"], rule: Rule
) -> tuple[Float64[np.ndarray, " samples"], SampleKind]:
    """The numbers that an interval may be taken over, and what they are.

    Training seeds, each the average of its rows, where there are several. Of a single one only its rows are left:
    environment seeds, whose interval tells how well this one agent is known, not what another training would give.
    """
    scores = episode_scores(np.asarray(returns, np.float64), rule)
    if scores.ndim != 2:
        raise ValueError(f"returns must be [seeds, rows, episodes], got shape {np.shape(returns)}")
    return (scores[0], "environment seeds") if len(scores) == 1 else (scores.mean(axis=1), "training seeds")


def score(returns: Float64[np.ndarray, "seeds rows episodes"]) -> Scores:
    """Scores with intervals over `independent_samples`; an episode is never a sample of its own."""
    mean, last, best = (estimate(independent_samples(returns, rule)[0]) for rule in RULES)
    by_episode = (estimate(independent_samples(returns[..., [n]], "last")[0]) for n in range(returns.shape[2]))
    return Scores(mean, last, best, tuple(by_episode))
