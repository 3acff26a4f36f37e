"""The observations and rewards of every task for whole arrays of states.

dm_control computes them for one state at a time. Here every function takes any leading axes (`*rows`) and
finds what it can from the joints alone, so that nothing but velocities, forces and an arm's kinematics is asked of
the simulator. Tests hold each of them against the task's own simulation.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ring_rl.agent.environments.simulations import load_simulation

# isort: split
# The line above makes sure that the simulator is there, with its remedy and without its warnings; so it is first.
from ring_rl.agent.environments.cartpole import BatchedCartpole
from ring_rl.agent.environments.cheetah import BatchedCheetah
from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.environments.jaco import BatchedReach
from ring_rl.agent.environments.point_mass_maze import BatchedMaze
from ring_rl.agent.environments.quadruped import BatchedQuadruped
from ring_rl.agent.environments.vectorised import Controls, Sensors, States
from ring_rl.agent.environments.walker import BatchedWalker
from ring_rl.typing import Float64

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
            return BatchedCartpole(model, sparse=name.endswith("_sparse"))
        case "cheetah":
            return BatchedCheetah(model, direction={"run": 1, "run_backward": -1}[name])
        case "jaco":
            return BatchedReach(model, task=name)
        case "point_mass_maze":
            return BatchedMaze(model, task=name)
        case "quadruped":
            return BatchedQuadruped(model, task=name)
        case "walker":
            return BatchedWalker(model, task=name)
        case _:
            raise ValueError(f"task {task!r} has no vectorised form; use environment.make_environment")
