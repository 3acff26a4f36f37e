"""Trains one agent on episodes in ExoRL's layout; conf/train_agent.yaml documents every key."""

import dataclasses
import json
import time
from pathlib import Path

import hydra
import jax
import numpy as np
from omegaconf import DictConfig

from ring_rl.agent.agents import AgentConfig, SequenceAgentConfig, model_config, training_episodes
from ring_rl.agent.chain_batch import BatchLayout, ChainBatch, ChainSampler
from ring_rl.agent.data import DataConfig, load_episodes
from ring_rl.agent.loss import make_action_loss
from ring_rl.agent.model import make_model
from ring_rl.agent.tokens import tokens_per_step
from ring_rl.atomic_file import write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.kernels.feedforward import check_chunks
from ring_rl.kernels.layout import Layout
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.loop import LoopConfig, train
from ring_rl.training.mesh import MeshConfig, describe_mesh, make_mesh, request_virtual_devices, shard_batch
from ring_rl.training.metrics import ConsoleWriter, JsonlWriter, WandbConfig, WandbWriter
from ring_rl.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from ring_rl.training.plots import plot_learning_curve
from ring_rl.training.run_directory import open_run_directory
from ring_rl.training.state import create_state
from ring_rl.training.step import compile_step, compiled_report, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a batch is cut to the mesh; see `BatchLayout`."""

    batch_size: int
    layout: Layout
    pad_to_ring: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainAgentConfig:
    """Everything one training run is made of."""

    task: str
    seed: int
    run_dir: Path
    virtual_devices: int
    data: DataConfig
    agent: AgentConfig
    batch: BatchConfig
    mesh: MeshConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    wandb: WandbConfig


# What says nothing about the result may change when a run goes on.
MAY_DIFFER = ("run_dir", "data.root", "virtual_devices", "wandb", "loop.log_every", "loop.keep_checkpoints")


def train_agent(config: TrainAgentConfig, resolved: dict) -> None:
    """Trains until the last step, from the last checkpoint if the run folder has one."""
    if config.loop.evaluate_every is not None:
        raise ValueError("this script does not evaluate while it trains; set loop.evaluate_every=null")
    request_virtual_devices(config.virtual_devices)
    mesh = make_mesh(config.mesh)
    parallel = SequenceParallel(mesh=mesh, layout=config.batch.layout)
    episodes = load_episodes(config.data, task=config.task, progress=True)
    model = model_config(config.agent, episodes)
    sampler = ChainSampler(
        training_episodes(config.agent, episodes),
        config.agent.chain,
        BatchLayout(ring_size=parallel.ring_size, **dataclasses.asdict(config.batch)),
        seed=config.seed,
    )
    parallel.check(config.batch.batch_size, sampler.steps)
    if isinstance(config.agent, SequenceAgentConfig):
        tokens = sampler.steps * tokens_per_step(config.agent.token_layout)
        check_chunks(tokens, chunks=config.agent.transformer.feed_forward_chunks)

    def batch_at(step: int) -> ChainBatch:
        return shard_batch(mesh, sampler.batch_at(step))

    optimizer = make_optimizer(config.optimizer, total_steps=config.loop.steps)
    extra = {
        "label": config.agent.name,
        "task": config.task,
        "seed": config.seed,
        "action_repeat": config.data.action_repeat,
        "data_returns": np.round(episodes.returns, 6).tolist(),
    }
    with (
        open_run_directory(config.run_dir, resolved, may_differ=MAY_DIFFER) as run,
        Checkpointer(
            run.checkpoints, keep=config.loop.keep_checkpoints, model_config=to_mapping(model), extra=extra
        ) as checkpointer,
    ):
        print(f"{config.agent.name} on {config.task}: {describe_mesh(mesh)}, {config.batch.layout} layout", flush=True)
        graphdef, state = create_state(lambda rngs: make_model(model, rngs), optimizer, seed=config.seed, mesh=mesh)
        if checkpointer.latest_step() is not None:
            state, _ = checkpointer.restore_latest(state)
            print(f"continues from step {int(state.step)} of {run.path}")
        start, seconds = int(state.step), time.perf_counter()
        if start == config.loop.steps:
            plot_learning_curve(run.metrics, run.plots / "learning_curve.png")
            print(f"{run.path} is complete; raise loop.steps in a new run_dir to train for longer")
            return

        compiled = compile_step(
            make_train_step(
                make_action_loss(parallel),
                graphdef,
                optimizer,
                mesh,
                seed=config.seed,
                learning_rate=lambda step: learning_rate_at(config.optimizer, step, config.loop.steps),
            ),
            state,
            batch_at(start),
        )
        report = compiled_report(compiled)
        write_whole(run.path / "compiled.json", json.dumps({"mesh": dict(mesh.shape), **report}, indent=2) + "\n")
        writers = [
            ConsoleWriter(),
            JsonlWriter(run.metrics, resume_step=start),
            WandbWriter(config.wandb, folder=run.path, run_config=resolved),
        ]
        try:
            state = train(
                state=state,
                step_function=compiled,
                batch_at=batch_at,
                config=config.loop,
                checkpointer=checkpointer,
                writers=writers,
            )
        finally:
            for writer in writers:
                writer.close()
        plot_learning_curve(run.metrics, run.plots / "learning_curve.png")
        seconds = time.perf_counter() - seconds
        parameters = sum(x.size for x in jax.tree.leaves(state.parameters))
        print(
            f"agent={config.agent.name} seed={config.seed} steps={config.loop.steps} parameters={parameters} "
            f"tokens_per_step={config.batch.batch_size * sampler.steps} ring_size={parallel.ring_size} "
            f"collective_permutes={report['collective_permutes']} "
            f"compiled_bytes_per_device={report['argument_bytes'] + report['temporary_bytes']} "
            f"seconds={seconds:.1f}"
        )


@hydra.main(config_path="../conf", config_name="train_agent", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a run."""
    with exit_on_bad_input():
        resolved = resolve(cfg)
        resolved.pop("experiment", None)
        train_agent(from_mapping(TrainAgentConfig, resolved), resolved)


if __name__ == "__main__":
    run_entry_point(main)
