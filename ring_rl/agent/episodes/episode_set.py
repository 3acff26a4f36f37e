"""A data set as agents see it: episodes in order, and what is known of all of them without reading one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.typing import Float32, Float64, Int

__all__ = ["EpisodeSet", "EpisodeSummary", "observation_moments", "select_best_fraction"]

_QUANTILES = {"p10": 0.10, "p25": 0.25, "median": 0.50, "p75": 0.75, "p90": 0.90, "p95": 0.95}


@dataclass(frozen=True, eq=False)
class EpisodeSummary:
    """What is known of E episodes without reading them again.

    Attributes:
        observation_dim: O.
        action_dim: A.
        lengths: Decisions of each.
        returns: The undiscounted return of each.
        observation_means: Over the states of an episode.
        observation_squares: Summed squares of what the states of an episode differ from its mean.
    """

    observation_dim: int
    action_dim: int
    lengths: Int[np.ndarray, " E"]
    returns: Float64[np.ndarray, " E"]
    observation_means: Float64[np.ndarray, "E O"]
    observation_squares: Float64[np.ndarray, "E O"]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> EpisodeSummary:
        """Reads every trajectory once; ValueError where there is none or they disagree in their dimensions."""
        dimensions: tuple[int, int] | None = None
        lengths, returns, means, squares = [], [], [], []
        for index, trajectory in enumerate(trajectories):
            found = (trajectory.observations.shape[1], trajectory.actions.shape[1])
            dimensions = dimensions or found
            if found != dimensions:
                raise ValueError(
                    f"trajectory {index} has observation and action dimensions {found}, the first has {dimensions}; "
                    "keep one domain in a folder"
                )
            lengths.append(trajectory.length)
            returns.append(trajectory.episode_return)
            mean, square = observation_moments(trajectory.observations)
            means.append(mean)
            squares.append(square)
        if dimensions is None:
            raise ValueError("an episode set needs at least one trajectory, got none")
        return cls(*dimensions, np.array(lengths), np.array(returns), np.array(means), np.array(squares))

    def select(self, indices: Int[np.ndarray, " n"]) -> EpisodeSummary:
        """Of these episodes alone, in this order."""
        return EpisodeSummary(
            self.observation_dim,
            self.action_dim,
            self.lengths[indices],
            self.returns[indices],
            self.observation_means[indices],
            self.observation_squares[indices],
        )


@dataclass(frozen=True, eq=False)
class EpisodeSet:
    """Episodes that agree in observation and action dimension; lengths may differ.

    Attributes:
        trajectories: In memory, or read one by one when they are indexed (`ring_rl.agent.episodes.store`); so ask
            for `lengths` and `returns` here rather than for those of every trajectory.
        summary: What is known of them; None reads them once to find out.

    Raises:
        ValueError: no trajectory, or trajectories that disagree.
    """

    trajectories: Sequence[Trajectory]
    summary: EpisodeSummary | None = None

    def __post_init__(self) -> None:
        if self.summary is None:
            object.__setattr__(self, "summary", EpisodeSummary.of(self.trajectories))

    @property
    def observation_dim(self) -> int:
        """O."""
        return self._known.observation_dim

    @property
    def action_dim(self) -> int:
        """A."""
        return self._known.action_dim

    @property
    def lengths(self) -> Int[np.ndarray, " E"]:
        """The decisions of every episode."""
        return self._known.lengths

    @property
    def returns(self) -> Float64[np.ndarray, " E"]:
        """The undiscounted return of every episode, in the order of `trajectories`."""
        return self._known.returns

    @cached_property
    def quantiles(self) -> Mapping[str, float]:
        """min, p10, p25, median, p75, p90, p95 and max of the returns."""
        inner = {name: float(np.quantile(self.returns, level)) for name, level in _QUANTILES.items()}
        return {"min": float(self.returns.min()), **inner, "max": float(self.returns.max())}

    @property
    def best(self) -> Trajectory:
        """The trajectory of highest return, the earliest if several share it."""
        return self.trajectories[int(np.argmax(self.returns))]

    @cached_property
    def observation_mean_and_deviation(self) -> tuple[Float64[np.ndarray, " O"], Float64[np.ndarray, " O"]]:
        """Mean and standard deviation of every observation entry over all states of all episodes."""
        known = self._known
        states_E1 = (known.lengths + 1)[:, None].astype(np.float64)
        mean = (states_E1 * known.observation_means).sum(axis=0) / states_E1.sum()
        between = states_E1 * (known.observation_means - mean) ** 2
        return mean, np.sqrt((known.observation_squares + between).sum(axis=0) / states_E1.sum())

    def select(self, indices: Int[np.ndarray, " n"]) -> EpisodeSet:
        """These episodes alone, in this order; reads none."""
        return EpisodeSet(_Selected(self.trajectories, indices), self._known.select(indices))

    @property
    def _known(self) -> EpisodeSummary:
        assert self.summary is not None
        return self.summary


def observation_moments(
    observations: Float32[np.ndarray, "n O"],
) -> tuple[Float64[np.ndarray, " O"], Float64[np.ndarray, " O"]]:
    """The mean, and the summed squares of the deviations from it, in float64."""
    mean = observations.mean(axis=0, dtype=np.float64)
    return mean, ((observations - mean) ** 2).sum(axis=0)


def select_best_fraction(episodes: EpisodeSet, fraction: float) -> EpisodeSet:
    """The best `fraction` of the episodes by return, in ascending order of return; at least one.

    `fraction=0.1` is what BC-10% clones.

    Raises:
        ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}; BC-10% uses 0.1")
    count = max(1, round(fraction * len(episodes.trajectories)))
    return episodes.select(np.argsort(episodes.returns, kind="stable")[-count:])


class _Selected(Sequence[Trajectory]):
    """Some of a sequence's trajectories, each taken from it when it is asked for."""

    def __init__(self, trajectories: Sequence[Trajectory], indices: Iterable[int]) -> None:
        self._trajectories, self._indices = trajectories, tuple(int(index) for index in indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> _Selected: ...
    def __getitem__(self, index: int | slice) -> Trajectory | _Selected:
        if isinstance(index, slice):
            return _Selected(self._trajectories, self._indices[index])
        return self._trajectories[self._indices[index]]
