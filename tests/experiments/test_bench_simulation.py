"""The benchmark of the simulator, tiny: that it plays the same episodes as dm_control, and what is reported of them."""

import contextlib
import csv
import dataclasses
import io
import json
import statistics
from pathlib import Path

import pytest

pytest.importorskip("dm_control", reason="simulating needs the simulator: pip install 'ring_rl[simulator]'")

pytestmark = pytest.mark.simulator

SMALL = [
    "rounds=2",
    "collection.explorer.batch_size=2",
    "collection.plain_episodes=1",
    "collection.threads=1",
    "~collection.tasks.cheetah_run",
    "~collection.tasks.walker_walk",
    "~collection.tasks.jaco_reach_top_left",
    *[
        f"{part}.{option}"
        for part in ("evaluation", "in_context")
        for option in (
            "action_repeat=100",
            "rows=2",
            "agent.chain.trajectories=3",
            "agent.transformer.layers=1",
            "agent.transformer.width=16",
            "agent.transformer.query_heads=2",
            "agent.transformer.key_value_heads=2",
            "agent.transformer.head_dim=8",
            "agent.transformer.feed_forward_width=16",
        )
    ],
]


@dataclasses.dataclass
class Measured:
    """One call of the script: where it wrote to, and its last line."""

    output: Path
    last_line: str


@pytest.fixture(scope="module")
def measured(call_script, tmp_path_factory):
    output, printed = tmp_path_factory.mktemp("bench") / "simulation", io.StringIO()
    with contextlib.redirect_stdout(printed):
        call_script("bench_simulation", f"output={output}", *SMALL)
    return Measured(output, printed.getvalue().strip().splitlines()[-1])


def records(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_figures_follow_from_the_rounds(measured):
    result = json.loads((measured.output / "simulation.json").read_text())
    rounds = records(measured.output / "collection.csv")
    assert [(each["task"], each["round"]) for each in rounds] == [("cartpole_swingup", "0"), ("cartpole_swingup", "1")]
    assert result["cartpole_swingup_speedup"] == pytest.approx(
        statistics.median(float(each["batched"]) / float(each["plain"]) for each in rounds)
    )
    for name in ("observations", "rewards", "physics"):
        assert result[f"cartpole_swingup_{name}_difference"] == max(float(each[name]) for each in rounds) <= 1e-6
    evaluation = result["evaluation"]
    assert len(evaluation["batched"]) == len(evaluation["plain"]) == 2
    assert result["evaluation_steps_per_second"] == pytest.approx(statistics.median(evaluation["batched"]))


def test_flops_grow_as_the_context_does(measured):
    """3 episodes of 10 tokens see 55, 155 and 255 pairs of tokens; weights cost every episode the same."""
    episodes = records(measured.output / "in_context.csv")
    attention = [float(each["attention_flops"]) for each in episodes]
    assert attention == pytest.approx([4 * 16 * pairs / 10 for pairs in (55, 155, 255)])
    weights = [float(each["model_flops"]) - float(each["attention_flops"]) for each in episodes]
    assert weights == pytest.approx([weights[0]] * 3)
    assert all(float(each["milliseconds"]) > 0 for each in episodes)
    result = json.loads((measured.output / "simulation.json").read_text())
    assert result["attention_flops_growth"] == pytest.approx(255 / 55)


def test_everything_is_written_and_the_last_line_names_the_figures(measured):
    assert (measured.output / "simulation.png").read_bytes().startswith(b"\x89PNG")
    assert "| collecting cartpole_swingup |" in (measured.output / "table.md").read_text()
    figures = dict(pair.split("=") for pair in measured.last_line.split())
    result = json.loads((measured.output / "simulation.json").read_text())
    assert all(float(value) == pytest.approx(result[name], rel=0.01) for name, value in figures.items())
    assert {"cartpole_swingup_speedup", "evaluation_speedup", "in_context_slowdown"} <= set(figures)


def test_what_cannot_be_measured_is_refused_before_anything_runs(measured, call_script, refused, tmp_path):
    assert "choose another output" in refused(call_script, "bench_simulation", f"output={measured.output}", *SMALL)
    elsewhere = f"output={tmp_path / 'new'}"
    complaint = refused(call_script, "bench_simulation", elsewhere, *SMALL, "collection.plain_episodes=3")
    assert "plain_episodes must lie between 1 and explorer.batch_size=2" in complaint
    complaint = refused(call_script, "bench_simulation", elsewhere, *SMALL, "collection.tasks.cartpole_swingup=3")
    assert "not divisible by a hold of 3" in complaint
