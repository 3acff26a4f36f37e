import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.lm.generation.sampling import GREEDY, Sampling, draw, row_keys

V = 6
LOGITS = np.array([0.0, 2.0, -1.0, 1.0, 1.5, -3.0], np.float32)
DRAWS = 400


@pytest.fixture(scope="module")
def drawn():
    """What many rows of the same logits draw under a sampling."""
    jitted = jax.jit(draw, static_argnums=1)

    def draws(sampling, logits=LOGITS, seed=0):
        keys = row_keys(jax.random.key(seed), jnp.arange(DRAWS), 0)
        tokens, log_probabilities = jitted(jnp.broadcast_to(jnp.asarray(logits), (DRAWS, V)), sampling, keys)
        return np.asarray(tokens), np.asarray(log_probabilities)

    return draws


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def expected(logits, sampling):
    """The distribution by the definitions, one token at a time."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    probability = softmax(np.array([logits[token] for token in order], np.float64) / sampling.temperature)
    kept, mass = [], 0.0
    for token, share in zip(order, probability, strict=True):
        if mass < (1.0 if sampling.top_p is None else sampling.top_p) or not kept:
            kept.append((token, share))
        mass += share
    total = sum(share for _, share in kept)
    distribution = np.zeros(len(logits))
    for token, share in kept:
        distribution[token] = share / total
    return distribution


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=None, top_p=None),
        Sampling(temperature=2.0, top_k=3, top_p=None),
        Sampling(temperature=0.7, top_k=None, top_p=0.8),
        # Of the 3 most likely two have 0.9 of what the 3 have, which they do not have of all 6.
        Sampling(temperature=1.0, top_k=3, top_p=0.78),
        Sampling(temperature=1.0, top_k=100, top_p=1.0),
    ],
)
def test_draws_follow_the_distribution_that_the_rules_define(drawn, sampling):
    tokens, _ = drawn(sampling)
    want = expected(LOGITS, sampling)
    frequency = np.bincount(tokens, minlength=V) / DRAWS
    assert not frequency[want == 0].any()
    # Five standard errors.
    np.testing.assert_allclose(frequency, want, atol=5 * 0.5 / np.sqrt(DRAWS))
    assert (frequency[want > 0.02] > 0).all()


@given(logits=st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V))
def test_one_candidate_is_the_most_likely_token(drawn, logits):
    logits = np.array(logits, np.float32)
    for sampling in (GREEDY, Sampling(temperature=0.9, top_k=1, top_p=None)):
        tokens, log_probabilities = drawn(sampling, logits)
        assert (tokens == np.argmax(logits)).all()
        want = -np.log(np.exp((logits - logits.max()).astype(np.float64)).sum())
        np.testing.assert_allclose(log_probabilities, want, atol=1e-5)


def test_equally_likely_tokens_do_not_widen_the_cut(drawn):
    tokens, _ = drawn(Sampling(temperature=1.0, top_k=2, top_p=None), np.zeros(V, np.float32))
    assert len(set(tokens.tolist())) == 2


def test_log_probabilities_are_the_models_whatever_the_sampling(drawn):
    tokens, log_probabilities = drawn(Sampling(temperature=3.0, top_k=4, top_p=0.9))
    np.testing.assert_allclose(log_probabilities, np.log(softmax(LOGITS))[tokens], atol=1e-6)


def test_keys_depend_on_row_and_number_alone():
    data = lambda key, rows, number: np.asarray(jax.random.key_data(row_keys(key, jnp.arange(rows), number)))  # noqa: E731
    key = jax.random.key(3)
    np.testing.assert_array_equal(data(key, 2, 5), data(key, 4, 5)[:2])
    several = np.concatenate([data(key, 4, 0), data(key, 4, 1), data(jax.random.key(4), 4, 0)])
    assert len(np.unique(several, axis=0)) == len(several)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"temperature": -1.0}, r"temperature must be finite and at least 0 \(greedy\), got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be at least 1 token, got 0; null is all"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_settings(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        Sampling(**({"temperature": 1.0, "top_k": None, "top_p": None} | changes))
