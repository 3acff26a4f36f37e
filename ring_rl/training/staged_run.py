"""One training run in stages: sequence length, data, rotary base, learning rate may change from one to the next.

All stages share one run folder, one metrics file and one row of checkpoints, in which steps count on. Each stage
compiles once; parameters and, if asked, the optimizer's moments go on. Every checkpoint says which stage wrote it, so
a killed run goes on inside its stage, and one that was killed between two stages with the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.distributed import is_main_process
from ring_rl.training.dry_run import dry_run, print_dry_run
from ring_rl.training.input import InputConfig
from ring_rl.training.loop import LoopIntervals, train
from ring_rl.training.metrics import MetricsWriter, WandbConfig
from ring_rl.training.milestone import Milestone
from ring_rl.training.optimizer import make_optimizer
from ring_rl.training.provenance import record_start
from ring_rl.training.run import draw_run, open_writers, say, step_work
from ring_rl.training.run_directory import RunDirectory, open_run_directory
from ring_rl.training.stage import StagePlace, StageStream, StageWriter, TrainingStage, place_of
from ring_rl.training.stage_records import StageRecord, read_stage_records, record_of_stage, write_stage_record
from ring_rl.training.state import TrainState, state_from_parameters
from ring_rl.training.step import compile_step, compiled_report
from ring_rl.training.task import PreparedTask
from ring_rl.typing import PyTree

__all__ = ["FinishedStages", "StagedRunConfig", "run_stages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagedRunConfig:
    """How the stages are run, whatever they are; see `RunConfig`."""

    run_dir: pathlib.Path
    seed: int
    dry_run: bool
    device_memory_gib: float | None
    loop: LoopIntervals
    input: InputConfig
    wandb: WandbConfig

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}; others would repeat one of these")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedStages:
    """What a run was, for a last line on the console.

    Attributes:
        parameters: numbers that were trained.
        seconds: from the opening of the folder to the last picture, compilation included; of this process.
        steps: of all stages.
        stages: those that this process finished.
        compiled: of the last stage, as from `compiled_report`.
    """

    parameters: int
    seconds: float
    steps: int
    stages: Sequence[StageRecord]
    compiled: Mapping[str, int]


def run_stages(
    stages: Sequence[TrainingStage],
    config: StagedRunConfig,
    *,
    resolved: Mapping[str, Any],
    may_differ: tuple[str, ...],
    headline: str,
    initial_parameters: Callable[[], PyTree[jax.Array]] | None = None,
) -> FinishedStages | None:
    """Train one stage after the other, from the last checkpoint if the run folder has one.

    All processes call it; the main one alone prints, logs and draws.

    Args:
        stages: in order; all on one mesh.
        config: everything else.
        resolved: the whole resolved configuration, kept in the run folder; another one is refused.
        may_differ: dotted paths of it that may change when a run goes on.
        headline: printed when the run folder is open.
        initial_parameters: makes the parameters to begin with, an `nnx.State`; None: those of the task.

    Returns:
        None after a dry run, and where the run was complete already; its pictures are drawn again.

    Raises:
        ValueError: there is no stage, two share a name, one keeps moments that the one before does not have, or the
            mesh cannot share one; all of this before anything is made. See also `run_training`.
        TrainingInterrupted: stopped by a signal; the state is saved.
    """
    _check(stages, config)
    if config.dry_run:
        for stage in stages:
            _print_dry_run(stage, config)
        return None
    begin = time.perf_counter()
    with open_run_directory(config.run_dir, resolved, may_differ=may_differ) as run, contextlib.ExitStack() as stack:
        say(headline)
        current = _current(stages, config, run, initial_parameters)
        if current.over and is_main_process():
            _record_what_was_not(stages[current.place.stage], run, current)
        if current.over and current.place.stage + 1 == len(stages):
            draw_run(run)
            say(f"{run.path} is complete; train its checkpoint further in a new run_dir")
            return None
        start = int(current.state.step)
        writers = open_writers(stack, run, config.wandb, start=start, resolved=resolved) if is_main_process() else []
        if is_main_process():
            record_start(run.path, start)
        finished: list[StageRecord] = []
        report: Mapping[str, int] = {}
        while True:
            if current.over:
                if current.place.stage + 1 == len(stages):
                    break
                current = _next(stages, config, current)
            current, record, report = _train_stage(stages, config, run, current, writers)
            finished.append(record)
        draw_run(run)
        parameters = sum(x.size for x in jax.tree.leaves(current.state.parameters))
        return FinishedStages(
            parameters=parameters,
            seconds=time.perf_counter() - begin,
            steps=int(current.state.step),
            stages=finished,
            compiled=report,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Current:
    """A run between two calls of `train`.

    Attributes:
        place: the stage.
        state: parameters and moments.
        milestone: of the stage.
        recent_losses: of the stage.
        over: whether the stage is.
    """

    place: StagePlace
    state: TrainState
    milestone: Milestone
    recent_losses: Sequence[float]
    over: bool


def _check(stages: Sequence[TrainingStage], config: StagedRunConfig) -> None:
    """Refuses, before there is a folder, what some stage could not be trained with."""
    if not stages:
        raise ValueError("there is no stage to train; give at least one")
    names = [stage.name for stage in stages]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two stages are called {doubled[0]}; give each a name of its own")
    if config.loop.best_metric is not None and config.loop.best_metric.startswith("evaluation/"):
        raise ValueError(f"best_metric is {config.loop.best_metric}, but nothing is evaluated; choose a step's metric")
    before = None
    for index, stage in enumerate(stages):
        config.loop.until(stage.steps, profile=index == 0)
        try:
            prepared = _prepare(stage, config, StagePlace(stage=index, first_step=0, moments_since=0))
        except ValueError as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
        prepared.stream.close()
        described = jax.tree.map(lambda x: (x.shape, str(x.dtype)), prepared.abstract_state)
        if before is not None:
            if described.parameters != before.parameters:
                raise ValueError(
                    f"stage {stage.name} has other parameters than {stages[index - 1].name}; stages share one model"
                )
            if stage.keep_moments and described.optimizer_state != before.optimizer_state:
                raise ValueError(
                    f"stage {stage.name} keeps the moments of {stages[index - 1].name}, whose optimizer is another; "
                    f"set keep_moments: false"
                )
        before = described


def _prepare(stage: TrainingStage, config: StagedRunConfig, place: StagePlace) -> PreparedTask:
    return stage.task.prepare(
        seed=config.seed,
        steps=stage.steps,
        optimizer=stage.optimizer,
        accumulation_steps=stage.accumulation_steps,
        input=config.input,
        first_step=place.first_step,
        first_update=place.first_step - place.moments_since,
    )


def _print_dry_run(stage: TrainingStage, config: StagedRunConfig) -> None:
    prepared = _prepare(stage, config, StagePlace(stage=0, first_step=0, moments_since=0))
    with contextlib.closing(prepared.stream):
        report = dry_run(
            prepared.step,
            prepared.abstract_state,
            prepared.stream.abstract_batch,
            mesh=stage.task.parallel.mesh,
            tokens=stage.task.tokens,
            model_flops=stage.task.model_flops(prepared.abstract_state.parameters),
            device_memory_gib=config.device_memory_gib,
        )
    say(f"stage {stage.name}")
    if is_main_process():
        print_dry_run(report)


def _checkpointer(stage: TrainingStage, config: StagedRunConfig, run: RunDirectory) -> Checkpointer:
    return Checkpointer(
        run.checkpoints,
        keep=config.loop.keep_checkpoints,
        best=config.loop.best_checkpoints,
        model_config=stage.task.model_config,
        may_differ=stage.task.memory_choices,
        extra={**stage.task.extra, "stage": stage.name},
    )


def _current(
    stages: Sequence[TrainingStage],
    config: StagedRunConfig,
    run: RunDirectory,
    initial_parameters: Callable[[], PyTree[jax.Array]] | None,
) -> _Current:
    """The run as its folder holds it, or at its very beginning."""
    with _checkpointer(stages[0], config, run) as checkpointer:
        latest = checkpointer.latest_step()
    if latest is None:
        stage, place = stages[0], StagePlace(stage=0, first_step=0, moments_since=0)
        prepared = _prepare(stage, config, place)
        prepared.stream.close()
        if initial_parameters is None:
            state = prepared.create_state()
        else:
            optimizer = make_optimizer(stage.optimizer, total_steps=stage.steps)
            state = state_from_parameters(initial_parameters(), optimizer, step=0, like=prepared.abstract_state)
        return _Current(place=place, state=state, milestone=_milestone(stage, place), recent_losses=(), over=False)
    place, observed = place_of(run.checkpoints / str(latest), stages)
    stage = stages[place.stage]
    prepared = _prepare(stage, config, place)
    prepared.stream.close()
    with _checkpointer(stage, config, run) as checkpointer:
        state, metadata = checkpointer.restore_latest(prepared.abstract_state)
    step, milestone = int(state.step), _milestone(stage, place, observed)
    say(f"continues from step {step}, in stage {stage.name}, of {run.path}")
    return _Current(
        place=place,
        state=state,
        milestone=milestone,
        recent_losses=metadata.recent_losses,
        over=step == place.first_step + stage.steps or milestone.reached(step),
    )


def _milestone(stage: TrainingStage, place: StagePlace, observed: Sequence[float] = ()) -> Milestone:
    return Milestone(
        stage.advance_when, first_step=place.first_step, minimum_steps=stage.minimum_steps, observed=observed
    )


def _next(stages: Sequence[TrainingStage], config: StagedRunConfig, current: _Current) -> _Current:
    """The beginning of the next stage, with the state of the one that is over."""
    step, stage = int(current.state.step), stages[current.place.stage + 1]
    moments_since = current.place.moments_since if stage.keep_moments else step
    place = StagePlace(stage=current.place.stage + 1, first_step=step, moments_since=moments_since)
    state = current.state
    if not stage.keep_moments:
        prepared = _prepare(stage, config, place)
        prepared.stream.close()
        optimizer = make_optimizer(stage.optimizer, total_steps=stage.steps)
        state = state_from_parameters(state.parameters, optimizer, step=step, like=prepared.abstract_state)
    return _Current(place=place, state=state, milestone=_milestone(stage, place), recent_losses=(), over=False)


def _train_stage(
    stages: Sequence[TrainingStage],
    config: StagedRunConfig,
    run: RunDirectory,
    current: _Current,
    writers: Sequence[MetricsWriter],
) -> tuple[_Current, StageRecord, Mapping[str, int]]:
    place, stage = current.place, stages[current.place.stage]
    start = int(current.state.step)
    prepared = _prepare(stage, config, place)
    stream = StageStream(prepared.stream, place, current.milestone)
    task, begin = stage.task, time.perf_counter()
    with contextlib.closing(stream), _checkpointer(stage, config, run) as checkpointer:
        # Every row has its place in the run's count of steps, so nothing but that count need be restored.
        prepared.stream.restore({"next_step": start, "batch_size": task.batch_size})
        stream.start()
        compiled = compile_step(prepared.step, current.state, stream.abstract_batch)
        report = compiled_report(compiled)
        compile_seconds = time.perf_counter() - begin
        say(
            f"stage {stage.name} ({place.stage + 1} of {len(stages)}): {task.tokens} tokens a step, at most "
            f"{stage.steps} steps, compiled in {compile_seconds:.1f} s"
        )
        if is_main_process():
            facts = {"mesh": dict(task.parallel.mesh.shape), **report}
            record_of_stage(run.path / "compiled.json", stage.name, facts)
        state = train(
            state=current.state,
            step_function=compiled,
            batches=stream,
            config=config.loop.until(place.first_step + stage.steps, profile=place.stage == 0),
            checkpointer=checkpointer,
            writers=[StageWriter(writer, place.stage) for writer in writers],
            run_folder=run.path,
            work=step_work(
                task,
                task.model_flops(prepared.abstract_state.parameters),
                peak_flops_per_second=config.loop.peak_flops_per_second,
            ),
            recent_losses=current.recent_losses,
            milestone=current.milestone,
            more_follows=place.stage + 1 < len(stages),
            progress=is_main_process(),
        )
    record = _stage_record(
        stage,
        dataclasses.replace(current, state=state),
        compile_seconds=compile_seconds,
        train_seconds=time.perf_counter() - begin - compile_seconds,
        resumed=start > place.first_step,
    )
    if is_main_process():
        write_stage_record(run.path, record)
    return dataclasses.replace(current, state=state, over=True), record, report


def _stage_record(
    stage: TrainingStage, current: _Current, *, compile_seconds: float, train_seconds: float, resumed: bool
) -> StageRecord:
    first, last = current.place.first_step, int(current.state.step)
    return StageRecord(
        name=stage.name,
        first_step=first,
        last_step=last,
        tokens=(last - first) * stage.task.tokens,
        advanced=current.milestone.reached(last),
        compile_seconds=round(compile_seconds, 3),
        train_seconds=round(train_seconds, 3),
        resumed=resumed,
    )


def _record_what_was_not(stage: TrainingStage, run: RunDirectory, current: _Current) -> None:
    """The record of a stage whose process ended between its last checkpoint and its record; its seconds are lost."""
    if stage.name not in read_stage_records(run.path):
        record = _stage_record(stage, current, compile_seconds=0.0, train_seconds=0.0, resumed=True)
        write_stage_record(run.path, record)
