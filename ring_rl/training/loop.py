"""The training loop: batches in, metrics and checkpoints out, resumable to the bit."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.interrupt import StopRequest, TrainingInterrupted
from ring_rl.training.metrics import MetricsWriter
from ring_rl.training.progress import TrainingProgress
from ring_rl.training.state import TrainState
from ring_rl.typing import PyTree

__all__ = ["DivergenceError", "LoopConfig", "train"]

# Dispatch runs ahead of the devices by this many steps: enough to hide the host, few batches in memory.
_STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to do what besides.

    Attributes:
        steps: optimizer steps in all, counted from the very first one.
        log_every: steps between two records of the metrics.
        checkpoint_every: steps between two checkpoints; the last step always has one.
        keep_checkpoints: how many of them stay on disk.
        evaluate_every: steps between two evaluations, the last step always has one; null for none at all.
    """

    steps: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    evaluate_every: int | None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")


class DivergenceError(ValueError):
    """The loss or its gradient is not finite any more."""


def train(
    *,
    state: TrainState,
    step_function: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    batch_at: Callable[[int], PyTree[Any]],
    config: LoopConfig,
    checkpointer: Checkpointer,
    writers: Sequence[MetricsWriter],
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    progress: bool = True,
) -> TrainState:
    """Train from `state.step` to `config.steps`.

    Step s takes batch_at(s), s counted from 0, so a run that resumes from a checkpoint sees the batches that
    it would have seen. The next batch is prepared in a background thread while the devices work, and metrics
    are fetched only where they are logged or saved. Metrics after s steps are recorded as step s, those of
    `evaluate` under "evaluation/", before the checkpoint of step s is begun.

    SIGINT and SIGTERM let the current step finish, save it and raise `TrainingInterrupted` (an evaluation due
    at that very step is left out); a second one ends the process at once. The handlers that were there before
    are restored. Outside the main thread no handlers are set, because Python allows none.

    Args:
        state: where to start; it is donated to the first step.
        step_function: as from `make_train_step`.
        batch_at: a pure function of the step. It runs in another thread, one call at a time.
        config: steps and intervals.
        checkpointer: receives the state, now and then and at the end.
        writers: receive each record; the caller closes them.
        evaluate: called with the state every `evaluate_every` steps.
        progress: show a progress bar.

    Returns:
        The state after `config.steps` steps, saved.

    Raises:
        DivergenceError: the loss or the norm of its gradient is not finite; the state is not saved.
        TrainingInterrupted: stopped by a signal; the state is saved.
        ValueError: the state is past the last step, or an evaluation is configured and none is given.
    """
    start = int(state.step)
    if start > config.steps:
        raise ValueError(f"the state has taken {start} steps, more than the {config.steps} to train; raise steps")
    evaluate_every = config.evaluate_every
    if evaluate_every is None:
        evaluate = _no_evaluation
    elif evaluate is None:
        raise ValueError(f"evaluate_every is {evaluate_every}, but there is no evaluation; set it to null")
    pending: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
    with (
        TrainingProgress(start, config.steps, visible=progress) as bar,
        StopRequest() as stop,
        _prefetched(batch_at, start, config.steps) as batches,
    ):
        interval_start, interval_step = time.perf_counter(), start
        for step, batch in batches:
            state, metrics = step_function(state, batch)
            done = step + 1
            pending.append((done, metrics))
            if step == start:
                # Compilation is over when the first step is; it says nothing about steps per second.
                jax.block_until_ready(metrics)
                interval_start, interval_step = time.perf_counter(), done
            elif len(pending) > _STEPS_IN_FLIGHT:
                jax.block_until_ready(pending[-1 - _STEPS_IN_FLIGHT][1])
            bar.advance(done)

            last = done == config.steps
            evaluation: dict[str, float] = {}
            if evaluate_every is not None and (last or done % evaluate_every == 0) and not stop.requested:
                jax.block_until_ready(metrics)
                evaluation_start = time.perf_counter()
                evaluation = {f"evaluation/{name}": value for name, value in evaluate(state).items()}
                interval_start += time.perf_counter() - evaluation_start
            # Read once: a signal may come between any two lines, and what is saved must have been checked.
            stopping = stop.requested
            log_now = last or done % config.log_every == 0
            save_now = last or stopping or done % config.checkpoint_every == 0
            record: dict[str, float] = {}
            if log_now or save_now:
                newest = _fetch_finite(pending, checkpointer)
                if log_now:
                    record |= newest
                    seconds = time.perf_counter() - interval_start
                    if done > interval_step:
                        record["steps_per_second"] = (done - interval_step) / seconds
                        bar.report(loss=newest["loss"], steps_per_second=record["steps_per_second"])
                    interval_start, interval_step = time.perf_counter(), done
            record |= evaluation
            if record:
                for writer in writers:
                    writer.write(done, record)
            if save_now:
                checkpointer.save(state)
            if stopping:
                checkpointer.wait()
                raise TrainingInterrupted(f"step {done} of {config.steps} is saved; start again to resume")
    # Also where there was nothing left to do: a finished run has its last checkpoint.
    checkpointer.save(state)
    checkpointer.wait()
    return state


def _no_evaluation(_: TrainState) -> Mapping[str, float]:
    return {}


def _fetch_finite(
    pending: collections.deque[tuple[int, Mapping[str, Any]]], checkpointer: Checkpointer
) -> dict[str, float]:
    """The newest of the pending metrics as floats, once all of them are found finite; empties `pending`."""
    fetched: dict[str, float] = {}
    while pending:
        step, metrics = pending.popleft()
        fetched = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(fetched.get(name, 0.0)):
                checkpointer.wait()
                good = checkpointer.latest_step()
                saved = (
                    "no checkpoint was saved before"
                    if good is None
                    else f"the last good checkpoint is that of step {good} in {checkpointer.folder}"
                )
                raise DivergenceError(
                    f"{name} is {fetched[name]} after step {step}; {saved}; "
                    f"lower learning_rate or gradient_clip_norm and train in another run_dir"
                )
    return fetched


@contextlib.contextmanager
def _prefetched(
    batch_at: Callable[[int], PyTree[Any]], start: int, stop: int
) -> Iterator[Iterator[tuple[int, PyTree[Any]]]]:
    """Iterates (step, batch_at(step)), preparing one batch ahead in a thread."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch_at")

    def batches() -> Iterator[tuple[int, PyTree[Any]]]:
        if start == stop:
            return
        upcoming = executor.submit(batch_at, start)
        for step in range(start, stop - 1):
            batch = upcoming.result()
            upcoming = executor.submit(batch_at, step + 1)
            yield step, batch
        yield stop - 1, upcoming.result()

    try:
        yield batches()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
