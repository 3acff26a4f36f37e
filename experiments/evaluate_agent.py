"""Compares trained agents in dm_control; conf/evaluate_agent.yaml documents every key."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.evaluation.agent_environments import check_episode_length, make_agent_environments
from ring_rl.agent.evaluation.in_context_report import (
    in_context_rows,
    in_context_summary,
    in_context_tests,
    plot_in_context,
)
from ring_rl.agent.evaluation.plots import plot_return_by_episode, plot_return_by_target, plot_returns_in_data
from ring_rl.agent.evaluation.policy import Policy, UniformPolicy
from ring_rl.agent.evaluation.profiles import performance_profile, plot_performance_profiles, shared_thresholds
from ring_rl.agent.evaluation.protocol import (
    ProtocolConfig,
    TrainedAgent,
    check_comparable,
    check_context,
    evaluate,
    load_agent,
    shuffled_counterparts,
)
from ring_rl.agent.evaluation.results import (
    RANDOM_POLICY,
    Context,
    Result,
    return_scale,
    table_rows,
    write_returns,
)
from ring_rl.agent.evaluation.rollout import reset_seeds
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh, request_virtual_devices
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.tables import markdown_table

OUTPUTS = (
    "returns.csv",
    "summary.json",
    "table.md",
    "in_context.md",
    "return_by_episode.png",
    "return_by_target.png",
    "returns_in_data.png",
    "in_context.png",
    "performance_profile.png",
    "contact_sheet.png",
)
PROFILE_THRESHOLDS = 201


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """How much resampling intervals and tests get, and its seed."""

    resamples: int
    sign_flips: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.resamples, self.sign_flips) < 100:
            raise ValueError(
                f"statistics need at least 100 resamples and sign flips, got {self.resamples} and {self.sign_flips}"
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
    cache_devices: int
    virtual_devices: int
    statistics: StatisticsConfig
    render: bool

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no runs to evaluate; give runs=[path,...] of experiments/train_agent.py")


@dataclasses.dataclass(frozen=True, eq=False)
class Condition:
    """One row of the comparison: who acts, how often, asked for what, and with what context."""

    label: str
    context: Context
    target_fraction: float | None
    headline: bool
    action_repeat: int
    policies: dict[int, Policy]


def cache_sharing(config: EvaluateAgentConfig) -> SequenceParallel | None:
    """The mesh whose devices share a context's key-value cache; None where each keeps its own.

    Raises:
        ValueError: There are fewer devices.
    """
    if config.cache_devices == 1:
        return None
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=config.cache_devices))
    return SequenceParallel(mesh=mesh, layout="contiguous")


def conditions_of(
    config: EvaluateAgentConfig, agents: Sequence[TrainedAgent], parallel: SequenceParallel | None
) -> Iterator[Condition]:
    """Chance, then every agent by target, once more with its context cleared where it has one."""
    protocol, action_repeat = config.protocol, agents[0].action_repeat
    if config.random_policy:
        chance = UniformPolicy(action_dim=agents[0].model_config.action_dim, seed=protocol.seed)
        yield Condition(RANDOM_POLICY, "none", None, True, 1, {protocol.seed: chance})
        if action_repeat > 1:
            chance = UniformPolicy(action_dim=agents[0].model_config.action_dim, seed=protocol.seed)
            held = f"{RANDOM_POLICY}, held {action_repeat} steps"
            yield Condition(held, "none", None, True, action_repeat, {protocol.seed: chance})
    for label in dict.fromkeys(agent.label for agent in agents):
        alike = sorted((agent for agent in agents if agent.label == label), key=lambda agent: agent.seed)
        remembers = any(agent.policy().context_trajectories > 1 for agent in alike)
        contexts: list[Context] = ["carried"] if remembers else ["none"]
        if remembers and config.cleared_context:
            contexts.append("cleared")
        for fraction in protocol.target_fractions if alike[0].reads_returns else (None,):
            for context in contexts:
                # Policies of each condition's own: what one samples does not depend on which were evaluated before.
                policies: dict[int, Policy] = {
                    agent.seed: agent.policy(
                        action_selection=protocol.action_selection, seed=protocol.seed, parallel=parallel
                    )
                    for agent in alike
                }
                headline = fraction in (None, protocol.target_fraction)
                yield Condition(label, context, fraction, headline, action_repeat, policies)


def rolled_out(
    config: EvaluateAgentConfig, agents: Sequence[TrainedAgent], parallel: SequenceParallel | None
) -> tuple[list[Result], dict[str, Trajectory]]:
    """Every condition under the protocol, with progress; and of every agent one last episode, to be drawn."""
    conditions, protocol = list(conditions_of(config, agents, parallel)), config.protocol
    data_returns = agents[0].data_returns
    results, shown = [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        total = protocol.episodes * sum(len(condition.policies) for condition in conditions)
        bar = progress.add_task("evaluating", total=total)
        for condition in conditions:
            returns = []
            for policy in condition.policies.values():
                progress.update(bar, description=f"evaluating {condition.label}")
                environments = make_agent_environments(
                    agents[0], count=protocol.rows, action_repeat=condition.action_repeat
                )
                rollouts = evaluate(
                    policy,
                    environments,
                    protocol,
                    best_return=float(data_returns.max()),
                    target_fraction=condition.target_fraction,
                    carry_context=condition.context == "carried",
                    on_episode=lambda _: progress.advance(bar),
                )
                environments.close()
                returns.append(rollouts.returns)
                shown.setdefault(condition.label, rollouts.trajectories[0][-1])
            results.append(
                Result(
                    label=condition.label,
                    context=condition.context,
                    target_fraction=condition.target_fraction,
                    headline=condition.headline,
                    seeds=tuple(condition.policies),
                    context_episodes=min(policy.context_trajectories for policy in condition.policies.values()),
                    returns=np.array(returns),
                )
            )
            # Chance goes first: data that are no better are refused before an agent acts.
            return_scale(results, data_returns)
    return sorted(results, key=lambda result: result.label.startswith(RANDOM_POLICY)), shown


def evaluate_agents(config: EvaluateAgentConfig) -> None:
    """Rolls out, prints a table, writes CSV, Markdown, JSON and pictures."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(config.virtual_devices)
    parallel = cache_sharing(config)
    agents = [load_agent(run) for run in config.runs]
    check_comparable(agents)
    check_context(agents, config.protocol)
    check_episode_length(agents)
    config.output.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter()
    results, shown = rolled_out(config, agents, parallel)
    seconds = time.perf_counter() - seconds

    protocol, data_returns, task = config.protocol, agents[0].data_returns, agents[0].task
    resets = reset_seeds(rows=protocol.rows, episodes=protocol.episodes, seed=protocol.seed)
    write_returns(results, resets, config.output / "returns.csv")
    scale = return_scale(results, data_returns)
    rows = table_rows(results, data_returns, scale)
    tests = in_context_tests(
        [result for result in results if result.headline],
        shuffled_counterparts(agents),
        flips=config.statistics.sign_flips,
        seed=config.statistics.seed,
    )
    scores = {result.name: dataclasses.asdict(result.scores) for result in results}
    summary = {
        "task": task,
        "protocol": to_mapping(protocol),
        "purpose": protocol.purpose,
        "runs": [str(run) for run in config.runs],
        "steps": [agent.step for agent in agents],
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "flax", "dm_control", "mujoco"),
        "seconds": round(seconds, 1),
        "data": {"mean": data_returns.mean(), "p75": np.quantile(data_returns, 0.75), "best": data_returns.max()},
        "return_scale": None if scale is None else dataclasses.asdict(scale),
        "scores": scores,
        "in_context": in_context_summary(tests),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_whole(config.output / "table.md", markdown_table(rows))
    in_context_table = in_context_rows(tests, scale)
    write_whole(config.output / "in_context.md", markdown_table(in_context_table))
    pictures = draw(config, results, data_returns, task)
    if tests:
        pictures.append(config.output / "in_context.png")
        plot_in_context(tests, pictures[-1], title=task)
    if config.render:
        pictures += contact_sheet(config, task, shown[agents[0].label])
    for stale in {config.output / name for name in OUTPUTS if name.endswith(".png")} - set(pictures):
        # Of an evaluation that this one replaces.
        stale.unlink(missing_ok=True)
    purpose = "" if protocol.purpose == "reporting" else ", tuning resets: for choosing settings, not for results"
    show(rows, f"returns of {protocol.episodes} episodes in a row, mean [95% interval]{purpose}")
    if tests:
        show(in_context_table, "what the context is worth, on the same resets, from the second episode on")
    for picture in pictures:
        Console().print(f"picture {picture}", soft_wrap=True, highlight=False)
    figures = " ".join(
        f"{re.sub(r'[^a-z0-9]+', '_', name)}={value['mean']['mean']:.1f}" for name, value in scores.items()
    )
    p75, best = np.quantile(data_returns, 0.75), data_returns.max()
    print(f"{figures} data_p75={p75:.1f} data_best={best:.1f} seconds={seconds:.1f}")


