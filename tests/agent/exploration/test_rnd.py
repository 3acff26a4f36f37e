import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.agent.exploration.rnd import Novelty, NoveltyConfig, RunningMoments, update_moments, whiten

CONFIG = {
    "hidden_width": 32,
    "representation_dim": 8,
    "learning_rate": 1e-3,
    "observation_clip": 5.0,
    "compression": "none",
    "target_bias_deviation": 0.0,
    "target_gain": 1.0,
    "scale": 1.0,
}


def novelty(**changes):
    return Novelty(NoveltyConfig(**{**CONFIG, **changes}), observation_dim=3)


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    shift=st.floats(-5, 5),
    seed=st.integers(0, 99),
)
def test_running_moments_are_those_of_all_samples(sizes, shift, seed):
    rng = np.random.default_rng(seed)
    batches = [(shift + rng.normal(size=size)).astype(np.float32) for size in sizes]
    moments = RunningMoments(jnp.zeros(()), jnp.ones(()), jnp.asarray(1e-4))
    for batch in batches:
        moments = update_moments(moments, batch)
    samples = np.concatenate(batches)
    # One prior sample in ten thousand shows where there are few of ours.
    assert float(moments.mean) == pytest.approx(samples.mean(), abs=2e-3)
    assert float(moments.variance) == pytest.approx(samples.var(), rel=1e-2, abs=5e-3)
    assert float(moments.weight) == pytest.approx(len(samples), rel=1e-3)


def test_whitened_columns_have_no_unit():
    observations = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    np.testing.assert_allclose(whiten(observations * 50 + 7), whiten(observations), atol=1e-3)
    np.testing.assert_allclose(whiten(observations).std(axis=0), 1, atol=1e-3)
    assert np.isfinite(whiten(np.ones((4, 3), np.float32))).all()


@pytest.mark.parametrize("compression", ["none", "symlog"])
def test_what_was_seen_often_is_rewarded_less_than_what_was_seen_seldom(compression):
    """Nineteen of twenty observations lie in a heap; the others elsewhere, but not further out."""
    rng = np.random.default_rng(0)
    learner = novelty(compression=compression, target_bias_deviation=1.0, learning_rate=3e-3)

    def draw():
        heap = np.array([1.0, 0.0, 0.0]) + 0.2 * rng.normal(size=(243, 3))
        rare = np.array([-1.0, 0.0, 0.0]) + 0.2 * rng.normal(size=(13, 3))
        return np.concatenate([heap, rare]).astype(np.float32)

    update = jax.jit(learner.update)
    state = jax.jit(learner.init)(jax.random.key(0))
    _, first = update(state, draw())
    for _ in range(300):
        state, rewards = update(state, draw())
    assert float(rewards[243:].mean()) > 1.5 * float(rewards[:243].mean())
    assert (np.asarray(first) > 0).all()


def test_the_reward_is_the_error_in_running_deviations_after_the_predictor_has_learnt():
    learner = novelty(scale=2.0)
    state = jax.jit(learner.init)(jax.random.key(0))
    observations = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    after, rewards = learner.update(state, observations)
    before_errors = learner.errors(state.predictor, state.target, observations)
    errors = learner.errors(after.predictor, after.target, observations)
    assert float(errors.mean()) < float(before_errors.mean())
    np.testing.assert_allclose(rewards, 2 * errors / np.sqrt(after.error_moments.variance), rtol=1e-5)
    for old, new in zip(*map(jax.tree.leaves, (state.target, after.target)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_compressed_velocities_leave_room_for_standing_still():
    """Of two states at rest and one at great speed, whitening alone cannot tell the first two apart."""
    observations = np.array([[0.0, 0, 0], [0.5, 0, 0], [100.0, 0, 0], [-100.0, 0, 0]], np.float32)
    apart = {}
    for compression in ("none", "symlog"):
        learner = novelty(compression=compression)
        state = jax.jit(learner.init)(jax.random.key(0))
        errors = learner.errors(state.predictor, state.target, observations)
        apart[compression] = abs(float(errors[0] - errors[1])) / float(errors.mean())
    assert apart["symlog"] > 10 * apart["none"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_width": 0}, "hidden_width must be at least 1"),
        ({"representation_dim": 0}, "representation_dim must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"observation_clip": 0.0}, "observation_clip must be above 0"),
        ({"target_gain": 0.0}, "target_gain must be above 0"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"target_bias_deviation": -1.0}, "target_bias_deviation must not be negative"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NoveltyConfig(**{**CONFIG, **changes})
