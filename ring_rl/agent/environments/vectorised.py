"""What the vectorised tasks share: the types of their arrays, the suite's reward shape, sensors by name.

Needs the simulator; `simulations.py` says so where it is missing.
"""

# pyright: reportAttributeAccessIssue=false
# MuJoCo's names come from a compiled module without type information.
from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from dm_control.utils import rewards

from ring_rl.typing import Float64, Int

__all__ = ["Controls", "Sensors", "States", "sensor_columns", "sensor_columns_of_types", "tolerance"]

States = Float64[np.ndarray, "*rows P"]
Sensors = Float64[np.ndarray, "*rows sensor"]
Controls = Float64[np.ndarray, "*rows A"]


def tolerance(
    values: Float64[np.ndarray, "*rows"],
    bounds: tuple[float, float] = (0.0, 0.0),
    *,
    margin: float = 0.0,
    value_at_margin: float = 0.1,
    sigmoid: str = "gaussian",
) -> Float64[np.ndarray, "*rows"]:
    """1 inside the bounds, falling to `value_at_margin` at a distance of `margin` from them (arXiv:1801.00690)."""
    return np.asarray(
        rewards.tolerance(values, bounds, margin=margin, value_at_margin=value_at_margin, sigmoid=sigmoid)
    )


def sensor_columns(model: Any, name: str) -> slice:
    """Where a sensor stands in `sensordata`.

    Raises:
        ValueError: the `mujoco.MjModel` has no such sensor.
    """
    sensor = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SENSOR, name)
    if sensor < 0:
        raise ValueError(f"the model has no sensor {name!r}")
    return slice(int(model.sensor_adr[sensor]), int(model.sensor_adr[sensor] + model.sensor_dim[sensor]))


def sensor_columns_of_types(model: Any, *types: Any) -> Int[np.ndarray, " column"]:
    """Where all sensors of some `mujoco.mjtSensor` types stand in `sensordata`, in the model's order."""
    sensors = np.flatnonzero(np.isin(model.sensor_type, [int(each) for each in types]))
    return np.concatenate([np.arange(model.sensor_adr[i], model.sensor_adr[i] + model.sensor_dim[i]) for i in sensors])
