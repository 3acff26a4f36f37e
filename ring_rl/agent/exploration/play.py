"""Episodes of an explorer, side by side in the batched simulator.

An explorer that looks at observations is asked once a decision. One that does not says all its actions beforehand, and
the simulator plays whole episodes in one call. Both ways give dm_control's own episodes (see `BatchedPhysics`).
"""

from __future__ import annotations

import numpy as np

from ring_rl.agent.environments.batched_physics import BatchedPhysics, BatchedStart, BatchedSteps
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.exploration.explorers import Batch
from ring_rl.typing import Float32

__all__ = ["play_batch"]


def play_batch(physics: BatchedPhysics, batch: Batch, *, action_hold: int) -> list[Trajectory]:
    """Plays one episode for every seed of the batch, to the time limit.

    Raises:
        FloatingPointError: a simulation became unstable.
    """
    decisions = physics.episode_steps // action_hold
    start = physics.start(batch.reset_seeds)
    play = _closed_loop if batch.reads_observations else _open_loop
    actions_BLA, parts = play(physics, batch, start, decisions, action_hold)
    return _trajectories(start, parts, actions_BLA.repeat(action_hold, axis=1))


def _open_loop(
    physics: BatchedPhysics, batch: Batch, start: BatchedStart, decisions: int, action_hold: int
) -> tuple[Float32[np.ndarray, "B L A"], list[BatchedSteps]]:
    actions_BLA = np.stack([batch.policy(start.observations, decision) for decision in range(decisions)], axis=1)
    return actions_BLA, [
        physics.play(start.physics, actions_BLA, action_hold=action_hold, warm_starts=start.warm_starts)
    ]


def _closed_loop(
    physics: BatchedPhysics, batch: Batch, start: BatchedStart, decisions: int, action_hold: int
) -> tuple[Float32[np.ndarray, "B L A"], list[BatchedSteps]]:
    observations_BO, physics_BP, warm_starts = start.observations, start.physics, start.warm_starts
    actions, parts = [], []
    for decision in range(decisions):
        actions_BA = batch.policy(observations_BO, decision)
        steps = physics.step(physics_BP, actions_BA, action_hold=action_hold, warm_starts=warm_starts)
        actions.append(actions_BA)
        parts.append(steps)
        observations_BO, physics_BP, warm_starts = steps.observations[:, -1], steps.physics[:, -1], steps.warm_starts
        if batch.observe is not None:
            batch.observe(actions_BA, observations_BO)
    return np.stack(actions, axis=1), parts


def _trajectories(
    start: BatchedStart, parts: list[BatchedSteps], actions_BLA: Float32[np.ndarray, "B L A"]
) -> list[Trajectory]:
    columns = zip(
        np.concatenate([start.observations[:, None], *[each.observations for each in parts]], axis=1),
        actions_BLA,
        np.concatenate([each.rewards for each in parts], axis=1).astype(np.float32),
        np.concatenate([start.physics[:, None], *[each.physics for each in parts]], axis=1),
        strict=True,
    )
    return [
        Trajectory(observations, actions, rewards, np.ones_like(rewards), states)
        for observations, actions, rewards, states in columns
    ]
