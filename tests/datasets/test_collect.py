"""The script as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dm_control", reason="collecting needs the simulator: pip install 'ring_rl[simulator]'")

pytestmark = pytest.mark.simulator

SCRIPT = Path(__file__).parents[2] / "datasets" / "exorl" / "collect.py"


def run(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, timeout=120)


def test_the_readmes_command_in_small(tmp_path):
    arguments = [
        "task=cartpole_swingup",
        "explorer=policy_search",
        "explorer.warm_up_episodes=2",
        "explorer.population=20",
        "explorer.generations=1",
        "episodes=4",
        f"root={tmp_path / 'data'}",
    ]
    first = run(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "data" / "cartpole" / "policy_search_cartpole_swingup"
    assert first.stdout.startswith(f"4 episodes in {folder}; returns: min ")
    assert len(list((folder / "buffer").iterdir())) == 4
    assert json.loads((folder / "collection.json").read_text())["reward_free"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]  # Hydra leaves nothing behind
    refused = run(*arguments, "seed=5", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "seed: saved 0, wanted 5" in refused.stderr


def test_a_bad_task_is_one_line(tmp_path):
    result = run("task=cartpole_swngup", f"root={tmp_path}", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: unknown task 'cartpole_swngup'; did you mean")
    assert "Traceback" not in result.stderr
