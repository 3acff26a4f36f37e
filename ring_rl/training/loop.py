"""The training loop: batches in, metrics and checkpoints out, resumable to the bit."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax

from ring_rl.training.checkpoint import BestCheckpoints, Checkpointer
from ring_rl.training.distributed import agree_to_stop, is_main_process
from ring_rl.training.divergence import DivergenceCheck, DivergenceError, all_finite, save_offending_batch
from ring_rl.training.input import BatchStream
from ring_rl.training.interrupt import StopRequest, TrainingInterrupted
from ring_rl.training.metrics import PERFORMANCE_PREFIX, MetricsWriter
from ring_rl.training.milestone import Milestone
from ring_rl.training.profile import ProfileConfig, StepProfiler
from ring_rl.training.progress import TrainingProgress
from ring_rl.training.state import TrainState
from ring_rl.training.throughput import IntervalClock, StepWork

__all__ = ["DivergenceError", "LoopConfig", "LoopIntervals", "train"]

# Dispatch runs ahead of the devices by this many steps: enough to hide the host, few batches in memory.
_STEPS_IN_FLIGHT = 2
_EVALUATION = "evaluation/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopIntervals:
    """How often to do what besides training.

    Attributes:
        log_every: steps between two records of the metrics.
        checkpoint_every: steps between two checkpoints; the last step always has one.
        keep_checkpoints: how many of the newest stay on disk.
        best_metric: keep the checkpoints that are best by this metric too, such as "loss" (of the batch of that
            step) or "evaluation/return"; null keeps none for being good.
        best_mode: whether the least or the greatest value is the best.
        keep_best: how many of the best stay on disk, among them perhaps some of the newest.
        largest_loss_ratio: stop where the loss is more than this many times the median of the last ones, see
            `DivergenceCheck`; null stops only where it is not finite.
        peak_flops_per_second: of one device, for model FLOPs utilisation; null takes the data sheet's figure
            where the device has one, and reports no utilisation where not, as on CPUs.
        profile: steps to trace; null traces none.
    """

    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    best_metric: str | None
    best_mode: Literal["min", "max"]
    keep_best: int
    largest_loss_ratio: float | None
    peak_flops_per_second: float | None
    profile: ProfileConfig | None

    def __post_init__(self) -> None:
        self._check_at_least_one("log_every", "checkpoint_every", "keep_checkpoints", "keep_best")
        if self.largest_loss_ratio is not None and not 1 < self.largest_loss_ratio < math.inf:
            raise ValueError(f"largest_loss_ratio must lie above 1, got {self.largest_loss_ratio}; null turns it off")
        if self.peak_flops_per_second is not None and not 0 < self.peak_flops_per_second < math.inf:
            raise ValueError(f"peak_flops_per_second must be positive, got {self.peak_flops_per_second}")

    @property
    def traced(self) -> ProfileConfig | None:
        """The steps to trace, or None."""
        return self.profile if self.profile is not None and self.profile.enabled else None

    @property
    def best_checkpoints(self) -> BestCheckpoints | None:
        """For the `Checkpointer`."""
        if self.best_metric is None:
            return None
        return BestCheckpoints(metric=self.best_metric, mode=self.best_mode, keep=self.keep_best)

    def until(self, steps: int, *, profile: bool = True) -> LoopConfig:
        """With so many steps in all and no evaluation; without the profile where it is not wanted."""
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(LoopIntervals)}
        fields["profile"] = self.profile if profile else None
        return LoopConfig(**fields, steps=steps, evaluate_every=None)

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig(LoopIntervals):
    """How long to train and how often to do what besides; see `LoopIntervals`.

    Attributes:
        steps: optimizer steps in all, counted from the very first one.
        evaluate_every: steps between two evaluations, the last step always has one; null for none at all.
    """

    steps: int
    evaluate_every: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least_one("steps", "evaluate_every")
        if self.best_metric is not None and self.best_metric.startswith(_EVALUATION):
            if self.evaluate_every is None:
                raise ValueError(f"best_metric is {self.best_metric}, but nothing is evaluated; set evaluate_every")
            if self.checkpoint_every % self.evaluate_every:
                raise ValueError(
                    f"best_metric is {self.best_metric}, so each checkpoint needs an evaluation: checkpoint_every "
                    f"must be a multiple of evaluate_every={self.evaluate_every}, got {self.checkpoint_every}"
                )
        if self.traced is not None and self.traced.start_step + self.traced.steps > self.steps:
            raise ValueError(
                f"the profile of steps {self.traced.start_step} to {self.traced.start_step + self.traced.steps} "
                f"ends after the last step {self.steps}; lower profile.start_step or profile.steps"
            )


def train(
    *,
    state: TrainState,
    step_function: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    batches: BatchStream,
    config: LoopConfig,
    checkpointer: Checkpointer,
    writers: Sequence[MetricsWriter],
    run_folder: pathlib.Path,
    work: StepWork | None = None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    recent_losses: Iterable[float] = (),
    milestone: Milestone | None = None,
    more_follows: bool = False,
    progress: bool = True,
) -> TrainState:
    """Train from `state.step` to `config.steps`.

    Metrics after s steps are recorded as step s, those of `evaluate` under "evaluation/" and those of the
    machine under "performance/", before the checkpoint of step s is begun. They are fetched from the devices
    only where they are logged or saved; between two such steps the loop only keeps the devices from being
    more than two steps behind.

    SIGINT and SIGTERM let the current step finish, save it and raise `TrainingInterrupted` (an evaluation due
    at that very step is left out); a second one ends the process at once. During the run's last step they change
    nothing: it is evaluated and saved as ever. The handlers that were there before are restored. Outside the
    main thread no handlers are set, because Python allows none.

    Where several processes train together all of them call this with the same arguments, except that only the
    main one has writers and shows progress. Asked to stop, they stop after the same step; every other decision
    follows from metrics that all of them have.

    Args:
        state: where to start; it is donated to the first step.
        step_function: as from `make_train_step`.
        batches: its next batch is that of step `state.step`; its state is saved with every checkpoint. The
            caller closes it.
        config: steps and intervals.
        checkpointer: receives the state, now and then and at the end.
        writers: receive each record; the caller closes them.
        run_folder: holds `offending_batch/` after a divergence and `profile/` where one is asked for.
        work: what a step amounts to, for tokens per second and model FLOPs utilisation.
        evaluate: called with the state every `evaluate_every` steps.
        recent_losses: of the checkpoint that training goes on from, `CheckpointMetadata.recent_losses`.
        milestone: where it is reached, that step is treated as the last one.
        more_follows: the last step is not that of the run, so a request to stop counts there as anywhere.
        progress: show a progress bar.

    Returns:
        The state after `config.steps` steps, or after those that the milestone asked for, saved.

    Raises:
        DivergenceError: the loss, the norm of its gradient or a parameter is not finite, or the loss has
            exploded; the state is not saved, the batch of that step is, in `<run_folder>/offending_batch/`.
        TrainingInterrupted: stopped by a signal; the state is saved.
        ValueError: the state is past the last step, an evaluation is configured and none is given, there is
            no metric `best_metric`, or the batches end early.
    """
    start = int(state.step)
    if start > config.steps:
        raise ValueError(f"the state has taken {start} steps, more than the {config.steps} to train; raise steps")
    evaluate_every = config.evaluate_every
    if evaluate_every is None:
        evaluate = _no_evaluation
    elif evaluate is None:
        raise ValueError(f"evaluate_every is {evaluate_every}, but there is no evaluation; set it to null")
    check = DivergenceCheck(config.largest_loss_ratio, recent_losses)
    pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
    clock = IntervalClock(work)

    def save(newest: Mapping[str, float]) -> None:
        with clock.waiting_for_checkpoint():
            checkpointer.save(state, input_state=batches.state(), metrics=newest, recent_losses=check.recent_losses)

    def fail(complaint: str, done: int) -> DivergenceError:
        return _divergence(complaint, done, checkpointer, batches, run_folder)

    profile = config.traced if is_main_process() else None
    with (
        TrainingProgress(start, config.steps, visible=progress) as bar,
        StopRequest() as stop,
        StepProfiler(profile, run_folder / "profile") as profiler,
    ):
        clock.restart(start)
        for step in range(start, config.steps):
            with clock.waiting_for_input():
                batch = _next_batch(batches, step, config.steps)
            with profiler.step(step, state):
                state, metrics = step_function(state, batch)
            done = step + 1
            pending.append((done, metrics))
            if step == start:
                # Compilation is over when the first step is; it says nothing about steps per second.
                jax.block_until_ready(metrics)
                _require_best_metric(config.best_metric, metrics, of_evaluation=False)
                clock.restart(done)
            elif len(pending) > _STEPS_IN_FLIGHT:
                jax.block_until_ready(pending[-1 - _STEPS_IN_FLIGHT][1])
            bar.advance(done)
            if profiler.ends_after(done):
                with clock.paused():
                    profiler.stop(state)

            # Read once: a signal may come between any two lines, and what is saved must have been checked.
            # After the run's last step there is nothing to stop: a complete run would never be evaluated again.
            last = done == config.steps
            stopping = agree_to_stop(done, stop.requested) and (more_follows or not last)
            log_now = last or done % config.log_every == 0
            save_now = last or stopping or done % config.checkpoint_every == 0
            evaluate_now = evaluate_every is not None and (last or done % evaluate_every == 0) and not stopping
            if not (log_now or save_now or evaluate_now or (milestone is not None and milestone.due(done))):
                continue
            newest = _fetch_checked(pending, check, fail, milestone)
            if milestone is not None and milestone.reached(done) and not last:
                last = log_now = save_now = True
                evaluate_now = evaluate_every is not None and not stopping
            record = dict(newest) if log_now else {}
            if log_now:
                figures = clock.metrics(done)
                bar.report(loss=newest["loss"], steps_per_second=figures.get(f"{PERFORMANCE_PREFIX}steps_per_second"))
                record |= figures
                clock.restart(done)
            if evaluate_now:
                with clock.paused():
                    evaluation = {f"{_EVALUATION}{name}": value for name, value in evaluate(state).items()}
                _require_best_metric(config.best_metric, evaluation, of_evaluation=True)
                newest |= evaluation
                record |= evaluation
            if record:
                for writer in writers:
                    writer.write(done, record)
            if save_now:
                if not bool(all_finite(state.parameters)):
                    raise fail("a parameter is not finite", done)
                save(newest)
            if stopping:
                checkpointer.wait()
                raise TrainingInterrupted(f"step {done} of {config.steps} is saved; start again to resume")
            if last:
                break
        # Also where there was nothing left to do: a finished run has its last checkpoint.
        if start == config.steps:
            save({})
        # A first signal must not end the process while the last checkpoint is being written.
        checkpointer.wait()
        if more_follows and agree_to_stop(int(state.step), stop.requested):
            raise TrainingInterrupted(f"step {int(state.step)} is saved; start again to resume")
    return state


def _no_evaluation(_: TrainState) -> Mapping[str, float]:
    return {}


def _next_batch(batches: BatchStream, step: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(f"the input ended before step {step + 1} of {steps}; lower steps or give it more") from None


def _fetch_checked(
    pending: collections.deque[tuple[int, Mapping[str, Any]]],
    check: DivergenceCheck,
    fail: Callable[[str, int], DivergenceError],
    milestone: Milestone | None,
) -> dict[str, float]:
    """The newest of the pending metrics as floats, once all of them are found good; empties `pending`."""
    # One call for all: their transfers are under way together.
    fetched = jax.device_get([list(metrics.values()) for _, metrics in pending])
    newest: dict[str, float] = {}
    for (step, metrics), values in zip(pending, fetched, strict=True):
        newest = dict(zip(metrics, map(float, values), strict=True))
        # jit sorts names; the first thing to look at goes first.
        newest = {"loss": newest["loss"]} | newest
        complaint = check.complaint(newest)
        if complaint is not None:
            raise fail(complaint, step)
        if milestone is not None:
            milestone.observe(step, newest)
    pending.clear()
    return newest


def _divergence(
    complaint: str, done: int, checkpointer: Checkpointer, batches: BatchStream, run_folder: pathlib.Path
) -> DivergenceError:
    """The error to raise, after what is needed to look into it is on disk."""
    try:
        saved_batch = (
            f"its batch is in {save_offending_batch(run_folder / 'offending_batch', done, batches.batch_at(done - 1))}"
        )
    except Exception as error:
        # The divergence is the news; that its batch could not be kept must not hide it.
        saved_batch = f"its batch could not be saved ({error})"
    with contextlib.suppress(OSError):
        checkpointer.wait()
    good = checkpointer.latest_step()
    checkpoint = (
        "no checkpoint was saved before"
        if good is None
        else f"the last good checkpoint is that of step {good} in {checkpointer.folder}"
    )
    return DivergenceError(
        f"{complaint} after step {done}; {checkpoint}; {saved_batch}; "
        f"lower learning_rate or gradient_clip_norm and train in another run_dir"
    )


def _require_best_metric(best_metric: str | None, present: Mapping[str, Any], *, of_evaluation: bool) -> None:
    """Refuses a best_metric that nothing reports, at the first step or evaluation and not after a day."""
    if best_metric is None or best_metric.startswith(_EVALUATION) != of_evaluation or best_metric in present:
        return
    raise ValueError(f"there is no metric {best_metric} for best_metric; choose one of {', '.join(sorted(present))}")
