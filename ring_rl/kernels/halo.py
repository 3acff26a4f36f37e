"""The few tokens before a device's own: for what looks a fixed, short way back, such as a causal convolution.

A device holds one chunk of the sequence (contiguous) or two (zigzag), and the tokens before a chunk are the last ones
of the chunk before it. In contiguous layout that one lies on the device before. In zigzag layout device i holds the
chunks i and 2R-1-i, so the early one's lies on device i - 1, and the late one's on device i + 1, or, at the end of
the ring, is the device's own early chunk:

    R = 4      chunk    0   1   2   3   4   5   6   7
               device   0   1   2   3   3   2   1   0
               tails      →   →   →   ↺   ←   ←   ←

Two permutes of `count` tokens, whatever the length of the sequence.
"""

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.layout import Layout, chunks_per_device
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Shaped


def previous_tokens(
    x: Shaped[Array, "B T ..."],
    count: int,
    *,
    layout: Layout,
    axis_name: str | tuple[str, ...] | None,
    fill: float,
) -> Shaped[Array, "B n count ..."]:
    """The `count` tokens that stand before each of the n chunks that this device holds.

    Differentiable. Inside `jax.shard_map` or `jax.vmap(axis_name=...)` if there is an axis; without one, and on an axis
    of one device, there is one chunk, the whole sequence.

    Args:
        x: This device's tokens in `layout` order.
        count: How far back.
        layout: Which tokens a device holds.
        axis_name: The mesh axis that tokens are sharded over, or None.
        fill: What stands before the first token of the sequence.

    Raises:
        ValueError: As `check_halo`.
    """
    ring_size = _ring_size(axis_name)
    check_halo(x.shape[1], count, layout=layout, ring_size=ring_size, axes=_axes(axis_name))
    filling = jnp.full((x.shape[0], count, *x.shape[2:]), fill, x.dtype)
    if ring_size == 1:
        return vary_alike(filling[:, None], x)[0]
    (axis,) = _axes(axis_name)
    device = lax.axis_index(axis)
    # All the way round, as a virtual ring (`jax.vmap`) asks; what comes over the end is not looked at.
    onwards = [(i, (i + 1) % ring_size) for i in range(ring_size)]
    chunk = x.shape[1] // chunks_per_device(layout)
    early_tail = x[:, chunk - count : chunk]
    before_early = jnp.where(device == 0, filling, lax.ppermute(early_tail, axis, onwards))
    if layout == "contiguous":
        return before_early[:, None]
    late_tail = x[:, 2 * chunk - count :]
    backwards = [(j, i) for i, j in onwards]
    before_late = jnp.where(device == ring_size - 1, early_tail, lax.ppermute(late_tail, axis, backwards))
    return jnp.stack([before_early, before_late], axis=1)


def chunks_with_previous(
    x: Shaped[Array, "B T ..."],
    count: int,
    *,
    layout: Layout,
    axis_name: str | tuple[str, ...] | None,
    fill: float,
) -> Shaped[Array, "B n c ..."]:
    """Each of this device's n chunks with the `count` tokens before it: c = count + T / n. See `previous_tokens`."""
    before = previous_tokens(x, count, layout=layout, axis_name=axis_name, fill=fill)
    return jnp.concatenate([before, x.reshape(x.shape[0], before.shape[1], -1, *x.shape[2:])], axis=2)


def lagged(chunks: Shaped[Array, "B n c ..."], lag: int, *, count: int) -> Shaped[Array, "B T ..."]:
    """Of chunks that begin with `count` tokens of before: for each of the other tokens the one `lag` back."""
    x = chunks[:, :, count - lag : chunks.shape[2] - lag]
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def check_halo(tokens: int, count: int, *, layout: Layout, ring_size: int, axes: tuple[str, ...] = ("",)) -> None:
    """Raises ValueError unless a device with `tokens` tokens finds the `count` before them on its neighbours.

    That is, unless the layout keeps runs of tokens together, on one mesh axis, in chunks of at least `count`.
    """
    if ring_size == 1:
        return
    if layout == "striped":
        raise ValueError(
            "layout=striped tears neighbouring tokens apart, which a short convolution or key shift reads together; "
            "use layout=zigzag or contiguous"
        )
    if len(axes) > 1:
        raise ValueError(
            "strategy=hybrid shares a sequence over two axes, where the tokens before a device's own have no single "
            "neighbour; use strategy=ring, all_gather or ulysses with a short convolution or key shift"
        )
    chunk = tokens // chunks_per_device(layout)
    if chunk < count:
        raise ValueError(
            f"chunks of {chunk} tokens are shorter than the {count} tokens back that are needed of a neighbour; "
            f"use sequences of at least {count * chunks_per_device(layout) * ring_size} tokens or fewer devices"
        )


def _axes(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _ring_size(axis_name: str | tuple[str, ...] | None) -> int:
    size = 1
    for axis in _axes(axis_name):
        size *= lax.axis_size(axis)
    return size
