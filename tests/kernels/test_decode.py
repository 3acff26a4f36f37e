import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.kernels.decode import decode_attention
from ring_rl.kernels.mask import CAUSAL
from ring_rl.kernels.reference import reference_attention


@settings(max_examples=8)  # every example is a compilation of its own
@given(
    seed=st.integers(0, 1000),
    length=st.integers(0, 20),
    new=st.integers(1, 4),
    spare=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
)
def test_equals_the_last_rows_of_causal_attention(seed, length, new, spare, heads):
    generator = np.random.default_rng(seed)
    total = length + new
    q = jnp.asarray(generator.normal(size=(2, total, heads[0], 4)), jnp.float32)
    k, v = (jnp.asarray(generator.normal(size=(2, total, heads[1], 4)), jnp.float32) for _ in range(2))
    # Slots after the new tokens are not yet written; what lies in them must not matter.
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    fill = lambda x: jnp.pad(heads_first(x), ((0, 0), (0, 0), (0, spare), (0, 0)), constant_values=1e4)  # noqa: E731
    got = decode_attention(q[:, length:], fill(k), fill(v), length=jnp.int32(length))
    expected, _ = reference_attention(q, k, v, mask=CAUSAL)
    np.testing.assert_allclose(got, expected[:, length:], atol=1e-5)
