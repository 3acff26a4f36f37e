"""Walker: the suite's stand, walk and run, and ExoRL's flip."""

# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false, reportArgumentType=false
# MuJoCo and dm_control come without type information, and what is inferred from dm_control's code is too narrow.
from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import mujoco
import numpy as np
from dm_control.rl import control
from dm_control.suite import walker

from ring_rl.agent.environments.vectorised import Controls, Sensors, States, sensor_columns, tolerance
from ring_rl.typing import Float64

__all__ = ["BatchedWalker", "Flip", "make_flip"]

_MOVE_SPEEDS = {"stand": 0.0, "walk": 1.0, "run": 8.0}
_SPIN = 5.0
_CONTROL_SECONDS = 0.025
_EPISODE_SECONDS = 25.0
_SPIN_SENSOR = "torso_subtreeangmom"


class Flip(walker.PlanarWalker):
    """The suite's walker, paid for turning somersaults."""

    def __init__(self) -> None:
        super().__init__(move_speed=0)

    def get_reward(self, physics: Any) -> float:
        """Standing, times the part of 5 kg m²/s that it turns about the axis across."""
        standing = _stand_reward(physics.torso_height(), physics.torso_upright())
        return float(_flip_reward(standing, physics.named.data.sensordata[_SPIN_SENSOR][1]))


def make_flip(*, flat_observation: bool) -> control.Environment:
    """The suite's model under `Flip`, with the suite's episode and a sensor of the angular momentum."""
    xml, assets = walker.get_model_and_assets()
    root = ElementTree.fromstring(xml)
    sensors = root.find("sensor")
    if sensors is None:
        raise ValueError("dm_control's walker has no sensors; this version of dm_control is not supported")
    # For the vectorised form. A sensor does not act on what it measures.
    ElementTree.SubElement(sensors, "subtreeangmom", name=_SPIN_SENSOR, body="torso")
    physics = walker.Physics.from_xml_string(ElementTree.tostring(root, encoding="unicode"), assets)
    return control.Environment(
        physics,
        Flip(),
        time_limit=_EPISODE_SECONDS,
        control_timestep=_CONTROL_SECONDS,
        flat_observation=flat_observation,
    )


class BatchedWalker:
    """All tasks for whole arrays of states. A planar body: a link's angle is the sum of the angles on the way to it."""

    def __init__(self, model: Any, *, task: str) -> None:
        self.model = model
        self._task = task
        self._velocity = sensor_columns(model, "torso_subtreelinvel")
        self._spin = sensor_columns(model, _SPIN_SENSOR) if task == "flip" else None
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
        """Cosine and sine of every link's angle, the torso's height, velocities."""
        angles = self._body_angles(states)
        orientations = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        orientations = orientations.reshape(*angles.shape[:-1], -1)
        height = self._torso_height + states[..., self._rootz, None]
        return np.concatenate([orientations, height, states[..., self.model.nq :]], axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """Standing, times the part of the speed or of the angular momentum that the task asks for."""
        upright = np.cos(self._body_angles(states)[..., self._torso])
        stand_reward = _stand_reward(self._torso_height + states[..., self._rootz], upright)
        if self._spin is not None:
            return _flip_reward(stand_reward, sensors[..., self._spin.start + 1])
        move_speed = _MOVE_SPEEDS[self._task]
        if move_speed == 0:
            return stand_reward
        speed, bounds = sensors[..., self._velocity.start], (move_speed, np.inf)
        move_reward = tolerance(speed, bounds, margin=move_speed / 2, value_at_margin=0.5, sigmoid="linear")
        return stand_reward * (5 * move_reward + 1) / 6

    def _body_angles(self, states: States) -> Float64[np.ndarray, "*rows body"]:
        return states[..., : self.model.nq] @ self._angles


def _stand_reward(height: Any, upright: Any) -> Float64[np.ndarray, "*rows"]:
    standing = tolerance(height, (1.2, np.inf), margin=0.6)
    return (3 * standing + (1 + upright) / 2) / 4


def _flip_reward(stand_reward: Any, angular_momentum: Any) -> Float64[np.ndarray, "*rows"]:
    spin_reward = tolerance(angular_momentum, (_SPIN, np.inf), margin=_SPIN, value_at_margin=0, sigmoid="linear")
    return stand_reward * (5 * spin_reward + 1) / 6
