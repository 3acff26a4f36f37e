import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ring_rl.training.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_leaves_everything_behind_and_the_ring_really_ran(train, tmp_path, capsys):
    train(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "mesh dp=1 x fsdp=1 x tp=1 x sp=8 over 8 cpu devices, zigzag layout" in printed
    last = printed.strip().splitlines()[-1]
    assert "agent=agentic_transformer seed=0 steps=6 " in last
    compiled = json.loads((tmp_path / "run" / "compiled.json").read_text())
    assert compiled["mesh"] == {"dp": 1, "fsdp": 1, "tp": 1, "sp": 8}
    assert compiled["collective_permutes"] > 0
    assert len(losses(tmp_path / "run")) == 6
    for name in ("config.yaml", "checkpoints/6", "plots/learning_curve.png"):
        assert (tmp_path / "run" / name).exists(), name


def test_a_dry_run_says_what_a_step_needs_and_makes_nothing(train, tmp_path, capsys):
    train(tmp_path / "run", "dry_run=true", "device_memory_gib=0.0001")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    values = dict(word.split("=") for word in last.split())
    # Two chains of two trajectories of 250 decisions, padded from 500 to 512, one token each.
    assert values["tokens_per_step"] == "1024"
    assert int(values["model_flops_per_step"]) > 0
    assert int(values["needed_bytes"]) > int(values["state_bytes"]) > 0
    assert values["fits"] == "false"
    assert not (tmp_path / "run").exists()


def test_a_few_steps_are_traced_on_demand(train, tmp_path):
    train(tmp_path / "run", "profile=true", "loop.profile.start_step=2", "loop.profile.steps=2")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_meshes_strategies_and_microbatches_give_the_same_curve(train, tmp_path):
    """A run may go on with other devices; what it computes does not depend on them."""
    train(tmp_path / "ring")
    train(
        tmp_path / "other",
        "mesh.fsdp=2",
        "mesh.sp=4",
        "parallel.strategy=hybrid",
        "parallel.ulysses_size=2",
        "input.threads=2",
    )
    train(tmp_path / "cut", "mesh.sp=4", "accumulation_steps=2")
    for name in ("other", "cut"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "ring"), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("agent", ["decision_transformer", "behaviour_cloning"])
def test_the_other_agents_train_too(train, tmp_path, agent):
    small = [] if agent == "behaviour_cloning" else ["agent.transformer.layers=1", "agent.transformer.width=16"]
    train(tmp_path / "run", f"agent={agent}", *small, small=False)
    assert len(losses(tmp_path / "run")) == 6


def test_a_checkpoint_of_8_devices_goes_on_with_fewer(train, tmp_path):
    whole = tmp_path / "whole"
    train(whole)
    for devices in (1, 2, 4):
        fewer = tmp_path / f"on_{devices}"
        shutil.copytree(whole, fewer)
        shutil.rmtree(fewer / "checkpoints" / "6")
        train(fewer, f"mesh.sp={devices}")
        np.testing.assert_allclose(losses(fewer), losses(whole), rtol=1e-4, err_msg=f"{devices} devices")


def test_going_on_gives_the_uninterrupted_curve(train, tmp_path):
    """A run that is started again after its checkpoint at step 4 ends where one that never stopped does."""
    train(tmp_path / "whole")
    train(tmp_path / "parts")
    # What a kill after step 5 leaves: the checkpoint of step 4 and metrics beyond it.
    (tmp_path / "parts" / "checkpoints" / "6").rename(tmp_path / "lost")
    train(tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_goes_on_in_other_memory(train, tmp_path):
    """A machine with fewer devices, or smaller ones, may need to save less and to cut finer."""
    train(tmp_path / "whole")
    train(tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "6").rename(tmp_path / "lost")
    smaller = ("saved_activations=none", "feed_forward_chunks=2", "attention_block_size=64")
    train(tmp_path / "parts", "mesh.sp=4", *(f"agent.transformer.{choice}" for choice in smaller))
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)


def test_a_killed_run_goes_on_from_its_last_checkpoint(data_root, tmp_path):
    """The real thing: another process, SIGKILL, the same command again."""
    command = [
        sys.executable,
        "experiments/train_agent.py",
        f"run_dir={tmp_path / 'run'}",
        f"data.root={data_root}",
        "agent.transformer.layers=1",
        "agent.chain.trajectories=2",
        "batch.batch_size=2",
        "loop.steps=80",
        "loop.log_every=1",
        "loop.checkpoint_every=10",
        "optimizer.warmup_steps=1",
        "wandb.mode=disabled",
    ]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    quiet = {"cwd": REPOSITORY, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **quiet) as victim:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoints" / "20").exists():
            assert victim.poll() is None, victim.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
    reached = len(losses(tmp_path / "run"))
    assert reached < 80
    finished = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "continues from step" in finished.stdout
    steps = [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, 81))


