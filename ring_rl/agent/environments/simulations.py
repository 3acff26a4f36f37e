"""The simulation behind a task: dm_control's own where the suite has it (arXiv:1801.00690), else this package's.

Needs the simulator: `pip install 'ring_rl[simulator]'`.
"""

from __future__ import annotations

import warnings

from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.environments.quiet import without_simulator_warnings

try:
    with warnings.catch_warnings():  # without a display dm_control's search for one warns; nothing is drawn here
        warnings.simplefilter("ignore")
        from dm_control import suite
        from dm_control.rl import control
except ImportError as error:
    raise ImportError(
        f"simulations need the simulator ({error}); install it with: pip install 'ring_rl[simulator]'"
    ) from error

from ring_rl.agent.environments import cheetah, jaco, point_mass_maze, walker

__all__ = ["load_simulation"]


def load_simulation(task: str, *, flat_observation: bool) -> control.Environment:
    """Builds the simulation of "cartpole_swingup" and the like.

    Args:
        task: Its name.
        flat_observation: Whether observations come as one array, {"observations": ...}, or part by part.

    Raises:
        ValueError: unknown task, with the known ones.
    """
    domain, name = parse_task(task)
    with without_simulator_warnings():
        match domain, name:
            case "cheetah", "run_backward":
                return cheetah.make_run_backward(flat_observation=flat_observation)
            case "jaco", _:
                return jaco.make_simulation(name, flat_observation=flat_observation)
            case "point_mass_maze", _:
                return point_mass_maze.make_simulation(name, flat_observation=flat_observation)
            case "walker", "flip":
                return walker.make_flip(flat_observation=flat_observation)
            case _:
                return suite.load(domain, name, environment_kwargs={"flat_observation": flat_observation})
