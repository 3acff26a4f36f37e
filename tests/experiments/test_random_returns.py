"""Returns of random actions, few of them, and that a wrong environment would be seen."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

from hydra import compose, initialize_config_dir

from ring_rl.agent.environments.domains import task_names
from ring_rl.agent.environments.environment import make_environment

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "experiments" / "results" / "random_returns"

pytestmark = pytest.mark.simulator


@pytest.fixture
def configured(load_script, tmp_path):
    """The script and its configuration with these overrides."""

    def call(*overrides):
        script = load_script("random_returns")
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            cfg = compose("random_returns", overrides=[f"output={tmp_path / 'returns'}", *overrides])
        return script, script.from_mapping(script.RandomReturnsConfig, script.resolve(cfg))

    return call


def test_a_small_measurement(configured, call_script, tmp_path, capsys, refused):
    small = [f"output={tmp_path / 'returns'}", "tasks=[cartpole_swingup,cheetah_run]", "episodes=3", "rows=2"]
    call_script("random_returns", *small)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    with (tmp_path / "returns" / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["episode"] for row in rows] == ["0", "1", "2"] * 2
    means = {task: np.mean([float(row["return"]) for row in rows if row["task"] == task]) for task in tasks_of(rows)}
    named = dict(pair.split("=") for pair in last.split())
    assert {name: float(value) for name, value in named.items() if name != "most_standard_errors_apart"} == (
        pytest.approx(means, abs=0.051)
    )
    summary = json.loads((tmp_path / "returns" / "summary.json").read_text())
    assert summary["returns"]["cheetah_run"]["mean"] == pytest.approx(means["cheetah_run"], rel=1e-4)
    table = (tmp_path / "returns" / "table.md").read_text()
    assert "| cheetah_run |" in table
    assert "| 3.2 |" in table
    assert "holds returns.csv" in refused(call_script, "random_returns", *small)


def tasks_of(rows):
    return dict.fromkeys(row["task"] for row in rows)


def test_an_episode_is_the_one_of_a_plain_loop_whatever_the_rows(configured):
    script, config = configured("episodes=3", "rows=2")
    _, other = configured("episodes=3", "rows=3", "threads=1")
    steps = []
    returns = script.random_returns(config, "jaco_reach_top_left", steps.append)
    np.testing.assert_array_equal(returns, script.random_returns(other, "jaco_reach_top_left", steps.append))
    assert steps == [500, 250, 750]
    environment = make_environment("jaco_reach_top_left", action_repeat=1)
    stream = np.random.SeedSequence([0, 2])
    environment.reset(seed=int(stream.generate_state(1)[0]))
    actions = np.random.default_rng(stream).uniform(-1, 1, (250, 9)).astype(np.float32)
    assert returns[2] == pytest.approx(sum(environment.step(action)[1] for action in actions), rel=1e-6)


def test_a_wrong_mean_is_many_standard_errors_apart(configured):
    script, config = configured()
    returns = np.random.default_rng(0).normal(134.7, 30, size=200)
    assert abs(script.standard_errors_apart(config, "walker_stand", returns)) < 1
    # 10 published episodes: s √(1/200 + 1/10) = 9.7
    assert script.standard_errors_apart(config, "walker_stand", returns + 50) > 4
    assert math.isnan(script.standard_errors_apart(config, "walker_flip", returns))


def test_an_interruption_keeps_the_tasks_that_were_complete(configured, monkeypatch, tmp_path):
    script, config = configured("tasks=[cartpole_swingup,cheetah_run]", "episodes=2")

    def interrupted(config, task, on_steps):
        if task == "cheetah_run":
            raise KeyboardInterrupt
        return np.array([1.0, 2.0])

    monkeypatch.setattr(script, "random_returns", interrupted)
    with pytest.raises(KeyboardInterrupt, match="holds the 1 tasks that were complete"):
        script.measure(config)
    assert "cheetah" not in (tmp_path / "returns" / "returns.csv").read_text()


def test_the_committed_results_follow_from_their_episodes_and_agree_with_what_is_published(configured):
    script, config = configured()
    with (RESULTS / "returns.csv").open() as file:
        rows = list(csv.DictReader(file))
    returns = {task: np.array([float(row["return"]) for row in rows if row["task"] == task]) for task in tasks_of(rows)}
    assert list(returns) == list(config.tasks)
    assert {len(of_task) for of_task in returns.values()} == {config.episodes}
    assert (RESULTS / "table.md").read_text() == script.markdown_table(script.table_rows(config, returns))
    for task in config.published_returns:
        assert abs(script.standard_errors_apart(config, task, returns[task])) < 2, task


def test_every_task_is_measured(configured):
    _, config = configured()
    assert sorted(config.tasks) == sorted(task_names())


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("tasks=[walker_fly]", "unknown task 'walker_fly'"),
        ("tasks=[walker_run,walker_run]", "none twice"),
        ("episodes=1", "episodes must be at least 2, for an interval; got 1"),
        ("rows=0", "rows must be at least 1, got 0"),
        ("seed=-1", "seed must be at least 0"),
    ],
)
def test_bad_configurations_are_refused(configured, override, complaint):
    with pytest.raises(ValueError, match=complaint):
        configured(override)
