"""Trains one agent on episodes in ExoRL's layout or of a Minari data set; conf/train_agent.yaml documents every key."""

import dataclasses
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig

from ring_rl.agent.agents import AgentConfig
from ring_rl.agent.episodes.load import DATA_MAY_DIFFER, AnyDataConfig, environment_of, load_episodes
from ring_rl.agent.training_task import BatchConfig, make_task
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.training.distributed import DistributedConfig, is_main_process, joined
from ring_rl.training.input import InputConfig
from ring_rl.training.loop import LoopConfig
from ring_rl.training.mesh import MeshConfig, describe_mesh, request_virtual_devices
from ring_rl.training.metrics import WandbConfig
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.parallel_config import ParallelConfig, make_parallel
from ring_rl.training.run import MAY_DIFFER, RunConfig, run_training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainAgentConfig:
    """Everything one training run is made of."""

    task: str
    label: str
    seed: int
    run_dir: Path
    dry_run: bool
    device_memory_gib: float | None
    profile: bool
    virtual_devices: int
    data: AnyDataConfig
    agent: AgentConfig
    batch: BatchConfig
    accumulation_steps: int
    input: InputConfig
    mesh: MeshConfig
    parallel: ParallelConfig
    distributed: DistributedConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    wandb: WandbConfig


def train_agent(config: TrainAgentConfig, resolved: dict) -> None:
    """Trains until the last step, from the last checkpoint if the run folder has one."""
    if config.loop.evaluate_every is not None:
        raise ValueError("this script does not evaluate while it trains; set loop.evaluate_every=null")
    request_virtual_devices(config.virtual_devices)
    parallel = make_parallel(config.mesh, config.parallel, layout=config.batch.layout)
    environment = environment_of(config.data, task=config.task)
    episodes = load_episodes(config.data, task=config.task, progress=is_main_process())
    task = make_task(
        config.agent,
        episodes,
        batch=config.batch,
        parallel=parallel,
        seed=config.seed,
        extra={
            "label": config.label,
            "task": config.task,
            "seed": config.seed,
            "action_repeat": environment.action_repeat,
            "environment": None if environment.recorded is None else to_mapping(environment.recorded),
            "agent": to_mapping(config.agent),
            "data_returns": np.round(episodes.returns, 6).tolist(),
        },
        episode_steps=environment.episode_steps,
    )
    finished = run_training(
        task,
        RunConfig(
            run_dir=config.run_dir,
            seed=config.seed,
            accumulation_steps=config.accumulation_steps,
            dry_run=config.dry_run,
            device_memory_gib=config.device_memory_gib,
            optimizer=config.optimizer,
            loop=config.loop,
            input=config.input,
            wandb=config.wandb,
        ),
        resolved=resolved,
        may_differ=(*MAY_DIFFER, *DATA_MAY_DIFFER, *(f"agent.{path}" for path in task.memory_choices)),
        headline=f"{config.label} on {config.task}: {describe_mesh(parallel.mesh)}, {config.batch.layout} layout",
    )
    if finished is not None and is_main_process():
        compiled = finished.compiled
        print(
            f"agent={config.agent.name} seed={config.seed} steps={config.loop.steps} parameters={finished.parameters} "
            f"tokens_per_step={task.tokens} ring_size={parallel.ring_size} "
            f"collective_permutes={compiled['collective_permutes']} "
            f"compiled_bytes_per_device={compiled['argument_bytes'] + compiled['temporary_bytes']} "
            f"seconds={finished.seconds:.1f}"
        )


@hydra.main(config_path="../conf", config_name="train_agent", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a run."""
    with exit_on_bad_input():
        resolved = resolve(cfg)
        resolved.pop("experiment", None)
        config = from_mapping(TrainAgentConfig, resolved)
        with joined(config.distributed):
            train_agent(config, resolved)


if __name__ == "__main__":
    run_entry_point(main)
