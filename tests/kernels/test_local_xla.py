"""One local block alone, under the contract every backend must keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_rl.kernels.local.block import select_block
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.mask import CAUSAL, FULL
from ring_rl.kernels.reference import reference_attention


def draw(seed, T, S, H, K, D=4):
    generator = np.random.default_rng(seed)
    shapes = [(2, T, H, D), (2, S, K, D), (2, S, K, D), (2, T, H, D)]
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


@settings(max_examples=10)  # every example is a compilation of its own
@given(
    seed=st.integers(0, 1000),
    T=st.integers(1, 33),
    S=st.integers(1, 33),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    block_size=st.integers(1, 40),
    causal=st.booleans(),
)
def test_block_equals_reference(seed, T, S, heads, block_size, causal):
    S = T if causal else S
    q, k, v, d_out = draw(seed, T, S, *heads)
    mask = CAUSAL if causal else FULL
    (out, lse), pull_back = jax.vjp(lambda q, k, v: reference_attention(q, k, v, mask=mask, scale=0.3), q, k, v)
    block = XlaBlock(block_size=block_size)
    got_out, got_lse = jax.jit(partial(block.forward, causal=causal, scale=0.3))(q, k, v)
    np.testing.assert_allclose(got_out, out, atol=1e-5)
    np.testing.assert_allclose(got_lse, lse, atol=1e-5)
    delta = jnp.einsum("bthd,bthd->bht", out, d_out)
    got = jax.jit(partial(block.backward, causal=causal, scale=0.3))(
        q, k, v, out=out, log_sum_exp=lse, d_out=d_out, delta=delta
    )
    for a, b in zip(got, pull_back((d_out, jnp.zeros_like(lse))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_with_infinite_log_sum_exp_contribute_nothing():
    q, k, v, d_out = draw(0, 6, 6, 2, 2)
    zeros, infinite = jnp.zeros((2, 2, 6)), jnp.full((2, 2, 6), jnp.inf)
    gradients = XlaBlock(block_size=4).backward(
        q, k, v, out=q, log_sum_exp=infinite, d_out=d_out, delta=zeros, causal=False, scale=1.0
    )
    for gradient in gradients:
        assert (gradient == 0).all()


def test_very_negative_log_sum_exp_does_not_overflow_padding():
    """Padded keys score 0; against a log-sum-exp of -1000 their weight would be e^1000."""
    q, k, v, d_out = draw(1, 5, 5, 1, 1)
    k = k.at[..., 0].set(-1000.0)
    q = q.at[..., 0].set(1.0)
    (_, lse), pull_back = jax.vjp(lambda *x: reference_attention(*x, mask=FULL, scale=1.0), q, k, v)
    out, _ = reference_attention(q, k, v, mask=FULL, scale=1.0)
    delta = jnp.einsum("bthd,bthd->bht", out, d_out)
    got = XlaBlock(block_size=3).backward(
        q, k, v, out=out, log_sum_exp=lse, d_out=d_out, delta=delta, causal=False, scale=1.0
    )
    for a, b in zip(got, pull_back((d_out, jnp.zeros_like(lse))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="block_size must be at least 1 token, got 0"):
        XlaBlock(block_size=0)


def test_auto_says_which_block_runs(caplog):
    with caplog.at_level("INFO", logger="ring_rl"):
        assert select_block("auto", block_size=8) == XlaBlock(block_size=8)
    assert "local attention block: xla" in caplog.text
