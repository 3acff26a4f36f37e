"""One recorded episode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ring_rl.typing import Float32, Float64

__all__ = ["Trajectory", "merge_held_actions"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of L decision steps, L + 1 states.

    A decision joins the state on its left with the state on its right::

        t               0        1        2     ...     L-1        L
        observations   o[0] --> o[1] --> o[2] -->  --> o[L-1] --> o[L]      L + 1 rows
        actions             a[0]     a[1]      ...         a[L-1]           L rows, a[t] is taken in o[t]
        rewards             r[0]     r[1]      ...         r[L-1]           L rows, r[t] is paid in o[t+1]
        discounts           d[0]     d[1]      ...         d[L-1]           L rows, d[t] = 0 ends it in o[t+1]
        physics        s[0]     s[1]     s[2]  ...     s[L-1]     s[L]      L + 1 rows, the simulator's state

    Two trajectories are equal only if they are the same object: comparing arrays is left to the caller.

    Attributes:
        observations: What the agent saw, the last row included.
        actions: In [-1, 1] for the environments of this package.
        rewards: On the environment's own scale, not discounted.
        discounts: 1 where the episode goes on or was cut by a time limit, 0 where it ended.
        physics: (qpos, qvel, activations) of the simulator, or None where it was not recorded.

    Raises:
        ValueError: shapes or dtypes that do not fit the picture above.
    """

    observations: Float32[np.ndarray, "L+1 O"]
    actions: Float32[np.ndarray, "L A"]
    rewards: Float32[np.ndarray, " L"]
    discounts: Float32[np.ndarray, " L"]
    physics: Float64[np.ndarray, "L+1 P"] | None

    def __post_init__(self) -> None:
        _require_array("observations", self.observations, ndim=2, dtype=np.float32)
        rows = self.observations.shape[0]
        if rows < 2:
            raise ValueError(f"a trajectory needs at least one step, two observations; got {rows} observations")
        for name, ndim in (("actions", 2), ("rewards", 1), ("discounts", 1)):
            _require_array(name, getattr(self, name), ndim=ndim, dtype=np.float32, rows=rows - 1, of=rows)
        if self.physics is not None:
            _require_array("physics", self.physics, ndim=2, dtype=np.float64, rows=rows, of=rows)

    @property
    def length(self) -> int:
        """L, the number of decision steps."""
        return self.actions.shape[0]

    @property
    def episode_return(self) -> float:
        """The undiscounted sum of rewards, accumulated in float64."""
        return float(self.rewards.sum(dtype=np.float64))


def merge_held_actions(trajectory: Trajectory, action_repeat: int) -> Trajectory:
    """Makes one decision step of every `action_repeat` control steps through which the action was held.

    Rewards are summed and discounts multiplied, so the episode return stays the same (up to float32 rounding)
    and an agent that decides every `action_repeat` steps can be trained on what was recorded at every step::

        control    o0 a o1 a o2 a o3 a o4 b o5 b o6 b o7 b o8
        decision   o0         a        o4         b        o8      action_repeat = 4

    Args:
        trajectory: Recorded at every control step, L of them.
        action_repeat: Control steps that make one decision; 1 returns the trajectory itself.

    Raises:
        ValueError: `action_repeat` does not divide L, or an action changes inside a group. Merging would then
            invent an action that was never taken.
    """
    if isinstance(action_repeat, bool) or not isinstance(action_repeat, int) or action_repeat < 1:
        raise ValueError(f"action_repeat must be an integer of at least 1, got {action_repeat!r}; use action_repeat=1")
    if action_repeat == 1:
        return trajectory
    length = trajectory.length
    if length % action_repeat:
        raise ValueError(
            f"episode length {length} is not divisible by action_repeat {action_repeat}; "
            "use action_repeat=1 or a divisor of the length"
        )
    grouped_actions = trajectory.actions.reshape(length // action_repeat, action_repeat, -1)
    changed_L = (grouped_actions != grouped_actions[:, :1]).any(axis=-1).reshape(-1)
    if changed_L.any():
        step = int(np.argmax(changed_L))
        raise ValueError(
            f"the action changes at control step {step}, inside a group of action_repeat {action_repeat}; "
            f"use action_repeat=1 or collect with action_hold={action_repeat}"
        )
    return Trajectory(
        observations=trajectory.observations[::action_repeat],
        actions=trajectory.actions[::action_repeat],
        rewards=trajectory.rewards.reshape(-1, action_repeat).sum(axis=1, dtype=np.float64).astype(np.float32),
        discounts=trajectory.discounts.reshape(-1, action_repeat).prod(axis=1),
        physics=None if trajectory.physics is None else trajectory.physics[::action_repeat],
    )


def _require_array(
    name: str,
    array: object,
    *,
    ndim: int,
    dtype: type[np.generic],
    rows: int | None = None,
    of: int | None = None,
) -> None:
    wanted = np.dtype(dtype).name
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be a numpy array of {wanted}, got {type(array).__name__}; use np.asarray")
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {wanted}, got {array.dtype}; convert with .astype(np.{wanted})")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if rows is not None and array.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows beside {of} observations, got {array.shape[0]}")
