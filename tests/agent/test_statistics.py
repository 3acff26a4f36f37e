import numpy as np
import pytest

from ring_rl.agent.evaluation import Result, markdown_table, table_rows
from ring_rl.agent.rollout import Rollouts
from ring_rl.agent.statistics import estimate, score
from ring_rl.agent.trajectory import Trajectory


def test_interval_by_hand():
    """Five values 1..5: mean 3, standard error sqrt(2.5 / 5), t of 4 degrees of freedom 2.7764."""
    got = estimate(np.arange(1.0, 6.0))
    assert (got.mean, got.seeds) == (3.0, 5)
    assert got.high - 3.0 == pytest.approx(2.7764 * np.sqrt(0.5), rel=1e-4)
    assert 3.0 - got.low == pytest.approx(got.high - 3.0)
    assert str(got) == "3 [1, 5]"


def test_one_seed_has_no_interval():
    assert np.isnan(estimate(np.array([4.0])).low)
    assert str(estimate(np.array([4.0]))) == "4"


def test_the_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [estimate(generator.normal(size=5)) for _ in range(2000)]
    covered = np.mean([each.low <= 0 <= each.high for each in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_mean_last_and_best_are_different_rules():
    scores = score(np.array([[1.0, 9.0, 2.0], [3.0, 5.0, 4.0]]))
    assert (scores.mean.mean, scores.last.mean, scores.best.mean) == (4.0, 3.0, 7.0)
    assert scores.mean.seeds == 2


def rollouts(returns):
    def episode(value):
        return Trajectory(
            observations=np.zeros((2, 1), np.float32),
            actions=np.zeros((1, 1), np.float32),
            rewards=np.array([value], np.float32),
            discounts=np.ones(1, np.float32),
            physics=None,
        )

    return Rollouts(tuple(tuple(map(episode, row)) for row in returns))


def test_several_training_seeds_count_once_each():
    first, second = rollouts([[1, 3], [1, 3]]), rollouts([[5, 7], [5, 7]])
    scores = Result("agent", (0, 1), (first, second)).scores
    assert (scores.mean.mean, scores.last.mean, scores.mean.seeds) == (4.0, 5.0, 2)
    assert Result("agent", (0,), (first,)).scores.mean.seeds == 2
    assert Result("agent", (0, 1), (first, second)).samples.tolist() == [[1, 3], [5, 7]]


def test_table_holds_agents_and_data():
    rows = table_rows([Result("agent", (0,), (rollouts([[1, 3], [1, 3]]),))], np.array([0.0, 10.0, 20.0]))
    assert rows[1] == ["agent", "2 [2, 2]", "3 [3, 3]", "3 [3, 3]", "2 environment seeds"]
    assert rows[2] == ["data (3 episodes)", "10", "", "20", ""]
    assert rows[3][:2] == ["data, 75th percentile", "15"]
    assert markdown_table(rows).splitlines()[1] == "| --- | --- | --- | --- | --- |"
