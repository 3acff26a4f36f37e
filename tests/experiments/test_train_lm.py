"""The entry point of language models: stages, meshes, stops, pretrained beginnings, and every experiment's settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve
from ring_rl.lm.tokenizer.load import tokenizer_from_mapping
from ring_rl.training.checkpoint_format import load_for_evaluation
from ring_rl.training.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"

# Two stages of records of 8 and 16 lines, a few steps each.
SMALL = [
    "model.transformer.layers=1",
    "model.transformer.width=16",
    "model.transformer.head_dim=16",
    "~stages.lines_454",
    "stages.lines_8.batch_size=2",
    "stages.lines_8.steps=4",
    "stages.lines_8.minimum_steps=0",
    "stages.lines_8.advance_when=null",
    "stages.lines_112.lines=16",
    "stages.lines_112.steps=3",
    "stages.lines_112.minimum_steps=0",
    "stages.lines_112.advance_when=null",
    "stages.lines_8.schedule.warmup_steps=0",
    "loop.log_every=1",
    "loop.checkpoint_every=2",
    "wandb.mode=disabled",
]
ONE_DEVICE = ["mesh.sp=1"]
ONE_STAGE = ["~stages.lines_112"]


@pytest.fixture(scope="module")
def train_lm(call_script):
    def call(run_dir, *overrides, small=True):
        call_script("train_lm", f"run_dir={run_dir}", *(SMALL if small else []), *overrides)

    return call


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(train_lm, tmp_path_factory):
    """A run of both stages over the ring of 8."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_lm(folder)
    return folder


def test_a_run_leaves_everything_behind_and_the_ring_really_ran(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [(record["step"], record["stage"]) for record in records] == [
        *((step, 0.0) for step in (1, 2, 3, 4)),
        *((step, 1.0) for step in (5, 6, 7)),
    ]
    assert {"loss", "answer_accuracy", "token_accuracy", "performance/tokens_per_second"} <= set(records[-1])
    compiled = json.loads((finished / "compiled.json").read_text())
    assert list(compiled) == ["lines_8", "lines_112"]
    assert compiled["lines_8"]["collective_permutes"] > 0
    metadata, _ = load_for_evaluation(finished / "checkpoints")
    assert metadata.step == 7
    # 16 lines and 16 questions of 9 tokens.
    assert metadata.model_config["trained_positions"] == 288
    extra = metadata.extra
    assert (extra["label"], extra["seed"], extra["stage"]) == ("language_model", 0, "lines_112")
    assert extra["stages"]["lines_112"]["lines"] == 16
    assert extra["training_data"]["name"] == "compact_lines"
    assert tokenizer_from_mapping(extra["tokenizer"]).encode("ASK IS 7").tolist() == [1, 2, 10]
    assert (finished / "plots" / "learning_curve.png").exists()


@pytest.mark.parametrize("mesh", [["mesh.sp=1"], ["mesh.fsdp=2", "mesh.sp=2", "parallel.strategy=all_gather"]])
def test_meshes_give_the_same_curve(train_lm, finished, tmp_path, mesh):
    train_lm(tmp_path / "run", *ONE_STAGE, *mesh)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished)[:4], rtol=1e-4)


def test_a_killed_run_goes_on_in_its_stage(tmp_path):
    """The real thing: another process, SIGKILL in the second stage, the same command again."""
    command = [
        sys.executable,
        "experiments/train_lm.py",
        f"run_dir={tmp_path / 'run'}",
        *SMALL,
        *ONE_DEVICE,
        "virtual_devices=1",
        "stages.lines_8.steps=2",
        "stages.lines_112.steps=150",
        "loop.checkpoint_every=20",
    ]
    quiet = {"cwd": REPOSITORY, "env": {**os.environ, "XLA_FLAGS": ""}, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **quiet) as victim:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoints" / "20").exists():
            assert victim.poll() is None, victim.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
    reached = len(losses(tmp_path / "run"))
    assert reached < 152
    finished = subprocess.run(command, stdout=subprocess.PIPE, **quiet)
    assert finished.returncode == 0, finished.stderr.decode()
    assert b"in stage lines_112" in finished.stdout
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 153))


