"""Grids of runs under the launchers of conf/hydra/launcher/; a grid without one is in test_train_agent.py."""

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.training.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]


def grid(launcher, data_root, folder, *overrides):
    """Runs a grid of small runs in another process."""
    command = [sys.executable, "experiments/train_agent.py", "-m", f"hydra/launcher={launcher}", *overrides]
    command += [f"hydra.sweep.dir={folder}/multirun", f"data.root={data_root}", "agent=behaviour_cloning"]
    command += ["loop.steps=2", "optimizer.warmup_steps=1", "wandb.mode=disabled"]
    # One device: the launchers are tested, not the ring.
    command += ["virtual_devices=1", "mesh.sp=1"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)


def last_step(run):
    return read_metrics(run / "metrics.jsonl")[-1]["step"]


def test_joblib_runs_a_grid_in_workers(data_root, tmp_path):
    finished = grid("workers", data_root, tmp_path, "seed=0,1", f"run_dir={tmp_path}/seed_${{seed}}")
    assert finished.returncode == 0, finished.stderr
    assert [last_step(tmp_path / f"seed_{seed}") for seed in (0, 1)] == [2, 2]


def test_submitit_runs_jobs_and_a_failing_one_is_reported_in_one_line(data_root, tmp_path):
    pytest.importorskip("submitit", reason="needs the extra `cluster`")
    run_dir = f"run_dir={tmp_path}/rows_${{batch.batch_size}}"
    finished = grid("jobs", data_root, tmp_path, "batch.batch_size=2,0", run_dir)
    assert last_step(tmp_path / "rows_2") == 2
    assert finished.returncode == 1
    [complaint] = [line for line in finished.stderr.splitlines() if line.strip()]
    assert complaint.startswith("error: a job of the grid failed")
    assert "batch.batch_size must be at least 1, got 0" in complaint
    assert not (tmp_path / "rows_0").exists()
    logs = [file.read_text() for file in (tmp_path / "multirun" / ".submitit").glob("*/*_log.out")]
    assert any("agent=behaviour_cloning seed=0 steps=2" in log for log in logs)


def test_slurm_jobs_ask_for_what_their_launcher_says(tmp_path, monkeypatch):
    """The real plugin up to the submission; a cluster's `srun` is only looked up."""
    submitit = pytest.importorskip("submitit", reason="needs the extra `cluster`")
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    scripts = []

    def submit_nothing(executor, function, *arguments):
        scripts.append(executor._executor._make_submission_file_text("run it", "id"))
        return []

    monkeypatch.setattr(submitit.AutoExecutor, "map_array", submit_nothing)
    options = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.nodes=2", "seed=0"]
    options += ["+hydra.launcher.additional_parameters.reservation=x", f"hydra.sweep.dir={tmp_path}/multirun"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        cfg = compose("train_agent", overrides=options, return_hydra_config=True)
    cfg.hydra.job.name = "train_agent"
    launcher = hydra.utils.instantiate(cfg.hydra.launcher)
    launcher.setup(hydra_context=object(), task_function=print, config=cfg)
    launcher.launch([["seed=0"], ["seed=1"]], 0)
    [script] = scripts
    for option in (
        "--partition=gpu",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=16",
        "--mem=64GB",
        "--time=1440",
        "--signal=USR2@120",
        "--reservation=x",
    ):
        assert f"#SBATCH {option}\n" in script, script
