"""Turns folders of training runs into one table and plots; conf/collect_runs.yaml documents every key."""

import dataclasses
import json
import re
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.markdown import Markdown

from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.provenance import git_commit, versions
from ring_rl.training.run_plots import plot_curves, plot_final_by_setting
from ring_rl.training.run_report import markdown, runs_csv, table_csv
from ring_rl.training.run_table import RunTable, make_table
from ring_rl.training.saved_runs import Goal, find_runs, read_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectRunsConfig:
    """Which runs, which metrics, and where the table goes."""

    runs: tuple[Path, ...]
    output: Path
    overwrite: bool
    minimize: tuple[str, ...]
    maximize: tuple[str, ...]
    seed_key: str
    steps_key: str
    keys: tuple[str, ...] | None
    ignore: tuple[str, ...]
    largest_curve_count: int

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no folders to collect from; give runs=[path,...]")
        if not self.goals:
            raise ValueError("no metrics to collect; name some in minimize or maximize")
        if both := set(self.minimize) & set(self.maximize):
            raise ValueError(f"{', '.join(sorted(both))} stands in minimize and in maximize; leave it in one of them")
        if self.largest_curve_count < 1:
            raise ValueError(f"largest_curve_count must be at least 1, got {self.largest_curve_count}")

    @property
    def goals(self) -> dict[str, Goal]:
        """The metrics in order, and which way each is better."""
        return {**dict.fromkeys(self.minimize, "minimize"), **dict.fromkeys(self.maximize, "maximize")}


def file_name(metric: str) -> str:
    """A metric's name as a part of a file's: evaluation/return becomes evaluation_return."""
    return re.sub(r"[^A-Za-z0-9]+", "_", metric)


def draw(table: RunTable, config: CollectRunsConfig) -> list[Path]:
    """The curves of every metric, and where settings differ, the final value against each of them."""
    pictures = []
    for metric in table.goals:
        pictures.append(config.output / f"{file_name(metric)}_curves.png")
        plot_curves(table, metric, pictures[-1], largest_count=config.largest_curve_count)
        if table.keys:
            pictures.append(config.output / f"{file_name(metric)}_final.png")
            plot_final_by_setting(table, metric, pictures[-1])
    return pictures


def collect_runs(config: CollectRunsConfig) -> None:
    """Reads the runs, prints the table, writes it as CSV and Markdown, draws it."""
    pictures = [f"{file_name(metric)}_{which}.png" for metric in config.goals for which in ("curves", "final")]
    if not config.overwrite:
        refuse_existing(config.output, ["table.csv", "table.md", "runs.csv", "summary.json", *pictures])
    runs = [read_run(path, steps_key=config.steps_key, goals=config.goals) for path in find_runs(config.runs)]
    table = make_table(runs, goals=config.goals, seed_key=config.seed_key, ignore=config.ignore, keys=config.keys)
    config.output.mkdir(parents=True, exist_ok=True)
    counted = len(runs) - len(table.left_out)
    summary = {
        "config": to_mapping(config),
        "commit": git_commit(),
        "versions": versions("ring_rl", "numpy", "scipy"),
        "configurations": len(table.rows),
        "runs": len(runs),
        "counted": counted,
        "left_out": {str(run.path): run.problem for run in table.left_out},
        # From which step, commit and devices every run was started.
        "starts": {str(run.path): run.starts for row in table.rows for run in row.runs},
    }
    for name, text in (
        ("table.csv", table_csv(table)),
        ("runs.csv", runs_csv(table)),
        ("table.md", markdown(table)),
        ("summary.json", json.dumps(summary, indent=2) + "\n"),
    ):
        write_whole(config.output / name, text)
    drawn = draw(table, config)
    # Wide enough for every cell, whatever the terminal: a table that is cut says nothing.
    console = Console(width=max(140, Console().width))
    console.print(Markdown(markdown(table)))
    for picture in drawn:
        console.print(f"picture {picture}", soft_wrap=True, highlight=False)
    best = " ".join(f"{file_name(metric)}={table.rows[0].final[metric].mean:.6g}" for metric in table.goals)
    print(f"configurations={len(table.rows)} runs={len(runs)} counted={counted} left_out={len(table.left_out)} {best}")


@hydra.main(config_path="../conf", config_name="collect_runs", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a table."""
    with exit_on_bad_input():
        collect_runs(from_mapping(CollectRunsConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
