"""The cross-entropy method over small policies: cheap data that ranges from bad to good.

A policy is a = tanh(W phi(o)) + noise, phi(o) all monomials up to some degree of the scaled observation.
Every generation draws a population of W from a Gaussian and moves the Gaussian to the best of it (Rubinstein
and Kroese, The Cross-Entropy Method, 2004)::

    warm-up (uniform actions) -> generation 1 -> generation 2 -> ... -> generation G
    bad                                                                 good

The search looks at the task's reward, so its data is not reward-free. What is recorded is a random sample of
every generation, not the best of it: the set shows the whole climb.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.exploration.explorers import (
    Batch,
    UniformConfig,
    UniformExplorer,
    draw_reset_seeds,
    require_at_least_one,
)
from ring_rl.typing import Float32, Float64

__all__ = ["PolicySearch", "PolicySearchConfig", "largest_degree", "monomials"]

# Warm-up observations that hardly vary are scaled as if they did by this much.
_SMALLEST_SCALE = 0.1


@dataclass(frozen=True)
class PolicySearchConfig:
    """Numbers of the search.

    Attributes:
        name: Tells the explorers' configurations apart.
        action_hold: Control steps for which an action is held.
        warm_up_episodes: Recorded episodes of uniform actions before the search; they scale observations.
        population: Policies, one episode each, a generation.
        generations: How far to climb.
        elite_fraction: Share of the population that the next one is drawn around.
        initial_deviation: Standard deviation of every weight in the first generation.
        extra_deviation: Share of `initial_deviation` added (in quadrature) after every generation, falling
            linearly to 0 at the last, against settling too early.
        largest_feature_count: The degree of the monomials is the highest that gives at most so many, and at
            least 1. There are (O + d)! / (O! d!): with 100, degree 3 for cartpole (56) and 1 for walker (25).
        action_noise: Standard deviation of Gaussian noise at every decision.
        last_to_first: Episodes recorded of the last generation for each one of the first, in [0, 1]; linear in
            between. Below 1 it keeps good behaviour a minority, as it is in data that others explored.
    """

    name: Literal["policy_search"]
    action_hold: int
    warm_up_episodes: int
    population: int
    generations: int
    elite_fraction: float
    initial_deviation: float
    extra_deviation: float
    largest_feature_count: int
    action_noise: float
    last_to_first: float

    def __post_init__(self) -> None:
        require_at_least_one(
            self, "action_hold", "warm_up_episodes", "population", "generations", "largest_feature_count"
        )
        if not 0 < self.elite_fraction <= 1 or round(self.elite_fraction * self.population) < 2:
            raise ValueError(
                f"elite_fraction {self.elite_fraction} of population {self.population} must be at least 2 "
                "policies and at most all; raise one of the two"
            )
        if not 0 <= self.last_to_first <= 1:
            raise ValueError(f"last_to_first must lie in [0, 1], got {self.last_to_first}")
        for name in ("initial_deviation", "extra_deviation", "action_noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class PolicySearch:
    """See the module. An `Explorer`: batch 0 is the warm-up, batch g is generation g."""

    reward_free = False
    learns = True

    def __init__(
        self, config: PolicySearchConfig, *, episodes: int, observation_dim: int, action_dim: int, seed: int
    ) -> None:
        """Raises ValueError where `episodes` does not fit the numbers of the search."""
        self._config = config
        self._seed = seed
        self._action_dim = action_dim
        self._monomials = monomials(observation_dim, largest_degree(observation_dim, config.largest_feature_count))
        weights = (len(self._monomials), action_dim)
        self._mean_FA = np.zeros(weights)
        self._deviation_FA = np.full(weights, config.initial_deviation)
        self._scale_O = np.ones(observation_dim)
        self._population_PFA = np.zeros((config.population, *weights))
        self._warm_up = UniformExplorer(
            UniformConfig("uniform", config.action_hold, config.warm_up_episodes),
            episodes=config.warm_up_episodes,
            action_dim=action_dim,
            seed=seed,
        )
        self.batch_sizes = (config.warm_up_episodes, *[config.population] * config.generations)
        self._recorded = _recorded_by_generation(config, episodes)

    def batch(self, number: int) -> Batch:
        """See `Explorer`."""
        if number == 0:
            return self._warm_up.batch(0)
        config = self._config
        rng = np.random.default_rng([self._seed, number])
        shape = self._population_PFA.shape
        self._population_PFA = self._mean_FA + self._deviation_FA * rng.normal(size=shape)

        def act(observations_BO: Float32[np.ndarray, "B O"], decision: int) -> Float32[np.ndarray, "B A"]:
            features_BF = self._features(observations_BO)
            actions_BA = np.tanh(np.einsum("bf,bfa->ba", features_BF, self._population_PFA))
            noisy_BA = actions_BA + config.action_noise * rng.normal(size=actions_BA.shape)
            return np.clip(noisy_BA, -1, 1).astype(np.float32)

        reset_seeds = draw_reset_seeds(rng, config.population)
        return Batch(reset_seeds, act, recorded=self._recorded[number - 1])

    def learn(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        """Scales observations by the warm-up's; moves the Gaussian to the best of a generation."""
        config = self._config
        if number == 0:
            observations = np.concatenate([trajectory.observations for trajectory in trajectories])
            self._scale_O = np.maximum(observations.std(axis=0, dtype=np.float64), _SMALLEST_SCALE)
            return
        returns = np.array([trajectory.episode_return for trajectory in trajectories])
        elite_EFA = self._population_PFA[np.argsort(returns, kind="stable")[-self._elites :]]
        remaining = 1 - number / config.generations
        extra = config.extra_deviation * config.initial_deviation * remaining
        self._mean_FA = elite_EFA.mean(axis=0)
        self._deviation_FA = np.sqrt(elite_EFA.var(axis=0) + extra**2)

    def state(self) -> None:
        """None: the episodes of earlier generations are played again, which costs seconds."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""

    @property
    def _elites(self) -> int:
        return round(self._config.elite_fraction * self._config.population)

    def _features(self, observations_BO: Float32[np.ndarray, "B O"]) -> Float64[np.ndarray, "B F"]:
        scaled_BO = observations_BO / self._scale_O
        features_BF = np.ones((len(scaled_BO), len(self._monomials)))
        for column, factors in enumerate(self._monomials):
            for factor in factors:
                features_BF[:, column] *= scaled_BO[:, factor]
        return features_BF


def _recorded_by_generation(config: PolicySearchConfig, episodes: int) -> list[int]:
    searched = episodes - config.warm_up_episodes
    if searched < 0:
        raise ValueError(
            f"episodes {episodes} are fewer than warm_up_episodes {config.warm_up_episodes}; ask for more episodes"
        )
    weights = np.linspace(1.0, config.last_to_first, config.generations)
    ends = np.rint(searched * np.cumsum(weights) / weights.sum()).astype(int)
    recorded = np.diff(ends, prepend=0)
    if recorded.max() > config.population:
        raise ValueError(
            f"{episodes} episodes want {recorded.max()} of a generation, more than population "
            f"{config.population}; ask for fewer episodes or raise population or generations"
        )
    return [int(count) for count in recorded]


def largest_degree(variables: int, count: int) -> int:
    """The highest degree with at most `count` monomials in so many variables, and at least 1."""
    degree = 1
    while math.comb(variables + degree + 1, degree + 1) <= count:
        degree += 1
    return degree


def monomials(variables: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Monomials up to `degree` by the indices of their factors: (), (0,), (1,), (0, 0), (0, 1), (1, 1)."""
    return tuple(
        factors
        for order in range(degree + 1)
        for factors in itertools.combinations_with_replacement(range(variables), order)
    )