def test_a_trained_model_is_where_another_training_begins(train_lm, finished, tmp_path):
    train_lm(
        tmp_path / "run",
        "model=run",
        f"model.run_dir={finished}",
        *(override for override in SMALL if not override.startswith("model.")),
        *ONE_STAGE,
        *ONE_DEVICE,
        "stages.lines_8.rotary_base=5000.0",
        "label=tuned",
        small=False,
    )
    # Its first loss is that of a model that has learned that answers are digits; a new one's is log 269 = 5.6.
    before = losses(finished)
    assert losses(tmp_path / "run")[0] < before[0] - 0.1
    metadata, _ = load_for_evaluation(tmp_path / "run" / "checkpoints")
    assert metadata.model_config["transformer"]["rotary_base"] == 5000.0
    assert metadata.model_config["trained_positions"] == 288


def test_documents_are_learned_and_may_move(train_lm, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("so long, and thanks for all the fish. " * (3 + number))
    options = [
        "model=new_llama",
        "training_data=documents",
        "documents@training_data.documents=text_folder",
        "stages=single",
        "model.transformer.layers=1",
        "model.transformer.width=16",
        "model.transformer.head_dim=4",
        "model.transformer.feed_forward_width=16",
        "stages.main.length=128",
        "stages.main.steps=6",
        "stages.main.batch_size=2",
        "optimizer.warmup_steps=0",
        "optimizer.learning_rate=0.01",
        "loop.log_every=1",
        "wandb.mode=disabled",
        *ONE_DEVICE,
    ]
    train_lm(tmp_path / "run", *options, f"training_data.documents.source.root={texts}", small=False)
    curve = losses(tmp_path / "run")
    assert abs(curve[0] - np.log(256)) < 0.3
    assert curve[-1] < curve[0]
    moved = texts.rename(tmp_path / "moved")
    train_lm(tmp_path / "run", *options, f"training_data.documents.source.root={moved}", small=False)
    assert losses(tmp_path / "run") == curve


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["stages.lines_112.batch_size=3", "mesh.fsdp=2", "mesh.sp=1"], "stages.lines_112: batch of 3"),
        (["model.tokenizer.name=bytes", "~model.tokenizer.words"], "in its own words, not in those"),
        (["training_data.words=wonderwords"], "set tokenizer@model.tokenizer=compact_lines"),
        (["stages.lines_8.lines=null"], "stages.lines_8: a stage needs either length or lines"),
        (["+stages.lines_8.stepz=4"], "unknown key 'stages.lines_8.stepz'"),
        (["model=run", "model.run_dir=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(train_lm, refused, tmp_path, overrides, complaint):
    small = [each for each in SMALL if "model=run" not in overrides or not each.startswith("model.")]
    said = refused(train_lm, tmp_path / "run", *small, *overrides, small=False)
    assert complaint in said
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_settings_is_not_gone_on_with(train_lm, refused, finished):
    said = refused(train_lm, finished, "optimizer.weight_decay=0.5")
    assert "optimizer.weight_decay" in said
    said = refused(train_lm, finished, "stages.lines_112.steps=9")
    assert "stages.lines_112.steps" in said


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"+experiment=lm/{path.stem}"] for path in sorted((CONF / "experiment" / "lm").glob("*.yaml"))),
        *([f"stages={path.stem}"] for path in sorted((CONF / "stages").glob("*.yaml"))),
        *(["training_data=" + path.stem] for path in sorted((CONF / "training_data").glob("*.yaml"))),
        *([f"+lm_ablation={path.stem}"] for path in sorted((CONF / "lm_ablation").glob("*.yaml"))),
    ],
    ids=lambda overrides: overrides[0].lstrip("+"),
)
def test_every_setting_is_one_that_trains(load_script, overrides):
    if overrides[0].startswith("+lm_ablation"):
        overrides = ["+experiment=lm/line_retrieval_cpu", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train_lm", overrides=overrides)
    config = from_mapping(load_script("train_lm").TrainLmConfig, resolve(cfg))
    assert config.stages
    assert all(stage.steps > 0 for stage in config.stages.values())
