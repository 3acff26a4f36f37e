"""Compares trained agents in dm_control; conf/evaluate_agent.yaml documents every key."""

import dataclasses
import json
import re
import time
from collections import defaultdict
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.evaluation.plots import plot_return_by_episode, plot_returns_in_data
from ring_rl.agent.evaluation.policy import Policy, UniformPolicy
from ring_rl.agent.evaluation.protocol import (
    ProtocolConfig,
    Result,
    TrainedAgent,
    check_comparable,
    evaluate,
    load_agent,
    table_rows,
    write_returns,
)
from ring_rl.agent.evaluation.rollout import Rollouts
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.tables import markdown_table

OUTPUTS = (
    "returns.csv",
    "summary.json",
    "table.md",
    "return_by_episode.png",
    "returns_in_data.png",
    "contact_sheet.png",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateAgentConfig:
    """Which runs are compared, how, and where the results go."""

    runs: tuple[Path, ...]
    output: Path
    overwrite: bool
    protocol: ProtocolConfig
    cleared_context: bool
    random_policy: bool
    render: bool

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no runs to evaluate; give runs=[path,...] of experiments/train_agent.py")


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One row of the comparison: who acts, how often, and with what context."""

    label: str
    seed: int
    policy: Policy
    action_repeat: int
    carry_context: bool


def entries_of(config: EvaluateAgentConfig, agents: list[TrainedAgent]) -> list[Entry]:
    """Every agent, once more with its context cleared where it has one, and chance."""
    entries = []
    for agent in agents:
        entries.append(Entry(agent.label, agent.seed, agent.policy(), agent.action_repeat, True))
        if config.cleared_context and agent.policy().context_trajectories > 1:
            label = f"{agent.label}, context cleared"
            entries.append(Entry(label, agent.seed, agent.policy(), agent.action_repeat, False))
    if config.random_policy:
        seed, action_repeat = config.protocol.seed, agents[0].action_repeat
        chance = lambda: UniformPolicy(action_dim=agents[0].model_config.action_dim, seed=seed)  # noqa: E731
        entries.append(Entry("uniformly random", seed, chance(), 1, True))
        if action_repeat > 1:
            entries.append(Entry(f"uniformly random, held {action_repeat} steps", seed, chance(), action_repeat, True))
    return entries


def check_episode_length(agents: list[TrainedAgent], control_steps: int) -> None:
    """Raises ValueError if an agent's context was made for shorter or longer episodes than the task has."""
    for agent in agents:
        trained = getattr(agent.model_config, "episode_steps", None)
        if trained is not None and trained * agent.action_repeat != control_steps:
            raise ValueError(
                f"{agent.label} was trained on episodes of {trained * agent.action_repeat} control steps, "
                f"{agent.task} has {control_steps}; train on whole episodes of the task"
            )


def rolled_out(config: EvaluateAgentConfig, agents: list[TrainedAgent]) -> list[Result]:
    """Every entry under the protocol, with progress."""
    from ring_rl.agent.environments.environment import make_vector_environment

    check_episode_length(agents, DOMAINS[parse_task(agents[0].task)[0]].episode_steps)
    entries = entries_of(config, agents)
    outcomes: dict[str, list[tuple[int, Rollouts]]] = defaultdict(list)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("evaluating", total=len(entries) * config.protocol.episodes)
        for entry in entries:
            progress.update(bar, description=f"evaluating {entry.label}")
            environments = make_vector_environment(
                agents[0].task, count=config.protocol.rows, action_repeat=entry.action_repeat
            )
            rollouts = evaluate(
                entry.policy,
                environments,
                config.protocol,
                best_return=float(agents[0].data_returns.max()),
                carry_context=entry.carry_context,
                on_episode=lambda _: progress.advance(bar),
            )
            environments.close()
            outcomes[entry.label].append((entry.seed, rollouts))
    return [
        Result(label, tuple(seed for seed, _ in runs), tuple(rollouts for _, rollouts in runs))
        for label, runs in outcomes.items()
    ]


def evaluate_agents(config: EvaluateAgentConfig) -> None:
    """Rolls out, prints a table, writes CSV, Markdown, JSON and pictures."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    agents = [load_agent(run) for run in config.runs]
    check_comparable(agents)
    config.output.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter()
    results = rolled_out(config, agents)
    seconds = time.perf_counter() - seconds

    data_returns, task = agents[0].data_returns, agents[0].task
    rows = table_rows(results, data_returns)
    write_returns(results, config.protocol, config.output / "returns.csv")
    scores = {result.label: dataclasses.asdict(result.scores) for result in results}
    summary = {
        "task": task,
        "protocol": to_mapping(config.protocol),
        "runs": [str(run) for run in config.runs],
        "steps": [agent.step for agent in agents],
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "flax", "dm_control", "mujoco"),
        "seconds": round(seconds, 1),
        "data": {"mean": data_returns.mean(), "p75": np.quantile(data_returns, 0.75), "best": data_returns.max()},
        "scores": scores,
    }
    for name, text in (
        ("summary.json", json.dumps(summary, indent=2) + "\n"),
        ("table.md", markdown_table(rows)),
    ):
        write_whole(config.output / name, text)
    pictures = [config.output / "return_by_episode.png", config.output / "returns_in_data.png"]
    plot_return_by_episode(results, data_returns, pictures[0], title=task)
    plot_returns_in_data(results, data_returns, pictures[1], title=task)
    if config.render:
        pictures += contact_sheet(config, task, results[0])
    show(rows, config.protocol, pictures)
    figures = " ".join(
        f"{re.sub(r'[^a-z0-9]+', '_', label)}={value['mean']['mean']:.1f}" for label, value in scores.items()
    )
    p75, best = np.quantile(data_returns, 0.75), data_returns.max()
    print(f"{figures} data_p75={p75:.1f} data_best={best:.1f} seconds={seconds:.1f}")


def contact_sheet(config: EvaluateAgentConfig, task: str, result: Result) -> list[Path]:
    """A strip of frames of the first agent's last episode, if this machine can draw one."""
    from ring_rl.agent.environments.rendering import render_contact_sheet

    trajectory = result.rollouts[0].trajectories[0][-1]
    if trajectory.physics is None:
        return []
    drawn = render_contact_sheet(
        task,
        trajectory.physics,
        config.output / "contact_sheet.png",
        frames=24,
        columns=8,
        frame_size=(120, 120),
        overwrite=True,
    )
    if drawn.path is None:
        print(f"no contact sheet: {drawn.reason}")
        return []
    return [drawn.path]


def show(rows: list[list[str]], protocol: ProtocolConfig, pictures: list[Path]) -> None:
    """Prints the table and names the pictures."""
    table = Table(title=f"returns of {protocol.episodes} episodes in a row, mean [95% interval]")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    # Wide enough for every cell, whatever the terminal: a table that is cut says nothing.
    console = Console(width=max(140, Console().width))
    console.print(table)
    for picture in pictures:
        console.print(f"picture {picture}", soft_wrap=True, highlight=False)


@hydra.main(config_path="../conf", config_name="evaluate_agent", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into an evaluation."""
    with exit_on_bad_input():
        evaluate_agents(from_mapping(EvaluateAgentConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
