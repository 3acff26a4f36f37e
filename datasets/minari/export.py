"""Writes a data set in ExoRL's layout as a Minari data set.

    python datasets/minari/export.py task=cartpole_swingup dataset_id=ring_rl/cartpole/policy_search-v0

Settings: conf/export_minari.yaml. What becomes of what: README.md beside this file.
"""

from __future__ import annotations

import dataclasses
import json

import hydra
from omegaconf import DictConfig

from ring_rl.agent.environments.domains import parse_task
from ring_rl.agent.episodes.load import DataConfig, load_episodes
from ring_rl.agent.episodes.minari_write import MinariCard, check_new_dataset, write_minari
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which episodes become which set."""

    task: str
    dataset_id: str
    data: DataConfig
    card: MinariCard


def export(config: ExportConfig) -> None:
    """Reads, writes, and prints where the set is."""
    check_new_dataset(config.dataset_id)
    episodes = load_episodes(config.data, task=config.task, progress=True, physics=True)
    record = config.data.root / parse_task(config.task)[0] / config.data.algorithm / "collection.json"
    folder = write_minari(
        config.dataset_id,
        episodes,
        task=config.task,
        action_repeat=config.data.action_repeat,
        card=config.card,
        collection=json.loads(record.read_text()) if record.exists() else None,
        progress=True,
    )
    print(f"{len(episodes.trajectories)} episodes in {folder}")
    print(f"read them anywhere with minari.load_dataset({config.dataset_id!r})")


@hydra.main(config_path="../../conf", config_name="export_minari", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a data set."""
    with exit_on_bad_input():
        export(from_mapping(ExportConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
