from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.interrupt import TrainingInterrupted
from ring_rl.training.loop import DivergenceError, LoopConfig, train
from ring_rl.training.state import TrainState


class ListWriter:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def write(self, step, metrics):
        self.records.append((step, dict(metrics)))

    def close(self):
        pass


@jax.jit
def add_batch(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """The parameter sums the batches, and the loss is the batch, so a batch can make it NaN."""
    parameters = {"total": state.parameters["total"] + batch}
    metrics = {"loss": batch, "gradient_norm": jnp.abs(batch)}
    return TrainState(state.step + 1, parameters, {}), metrics


def initial(step: int = 0) -> TrainState:
    return jax.device_put(TrainState(jnp.int32(step), {"total": jnp.float32(0)}, {}), jax.devices()[0])


def run(
    folder: pathlib.Path,
    *,
    steps: int = 10,
    log_every: int = 2,
    checkpoint_every: int = 4,
    evaluate_every: int | None = None,
    state: TrainState | None = None,
    batch_at=float,
    step_function=add_batch,
    **options,
) -> tuple[TrainState, list[tuple[int, dict[str, float]]]]:
    writer = ListWriter()
    config = LoopConfig(steps, log_every, checkpoint_every, keep_checkpoints=9, evaluate_every=evaluate_every)
    with Checkpointer(folder, keep=9, model_config={}) as checkpointer:
        state = train(
            state=state or initial(),
            step_function=step_function,
            batch_at=lambda step: jnp.float32(batch_at(step)),
            config=config,
            checkpointer=checkpointer,
            writers=[writer],
            progress=False,
            **options,
        )
    return state, writer.records


def saved_steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def test_every_step_sees_its_batch_once_and_intervals_hold(tmp_path):
    state, records = run(tmp_path, steps=9)
    assert int(state.step) == 9
    assert float(state.parameters["total"]) == sum(range(9))
    assert [step for step, _ in records] == [2, 4, 6, 8, 9]
    assert [record["loss"] for _, record in records] == [1, 3, 5, 7, 8]
    assert all(record["steps_per_second"] > 0 for _, record in records)
    assert saved_steps(tmp_path) == [4, 8, 9]


def test_training_goes_on_from_the_state_it_is_given(tmp_path):
    batches = []

    def batch_at(step: int) -> int:
        batches.append(step)
        return step

    state, records = run(tmp_path, state=initial(6), batch_at=batch_at)
    assert batches == [6, 7, 8, 9]
    assert [step for step, _ in records] == [8, 10]
    assert int(state.step) == 10


def test_a_finished_run_takes_no_step(tmp_path):
    state, records = run(tmp_path, state=initial(10))
    assert int(state.step) == 10
    assert records == []
    assert saved_steps(tmp_path) == [10]
    with pytest.raises(ValueError, match="has taken 11 steps, more than the 10 to train"):
        run(tmp_path, state=initial(11))


def test_evaluation_comes_at_its_interval_and_at_the_end(tmp_path):
    def evaluate(state: TrainState) -> dict[str, float]:
        return {"total": float(state.parameters["total"])}

    _, records = run(tmp_path, steps=7, evaluate_every=3, evaluate=evaluate)
    evaluations = {step: record["evaluation/total"] for step, record in records if "evaluation/total" in record}
    assert evaluations == {3: 3, 6: 15, 7: 21}
    assert [step for step, _ in records] == [2, 3, 4, 6, 7]
    with pytest.raises(ValueError, match="evaluate_every is 3, but there is no evaluation"):
        run(tmp_path, evaluate_every=3)


@pytest.mark.parametrize(("bad_step", "last_good"), [(5, "that of step 4 in "), (2, "no checkpoint was saved")])
def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path, bad_step, last_good):
    def batch_at(step: int) -> float:
        return float("nan") if step == bad_step else 1.0

    # Metrics are fetched every 10 steps; the checkpoint of a later step must not be saved on the way.
    message = rf"loss is nan after step {bad_step + 1}; .*{re.escape(last_good)}"
    with pytest.raises(DivergenceError, match=message):
        run(tmp_path, log_every=10, batch_at=batch_at)
    assert saved_steps(tmp_path) == [step for step in (4,) if step <= bad_step]


