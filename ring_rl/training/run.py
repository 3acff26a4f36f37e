"""One training run from its folder to its last checkpoint: what every task's entry point shares."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from ring_rl.atomic_file import write_whole
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.distributed import is_main_process
from ring_rl.training.dry_run import dry_run, print_dry_run
from ring_rl.training.input import InputConfig
from ring_rl.training.loop import LoopConfig, train
from ring_rl.training.metrics import ConsoleWriter, JsonlWriter, MetricsWriter, WandbConfig, WandbWriter
from ring_rl.training.optimizer import OptimizerConfig
from ring_rl.training.plots import plot_learning_curve, plot_run
from ring_rl.training.provenance import record_start
from ring_rl.training.run_directory import RunDirectory, open_run_directory
from ring_rl.training.step import compile_step, compiled_report
from ring_rl.training.task import Task
from ring_rl.training.throughput import StepWork
from ring_rl.training.throughput import peak_flops_per_second as device_peak_flops_per_second

__all__ = ["MAY_DIFFER", "FinishedRun", "RunConfig", "draw_run", "open_writers", "run_training", "say", "step_work"]

# Dotted paths of an entry point's configuration that may change when a run goes on: where it lies and runs, how it
# reports. Another mesh sums in another order, so it goes on with the same mathematics, not to the same bit.
MAY_DIFFER = (
    "run_dir",
    "virtual_devices",
    "mesh",
    "parallel",
    "accumulation_steps",
    "distributed",
    "input",
    "dry_run",
    "profile",
    "device_memory_gib",
    "wandb",
    "loop.log_every",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.best_metric",
    "loop.best_mode",
    "loop.keep_best",
    "loop.largest_loss_ratio",
    "loop.peak_flops_per_second",
    "loop.profile",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a task is trained, whatever it is.

    Attributes:
        run_dir: the run's folder; the same one again goes on.
        seed: of the parameters and of the randomness inside the loss; JAX knows 2**32 of them.
        accumulation_steps: microbatches that a batch is cut into, one after another in the memory of one.
        dry_run: compile, report what a step needs, and stop before anything is made.
        device_memory_gib: of one device, for the dry run; null asks the device.
        optimizer: see `OptimizerConfig`.
        loop: see `LoopConfig`.
        input: see `InputConfig`.
        wandb: see `WandbConfig`.
    """

    run_dir: pathlib.Path
    seed: int
    accumulation_steps: int
    dry_run: bool
    device_memory_gib: float | None
    optimizer: OptimizerConfig
    loop: LoopConfig
    input: InputConfig
    wandb: WandbConfig

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}; others would repeat one of these")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What a run was, for a last line on the console.

    Attributes:
        parameters: numbers that were trained.
        seconds: from the compilation to the last picture.
        compiled: as from `compiled_report`.
    """

    parameters: int
    seconds: float
    compiled: Mapping[str, int]


def run_training(
    task: Task,
    config: RunConfig,
    *,
    resolved: Mapping[str, Any],
    may_differ: tuple[str, ...],
    headline: str,
) -> FinishedRun | None:
    """Train until the last step, from the last checkpoint if the run folder has one.

    All processes call it; the main one alone prints, logs and draws.

    Args:
        task: what is trained; a `TrainingTask` brings model, loss and rows.
        config: everything else.
        resolved: the whole resolved configuration, kept in the run folder; another one is refused.
        may_differ: dotted paths of it that may change when a run goes on.
        headline: printed when the run folder is open.

    Returns:
        None after a dry run, and where the run was complete already; its pictures are drawn again.

    Raises:
        ValueError, OSError: see `open_run_directory`, `Checkpointer` and `train`.
        TrainingInterrupted: stopped by a signal; the state is saved.
    """
    main, mesh = is_main_process(), task.parallel.mesh
    # Whatever the mesh cannot divide is refused here, before there is a folder.
    prepared = task.prepare(
        seed=config.seed,
        steps=config.loop.steps,
        optimizer=config.optimizer,
        accumulation_steps=config.accumulation_steps,
        input=config.input,
    )
    stream = prepared.stream
    model_flops = task.model_flops(prepared.abstract_state.parameters)
    if config.dry_run:
        report = dry_run(
            prepared.step,
            prepared.abstract_state,
            stream.abstract_batch,
            mesh=mesh,
            tokens=task.tokens,
            model_flops=model_flops,
            device_memory_gib=config.device_memory_gib,
        )
        if main:
            print_dry_run(report)
        return None
    with (
        contextlib.closing(stream),
        open_run_directory(config.run_dir, resolved, may_differ=may_differ) as run,
        Checkpointer(
            run.checkpoints,
            keep=config.loop.keep_checkpoints,
            best=config.loop.best_checkpoints,
            model_config=task.model_config,
            may_differ=task.memory_choices,
            extra=task.extra,
        ) as checkpointer,
    ):
        say(headline)
        state = prepared.create_state()
        recent_losses: list[float] = []
        if checkpointer.latest_step() is not None:
            state, metadata = checkpointer.restore_latest(state)
            recent_losses = metadata.recent_losses
            stream.restore(metadata.input_state or {})
            say(f"continues from step {int(state.step)} of {run.path}")
        start, begin = int(state.step), time.perf_counter()
        if start == config.loop.steps:
            draw_run(run)
            say(f"{run.path} is complete; raise loop.steps in a new run_dir to train for longer")
            return None

        with contextlib.ExitStack() as stack:
            # Before anything is compiled: wandb may refuse.
            writers = open_writers(stack, run, config.wandb, start=start, resolved=resolved) if main else []
            # Batches are made while the step is compiled.
            stream.start()
            compiled = compile_step(prepared.step, state, stream.abstract_batch)
            report = compiled_report(compiled)
            if main:
                record_start(run.path, start)
                compiled_facts = {"mesh": dict(mesh.shape), **report}
                write_whole(run.path / "compiled.json", json.dumps(compiled_facts, indent=2) + "\n")
            state = train(
                state=state,
                step_function=compiled,
                batches=stream,
                config=config.loop,
                checkpointer=checkpointer,
                writers=writers,
                run_folder=run.path,
                work=step_work(task, model_flops, peak_flops_per_second=config.loop.peak_flops_per_second),
                recent_losses=recent_losses,
                progress=main,
            )
        draw_run(run)
        parameters = sum(x.size for x in jax.tree.leaves(state.parameters))
        return FinishedRun(parameters, time.perf_counter() - begin, report)


def step_work(task: Task, model_flops: int, *, peak_flops_per_second: float | None) -> StepWork:
    """What a step amounts to on the task's mesh; the data sheet's peak where None is configured."""
    mesh = task.parallel.mesh
    peak = device_peak_flops_per_second(mesh.devices.flat[0], configured=peak_flops_per_second)
    return StepWork(tokens=task.tokens, model_flops=model_flops, devices=mesh.size, peak_flops_per_second=peak)


def open_writers(
    stack: contextlib.ExitStack, run: RunDirectory, wandb: WandbConfig, *, start: int, resolved: Mapping[str, Any]
) -> list[MetricsWriter]:
    """Console, JSONL and wandb; each is closed with the stack, also when the next one cannot be opened."""
    writers: list[MetricsWriter] = []
    for make in (
        ConsoleWriter,
        lambda: JsonlWriter(run.metrics, resume_step=start),
        lambda: WandbWriter(wandb, folder=run.path, run_config=resolved),
    ):
        writer = make()
        stack.push(lambda _kind, error, _traceback, writer=writer: writer.close(error))
        writers.append(writer)
    return writers


def draw_run(run: RunDirectory) -> None:
    """The run's pictures, on the main process."""
    if is_main_process():
        plot_learning_curve(run.metrics, run.plots / "learning_curve.png")
        plot_run(run.metrics, run.plots / "run.png")


def say(line: str) -> None:
    """A line for people, from the main process alone."""
    if is_main_process():
        print(line, flush=True)
