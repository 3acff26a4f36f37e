import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.kernels.convolution import causal_convolution

B, N, M = 2, 2, 3


def by_definition(chunks, kernel, together):
    """y_t = Σ_lag kernel_lag x_{t - lag}, token by token, in float64."""
    span = len(kernel)
    y = np.zeros((B, N, chunks.shape[2] - span + 1, M))
    for t in range(y.shape[2]):
        for lag in range(span):
            counts = 1 if lag == 0 or together is None else together[:, :, t, lag - 1, None]
            y[:, :, t] += kernel[lag] * chunks[:, :, t + span - 1 - lag] * counts
    return y


@settings(max_examples=12)
@given(span=st.integers(1, 4), tokens=st.sampled_from([1, 5]), packed=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients_are_those_of_the_definition(span, tokens, packed, seed):
    """It is linear in the tokens and in the kernel: gradients are told by values along the unit vectors' sums."""
    generator = np.random.default_rng(seed)
    chunks, kernel = generator.normal(size=(B, N, span - 1 + tokens, M)), generator.normal(size=(span, M))
    # One lag more than needed: another part of the layer may look further back.
    together = generator.random((B, N, tokens, span)) < 0.6 if packed else None
    dy = generator.normal(size=(B, N, tokens, M))
    out, transpose = jax.vjp(
        lambda chunks, kernel: causal_convolution(chunks, kernel, together),
        jnp.asarray(chunks, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
    )
    np.testing.assert_allclose(out, by_definition(chunks, kernel, together), atol=1e-5)
    d_chunks, d_kernel = transpose(jnp.asarray(dy, jnp.float32))
    # <dy, A v> = <Aᵀ dy, v> for any v.
    other_chunks, other_kernel = generator.normal(size=chunks.shape), generator.normal(size=kernel.shape)
    along_chunks = np.sum(dy * by_definition(other_chunks, kernel, together))
    along_kernel = np.sum(dy * by_definition(chunks, other_kernel, together))
    np.testing.assert_allclose(np.sum(np.asarray(d_chunks) * other_chunks), along_chunks, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.sum(np.asarray(d_kernel) * other_kernel), along_kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_are_float32_in_smaller_types(dtype):
    """Seven terms of half a last bit each, which the type itself would lose one by one."""
    half_bit = float(jnp.finfo(dtype).eps) / 2
    chunks = jnp.concatenate([jnp.full((1, 1, 7, 1), half_bit), jnp.ones((1, 1, 1, 1))], axis=2).astype(dtype)
    out, transpose = jax.vjp(lambda x: causal_convolution(x, jnp.ones((8, 1)), None), chunks)
    assert out.dtype == transpose(out)[0].dtype == dtype
    np.testing.assert_allclose(float(out[0, 0, 0, 0]), 1 + 7 * half_bit, rtol=half_bit)
