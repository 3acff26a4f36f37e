"""Whether arguments of attention fit together: every error names the rule, the value and the remedy."""

import jax.numpy as jnp

from ring_rl.kernels.dropout import Dropout
from ring_rl.kernels.strategies.plan import Side
from ring_rl.typing import Array, Float, Int


def check_shapes(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]) -> None:
    """Raises ValueError unless q, k and v are one device's share of the same tokens, K dividing H."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q, k, v must be [batch, tokens, heads, head_dim], got {q.shape}, {k.shape}, {v.shape}")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v must have one shape and dtype, got {k.shape} {k.dtype} and {v.shape} {v.dtype}")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"q {q.shape} and k {k.shape} must agree in batch, local tokens and head dimension; "
            "only the number of heads may differ"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v must be floating point, got {q.dtype}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key-value heads; "
            "the first must be a multiple of the second"
        )


def checked_side(
    q: Float[Array, "B T H D"],
    *,
    positions: Int[Array, "b T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    alibi_slopes: Float[Array, " H"] | None,
    dropout: Dropout | None,
) -> Side:
    """The side information of `q`'s tokens.

    Raises:
        ValueError: An array has another shape than q asks for, or the wrong kind of numbers.
    """
    batch, length, heads = q.shape[:3]
    if positions is not None and (positions.ndim != 2 or positions.shape not in ((1, length), (batch, length))):
        raise ValueError(
            f"positions must be [1, {length}] or [{batch}, {length}] for q of shape {q.shape}, got {positions.shape}"
        )
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be [{batch}, {length}], an id for each token of q, got {segment_ids.shape}")
    for name, ids in (("positions", positions), ("segment_ids", segment_ids)):
        if ids is not None and not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        raise ValueError(
            f"alibi_slopes must be one number for each of the {heads} query heads, got {alibi_slopes.shape}"
        )
    in_int32 = lambda x: None if x is None else x.astype(jnp.int32)  # noqa: E731
    return Side(
        positions=in_int32(positions),
        segment_ids=in_int32(segment_ids),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.astype(jnp.float32),
        dropout=dropout,
    )
