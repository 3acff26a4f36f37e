"""What a data set from elsewhere says of its environment, and how agents see that environment.

Agents read flat float32 observations and act in [-1, 1]. Environments have nested observations and ranges of their
own. `RecordedEnvironment` is the bridge, in plain values: it is made where a data set is read, travels in every
checkpoint, and is what evaluation builds the environment from. So an agent acts in the environment's own range, and
sees its entries in the order in which it learned them.

Needs no simulator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ring_rl.typing import Float32, Float64

__all__ = ["ActionRange", "ObservationLeaf", "RecordedEnvironment", "leaves_of_space"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObservationLeaf:
    """One array of a nested observation.

    Attributes:
        path: Keys (of a tuple: positions) that lead to it; empty where the observation is one array.
        size: Its entries.
    """

    path: tuple[str, ...]
    size: int

    def take(self, observations: Any, *, rows: tuple[int, ...]) -> np.ndarray:
        """The leaf of `observations`, whose arrays begin with the axes `rows`, as [*rows, size]."""
        for key in self.path:
            observations = observations[int(key) if isinstance(observations, (tuple, list)) else key]
        leaf = np.asarray(observations)
        if leaf.shape[: len(rows)] != rows or leaf.size != math.prod(rows) * self.size:
            name = "/".join(self.path) or "observation"
            raise ValueError(f"{name} has shape {leaf.shape}, expected {self.size} entries in each of {rows}")
        return leaf.reshape(*rows, self.size)


def leaves_of_space(space: Mapping[str, Any], path: tuple[str, ...] = ()) -> tuple[ObservationLeaf, ...]:
    """The arrays of a space as Minari serialises it, in the order in which the space lists them.

    A Gymnasium `Dict` made from a plain dict lists its keys sorted; one made from an ordered dict keeps its order.

    Raises:
        ValueError: A part that is neither Box, Dict nor Tuple, or an image.
    """
    kind, name = space["type"], "/".join(path) or "the observation"
    if kind == "Box":
        if space["dtype"] == "uint8" and len(space["shape"]) > 1:
            raise ValueError(f"{name} is an image of shape {tuple(space['shape'])}; agents here read vectors")
        return (ObservationLeaf(path=path, size=math.prod(space["shape"])),)
    if kind == "Dict":
        parts: Iterator[tuple[str, Any]] = iter(space["subspaces"].items())
    elif kind == "Tuple":
        parts = ((str(index), part) for index, part in enumerate(space["subspaces"]))
    else:
        raise ValueError(f"{name} is a {kind} space; only Box, and Dict and Tuple of Box, can be read")
    return tuple(leaf for key, part in parts for leaf in leaves_of_space(part, (*path, key)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionRange:
    """The box [low, high] of an environment's actions, flattened; an agent's -1 is low and its 1 is high.

    Raises:
        ValueError: No entries, bounds that are infinite or NaN, or low above high.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.low or len(self.low) != len(self.high):
            raise ValueError(f"an action range needs as many lows as highs, got {len(self.low)} and {len(self.high)}")
        for index, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ValueError(
                    f"entry {index} of the action has the range [{low}, {high}], which [-1, 1] cannot stand for; "
                    "record the data with a bounded action space"
                )

    @property
    def _middle(self) -> np.ndarray:
        return (np.array(self.low, np.float64) + np.array(self.high, np.float64)) / 2

    @property
    def _half(self) -> np.ndarray:
        return (np.array(self.high, np.float64) - np.array(self.low, np.float64)) / 2

    def to_unit(self, actions: Float64[np.ndarray, "*rows A"]) -> Float32[np.ndarray, "*rows A"]:
        """(a - middle) / half, clipped to [-1, 1]; an entry whose range is a point becomes 0."""
        half = np.where(self._half > 0, self._half, np.inf)
        return np.clip((np.asarray(actions, np.float64) - self._middle) / half, -1.0, 1.0).astype(np.float32)

    def from_unit(self, actions: Float32[np.ndarray, "*rows A"]) -> Float64[np.ndarray, "*rows A"]:
        """middle + half · a, for a clipped to [-1, 1]."""
        return self._middle + self._half * np.clip(np.asarray(actions, np.float64), -1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedEnvironment:
    """A Gymnasium environment as a data set remembers it.

    Attributes:
        environment_id: Its id, "Pendulum-v1".
        spec: Its `gymnasium.envs.registration.EnvSpec` as JSON, with arguments and wrappers; null to build it from
            the id alone.
        observation: The arrays of its observation, in the order in which agents see them.
        action_range: What an agent's [-1, 1] stands for.
        max_episode_steps: Steps after which an episode is cut: the environment's own limit, or the longest recorded
            episode where that is longer or where there is no limit.
    """

    environment_id: str
    spec: str | None
    observation: tuple[ObservationLeaf, ...]
    action_range: ActionRange
    max_episode_steps: int

    @property
    def observation_dim(self) -> int:
        """O."""
        return sum(leaf.size for leaf in self.observation)

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.action_range.low)

    def flatten(self, observations: Any, *, rows: tuple[int, ...] = ()) -> Float32[np.ndarray, "*rows O"]:
        """All leaves of an observation side by side.

        Args:
            observations: An array, or nested dicts and tuples of arrays, that begin with the axes `rows`.
            rows: Axes before those of one observation.

        Raises:
            ValueError: An array of another size than recorded.
        """
        leaves = [leaf.take(observations, rows=rows).astype(np.float32) for leaf in self.observation]
        return np.concatenate(leaves, axis=-1)
