import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.exploration.policy_search import PolicySearch, PolicySearchConfig, largest_degree, monomials

SEARCH = {
    "name": "policy_search",
    "action_hold": 1,
    "warm_up_episodes": 4,
    "population": 40,
    "generations": 12,
    "elite_fraction": 0.2,
    "initial_deviation": 1.0,
    "extra_deviation": 0.05,
    "largest_feature_count": 3,
    "action_noise": 0.0,
    "last_to_first": 0.5,
}


def search(*, episodes=100, seed=0, observation_dim=2, **changes):
    config = PolicySearchConfig(**{**SEARCH, **changes})
    return PolicySearch(config, episodes=episodes, observation_dim=observation_dim, action_dim=1, seed=seed)


def play_bandit(batch, *, wanted, steps=3):
    """An environment of one idea: the closer tanh(action) comes to wanted(observation), the better."""
    rng = np.random.default_rng(0)
    size = len(batch.reset_seeds)
    observations = rng.normal(size=(steps + 1, size, 2)).astype(np.float32)
    actions = np.stack([batch.policy(observations[step], step) for step in range(steps)])
    rewards = -np.square(actions[..., 0] - wanted(observations[:steps])).astype(np.float32)
    return [
        Trajectory(observations[:, i], actions[:, i], rewards[:, i], np.ones(steps, np.float32), None)
        for i in range(size)
    ]


def run(explorer, wanted):
    means = []
    for number in range(len(explorer.batch_sizes)):
        trajectories = play_bandit(explorer.batch(number), wanted=wanted)
        explorer.learn(number, trajectories)
        means.append(np.mean([trajectory.episode_return for trajectory in trajectories]))
    return np.array(means)


def test_it_climbs_to_the_best_policy():
    means = run(search(), wanted=lambda observations: np.tanh(observations[..., 0] - 0.5 * observations[..., 1]))
    assert means[1] < -0.5
    assert means[-1] > -0.05


def test_it_climbs_the_returns_it_is_told_of_and_nothing_else():
    one = run(search(), wanted=lambda observations: np.tanh(observations[..., 0]))
    other = run(search(), wanted=lambda observations: -np.tanh(observations[..., 0]))
    assert one[-1] > -0.05
    assert other[-1] > -0.05


def test_a_seed_determines_the_search():
    def wanted(observations):
        return observations[..., 0]

    np.testing.assert_array_equal(run(search(seed=1), wanted), run(search(seed=1), wanted))
    assert not np.array_equal(run(search(seed=1), wanted), run(search(seed=2), wanted))


def test_it_says_that_it_looks_at_the_reward():
    assert search().reward_free is False


@given(
    episodes=st.integers(4, 200),
    generations=st.integers(1, 12),
    last_to_first=st.floats(0, 1),
)
def test_the_recorded_episodes_add_up(episodes, generations, last_to_first):
    explorer = search(episodes=episodes, generations=generations, last_to_first=last_to_first, population=200)
    recorded = [explorer.batch(number).recorded for number in range(generations + 1)]
    assert recorded[0] == 4
    assert sum(recorded) == episodes
    assert min(recorded) >= 0


def test_later_generations_are_recorded_more_thinly():
    explorer = search(episodes=304, generations=3, last_to_first=0.5, population=150)
    assert [explorer.batch(number).recorded for number in range(4)] == [4, 133, 100, 67]


def test_the_first_of_a_population_are_recorded_not_the_best():
    """The candidates of a generation are independent, so the first are a fair sample; choosing is not."""
    explorer = search()
    assert explorer.batch(1).recorded < len(explorer.batch(1).reset_seeds) == 40


@pytest.mark.parametrize(
    ("episodes", "message"), [(3, "fewer than warm_up_episodes 4"), (600, "more than population 40")]
)
def test_numbers_of_episodes_that_do_not_fit_are_refused(episodes, message):
    with pytest.raises(ValueError, match=message):
        search(episodes=episodes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"elite_fraction": 0.0}, "at least 2 policies"),
        ({"elite_fraction": 1.5}, "at least 2 policies"),
        ({"population": 5}, "at least 2 policies"),
        ({"generations": 0}, "generations must be at least 1"),
        ({"action_noise": -0.1}, "action_noise must not be negative"),
        ({"last_to_first": 1.1}, "last_to_first must lie in"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        search(**changes)


@given(variables=st.integers(1, 6), degree=st.integers(1, 4))
def test_monomials_are_all_and_each_once(variables, degree):
    found = monomials(variables, degree)
    assert len(found) == len(set(found)) == math.comb(variables + degree, degree)
    assert max(len(factors) for factors in found) == degree


@given(variables=st.integers(1, 80), count=st.integers(1, 200))
def test_the_degree_is_the_largest_that_fits(variables, count):
    degree = largest_degree(variables, count)
    assert degree >= 1
    assert degree == 1 or math.comb(variables + degree, degree) <= count
    assert math.comb(variables + degree + 1, degree + 1) > count


def test_features_are_products_of_scaled_observations():
    explorer = search(largest_feature_count=6)
    explorer.learn(0, play_bandit(explorer.batch(0), wanted=lambda observations: observations[..., 0], steps=50))
    observations = np.array([[0.5, -2.0]], np.float32)
    x, y = (observations / explorer._scale_O)[0]
    np.testing.assert_allclose(explorer._features(observations)[0], [1, x, y, x * x, x * y, y * y])
