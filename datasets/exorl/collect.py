"""Collects episodes in ExoRL's layout.

    python datasets/exorl/collect.py task=cartpole_swingup explorer=policy_search

Settings: conf/collect.yaml and conf/explorer/. What the data is: README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point


@hydra.main(config_path="../../conf", config_name="collect", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Collects what the configuration says and prints where it is and how good it is."""
    with exit_on_bad_input():
        from ring_rl.agent.exploration.collection import CollectionConfig, collect  # needs the simulator, and says so

        settings = resolve(cfg)
        if settings["root"] is None:
            settings["root"] = str(Path(__file__).resolve().parent / "data")
        if settings["algorithm"] is None:
            name = settings["explorer"]["name"]
            settings["algorithm"] = name if name == "rnd" else f"{name}_{settings['task']}"
        config = from_mapping(CollectionConfig, settings)
        episodes = collect(config, progress=True)
        quantiles = ", ".join(f"{name} {value:.0f}" for name, value in episodes.quantiles.items())
        print(f"{len(episodes.trajectories)} episodes in {config.folder}; returns: {quantiles}")


if __name__ == "__main__":
    run_entry_point(main)
