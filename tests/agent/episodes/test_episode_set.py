from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.episodes.episode_set import EpisodeSet, EpisodeSummary
from ring_rl.agent.episodes.trajectory import Trajectory


def trajectory(length, *, seed, offset=0.0):
    generator = np.random.default_rng(seed)
    return Trajectory(
        observations=generator.normal(offset, 2.0, (length + 1, 3)).astype(np.float32),
        actions=generator.uniform(-1, 1, (length, 2)).astype(np.float32),
        rewards=generator.uniform(size=length).astype(np.float32),
        discounts=np.ones(length, np.float32),
        physics=None,
    )


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_moments_of_episodes_pool_to_those_of_all_states(lengths, offset, seed):
    trajectories = [trajectory(length, seed=seed + index, offset=offset) for index, length in enumerate(lengths)]
    mean, deviation = EpisodeSet(trajectories).observation_mean_and_deviation
    states = np.concatenate([each.observations for each in trajectories]).astype(np.float64)
    np.testing.assert_allclose(mean, states.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(deviation, states.std(axis=0), rtol=1e-9)


def test_a_selection_keeps_the_order_asked_for_and_what_is_known():
    trajectories = tuple(trajectory(length, seed=length) for length in (4, 2, 7, 3))
    episodes = EpisodeSet(trajectories)
    part = episodes.select(np.array([2, 0]))
    assert [each is trajectories[index] for each, index in zip(part.trajectories, (2, 0), strict=True)] == [True, True]
    assert part.trajectories[-1] is trajectories[0]
    assert [each.length for each in part.trajectories[1:]] == [4]
    again = EpisodeSet(tuple(part.trajectories))
    np.testing.assert_array_equal(part.lengths, again.lengths)
    np.testing.assert_array_equal(part.returns, again.returns)
    for one, other in zip(part.observation_mean_and_deviation, again.observation_mean_and_deviation, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(IndexError):
        part.trajectories[2]


def test_a_selection_reads_nothing():
    class Unread(tuple):
        def __getitem__(self, index):
            raise AssertionError("read")

    trajectories = tuple(trajectory(length, seed=length) for length in (4, 2))
    episodes = EpisodeSet(Unread(trajectories), EpisodeSummary.of(trajectories))
    assert episodes.select(np.array([1])).lengths.tolist() == [2]
    assert (episodes.observation_dim, episodes.action_dim, len(episodes.trajectories)) == (3, 2, 2)


def test_episodes_of_other_dimensions_are_named():
    odd = replace(trajectory(2, seed=0), actions=np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"trajectory 1 has observation and action dimensions \(3, 5\)"):
        EpisodeSet((trajectory(2, seed=0), odd))
