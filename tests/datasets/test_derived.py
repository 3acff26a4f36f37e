"""The scripts that derive something from a data set, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ring_rl.agent.episodes.exorl import list_episodes, read_episode, write_episode
from ring_rl.agent.episodes.trajectory import Trajectory

FOLDER = Path(__file__).parents[2] / "datasets" / "exorl"


def run(script, *arguments, cwd, simulator=True):
    # A module of this name that fails stands for a simulator that is not installed.
    blocker = cwd / "blocked" / "dm_control"
    blocker.mkdir(parents=True, exist_ok=True)
    (blocker / "__init__.py").write_text("raise ImportError('No module named dm_control')")
    environment = os.environ if simulator else os.environ | {"PYTHONPATH": str(blocker.parent)}
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
        timeout=120,
    )


@pytest.fixture
def data(tmp_path):
    """Three episodes of cartpole's dimensions; nobody says for which task their rewards were paid."""
    folder = tmp_path / "data" / "cartpole" / "rnd"
    (folder / "buffer").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(3):
        trajectory = Trajectory(
            observations=generator.normal(size=(9, 5)).astype(np.float32),
            actions=generator.uniform(-1, 1, (8, 1)).astype(np.float32),
            rewards=np.zeros(8, np.float32),
            discounts=np.ones(8, np.float32),
            physics=generator.normal(size=(9, 4)),
        )
        write_episode(folder / "buffer", index, trajectory)
    return folder


@pytest.mark.simulator
def test_relabelling_once_serves_a_machine_without_a_simulator(tmp_path, data):
    environment = pytest.importorskip(
        "ring_rl.agent.environments.environment", reason="relabelling needs the simulator"
    )
    arguments = ("task=cartpole_swingup", "data.root=data")
    refused = run("relabel.py", *arguments, cwd=tmp_path, simulator=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: data/cartpole/rnd holds no rewards of cartpole_swingup")
    assert "Traceback" not in refused.stderr
    made = run("relabel.py", *arguments, "every_task=true", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    read = run("relabel.py", *arguments, cwd=tmp_path, simulator=False)
    assert read.returncode == 0, read.stderr
    assert read.stdout.strip() in made.stdout
    assert len(made.stdout.splitlines()) == 4  # one a task
    returns = [
        environment.rewards_of_states("cartpole_swingup", each.physics[1:], each.actions).sum()
        for each in map(read_episode, list_episodes(data / "buffer"))
    ]
    low, best = min(returns), max(returns)
    assert read.stdout.startswith(f"cartpole_swingup: 3 episodes; returns: min {low:.1f}, median")
    assert read.stdout.rstrip().endswith(f"max {best:.1f}")


def test_converting(tmp_path, data):
    first = run("convert.py", "domain=cartpole", "root=data", cwd=tmp_path)
    assert first.stdout.startswith("3 episodes in data/cartpole/rnd/store, "), first.stderr
    missing = run("convert.py", "domain=walker", "root=data", cwd=tmp_path)
    assert missing.returncode == 1
    assert missing.stderr.splitlines()[-1].startswith("error: no such data folder: data/walker/rnd/buffer")
