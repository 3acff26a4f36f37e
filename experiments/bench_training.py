"""Speed of the training step and the longest context that fits; conf/bench_training.yaml documents every key."""

import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path

import hydra
import jax
from omegaconf import DictConfig
from rich.console import Console

from ring_rl.agent.agents import SequenceAgentConfig
from ring_rl.agent.made_up import made_up_episodes
from ring_rl.agent.training_task import BatchConfig, make_training_task
from ring_rl.atomic_file import refuse_existing, write_whole
from ring_rl.config import exit_on_bad_input, from_mapping, to_mapping
from ring_rl.hydra_config import resolve, run_entry_point
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.dry_run import needed_bytes
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.mesh import MeshConfig, describe_mesh, make_mesh, request_virtual_devices
from ring_rl.training.optimizer import OptimizerConfig, make_optimizer
from ring_rl.training.provenance import device_description, git_commit, versions
from ring_rl.training.state import abstract_state, create_state
from ring_rl.training.step import compile_step, make_train_step
from ring_rl.training.tables import csv_table
from ring_rl.training.throughput import StepWork, memory_in_use, peak_flops_per_second

OUTPUTS = ("training.csv", "summary.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBenchmarkConfig:
    """What is trained, over which contexts."""

    virtual_devices: int
    mesh: MeshConfig
    batch: BatchConfig
    agent: SequenceAgentConfig
    optimizer: OptimizerConfig
    episode_steps: int
    observation_dim: int
    action_dim: int
    trajectories: tuple[int, ...]
    longest: bool
    steps: int
    peak_flops_per_second: float | None
    output: Path
    overwrite: bool

    def __post_init__(self) -> None:
        if not self.trajectories or min(self.trajectories) < 1:
            raise ValueError(f"trajectories must hold at least one number from 1, got {list(self.trajectories)}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One context that trains."""

    trajectories: int
    tokens: int
    parameters: int
    model_flops: int
    needed_bytes: int
    seconds: float
    model_flops_utilisation: float | None
    memory_gib: float


class DoesNotFit(Exception):  # noqa: N818, it is an answer and no failure
    """The devices' memory is too small for this context."""


def timed_step(config: TrainingBenchmarkConfig, trajectories: int) -> Measured:
    """Compiles and runs the step over a context of so many trajectories.

    Raises:
        DoesNotFit: the compiler or the devices ran out of memory.
    """
    parallel = SequenceParallel(mesh=make_mesh(config.mesh), layout=config.batch.layout)
    mesh = parallel.mesh
    agent = dataclasses.replace(config.agent, chain=dataclasses.replace(config.agent.chain, trajectories=trajectories))
    episodes = made_up_episodes(
        episodes=trajectories,
        steps=config.episode_steps,
        observation_dim=config.observation_dim,
        action_dim=config.action_dim,
    )
    task = make_training_task(agent, episodes, batch=config.batch, parallel=parallel, seed=0, extra={})
    optimizer = make_optimizer(config.optimizer, total_steps=config.optimizer.warmup_steps + config.steps + 1)
    graphdef, abstract = abstract_state(task.make_model, optimizer, mesh=mesh)
    model_flops = task.model_flops(abstract.parameters)
    stream = RowStream(
        task.rows,
        batch_size=task.batch_size,
        steps=1,
        mesh=mesh,
        layout=parallel.layout,
        ring_size=parallel.ring_size,
        config=InputConfig(threads=1, prefetch_batches=1),
    )
    try:
        step = make_train_step(task.loss_function, graphdef, optimizer, mesh, seed=0)
        compiled = compile_step(step, abstract, stream.abstract_batch)
        batch = next(stream)
        _, state = create_state(task.make_model, optimizer, seed=0, mesh=mesh)
        seconds = []
        for _ in range(config.steps + 1):
            begin = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begin)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            raise DoesNotFit from error
        raise
    finally:
        stream.close()
    median = statistics.median(seconds[1:])
    device = mesh.devices.flat[0]
    work = StepWork(
        tokens=task.tokens,
        model_flops=model_flops,
        devices=mesh.size,
        peak_flops_per_second=peak_flops_per_second(device, configured=config.peak_flops_per_second),
    )
    return Measured(
        trajectories=trajectories,
        tokens=task.tokens,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.parameters)),
        model_flops=model_flops,
        needed_bytes=needed_bytes(compiled, platform=device.platform),
        seconds=median,
        model_flops_utilisation=work.model_flops_utilisation(median),
        memory_gib=next(iter(memory_in_use().values())),
    )


def longest_context(config: TrainingBenchmarkConfig, known: Measured, say) -> list[Measured]:
    """Contexts that train, longer ones until the first that does not, then between the two, to an eighth."""
    found, fits, fails = [], known.trajectories, None
    while fails is None or fails - fits > max(1, fits // 8):
        trial = 2 * fits if fails is None else (fits + fails) // 2
        try:
            measured = timed_step(dataclasses.replace(config, steps=1), trial)
        except DoesNotFit:
            say(f"{trial} trajectories do not fit")
            fails = trial
        else:
            say(f"{trial} trajectories: {measured.tokens:,} tokens, {measured.seconds:.2f} s a step")
            found.append(measured)
            fits = trial
        # What the failed attempt allocated goes with its references.
        gc.collect()
    return found


def write_results(config: TrainingBenchmarkConfig, rows: list[Measured]) -> None:
    """CSV and provenance."""
    config.output.mkdir(parents=True, exist_ok=True)
    ascending = sorted(rows, key=lambda row: row.tokens)
    write_whole(config.output / "training.csv", csv_table([dataclasses.asdict(row) for row in ascending]))
    summary = {
        "config": {**to_mapping(config), "output": str(config.output)},
        "commit": git_commit(),
        "device": device_description(),
        "versions": versions("ring_rl", "jax", "jaxlib", "flax", "optax"),
    }
    write_whole(config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def measure(config: TrainingBenchmarkConfig) -> None:
    """Times every context asked for, then looks for the longest."""
    if not config.overwrite:
        refuse_existing(config.output, OUTPUTS)
    request_virtual_devices(config.virtual_devices)
    console = Console()
    console.print(describe_mesh(make_mesh(config.mesh)))
    rows = []
    for trajectories in config.trajectories:
        with console.status(f"compiling and timing {trajectories} trajectories"):
            try:
                row = timed_step(config, trajectories)
            except DoesNotFit:
                raise ValueError(f"{trajectories} trajectories do not fit; begin with fewer") from None
        rows.append(row)
        console.print(f"{trajectories} trajectories: {row.tokens:,} tokens, {row.seconds:.3f} s a step")
        write_results(config, rows)
    longest = "unknown"
    if config.longest:
        with console.status("looking for the longest context"):
            rows += longest_context(config, rows[-1], console.print)
        longest = str(max(row.tokens for row in rows))
        write_results(config, rows)
    first = rows[0]
    utilisation = "unknown" if first.model_flops_utilisation is None else f"{first.model_flops_utilisation:.3f}"
    print(
        f"parameters={first.parameters} tokens={first.tokens} seconds={first.seconds:.3f} "
        f"tokens_per_second={first.tokens / first.seconds:.0f} model_flops_utilisation={utilisation} "
        f"longest_tokens={longest}"
    )


@hydra.main(config_path="../conf", config_name="bench_training", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Turns the composed configuration into a measurement."""
    with exit_on_bad_input():
        measure(from_mapping(TrainingBenchmarkConfig, resolve(cfg)))


if __name__ == "__main__":
    run_entry_point(main)
