import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.nn.rotary import rotate, rotation
from ring_rl.nn.rotary_scaling import rotary_frequencies


def turned(x, position, *, base, rotary_dim=8):
    frequencies = rotary_frequencies(rotary_dim=rotary_dim, base=base, scaling=None)
    return rotate(x, rotation(jnp.array([[position]], jnp.int32), frequencies))


def test_scores_depend_on_distance_only():
    generator = np.random.default_rng(1)
    q, k = (jnp.asarray(generator.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        return float(jnp.sum(turned(q, at_q, base=100.0) * turned(k, at_k, base=100.0)))

    far = 1_000_000_000
    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-5) == pytest.approx(score(far + 5, far + 3), abs=1e-5)
    assert abs(score(5, 3) - score(5, 4)) > 1e-3
    np.testing.assert_allclose(turned(q, 0, base=100.0), q)


@given(positions=st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3), base=st.floats(2.0, 1e9))
def test_angles_are_exact_at_every_position(positions, base):
    """Against float64: a float32 angle is off by half a radian at 10⁷ already."""
    frequencies = rotary_frequencies(rotary_dim=8, base=base, scaling=None)
    angles = np.array(positions)[:, None] * base ** (-np.arange(0, 8, 2) / 8)
    got = rotation(jnp.asarray([positions], jnp.int32), frequencies)
    np.testing.assert_allclose(got.cos[0], np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(got.sin[0], np.sin(angles), atol=2e-6)


def test_bfloat16_heads_turn_by_exact_angles():
    """At a million tokens bfloat16 positions would be off by thousands."""
    got = turned(jnp.ones((1, 1, 1, 8), jnp.bfloat16), 1_000_003, base=1e6)
    angle = 1_000_003 * 1e6 ** (-np.arange(0, 8, 2) / 8)
    assert got.dtype == jnp.bfloat16
    expected = np.concatenate([np.cos(angle) - np.sin(angle), np.sin(angle) + np.cos(angle)])
    np.testing.assert_allclose(got[0, 0, 0].astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)


def test_what_does_not_turn_stays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 2, 8)), jnp.float32)
    part = turned(x, 7, base=100.0, rotary_dim=4)
    np.testing.assert_array_equal(part[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(part[..., :4], turned(x[..., :4], 7, base=100.0, rotary_dim=4))
    with pytest.raises(ValueError, match="4 pairs of dimensions cannot turn in heads of 4"):
        turned(x[..., :4], 7, base=100.0)
