from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_rl.training.checkpoint import Checkpointer, load_for_evaluation
from ring_rl.training.interrupt import TrainingInterrupted
from ring_rl.training.loop import DivergenceError, LoopConfig, train
from ring_rl.training.metrics import without_performance
from ring_rl.training.profile import ProfileConfig
from ring_rl.training.state import TrainState
from ring_rl.training.throughput import StepWork


class ListWriter:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []

    def write(self, step, metrics):
        self.records.append((step, dict(metrics)))

    def close(self, error=None):
        pass


@jax.jit
def add_batch(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """The parameter sums the batches, and the loss is the batch, so a batch can make it NaN."""
    parameters = {"total": state.parameters["total"] + batch}
    metrics = {"loss": batch, "gradient_norm": jnp.abs(batch)}
    return TrainState(state.step + 1, parameters, {}), metrics


class Batches:
    """A `BatchStream` of scalars, made when they are asked for."""

    def __init__(self, batch_at, start: int = 0, steps: int = 99):
        self._batch_at, self._step, self._steps = batch_at, start, steps

    def __next__(self):
        if self._step == self._steps:
            raise StopIteration
        self._step += 1
        return jnp.float32(self._batch_at(self._step - 1))

    def state(self):
        return {"next_step": self._step}

    def batch_at(self, step):
        return {"batch": np.float32(self._batch_at(step))}

    def close(self):
        pass


def loop_config(**changes) -> LoopConfig:
    settings = {
        "steps": 10,
        "log_every": 2,
        "checkpoint_every": 4,
        "keep_checkpoints": 9,
        "best_metric": None,
        "best_mode": "min",
        "keep_best": 1,
        "evaluate_every": None,
        "largest_loss_ratio": None,
        "peak_flops_per_second": None,
        "profile": None,
    }
    return LoopConfig(**(settings | changes))


def initial(step: int = 0) -> TrainState:
    return jax.device_put(TrainState(jnp.int32(step), {"total": jnp.float32(0)}, {}), jax.devices()[0])


def run(
    folder: pathlib.Path,
    *,
    state: TrainState | None = None,
    batch_at: Callable[[int], float] = float,
    batches_end: int = 99,
    step_function: Callable[..., Any] = add_batch,
    options: dict | None = None,
    **changes,
) -> tuple[TrainState, list[tuple[int, dict[str, float]]]]:
    """Train with `loop_config(**changes)`; the checkpoints lie in `<folder>/checkpoints`."""
    writer = ListWriter()
    config = loop_config(**changes)
    state = state or initial()
    with Checkpointer(folder / "checkpoints", keep=9, model_config={}, best=config.best_checkpoints) as checkpointer:
        state = train(
            state=state,
            step_function=step_function,
            batches=Batches(batch_at, int(state.step), batches_end),
            config=config,
            checkpointer=checkpointer,
            writers=[writer],
            run_folder=folder,
            progress=False,
            **(options or {}),
        )
    return state, writer.records


def saved_steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_every_step_sees_its_batch_once_and_intervals_hold(tmp_path):
    state, records = run(tmp_path, steps=9)
    assert int(state.step) == 9
    assert float(state.parameters["total"]) == sum(range(9))
    assert [step for step, _ in records] == [2, 4, 6, 8, 9]
    assert [record["loss"] for _, record in records] == [1, 3, 5, 7, 8]
    assert all(record["performance/steps_per_second"] > 0 for _, record in records)
    assert next(without_performance(record) for _, record in records) == {"loss": 1, "gradient_norm": 1}
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

    _, records = run(tmp_path, steps=7, evaluate_every=3, options={"evaluate": evaluate})
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
    # The batch that led there, beside the checkpoints and under the step's number in the metrics.
    [offending] = (tmp_path / "offending_batch").iterdir()
    assert offending.name == f"step_{bad_step + 1}.npz"
    assert np.isnan(np.load(offending)["batch"])


def test_a_gradient_that_is_not_finite_stops_training_too(tmp_path):
    def step_function(state: TrainState, batch: jax.Array):
        state, metrics = add_batch(state, batch)
        return state, {**metrics, "gradient_norm": metrics["gradient_norm"] / 0}

    with pytest.raises(DivergenceError, match="gradient_norm is inf after step 1"):
        run(tmp_path, step_function=step_function, batch_at=lambda step: step + 1.0)


def test_a_state_that_is_not_finite_is_not_saved_though_its_loss_still_is(tmp_path):
    def step_function(state: TrainState, batch: jax.Array):
        state, metrics = add_batch(state, batch)
        infinite = {"total": state.parameters["total"] + jnp.where(state.step == 3, jnp.inf, 0.0)}
        return dataclasses.replace(state, parameters=infinite), metrics

    with pytest.raises(DivergenceError, match="a parameter is not finite after step 4; no checkpoint was saved"):
        run(tmp_path, step_function=step_function)
    assert saved_steps(tmp_path) == []


def test_an_exploding_loss_stops_training(tmp_path):
    def batch_at(step: int) -> float:
        return 30.0 if step == 20 else 1.0 + step % 2

    exploded = r"loss 30 is more than 15 times the median 1\.5 of the 20 before it after step 21; .* of step 20 in "
    with pytest.raises(DivergenceError, match=exploded):
        run(tmp_path, steps=30, batch_at=batch_at, largest_loss_ratio=15.0)
    assert saved_steps(tmp_path)[-1] == 20
    assert run(tmp_path / "lenient", steps=30, batch_at=batch_at, largest_loss_ratio=25.0)[0].step == 30
    # A run that goes on from step 20 knows what came before it.
    with Checkpointer(tmp_path / "checkpoints", keep=9, model_config={}) as checkpointer:
        state, metadata = checkpointer.restore_latest(initial())
    assert metadata.recent_losses == [1.0, 2.0] * 10
    options = {"recent_losses": metadata.recent_losses}
    with pytest.raises(DivergenceError, match=exploded):
        run(tmp_path, state=state, steps=30, batch_at=batch_at, largest_loss_ratio=15.0, options=options)
    names = {path.name for path in (tmp_path / "offending_batch").iterdir()}
    assert names == {"step_21.npz", "step_21.2.npz"}, "an earlier file was replaced"


def test_a_batch_that_cannot_be_saved_does_not_hide_the_divergence(tmp_path):
    (tmp_path / "offending_batch").write_text("in the way")
    with pytest.raises(DivergenceError, match=r"loss is nan after step 1; .*; its batch could not be saved \("):
        run(tmp_path, batch_at=lambda _: float("nan"))


def test_the_best_checkpoints_stay(tmp_path):
    losses = [5, 1, 4, 2, 3, 6]

    def keep_one(folder: pathlib.Path, **options) -> list[int]:
        config = loop_config(steps=6, checkpoint_every=1, **options)
        with Checkpointer(
            folder / "checkpoints", keep=1, model_config={}, best=config.best_checkpoints
        ) as checkpointer:
            train(
                state=initial(),
                step_function=add_batch,
                batches=Batches(losses.__getitem__),
                config=config,
                checkpointer=checkpointer,
                writers=[],
                run_folder=folder,
                progress=False,
                evaluate=lambda state: {"loss": -losses[int(state.step) - 1]},
            )
        return saved_steps(folder)

    assert keep_one(tmp_path / "none") == [6]
    assert keep_one(tmp_path / "min", best_metric="loss", keep_best=2) == [2, 4, 6]
    assert keep_one(tmp_path / "max", best_metric="evaluation/loss", best_mode="max", evaluate_every=1) == [2, 6]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"best_metric": "accuracy"}, "there is no metric accuracy for best_metric; choose one of gradient_norm, loss"),
        (
            {"best_metric": "evaluation/win", "evaluate_every": 1, "checkpoint_every": 2},
            "there is no metric evaluation/win for best_metric; choose one of evaluation/total",
        ),
    ],
)
def test_a_best_metric_that_nothing_reports_is_refused_at_once(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(tmp_path, options={"evaluate": lambda _: {"total": 0.0}}, **changes)
    assert saved_steps(tmp_path) == []


def test_an_error_in_the_data_reaches_the_caller(tmp_path):
    def batch_at(step: int) -> float:
        if step == 3:
            raise FileNotFoundError("episode 3 is missing")
        return 0.0

    with pytest.raises(FileNotFoundError, match="episode 3"):
        run(tmp_path, batch_at=batch_at)
    with pytest.raises(ValueError, match="the input ended before step 8 of 10"):
        run(tmp_path / "short", batches_end=7)


def test_every_checkpoint_knows_which_batch_comes_next(tmp_path):
    run(tmp_path)
    for step in saved_steps(tmp_path):
        assert load_for_evaluation(tmp_path / "checkpoints", step=step)[0].input_state == {"next_step": step}


class FakeTime:
    """Seconds that pass only where a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("ring_rl.training.throughput.time", self)

    def perf_counter(self) -> float:
        return self.now


def test_performance_is_reported_with_the_work_of_a_step(tmp_path, monkeypatch):
    fake = FakeTime(monkeypatch)

    def batch_at(step: int) -> float:
        fake.now += 3 if step < 4 else 0
        return 1.0

    def step_function(state: TrainState, batch: jax.Array):
        fake.now += 1
        return add_batch(state, batch)

    def evaluate(_: TrainState) -> dict[str, float]:
        fake.now += 1000
        return {}

    work = StepWork(tokens=100, model_flops=3e6, devices=2, peak_flops_per_second=1e9)
    options = {"work": work, "evaluate": evaluate}
    _, records = run(
        tmp_path, steps=8, evaluate_every=2, step_function=step_function, batch_at=batch_at, options=options
    )
    rates = {step: record["performance/tokens_per_second"] for step, record in records}
    assert rates == {2: 25, 4: 25, 6: 100, 8: 100}
    for step, record in records:
        assert record["performance/steps_per_second"] == rates[step] / 100
        assert record["performance/model_flops_utilisation"] == pytest.approx(3e6 * rates[step] / 100 / 2e9)
        assert record["performance/input_wait"] == (0.75 if step <= 4 else 0)
        assert record["performance/checkpoint_wait"] == 0
        assert record["performance/process_memory_gib"] > 0.01


def test_metrics_are_not_fetched_between_records(tmp_path, monkeypatch):
    fetches = []
    monkeypatch.setattr("jax.device_get", lambda tree, get=jax.device_get: fetches.append(len(tree)) or get(tree))
    run(tmp_path, steps=20, log_every=10, checkpoint_every=20)
    assert [number for number in fetches if number > 1] == [10, 10]


def test_all_processes_stop_where_they_agree(tmp_path, monkeypatch):
    asked = []

    def agree_to_stop(done: int, requested: bool) -> bool:
        asked.append((done, requested))
        return done == 3  # another process was asked to

    monkeypatch.setattr("ring_rl.training.loop.agree_to_stop", agree_to_stop)
    with pytest.raises(TrainingInterrupted, match="step 3 of 10 is saved"):
        run(tmp_path)
    assert asked == [(1, False), (2, False), (3, False)]
    assert saved_steps(tmp_path) == [3]


def test_a_profile_holds_the_steps_asked_for(tmp_path):
    profile = ProfileConfig(enabled=True, start_step=4, steps=3)
    run(tmp_path, profile=profile)
    [trace] = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    summary = json.loads(trace.with_name("summary.json").read_text())
    assert summary["steps"] == 3
    assert sum(operation["share"] for operation in summary["operations"]) == pytest.approx(1)
    with pytest.raises(ValueError, match="the profile of steps 8 to 11 ends after the last step 10"):
        loop_config(profile=dataclasses.replace(profile, start_step=8))
    # A run that goes on past its beginning has nothing to trace.
    run(tmp_path / "late", state=initial(5), profile=profile)
    assert not (tmp_path / "late" / "profile").exists()


def test_a_run_that_ends_while_it_is_profiled_ends_the_trace(tmp_path):
    profile = ProfileConfig(enabled=True, start_step=2, steps=5)
    with pytest.raises(DivergenceError):
        run(tmp_path, profile=profile, batch_at=lambda step: float("nan") if step == 3 else 1.0)
    run(tmp_path / "next", profile=profile)
    assert len(list((tmp_path / "next" / "profile").rglob("summary.json"))) == 1


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
    with Checkpointer(tmp_path / "checkpoints", keep=9, model_config={}) as checkpointer:
        state, _ = checkpointer.restore_latest(initial())
    assert float(run(tmp_path, state=state)[0].parameters["total"]) == sum(range(10))


def test_a_signal_at_the_last_step_leaves_its_evaluation_in(tmp_path):
    """A complete run is not taken up again, so nothing would make up for it."""

    def step_function(state: TrainState, batch: jax.Array):
        if int(state.step) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return add_batch(state, batch)

    evaluate = {"evaluate": lambda _: {"total": 1.0}}
    _, records = run(tmp_path, step_function=step_function, evaluate_every=9, options=evaluate)
    assert [step for step, record in records if "evaluation/total" in record] == [9, 10]
    assert saved_steps(tmp_path) == [4, 8, 10]


def test_a_signal_does_not_end_the_last_save(tmp_path, monkeypatch):
    """The last checkpoint is written in the background, when the last step is over already."""
    saved, signalled, outside = [], [], []
    save, wait = Checkpointer.save, Checkpointer.wait

    def save_and_tell(self: Checkpointer, state: TrainState, **options: Any) -> bool:
        began = save(self, state, **options)
        saved.append(int(state.step))
        return began

    def wait_and_signal(self: Checkpointer) -> None:
        if saved[-1:] == [10] and not signalled:
            signalled.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(Checkpointer, "save", save_and_tell)
    monkeypatch.setattr(Checkpointer, "wait", wait_and_signal)
    before = signal.signal(signal.SIGTERM, lambda *_: outside.append(True))
    try:
        state, _ = run(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signalled
    assert not outside
    assert int(state.step) == 10
    assert saved_steps(tmp_path) == [4, 8, 10]


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
    with Checkpointer(tmp_path / "checkpoints", keep=1, model_config={}) as checkpointer:
        train(
            state=initial(),
            step_function=add_batch,
            batches=Batches(float),
            config=loop_config(steps=4),
            checkpointer=checkpointer,
            writers=[],
            run_folder=tmp_path,
        )
    shown = capsys.readouterr().out
    assert "training" in shown
    assert "4/4" in shown
    assert "steps/s" in shown


@pytest.mark.parametrize(
    "field", ["steps", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best", "evaluate_every"]
)
def test_intervals_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        loop_config(**{field: 0})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"largest_loss_ratio": 1.0}, "largest_loss_ratio must lie above 1, got 1.0; null turns it off"),
        ({"peak_flops_per_second": 0.0}, "peak_flops_per_second must be positive, got 0.0"),
        ({"best_metric": "evaluation/return"}, "nothing is evaluated; set evaluate_every"),
        (
            {"best_metric": "evaluation/return", "evaluate_every": 3},
            "checkpoint_every must be a multiple of evaluate_every=3, got 4",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        loop_config(**changes)
