"""Quadruped for whole arrays of states: walk and run."""

# pyright: reportAttributeAccessIssue=false
# MuJoCo's names come from a compiled module without type information.
from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from ring_rl.agent.environments.vectorised import (
    Controls,
    Sensors,
    States,
    sensor_columns,
    sensor_columns_of_types,
    tolerance,
)
from ring_rl.typing import Float64

__all__ = ["BatchedQuadruped"]

_DESIRED_SPEEDS = {"walk": 0.5, "run": 5.0}


class BatchedQuadruped:
    """The suite's quadruped. It observes accelerations and contact forces, which only sensors know."""

    def __init__(self, model: Any, *, task: str) -> None:
        self.model = model
        self._desired_speed = _DESIRED_SPEEDS[task]
        self._velocity = sensor_columns(model, "velocimeter")
        kinds = mujoco.mjtSensor
        self._imu = sensor_columns_of_types(model, kinds.mjSENS_GYRO, kinds.mjSENS_ACCELEROMETER)
        self._force_torque = sensor_columns_of_types(model, kinds.mjSENS_FORCE, kinds.mjSENS_TORQUE)
        hinges = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE)
        activations = np.arange(model.nq + model.nv, model.nq + model.nv + model.na)
        self._egocentric = np.concatenate([model.jnt_qposadr[hinges], model.nq + model.jnt_dofadr[hinges], activations])

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        """Joints and their activations, the torso's velocity and uprightness, accelerations, forces at the feet."""
        parts = [
            states[..., self._egocentric],
            sensors[..., self._velocity],
            self._upright(states)[..., None],
            sensors[..., self._imu],
            np.arcsinh(sensors[..., self._force_torque]),
        ]
        return np.concatenate(parts, axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """The part of the desired speed, times how upright the torso is."""
        bounds, margin = (self._desired_speed, np.inf), self._desired_speed
        speed = sensors[..., self._velocity.start]
        move_reward = tolerance(speed, bounds, margin=margin, value_at_margin=0.5, sigmoid="linear")
        upright = tolerance(self._upright(states), (1.0, np.inf), margin=2, value_at_margin=0, sigmoid="linear")
        return upright * move_reward

    @staticmethod
    def _upright(states: States) -> Float64[np.ndarray, "*rows"]:
        """The z-component of the torso's z-axis, 1 - 2 (x² + y²) of its quaternion (w, x, y, z)."""
        quaternion = states[..., 3:7]
        quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
        return 1 - 2 * (quaternion[..., 1] ** 2 + quaternion[..., 2] ** 2)
