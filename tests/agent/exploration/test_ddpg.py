import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.agent.exploration.ddpg import (
    DDPG,
    Actor,
    DDPGConfig,
    Transitions,
    TwinCritic,
    add_clipped_noise,
)

CONFIG = {
    "hidden_width": 16,
    "learning_rate": 1e-2,
    "discount": 0.9,
    "n_step": 3,
    "target_rate": 0.25,
    "noise_deviation": 0.2,
    "noise_clip": 0.3,
}


def ddpg(**changes):
    return DDPG(DDPGConfig(**{**CONFIG, **changes}), observation_dim=3, action_dim=2)


def initial(learner):
    return jax.jit(learner.init)(jax.random.key(0))  # op by op it takes seconds


def transitions(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    observations, following = rng.normal(size=(2, rows, 3)).astype(np.float32)
    return Transitions(observations, rng.uniform(-1, 1, (rows, 2)).astype(np.float32), following)


@settings(max_examples=10, deadline=None)
@given(deviation=st.floats(0, 2), clip=st.floats(0, 1), seed=st.integers(0, 99))
def test_noise_is_clipped_and_actions_stay_inside(deviation, clip, seed):
    actions = jnp.linspace(-1, 1, 32).reshape(16, 2)
    noisy = add_clipped_noise(actions, jax.random.key(seed), deviation=deviation, clip=clip)
    assert float(jnp.abs(noisy).max()) < 1
    assert float(jnp.abs(noisy - actions).max()) <= clip + 1e-5


def test_the_gradient_passes_where_an_action_was_clipped():
    gradient = jax.grad(lambda actions: add_clipped_noise(actions, jax.random.key(0), deviation=0.0, clip=1.0).sum())
    np.testing.assert_allclose(gradient(jnp.array([[3.0, -3.0]])), [[1.0, 1.0]])


def test_actions_depend_on_the_key_and_lie_in_the_box():
    learner = ddpg(noise_deviation=5.0)
    state = initial(learner)
    one, other = (learner.act(state.actor, transitions().observations, jax.random.key(seed)) for seed in (1, 2))
    assert one.shape == (8, 2)
    assert float(jnp.abs(one).max()) < 1
    assert not np.array_equal(one, other)


def test_the_critics_regress_on_the_lesser_of_the_targets_n_steps_on():
    """The loss of the first update, recomputed by hand; without noise nothing is random."""
    learner, batch = ddpg(noise_deviation=0.0), transitions()
    state = initial(learner)
    rewards = np.linspace(0, 1, 8, dtype=np.float32)
    _, metrics = learner.update(state, batch, rewards, jax.random.key(1))
    actor, critic = Actor(3, 2, 16, rngs=nnx.Rngs(0)), TwinCritic(3, 2, 16, rngs=nnx.Rngs(0))
    nnx.update(actor, state.actor)
    nnx.update(critic, state.critic)
    next_values = critic(batch.next_observations, actor(batch.next_observations))
    targets = rewards + 0.9**3 * np.minimum(*next_values)
    expected = sum(np.square(values - targets).mean() for values in critic(batch.observations, batch.actions))
    assert float(metrics["critic_loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_target_critics_follow_at_their_rate():
    learner = ddpg()
    state = initial(learner)
    after, _ = learner.update(state, transitions(), jnp.ones(8), jax.random.key(1))
    for old, new, followed in zip(
        *map(jax.tree.leaves, (state.critic, after.critic, after.target_critic)), strict=True
    ):
        np.testing.assert_allclose(followed, 0.75 * old + 0.25 * new, rtol=1e-5, atol=1e-6)


def test_the_actor_finds_the_rewarded_action():
    """A bandit: without a future, the value is the reward -(a - o)^2."""
    learner = ddpg(discount=0.0, n_step=1, noise_deviation=0.1, hidden_width=32)
    rng = np.random.default_rng(0)

    @jax.jit
    def update(state, inputs):
        observations, actions, key = inputs
        rewards = -jnp.square(actions - 0.5 * observations[:, :2]).sum(axis=-1)
        return learner.update(state, Transitions(observations, actions, observations), rewards, key)[0], None

    observations = rng.uniform(-1, 1, (400, 64, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, (400, 64, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 400)
    state, _ = jax.lax.scan(update, initial(learner), (observations, actions, keys))
    quiet = ddpg(noise_deviation=0.0, hidden_width=32)
    error = quiet.act(state.actor, observations[0], keys[0]) - 0.5 * observations[0, :, :2]
    assert float(jnp.abs(error).mean()) < 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_width": 0}, "hidden_width must be at least 1"),
        ({"n_step": 0}, "n_step must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"discount": 1.0}, "discount must be at least 0 and below 1"),
        ({"target_rate": 0.0}, "target_rate must be above 0"),
        ({"noise_clip": -0.1}, "must not be negative"),
    ],
)
def test_bad_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DDPGConfig(**{**CONFIG, **changes})
