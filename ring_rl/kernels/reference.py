"""The specification: dense softmax attention, as short as the formula."""

import math

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.dropout import Dropout, kept, query_row_bits
from ring_rl.kernels.mask import Mask, visible
from ring_rl.typing import Array, Float, Int


def reference_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    mask: Mask,
    scale: float | None = None,
    query_positions: Int[Array, "*b T"] | None = None,
    key_positions: Int[Array, "*b S"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """out = softmax(logits) v and log_sum_exp = log Σ exp(logits), natural base, where

        logits = scale q kᵀ                                          scale defaults to 1/√D
        logits = soft_cap tanh(logits / soft_cap)                    with a soft cap
        logits = logits - slope_h |query position - key position|    with ALiBi (arXiv:2108.12409)
        logits = -inf                                                where the query does not see the key

    With dropout, out = (kept / (1 - rate) softmax(logits)) v; log_sum_exp holds all weights.

    Computed in the dtype of the inputs: give float64 for a reference, float32 or bfloat16 for the naive
    error of that dtype. Query head h reads key-value head h // (H / K). A row that sees nothing gives
    out = 0 and log_sum_exp = -inf. Positions default to 0, 1, 2, ... and are of one row for all of the batch or of
    each row. O(B H T S) memory and O(B H T S D) time.
    """
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    positions_bT = jnp.atleast_2d(jnp.arange(T) if query_positions is None else query_positions)
    positions_bS = jnp.atleast_2d(jnp.arange(S) if key_positions is None else key_positions)
    k_BSHD, v_BSHD = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    logits_BHTS = scale * jnp.einsum("bthd,bshd->bhts", q, k_BSHD)
    if soft_cap is not None:
        logits_BHTS = soft_cap * jnp.tanh(logits_BHTS / soft_cap)
    if alibi_slopes is not None:
        distance_bTS = jnp.abs(positions_bT[:, :, None] - positions_bS[:, None, :])
        logits_BHTS -= alibi_slopes.astype(q.dtype)[:, None, None] * distance_bTS[:, None].astype(q.dtype)
    visible_bTS = visible(mask, positions_bT, positions_bS, query_segments, key_segments)
    logits_BHTS = jnp.where(visible_bTS[:, None], logits_BHTS, -jnp.inf)
    # It cancels, so it is no part of the derivative; differentiated, ties are split by comparing recomputed logits.
    maximum_BHT = lax.stop_gradient(jnp.max(logits_BHTS, axis=-1))
    maximum_BHT = jnp.where(jnp.isfinite(maximum_BHT), maximum_BHT, 0)
    weights_BHTS = jnp.exp(logits_BHTS - maximum_BHT[..., None])
    sum_BHT = jnp.sum(weights_BHTS, axis=-1)
    divisor_BHT = jnp.where(sum_BHT > 0, sum_BHT, 1)
    log_sum_exp_BHT = jnp.where(sum_BHT > 0, jnp.log(divisor_BHT) + maximum_BHT, -jnp.inf)
    weights_BHTS /= divisor_BHT[..., None]
    if dropout is not None:
        row_bits_BHT = query_row_bits(dropout, positions=positions_bT, batch=B, heads=H)
        kept_BHTS = kept(row_bits_BHT[..., None], positions_bS[:, None, None, :], dropout.rate)
        weights_BHTS = jnp.where(kept_BHTS, weights_BHTS / (1 - dropout.rate), 0)
    return jnp.einsum("bhts,bshd->bthd", weights_BHTS, v_BSHD), log_sum_exp_BHT
