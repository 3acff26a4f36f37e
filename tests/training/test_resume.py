"""A run that was killed and resumed must not differ from one that was not."""

from __future__ import annotations

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from ring_rl.training.metrics import read_metrics, without_performance

TOY_RUN = pathlib.Path(__file__).with_name("toy_run.py")
STEPS = 30


def start_and_signal(folder: pathlib.Path, number: signal.Signals, *, after_records: int) -> subprocess.Popen:
    """Start the toy run in a process of its own and signal it in the midst of training."""
    process = subprocess.Popen(
        [sys.executable, str(TOY_RUN), str(folder), str(STEPS), "0.05"],
        env=dict(os.environ),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < after_records:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    return process


def trajectory(folder: pathlib.Path) -> list[dict]:
    records = read_metrics(folder / "metrics.jsonl")
    return [without_performance(record) for record in records]


def test_resumed_after_sigkill_and_after_sigterm_equals_uninterrupted(tmp_path):
    toy_run = runpy.run_path(str(TOY_RUN))["run"]
    expected_state, _ = toy_run(tmp_path / "whole", steps=STEPS)
    expected = trajectory(tmp_path / "whole")
    assert [record["step"] for record in expected] == list(range(1, STEPS + 1))
    assert expected[-1]["loss"] < expected[0]["loss"]

    folder = tmp_path / "killed"
    killed = start_and_signal(folder, signal.SIGKILL, after_records=8)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors

    # The second process resumes, and is asked to stop in its turn.
    recorded = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    stopped = start_and_signal(folder, signal.SIGTERM, after_records=recorded + 3)
    _, errors = stopped.communicate()
    assert "is saved; start again to resume" in errors
    stopped_at = trajectory(folder)[-1]["step"]

    state, start = toy_run(folder, steps=STEPS)
    assert 0 < start == stopped_at < STEPS, "the signals came too early or too late to show anything"
    assert trajectory(folder) == expected
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected_state))
