"""A run in stages of a small network: what goes on, what changes, and that a stop anywhere changes nothing."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training import staged_run
from ring_rl.training.checkpoint import Checkpointer
from ring_rl.training.checkpoint_format import load_arrays, load_for_evaluation, whole_steps
from ring_rl.training.input import InputConfig
from ring_rl.training.interrupt import TrainingInterrupted
from ring_rl.training.loop import LoopIntervals
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.metrics import WandbConfig, read_metrics
from ring_rl.training.milestone import AdvanceWhen
from ring_rl.training.run import MAY_DIFFER
from ring_rl.training.stage import StageStream, TrainingStage
from ring_rl.training.staged_run import StagedRunConfig, run_stages
from ring_rl.training.step import Loss
from ring_rl.training.task import TrainingTask
from small_optimizer import adamw


class Regression(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (3,)))


class Rows:
    """Row i of a stage: inputs [T, 3] and what their sum is, drawn by (stage, i)."""

    def __init__(self, stage, length):
        self._stage, self._length = stage, length

    def row(self, index):
        inputs = np.random.default_rng([self._stage, index]).normal(size=(self._length, 3)).astype(np.float32)
        return {"inputs": inputs, "targets": inputs.sum(-1)}


def squared_error(model, batch, key):
    del key
    error = (batch["inputs"] @ model.weight[...] - batch["targets"]) ** 2
    return Loss(error.sum(), jax.numpy.float32(error.size), {})


def optimizer(**changes):
    settings = {"learning_rate": 0.05, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "linear"}
    return adamw(**(settings | {"gradient_clip_norm": None} | changes))


def stage(index, **changes):
    parallel = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)), layout="contiguous")
    length = 4 * (index + 1)
    settings = {
        "name": f"stage_{index}",
        "task": TrainingTask(
            make_model=Regression,
            model_config={"width": 3, "base": float(index)},
            memory_choices=(),
            loss_function=squared_error,
            rows=Rows(index, length),
            batch_size=2,
            parallel=parallel,
            tokens=2 * length,
            model_flops=lambda parameters: 1,
            extra={"label": "toy"},
        ),
        "steps": 6,
        "minimum_steps": 0,
        "advance_when": None,
        "optimizer": optimizer(),
        "accumulation_steps": 1,
        "keep_moments": True,
    }
    return TrainingStage(**(settings | changes))


def run(folder, stages, *, checkpoint_every=4, log_every=1, dry_run=False, initial_parameters=None):
    return run_stages(
        stages,
        StagedRunConfig(
            run_dir=folder,
            seed=0,
            dry_run=dry_run,
            device_memory_gib=None,
            loop=LoopIntervals(
                log_every=log_every,
                checkpoint_every=checkpoint_every,
                keep_checkpoints=9,
                best_metric=None,
                best_mode="min",
                keep_best=1,
                largest_loss_ratio=1000.0,
                peak_flops_per_second=None,
                profile=None,
            ),
            input=InputConfig(threads=1, prefetch_batches=2),
            wandb=WandbConfig(mode="disabled", project="", entity=None, name=None),
        ),
        resolved={"stages": len(stages)},
        may_differ=MAY_DIFFER,
        headline="a toy",
        initial_parameters=initial_parameters,
    )


def curve(folder):
    return [
        {key: value for key, value in record.items() if not key.startswith("performance/")}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def same_arrays(folder, other, step):
    first, second = (load_arrays(each / "checkpoints", step=step) for each in (folder, other))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_stages_follow_one_another_in_one_folder(tmp_path, capsys):
    finished = run(tmp_path / "run", [stage(0), stage(1, optimizer=optimizer(learning_rate=0.01))])
    assert finished is not None
    assert (finished.steps, finished.parameters) == (12, 3)
    records = curve(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["stage"] for record in records] == [0.0] * 6 + [1.0] * 6
    # Each stage has the whole of its own schedule.
    rates = np.array([record["learning_rate"] for record in records])
    np.testing.assert_allclose(rates[[0, 5, 6, 11]], [0.05, 0.005, 0.01, 0.001], rtol=1e-6)
    assert whole_steps(tmp_path / "run" / "checkpoints") == [4, 6, 8, 12]
    metadata, _ = load_for_evaluation(tmp_path / "run" / "checkpoints")
    assert metadata.model_config["base"] == 1.0
    assert metadata.extra == {"label": "toy", "stage": "stage_1"}
    told = json.loads((tmp_path / "run" / "stages.json").read_text())
    assert [told[name]["tokens"] for name in told] == [6 * 8, 6 * 16]
    capsys.readouterr()
    assert run(tmp_path / "run", [stage(0), stage(1, optimizer=optimizer(learning_rate=0.01))]) is None
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [(8,), (6, 8), (4, 6, 8)], ids=["in_stage_1", "at_the_seam", "in_stage_0"])
@pytest.mark.parametrize("keep_moments", [True, False])
def test_a_run_that_was_cut_off_ends_as_one_that_never_was(tmp_path, lost, keep_moments):
    """Wherever it was cut off: inside a stage, or after its last checkpoint and before the next one's first."""
    stages = [stage(0), stage(1, keep_moments=keep_moments)]
    run(tmp_path / "whole", stages)
    run(tmp_path / "parts", stages)
    for step in (*lost, 12):
        (tmp_path / "parts" / "checkpoints" / str(step)).rename(tmp_path / f"lost_{step}")
    run(tmp_path / "parts", stages)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same_arrays(tmp_path / "parts", tmp_path / "whole", 12)


