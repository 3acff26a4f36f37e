"""A step of the training engine beside a bare jitted loop; conf/bench_engine.yaml documents every key."""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import jax
import optax
from flax import nnx
from omegaconf import DictConfig
from rich.progress import Progress

from ring_rl.agent.agents import ImitationAgentConfig
from ring_rl.agent.made_up import made_up_episodes
from ring_rl.agent.training_task import BatchConfig, make_training_task
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.loop import LoopConfig, train
from ring_rl.training.mesh import MeshConfig, make_mesh, request_virtual_devices
from ring_rl.training.metrics import JsonlWriter, read_metrics
from ring_rl.training.optimizer import OptimizerConfig, learning_rate_at, make_optimizer
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.state import create_state
from ring_rl.training.step import LossFunction, compile_step, make_train_step
from ring_rl.training.tables import markdown_table

OUTPUTS = ("engine.json", "table.md")
# Virtual devices share a pool of threads, which steps without end in flight would exhaust.
STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineBenchmarkConfig:
    """What is trained, and how often it is measured."""

    virtual_devices: int
    mesh: MeshConfig
    batch: BatchConfig
    input: InputConfig
    episodes: int
    episode_steps: int
    observation_dim: int
    action_dim: int
    rounds: int
    steps: int
    log_every: int
    output: Path
    overwrite: bool
    agent: ImitationAgentConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.steps <= self.log_every:
            raise ValueError(
                f"steps must be more than log_every={self.log_every}, so that an interval without compilation is "
                f"timed; got {self.steps}"
            )


def bare_step(loss_function: LossFunction, graphdef: Any, optimizer: optax.GradientTransformation) -> Callable:
    """The training step as one would write it for one experiment: no engine, the same mathematics."""

    @jax.jit(donate_argnums=(0, 1))
    def step(parameters: Any, optimizer_state: Any, batch: Any, key: jax.Array):
        def mean_loss(parameters: Any) -> jax.Array:
            loss = loss_function(nnx.merge(graphdef, parameters), batch, key)
            return loss.total / loss.weight

        loss, gradients = jax.value_and_grad(mean_loss)(parameters)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), optimizer_state, loss

    return step


