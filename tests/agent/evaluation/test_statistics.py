import numpy as np

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.evaluation.protocol import Result, table_rows
from ring_rl.agent.evaluation.rollout import Rollouts
from ring_rl.agent.evaluation.statistics import score
from ring_rl.training.tables import markdown_table


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
