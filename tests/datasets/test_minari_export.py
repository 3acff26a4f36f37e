"""The script as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("minari", reason="Minari data sets need minari")

import minari

from ring_rl.agent.episodes.exorl import read_episodes, write_episode
from ring_rl.agent.episodes.minari_read import MinariDataConfig, MinariSet
from ring_rl.agent.episodes.trajectory import Trajectory, merge_held_actions

SCRIPT = Path(__file__).parents[2] / "datasets" / "minari" / "export.py"
HOLD, STEPS = 4, 12


@pytest.fixture
def data_root(tmp_path):
    """A made-up set of three cartpole episodes whose actions are held, with the record of its collection."""
    folder = tmp_path / "data" / "cartpole" / "policy_search_cartpole_swingup"
    (folder / "buffer").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(3):
        actions = np.repeat(generator.uniform(-1, 1, size=(STEPS // HOLD, 1)), HOLD, axis=0)
        episode = Trajectory(
            observations=generator.normal(size=(STEPS + 1, 5)).astype(np.float32),
            actions=actions.astype(np.float32),
            rewards=generator.uniform(size=STEPS).astype(np.float32),
            discounts=np.ones(STEPS, np.float32),
            physics=generator.normal(size=(STEPS + 1, 4)),
        )
        write_episode(folder / "buffer", index, episode)
    (folder / "collection.json").write_text(json.dumps({"settings": {"task": "cartpole_swingup"}, "complete": True}))
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, data_root, monkeypatch):
    """Calls the script in an empty folder."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "cwd").mkdir()

    def call(*arguments):
        command = [sys.executable, str(SCRIPT), f"data.root={data_root}", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path / "cwd", env=os.environ, check=False, timeout=120
        )

    return call


def test_the_readmes_command(run, data_root, tmp_path):
    dataset_id = "ring_rl/cartpole/policy_search-v0"
    first = run("task=cartpole_swingup", f"dataset_id={dataset_id}")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"3 episodes in {tmp_path / 'minari' / dataset_id}\n")
    assert not list((tmp_path / "cwd").iterdir())  # Hydra leaves nothing behind
    opened = MinariSet(MinariDataConfig(name="minari", dataset_id=dataset_id, download=False, max_episodes=None))
    assert (opened.task, opened.action_repeat) == ("cartpole_swingup", HOLD)
    buffer = data_root / "cartpole" / "policy_search_cartpole_swingup" / "buffer"
    recorded = read_episodes(buffer, max_episodes=None, progress=False).trajectories
    for back, original in zip(opened.episodes(progress=False).trajectories, recorded, strict=True):
        decisions = merge_held_actions(original, HOLD)
        for name in ("observations", "actions", "rewards", "discounts", "physics"):
            np.testing.assert_array_equal(getattr(back, name), getattr(decisions, name), strict=True)
    metadata = minari.load_dataset(dataset_id).storage.metadata
    assert metadata["algorithm_name"] == "policy_search_cartpole_swingup"
    assert metadata["ring_rl"]["collection"]["complete"] is True
