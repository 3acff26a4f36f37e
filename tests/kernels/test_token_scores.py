from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.kernels.cross_entropy import blockwise_cross_entropy_and_hits
from ring_rl.kernels.token_scores import blockwise_token_scores

B, T, M, V = 2, 12, 4, 9


@partial(jax.jit, static_argnames="chunks")
def scored(hidden, head, targets, weights, chunks):
    _, hits = blockwise_cross_entropy_and_hits(hidden, head, targets, chunks=chunks, weights=weights)
    return blockwise_token_scores(hidden, head, targets, chunks=chunks), hits


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), chunks=st.sampled_from([1, 3]), scale=st.sampled_from([0.0, 1.0, 30.0]))
def test_every_token_is_read_as_from_dense_logits(seed, chunks, scale):
    """Also where all logits are equal, and where they are large; targets run beyond the vocabulary on both sides."""
    generator = np.random.default_rng(seed)
    hidden, head = (generator.normal(size=size).astype(np.float32) for size in ((B, T, M), (M, V)))
    hidden *= scale
    targets = generator.integers(-1, V + 1, size=(B, T)).astype(np.int32)
    weights = (generator.random((B, T)) < 0.7).astype(np.float32)
    scores, hits = scored(hidden, head, targets, weights, chunks)
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    log_probabilities = logits - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True))
    log_probabilities -= logits.max(-1, keepdims=True)
    known = (targets >= 0) & (targets < V)
    of_target = np.take_along_axis(log_probabilities, np.clip(targets, 0, V - 1)[..., None], axis=-1)[..., 0]
    np.testing.assert_array_equal(scores.best, logits.argmax(axis=-1))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * max(1.0, scale))
    close(scores.best_log_probability, log_probabilities.max(axis=-1))
    close(scores.target_log_probability, np.where(known, of_target, 0))
    np.testing.assert_array_equal(hits, known & (weights != 0) & (logits.argmax(axis=-1) == targets))


def test_without_targets_only_the_best_is_read():
    hidden, head = jnp.ones((1, 2, M)), jnp.eye(M, V)
    scores = blockwise_token_scores(hidden, head, None, chunks=1)
    np.testing.assert_array_equal(scores.best, [[0, 0]])
    np.testing.assert_array_equal(scores.target_log_probability, [[0.0, 0.0]])


def test_shapes_that_do_not_fit_are_refused():
    hidden, head = jnp.ones((B, T, M)), jnp.ones((M, V))
    with pytest.raises(ValueError, match="12 tokens cannot be cut into 5 token score chunks"):
        blockwise_token_scores(hidden, head, None, chunks=5)
    with pytest.raises(ValueError, match=r"hidden \(2, 12, 4\) and head \(9, 4\) must be"):
        blockwise_token_scores(hidden, head.T, None, chunks=1)
    with pytest.raises(ValueError, match=r"targets \(2, 3\) must be one a token, \(2, 12\)"):
        blockwise_token_scores(hidden, head, jnp.zeros((2, 3), jnp.int32), chunks=1)
