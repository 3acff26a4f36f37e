"""Many episodes at once, stepped by `mujoco.rollout`: threads in C where dm_control loops in Python.

The simulator's sensors lag: what a physics step reports of positions and velocities belongs to the state it
started from. So a rollout takes one physics step more than was asked for, and the sensors of a state are read
in the step after it; those of accelerations and forces, in the step that led to it, as dm_control has them::

    physics step     |--- 1 ---|--- 2 ---|--- 3 ---|- extra -|
    state          s[0]      s[1]      s[2]      s[3]      dropped
    position and velocity sensors       of s[1]   of s[2]   of s[3]
    acceleration sensors      s[1]      s[2]      s[3]

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

# pyright: reportAttributeAccessIssue=false
# MuJoCo's names come from a compiled module without type information.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ring_rl.agent.environments.batched_tasks import make_batched_task
from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.environments.environment import action_range, control_of_actions, make_environment
from ring_rl.typing import Float32, Float64

import mujoco  # isort: skip
import mujoco.rollout  # isort: skip

__all__ = ["BatchedPhysics", "BatchedSteps"]


@dataclass(frozen=True, eq=False)
class BatchedSteps:
    """What followed a batch of held actions: k control steps of B episodes.

    Attributes:
        observations: Of the states reached.
        rewards: Paid on reaching them.
        physics: (qpos, qvel, activations) of the states reached.
    """

    observations: Float32[np.ndarray, "B k O"]
    rewards: Float64[np.ndarray, "B k"]
    physics: Float64[np.ndarray, "B k P"]


class BatchedPhysics:
    """One task, any number of episodes; a pure function of states and actions.

    Agrees with dm_control's loop except that the contact solver starts cold at every `step`, where dm_control
    carries its last solution along: single steps agree to 1e-6, and bodies in contact may drift apart
    over an episode, as they do between versions of the simulator.

    Attributes:
        task: "cartpole_swingup" and the like.
        episode_steps: Control steps until the time limit. Counting them is left to the caller.
    """

    def __init__(self, task: str, *, threads: int) -> None:
        """Args: task: its name; threads: that step episodes side by side; the result does not depend on them.

        Raises:
            ValueError: unknown task, or fewer than one thread.
        """
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.task = task
        self.episode_steps = DOMAINS[parse_task(task)[0]].episode_steps
        self._environment = make_environment(task, action_repeat=1)
        simulation = self._environment.simulation
        self._task = make_batched_task(task)
        self._substeps = round(simulation.control_timestep() / simulation.physics.timestep())
        model = self._task.model
        self._low, self._high = action_range(model)
        # Acceleration sensors hold what the step before computed, all others what the step after computes.
        self._sensor_lags = np.repeat(model.sensor_needstage != mujoco.mjtStage.mjSTAGE_ACC, model.sensor_dim)
        self._physics_dim = model.nq + model.nv + model.na
        self._data = [mujoco.MjData(model) for _ in range(threads)]
        self._rollout: Any = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)

    def __enter__(self) -> BatchedPhysics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        if self._rollout is not None:
            self._rollout.close()
            self._rollout = None

    def reset(self, seeds: Sequence[int]) -> tuple[Float32[np.ndarray, "B O"], Float64[np.ndarray, "B P"]]:
        """Initial observations and states, as of `make_environment(task).reset(seed=seed)` for each seed."""
        starts = [self._environment.reset(seed=seed) for seed in seeds]
        return np.stack([observation for observation, _ in starts]), np.stack([info["physics"] for _, info in starts])

    def step(
        self,
        physics_BP: Float64[np.ndarray, "B P"],
        actions_BA: Float32[np.ndarray, "B A"],
        *,
        action_hold: int,
    ) -> BatchedSteps:
        """Holds every action for `action_hold` control steps.

        Args:
            physics_BP: Where each episode stands; the last row of the previous `BatchedSteps.physics`.
            actions_BA: In [-1, 1]; what lies outside is clipped.
            action_hold: k, at least 1.

        Raises:
            ValueError: shapes that do not fit, or a value that is not finite.
            FloatingPointError: a simulation became unstable. The simulator would silently start it anew.
        """
        self._check("physics", physics_BP, len(physics_BP), self._physics_dim)
        self._check("actions", actions_BA, len(physics_BP), len(self._low))
        if action_hold < 1:
            raise ValueError(f"action_hold must be at least 1, got {action_hold}")
        controls_BA = control_of_actions(actions_BA.astype(np.float64), self._low, self._high)
        steps = action_hold * self._substeps
        extra = int(self._sensor_lags.any())
        states, sensors = self._roll(physics_BP, np.repeat(controls_BA[:, None], steps + extra, axis=1))
        last = slice(self._substeps - 1, steps, self._substeps)
        reached, sensors_of_last = states[:, last], sensors[:, last]
        if extra:
            after = slice(self._substeps, steps + 1, self._substeps)
            sensors_of_last = np.where(self._sensor_lags, sensors[:, after], sensors_of_last)
        controls = np.broadcast_to(controls_BA[:, None], (*reached.shape[:2], controls_BA.shape[-1]))
        return BatchedSteps(
            observations=self._task.observe(reached, sensors_of_last).astype(np.float32),
            rewards=self._task.reward(reached, sensors_of_last, controls),
            physics=reached,
        )

    def rewards(
        self, physics_BP: Float64[np.ndarray, "B P"], actions_BA: Float32[np.ndarray, "B A"]
    ) -> Float64[np.ndarray, " B"]:
        """Recomputes rewards of recorded states under the actions that led there; see `rewards_of_states`."""
        self._check("physics", physics_BP, len(physics_BP), self._physics_dim)
        self._check("actions", actions_BA, len(physics_BP), len(self._low))
        controls_BA = control_of_actions(actions_BA.astype(np.float64), self._low, self._high)
        _, sensors = self._roll(physics_BP, controls_BA[:, None])
        return self._task.reward(physics_BP, sensors[:, 0], controls_BA)

    def _roll(
        self, physics_BP: Float64[np.ndarray, "B P"], controls: Float64[np.ndarray, "B step A"]
    ) -> tuple[Float64[np.ndarray, "B step P"], Float64[np.ndarray, "B step sensor"]]:
        if self._rollout is None:
            raise RuntimeError("this BatchedPhysics is closed")
        # The state is (time, qpos, qvel, activations). An unstable one restarts at time 0; ours start at 1.
        initial = np.concatenate([np.ones((len(physics_BP), 1)), physics_BP], axis=1)
        states, sensors = self._rollout.rollout(self._task.model, self._data, initial, controls)
        unstable = (states[:, -1, 0] < 1.0) | ~np.isfinite(states[:, -1]).all(axis=-1)
        if unstable.any():
            raise FloatingPointError(
                f"the simulation of {self.task} became unstable in episode {int(np.argmax(unstable))} of the "
                "batch; use smaller actions or another seed"
            )
        return states[..., 1:], sensors

    def _check(self, name: str, array: np.ndarray, rows: int, columns: int) -> None:
        if array.shape != (rows, columns):
            raise ValueError(f"{name} of {self.task} must have shape {(rows, columns)}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got a NaN or infinity in row {_first_bad_row(array)}")


def _first_bad_row(array: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(array).all(axis=1)))
