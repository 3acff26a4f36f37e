"""Ulysses: swap a shard of the tokens for a shard of the heads, attend, swap back. arXiv:2309.14509.

An all-to-all gives every device all tokens of H / U query heads; attention over them needs nobody else, so any local
attention serves, and any mask. Alone, the tokens it gathers are the whole sequence. As the inner half of the hybrid
(arXiv:2405.07719) they are one shard of a ring that runs over another mesh axis.

Where there are fewer key-value heads than devices each travels to the U / K devices that need it.
"""

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.strategies.plan import Side
from ring_rl.typing import Array

Attend = Callable[[Array, Array, Array, Side], tuple[Array, Array]]


class Reorder(Protocol):
    """Reorders the tokens along an axis."""

    def __call__(self, x: Array, *, axis: int) -> Array:
        """`x` with its tokens in another order."""
        ...


def check_heads(*, query_heads: int, key_value_heads: int, devices: int) -> None:
    """Raises ValueError unless `devices` can share the heads."""
    if query_heads % devices:
        raise ValueError(
            f"{query_heads} query heads cannot be shared by the {devices} devices of an all-to-all: their number must "
            'be a multiple; use strategy="ring" over one axis, or a smaller axis'
        )
    if key_value_heads % devices and devices % key_value_heads:
        raise ValueError(
            f"{key_value_heads} key-value heads cannot be shared by the {devices} devices of an all-to-all: their "
            'number must be a multiple or a divisor; use strategy="ring" over one axis, or a smaller axis'
        )


def attend_by_heads(
    q: Array,
    k: Array,
    v: Array,
    side: Side,
    *,
    axis_name: str,
    gathered: Reorder,
    scattered: Reorder,
    attend: Attend,
) -> tuple[Array, Array]:
    """(out, log_sum_exp) of `attend` on gathered tokens and a share of the heads.

    `gathered` puts the tokens of all devices, which arrive device by device, into the order that `attend` wants, and
    `scattered` undoes it. Everything is differentiated by jax; `attend` brings its own rule.
    """
    devices = lax.axis_size(axis_name)
    copies = max(1, devices // k.shape[2])
    to_heads = lambda x: gathered(_exchange(x, axis_name, split=2, join=1), axis=1)  # noqa: E731
    # Copies of one key-value head lie side by side: device i gets head i // copies, which its query heads read.
    k, v = (to_heads(jnp.repeat(x, copies, axis=2)) for x in (k, v))
    out, log_sum_exp = attend(to_heads(q), k, v, _shared(side, q.shape[2] // devices, axis_name, gathered))
    out = _exchange(scattered(out, axis=1), axis_name, split=1, join=2)
    return out, _exchange(scattered(log_sum_exp, axis=2), axis_name, split=2, join=1)


def _shared(side: Side, heads: int, axis_name: str, gathered: Reorder) -> Side:
    """The side information of all tokens and this device's heads."""
    first = lax.axis_index(axis_name) * heads
    tokens = lambda x: None if x is None else gathered(lax.all_gather(x, axis_name, axis=1, tiled=True), axis=1)  # noqa: E731
    return side._replace(positions=tokens(side.positions), segment_ids=tokens(side.segment_ids)).of_heads(first, heads)


def _exchange(x: Array, axis_name: str, *, split: int, join: int) -> Array:
    return lax.all_to_all(x, axis_name, split_axis=split, concat_axis=join, tiled=True)
