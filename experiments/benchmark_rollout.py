"""Seconds that an evaluation takes; conf/benchmark_rollout.yaml documents every key."""

import dataclasses
import time

import hydra
from flax import nnx
from omegaconf import DictConfig
from rich.progress import Progress

from ring_rl.agent.agents import SequenceAgentConfig, sequence_model_config
from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.evaluation.policy import ModelPolicy
from ring_rl.agent.evaluation.rollout import reset_seeds, roll_out
from ring_rl.agent.model import make_model
from ring_rl.agent.tokens import Normalisation, tokens_per_step
from ring_rl.config import exit_on_bad_input, from_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.provenance import device_description


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is rolled out."""

    task: str
    action_repeat: int
    rows: int
    agent: SequenceAgentConfig


def benchmark(config: BenchmarkConfig) -> None:
    """Rolls out one chain in every row and prints how long it took, compilation included."""
    from ring_rl.agent.environments.environment import make_vector_environment

    domain = DOMAINS[parse_task(config.task)[0]]
    environments = make_vector_environment(config.task, count=config.rows, action_repeat=config.action_repeat)
    agent, episodes = config.agent, config.agent.chain.trajectories
    model = sequence_model_config(
        agent,
        episode_steps=domain.episode_steps // config.action_repeat,
        observation_dim=domain.observation_dim,
        action_dim=domain.action_dim,
        normalisation=Normalisation.identity(domain.observation_dim),
    )
    policy = ModelPolicy(model, nnx.split(make_model(model, nnx.Rngs(0)))[1])
    seconds = time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task("rolling out", total=episodes)
        rollouts = roll_out(
            policy,
            environments,
            seeds=reset_seeds(rows=config.rows, episodes=episodes, seed=0),
            target_return=1000.0,
            on_episode=lambda _: progress.advance(bar),
        )
    seconds = time.perf_counter() - seconds
    steps = rollouts.trajectories[0][0].length * episodes
    print(f"device {device_description()}")
    print(
        f"rows={config.rows} episodes={episodes} decisions={steps} "
        f"tokens={steps * tokens_per_step(agent.token_layout)} seconds={seconds:.1f} "
        f"milliseconds_per_decision={1e3 * seconds / steps:.2f}"
    )


@hydra.main(config_path="../conf", config_name="benchmark_rollout", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        benchmark(from_mapping(BenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