def test_multirun_trains_every_combination(data_root, tmp_path):
    finished = subprocess.run(
        [
            sys.executable,
            "experiments/train_agent.py",
            "-m",
            "task=cartpole_swingup",
            "seed=0,1",
            "agent=behaviour_cloning",
            f"run_dir={tmp_path}/${{task}}/seed_${{seed}}",
            f"hydra.sweep.dir={tmp_path}/multirun",
            f"data.root={data_root}",
            "batch.batch_size=2",
            "loop.steps=4",
            "optimizer.warmup_steps=1",
            "wandb.mode=disabled",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    curves = [losses(tmp_path / "cartpole_swingup" / f"seed_{seed}") for seed in (0, 1)]
    assert curves[0] != curves[1]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("loop.stepz=3", "error: unknown key 'loop.stepz'; did you mean 'steps'? the keys there are steps, log_every"),
        ("agent=agentic", "error: In 'train_agent': Could not find 'agent/agentic'"),
    ],
)
def test_a_misspelt_key_or_choice_is_refused_in_one_line(tmp_path, override, complaint):
    finished = subprocess.run(
        [sys.executable, "experiments/train_agent.py", override, f"run_dir={tmp_path / 'run'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 1
    assert finished.stderr.startswith(complaint)
    assert len(finished.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("+loop.stepz=3", "unknown key 'loop.stepz'"),
        ("loop.steps=many", "loop.steps"),
        ("task=cartpole_swingdown", "unknown task 'cartpole_swingdown'; did you mean 'cartpole_swingup'?"),
        ("mesh.sp=16", "mesh dp=1 x fsdp=1 x tp=1 x sp=16 needs 16 devices, but there are 8"),
        ("batch.pad_to_ring=false", "sequence length 500 is not divisible into the 16 chunks of a zigzag ring"),
        ("data.algorithm=rnd", "no data set at"),
        ("agent.chain.trajectories=13", "the data set has 12"),
        ("data.action_repeat=5", "use action_repeat=1 or collect with action_hold=5"),
        ("agent.transformer.head_dim=7", "must be even, for rotary positions"),
        ("agent.transformer.feed_forward_chunks=7", "cannot be cut into 7 feed-forward chunks"),
        ("loop.evaluate_every=2", "set loop.evaluate_every=null"),
        ("batch.batch_size=0", "batch.batch_size must be at least 1, got 0"),
        ("agent.time_octaves=-1", "agent.time_octaves must be at least 0, got -1"),
        ("agent.chain.rank_temperature=1000", "chain.rank_temperature must lie in [0, 100]"),
        ("agent.name=decision_transformer", "set it to 1 or use agent=agentic_transformer"),
        ("seed=-1", "seed must lie in [0, 2**32), got -1"),
        ("seed=4294967296", "seed must lie in [0, 2**32), got 4294967296"),
        (
            ("batch.layout=striped", "agent.token_layout=return_state_action_reward"),
            "layout=striped deals out single tokens",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_made(train, refused, tmp_path, override, complaint):
    overrides = (override,) if isinstance(override, str) else override
    assert complaint in refused(train, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_configuration_is_left_alone(train, refused, tmp_path):
    def times():
        # The lock is taken, and given back, to look at all.
        files = [path for path in sorted((tmp_path / "run").rglob("*")) if path.is_file() and path.name != "run.lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    train(tmp_path / "run")
    before = times()
    complaint = refused(train, tmp_path / "run", "agent.transformer.width=32")
    assert "agent.transformer.width" in complaint
    assert "run_dir" in complaint
    assert times() == before


@contextlib.contextmanager
def recorded_as(data_root, text):
    """What collection.json says meanwhile."""
    record = data_root / "cartpole" / "policy_search_cartpole_swingup" / "collection.json"
    before = record.read_text()
    record.write_text(text)
    try:
        yield record
    finally:
        record.write_text(before)


def test_stored_rewards_of_another_task_are_refused(train, refused, data_root, tmp_path):
    with recorded_as(data_root, json.dumps({"settings": {"task": "cartpole_balance"}})):
        complaint = refused(train, tmp_path / "run", "data.rewards=stored")
    assert "holds the rewards of cartpole_balance, not of cartpole_swingup" in complaint


def test_a_damaged_record_of_collection_is_named(train, refused, data_root, tmp_path):
    with recorded_as(data_root, "{}") as record:
        complaint = refused(train, tmp_path / "run")
    assert f"{record} does not say for which task it was collected" in complaint


def test_a_complete_run_is_left_as_it_is_and_its_picture_redrawn(train, tmp_path, capsys):
    train(tmp_path / "run")
    (tmp_path / "run" / "plots" / "learning_curve.png").unlink()
    before = losses(tmp_path / "run")
    train(tmp_path / "run")
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "run" / "plots" / "learning_curve.png").exists()
    assert losses(tmp_path / "run") == before


def test_nan_in_the_data_is_refused(call_script, refused, tmp_path):
    buffer = tmp_path / "cartpole" / "policy_search_cartpole_swingup" / "buffer"
    buffer.mkdir(parents=True)
    np.savez(
        buffer / "episode_000000_4.npz",
        observation=np.full((5, 5), np.nan, np.float32),
        action=np.zeros((5, 1), np.float32),
        reward=np.zeros((5, 1), np.float32),
        discount=np.ones((5, 1), np.float32),
        physics=np.zeros((5, 4)),
    )
    complaint = refused(call_script, "train_agent", f"data.root={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert "episode_000000_4.npz" in complaint
    assert "NaN" in complaint or "finite" in complaint


def test_every_choice_of_attention_gives_the_same_curve(train, tmp_path):
    """Chains whole on a device, all scores at once; and chains over the ring, block by block."""
    for attention in ("vanilla", "ring"):
        train(tmp_path / attention, f"attention={attention}", "batch.batch_size=8", "loop.steps=3")
    np.testing.assert_allclose(losses(tmp_path / "ring"), losses(tmp_path / "vanilla"), rtol=1e-4)


def test_attention_means_nothing_to_an_agent_without_a_transformer(train, refused, tmp_path):
    complaint = refused(train, tmp_path, "agent=behaviour_cloning", "attention=ring", small=False)
    assert "unknown key 'agent.transformer'" in complaint
