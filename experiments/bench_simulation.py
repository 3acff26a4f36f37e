"""Episodes a second of collecting and evaluating; conf/bench_simulation.yaml documents every key."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.progress import Progress

from ring_rl.agent.agents import SequenceAgentConfig, sequence_model_config
from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.environments.domains import DOMAINS, DomainSpec, parse_task
from ring_rl.agent.evaluation.policy import ModelPolicy
from ring_rl.agent.evaluation.rollout import reset_seeds, roll_out
from ring_rl.agent.exploration.explorers import NoiseConfig, NoiseExplorer
from ring_rl.agent.model import SequenceModelConfig, make_model
from ring_rl.agent.tokens import Normalisation, tokens_per_step
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.flops import matmul_parameters, model_flops_per_step
from ring_rl.training.plots import write_figure
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.tables import csv_table, markdown_table

OUTPUTS = ("simulation.json", "collection.csv", "in_context.csv", "table.md", "simulation.png")
DIFFERENCES = ("observations", "rewards", "physics")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectionBenchmarkConfig:
    """What the noise explorer collects."""

    explorer: NoiseConfig
    tasks: dict[str, int]
    plain_episodes: int
    threads: int | None

    def __post_init__(self) -> None:
        for task, hold in self.tasks.items():
            steps = domain_of(task).episode_steps
            if hold < 1 or steps % hold:
                raise ValueError(f"{task} has {steps} control steps, not divisible by a hold of {hold}; use a divisor")
        if not 1 <= self.plain_episodes <= self.explorer.batch_size:
            raise ValueError(
                f"plain_episodes must lie between 1 and explorer.batch_size={self.explorer.batch_size}, "
                f"got {self.plain_episodes}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutBenchmarkConfig:
    """Who is rolled out where: one chain in every row."""

    task: str
    action_repeat: int
    rows: int
    agent: SequenceAgentConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationBenchmarkConfig:
    """The three measurements."""

    rounds: int
    collection: CollectionBenchmarkConfig
    evaluation: RolloutBenchmarkConfig
    in_context: RolloutBenchmarkConfig
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


class TimedPolicy:
    """A policy that keeps the moments at which it is asked."""

    def __init__(self, policy: ModelPolicy):
        self._policy, self.asked_at = policy, []
        self.context_trajectories, self.begin, self.observe = policy.context_trajectories, policy.begin, policy.observe

    def act(self, now: ChainBatch) -> np.ndarray:
        """The policy's actions."""
        self.asked_at.append(time.perf_counter())
        return self._policy.act(now)


def domain_of(task: str) -> DomainSpec:
    """The sizes of a task's domain."""
    return DOMAINS[parse_task(task)[0]]


def plain_episode(environment: Any, seed: int, actions: np.ndarray) -> dict[str, np.ndarray]:
    """dm_control's own loop over one episode, keeping what a collection keeps."""
    from ring_rl.agent.environments.environment import action_range, control_of_actions

    simulation = environment.simulation
    controls = control_of_actions(actions.astype(np.float64), *action_range(simulation.physics.model.ptr))
    observation, info = environment.reset(seed=seed)
    observations, states, rewards = [observation], [info["physics"]], []
    for control in controls:
        time_step = simulation.step(control)
        observations.append(time_step.observation["observations"].astype(np.float32))
        rewards.append(time_step.reward)
        states.append(simulation.physics.get_state())
    return {"observations": np.array(observations), "rewards": np.array(rewards), "physics": np.array(states)}


def time_collection(config: CollectionBenchmarkConfig, rounds: int, advance: Callable[[], None]) -> list[dict]:
    """Control steps a second of both ways and how far apart their episodes are: one record a task and round."""
    from ring_rl.agent.environments.batched_physics import BatchedPhysics
    from ring_rl.agent.environments.environment import make_environment
    from ring_rl.agent.exploration.play import play_batch

    records, size = [], config.explorer.batch_size
    for task, hold in config.tasks.items():
        domain = domain_of(task)
        explorer = NoiseExplorer(config.explorer, episodes=size * rounds, action_dim=domain.action_dim, seed=0)
        environment = make_environment(task, action_repeat=1)
        with BatchedPhysics(task, threads=config.threads or os.cpu_count() or 1) as physics:
            for number in range(rounds):
                batch = explorer.batch(number)
                begin = time.perf_counter()
                episodes = play_batch(physics, batch, action_hold=hold)
                batched = size * domain.episode_steps / (time.perf_counter() - begin)
                chosen = list(zip(batch.reset_seeds, episodes, strict=True))[: config.plain_episodes]
                begin = time.perf_counter()
                played = [plain_episode(environment, seed, episode.actions) for seed, episode in chosen]
                plain = len(chosen) * domain.episode_steps / (time.perf_counter() - begin)
                differences = {
                    name: max(
                        float(np.abs(getattr(episode, name) - each[name]).max())
                        for (_, episode), each in zip(chosen, played, strict=True)
                    )
                    for name in DIFFERENCES
                }
                records.append({"task": task, "round": number, "batched": batched, "plain": plain, **differences})
                advance()
    return records