def draw(config: EvaluateAgentConfig, results: Sequence[Result], data_returns: np.ndarray, task: str) -> list[Path]:
    """The pictures of an evaluation."""
    headline = [result for result in results if result.headline]
    names = ["return_by_episode.png", "returns_in_data.png", "performance_profile.png"]
    pictures = [config.output / name for name in names]
    plot_return_by_episode(headline, data_returns, pictures[0], title=task)
    plot_returns_in_data(headline, data_returns, pictures[1], title=task)
    scores = {result.name: {task: result.samples("mean")} for result in headline}
    thresholds = shared_thresholds(scores, count=PROFILE_THRESHOLDS)
    profiles = {
        name: performance_profile(each, thresholds, resamples=config.statistics.resamples, seed=config.statistics.seed)
        for name, each in scores.items()
    }
    kinds = " or ".join(sorted({result.sample_kind for result in headline}))
    plot_performance_profiles(
        profiles, pictures[2], title=task, score_label="return, mean of episodes,", run_label=kinds
    )
    if len(config.protocol.target_fractions) > 1 and any(result.target_fraction for result in results):
        pictures.append(config.output / "return_by_target.png")
        plot_return_by_target(results, data_returns, pictures[-1], title=task)
    return pictures


def contact_sheet(config: EvaluateAgentConfig, task: str, trajectory: Trajectory) -> list[Path]:
    """A strip of frames of the first agent's last episode, if this machine can draw one."""
    from ring_rl.agent.environments.rendering import render_contact_sheet

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


def show(rows: list[list[str]], title: str) -> None:
    """Prints a table."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows[1:]:
        table.add_row(*row)
    # Wide enough for every cell, whatever the terminal: a table that is cut says nothing.
    Console(width=max(200, Console().width)).print(table)


@hydra.main(config_path="../conf", config_name="evaluate_agent", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into an evaluation."""
    with exit_on_bad_input():
        evaluate_agents(from_mapping(EvaluateAgentConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
