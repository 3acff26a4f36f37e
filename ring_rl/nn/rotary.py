"""Rotary position embedding (RoFormer, arXiv:2104.09864), rotating the two halves of a head."""

import jax.numpy as jnp
import numpy as np

from ring_rl.typing import Array, Float, Int


def rotate(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"] | Int[Array, "1 T"], *, base: float
) -> Float[Array, "B T H D"]:
    """x with the pair (x_d, x_{d + D/2}) turned by positions · base^(-2d/D), for d < D/2.

    Positions are global: a device of a ring rotates by where its tokens stand in the whole sequence. Angles are
    float32 whatever the dtype of x; at position p they are exact to about p · 6e-8 radians.

    Raises:
        ValueError: D is odd.
    """
    D = x.shape[-1]
    if D % 2:
        raise ValueError(f"rotary embedding needs an even head dimension, got {D}")
    frequencies = (float(base) ** (-np.arange(0, D, 2) / D)).astype(np.float32)
    angles_BT1d = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles_BT1d), jnp.sin(angles_BT1d)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
