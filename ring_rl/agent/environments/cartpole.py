"""Cartpole for whole arrays of states: balance and swing-up, with smooth and with sparse rewards."""

from __future__ import annotations

from typing import Any

import numpy as np

from ring_rl.agent.environments.vectorised import Controls, Sensors, States, tolerance
from ring_rl.typing import Float64

__all__ = ["BatchedCartpole"]


class BatchedCartpole:
    """The suite's cartpole; its state is (position, angle) and their velocities."""

    def __init__(self, model: Any, *, sparse: bool) -> None:
        self.model = model
        self._sparse = sparse

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        """Position, cosine and sine of the angle, velocities."""
        position, angle = states[..., 0], states[..., 1]
        return np.stack([position, np.cos(angle), np.sin(angle), states[..., 2], states[..., 3]], axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """Upright, centred, slow, and with little control; or, sparse, 1 when upright and centred and 0 else."""
        position, cosine, angular_velocity = states[..., 0], np.cos(states[..., 1]), states[..., 3]
        if self._sparse:
            return tolerance(position, (-0.25, 0.25)) * tolerance(cosine, (0.995, 1.0))
        upright = (cosine + 1) / 2
        centered = (1 + tolerance(position, margin=2)) / 2
        small_control = tolerance(controls[..., 0], margin=1, value_at_margin=0, sigmoid="quadratic")
        small_velocity = (1 + tolerance(angular_velocity, margin=5)) / 2
        return upright * (4 + small_control) / 5 * small_velocity * centered
