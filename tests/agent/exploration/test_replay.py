import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.exploration.replay import Replay


def observation(episode, step):
    return np.array([episode, step], np.float32)


def fill(replay, *, batches, size, decisions, last_decisions):
    """Observations say which episode and step they are; the action of a step is its negative."""
    for batch in range(batches):
        episodes = range(batch * size, (batch + 1) * size)
        replay.start(np.stack([observation(episode, 0) for episode in episodes]))
        for step in range(decisions if batch < batches - 1 else last_decisions):
            replay.append(
                np.full((size, 1), -step, np.float32), np.stack([observation(each, step + 1) for each in episodes])
            )


@given(
    batches=st.integers(1, 5),
    size=st.integers(1, 3),
    capacity=st.integers(3, 8),
    last=st.integers(0, 6),
    n_step=st.integers(1, 6),
)
def test_draws_are_n_steps_of_one_of_the_latest_episodes(batches, size, capacity, last, n_step):
    replay = Replay(episodes=capacity, decisions=6, observation_dim=2, action_dim=1)
    fill(replay, batches=batches, size=size, decisions=6, last_decisions=last)
    lengths = [6] * (size * (batches - 1)) + [last] * size
    kept = lengths[-capacity:]
    assert replay.transitions == sum(kept)
    assert replay.startable(n_step) == sum(max(length - n_step + 1, 0) for length in kept)
    rng = np.random.default_rng(0)
    if not replay.startable(n_step):
        with pytest.raises(ValueError, match="decisions in a row yet"):
            replay.draw(rng, updates=1, batch=1, n_step=n_step)
        return
    drawn = replay.draw(rng, updates=2, batch=50, n_step=n_step)
    assert drawn.observations.shape == (2, 50, 2)
    episode, step = drawn.observations[..., 0], drawn.observations[..., 1]
    np.testing.assert_array_equal(drawn.next_observations[..., 0], episode)
    np.testing.assert_array_equal(drawn.next_observations[..., 1], step + n_step)
    np.testing.assert_array_equal(drawn.actions[..., 0], -step)
    assert episode.min() >= len(lengths) - capacity


def test_every_start_is_drawn_equally_often():
    replay = Replay(episodes=4, decisions=3, observation_dim=2, action_dim=1)
    fill(replay, batches=2, size=2, decisions=3, last_decisions=2)
    drawn = replay.draw(np.random.default_rng(0), updates=100, batch=100, n_step=2)
    rows, counts = np.unique(drawn.observations.reshape(-1, 2), axis=0, return_counts=True)
    assert len(rows) == replay.startable(2) == 6
    assert counts.min() > 0.9 * counts.mean()


@pytest.mark.parametrize("batches", [1, 3])
def test_what_is_stored_comes_back(batches):
    one, other = (Replay(episodes=4, decisions=3, observation_dim=2, action_dim=1) for _ in range(2))
    fill(one, batches=batches, size=2, decisions=3, last_decisions=3)
    other.restore(one.arrays())
    for replay in (one, other):
        replay.start(np.stack([observation(98, 0), observation(99, 0)]))
        replay.append(np.zeros((2, 1), np.float32), np.stack([observation(98, 1), observation(99, 1)]))
    left, right = (each.draw(np.random.default_rng(0), updates=3, batch=20, n_step=1) for each in (one, other))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_many_episodes_side_by_side_are_refused():
    with pytest.raises(ValueError, match="3 episodes side by side exceed the replay's 2"):
        Replay(episodes=2, decisions=3, observation_dim=2, action_dim=1).start(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="at least 1 episode"):
        Replay(episodes=0, decisions=3, observation_dim=2, action_dim=1)
