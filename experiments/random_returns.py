"""Returns of uniformly random actions on every task; conf/random_returns.yaml documents every key."""

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.statistics import estimate
from ring_rl.training.tables import markdown_table
from ring_rl.typing import Float64

OUTPUTS = ("returns.csv", "table.md", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomReturnsConfig:
    """Which tasks, how many episodes, and what others found."""

    tasks: tuple[str, ...]
    episodes: int
    rows: int
    threads: int
    seed: int
    published_returns: dict[str, float]
    published_episodes: int
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        for task in (*self.tasks, *self.published_returns):
            parse_task(task)
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must name at least one task, and none twice; got {list(self.tasks)}")
        if self.episodes < 2:
            raise ValueError(f"episodes must be at least 2, for an interval; got {self.episodes}")
        for name in ("rows", "threads", "published_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def random_returns(
    config: RandomReturnsConfig, task: str, on_steps: Callable[[int], None]
) -> Float64[np.ndarray, " episodes"]:
    """The return of each episode. Episode i is the same whatever `rows` and `threads` are.

    Args:
        config: See there.
        task: "walker_walk" and the like.
        on_steps: Called with the number of control steps that were just simulated.
    """
    from ring_rl.agent.environments.batched_physics import BatchedPhysics

    domain = DOMAINS[parse_task(task)[0]]
    returns = []
    with BatchedPhysics(task, threads=config.threads) as physics:
        for first in range(0, config.episodes, config.rows):
            episodes = range(first, min(first + config.rows, config.episodes))
            streams = [np.random.SeedSequence([config.seed, episode]) for episode in episodes]
            start = physics.start([int(stream.generate_state(1)[0]) for stream in streams])
            shape = (domain.episode_steps, domain.action_dim)
            actions = [np.random.default_rng(stream).uniform(-1, 1, shape).astype(np.float32) for stream in streams]
            steps = physics.play(start.physics, np.stack(actions), action_hold=1, warm_starts=start.warm_starts)
            returns.append(steps.rewards.sum(axis=1))
            on_steps(steps.rewards.size)
    return np.concatenate(returns)


def standard_errors_apart(config: RandomReturnsConfig, task: str, returns: Float64[np.ndarray, " episodes"]) -> float:
    """(our mean - the published one) / (s √(1/n + 1/m)), for n episodes of ours and m published; NaN if none are.

    s is the deviation of our episodes: how far the published ones spread is not known.
    """
    if task not in config.published_returns:
        return math.nan
    error = returns.std(ddof=1) * math.sqrt(1 / len(returns) + 1 / config.published_episodes)
    return (returns.mean() - config.published_returns[task]) / error


def table_rows(config: RandomReturnsConfig, returns: Mapping[str, Float64[np.ndarray, " episodes"]]) -> list[list[str]]:
    """The header and a row a task, as text."""
    rows = [["task", "mean", "deviation of episodes", "highest", "published", "standard errors apart"]]
    for task, of_task in returns.items():
        published = [""] * 2
        if task in config.published_returns:
            apart = standard_errors_apart(config, task, of_task)
            published = [f"{config.published_returns[task]:.1f}", f"{apart:+.1f}"]
        numbers = [format(estimate(of_task), ".1f"), f"{of_task.std(ddof=1):.1f}", f"{of_task.max():.1f}"]
        rows.append([task, *numbers, *published])
    return rows


def write_results(
    config: RandomReturnsConfig, returns: Mapping[str, Float64[np.ndarray, " episodes"]], seconds: float
) -> None:
    """Every episode, the table, and where the numbers come from."""
    config.output.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "episode", "return"])
    writer.writerows([task, i, f"{value:.6g}"] for task, of_task in returns.items() for i, value in enumerate(of_task))
    write_whole(config.output / "returns.csv", text.getvalue())
    write_whole(config.output / "table.md", markdown_table(table_rows(config, returns)))
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "mujoco", "dm-control", "numpy"),
        "seconds": round(seconds, 1),
        "returns": {task: dataclasses.asdict(estimate(of_task)) for task, of_task in returns.items()},
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def measure(config: RandomReturnsConfig) -> None:
    """Measures, writes and prints the mean of every task.

    Raises:
        KeyboardInterrupt: passed on, after what was complete has been written.
    """
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    returns, started, interrupted = {}, time.perf_counter(), False
    steps = sum(DOMAINS[parse_task(task)[0]].episode_steps for task in config.tasks) * config.episodes
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=steps)
        try:
            for task in config.tasks:
                progress.update(bar, description=task)
                returns[task] = random_returns(config, task, lambda count: progress.advance(bar, count))
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not returns:
        raise KeyboardInterrupt("before the first task was complete; nothing is written")
    write_results(config, returns, time.perf_counter() - started)
    if interrupted:
        raise KeyboardInterrupt(f"{config.output} holds the {len(returns)} tasks that were complete")
    print(f"results {config.output}")
    apart = [
        abs(standard_errors_apart(config, task, returns[task])) for task in returns if task in config.published_returns
    ]
    means = " ".join(f"{task}={of_task.mean():.1f}" for task, of_task in returns.items())
    print(f"{means} most_standard_errors_apart={max(apart, default=math.nan):.2f}")


@hydra.main(config_path="../conf", config_name="random_returns", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(RandomReturnsConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