def test_moments_go_on_or_begin_anew(tmp_path):
    for keep in (True, False):
        run(tmp_path / str(keep), [stage(0), stage(1, steps=1, keep_moments=keep)], checkpoint_every=100)
    before = load_arrays(tmp_path / "True" / "checkpoints", step=6)["training"]
    after = {keep: load_arrays(tmp_path / str(keep) / "checkpoints", step=7)["training"] for keep in (True, False)}
    counts = {keep: max(int(x) for x in jax.tree.leaves(after[keep]["optimizer"]) if x.ndim == 0) for keep in after}
    assert counts == {True: 7, False: 1}
    assert max(int(x) for x in jax.tree.leaves(before["optimizer"]) if x.ndim == 0) == 6


def test_a_milestone_ends_a_stage_and_a_cut_inside_its_block_does_not_move_it(tmp_path):
    advance = AdvanceWhen(metric="loss", above=None, below=1.0, over_steps=5)
    stages = [stage(0, steps=400, minimum_steps=12, advance_when=advance), stage(1, steps=2)]
    finished = run(tmp_path / "whole", stages, checkpoint_every=8)
    assert finished is not None
    first = finished.stages[0]
    assert first.advanced
    assert 15 <= first.last_step < 400
    assert first.last_step % 5 == 0
    losses = [record["loss"] for record in curve(tmp_path / "whole")][: first.last_step]
    means = np.reshape(losses, (-1, 5)).mean(1)
    assert means[-1] <= 1.0
    assert all(mean > 1.0 for mean in means[2:-1])
    # Step 8 lies inside the second block.
    run(tmp_path / "parts", stages, checkpoint_every=8, log_every=3)
    for path in (tmp_path / "parts" / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > 8:
            path.rename(tmp_path / f"lost_{path.name}")
    again = run(tmp_path / "parts", stages, checkpoint_every=8, log_every=7)
    assert again is not None
    assert again.stages[0].last_step == first.last_step
    same_arrays(tmp_path / "parts", tmp_path / "whole", first.last_step + 2)


@pytest.mark.parametrize("late", [False, True], ids=["in_its_last_step", "while_its_checkpoint_is_written"])
def test_a_signal_at_the_end_of_a_stage_stops_the_run_and_the_stage_is_told_of(tmp_path, monkeypatch, late):
    stages = [stage(0), stage(1)]
    run(tmp_path / "whole", stages)
    taken, saved = [], Checkpointer.save
    next_batch = StageStream.__next__

    def batch(self):
        taken.append(self)
        if len(taken) == 6 and not late:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self)

    def save(self, state, **kept):
        if int(state.step) == 6 and late:
            os.kill(os.getpid(), signal.SIGTERM)
        return saved(self, state, **kept)

    monkeypatch.setattr(StageStream, "__next__", batch)
    monkeypatch.setattr(Checkpointer, "save", save)
    with pytest.raises(TrainingInterrupted, match=r"step 6.* start again to resume"):
        run(tmp_path / "parts", stages)
    monkeypatch.undo()
    run(tmp_path / "parts", stages)
    same_arrays(tmp_path / "parts", tmp_path / "whole", 12)
    whole, parts = (json.loads((tmp_path / each / "stages.json").read_text()) for each in ("whole", "parts"))
    for key in ("first_step", "last_step", "tokens", "advanced"):
        assert {each: parts[each][key] for each in parts} == {each: whole[each][key] for each in whole}
    # Nobody timed the whole of the first stage.
    assert [parts[each]["resumed"] for each in parts] == [True, False]


