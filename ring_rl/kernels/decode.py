"""New tokens against a cache of keys and values."""

import math

import jax.numpy as jnp

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.typing import Array, Float, Int


def decode_attention(
    q: Float[Array, "B T H D"],
    k_cache: Float[Array, "B K S D"],
    v_cache: Float[Array, "B K S D"],
    *,
    length: Int[Array, ""],
    scale: float | None = None,
) -> Float[Array, "B T H D"]:
    """Causal attention of T new tokens, at positions length .. length + T - 1, to a cache of S slots.

    A cache keeps heads before slots, so that a product reads the slots of one head from one stretch of memory; at
    one token a time reading the cache is all the cost. It already holds the new tokens' own keys and values at
    those positions; slots after them are ignored, whatever finite values they hold. Equal to the last T rows of
    causal attention over length + T tokens.

    O(B H T S D) work; T is meant to be small.
    """
    B, T, H, D = q.shape
    K, S = k_cache.shape[1:3]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    q_BTKGD = q.reshape(B, T, K, H // K, D)
    logits_BKGTS = scale * float32_einsum("btkgd,bksd->bkgts", q_BTKGD, k_cache)
    seen_TS = jnp.arange(S)[None, :] <= length + jnp.arange(T)[:, None]
    logits_BKGTS = jnp.where(seen_TS, logits_BKGTS, -jnp.inf)
    weights_BKGTS = jnp.exp(logits_BKGTS - jnp.max(logits_BKGTS, axis=-1, keepdims=True))
    numerator_BTKGD = float32_einsum("bkgts,bksd->btkgd", weights_BKGTS.astype(v_cache.dtype), v_cache)
    denominator_BTKG = jnp.moveaxis(jnp.sum(weights_BKGTS, axis=-1), 3, 1)
    return (numerator_BTKGD / denominator_BTKG[..., None]).reshape(B, T, H, D).astype(q.dtype)
