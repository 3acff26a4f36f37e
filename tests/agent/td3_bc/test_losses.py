import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.agent.td3_bc.losses import actor_loss, bellman_targets, critic_loss


@pytest.fixture
def batch(td3):
    return td3.minibatch(np.random.default_rng(0))


def test_networks_are_what_their_formulas_say(td3, batch):
    model = td3.model()
    reference = td3.Reference(model)
    np.testing.assert_allclose(
        model.actions(batch.observations), reference.actions(batch.observations), rtol=1e-5, atol=1e-6
    )
    values = model.values(batch.observations, batch.actions)
    for critic in range(2):
        expected = reference.value(batch.observations, batch.actions, critic)
        np.testing.assert_allclose(values[critic], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(model.value(batch.observations, batch.actions, critic=critic), values[critic])
    # Twins that start alike would stay alike.
    assert not np.allclose(values[0], values[1])


@pytest.mark.parametrize(("noise", "clip"), [(0.2, 0.3), (5.0, 0.3), (0.0, 0.5), (5.0, 5.0)])
def test_targets_take_the_lesser_value_of_a_smoothed_and_clipped_action(td3, batch, noise, clip):
    targets, config = td3.model(1), td3.learning_config(smoothing_noise=noise, smoothing_clip=clip)
    key = jax.random.key(3)
    reference = td3.Reference(targets)
    epsilon = np.asarray(jax.random.normal(key, batch.actions.shape), np.float64)
    actions = reference.actions(batch.next_observations) + np.clip(noise * epsilon, -clip, clip)
    actions = np.clip(actions, -1, 1)
    values = [reference.value(batch.next_observations, actions, critic) for critic in range(2)]
    expected = batch.rewards + 0.9 * batch.discounts * np.minimum(*values)
    np.testing.assert_allclose(bellman_targets(targets, batch, key, config), expected, rtol=1e-5, atol=1e-6)
    assert (values[0] < values[1]).any()
    assert (values[1] < values[0]).any()


def test_nothing_is_expected_after_an_end_and_all_after_a_time_limit(td3, batch):
    key, config = jax.random.key(0), td3.learning_config()
    ended = bellman_targets(td3.model(), batch._replace(discounts=np.zeros(16, np.float32)), key, config)
    np.testing.assert_array_equal(ended, batch.rewards)
    cut_off = bellman_targets(td3.model(), batch._replace(discounts=np.ones(16, np.float32)), key, config)
    assert np.abs(cut_off - batch.rewards).min() > 0


def test_critics_are_pulled_to_their_targets(td3, batch):
    model, y = td3.model(), np.linspace(-1, 2, 16, dtype=np.float32)
    reference = td3.Reference(model)
    values = np.stack([reference.value(batch.observations, batch.actions, critic) for critic in range(2)])
    loss = critic_loss(model, batch, y)
    np.testing.assert_allclose(loss.loss, np.square(values[0] - y).mean() + np.square(values[1] - y).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss.value, values.mean(), rtol=1e-5)


def actor_reference(td3, model, batch, alpha):
    reference = td3.Reference(model)
    actions = reference.actions(batch.observations)
    value = reference.value(batch.observations, actions, 0)
    imitation_error = np.square(actions - batch.actions).mean()
    weight = alpha / np.abs(value).mean()
    return imitation_error - weight * value.mean(), imitation_error, weight


@pytest.mark.parametrize("alpha", [0.0, 2.5])
def test_the_actor_weighs_value_against_imitation(td3, batch, alpha):
    model = td3.model()
    loss, imitation_error, _ = actor_reference(td3, model, batch, alpha)
    got = actor_loss(model, batch, td3.learning_config(value_weight=alpha))
    np.testing.assert_allclose(got.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got.imitation_error, imitation_error, rtol=1e-5)


def test_the_scale_of_values_is_a_constant_for_the_actors_gradient(td3, batch):
    """d/dθ of imitation - λ mean Q with λ held fixed, by central differences of the numpy reference."""
    model, alpha = td3.model(), 2.5
    _, _, weight = actor_reference(td3, model, batch, alpha)
    graphdef, parameters = nnx.split(model)

    def loss(parameters):
        return actor_loss(nnx.merge(graphdef, parameters), batch, td3.learning_config(value_weight=alpha)).loss

    gradient = np.asarray(jax.grad(loss)(parameters)["actor"]["layers"][2]["kernel"].get_value())
    reference = td3.Reference(model)
    kernel, _ = reference.actor[-1]

    def at(row, column, step):
        kernel[row, column] += step
        actions = reference.actions(batch.observations)
        value = reference.value(batch.observations, actions, 0).mean()
        kernel[row, column] -= step
        return np.square(actions - batch.actions).mean() - weight * value

    for row, column in [(0, 0), (3, 1), (6, 0)]:
        expected = (at(row, column, 1e-5) - at(row, column, -1e-5)) / 2e-5
        np.testing.assert_allclose(gradient[row, column], expected, rtol=1e-3, atol=1e-5)


def test_critics_that_say_nothing_leave_imitation(td3, batch):
    """A constant 0, as a task without rewards yields, has no scale to divide by."""
    graphdef, parameters = nnx.split(td3.model())
    silent = jax.tree.map(np.zeros_like, parameters["critics"])
    parameters = nnx.State({"actor": parameters["actor"].raw_mapping, "critics": silent.raw_mapping})
    loss, gradient = jax.value_and_grad(
        lambda p: actor_loss(nnx.merge(graphdef, p), batch, td3.learning_config()).loss
    )(parameters)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("discount", 1.0),
        ("discount", -0.1),
        ("target_rate", 0.0),
        ("target_rate", 1.5),
        ("actor_delay", 0),
        ("smoothing_noise", -0.1),
        ("smoothing_clip", float("nan")),
        ("value_weight", -1.0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(td3, name, value):
    with pytest.raises(ValueError, match=name):
        td3.learning_config(**{name: value})
