"""Tables, verdicts and pictures of evaluations whose truth is known."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.evaluation.aggregate import Interval
from ring_rl.agent.reproduction.comparison import read_comparison
from ring_rl.agent.reproduction.evaluated import stale_reason
from ring_rl.agent.reproduction.findings import verdict_of, welch_interval
from ring_rl.agent.reproduction.published import PublishedTable
from ring_rl.agent.reproduction.report import write_report

PUBLISHED = PublishedTable(
    source="a paper",
    differs=(),
    returns={"cartpole_swingup": {"AT": 12.5, "BC": 10.0, "oom": None}, "jaco_reach_*": {"AT": 5.0, "BC": 6.0}},
)


@pytest.fixture
def written(preset, evaluated, tmp_path):
    runs, chance = evaluated
    output = tmp_path / "results"
    cells = list(preset.cells(runs))
    figures = write_report(preset, cells, chance=chance, published=PUBLISHED, output=output)
    return output, figures


def rows_of(path):
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in path.read_text().splitlines()]
    return [lines[0], *lines[2:]]


def test_scores_are_normalised_between_chance_and_the_best_of_the_data(written):
    output, figures = written
    header, *rows = rows_of(output / "table.md")
    assert header == ["task", "long", "shuffled", "clone"]
    by_task = {row[0]: row for row in rows}
    # (50 + 40 / 3 - 10) / 90 and (30 - 10) / 90
    assert float(by_task["cartpole_swingup"][1].split()[0]) == pytest.approx(59.3, abs=1)
    assert float(by_task["cartpole_swingup"][3].split()[0]) == pytest.approx(22.2, abs=1)
    assert "all tasks, interquartile mean" in by_task
    assert float(figures["clone_iqm"]) == pytest.approx(22.2, abs=1)
    assert figures["cells"] == "18"


def test_the_papers_numbers_stand_under_ours(written):
    output, _ = written
    rows = rows_of(output / "best.md")
    at = next(index for index, row in enumerate(rows) if row[0] == "jaco_reach_top_left")
    assert rows[at + 1][2:5] == ["5.00", "", "6.00"]


def test_orderings_are_judged_by_the_interval_of_the_difference(written):
    output, figures = written
    verdicts = {
        (each["better"], each["worse"], each["task"]): each
        for each in json.loads((output / "summary.json").read_text())["orderings"]
    }
    forward, backward = verdicts["long", "clone", "all tasks"], verdicts["clone", "long", "all tasks"]
    assert (forward["verdict"], backward["verdict"]) == ("holds", "reversed")
    assert forward["difference"][0] == pytest.approx(-backward["difference"][0])
    assert forward["paper"] == pytest.approx((2.5 - 1.0) / 2)
    assert figures["orderings_that_hold"] == "1/2"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 1.0, "holds"), (-1.0, -0.1, "reversed"), (-1.0, 1.0, "not settled"), (np.nan, np.nan, "not settled")],
)
def test_verdicts(low, high, verdict):
    assert verdict_of(Interval(0.0, low, high)) == verdict


@given(seed=st.integers(0, 1000), counts=st.tuples(st.integers(2, 5), st.integers(2, 5)))
def test_on_one_task_the_interval_is_welchs(seed, counts):
    generator = np.random.default_rng(seed)
    first, second = (generator.normal(size=count) for count in counts)
    low, high = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    interval = welch_interval(first, second)
    np.testing.assert_allclose((interval.low, interval.high), (low, high), rtol=1e-9)


def test_seeds_that_do_not_vary_or_are_alone_settle_nothing():
    for first in (np.array([1.0]), np.ones(3)):
        assert verdict_of(welch_interval(first, np.zeros(3))) == "not settled"


def test_a_handful_of_seeds_gives_few_false_verdicts():
    """Two agents that are equally good, 3 seeds each: verdicts on a task are wrong in one of twenty at most."""
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(2000, 2, 3))
    wrong = np.mean([verdict_of(welch_interval(*each)) != "not settled" for each in drawn])
    assert wrong < 0.05


def test_the_verdict_on_a_task_is_by_that_interval(preset, evaluated, written):
    output, _ = written
    comparison = read_comparison(preset, list(preset.cells(evaluated[0])), evaluated[1])
    task = comparison.tasks["cartpole_swingup"]
    wanted = welch_interval(task.scores("long"), task.scores("clone"))
    for each in json.loads((output / "summary.json").read_text())["orderings"]:
        if (each["better"], each["task"]) == ("long", "cartpole_swingup"):
            assert each["difference"] == pytest.approx([wanted.value, wanted.low, wanted.high])


def test_the_worth_of_context_is_found_and_tested_over_training_seeds(written):
    output, _ = written
    rows = rows_of(output / "in_context.md")
    carried, of_shuffled = (
        [row for row in rows if row[0] == f"{label}: context carried - cleared"] for label in ("long", "shuffled")
    )
    assert [row[1] for row in carried] == ["cartpole_swingup", "jaco_reach_top_left", "all tasks"]
    assert float(carried[0][2].split()[0]) == pytest.approx(20, abs=1.5)
    assert carried[0][4].startswith("3 training seeds")
    # 6 runs that all agree: 2^-5
    assert float(carried[-1][5]) == pytest.approx(2**-5, abs=1e-3)
    # The agent without a clock gains nothing.
    assert [row[1] for row in of_shuffled] == ["cartpole_swingup", "jaco_reach_top_left", "all tasks"]
    assert all(abs(float(row[2].split()[0])) < 1.5 for row in of_shuffled[:-1])
    assert float(of_shuffled[-1][5]) > 0.05


def test_every_return_is_in_the_csv(written, preset):
    output, _ = written
    with (output / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    per_evaluation = preset.protocol.rows * preset.protocol.episodes
    # chance, three variants carried and two of them cleared, on two tasks
    assert len(lines) == 2 * per_evaluation * (1 + 3 * 5)
    for picture in ("scores.png", "by_episode.png", "profiles.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")


def test_a_comparison_of_what_there_is_leaves_the_rest_empty(preset, evaluated, tmp_path):
    runs, chance = evaluated
    cells = [cell for cell in preset.cells(runs) if (cell.variant, cell.task) != ("clone", "jaco_reach_top_left")]
    write_report(preset, cells, chance=chance, published=PUBLISHED, output=tmp_path / "results")
    by_task = {row[0]: row for row in rows_of(tmp_path / "results" / "table.md")}
    assert by_task["jaco_reach_top_left"][3] == ""
    assert by_task["all tasks, mean"][3] == ""
    assert by_task["cartpole_swingup"][3] != ""


def test_what_is_missing_is_not_called_all(preset, evaluated, tmp_path):
    """A task without a single cell, and an agent that lacks a training seed."""
    runs, chance = evaluated
    cells = [
        cell
        for cell in preset.cells(runs)
        if cell.task == "cartpole_swingup" and (cell.variant, cell.seed) != ("clone", 2)
    ]
    figures = write_report(preset, cells, chance=chance, published=PUBLISHED, output=tmp_path / "results")
    for table in ("table.md", "returns.md", "best.md", "last.md"):
        by_task = {row[0]: row for row in rows_of(tmp_path / "results" / table)}
        at = by_task["task"].index("clone")
        assert by_task["cartpole_swingup"][at].endswith("(2 of 3 seeds)")
        assert "seeds" not in by_task["cartpole_swingup"][at - 1]
    assert "1 of 2 tasks, mean" in {row[0] for row in rows_of(tmp_path / "results" / "table.md")}
    assert "all tasks" not in (tmp_path / "results" / "orderings.md").read_text()
    assert figures["orderings_that_hold"] == "0/0"


def test_cells_that_were_trained_on_different_data_are_refused(preset, evaluated):
    runs, chance = evaluated
    cells = list(preset.cells(runs))
    record = json.loads(cells[0].evaluation.read_text())
    record["data"]["best"] = 99.0
    cells[0].evaluation.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="trained on different data"):
        read_comparison(preset, cells, chance)


def test_an_evaluation_under_another_protocol_is_stale(preset, evaluated):
    runs, _ = evaluated
    path = next(preset.cells(runs)).evaluation
    assert stale_reason(path, preset.protocol, step=5) is None
    assert "step" in stale_reason(path, preset.protocol, step=6)
    assert "rows" in stale_reason(path, dataclasses.replace(preset.protocol, rows=5), step=5)
    assert stale_reason(path.with_name("none.json"), preset.protocol, step=5) == "not evaluated"
    path.write_text("{")
    assert "unreadable" in stale_reason(path, preset.protocol, step=5)


def test_a_column_that_the_paper_does_not_have_is_refused():
    with pytest.raises(ValueError, match="no column 'ATT'; did you mean 'AT'"):
        PUBLISHED.of("cartpole_swingup", "ATT")
    assert PUBLISHED.of("walker_walk", "AT") is None
    # Another task, though its name begins alike.
    assert PUBLISHED.of("cartpole_swingup_sparse", "AT") is None
    assert PUBLISHED.text("cartpole_swingup", "oom") == ""
