"""Losses against SciPy and sums in double precision, draws against the odds they are drawn by, and what each learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.action_heads import (
    ActionHead,
    DiagonalGaussian,
    DiscretisedAction,
    DiscretisedConfig,
    GaussianConfig,
    GaussianMixture,
    MixtureConfig,
)
from ring_rl.agent.model import chosen

HEADS = ("squared_error", "gaussian", "mixture", "discretised")


def distribution_of(config, *, steps=7, action_dim=3, seed=0, scale=2.0):
    outputs = scale * np.random.default_rng(seed).normal(size=(steps, config.outputs(action_dim)))
    return config.distribution(jnp.asarray(outputs, jnp.float32), action_dim)


def some_actions(*, steps=7, action_dim=3, seed=1):
    actions = np.random.default_rng(seed).uniform(-1, 1, size=(steps, action_dim))
    actions[0], actions[1, 0] = 1.0, -1.0  # explorers saturate their actuators
    return actions.astype(np.float32)


@given(seed=st.integers(0, 10_000), components=st.integers(1, 6), action_dim=st.integers(1, 4))
def test_a_mixture_has_the_density_that_scipy_gives_its_components(seed, components, action_dim):
    config = MixtureConfig(name="mixture", components=components, smallest_deviation=0.05, largest_deviation=1.0)
    mixture = distribution_of(config, action_dim=action_dim, seed=seed)
    actions = some_actions(action_dim=action_dim, seed=seed)
    mean, deviation = (np.asarray(x, np.float64) for x in (mixture.components.mean, mixture.components.deviation))
    odds = scipy.special.softmax(np.asarray(mixture.logits, np.float64), axis=-1)
    density = scipy.stats.norm.pdf(actions[:, None].astype(np.float64), mean, deviation).prod(axis=-1)
    # A float32 sum of squares of distances in deviations; far from every component that is a large number.
    np.testing.assert_allclose(
        mixture.loss(actions), -np.log((odds * density).sum(axis=-1)) / action_dim, rtol=1e-4, atol=1e-4
    )


def test_a_gaussian_is_a_mixture_of_one(chains):
    one = MixtureConfig(name="mixture", components=1, smallest_deviation=0.05, largest_deviation=1.0)
    outputs = np.random.default_rng(0).normal(size=(7, 7)).astype(np.float32)
    mixture = one.distribution(outputs, 3)
    gaussian = chains.action_heads["gaussian"].distribution(outputs[:, 1:], 3)
    np.testing.assert_allclose(mixture.loss(some_actions()), gaussian.loss(some_actions()), rtol=1e-5)
    np.testing.assert_array_equal(mixture.mode(), gaussian.mode())


def test_a_discretised_action_has_the_cross_entropy_of_the_nearest_value():
    actions = np.array([[-1.0, 0.1, 0.9], [0.25001, -0.74, 1.0]], np.float32)  # values -1, -0.5, 0, 0.5, 1
    nearest = [[0, 2, 4], [3, 1, 4]]
    distribution = distribution_of(DiscretisedConfig(name="discretised", bins=5), steps=2)
    log_odds = scipy.special.log_softmax(np.asarray(distribution.logits, np.float64), axis=-1)
    expected = [-np.mean([log_odds[i, a, nearest[i][a]] for a in range(3)]) for i in range(2)]
    np.testing.assert_allclose(distribution.loss(actions), expected, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_finite_differences(chains, name):
    config, actions = chains.action_heads[name], some_actions().astype(np.float64)
    with jax.enable_x64(True):
        outputs = jnp.asarray(np.random.default_rng(0).normal(size=(7, config.outputs(3))))
        loss = jax.jit(lambda x: jnp.sum(config.distribution(x, 3).loss(jnp.asarray(actions))))
        direction = jnp.asarray(np.random.default_rng(1).normal(size=outputs.shape))
        slope = float(loss(outputs + 1e-5 * direction) - loss(outputs - 1e-5 * direction)) / 2e-5
        got = float(jnp.sum(jax.grad(loss)(outputs) * direction))
    assert got == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [1e-2, 30.0, 1e4])
def test_losses_and_gradients_stay_finite(chains, name, size):
    config = chains.action_heads[name]
    outputs = size * np.random.default_rng(0).normal(size=(50, config.outputs(3))).astype(np.float32)
    loss = lambda x: jnp.sum(config.distribution(x, 3).loss(some_actions(steps=50)))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(outputs))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", HEADS)
def test_actions_are_within_reach_of_the_actuators(chains, name):
    distribution = distribution_of(chains.action_heads[name], steps=200, scale=5.0)
    for actions in (distribution.mode(), distribution.sample(jax.random.key(0))):
        assert actions.shape == (200, 3)
        assert np.abs(actions).max() <= 1


def test_deviations_keep_to_their_bounds():
    config = GaussianConfig(name="gaussian", smallest_deviation=0.1, largest_deviation=0.4)
    spread = lambda x: float(config.distribution(jnp.array([0.0, x]), 1).deviation[0])  # noqa: E731
    assert [spread(x) for x in (-50.0, 0.0, 50.0)] == pytest.approx([0.1, 0.2, 0.4])


DRAWS = 20_000


def drawn(distribution):
    keys = jax.random.split(jax.random.key(3), DRAWS)
    return np.asarray(jax.jit(jax.vmap(distribution.sample))(keys))


def test_draws_of_a_mixture_come_from_its_components_by_their_odds():
    odds, mean, deviation = np.array([0.7, 0.3]), np.array([[-0.5, 0.5], [0.5, -0.4]]), np.full((2, 2), 0.05)
    actions = drawn(GaussianMixture(jnp.log(odds), DiagonalGaussian(jnp.asarray(mean), jnp.asarray(deviation))))
    first = actions[:, 0] < 0  # the components lie 10 deviations from this line
    assert abs(first.mean() - 0.7) < 4 * np.sqrt(0.21 / DRAWS)
    for component, rows in enumerate((actions[first], actions[~first])):
        np.testing.assert_allclose(rows.mean(axis=0), mean[component], atol=4 * 0.05 / np.sqrt(len(rows)))
        np.testing.assert_allclose(rows.std(axis=0), 0.05, rtol=4 / np.sqrt(2 * len(rows)))
    assert abs(np.corrcoef(actions[first].T)[0, 1]) < 4 / np.sqrt(first.sum())


def test_draws_of_a_gaussian_beyond_the_ends_become_the_ends():
    actions = drawn(DiagonalGaussian(jnp.array([0.9]), jnp.array([0.5])))[:, 0]
    for end, expected in ((1.0, scipy.stats.norm.sf(1, 0.9, 0.5)), (-1.0, scipy.stats.norm.cdf(-1, 0.9, 0.5))):
        assert abs((actions == end).mean() - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS)


def test_draws_of_a_discretised_action_follow_its_odds_each_entry_its_own():
    odds = np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    actions = drawn(DiscretisedAction(jnp.log(odds)))
    for entry in range(2):
        for value, expected in zip((-1.0, 0.0, 1.0), odds[entry], strict=True):
            assert abs((actions[:, entry] == value).mean() - expected) < 4 * np.sqrt(0.25 / DRAWS)
    assert abs(np.corrcoef(actions.T)[0, 1]) < 4 / np.sqrt(DRAWS)


@pytest.mark.parametrize("name", HEADS)
def test_a_row_draws_by_its_own_key_whatever_the_others_are(chains, name):
    distribution = distribution_of(chains.action_heads[name])
    keys = jax.random.split(jax.random.key(0), 7)
    together = chosen(distribution, keys)
    alone = chosen(jax.tree.map(lambda x: x[2:3], distribution), keys[2:3])
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-6)
    np.testing.assert_array_equal(chosen(distribution, None), distribution.mode())
    assert np.array_equal(together, distribution.mode()) == (name == "squared_error")


# Two answers to every state, to the left and to the right, both entries alike.
ANSWERS = np.array([[-0.8, -0.8], [0.8, 0.8]], np.float32)


def learned(config):
    """The head after training on the two answers, as its distribution at one state."""
    generator = np.random.default_rng(0)
    actions = ANSWERS[generator.integers(2, size=256)] + generator.normal(scale=0.05, size=(256, 2)).astype(np.float32)
    head = ActionHead(config, width=4, action_dim=2, rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(head)
    x = jnp.ones((256, 4))
    optimizer = optax.adam(3e-2)

    @jax.jit
    def train(parameters):
        def step(carry, _):
            parameters, state = carry
            gradients = jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(x).loss(actions)))(parameters)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(parameters, updates), state), None

        return jax.lax.scan(step, (parameters, optimizer.init(parameters)), length=300)[0][0]

    return nnx.merge(graphdef, train(parameters))(jnp.ones(4))


def near(actions, answer):
    return (np.abs(actions - answer) < 0.25).all(axis=-1)


def test_a_squared_error_learns_the_mean_of_two_answers_which_is_neither(chains):
    np.testing.assert_allclose(learned(chains.action_heads["squared_error"]).mode(), 0, atol=0.15)


def test_a_mixture_learns_both_answers_whole(chains):
    distribution = learned(chains.action_heads["mixture"])
    assert near(distribution.mode(), ANSWERS).any()
    left, right = (near(drawn(distribution), answer).mean() for answer in ANSWERS)
    assert left + right > 0.97
    assert 0.4 < left < 0.6


def test_a_discretised_action_learns_both_answers_but_not_that_entries_agree(chains):
    distribution = learned(DiscretisedConfig(name="discretised", bins=21))
    assert (np.abs(np.abs(distribution.mode()) - 0.8) < 0.25).all()
    actions = drawn(distribution)
    assert (np.abs(np.abs(actions) - 0.8) < 0.25).mean() > 0.97
    assert 0.4 < sum(near(actions, answer).mean() for answer in ANSWERS) < 0.6


def test_bad_heads_are_refused():
    with pytest.raises(ValueError, match=r"0 < smallest_deviation < largest_deviation, got 0.5 and 0.5"):
        GaussianConfig(name="gaussian", smallest_deviation=0.5, largest_deviation=0.5)
    with pytest.raises(ValueError, match=r"action_head.components must be at least 1, got 0"):
        MixtureConfig(name="mixture", components=0, smallest_deviation=0.1, largest_deviation=1.0)
    with pytest.raises(ValueError, match=r"action_head.bins must be at least 2, .* got 1"):
        DiscretisedConfig(name="discretised", bins=1)
