"""Cheetah: the suite's run, and ExoRL's run_backward."""

# pyright: reportIncompatibleMethodOverride=false, reportArgumentType=false
# dm_control comes without type information, and what is inferred from its code is too narrow.
from __future__ import annotations

from typing import Any

import numpy as np
from dm_control.rl import control
from dm_control.suite import cheetah

from ring_rl.agent.environments.vectorised import Controls, Sensors, States, sensor_columns, tolerance
from ring_rl.typing import Float64

__all__ = ["BatchedCheetah", "RunBackward", "make_run_backward"]

_RUN_SPEED = 10.0
_EPISODE_SECONDS = 10.0


class RunBackward(cheetah.Cheetah):
    """The suite's cheetah, paid for speed in the other direction."""

    def get_reward(self, physics: Any) -> float:
        """The part of 10 m/s that it runs backward."""
        return float(_reward(-physics.speed()))


def make_run_backward(*, flat_observation: bool) -> control.Environment:
    """The suite's model under `RunBackward`, with the suite's episode."""
    physics = cheetah.Physics.from_xml_string(*cheetah.get_model_and_assets())
    return control.Environment(physics, RunBackward(), time_limit=_EPISODE_SECONDS, flat_observation=flat_observation)


class BatchedCheetah:
    """Both tasks for whole arrays of states; `direction` is 1 forward, -1 backward."""

    def __init__(self, model: Any, *, direction: int) -> None:
        self.model = model
        self._direction = direction
        self._velocity = sensor_columns(model, "torso_subtreelinvel")

    def observe(self, states: States, sensors: Sensors) -> Float64[np.ndarray, "*rows O"]:
        """The state, all but the way travelled."""
        return states[..., 1:]

    def reward(self, states: States, sensors: Sensors, controls: Controls) -> Float64[np.ndarray, "*rows"]:
        """The part of 10 m/s that it runs."""
        return _reward(self._direction * sensors[..., self._velocity.start])


def _reward(speed: Any) -> Float64[np.ndarray, "*rows"]:
    return tolerance(speed, (_RUN_SPEED, np.inf), margin=_RUN_SPEED, value_at_margin=0, sigmoid="linear")
