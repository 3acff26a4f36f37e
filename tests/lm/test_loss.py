import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.loss import answers_right, make_language_loss
from ring_rl.lm.work import model_flops


@pytest.fixture(scope="module")
def losses(language):
    """(loss with its gradients, the model's) on a mesh; everything in natural order."""
    model = language.make(language.config(**language.everything))
    graphdef, parameters = nnx.split(model)

    def on(around, batch, **options):
        loss_function = make_language_loss(around, **({"chunks": 2, "z_loss": 1e-3} | options))

        def total(parameters, batch):
            loss = loss_function(nnx.merge(graphdef, parameters), batch, jax.random.key(0))
            return loss.total, loss

        placed, _ = language.in_layout(batch, around)
        return jax.device_get(jax.jit(jax.grad(total, has_aux=True))(jax.device_get(parameters), placed))

    return model, on, on(language.parallel(), language.batch())


def test_the_loss_is_what_its_definition_says(language, losses):
    model, _, (_, loss) = losses
    batch = language.batch()
    logits = language.reference_logits(model, batch)
    log_sum_exp = np.log(np.sum(np.exp(logits), axis=-1))
    counts = batch.targets >= 0
    picked = np.take_along_axis(logits, np.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
    weights = np.where(counts, batch.weights, 0)
    np.testing.assert_allclose(loss.total, np.sum(weights * (log_sum_exp - picked + 1e-3 * log_sum_exp**2)), rtol=1e-5)
    np.testing.assert_allclose(loss.weight, weights.sum(), rtol=1e-5)
    hits = logits.argmax(axis=-1) == batch.targets
    np.testing.assert_allclose(loss.metrics["token_accuracy"][0], np.sum(weights * hits), rtol=1e-5)
    assert 0 < np.sum(weights * hits) < weights.sum()


@pytest.mark.parametrize("options", [{"sp": 4, "tp": 2}, {"sp": 2, "fsdp": 2, "layout": "contiguous"}], ids=str)
def test_a_mesh_changes_neither_loss_nor_gradients(language, losses, options):
    _, on, expected = losses
    got = on(language.parallel(**options), language.batch())

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(y).max()))

    jax.tree.map(close, got, expected)
    assert got[1].metrics["answer_accuracy"] == expected[1].metrics["answer_accuracy"]


def test_without_answers_none_are_counted(language, losses):
    _, on, (_, expected) = losses
    _, loss = on(language.parallel(), dataclasses.replace(language.batch(), answer_ids=None))
    assert set(loss.metrics) == {"token_accuracy"}
    np.testing.assert_allclose(loss.total, expected.total, rtol=1e-6)


# One program serves all examples.
_counted = {}


@given(data=st.data(), sp=st.sampled_from([1, 4]))
def test_an_answer_is_right_if_all_of_it_is(language, data, sp):
    around = language.parallel(sp=sp, dp=2)
    if sp not in _counted:
        _counted[sp] = jax.jit(lambda *arrays: answers_right(*arrays, around))
    tokens = lambda element: np.array(data.draw(st.lists(element, min_size=32, max_size=32))).reshape(2, 16)  # noqa: E731
    hits, weights = tokens(st.booleans()), tokens(st.sampled_from([0.0, 0.5])).astype(np.float32)
    ids = tokens(st.integers(-1, 15)).astype(np.int32)
    answers = [
        hits[row][(ids[row] == answer) & (weights[row] > 0)].tolist() for row in range(2) for answer in range(16)
    ]
    asked = [answer for answer in answers if answer]
    placed = language.in_layout_of(around, hits, weights, ids)
    right, count = _counted[sp](*map(jnp.asarray, placed))
    assert (float(right), float(count)) == (sum(map(all, asked)), len(asked))


def test_flops_by_hand(language):
    for tied in (False, True):
        config = language.config(tied=tied)
        parameters = nnx.state(language.make(config), nnx.Param)
        # Four projections of 16 x 32, three of 16 x 24, two layers; the head is 16 x 24 whether tied or not.
        multiplied = 2 * (4 * 16 * 32 + 3 * 16 * 24) + 16 * 24
        attention = 12 * 2 * 4 * 8 * (64 * 65 // 2)
        assert model_flops(config, parameters, batch_size=3, length=64) == 3 * (6 * multiplied * 64 + attention)
