"""ExoRL's point-mass maze: a ball on a table with a cross of walls, from the top left room to one of four rooms.

Seen from above; units are metres. The ball starts anywhere in the outer corner of the top left room::

    +-----------------+   the table: 0.6 wide, with walls around it
    | .s    |         |   s: starts, x in [-0.29, -0.15], y in [0.15, 0.29]
    |   t   |    t    |   t: targets at (±0.15, ±0.15), of radius 0.015
    |       |         |   the cross: arms 0.18 long, 0.04 thick
    |   ----+----     |   so that 0.1 is left between an arm's end and the wall
    |       |         |
    |   t   |    t    |
    |       |         |
    +-----------------+

Sizes, positions and rewards: `custom_dmc_tasks/point_mass_maze.py` and its models in github.com/denisyarats/exorl,
which draws its starts from NumPy's global stream; here they come from the environment's seed like everything else.
"""

# pyright: reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false, reportArgumentType=false
# MuJoCo and dm_control come without type information, and what is inferred from dm_control's code is too narrow.
from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from dm_control import mujoco
from dm_control.rl import control
from dm_control.suite import base, common

from ring_rl.agent.environments.vectorised import Controls, Sensors, States, tolerance
from ring_rl.typing import Float64

__all__ = ["TARGETS", "BatchedMaze", "Maze", "make_simulation"]

TARGETS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "reach_top_left": (-0.15, 0.15),
        "reach_top_right": (0.15, 0.15),
        "reach_bottom_left": (-0.15, -0.15),
        "reach_bottom_right": (0.15, -0.15),
    }
)
"""Where the ball is to be, (x, y) in metres."""

_TARGET_RADIUS = 0.015
_EPISODE_SECONDS = 20.0
_START_BOX = ((-0.29, 0.15), (-0.15, 0.29))  # lower and upper corner

_MODEL = """
<mujoco model="point mass maze">
  <include file="./common/skybox.xml"/>
  <include file="./common/visual.xml"/>
  <include file="./common/materials.xml"/>
  <option timestep="0.02"/>
  <worldbody>
    <light name="light" pos="0 0 1"/>
    <camera name="fixed" pos="0 0 .75"/>
    <geom name="table" type="plane" size=".3 .3 .1" material="grid"/>
    <geom name="west" type="plane" pos="-.3 0 .02" zaxis="1 0 0" size=".02 .3 .02" material="decoration"/>
    <geom name="south" type="plane" pos="0 -.3 .02" zaxis="0 1 0" size=".3 .02 .02" material="decoration"/>
    <geom name="east" type="plane" pos=".3 0 .02" zaxis="-1 0 0" size=".02 .3 .02" material="decoration"/>
    <geom name="north" type="plane" pos="0 .3 .02" zaxis="0 -1 0" size=".3 .02 .02" material="decoration"/>
    <geom name="across" type="box" pos="0 0 .02" size=".18 .02 .02" material="site"/>
    <geom name="along" type="box" pos="0 0 .02" size=".02 .18 .02" material="site"/>
    <body name="ball" pos="0 0 .01">
      <joint name="x" type="slide" axis="1 0 0" limited="true" range="-.29 .29" damping="1"/>
      <joint name="y" type="slide" axis="0 1 0" limited="true" range="-.29 .29" damping="1"/>
      <geom name="ball" type="sphere" size=".01" mass=".3" material="self"/>
    </body>
    <site name="target" pos="{x} {y} .01" type="sphere" size="{radius}" material="target"/>
  </worldbody>
  <actuator>
    <motor name="x" joint="x" gear=".1" ctrlrange="-1 1" ctrllimited="true"/>
    <motor name="y" joint="y" gear=".1" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
</mujoco>
"""


class Maze(base.Task):
    """Reward 1 at the target with no control, falling with the distance and, by up to a fifth, with the control."""

    def __init__(self, target: tuple[float, float]) -> None:
        super().__init__()
        self._target = np.array(target)

    def initialize_episode(self, physics: Any) -> None:
        """Lays the ball, at rest, into the corner of the top left room."""
        physics.data.qpos[:] = self.random.uniform(*_START_BOX)
        super().initialize_episode(physics)

    def get_observation(self, physics: Any) -> dict[str, Float64[np.ndarray, " 2"]]:
        """Position and velocity."""
        return {"position": physics.position(), "velocity": physics.velocity()}

    def get_reward(self, physics: Any) -> float:
        """Depends on the control too."""
        return float(_reward(physics.position(), physics.control(), self._target))


def make_simulation(task: str, *, flat_observation: bool) -> control.Environment:
    """The simulation of "reach_top_left" and the like: 1000 control steps of one physics step."""
    x, y = TARGETS[task]
    physics = mujoco.Physics.from_xml_string(_MODEL.format(x=x, y=y, radius=_TARGET_RADIUS), common.ASSETS)
    return control.Environment(physics, Maze((x, y)), time_limit=_EPISODE_SECONDS, flat_observation=flat_observation)


class BatchedMaze:
    """`Maze` for whole arrays of states."""

    def __init__(self, model: Any, *, task: str) -> None:
        self.model = model
        self._target = np.array(TARGETS[task])

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        """Position and velocity, which are the state."""
        return states

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """Depends on the control too."""
        return _reward(states[..., :2], controls, self._target)


def _reward(
    position: Float64[np.ndarray, "*rows 2"],
    controls: Float64[np.ndarray, "*rows 2"],
    target: Float64[np.ndarray, " 2"],
) -> Float64[np.ndarray, "*rows"]:
    distance = np.linalg.norm(position - target, axis=-1)
    near_target = tolerance(distance, (0.0, _TARGET_RADIUS), margin=_TARGET_RADIUS)
    small_control = tolerance(controls, margin=1, value_at_margin=0, sigmoid="quadratic").mean(axis=-1)
    return near_target * (small_control + 4) / 5
