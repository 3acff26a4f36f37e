"""The specification: dense softmax attention, as short as the formula."""

import math

import jax.numpy as jnp

from ring_rl.kernels.mask import Mask, visible
from ring_rl.typing import Array, Float, Int


def reference_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    mask: Mask,
    scale: float | None = None,
    query_positions: Int[Array, " T"] | None = None,
    key_positions: Int[Array, " S"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B H T"]]:
    """out = softmax(scale q kᵀ + mask) v, and log_sum_exp = log Σ exp(scale q kᵀ + mask), natural base.

    Computed in the dtype of the inputs: give float64 for a reference, float32 or bfloat16 for the naive
    error of that dtype. Query head h reads key-value head h // (H / K). A row that sees nothing gives
    out = 0 and log_sum_exp = -inf. O(T S) memory and O(B H T S D) time. `scale` defaults to 1/√D.
    """
    T, H, D = q.shape[1:]
    S, K = k.shape[1:3]
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    query_positions = jnp.arange(T) if query_positions is None else query_positions
    key_positions = jnp.arange(S) if key_positions is None else key_positions
    k_BSHD, v_BSHD = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    logits_BHTS = scale * jnp.einsum("bthd,bshd->bhts", q, k_BSHD)
    logits_BHTS = jnp.where(visible(mask, query_positions, key_positions), logits_BHTS, -jnp.inf)
    maximum_BHT = jnp.max(logits_BHTS, axis=-1)
    maximum_BHT = jnp.where(jnp.isfinite(maximum_BHT), maximum_BHT, 0)
    weights_BHTS = jnp.exp(logits_BHTS - maximum_BHT[..., None])
    sum_BHT = jnp.sum(weights_BHTS, axis=-1)
    divisor_BHT = jnp.where(sum_BHT > 0, sum_BHT, 1)
    out_BTHD = jnp.einsum("bhts,bshd->bthd", weights_BHTS / divisor_BHT[..., None], v_BSHD)
    return out_BTHD, jnp.where(sum_BHT > 0, jnp.log(divisor_BHT) + maximum_BHT, -jnp.inf)
