"""Chains of hindsight: several whole trajectories as one sequence that gets better as it goes on.

Agentic Transformer (arXiv:2305.16554): N trajectories stand in ascending order of return, and every one of
them is told the same target, the return of the best. Read from left to right, the chain shows attempts at one
goal that come closer and closer, and the last one reaches it. A chain of one trajectory, whose target is its
own return, is what a Decision Transformer (arXiv:2106.01345) reads. Both halves of the idea can be taken away, to
see what each is worth: order="shuffled" leaves no direction to the chain, target="own_return" no hindsight.
"""

import dataclasses
from typing import Literal

import numpy as np

from ring_rl.typing import Float64, Int

Sampling = Literal["uniform", "ranked"]
Order = Literal["ascending", "shuffled"]
Target = Literal["chain_maximum", "own_return"]
LossOn = Literal["all", "last"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """How chains are drawn from a data set.

    Attributes:
        trajectories: Trajectories N in a chain, at most.
        random_length: Draw the number of trajectories from 1..N, both ends included; otherwise always N.
        order: "ascending" in return, or "shuffled": any order, each as likely.
        target: The return that a trajectory is told at its start: the "chain_maximum" or its "own_return".
        sampling: "uniform", or "ranked": with probability proportional to exp(rank_temperature · rank / E),
            rank 0 being the worst of E episodes and E - 1 the best.
        rank_temperature: How much "ranked" prefers good episodes; 0 is uniform.
        loss_on: Learn from the actions of "all" trajectories of a chain, or of the "last" one only, which in
            ascending order is the best.
    """

    trajectories: int
    random_length: bool
    order: Order
    target: Target
    sampling: Sampling
    rank_temperature: float
    loss_on: LossOn

    def __post_init__(self) -> None:
        if self.trajectories < 1:
            raise ValueError(f"chain.trajectories must be at least 1, got {self.trajectories}")
        # e^-100 of the best episode's chance is still a positive float; far beyond, no second episode could be drawn.
        if not 0 <= self.rank_temperature <= 100:
            raise ValueError(f"chain.rank_temperature must lie in [0, 100], got {self.rank_temperature}")


def sampling_probabilities(returns: Float64[np.ndarray, " E"], config: ChainConfig) -> Float64[np.ndarray, " E"]:
    """How likely each episode is to be drawn into a chain; sums to 1."""
    count = len(returns)
    if config.sampling == "uniform":
        return np.full(count, 1.0 / count)
    ranks = np.empty(count)
    ranks[np.argsort(returns, kind="stable")] = np.arange(count)
    weights = np.exp(config.rank_temperature * (ranks + 1 - count) / count)
    return weights / weights.sum()


def sample_chain(
    generator: np.random.Generator, returns: Float64[np.ndarray, " E"], config: ChainConfig
) -> Int[np.ndarray, " n"]:
    """Indices of the episodes of one chain, without repetition, in the order they are read.

    Raises:
        ValueError: A chain wants more trajectories than there are episodes.
    """
    if config.trajectories > len(returns):
        raise ValueError(
            f"a chain of {config.trajectories} trajectories needs as many episodes, the data set has "
            f"{len(returns)}; collect more or lower chain.trajectories"
        )
    length = generator.integers(1, config.trajectories + 1) if config.random_length else config.trajectories
    probabilities = sampling_probabilities(returns, config)
    chosen = generator.choice(len(returns), size=length, replace=False, p=probabilities)
    if config.order == "shuffled":
        # Drawn one after another without repetition, better episodes tend to come first: that is an order, too.
        return generator.permutation(chosen)
    return chosen[np.argsort(returns[chosen], kind="stable")]
