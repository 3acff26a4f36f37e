import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.agent.episodes.episode_set import EpisodeSet
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.agent.td3_bc.transitions import ResidentStream, draw, transitions_of
from ring_rl.training.mesh import MeshConfig, make_mesh


def episodes_of(lengths):
    """Episodes whose every number says which episode and step it is of."""
    return EpisodeSet(
        tuple(
            Trajectory(
                observations=(1000 * e + np.arange(length + 1, dtype=np.float32))[:, None]
                * np.ones((1, 2), np.float32),
                actions=(1000 * e + np.arange(length, dtype=np.float32))[:, None],
                rewards=1000 * e + np.arange(length, dtype=np.float32),
                discounts=(np.arange(length) < length - e % 2).astype(np.float32),
                physics=None,
            )
            for e, length in enumerate(lengths)
        )
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_every_transition_stays_within_its_episode(lengths, seed):
    transitions = transitions_of(episodes_of(lengths))
    assert len(transitions.first) == sum(lengths)
    assert len(transitions.states) == sum(lengths) + len(lengths)
    # Each transition once, in order: its number names its episode and step.
    names = np.concatenate([1000 * e + np.arange(length) for e, length in enumerate(lengths)])
    np.testing.assert_array_equal(transitions.actions[:, 0], names)
    np.testing.assert_array_equal(transitions.states[transitions.first, 1], names)
    np.testing.assert_array_equal(transitions.states[transitions.first + 1, 1], names + 1)

    batch = draw(transitions, jax.random.key(seed), size=32)
    np.testing.assert_array_equal(batch.observations[:, 0], batch.actions[:, 0])
    np.testing.assert_array_equal(batch.next_observations[:, 0], batch.actions[:, 0] + 1)
    np.testing.assert_array_equal(batch.rewards, batch.actions[:, 0])
    episode, step = (np.asarray(batch.rewards) // 1000).astype(int), np.asarray(batch.rewards) % 1000
    np.testing.assert_array_equal(batch.discounts, step < np.array(lengths)[episode] - episode % 2)


def test_draws_are_uniform():
    transitions = transitions_of(episodes_of([3, 5]))
    drawn = np.asarray(draw(transitions, jax.random.key(0), size=80_000).actions[:, 0])
    _, counts = np.unique(drawn, return_counts=True)
    # 10,000 each with a deviation of 94; five of them.
    assert len(counts) == 8
    assert np.abs(counts - 10_000).max() < 470


@pytest.fixture
def stream():
    mesh = make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1), devices=jax.devices()[:1])
    return ResidentStream(transitions_of(episodes_of([3, 5])), mesh, steps=3)


def test_every_batch_is_the_same_data_where_it_already_lies(stream):
    first = next(stream)
    assert all(a is b for a, b in zip(first, next(stream), strict=True))
    for x, abstract in zip(first, stream.abstract_batch, strict=True):
        assert (x.shape, x.dtype, x.sharding) == (abstract.shape, abstract.dtype, abstract.sharding)
    next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_goes_on_from_its_state(stream):
    next(stream)
    state = stream.state()
    other = ResidentStream(stream.transitions, stream.mesh, steps=3)
    other.restore(state)
    assert other.state() == state == {"next_step": 1, "transitions": 8}


@pytest.mark.parametrize(
    ("state", "complaint"),
    [({"next_step": 1}, "next_step and transitions"), ({"next_step": 1, "transitions": 7}, "7 transitions.*has 8")],
)
def test_a_state_of_other_data_is_refused(stream, state, complaint):
    with pytest.raises(ValueError, match=complaint):
        stream.restore(state)


def test_what_is_kept_after_a_divergence_fits_any_data_set(stream):
    kept = stream.batch_at(2)
    assert kept["greatest_rewards"] == 1004
    assert kept["least_actions"].shape == (1,)
