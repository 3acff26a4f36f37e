import dataclasses
import json

import numpy as np
import pytest

from ring_rl.agent.evaluation.in_context import holm_adjusted
from ring_rl.agent.evaluation.in_context_report import (
    in_context_rows,
    in_context_summary,
    in_context_tests,
    plot_in_context,
)
from ring_rl.agent.evaluation.normalise import ReturnScale
from ring_rl.agent.evaluation.results import Result

MONTE_CARLO = {"flips": 500, "seed": 0}


@pytest.fixture
def results():
    """Context is worth 10 to the first agent and 4 to the one trained on shuffled chains; one agent has none."""
    generator = np.random.default_rng(0)
    resets = generator.normal(0, 50, size=(1, 8, 3))

    def result(label, context, *, gain, seeds):
        returns = resets + generator.normal(0, 1, size=(len(seeds), 8, 3)) + gain * (np.arange(3) > 0)
        return Result(label=label, context=context, target_fraction=0.85, headline=True, seeds=seeds, returns=returns)

    return [
        result("at", "carried", gain=10, seeds=(0, 1, 2)),
        result("at", "cleared", gain=0, seeds=(0, 1, 2)),
        result("shuffled", "carried", gain=4, seeds=(2, 1)),
        result("shuffled", "cleared", gain=0, seeds=(2, 1)),
        result("bc", "none", gain=0, seeds=(0,)),
    ]


def test_what_is_paired_is_tested(results):
    tests = in_context_tests(results, {"at": "shuffled"}, **MONTE_CARLO)
    means = {name: round(test.main.difference.mean) for name, test in tests.items()}
    assert means == {
        "at: carried - cleared": 10,
        "shuffled: carried - cleared": 4,
        "at - shuffled, carried": 6,
        "at - shuffled, carried - cleared": 6,
    }
    # Two of the training seeds are common to both, whatever the order in which they were evaluated.
    assert tests["at - shuffled, carried"].main.difference.seeds == 2
    by_hand = np.mean((results[0].returns[[1, 2]] - results[2].returns[[1, 0]])[:, :, 1:])
    assert tests["at - shuffled, carried"].main.difference.mean == pytest.approx(by_hand)
    assert list(in_context_tests(results, {}, **MONTE_CARLO)) == [name for name in tests if ":" in name]


def test_seeds_without_a_partner_are_left_out(results):
    strangers = [*results[:2], dataclasses.replace(results[2], seeds=(8, 9)), results[4]]
    assert list(in_context_tests(strangers, {"at": "shuffled"}, **MONTE_CARLO)) == ["at: carried - cleared"]


def test_a_single_episode_has_no_context_to_test(results):
    short = [dataclasses.replace(each, returns=each.returns[:, :, :1]) for each in results]
    assert in_context_tests(short, {}, **MONTE_CARLO) == {}
    contexts_of_one = [dataclasses.replace(each, context_episodes=1) for each in results]
    assert in_context_tests(contexts_of_one, {}, **MONTE_CARLO) == {}
    assert len(in_context_rows({}, None)) == 1


def test_the_table_says_what_was_tested_and_on_what(results):
    tests = in_context_tests(results, {"at": "shuffled"}, **MONTE_CARLO)
    rows = in_context_rows(tests, ReturnScale(random=0.0, best=200.0))
    assert len({len(row) for row in rows}) == 1
    row = dict(zip(rows[0], rows[1], strict=True))
    assert row["units"] == "3 training seeds (p at least 0.2500)"
    assert row["p"] == "0.2500"
    assert row["p, Holm"] == "1.0000"
    assert float(row["p over rows of these agents"]) < 0.01
    difference, normalised = (float(row[name].split()[0]) for name in ("difference in return", "normalised"))
    assert normalised == pytest.approx(difference / 2, abs=0.1)

    summary = json.loads(json.dumps(in_context_summary(tests)))
    holm = holm_adjusted([each["p_value"] for each in summary.values()])
    assert [each["p_value_holm"] for each in summary.values()] == holm
    assert summary["at: carried - cleared"]["unit"] == "training seeds"


def test_a_picture_is_drawn(results, tmp_path):
    path = tmp_path / "in_context.png"
    plot_in_context(in_context_tests(results, {}, **MONTE_CARLO), path, title="task")
    assert path.stat().st_size > 1000
