"""A ring of whole episodes from which n-step transitions are drawn.

Lives in the host's memory: drawing takes microseconds beside an update, and no device has to hold it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ring_rl.agent.exploration.ddpg import Transitions
from ring_rl.typing import Float32

__all__ = ["Replay"]


class Replay:
    """The latest episodes, those under way included; the oldest make room.

    Args:
        episodes: How many it holds.
        decisions: L, of an episode.
    """

    def __init__(self, *, episodes: int, decisions: int, observation_dim: int, action_dim: int) -> None:
        if episodes < 1 or decisions < 1:
            raise ValueError(f"a replay holds at least 1 episode of 1 decision, got {episodes} of {decisions}")
        # The pages of what is not filled yet take no memory.
        self._observations = np.zeros((episodes, decisions + 1, observation_dim), np.float32)
        self._actions = np.zeros((episodes, decisions, action_dim), np.float32)
        self._lengths = np.zeros(episodes, np.int64)
        self._next = 0
        self._current = np.zeros(0, np.int64)

    @property
    def transitions(self) -> int:
        """Decisions that it holds."""
        return int(self._lengths.sum())

    def start(self, observations_BO: Float32[np.ndarray, "B O"]) -> None:
        """Opens B episodes side by side, over the oldest ones where it is full."""
        count, capacity = len(observations_BO), len(self._lengths)
        if count > capacity:
            raise ValueError(f"{count} episodes side by side exceed the replay's {capacity}; let it hold more")
        self._current = (self._next + np.arange(count)) % capacity
        self._next = (self._next + count) % capacity
        self._lengths[self._current] = 0
        self._observations[self._current, 0] = observations_BO

    def append(self, actions_BA: Float32[np.ndarray, "B A"], observations_BO: Float32[np.ndarray, "B O"]) -> None:
        """Adds one decision and where it led to all episodes under way."""
        lengths_B = self._lengths[self._current]
        self._actions[self._current, lengths_B] = actions_BA
        self._observations[self._current, lengths_B + 1] = observations_BO
        self._lengths[self._current] = lengths_B + 1

    def startable(self, n_step: int) -> int:
        """Decisions that n - 1 more ones of the same episode follow."""
        return int(np.maximum(self._lengths - n_step + 1, 0).sum())

    def draw(self, rng: np.random.Generator, *, updates: int, batch: int, n_step: int) -> Transitions:
        """Draws uniformly, with repetition: arrays [updates, batch, ...], `next_observations` n steps later.

        Raises:
            ValueError: no episode is n steps long yet.
        """
        ends = np.cumsum(np.maximum(self._lengths - n_step + 1, 0))
        if ends[-1] == 0:
            raise ValueError(f"the replay holds no {n_step} decisions in a row yet; draw later")
        number = rng.integers(ends[-1], size=(updates, batch))
        episode = np.searchsorted(ends, number, side="right")
        step = number - np.concatenate([[0], ends])[episode]
        return Transitions(
            self._observations[episode, step], self._actions[episode, step], self._observations[episode, step + n_step]
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """What it holds, to be stored between episodes; `restore` takes it back."""
        filled = int(np.count_nonzero(self._lengths))
        return {
            "observations": self._observations[:filled],
            "actions": self._actions[:filled],
            "lengths": self._lengths[:filled],
            "next": np.asarray(self._next),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The inverse of `arrays`."""
        filled = len(arrays["lengths"])
        self._observations[:filled] = arrays["observations"]
        self._actions[:filled] = arrays["actions"]
        self._lengths[:] = 0
        self._lengths[:filled] = arrays["lengths"]
        self._next = int(arrays["next"])
        self._current = np.zeros(0, np.int64)
