import jax.numpy as jnp
import numpy as np
import pytest

from ring_rl.nn.rotary import rotate


def test_scores_depend_on_distance_only():
    generator = np.random.default_rng(1)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [rotate(x, jnp.array([[at]]), base=100.0) for x, at in ((q, at_q), (k, at_k))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3
    np.testing.assert_allclose(rotate(q, jnp.array([[0]]), base=100.0), q)


def test_angles_are_exact_in_bfloat16_too():
    """At a million tokens bfloat16 positions would be off by thousands."""
    x, position = jnp.ones((1, 1, 1, 8), jnp.bfloat16), 1_000_003
    turned = rotate(x, jnp.array([[position]]), base=1e6)
    angle = position * 1e6 ** (-np.arange(0, 8, 2) / 8)
    assert turned.dtype == jnp.bfloat16
    expected = np.concatenate([np.cos(angle) - np.sin(angle), np.sin(angle) + np.cos(angle)])
    np.testing.assert_allclose(turned[0, 0, 0].astype(jnp.float32), expected, atol=0.1)


def test_an_odd_head_dimension_is_refused():
    with pytest.raises(ValueError, match="even head dimension, got 3"):
        rotate(jnp.zeros((1, 1, 1, 3)), jnp.zeros((1, 1), int), base=10.0)
