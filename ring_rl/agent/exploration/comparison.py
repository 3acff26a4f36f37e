"""Sets of one domain side by side: what of the state space they have seen, and what they return on every task.

<output>/coverage.csv   a row a set and resample          coverage.png   where the observations lie
         returns.csv    a row a set, task and episode     returns.png    their histograms
         table.md       both as tables                    summary.json   figures, settings, versions
         <set>/card.md, returns.png                       each set alone
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ring_rl.agent.environments.domains import DOMAINS
from ring_rl.agent.episodes.exorl import read_episodes
from ring_rl.agent.episodes.relabel_cache import RelabelConfig
from ring_rl.agent.exploration.card import (
    QUANTILES,
    card_facts,
    plot_returns,
    quantile_rows,
    returns_of_every_task,
    write_card,
)
from ring_rl.agent.exploration.coverage import Coverage, CoverageConfig, SharedCoordinates, coverage
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import to_mapping
from ring_rl.training.plots import write_figure
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.tables import markdown_table
from ring_rl.typing import Float32, Float64

__all__ = ["Compared", "ComparisonConfig", "compare_explorers"]

OUTPUTS = ("coverage.csv", "coverage.png", "returns.csv", "returns.png", "table.md", "summary.json")


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Which sets, how coverage is measured, and where results go."""

    domain: str
    algorithms: tuple[str, ...]
    root: Path
    episodes: int | None
    stride: int
    coverage: CoverageConfig
    relabel: RelabelConfig
    seed: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ValueError(f"unknown domain {self.domain!r}; known are {', '.join(DOMAINS)}")
        if len(set(self.algorithms)) < max(2, len(self.algorithms)):
            raise ValueError(f"algorithms must name at least two sets, none twice; got {list(self.algorithms)}")
        if self.episodes is not None and self.episodes < 2:
            raise ValueError(f"episodes must be at least 2 or null, got {self.episodes}")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


@dataclass(frozen=True, eq=False)
class Compared:
    """What `compare_explorers` found, by set."""

    episodes: int
    coverage: Mapping[str, Coverage]
    returns: Mapping[str, Mapping[str, Float64[np.ndarray, " E"]]]

    def figures(self) -> dict[str, float]:
        """Mean coverage of every set, by name."""
        cells = {f"{name}_cells": float(each.occupied_cells.mean()) for name, each in self.coverage.items()}
        return {
            **cells,
            **{f"{name}_entropy": float(each.particle_entropy.mean()) for name, each in self.coverage.items()},
        }


def compare_explorers(config: ComparisonConfig, *, progress: bool) -> Compared:
    """Reads the sets, measures, and writes everything to `config.output`.

    Raises:
        FileExistsError: results are there already.
        FileNotFoundError: a set is missing; the message says how to collect it.
        ValueError: sets that cannot be compared, or damaged ones.
    """
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    folders = {name: config.root / config.domain / name for name in config.algorithms}
    records = {name: _record(folder, config.domain) for name, folder in folders.items()}
    count = config.episodes or min(_count(folder) for folder in folders.values())
    observations = {
        name: _observations(folder, episodes=count, stride=config.stride, progress=progress)
        for name, folder in folders.items()
    }
    covered = coverage(observations, config.coverage, seed=config.seed)
    returns = {
        name: returns_of_every_task(
            folder,
            domain=config.domain,
            recorded_task=str(records[name]["settings"]["task"]),
            config=config.relabel,
            progress=progress,
        )
        for name, folder in folders.items()
    }
    compared = Compared(episodes=count, coverage=covered, returns=returns)
    _write(config, compared, observations, records)
    return compared


def _count(folder: Path) -> int:
    return sum(1 for _ in (folder / "buffer").glob("episode_*_*.npz"))


