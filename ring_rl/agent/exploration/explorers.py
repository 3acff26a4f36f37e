"""Explorers that ignore the state: who acts while ExoRL-format data is collected, at its simplest.

An explorer hands out batches of episodes, each with a policy for the whole batch, and may learn from what
came of them (`policy_search` does) or while they are played (`rnd_explorer` does). Everything is a function of
the configuration and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.typing import Float32

__all__ = [
    "Batch",
    "BatchObserver",
    "BatchPolicy",
    "Explorer",
    "NoiseConfig",
    "NoiseExplorer",
    "UniformConfig",
    "UniformExplorer",
]

BatchPolicy = Callable[[Float32[np.ndarray, "B O"], int], Float32[np.ndarray, "B A"]]
"""(observations, decision) -> actions; called once a decision, in order."""

BatchObserver = Callable[[Float32[np.ndarray, "B A"], Float32[np.ndarray, "B O"]], None]
"""(actions, the observations that they led to); called after every decision. Whoever learns here sees no reward."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Episodes to play side by side.

    Attributes:
        reset_seeds: One an episode, for the environment.
        policy: Acts for all of them.
        recorded: How many of them are kept, the first ones. The rest serve the explorer's learning only.
        observe: Is told of every decision's outcome, for an explorer that learns within episodes.
        reads_observations: Whether the policy looks at them; whole episodes of one that does not are played at once.
    """

    reset_seeds: tuple[int, ...]
    policy: BatchPolicy
    recorded: int
    observe: BatchObserver | None = None
    reads_observations: bool = True

    def __post_init__(self) -> None:
        if self.observe is not None and not self.reads_observations:
            raise ValueError("a batch that observes its outcomes must read observations; leave out one of the two")


class Explorer(Protocol):
    """Hands out batches in order and is told of their outcome."""

    @property
    def reward_free(self) -> bool:
        """Whether the behaviour is independent of the task's reward."""
        ...

    @property
    def learns(self) -> bool:
        """Whether a batch depends on those before it."""
        ...

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Episodes of every batch; their number is the number of batches."""
        ...

    def batch(self, number: int) -> Batch:
        """The batch of this number, for an explorer that has learnt from all earlier ones."""
        ...

    def learn(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        """Takes the outcome of a batch."""
        ...

    def state(self) -> Mapping[str, Any] | None:
        """What it has learnt up to the next batch, as nested dicts of arrays; None if playing again is the way back."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        ...


@dataclass(frozen=True)
class UniformConfig:
    """Actions drawn uniformly from [-1, 1].

    Attributes:
        name: Tells the explorers' configurations apart.
        action_hold: Control steps for which an action is held.
        batch_size: Episodes side by side.
    """

    name: Literal["uniform"]
    action_hold: int
    batch_size: int

    def __post_init__(self) -> None:
        require_at_least_one(self, "action_hold", "batch_size")


@dataclass(frozen=True)
class NoiseConfig:
    """Smooth noise, an Ornstein-Uhlenbeck process or sine waves: moves bodies where white noise shakes them.

    Attributes:
        name: Tells the explorers' configurations apart.
        action_hold: Control steps for which an action is held.
        batch_size: Episodes side by side.
        kind: "mix" draws one of the two for every episode.
        reversion: Share of its value that the process loses at every decision, in (0, 1].
        deviation: Standard deviation of the process once it has forgotten its start.
        shortest_period: Of the sine waves, in decisions.
        longest_period: Of the sine waves, in decisions; periods are drawn log-uniformly.
        largest_amplitude: Amplitudes are drawn uniformly up to it; above 1 the waves are clipped.
    """

    name: Literal["noise"]
    action_hold: int
    batch_size: int
    kind: Literal["ornstein_uhlenbeck", "sines", "mix"]
    reversion: float
    deviation: float
    shortest_period: float
    longest_period: float
    largest_amplitude: float

    def __post_init__(self) -> None:
        require_at_least_one(self, "action_hold", "batch_size")
        if not 0 < self.reversion <= 1:
            raise ValueError(f"reversion must be above 0 and at most 1, got {self.reversion}")
        if self.deviation < 0 or self.largest_amplitude < 0:
            raise ValueError("deviation and largest_amplitude must not be negative")
        if not 2 <= self.shortest_period <= self.longest_period:
            raise ValueError(
                "periods must satisfy 2 <= shortest_period <= longest_period, got "
                f"{self.shortest_period} and {self.longest_period}; shorter waves cannot be played"
            )


