"""Jaco reach, as ExoRL defines it: a Kinova arm with three fingers brings its pinch point to one of four targets.

Built on dm_control's entities of the arm and the hand. Where ExoRL runs them in dm_control's composer, which computes
every observation after every physics step, here the compiled model runs in the suite's plain loop: the same states,
observations and rewards, tested against a composer environment, in less time.

The observation, 42 numbers, is that of the composer in its alphabetical order::

    arm   sine and cosine of 6 joints (12) | torques, as sign(x) log(1 + |x|) (6) | velocities (6)
    hand  positions of 3 joints (3) | velocities (3) | pinch point (3) | its rotation matrix, row by row (9)

Sizes and positions: `custom_dmc_tasks/jaco.py` of github.com/denisyarats/exorl.
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false
# MuJoCo and dm_control come without type information, and what is inferred from dm_control's code is too narrow.
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import mujoco
import numpy as np
from dm_control import mjcf
from dm_control.composer.initializers import ToolCenterPointInitializer
from dm_control.composer.variation import distributions
from dm_control.entities.manipulators import kinova
from dm_control.entities.manipulators.base import DOWN_QUATERNION
from dm_control.manipulation.shared import arenas, cameras
from dm_control.rl import control
from dm_control.suite import base

from ring_rl.agent.environments.quiet import without_simulator_warnings
from ring_rl.agent.environments.vectorised import (
    Controls,
    Sensors,
    States,
    sensor_columns,
    sensor_columns_of_types,
    tolerance,
)
from ring_rl.typing import Float64

__all__ = ["TARGETS", "BatchedReach", "Reach", "make_simulation"]

TARGETS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "reach_top_left": (-0.09, 0.09, 0.001),
        "reach_top_right": (0.09, 0.09, 0.001),
        "reach_bottom_left": (-0.09, -0.09, 0.001),
        "reach_bottom_right": (0.09, -0.09, 0.001),
    }
)
"""Where the pinch point is to be, in metres."""

_TARGET_RADIUS = 0.05
_CONTROL_SECONDS = 0.04
_EPISODE_SECONDS = 10.0
_ARM_OFFSET = (0.0, 0.4, 0.0)
_START_BOX = ((-0.2, -0.2, 0.02), (0.2, 0.2, 0.4))  # lower and upper corner of where the pinch point starts
_ARM_JOINTS = 6
_JOINTS = 9
_PINCH_SENSORS = {
    "framepos": "pinch_position",
    "framexaxis": "pinch_x",
    "frameyaxis": "pinch_y",
    "framezaxis": "pinch_z",
}


class Reach(base.Task):
    """Reward 1 within 5 cm of the target, falling with the distance; an episode starts anywhere above the table.

    Attributes:
        arm, hand: dm_control's entities, the hand attached to the arm.
        arena: Their root, whose `mjcf_model` is the scene.
    """

    def __init__(self, target: tuple[float, float, float]) -> None:
        super().__init__()
        self._target = np.array(target)
        self.arena = arenas.Standard()
        self.arm = kinova.JacoArm()
        self.hand = kinova.JacoHand(use_pinch_site_as_tcp=True)
        self.arm.attach(self.hand)
        self.arena.attach_offset(self.arm, offset=_ARM_OFFSET)
        scene = self.arena.mjcf_model
        scene.worldbody.add("camera", **cameras.FRONT_CLOSE._asdict())
        scene.worldbody.add(
            "site", name="target", type="sphere", size=[_TARGET_RADIUS], pos=target, rgba=(1.0, 0.0, 0.0, 0.3), group=0
        )
        # For the vectorised form, which has no kinematics of its own. Sensors do not act on what they measure.
        for kind, name in _PINCH_SENSORS.items():
            scene.sensor.add(kind, name=name, objtype="site", objname=self.hand.tool_center_point)
        self._place_hand = ToolCenterPointInitializer(
            self.hand, self.arm, position=distributions.Uniform(*_START_BOX), quaternion=DOWN_QUATERNION
        )

    def initialize_episode(self, physics: Any) -> None:
        """Closes the fingers by a random part and brings the pinch point, pointing down, to a random place.

        Raises:
            dm_control.composer.EpisodeInitializationError: 100 postures for 10 places all collide with something; it
                did not happen in 2000 episodes.
        """
        self.hand.set_grasp(physics, close_factors=self.random.uniform())
        with without_simulator_warnings():  # of postures on the way to one that fits
            self._place_hand(physics, self.random)
        super().initialize_episode(physics)

    def get_observation(self, physics: Any) -> dict[str, Float64[np.ndarray, " _"]]:
        """The parts of the observation in their order."""
        positions, velocities = physics.data.qpos, physics.data.qvel
        model = physics.model
        pinch = self.hand.tool_center_point.full_identifier
        return {
            "arm/joints_pos": _sine_cosine(positions[:_ARM_JOINTS]),
            "arm/joints_torque": _joint_torques(physics.data.sensordata, model.ptr),
            "arm/joints_vel": velocities[:_ARM_JOINTS].copy(),
            "hand/joints_pos": positions[_ARM_JOINTS:].copy(),
            "hand/joints_vel": velocities[_ARM_JOINTS:].copy(),
            "hand/pinch_site_pos": np.array(physics.named.data.site_xpos[pinch]),
            "hand/pinch_site_rmat": np.array(physics.named.data.site_xmat[pinch]),
        }

    def get_reward(self, physics: Any) -> float:
        """The reward of where the pinch point is."""
        pinch = physics.named.data.site_xpos[self.hand.tool_center_point.full_identifier]
        return float(_reward(np.linalg.norm(pinch - self._target)))


def make_simulation(task: str, *, flat_observation: bool) -> control.Environment:
    """The simulation of "reach_top_left" and the like: 250 control steps of 20 physics steps."""
    reach = Reach(TARGETS[task])
    physics = mjcf.Physics.from_mjcf_model(reach.arena.mjcf_model)
    return control.Environment(
        physics,
        reach,
        time_limit=_EPISODE_SECONDS,
        control_timestep=_CONTROL_SECONDS,
        flat_observation=flat_observation,
    )


class BatchedReach:
    """`Reach` for whole arrays of states."""

    def __init__(self, model: Any, *, task: str) -> None:
        self.model = model
        self._target = np.array(TARGETS[task])
        self._pinch_position, *self._pinch_axes = (sensor_columns(model, name) for name in _PINCH_SENSORS.values())

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        """See the module."""
        positions, velocities = states[..., :_JOINTS], states[..., _JOINTS:]
        rotation = np.stack([sensors[..., axis] for axis in self._pinch_axes], axis=-1)
        parts = [
            _sine_cosine(positions[..., :_ARM_JOINTS]),
            _joint_torques(sensors, self.model),
            velocities[..., :_ARM_JOINTS],
            positions[..., _ARM_JOINTS:],
            velocities[..., _ARM_JOINTS:],
            sensors[..., self._pinch_position],
            rotation.reshape(*rotation.shape[:-2], 9),
        ]
        return np.concatenate(parts, axis=-1)

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """The reward of where the pinch point is."""
        return _reward(np.linalg.norm(sensors[..., self._pinch_position] - self._target, axis=-1))


def _sine_cosine(angles: Float64[np.ndarray, "*rows joint"]) -> Float64[np.ndarray, "*rows pair"]:
    """Of each joint in turn: most of the arm's joints turn without end."""
    pairs = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    return pairs.reshape(*angles.shape[:-1], -1)


def _joint_torques(sensors: Sensors, model: Any) -> Float64[np.ndarray, "*rows joint"]:
    """Torques about the axes of the arm's joints, compressed."""
    torques = sensors[..., sensor_columns_of_types(model, mujoco.mjtSensor.mjSENS_TORQUE)]
    torques = torques.reshape(*sensors.shape[:-1], _ARM_JOINTS, 3)
    about_axes = np.einsum("...ij,ij->...i", torques, model.jnt_axis[:_ARM_JOINTS])
    return np.sign(about_axes) * np.log1p(np.abs(about_axes))


def _reward(distance: Any) -> Float64[np.ndarray, "*rows"]:
    return tolerance(distance, (0.0, _TARGET_RADIUS), margin=_TARGET_RADIUS)
