"""Batches of chains as arrays: one row a chain, one column an environment step."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.hindsight import ChainConfig, LossOn, Target, sample_chain
from ring_rl.kernels.layout import Layout, check_length, padded_length
from ring_rl.typing import Float32, Float64, Int32

# numpy's where a batch is made, jax's where it is read.
_AnyArray = Any


class ChainBatch(NamedTuple):
    """B chains of T = N L steps, flattened and padded at the end, in the layout of the ring.

    For a chain with target R (of all its trajectories, or of each its own) and trajectories of rewards r[0..L-1]:

        step                 0      1      ...   L-1   |   0      1    ...    the next trajectory
        returns_to_go        R    R-r[0]   ...         |   R    R-r[0]  ...   the same R again
        previous_rewards     0     r[0]    ...         |   0     r[0]   ...
        completions          0      0      ...    d    |   0      0     ...   d = 1 if the return reached R
        trajectory_indices   0      0      ...    0    |   1      1     ...
        positions            0      1      ...   L-1   |   L     L+1    ...   counts on over the whole chain

    At the start of a trajectory everything that belongs to the last one is reset, save `positions`.
    """

    observations: Float32[_AnyArray, "B T O"]
    actions: Float32[_AnyArray, "B T A"]
    rewards: Float32[_AnyArray, "B T"]
    returns_to_go: Float32[_AnyArray, "B T"]
    completions: Float32[_AnyArray, "B T"]
    previous_actions: Float32[_AnyArray, "B T A"]
    previous_rewards: Float32[_AnyArray, "B T"]
    steps: Int32[_AnyArray, "B T"]
    trajectory_indices: Int32[_AnyArray, "B T"]
    positions: Int32[_AnyArray, "B T"]
    loss_weights: Float32[_AnyArray, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How a batch is cut to the mesh.

    Attributes:
        batch_size: Chains B in a batch, over all devices.
        ring_size: Devices that share one chain.
        layout: Which steps a device holds.
        pad_to_ring: Pad chains at their end to a length that the ring divides; otherwise such a length is an error.
    """

    batch_size: int
    ring_size: int
    layout: Layout
    pad_to_ring: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch.batch_size must be at least 1, got {self.batch_size}")

    def padded_steps(self, steps: int) -> int:
        """The columns of a batch whose chains have at most `steps` steps.

        Raises:
            ValueError: The ring does not divide `steps` and padding is off.
        """
        if self.pad_to_ring:
            return padded_length(steps, ring_size=self.ring_size, layout=self.layout)
        try:
            check_length(steps, ring_size=self.ring_size, layout=self.layout)
        except ValueError as error:
            raise ValueError(f"{error}, or set batch.pad_to_ring=true") from error
        return steps


class ChainSampler:
    """Chains by index, a `ring_rl.training.input.RowSource`: chain i is a pure function of (seed, i).

    Args:
        episodes: What chains are made of.
        chain: How they are drawn.
        batch: How long a padded chain must be.
        seed: Of the draws.
    """

    def __init__(self, episodes: EpisodeSet, chain: ChainConfig, batch: BatchLayout, *, seed: int):
        self._episodes, self._chain, self._seed = episodes, chain, seed
        self._steps = batch.padded_steps(chain.trajectories * int(episodes.lengths.max()))
        # Too few episodes for a chain must be known before anything is compiled.
        sample_chain(np.random.default_rng(0), episodes.returns, chain)

    @property
    def steps(self) -> int:
        """T, the columns of every chain, padding included."""
        return self._steps

    def row(self, index: int) -> ChainBatch:
        """Chain `index` without a batch axis, in natural order, padded to `steps`."""
        generator = np.random.default_rng([self._seed, index])
        chosen = sample_chain(generator, self._episodes.returns, self._chain)
        return _chain(
            # One at a time: a chain is as large as all of its trajectories.
            (self._episodes.trajectories[i] for i in chosen),
            returns=self._episodes.returns[chosen],
            steps=self._steps,
            loss_on=self._chain.loss_on,
            target=self._chain.target,
            dimensions=(self._episodes.observation_dim, self._episodes.action_dim),
        )


def chain_arrays(
    trajectories: Sequence[Trajectory], *, steps: int, loss_on: LossOn, target: Target | float
) -> ChainBatch:
    """One chain (no batch axis) in natural order, padded to `steps`.

    Args:
        trajectories: In the order they are read.
        steps: Columns of the result.
        loss_on: Whose actions have a weight.
        target: The return asked for at the start of every trajectory; as in `ChainConfig`, or a number for all.

    Raises:
        ValueError: The trajectories are longer than `steps` together.
    """
    filled = sum(trajectory.length for trajectory in trajectories)
    if filled > steps:
        raise ValueError(f"a chain of {filled} steps does not fit into {steps}")
    return _chain(
        trajectories,
        returns=np.array([trajectory.episode_return for trajectory in trajectories]),
        steps=steps,
        loss_on=loss_on,
        target=target,
        dimensions=(trajectories[0].observations.shape[1], trajectories[0].actions.shape[1]),
    )


def _chain(
    trajectories: Iterable[Trajectory],
    *,
    returns: Float64[np.ndarray, " N"],
    steps: int,
    loss_on: LossOn,
    target: Target | float,
    dimensions: tuple[int, int],
) -> ChainBatch:
    if target == "own_return":
        targets = returns
    else:
        targets = np.full(len(returns), returns.max() if target == "chain_maximum" else target)
    chain = _zeros((steps,), observation_dim=dimensions[0], action_dim=dimensions[1])
    begin = 0
    for index, trajectory in enumerate(trajectories):
        part = ChainBatch(*(column[begin : begin + trajectory.length] for column in chain))
        _fill(part, trajectory, float(targets[index]))
        part.completions[-1] = returns[index] >= targets[index]
        part.trajectory_indices[:] = index
        part.loss_weights[:] = loss_on == "all" or index == len(returns) - 1
        begin += trajectory.length
    chain.positions[:] = np.arange(steps, dtype=np.int32)
    return chain


def empty_batch(*, batch_size: int, steps: int, observation_dim: int, action_dim: int) -> ChainBatch:
    """A batch of the right shapes and dtypes that holds nothing: weights of zero."""
    return _zeros((batch_size, steps), observation_dim=observation_dim, action_dim=action_dim)


def _zeros(shape: tuple[int, ...], *, observation_dim: int, action_dim: int) -> ChainBatch:
    real = lambda *columns: np.zeros((*shape, *columns), np.float32)  # noqa: E731
    count = lambda: np.zeros(shape, np.int32)  # noqa: E731
    return ChainBatch(
        observations=real(observation_dim),
        actions=real(action_dim),
        rewards=real(),
        returns_to_go=real(),
        completions=real(),
        previous_actions=real(action_dim),
        previous_rewards=real(),
        steps=count(),
        trajectory_indices=count(),
        positions=count(),
        loss_weights=real(),
    )


def _fill(part: ChainBatch, trajectory: Trajectory, target_return: float) -> None:
    """Writes what one trajectory says into its part of a chain, which holds zeros."""
    collected = np.cumsum(trajectory.rewards[:-1], dtype=np.float64)
    part.observations[:] = trajectory.observations[:-1]
    part.actions[:] = trajectory.actions
    part.rewards[:] = trajectory.rewards
    part.returns_to_go[0] = target_return
    part.returns_to_go[1:] = target_return - collected
    part.previous_actions[1:] = trajectory.actions[:-1]
    part.previous_rewards[1:] = trajectory.rewards[:-1]
    part.steps[:] = np.arange(trajectory.length)
