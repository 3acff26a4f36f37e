"""Rotary position embedding (RoFormer, arXiv:2104.09864), turning the two halves of a head, or of a part of it.

A float32 angle is useless at position 10⁶: its last bit is 0.06 radians. So no angle is ever formed on the device.
A position is four bytes, p = Σ b_i 256^i; the cosines and sines of b_i 256^i f_d are tabulated in float64 on the host
and rounded once; angle addition joins them. The result is exact to about 10⁻⁶ at every position below 2³¹.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ring_rl.nn.rotary_scaling import Frequencies
from ring_rl.typing import Array, Float, Float32, Int

_BYTES = 4


class Rotation(NamedTuple):
    """By how much each token's pairs of dimensions turn; made once for all layers.

    Attributes:
        cos: magnitude · cos(position · f_d).
        sin: magnitude · sin(position · f_d).
    """

    cos: Float32[Array, "b T d"]
    sin: Float32[Array, "b T d"]


def rotation(positions: Int[Array, "b T"], frequencies: Frequencies) -> Rotation:
    """Cosines and sines of positions · f_d, as exact as float32 can be.

    Positions are global: a device of a ring turns its tokens by where they stand in the whole sequence. Constants are
    4 · 256 · d numbers, whatever the positions.
    """
    place_i11 = 256.0 ** np.arange(_BYTES)[:, None, None]
    angles_i256d = place_i11 * np.arange(256.0)[:, None] * frequencies.per_position
    cos_i256d, sin_i256d = np.cos(angles_i256d).astype(np.float32), np.sin(angles_i256d).astype(np.float32)

    def of_byte(index: int) -> tuple[Array, Array]:
        byte_bT = (positions >> (8 * index)) & 255
        return jnp.asarray(cos_i256d[index])[byte_bT], jnp.asarray(sin_i256d[index])[byte_bT]

    cos, sin = of_byte(0)
    for index in range(1, _BYTES):
        more_cos, more_sin = of_byte(index)
        cos, sin = cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
    return Rotation(frequencies.magnitude * cos, frequencies.magnitude * sin)


def rotate(x: Float[Array, "B T H D"], by: Rotation) -> Float[Array, "B T H D"]:
    """x with its pairs (x_i, x_{i + d}) turned by `by`, for i < d; the dimensions from 2d on stay as they are.

    Computed in float32 whatever the dtype of x.

    Raises:
        ValueError: More pairs than x has.
    """
    d = by.cos.shape[-1]
    if 2 * d > x.shape[-1]:
        raise ValueError(f"{d} pairs of dimensions cannot turn in heads of {x.shape[-1]}; use at most half as many")
    first, second = (x[..., part].astype(jnp.float32) for part in (slice(0, d), slice(d, 2 * d)))
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * d == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * d :]], axis=-1)