def test_a_last_stage_that_no_record_tells_of_is_told_of_by_the_next_command(tmp_path):
    run(tmp_path / "run", [stage(0), stage(1)])
    file = tmp_path / "run" / "stages.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({"stage_0": told["stage_0"]}))
    assert run(tmp_path / "run", [stage(0), stage(1)]) is None
    again = json.loads(file.read_text())
    # What is told of already stays as it is.
    assert again["stage_0"] == told["stage_0"]
    assert again["stage_1"] == {**told["stage_1"], "compile_seconds": 0.0, "train_seconds": 0.0, "resumed": True}


def test_training_begins_with_given_parameters(tmp_path):
    given = nnx.state(Regression(nnx.Rngs(0)), nnx.Param)
    given = jax.tree.map(jax.numpy.ones_like, given)
    run(tmp_path / "run", [stage(0, steps=1)], initial_parameters=lambda: given)
    # The weights of the sum are all one: there is nothing left to learn.
    assert curve(tmp_path / "run")[0]["loss"] < 1e-10


def test_a_dry_run_tells_of_every_stage_and_makes_nothing(tmp_path, capsys):
    assert run(tmp_path / "run", [stage(0), stage(1)], dry_run=True) is None
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens_per_step=" in line]
    assert [line.split("tokens_per_step=")[1].split()[0] for line in lines] == ["8", "16"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        (lambda: [], "no stage"),
        (lambda: [stage(0), stage(0)], "two stages are called stage_0"),
        (lambda: [stage(0), stage(1, optimizer=optimizer(gradient_clip_norm=1.0))], "keep_moments: false"),
        (lambda: [stage(0), stage(1, accumulation_steps=3)], "stage stage_1: "),
        (lambda: [stage(0, minimum_steps=7)], "minimum_steps must lie in"),
    ],
)
def test_what_a_late_stage_could_not_do_is_refused_before_the_first_begins(tmp_path, stages, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(tmp_path / "run", stages())
    assert not (tmp_path / "run").exists()


def test_a_metric_that_nobody_reports_is_named(tmp_path):
    advance = AdvanceWhen(metric="accuracy", above=0.9, below=None, over_steps=1)
    with pytest.raises(ValueError, match="no metric accuracy for advance_when; choose one of gradient_norm"):
        run(tmp_path / "run", [stage(0, advance_when=advance)])


def test_a_folder_of_a_run_without_stages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(staged_run.StageStream, "state", lambda self: {"next_step": 4, "batch_size": 2})
    run(tmp_path / "run", [stage(0)])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was not written by a run in stages"):
        run(tmp_path / "run", [stage(0)])