def _record(folder: Path, domain: str) -> dict:
    path = folder / "collection.json"
    try:
        record = json.loads(path.read_text())
        _ = record["settings"]["task"], record["settings"]["explorer"]["name"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no collected set at {folder}; collect one with `python datasets/exorl/collect.py "
            f"task={domain}_{DOMAINS[domain].tasks[0]} explorer={folder.name} algorithm={folder.name}`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of a collection ({error}); collect the set again") from None
    return record


def _observations(folder: Path, *, episodes: int, stride: int, progress: bool) -> Float32[np.ndarray, "E L O"]:
    found = read_episodes(folder / "buffer", max_episodes=episodes, progress=progress).trajectories
    if len(found) < episodes:
        raise ValueError(f"{folder} holds {len(found)} episodes, fewer than {episodes}; set episodes={len(found)}")
    return np.stack([trajectory.observations[::stride] for trajectory in found])


def _write(
    config: ComparisonConfig,
    compared: Compared,
    observations: Mapping[str, Float32[np.ndarray, "E L O"]],
    records: Mapping[str, dict],
) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    plot_returns(compared.returns, config.output / "returns.png", title=f"{config.domain}: returns by explorer")
    _plot_coverage(config, observations)
    _write_csv(
        config.output / "coverage.csv",
        ["set", "resample", "occupied_cells", "particle_entropy"],
        [
            [name, index, int(cells), f"{entropy:.6g}"]
            for name, each in compared.coverage.items()
            for index, (cells, entropy) in enumerate(zip(each.occupied_cells, each.particle_entropy, strict=True))
        ],
    )
    _write_csv(
        config.output / "returns.csv",
        ["set", "task", "episode", "return"],
        [
            [name, task, index, f"{value:.6g}"]
            for name, by_task in compared.returns.items()
            for task, values in by_task.items()
            for index, value in enumerate(values)
        ],
    )
    write_whole(config.output / "table.md", _tables(compared))
    summary = {
        "config": {**to_mapping(config), "root": None, "output": None},
        "episodes_compared": compared.episodes,
        "figures": compared.figures(),
        "collections": dict(records),
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "mujoco", "dm-control", "numpy"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, by_task in compared.returns.items():
        (config.output / name).mkdir(exist_ok=True)
        write_card(config.output / name, by_task, title=f"{config.domain}/{name}", facts=card_facts(records[name]))


def _write_csv(path: Path, head: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def _tables(compared: Compared) -> str:
    rows = [["set", "occupied cells", "least, greatest", "particle entropy", "least, greatest"]]
    for name, each in compared.coverage.items():
        cells, entropy = each.occupied_cells, each.particle_entropy
        rows.append(
            [
                name,
                f"{cells.mean():.0f}",
                f"{cells.min()}, {cells.max()}",
                f"{entropy.mean():.3f}",
                f"{entropy.min():.3f}, {entropy.max():.3f}",
            ]
        )
    tables = [f"Coverage, {compared.episodes} episodes of each:\n", markdown_table(rows), "Returns:\n"]
    head = ["task", "set", "episodes", *QUANTILES]
    returns = [
        [task, name, str(len(by_task[task])), *quantile_rows(by_task[task])]
        for task in next(iter(compared.returns.values()))
        for name, by_task in compared.returns.items()
    ]
    return "\n".join([*tables, markdown_table([head, *returns])])


def _plot_coverage(config: ComparisonConfig, observations: Mapping[str, Float32[np.ndarray, "E L O"]]) -> None:
    """Densities in the plane of the first two shared directions, on one scale."""
    plane = SharedCoordinates.of(observations, components=2)
    edges = [np.linspace(low, high, 81) for low, high in zip(plane.low, plane.high, strict=True)]
    points = {name: plane.project(each).reshape(-1, 2) for name, each in observations.items()}
    densities = {name: np.histogram2d(*each.T, bins=edges)[0] / len(each) for name, each in points.items()}
    least = min(density[density > 0].min() for density in densities.values())
    norm = LogNorm(vmin=least, vmax=max(density.max() for density in densities.values()))
    figure = Figure(figsize=(3.6 * len(densities), 3.6), layout="constrained")
    panels = figure.subplots(1, len(densities), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, density) in zip(panels, densities.items(), strict=True):
        axes.pcolormesh(*edges, np.ma.masked_equal(density.T, 0), norm=norm)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("first direction")
    panels[0].set_ylabel("second direction")
    figure.suptitle(f"{config.domain}: where the observations lie, {len(next(iter(observations.values())))} episodes")
    write_figure(figure, config.output / "coverage.png")
