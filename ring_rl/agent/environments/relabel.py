"""Rewards of any task of a domain for episodes that were recorded under another, or under none.

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from ring_rl.agent.environments.batched_physics import BatchedPhysics
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.typing import Float32

__all__ = ["relabel"]

# Enough for every thread to be busy, few enough to keep the sensors of all these states in memory.
_STATES_AT_ONCE = 16384


def relabel(
    task: str, trajectories: Iterable[Trajectory], *, threads: int | None
) -> Iterator[Float32[np.ndarray, " L"]]:
    """Yields the rewards of each episode, in order: r[t] of the state s[t+1] under the action a[t] that led there.

    The action matters where a task counts the control: with it left at 0, as ExoRL's own relabelling has it,
    cartpole is paid up to 25% too much.

    Args:
        task: whose rewards; of the episodes' own domain.
        trajectories: with physics states, one row a control step; read as they are needed.
        threads: that share the states; None takes one a processor core. Changes nothing but speed.

    Cost: about 10 us a state and core.

    Raises:
        ValueError: an unknown task, an episode without physics states or of another domain, or states that the
            simulator cannot step.
    """
    with BatchedPhysics(task, threads=threads or os.cpu_count() or 1) as physics:
        batch: list[Trajectory] = []
        for trajectory in trajectories:
            if trajectory.physics is None:
                raise ValueError("an episode without physics states cannot be relabelled; use its rewards as stored")
            batch.append(trajectory)
            if sum(each.length for each in batch) >= _STATES_AT_ONCE:
                yield from _rewards(physics, batch)
                batch = []
        if batch:
            yield from _rewards(physics, batch)


def _rewards(physics: BatchedPhysics, batch: list[Trajectory]) -> list[Float32[np.ndarray, " L"]]:
    states = np.concatenate([each.physics[1:] for each in batch if each.physics is not None])
    actions = np.concatenate([each.actions for each in batch])
    try:
        rewards = physics.rewards(states, actions)
    except FloatingPointError as error:
        raise ValueError(f"recorded states cannot be relabelled: {error}") from None
    ends = np.cumsum([each.length for each in batch])[:-1]
    return np.split(rewards.astype(np.float32), ends)