class UniformExplorer:
    """See `UniformConfig`."""

    reward_free = True
    learns = False

    def __init__(self, config: UniformConfig, *, episodes: int, action_dim: int, seed: int) -> None:
        self._action_dim = action_dim
        self._seed = seed
        self.batch_sizes = split_into_batches(episodes, config.batch_size)

    def batch(self, number: int) -> Batch:
        """See `Explorer`."""
        size = self.batch_sizes[number]
        rng = np.random.default_rng([self._seed, number])

        def act(observations_BO: Float32[np.ndarray, "B O"], decision: int) -> Float32[np.ndarray, "B A"]:
            return rng.uniform(-1, 1, (size, self._action_dim)).astype(np.float32)

        return Batch(draw_reset_seeds(rng, size), act, recorded=size, reads_observations=False)

    def learn(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        """Learns nothing."""

    def state(self) -> None:
        """Nothing to keep."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


class NoiseExplorer:
    """See `NoiseConfig`."""

    reward_free = True
    learns = False

    def __init__(self, config: NoiseConfig, *, episodes: int, action_dim: int, seed: int) -> None:
        self._config = config
        self._action_dim = action_dim
        self._seed = seed
        self.batch_sizes = split_into_batches(episodes, config.batch_size)

    def batch(self, number: int) -> Batch:
        """See `Explorer`."""
        config = self._config
        rng = np.random.default_rng([self._seed, number])
        shape = (self.batch_sizes[number], self._action_dim)
        reset_seeds = draw_reset_seeds(rng, shape[0])
        waves = {"ornstein_uhlenbeck": 0.0, "sines": 1.0, "mix": 0.5}[config.kind]
        is_wave_B1 = rng.uniform(size=(shape[0], 1)) < waves
        amplitude_BA = rng.uniform(0, config.largest_amplitude, shape)
        phase_BA = rng.uniform(0, 2 * np.pi, shape)
        period_BA = np.exp(rng.uniform(np.log(config.shortest_period), np.log(config.longest_period), shape))
        process_BA = config.deviation * rng.normal(size=shape)
        # The variance that keeps x' = (1 - r) x + noise at its deviation.
        innovation = config.deviation * np.sqrt(1 - (1 - config.reversion) ** 2)

        def act(observations_BO: Float32[np.ndarray, "B O"], decision: int) -> Float32[np.ndarray, "B A"]:
            nonlocal process_BA
            wave_BA = amplitude_BA * np.sin(2 * np.pi * decision / period_BA + phase_BA)
            actions_BA = np.where(is_wave_B1, wave_BA, process_BA)
            process_BA = (1 - config.reversion) * process_BA + innovation * rng.normal(size=shape)
            return np.clip(actions_BA, -1, 1).astype(np.float32)

        return Batch(reset_seeds, act, recorded=shape[0], reads_observations=False)

    def learn(self, number: int, trajectories: Sequence[Trajectory]) -> None:
        """Learns nothing."""

    def state(self) -> None:
        """Nothing to keep."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to take back."""


def require_at_least_one(config: object, *names: str) -> None:
    """Raises ValueError unless every named attribute is at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def split_into_batches(episodes: int, batch_size: int) -> tuple[int, ...]:
    """As many full batches as fit, and the rest: split_into_batches(10, 4) == (4, 4, 2)."""
    return tuple(min(batch_size, episodes - start) for start in range(0, episodes, batch_size))


def draw_reset_seeds(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    """Seeds for `count` resets."""
    return tuple(int(seed) for seed in rng.integers(2**31, size=count))
