"""The observations and rewards of control-suite tasks (arXiv:1801.00690) for whole arrays of states.

dm_control computes them for one state at a time. Here every function takes any leading axes (`*rows`) and
finds orientations from the joint angles, so that nothing but velocities and forces is asked of the simulator.
Tests hold each of them against dm_control's own.
"""

# pyright: reportAttributeAccessIssue=false
# MuJoCo's names come from a compiled module without type information.
from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.environments.simulations import load_simulation
from ring_rl.typing import Float64

# simulations.py has made sure that the simulator is there and says so if not.
import mujoco  # isort: skip
from ring_rl.agent.environments.jaco import BatchedReach  # isort: skip
from ring_rl.agent.environments.vectorised import (
    Controls,
    Sensors,
    States,
    sensor_columns,
    sensor_columns_of_types,
    tolerance,
)  # isort: skip

__all__ = ["BatchedTask", "make_batched_task"]


class BatchedTask(Protocol):
    """What `batched_physics` needs to know of a task."""

    model: Any
    """The `mujoco.MjModel`."""

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        """The flat observation in dm_control's order."""
        ...

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """The reward on reaching `states` under `controls`."""
        ...


def make_batched_task(task: str) -> BatchedTask:
    """Builds the vectorised form of "cartpole_swingup" and the like.

    Raises:
        ValueError: unknown task, with the known ones.
    """
    domain, name = parse_task(task)
    model = load_simulation(task, flat_observation=False).physics.model.ptr
    match domain:
        case "cartpole":
            return _Cartpole(model, sparse=name.endswith("_sparse"))
        case "cheetah":
            return _Cheetah(model)
        case "jaco":
            return BatchedReach(model, task=name)
        case "walker":
            return _Walker(model, move_speed={"stand": 0.0, "walk": 1.0, "run": 8.0}[name])
        case "quadruped":
            return _Quadruped(model, desired_speed={"walk": 0.5, "run": 5.0}[name])
        case _:
            raise ValueError(f"task {task!r} has no vectorised form; use environment.make_environment")


class _Cartpole:
    def __init__(self, model: Any, *, sparse: bool) -> None:
        self.model = model
        self._sparse = sparse

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        position, angle = states[..., 0], states[..., 1]
        return np.stack([position, np.cos(angle), np.sin(angle), states[..., 2], states[..., 3]], axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        position, cosine, angular_velocity = states[..., 0], np.cos(states[..., 1]), states[..., 3]
        if self._sparse:
            return tolerance(position, (-0.25, 0.25)) * tolerance(cosine, (0.995, 1.0))
        upright = (cosine + 1) / 2
        centered = (1 + tolerance(position, margin=2)) / 2
        small_control = tolerance(controls[..., 0], margin=1, value_at_margin=0, sigmoid="quadratic")
        small_velocity = (1 + tolerance(angular_velocity, margin=5)) / 2
        return upright * (4 + small_control) / 5 * small_velocity * centered


class _Cheetah:
    def __init__(self, model: Any) -> None:
        self.model = model
        self._velocity = sensor_columns(model, "torso_subtreelinvel")

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        return states[..., 1:]  # all but the way travelled

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        speed = sensors[..., self._velocity.start]
        return tolerance(speed, (10.0, np.inf), margin=10.0, value_at_margin=0, sigmoid="linear")


class _Walker:
    """A planar body: the angle of a link is the sum of the angles on the way to it."""

    def __init__(self, model: Any, *, move_speed: float) -> None:
        self.model = model
        self._move_speed = move_speed
        self._velocity = sensor_columns(model, "torso_subtreelinvel")
        self._angles = np.zeros((model.nq, model.nbody - 1))
        for body in range(1, model.nbody):
            link = body
            while link > 0:
                for joint in range(model.body_jntadr[link], model.body_jntadr[link] + model.body_jntnum[link]):
                    if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE:
                        self._angles[model.jnt_qposadr[joint], body - 1] = model.jnt_axis[joint, 1]
                link = model.body_parentid[link]
        torso = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, "torso")
        self._torso = torso - 1
        self._torso_height = model.body_pos[torso, 2]
        rootz = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, "rootz")
        self._rootz = int(model.jnt_qposadr[rootz])

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        angles = self._body_angles(states)
        orientations = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        orientations = orientations.reshape(*angles.shape[:-1], -1)
        height = self._torso_height + states[..., self._rootz, None]
        return np.concatenate([orientations, height, states[..., self.model.nq :]], axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        standing = tolerance(self._torso_height + states[..., self._rootz], (1.2, np.inf), margin=0.6)
        upright = (1 + np.cos(self._body_angles(states)[..., self._torso])) / 2
        stand_reward = (3 * standing + upright) / 4
        if self._move_speed == 0:
            return stand_reward
        speed = sensors[..., self._velocity.start]
        bounds, margin = (self._move_speed, np.inf), self._move_speed / 2
        move_reward = tolerance(speed, bounds, margin=margin, value_at_margin=0.5, sigmoid="linear")
        return stand_reward * (5 * move_reward + 1) / 6

    def _body_angles(self, states: States) -> Float64[np.ndarray, "*rows body"]:
        return states[..., : self.model.nq] @ self._angles


class _Quadruped:
    def __init__(self, model: Any, *, desired_speed: float) -> None:
        self.model = model
        self._desired_speed = desired_speed
        self._velocity = sensor_columns(model, "velocimeter")
        kinds = mujoco.mjtSensor
        self._imu = sensor_columns_of_types(model, kinds.mjSENS_GYRO, kinds.mjSENS_ACCELEROMETER)
        self._force_torque = sensor_columns_of_types(model, kinds.mjSENS_FORCE, kinds.mjSENS_TORQUE)
        hinges = np.flatnonzero(model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE)
        activations = np.arange(model.nq + model.nv, model.nq + model.nv + model.na)
        self._egocentric = np.concatenate([model.jnt_qposadr[hinges], model.nq + model.jnt_dofadr[hinges], activations])

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        parts = [
            states[..., self._egocentric],
            sensors[..., self._velocity],
            self._upright(states)[..., None],
            sensors[..., self._imu],
            np.arcsinh(sensors[..., self._force_torque]),
        ]
        return np.concatenate(parts, axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
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
