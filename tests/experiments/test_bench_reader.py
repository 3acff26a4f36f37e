"""The reader's benchmark, tiny: that it measures what it says, and cleans up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ring_rl.config import from_mapping

SCRIPT = Path(__file__).parents[2] / "experiments" / "bench_reader.py"
SMALL = [
    "episodes=6",
    "episode_steps=10",
    "compressed_episodes=2",
    "chain.trajectories=2",
    "chains=10",
    "batches=3",
]


def test_the_report_follows_from_the_figures(call_script, refused, tmp_path):
    output, scratch = tmp_path / "reader", tmp_path / "scratch"
    scratch.mkdir()
    # Not in this process: it reads in another one, which must find the script.
    command = [sys.executable, str(SCRIPT), f"output={output}", f"folder={scratch}", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "reader.json").read_text())
    last = dict(word.split("=") for word in done.stdout.strip().splitlines()[-1].split())
    assert float(last["chains_per_second"]) == pytest.approx(result["chains_per_second"], abs=0.5)
    assert float(last["open_seconds"]) == pytest.approx(result["open_seconds"], abs=0.005)
    assert all(result[name] > 0 for name in result if name.endswith("_per_second"))
    assert result["resident_mb_largest"] >= result["resident_mb_last_tenth"] > 10
    # 6 episodes of 10 actions, rewards and discounts, and of 11 observations
    assert result["episodes_read_mb"] == pytest.approx(4 * 6 * (10 * (6 + 2) + 11 * 24) / 1e6)
    table = (output / "table.md").read_text()
    assert f"| opening | {result['open_seconds']:.2f} s |  |" in table
    assert f"{result['chains_per_second']:.0f} chains/s |" in table
    assert list(scratch.iterdir()) == []
    assert "holds reader.json" in refused(call_script, "bench_reader", f"output={output}", *SMALL)


def test_the_committed_table_follows_from_its_figures(load_script):
    script, results = load_script("bench_reader"), SCRIPT.parent / "results" / "reader" / "cpu"
    result = json.loads((results / "reader.json").read_text())
    figures = {name: value for name, value in result.items() if isinstance(value, float)}
    settings = result["config"] | {"folder": None}
    assert (
        script.report(from_mapping(script.ReaderBenchmarkConfig, settings), figures)
        == (results / "table.md").read_text()
    )
    assert settings["episodes"] == 10000
    assert settings["chain"]["trajectories"] == 32
    assert result["open_seconds"] < 5
    assert result["chains_per_second"] > 50
    assert result["resident_mb_largest"] < 1000
    assert result["resident_mb_last_tenth"] < 1.1 * result["resident_mb_first_tenth"]


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("chains=0", "chains must be at least 1, got 0"),
        ("episodes=7", "episodes=7 must be at least chain.trajectories=32"),
        ("domain=walkr", "unknown domain 'walkr'"),
    ],
)
def test_what_cannot_be_measured_is_refused(call_script, refused, tmp_path, override, rule):
    assert rule in refused(call_script, "bench_reader", f"output={tmp_path / 'reader'}", override)