def model_of(config: RolloutBenchmarkConfig) -> tuple[SequenceModelConfig, Any]:
    """An untrained agent's model configuration and parameters."""
    domain = domain_of(config.task)
    model = sequence_model_config(
        config.agent,
        episode_steps=domain.episode_steps // config.action_repeat,
        observation_dim=domain.observation_dim,
        action_dim=domain.action_dim,
        normalisation=Normalisation.identity(domain.observation_dim),
    )
    return model, nnx.split(make_model(model, nnx.Rngs(0)))[1]


def roll_out_once(config: RolloutBenchmarkConfig, policy: Any, on_episode: Callable[[int], None]) -> float:
    """Seconds of one chain in every row."""
    from ring_rl.agent.environments.environment import make_vector_environment

    environments = make_vector_environment(config.task, count=config.rows, action_repeat=config.action_repeat)
    begin = time.perf_counter()
    seeds = reset_seeds(rows=config.rows, episodes=config.agent.chain.trajectories, seed=0)
    roll_out(policy, environments, seeds=seeds, target_return=1000.0, on_episode=on_episode)
    seconds = time.perf_counter() - begin
    environments.close()
    return seconds


def time_evaluation(config: RolloutBenchmarkConfig, rounds: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Control steps a second of an evaluation, compiled before, and of dm_control's loop without a model."""
    from ring_rl.agent.environments.environment import make_environment

    domain, policy = domain_of(config.task), ModelPolicy(*model_of(config))
    environment = make_environment(config.task, action_repeat=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (domain.episode_steps // config.action_repeat, domain.action_dim))
    held = actions.repeat(config.action_repeat, axis=0)
    roll_out_once(config, policy, on_episode=lambda _: None)
    rates: dict[str, list[float]] = {"batched": [], "plain": []}
    for number in range(rounds):
        steps = config.rows * config.agent.chain.trajectories * domain.episode_steps
        rates["batched"].append(steps / roll_out_once(config, policy, on_episode=lambda _: None))
        begin = time.perf_counter()
        plain_episode(environment, number, held)
        rates["plain"].append(domain.episode_steps / (time.perf_counter() - begin))
        advance()
    return rates


def time_in_context(config: RolloutBenchmarkConfig, advance: Callable[[], None]) -> list[dict]:
    """What a decision costs in every episode of one context: its median time, and FLOPs of attention and of all.

    The median leaves out the decisions at which the memory grows and its next size is compiled.
    """
    model, parameters = model_of(config)
    policy = TimedPolicy(ModelPolicy(model, parameters))
    roll_out_once(config, policy, on_episode=lambda _: advance())
    seconds = np.diff([*policy.asked_at, time.perf_counter()])
    tokens, sizes = tokens_per_step(model.token_layout), model.transformer
    episode_tokens = model.episode_steps * tokens
    weights = matmul_parameters(parameters)
    records = []
    for index in range(model.trajectories):
        decisions = slice(index * model.episode_steps, (index + 1) * model.episode_steps)
        seen = episode_tokens * (index * episode_tokens + (episode_tokens + 1) / 2)
        flops = [
            model_flops_per_step(
                matmul_parameters=parameters_of,
                tokens=episode_tokens,
                layers=sizes.layers,
                query_heads=sizes.query_heads,
                head_dim=sizes.head_dim,
                visible_pairs=int(seen),
            )
            / (3 * model.episode_steps)
            for parameters_of in (0, weights)
        ]
        milliseconds = 1e3 * float(np.median(seconds[decisions]))
        records.append(
            {"episode": index, "milliseconds": milliseconds, "attention_flops": flops[0], "model_flops": flops[1]}
        )
    return records


def growth(records: Sequence[dict], name: str) -> float:
    """The last episode over the first."""
    return records[-1][name] / records[0][name]


def figures_of(collection: Sequence[dict], evaluation: dict[str, list[float]], context: Sequence[dict]) -> dict:
    """Medians over rounds of ratios within a round, and the growth within one context."""
    figures: dict[str, float] = {}
    for task in dict.fromkeys(each["task"] for each in collection):
        rounds = [each for each in collection if each["task"] == task]
        figures[f"{task}_speedup"] = statistics.median(each["batched"] / each["plain"] for each in rounds)
        figures[f"{task}_steps_per_second"] = statistics.median(each["batched"] for each in rounds)
        for name in DIFFERENCES:
            figures[f"{task}_{name}_difference"] = max(each[name] for each in rounds)
    pairs = zip(evaluation["batched"], evaluation["plain"], strict=True)
    figures["evaluation_speedup"] = statistics.median(batched / plain for batched, plain in pairs)
    figures["evaluation_steps_per_second"] = statistics.median(evaluation["batched"])
    figures["in_context_slowdown"] = growth(context, "milliseconds")
    figures["attention_flops_growth"] = growth(context, "attention_flops")
    figures["model_flops_growth"] = growth(context, "model_flops")
    return figures


def plot(collection: Sequence[dict], context: Sequence[dict], path: Path) -> None:
    """Control steps a second by task, and the time of a decision by episode."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    tasks = list(dict.fromkeys(each["task"] for each in collection))
    for offset, name, label in ((-0.2, "plain", "dm_control loop"), (0.2, "batched", "batched simulator")):
        rates = [statistics.median(each[name] for each in collection if each["task"] == task) for task in tasks]
        bars.bar(np.arange(len(tasks)) + offset, rates, 0.4, label=label)
    bars.set_xticks(range(len(tasks)), [task.replace("_", "\n", 1) for task in tasks], fontsize="small")
    bars.set_yscale("log")
    bars.set_ylabel("control steps a second")
    bars.legend()
    for name, label in (
        ("milliseconds", "time of a decision"),
        ("model_flops", "FLOPs of the model"),
        ("attention_flops", "FLOPs of its attention"),
    ):
        lines.plot(
            [each["episode"] for each in context], [each[name] / context[0][name] for each in context], label=label
        )
    lines.set_xlabel("episode in one context")
    lines.set_ylabel("relative to the first episode")
    lines.set_yscale("log")
    lines.legend()
    write_figure(figure, path)


def table_rows(config: SimulationBenchmarkConfig, figures: dict[str, float]) -> list[list[str]]:
    """What was measured, how fast it went and what that is compared with."""
    rows = [["measurement", "control steps a second", "beside a plain dm_control loop", "largest difference"]]
    for task in config.collection.tasks:
        difference = max(figures[f"{task}_{name}_difference"] for name in DIFFERENCES)
        rate, speedup = figures[f"{task}_steps_per_second"], figures[f"{task}_speedup"]
        rows.append([f"collecting {task}", f"{rate:,.0f}", f"{speedup:.1f}x", f"{difference:.1g}"])
    rate, speedup = figures["evaluation_steps_per_second"], figures["evaluation_speedup"]
    rows.append([f"evaluating, {config.evaluation.rows} rows", f"{rate:,.0f}", f"{speedup:.1f}x", ""])
    return rows


def measure(config: SimulationBenchmarkConfig) -> None:
    """Measures, writes CSV, JSON, a table and a picture, and prints the figures."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    total = (len(config.collection.tasks) + 1) * config.rounds + config.in_context.agent.chain.trajectories
    begin = time.perf_counter()
    with Progress(transient=True) as progress:
        bar = progress.add_task("collecting", total=total)
        advance = lambda: progress.advance(bar)  # noqa: E731
        collection = time_collection(config.collection, config.rounds, advance)
        progress.update(bar, description="evaluating")
        evaluation = time_evaluation(config.evaluation, config.rounds, advance)
        progress.update(bar, description="episodes in one context")
        context = time_in_context(config.in_context, advance)
    figures = figures_of(collection, evaluation, context)
    result = {
        **figures,
        "seconds": round(time.perf_counter() - begin, 1),
        "evaluation": evaluation,
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "dm_control", "mujoco", "gymnasium"),
    }
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "collection.csv", csv_table(collection))
    write_whole(config.output / "in_context.csv", csv_table(context))
    write_whole(config.output / "simulation.json", json.dumps(result, indent=2) + "\n")
    write_whole(config.output / "table.md", markdown_table(table_rows(config, figures)))
    plot(collection, context, config.output / "simulation.png")
    print(" ".join(f"{name}={value:.3g}" for name, value in figures.items()))


@hydra.main(config_path="../conf", config_name="bench_simulation", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(SimulationBenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
