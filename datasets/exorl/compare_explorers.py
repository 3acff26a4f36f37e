"""Compares what explorers have collected in one domain; conf/compare_explorers.yaml documents every key."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point


@hydra.main(config_path="../../conf", config_name="compare_explorers", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Compares what the configuration names, writes it and prints the figures on one line."""
    with exit_on_bad_input():
        from ring_rl.agent.exploration.comparison import ComparisonConfig, compare_explorers

        config = from_mapping(ComparisonConfig, resolve(cfg))
        compared = compare_explorers(config, progress=True)
        print(f"results {config.output}")
        print(" ".join(f"{name}={value:.4g}" for name, value in compared.figures().items()))


if __name__ == "__main__":
    run_entry_point(main)
