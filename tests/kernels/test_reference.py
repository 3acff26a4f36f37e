"""The specification against loops that spell its formula out for one query, one head, one key at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.dropout import Dropout, kept, query_row_bits
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.reference import reference_attention

B, T, S, H, K, D = 2, 4, 5, 4, 2, 3


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in [(B, T, H, D), (B, S, K, D), (B, S, K, D)]]


def spelled_out(q, k, v, *, see, scale, soft_cap, slopes, query_positions, key_positions, factor):
    """Loops over everything; `see(b, t, s)`, and `factor[b, h, t, s]` multiplies a weight."""
    out, log_sum_exp = np.zeros((B, T, H, D)), np.full((B, H, T), -np.inf)
    for b, t, h in np.ndindex(B, T, H):
        logits = {}
        for s in range(S):
            if see(b, t, s):
                logit = scale * q[b, t, h] @ k[b, s, h // (H // K)]
                if soft_cap is not None:
                    logit = soft_cap * math.tanh(logit / soft_cap)
                logits[s] = logit - slopes[h] * abs(int(query_positions[b, t]) - int(key_positions[b, s]))
        if logits:
            total = sum(math.exp(logit) for logit in logits.values())
            log_sum_exp[b, h, t] = math.log(total)
            for s, logit in logits.items():
                out[b, t, h] += factor[b, h, t, s] * math.exp(logit) / total * v[b, s, h // (H // K)]
    return out, log_sum_exp


@given(
    seed=st.integers(0, 99),
    causal=st.booleans(),
    packed=st.booleans(),
    soft_cap=st.sampled_from([None, 0.5]),
    alibi=st.booleans(),
    rate=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([None, 0.3]),
    own_rows=st.booleans(),
)
def test_every_option_against_loops(seed, causal, packed, soft_cap, alibi, rate, scale, own_rows):
    rng = np.random.default_rng(seed)
    q, k, v = inputs(seed)
    rows = B if own_rows else 1
    query_positions, key_positions = rng.integers(0, 9, (rows, T)), rng.integers(0, 9, (rows, S))
    query_segments, key_segments = rng.integers(-1, 2, (B, T)), rng.integers(-1, 2, (B, S))
    slopes = rng.uniform(size=H)
    dropout = Dropout(rate, jax.random.key(seed))
    row_bits = query_row_bits(dropout, positions=jnp.asarray(query_positions), batch=B, heads=H)
    keep = kept(row_bits[..., None], jnp.asarray(key_positions)[:, None, None, :], rate)
    p, s = np.broadcast_to(query_positions, (B, T)), np.broadcast_to(key_positions, (B, S))

    def see(b, t, key):
        segments = query_segments[b, t] == key_segments[b, key] and query_segments[b, t] >= 0
        return (not causal or s[b, key] <= p[b, t]) and (not packed or segments)

    expected = spelled_out(
        q,
        k,
        v,
        see=see,
        scale=1 / math.sqrt(D) if scale is None else scale,
        soft_cap=soft_cap,
        slopes=slopes if alibi else np.zeros(H),
        query_positions=p,
        key_positions=s,
        factor=np.asarray(keep) / (1 - rate),
    )
    with jax.enable_x64(True):
        # Positions of one row for all of the batch may come without the batch's axis.
        one_row = lambda x: jnp.asarray(x if own_rows else x[0])  # noqa: E731
        got = reference_attention(
            *map(jnp.asarray, (q, k, v)),
            mask=CAUSAL if causal else FULL,
            scale=scale,
            query_positions=one_row(query_positions),
            key_positions=one_row(key_positions),
            query_segments=jnp.asarray(query_segments) if packed else None,
            key_segments=jnp.asarray(key_segments) if packed else None,
            soft_cap=soft_cap,
            alibi_slopes=jnp.asarray(slopes) if alibi else None,
            dropout=dropout if rate else None,
        )
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-12)


def test_agrees_with_jax():
    q, k, v = (jnp.asarray(x[:, :T], jnp.float32) for x in inputs())
    out, _ = reference_attention(q, k, v, mask=CAUSAL)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_keeps_the_dtype_and_dropout_leaves_the_log_sum_exp(dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in inputs())
    slopes = jnp.ones(H)
    plain = reference_attention(q, k, v, mask=FULL, soft_cap=5.0, alibi_slopes=slopes)
    dropped = reference_attention(
        q, k, v, mask=FULL, soft_cap=5.0, alibi_slopes=slopes, dropout=Dropout(0.5, jax.random.key(0))
    )
    assert {x.dtype for x in (*plain, *dropped)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(plain[1], dropped[1])
    assert (plain[0] != dropped[0]).any()


def test_rows_that_see_nothing():
    """Output and gradient zero, log-sum-exp -inf, and no NaN anywhere, whatever the other options."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs())
    segments = jnp.array([[-1, 0, 1, 2], [0, 0, 0, 0]])

    def total(q, k, v):
        out, log_sum_exp = reference_attention(
            q,
            k,
            v,
            mask=Mask(causal=True, window=3),
            query_positions=jnp.arange(T) + 3,
            query_segments=segments,
            key_segments=jnp.zeros((B, S), jnp.int32),
            soft_cap=2.0,
            alibi_slopes=jnp.full(H, 0.1),
            dropout=Dropout(0.3, jax.random.key(2)),
        )
        finite = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0)
        return out.sum() + finite.sum(), (out, log_sum_exp)

    (dq, dk, dv), (out, log_sum_exp) = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    blind = jnp.array([[True, False, True, True], [False] * 4])
    np.testing.assert_array_equal(jnp.isneginf(log_sum_exp), jnp.broadcast_to(blind[:, None], log_sum_exp.shape))
    assert (out[blind] == 0).all()
    assert (dq[blind] == 0).all()
    assert all(jnp.isfinite(x).all() for x in (dq, dk, dv))
    assert (dq[~blind] != 0).any()


def test_segment_ids_of_one_side_only():
    q, k, v = map(jnp.asarray, inputs())
    with pytest.raises(ValueError, match="segment ids are needed for queries and keys alike"):
        reference_attention(q, k, v, mask=FULL, query_segments=jnp.zeros((B, T), jnp.int32))
