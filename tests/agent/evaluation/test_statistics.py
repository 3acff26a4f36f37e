import numpy as np
import pytest

from ring_rl.agent.evaluation.statistics import episode_scores, independent_samples, score


def test_mean_last_and_best_are_different_rules():
    scores = score(np.array([[[1.0, 9.0, 2.0], [3.0, 5.0, 4.0]]]))
    assert (scores.mean.mean, scores.last.mean, scores.best.mean) == (4.0, 3.0, 7.0)
    assert scores.mean.seeds == 2
    assert [each.mean for each in scores.by_episode] == [2.0, 7.0, 3.0]


def test_several_training_seeds_count_once_each():
    first, second = [[1.0, 3.0], [1.0, 3.0]], [[5.0, 7.0], [5.0, 7.0]]
    scores = score(np.array([first, second]))
    assert (scores.mean.mean, scores.last.mean, scores.mean.seeds) == (4.0, 5.0, 2)
    assert [(each.mean, each.seeds) for each in scores.by_episode] == [(3.0, 2), (5.0, 2)]
    assert score(np.array([first])).mean.seeds == 2


def test_samples_say_what_they_are():
    returns = np.arange(12.0).reshape(2, 3, 2)
    values, kind = independent_samples(returns, "best")
    assert (values.tolist(), kind) == ([3.0, 9.0], "training seeds")
    values, kind = independent_samples(returns[:1], "best")
    assert (values.tolist(), kind) == ([1.0, 3.0, 5.0], "environment seeds")
    with pytest.raises(ValueError, match=r"must be \[seeds, rows, episodes\], got shape \(3, 2\)"):
        independent_samples(returns[0], "mean")


def test_the_best_of_several_tries_is_above_their_mean_by_chance_alone():
    returns = np.random.default_rng(0).normal(size=(1, 4000, 8))
    assert episode_scores(returns, "mean").mean() == pytest.approx(0.0, abs=0.05)
    # The expected maximum of 8 standard normal draws.
    assert episode_scores(returns, "best").mean() == pytest.approx(1.4236, abs=0.05)
