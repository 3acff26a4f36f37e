"""The domains of ExoRL: their dimensions and tasks, known without a simulator."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DOMAINS", "DomainSpec", "parse_task", "task_names"]


@dataclass(frozen=True)
class DomainSpec:
    """The sizes of one domain.

    Attributes:
        observation_dim: O, entries of the flat observation.
        action_dim: A.
        physics_dim: P, entries of the simulator's state: nq + nv + na (activations, in quadruped only).
        episode_steps: L, control steps until the time limit.
        tasks: As the second part of a task's name.
    """

    observation_dim: int
    action_dim: int
    physics_dim: int
    episode_steps: int
    tasks: tuple[str, ...]


_REACH = ("reach_top_left", "reach_top_right", "reach_bottom_left", "reach_bottom_right")

DOMAINS: Mapping[str, DomainSpec] = MappingProxyType(
    {
        "cartpole": DomainSpec(5, 1, 4, 1000, ("balance", "balance_sparse", "swingup", "swingup_sparse")),
        "cheetah": DomainSpec(17, 6, 18, 1000, ("run", "run_backward")),
        "jaco": DomainSpec(42, 9, 18, 250, _REACH),
        "point_mass_maze": DomainSpec(4, 2, 4, 1000, _REACH),
        "quadruped": DomainSpec(78, 12, 57, 1000, ("walk", "run")),
        "walker": DomainSpec(24, 6, 18, 1000, ("stand", "walk", "run", "flip")),
    }
)


def task_names() -> tuple[str, ...]:
    """Every task, "cartpole_balance" and so on, in alphabetical order of the domains."""
    return tuple(f"{domain}_{task}" for domain, spec in DOMAINS.items() for task in spec.tasks)


def parse_task(name: str) -> tuple[str, str]:
    """Splits "cartpole_swingup" into ("cartpole", "swingup").

    Raises:
        ValueError: unknown task, with all known ones.
    """
    for domain, spec in DOMAINS.items():
        task = name.removeprefix(f"{domain}_")
        if task == name:
            continue
        if task in spec.tasks:
            return domain, task
    nearest = difflib.get_close_matches(name, task_names(), n=1)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(f"unknown task {name!r}; {guess}known are {', '.join(task_names())}")
