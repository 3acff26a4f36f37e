"""Recomputes the rewards of tasks for a data set in ExoRL's layout and keeps them beside it.

    python datasets/exorl/relabel.py task=walker_run

Settings: conf/relabel.yaml. What the data is: README.md beside this file.
"""

from __future__ import annotations

import dataclasses

import hydra
import numpy as np
from omegaconf import DictConfig

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.episodes.load import DataConfig, load_rewards
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelabelScriptConfig:
    """Which rewards of which set."""

    task: str
    every_task: bool
    data: DataConfig

    def __post_init__(self) -> None:
        parse_task(self.task)


@hydra.main(config_path="../../conf", config_name="relabel", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Relabels what is missing and prints how good the episodes are at each task."""
    with exit_on_bad_input():
        config = from_mapping(RelabelScriptConfig, resolve(cfg))
        domain, _ = parse_task(config.task)
        every_task = tuple(f"{domain}_{name}" for name in DOMAINS[domain].tasks)
        for task in every_task if config.every_task else (config.task,):
            rewards = load_rewards(config.data, task=task, progress=True)
            returns = np.array([each.sum(dtype=np.float64) for each in rewards])
            levels = {"min": 0.0, "median": 0.5, "p90": 0.9, "max": 1.0}
            quantiles = ", ".join(f"{name} {np.quantile(returns, level):.1f}" for name, level in levels.items())
            print(f"{task}: {len(returns)} episodes; returns: {quantiles}", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