class Contest:
    """The two loops over one model, each with what it needs to start again and again."""

    def __init__(self, config: EngineBenchmarkConfig):
        self.config = config
        parallel = SequenceParallel(mesh=make_mesh(config.mesh), layout=config.batch.layout)
        episodes = made_up_episodes(
            episodes=config.episodes,
            steps=config.episode_steps,
            observation_dim=config.observation_dim,
            action_dim=config.action_dim,
        )
        self.task = make_training_task(config.agent, episodes, batch=config.batch, parallel=parallel, seed=0, extra={})
        self.mesh = parallel.mesh
        self.optimizer = make_optimizer(config.optimizer, total_steps=config.steps)
        graphdef, state = self._begin()
        stream = self._stream()
        self.engine_step = compile_step(
            make_train_step(
                self.task.loss_function,
                graphdef,
                self.optimizer,
                self.mesh,
                seed=0,
                learning_rate=lambda step: learning_rate_at(config.optimizer, step, config.steps),
            ),
            state,
            stream.abstract_batch,
        )
        self.batch = next(stream)
        stream.close()
        self.bare_step = bare_step(self.task.loss_function, graphdef, self.optimizer)

    def bare_seconds(self) -> float:
        """Seconds a step of the bare loop, dispatched a little ahead of the devices."""
        _, state = self._begin()
        parameters, optimizer_state = state.parameters, state.optimizer_state
        key = jax.random.key(0)
        parameters, optimizer_state, loss = self.bare_step(parameters, optimizer_state, self.batch, key)
        jax.block_until_ready(loss)
        begin = time.perf_counter()
        losses = [loss] * STEPS_IN_FLIGHT
        for _ in range(self.config.steps - 1):
            parameters, optimizer_state, loss = self.bare_step(parameters, optimizer_state, self.batch, key)
            losses.append(loss)
            jax.block_until_ready(losses[-1 - STEPS_IN_FLIGHT])
        jax.block_until_ready((parameters, loss))
        return (time.perf_counter() - begin) / (self.config.steps - 1)

    def engine_figures(self) -> tuple[float, float]:
        """(seconds a step, share of the time spent waiting for input) of the engine, as it logs them."""
        config = self.config
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(self._stream()) as stream:
            writer = JsonlWriter(Path(folder) / "metrics.jsonl", resume_step=0)
            with Checkpointer(
                Path(folder) / "checkpoints", keep=1, model_config=self.task.model_config
            ) as checkpointer:
                train(
                    state=self._begin()[1],
                    step_function=self.engine_step,
                    batches=stream,
                    config=self._loop(),
                    checkpointer=checkpointer,
                    writers=[writer],
                    run_folder=Path(folder),
                    progress=False,
                )
            writer.close()
            records = read_metrics(Path(folder) / "metrics.jsonl")
        # The first interval begins after the first step, so it has one step less than the others.
        weights = [config.log_every - 1] + [config.log_every] * (len(records) - 1)
        per_step = [1.0 / record["performance/steps_per_second"] for record in records]
        waits = [record["performance/input_wait"] for record in records]
        seconds = [weight * each for weight, each in zip(weights, per_step, strict=True)]
        wait = sum(share * each for share, each in zip(waits, seconds, strict=True))
        return sum(seconds) / sum(weights), wait / sum(seconds)

    def _begin(self):
        return create_state(self.task.make_model, self.optimizer, seed=0, mesh=self.mesh)

    def _stream(self) -> RowStream:
        return RowStream(
            self.task.rows,
            batch_size=self.task.batch_size,
            steps=self.config.steps,
            mesh=self.mesh,
            layout=self.task.parallel.layout,
            ring_size=self.task.parallel.ring_size,
            config=self.config.input,
        )

    def _loop(self) -> LoopConfig:
        return LoopConfig(
            steps=self.config.steps,
            log_every=self.config.log_every,
            checkpoint_every=self.config.steps,
            keep_checkpoints=1,
            best_metric=None,
            best_mode="min",
            keep_best=1,
            evaluate_every=None,
            largest_loss_ratio=None,
            peak_flops_per_second=None,
            profile=None,
        )


def measure(config: EngineBenchmarkConfig) -> None:
    """Lets both run in turn, and reports medians over rounds."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(config.virtual_devices)
    with Progress(transient=True) as progress:
        bar = progress.add_task("compiling", total=config.rounds)
        contest = Contest(config)
        contest.bare_seconds()
        progress.update(bar, description="measuring")
        bare, engine, waits = [], [], []
        for _ in range(config.rounds):
            bare.append(contest.bare_seconds())
            seconds, wait = contest.engine_figures()
            engine.append(seconds)
            waits.append(wait)
            progress.advance(bar)
    # Both loops of a round meet the same state of the machine.
    ratio = statistics.median(mine / theirs for mine, theirs in zip(engine, bare, strict=True))
    figures = {
        "engine_over_bare_loop": ratio,
        "engine_ms": 1e3 * statistics.median(engine),
        "bare_ms": 1e3 * statistics.median(bare),
        "input_wait": statistics.median(waits),
    }
    result = {
        **figures,
        "seconds_a_step": {"engine": engine, "bare": bare},
        "input_waits": waits,
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint"),
    }
    config.output.mkdir(parents=True, exist_ok=True)
    write_whole(config.output / "engine.json", json.dumps(result, indent=2) + "\n")
    rows = [
        ["loop", "ms a step", "of the bare loop", "waiting for input"],
        ["bare jitted loop over one batch", f"{figures['bare_ms']:.1f}", "1.000", ""],
        ["the engine", f"{figures['engine_ms']:.1f}", f"{ratio:.3f}", f"{100 * figures['input_wait']:.2f}%"],
    ]
    write_whole(config.output / "table.md", markdown_table(rows))
    print(
        f"engine_over_bare_loop={ratio:.3f} engine_ms={figures['engine_ms']:.1f} bare_ms={figures['bare_ms']:.1f} "
        f"input_wait={figures['input_wait']:.4f}"
    )


@hydra.main(config_path="../conf", config_name="bench_engine", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(EngineBenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
