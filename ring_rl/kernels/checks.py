"""Whether arguments of attention fit together: every error names the rule, the value and the remedy."""

import numbers

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.dropout import Dropout
from ring_rl.kernels.layout import LAYOUTS
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.strategies.plan import Side
from ring_rl.typing import Array, Float, Int

# What sums in float32 lose nothing of. For float64 there is `reference_attention`.
DTYPES = ("float32", "bfloat16", "float16")


def check_shapes(q: Float[Array, "B T H D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]) -> None:
    """Raises ValueError unless q, k and v are one device's share of the same tokens, K dividing H."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"q, k, v must be [batch, tokens, heads, head_dim], got {q.shape}, {k.shape}, {v.shape}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q, k and v need at least one row, token, head and dimension, got {q.shape} and {k.shape}")
    if k.shape != v.shape or k.dtype != v.dtype:
        raise ValueError(f"k and v must have one shape and dtype, got {k.shape} {k.dtype} and {v.shape} {v.dtype}")
    if q.dtype != k.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype} and {k.dtype}; cast one to the other")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(
            f"q {q.shape} and k {k.shape} must agree in batch, local tokens and head dimension; "
            "only the number of heads may differ"
        )
    if q.dtype.name not in DTYPES:
        raise ValueError(f"q, k and v must be one of {', '.join(DTYPES)}, got {q.dtype}; cast them")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} key-value heads; "
            "the first must be a multiple of the second"
        )


def check_options(
    *,
    mask: Mask,
    layout: str,
    block_size: int | None,
    heads_at_once: int | None,
    scale: float | None,
    soft_cap: float | None,
) -> None:
    """Raises ValueError unless these are a mask, a known layout, possible sizes, and numbers known now."""
    for name, value in (("scale", scale), ("soft_cap", soft_cap)):
        if value is not None and not isinstance(value, numbers.Real):
            raise ValueError(
                f"{name} must be a number known when compiling, got {value!r}; multiply q by a learned one"
            )
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a Mask, such as CAUSAL or Mask(causal=True, window=1024); got {mask!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    for name, unit, size in (("block_size", "tokens", block_size), ("heads_at_once", "heads", heads_at_once)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be a whole number of {unit}, at least 1, or None; got {size!r}")


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
    for name, value in (("positions", positions), ("segment_ids", segment_ids), ("alibi_slopes", alibi_slopes)):
        if value is not None and not hasattr(value, "dtype"):
            raise ValueError(f"{name} must be an array, got {type(value).__name__}; wrap it in jnp.asarray")
    if dropout is not None and not isinstance(dropout, Dropout):
        raise ValueError(f"dropout must be a Dropout(rate, key) or None, got {dropout!r}")
    if positions is not None and (positions.ndim != 2 or positions.shape not in ((1, length), (batch, length))):
        rows = "1" if batch == 1 else f"1 or {batch}"
        raise ValueError(f"positions must be [{rows}, {length}] for q of shape {q.shape}, got {positions.shape}")
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
        alibi_slopes=None if alibi_slopes is None else lax.stop_gradient(alibi_slopes.astype(jnp.float32)),
        dropout=dropout,
    )
