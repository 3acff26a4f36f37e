"""How much of the state space a set of episodes has seen: two figures that need no task.

Both are taken over states drawn from the set, equally many from every set that is compared, in coordinates that the
compared sets share: observations divided by their deviation over all of the sets, so that no unit counts more.

- Occupied cells: observations are projected to the directions in which the sets, taken together, vary most, each
  direction is cut into equal intervals from the lowest to the highest value of any set, and cells with a state in
  them are counted. Grows with extent, ignores how often a cell was visited.
- Particle entropy: the mean over states of log(1 + distance to the k-th nearest other state), the estimate (up to
  constants) by which APT rewards exploration (arXiv:2103.04551). Grows with evenness: states in heaps are near one
  another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ring_rl.typing import Float32, Float64, Int

__all__ = ["Coverage", "CoverageConfig", "SharedCoordinates", "coverage", "occupied_cells", "particle_entropy"]

# Distances from so many states to all others at once: some tens of MB.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class CoverageConfig:
    """Numbers of the two figures.

    Attributes:
        resamples: Independent draws of states, each from another half of the episodes.
        states: Drawn from a set for its occupied cells.
        components: Directions of the projection.
        intervals: Of each direction; there are intervals^components cells.
        entropy_states: Drawn from a set for its particle entropy, at a cost of their square.
        neighbour: k.
    """

    resamples: int
    states: int
    components: int
    intervals: int
    entropy_states: int
    neighbour: int

    def __post_init__(self) -> None:
        for name in ("states", "components", "neighbour"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("resamples", "intervals"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.entropy_states <= self.neighbour:
            raise ValueError(
                f"entropy_states {self.entropy_states} must be more than neighbour {self.neighbour}; draw more"
            )


@dataclass(frozen=True, eq=False)
class Coverage:
    """The two figures of one set, one value a resample."""

    occupied_cells: Int[np.ndarray, " resamples"]
    particle_entropy: Float64[np.ndarray, " resamples"]


@dataclass(frozen=True, eq=False)
class SharedCoordinates:
    """What several sets are measured in.

    Attributes:
        mean: Over all sets, each counting alike.
        deviation: Likewise; entries that do not vary keep their unit.
        directions: Principal directions of the scaled observations, the widest first.
        low: Of the projection, over all sets.
        high: Likewise.
    """

    mean: Float64[np.ndarray, " O"]
    deviation: Float64[np.ndarray, " O"]
    directions: Float64[np.ndarray, "O C"]
    low: Float64[np.ndarray, " C"]
    high: Float64[np.ndarray, " C"]

    @classmethod
    def of(cls, sets: Mapping[str, Float32[np.ndarray, "E L O"]], *, components: int) -> SharedCoordinates:
        """Raises ValueError where the sets differ in their observations or have fewer entries than `components`."""
        widths = {name: observations.shape[-1] for name, observations in sets.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(f"sets must observe alike, got dimensions {widths}; compare sets of one domain")
        width = next(iter(widths.values()))
        if components > width:
            raise ValueError(f"components {components} exceed the observation's {width} entries; use fewer")
        rows = [observations.reshape(-1, width).astype(np.float64) for observations in sets.values()]
        mean = np.mean([each.mean(axis=0) for each in rows], axis=0)
        variance_O = np.mean([np.square(each - mean).mean(axis=0) for each in rows], axis=0)
        deviation = np.where(variance_O > 1e-12, np.sqrt(variance_O), 1.0)
        scaled = [(each - mean) / deviation for each in rows]
        covariance_OO = np.mean([each.T @ each / len(each) for each in scaled], axis=0)
        directions = np.linalg.eigh(covariance_OO)[1][:, ::-1][:, :components]
        projected = [each @ directions for each in scaled]
        low = np.min([each.min(axis=0) for each in projected], axis=0)
        high = np.max([each.max(axis=0) for each in projected], axis=0)
        return cls(mean, deviation, directions, low, high)

    def scale(self, observations: Float32[np.ndarray, "*rows O"]) -> Float64[np.ndarray, "*rows O"]:
        """Centred, each entry with deviation 1 over all sets."""
        return (observations - self.mean) / self.deviation

    def project(self, observations: Float32[np.ndarray, "*rows O"]) -> Float64[np.ndarray, "*rows C"]:
        """Onto the principal directions."""
        return self.scale(observations) @ self.directions


def coverage(
    sets: Mapping[str, Float32[np.ndarray, "E L O"]], config: CoverageConfig, *, seed: int
) -> dict[str, Coverage]:
    """Both figures of every set.

    Args:
        sets: Observations of each set's episodes, by its name.
        config: Numbers of the figures.
        seed: Draws the states.

    Raises:
        ValueError: sets that observe differently, or one with too few episodes or states to draw from.
    """
    coordinates = SharedCoordinates.of(sets, components=config.components)
    most = max(config.states, config.entropy_states)
    found = {}
    for name, observations in sets.items():
        half, length, width = len(observations) // 2, *observations.shape[1:]
        if half < 1 or half * length < most:
            raise ValueError(
                f"half of the set {name} has {half * length} states, fewer than the {most} to be drawn; draw fewer"
            )
        cells, entropies = [], []
        for resample in range(config.resamples):
            # The same episodes and steps of every set, as far as their sizes agree.
            rng = np.random.default_rng([seed, resample])
            states = observations[rng.permutation(len(observations))[:half]].reshape(-1, width)
            states = states[rng.choice(len(states), most, replace=False)]
            projected = coordinates.project(states[: config.states])
            cells.append(occupied_cells(projected, coordinates, intervals=config.intervals))
            scaled = coordinates.scale(states[: config.entropy_states])
            entropies.append(particle_entropy(scaled, neighbour=config.neighbour))
        found[name] = Coverage(np.array(cells), np.array(entropies))
    return found


def occupied_cells(projected_SC: Float64[np.ndarray, "S C"], coordinates: SharedCoordinates, *, intervals: int) -> int:
    """Cells of the grid with a state in them."""
    extent = np.where(coordinates.high > coordinates.low, coordinates.high - coordinates.low, 1.0)
    cell_SC = np.floor((projected_SC - coordinates.low) / extent * intervals).astype(np.int64)
    return len(np.unique(np.clip(cell_SC, 0, intervals - 1), axis=0))


def particle_entropy(states_SO: Float64[np.ndarray, "S O"], *, neighbour: int) -> float:
    """Mean of log(1 + distance to the k-th nearest other state)."""
    squares_S = np.square(states_SO).sum(axis=1)
    distances = np.empty(len(states_SO))
    for first in range(0, len(states_SO), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        squared = squares_S[rows, None] + squares_S - 2 * states_SO[rows] @ states_SO.T
        # The nearest of all is the state itself.
        distances[rows] = np.sqrt(np.maximum(np.partition(squared, neighbour, axis=1)[:, neighbour], 0.0))
    return float(np.log1p(distances).mean())
