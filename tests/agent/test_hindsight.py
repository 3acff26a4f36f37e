import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.hindsight import ChainConfig, sample_chain, sampling_probabilities


def config(**changes):
    values = {
        "trajectories": 3,
        "random_length": False,
        "order": "ascending",
        "target": "chain_maximum",
        "sampling": "ranked",
        "rank_temperature": 4.0,
        "loss_on": "all",
    }
    return ChainConfig(**(values | changes))


@given(
    seed=st.integers(0, 1000),
    count=st.integers(3, 30),
    trajectories=st.integers(1, 3),
    random_length=st.booleans(),
    sampling=st.sampled_from(["uniform", "ranked"]),
)
def test_chains_ascend_and_repeat_nothing(seed, count, trajectories, random_length, sampling):
    returns = np.random.default_rng(seed).normal(size=count)
    chosen = sample_chain(
        np.random.default_rng(seed),
        returns,
        config(trajectories=trajectories, random_length=random_length, sampling=sampling),
    )
    assert (np.diff(returns[chosen]) >= 0).all()
    assert len(set(chosen)) == len(chosen)
    assert 1 <= len(chosen) <= trajectories
    assert random_length or len(chosen) == trajectories


def test_a_shuffled_chain_holds_the_same_episodes_in_every_order():
    returns = np.arange(9.0)
    draw = lambda order, seed: sample_chain(np.random.default_rng(seed), returns, config(order=order)).tolist()  # noqa: E731
    shuffled = [draw("shuffled", seed) for seed in range(600)]
    assert all(sorted(chain) == draw("ascending", seed) for seed, chain in enumerate(shuffled))
    places_of_best = [chain.index(max(chain)) for chain in shuffled]
    # Each place is as likely: 200 of 600 expected, 5 standard deviations are 58.
    assert all(142 < places_of_best.count(place) < 258 for place in range(3))


def test_random_length_reaches_both_ends():
    generator = np.random.default_rng(0)
    lengths = [len(sample_chain(generator, np.arange(9.0), config(random_length=True))) for _ in range(200)]
    assert set(lengths) == {1, 2, 3}
    assert min(lengths.count(n) for n in (1, 2, 3)) > 40


def test_ranked_sampling_follows_its_formula_whatever_the_order():
    returns = np.array([5.0, -1.0, 3.0])
    weights = np.exp(4.0 * np.array([2, 0, 1]) / 3)
    np.testing.assert_allclose(sampling_probabilities(returns, config()), weights / weights.sum())
    np.testing.assert_allclose(sampling_probabilities(returns, config(rank_temperature=0.0)), 1 / 3)


def test_bad_chains_are_refused():
    with pytest.raises(ValueError, match=r"chain.trajectories must be at least 1, got 0"):
        config(trajectories=0)
    with pytest.raises(ValueError, match="chain of 3 trajectories needs as many episodes, the data set has 2"):
        sample_chain(np.random.default_rng(0), np.array([1.0, 2.0]), config())
