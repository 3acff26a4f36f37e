"""Makes the flat files from which a data set in ExoRL's layout is read episode by episode.

    python datasets/exorl/convert.py domain=walker

Settings: conf/convert.yaml. What the files are: `ring_rl.agent.episodes.store`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ring_rl.agent.environments.domains import DOMAINS
from ring_rl.agent.episodes.store import STORE_FOLDER
from ring_rl.agent.episodes.store_write import make_store
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Which set."""

    domain: str
    algorithm: str
    root: Path

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ValueError(f"unknown domain {self.domain!r}; known are {', '.join(DOMAINS)}")


@hydra.main(config_path="../../conf", config_name="convert", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Converts, unless that was done before, and prints where the result is."""
    with exit_on_bad_input():
        config = from_mapping(ConvertConfig, resolve(cfg))
        folder = config.root / config.domain / config.algorithm
        store = make_store(folder, progress=True)
        size = sum(path.stat().st_size for path in (folder / STORE_FOLDER).iterdir())
        print(f"{len(store.names)} episodes in {folder / STORE_FOLDER}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    run_entry_point(main)
