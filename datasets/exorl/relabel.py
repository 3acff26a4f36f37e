"""Recomputes the rewards of tasks for a data set in ExoRL's layout and keeps them beside it.

    python datasets/exorl/relabel.py domain=walker

Settings: conf/relabel.yaml. What the data is: README.md beside this file.
"""

from __future__ import annotations

import dataclasses

import hydra
import numpy as np
from omegaconf import DictConfig

from ring_rl.agent.environments.domains import DOMAINS
from ring_rl.agent.episodes.load import DataConfig, load_rewards
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelabelScriptConfig:
    """Which rewards of which set."""

    domain: str
    tasks: tuple[str, ...] | None
    data: DataConfig

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ValueError(f"unknown domain {self.domain!r}; known are {', '.join(DOMAINS)}")
        strangers = [task for task in self.tasks or () if not task.startswith(f"{self.domain}_")]
        if strangers:
            raise ValueError(f"tasks must be of the domain {self.domain}, got {', '.join(strangers)}")


@hydra.main(config_path="../../conf", config_name="relabel", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Relabels what is missing and prints how good the episodes are at each task."""
    with exit_on_bad_input():
        config = from_mapping(RelabelScriptConfig, resolve(cfg))
        tasks = config.tasks or tuple(f"{config.domain}_{name}" for name in DOMAINS[config.domain].tasks)
        for task in tasks:
            rewards = load_rewards(config.data, task=task, progress=True)
            returns = np.array([each.sum(dtype=np.float64) for each in rewards])
            levels = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
            quantiles = ", ".join(f"{name} {np.quantile(returns, level):.1f}" for name, level in levels.items())
            print(f"{task}: {len(returns)} episodes; returns: {quantiles}", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