def test_a_gradient_that_is_not_finite_stops_training_too(tmp_path):
    def step_function(state: TrainState, batch: jax.Array):
        state, metrics = add_batch(state, batch)
        return state, {**metrics, "gradient_norm": metrics["gradient_norm"] / 0}

    with pytest.raises(DivergenceError, match="gradient_norm is inf after step 1"):
        run(tmp_path, step_function=step_function, batch_at=lambda step: step + 1.0)


def test_an_error_in_the_data_reaches_the_caller(tmp_path):
    def batch_at(step: int) -> float:
        if step == 3:
            raise FileNotFoundError("episode 3 is missing")
        return 0.0

    with pytest.raises(FileNotFoundError, match="episode 3"):
        run(tmp_path, batch_at=batch_at)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch_at")]


def test_the_next_batch_is_prepared_while_a_step_runs(tmp_path):
    started = [threading.Event() for _ in range(10)]

    def batch_at(step: int) -> float:
        started[step].set()
        return 0.0

    def step_function(state: TrainState, batch: jax.Array):
        upcoming = int(state.step) + 1
        if upcoming < 10:
            assert started[upcoming].wait(timeout=10), f"batch {upcoming} waits for step {upcoming - 1} to end"
        return add_batch(state, batch)

    assert int(run(tmp_path, batch_at=batch_at, step_function=step_function)[0].step) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_saves_it(tmp_path, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def step_function(state: TrainState, batch: jax.Array):
        if int(state.step) == 4:
            os.kill(os.getpid(), number)
        return add_batch(state, batch)

    with pytest.raises(TrainingInterrupted, match="step 5 of 10 is saved; start again to resume"):
        run(tmp_path, step_function=step_function)
    assert saved_steps(tmp_path) == [4, 5]
    assert {each: signal.getsignal(each) for each in before} == before
    with Checkpointer(tmp_path, keep=9, model_config={}) as checkpointer:
        state, _ = checkpointer.restore_latest(initial())
    assert float(run(tmp_path, state=state)[0].parameters["total"]) == sum(range(10))


def test_a_diverged_state_is_not_saved_on_a_signal(tmp_path):
    def step_function(state: TrainState, batch: jax.Array):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return add_batch(state, jnp.float32("nan"))

    with pytest.raises(DivergenceError):
        run(tmp_path, log_every=10, step_function=step_function)
    assert saved_steps(tmp_path) == []


def test_a_second_signal_ends_the_process_at_once():
    source = (
        "import os, signal, time\n"
        "from ring_rl.training.interrupt import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.requested\n"
        "    print('asked', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=50)
    assert result.stdout == "asked\n"
    assert result.returncode == -signal.SIGINT
    assert "once more to end at once" in result.stderr


def test_it_works_outside_the_main_thread(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert int(results[0][0].step) == 10
    assert signal.getsignal(signal.SIGINT) is before


def test_the_progress_bar_shows_the_end(tmp_path, capsys):
    run_options = dataclasses.asdict(LoopConfig(4, 2, 4, 1, None))
    with Checkpointer(tmp_path, keep=1, model_config={}) as checkpointer:
        train(
            state=initial(),
            step_function=add_batch,
            batch_at=jnp.float32,
            config=LoopConfig(**run_options),
            checkpointer=checkpointer,
            writers=[],
        )
    shown = capsys.readouterr().out
    assert "training" in shown
    assert "4/4" in shown
    assert "steps/s" in shown


@pytest.mark.parametrize("field", ["steps", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every"])
def test_intervals_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        dataclasses.replace(LoopConfig(1, 1, 1, 1, None), **{field: 0})
