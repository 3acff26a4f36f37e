"""The script as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("dm_control", reason="collecting needs the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.episodes.exorl import read_episodes

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


@pytest.mark.parametrize(("signal_number", "exit_status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_collection_that_is_stopped_goes_on_to_the_same_episodes(tmp_path, signal_number, exit_status):
    """Really stopped, by Ctrl-C's signal and by one that nothing can catch."""
    arguments = ["explorer=uniform", "explorer.batch_size=4", "episodes=60", f"root={tmp_path}", "threads=1"]
    folder = tmp_path / "cartpole" / "uniform_cartpole_swingup"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("buffer/episode_*"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal_number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == exit_status
    kept = {path.name: path.read_bytes() for path in folder.glob("buffer/episode_*")}
    assert 8 <= len(kept) < 60
    assert json.loads((folder / "collection.json").read_text())["complete"] is False
    if signal_number == signal.SIGINT:
        assert errors.splitlines()[-1] == "interrupted"
    episodes = read_episodes(folder / "buffer", max_episodes=None, progress=False)  # none of them is torn
    assert len(episodes.trajectories) == len(kept)
    assert run(*arguments, cwd=tmp_path).returncode == 0
    everything = {path.name: path.read_bytes() for path in folder.glob("buffer/episode_*")}
    assert len(everything) == 60
    assert everything.items() >= kept.items()
