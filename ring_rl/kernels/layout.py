"""Which tokens a device of the ring holds.

A sequence of T tokens is shared by R devices. `contiguous` gives device i the i-th of R equal chunks. `zigzag` cuts
2R chunks and gives device i the chunks i and 2R-1-i, one early and one late. `striped` deals tokens out one by one:
device i holds i, i+R, i+2R, ... Under a causal mask the last two give every device the same amount of work at every
hop (striped: up to the diagonal), contiguous gives the last device nearly all of it:

    R = 4          tokens  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15
    contiguous     device  0  0  0  0  1  1  1  1  2  2  2  2  3  3  3  3
    zigzag         device  0  0  1  1  2  2  3  3  3  3  2  2  1  1  0  0
    striped        device  0  1  2  3  0  1  2  3  0  1  2  3  0  1  2  3

Every device holds its tokens in ascending order. Tokens, positions, targets, segment ids and loss weights are permuted
once, where a batch is made (`batch_to_layout`), after targets were shifted, never inside a layer.

Contiguous: arXiv:2310.01889. Striped: arXiv:2311.09431. Zigzag: zhuzilin/ring-flash-attention.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.typing import Array, Int, Shaped

Layout = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag", "striped")


def chunks_per_device(layout: Layout) -> int:
    """How many equal chunks a device holds, so what its share must be a multiple of: 2 for zigzag, else 1."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    return 2 if layout == "zigzag" else 1


def padded_length(length: int, *, ring_size: int, layout: Layout) -> int:
    """The smallest length >= `length` that the ring divides."""
    if ring_size < 1:
        raise ValueError(f"ring size must be at least 1, got {ring_size}")
    multiple = ring_size * chunks_per_device(layout)
    return -(-length // multiple) * multiple


def check_length(length: int, *, ring_size: int, layout: Layout) -> None:
    """Raises ValueError, naming the remedy, unless `ring_size` devices can share `length` tokens."""
    padded = padded_length(length, ring_size=ring_size, layout=layout)
    if padded != length or length == 0:
        chunks = ring_size * chunks_per_device(layout)
        raise ValueError(
            f"sequence length {length} is not divisible into the {chunks} chunks of a {layout} ring of size "
            f"{ring_size}; pad to {max(padded, chunks)}"
        )


def permutation(length: int, *, ring_size: int, layout: Layout) -> Int[np.ndarray, " T"]:
    """Indices p such that x[p] is in layout order: device i of the ring holds the i-th of R equal slices."""
    check_length(length, ring_size=ring_size, layout=layout)
    tokens = np.arange(length)
    if layout == "contiguous":
        return tokens
    if layout == "striped":
        return tokens.reshape(-1, ring_size).T.reshape(-1)
    chunks = tokens.reshape(2 * ring_size, -1)
    order = np.stack([np.arange(ring_size), 2 * ring_size - 1 - np.arange(ring_size)], axis=1).reshape(-1)
    return chunks[order].reshape(-1)


def inverse_permutation(length: int, *, ring_size: int, layout: Layout) -> Int[np.ndarray, " T"]:
    """Indices that undo `permutation`: x[permutation][inverse_permutation] is x."""
    return np.argsort(permutation(length, ring_size=ring_size, layout=layout))


def to_layout(
    x: Shaped[np.ndarray | Array, "..."], *, axis: int, ring_size: int, layout: Layout
) -> Shaped[np.ndarray | Array, "..."]:
    """`x` with its token axis put into layout order. Costs one copy."""
    return x.take(permutation(x.shape[axis], ring_size=ring_size, layout=layout), axis=axis)


def from_layout(
    x: Shaped[np.ndarray | Array, "..."], *, axis: int, ring_size: int, layout: Layout
) -> Shaped[np.ndarray | Array, "..."]:
    """`x` with its token axis put back into natural order. Costs one copy."""
    return x.take(inverse_permutation(x.shape[axis], ring_size=ring_size, layout=layout), axis=axis)


def pad_to_layout(
    x: Shaped[np.ndarray | Array, "..."], *, axis: int, ring_size: int, layout: Layout, fill: float
) -> Shaped[np.ndarray | Array, "..."]:
    """`x`, in natural order, with `fill` appended along its token axis up to `padded_length`.

    Fill segment ids with -1: such tokens see nothing and nobody sees them; and loss weights with 0. What tokens and
    targets are filled with then does not matter. Without segment ids a causal mask alone hides the padding from all
    true tokens, as it comes last; any other mask needs segment ids.

    Raises:
        ValueError: `x` has no tokens.
    """
    length = x.shape[axis]
    if length == 0:
        raise ValueError(f"no tokens to pad: axis {axis} of shape {x.shape} is empty")
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, padded_length(length, ring_size=ring_size, layout=layout) - length)
    if isinstance(x, np.ndarray):
        return np.pad(x, widths, constant_values=fill)
    return jnp.pad(x, widths, constant_values=fill)


def batch_to_layout(
    batch: Mapping[str, Shaped[np.ndarray | Array, "..."]], *, axis: int = 1, ring_size: int, layout: Layout
) -> dict[str, Shaped[np.ndarray | Array, "..."]]:
    """Every array of a batch (tokens, positions, targets, segment ids, loss weights, ...) in layout order.

    Raises:
        ValueError: The arrays differ in length along `axis`, or the ring does not divide it.
    """
    lengths = {name: x.shape[axis] for name, x in batch.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"arrays of one batch need one length along axis {axis}, got {listed}; pad the shorter ones")
    return {name: to_layout(x, axis=axis, ring_size=ring_size, layout=layout) for name, x in batch.items()}


def natural_order(x: Shaped[Array, "..."], *, axis: int, ring_size: int, layout: Layout) -> Shaped[Array, "..."]:
    """`from_layout` for use inside a compiled program: slices and transposes of whole chunks, no gather."""
    before, chunk, after = _around(x, axis, ring_size, layout)
    if layout == "striped":
        return jnp.swapaxes(x.reshape(*before, ring_size, chunk, *after), len(before), len(before) + 1).reshape(x.shape)
    if layout == "zigzag":
        pairs = x.reshape(*before, ring_size, 2, chunk, *after)
        early, late = jnp.split(pairs, 2, axis=len(before) + 1)
        return jnp.concatenate([early, jnp.flip(late, len(before))], axis=len(before)).reshape(x.shape)
    return x


def layout_order(x: Shaped[Array, "..."], *, axis: int, ring_size: int, layout: Layout) -> Shaped[Array, "..."]:
    """`to_layout` for use inside a compiled program; undoes `natural_order`."""
    before, chunk, after = _around(x, axis, ring_size, layout)
    if layout == "striped":
        return jnp.swapaxes(x.reshape(*before, chunk, ring_size, *after), len(before), len(before) + 1).reshape(x.shape)
    if layout == "zigzag":
        early, late = jnp.split(x.reshape(*before, 2 * ring_size, chunk, *after), 2, axis=len(before))
        return jnp.stack([early, jnp.flip(late, len(before))], axis=len(before) + 1).reshape(x.shape)
    return x


def _around(x: Array, axis: int, ring_size: int, layout: Layout) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The axes before that of tokens, the length of one chunk, and the axes after."""
    check_length(x.shape[axis], ring_size=ring_size, layout=layout)
    axis %= x.ndim
    return x.shape[:axis], x.shape[axis] // (ring_size * chunks_per_device(layout)), x.shape[axis + 1 :]


def local_positions(
    local_length: int, *, device: int | Int[Array, ""], ring_size: int, layout: Layout
) -> Int[Array, " T"]:
    """Global positions of the `local_length` tokens that `device` holds; `device` may be a traced axis index."""
    chunk = local_length // chunks_per_device(layout)
    offsets = jax.lax.iota(jnp.int32, chunk)
    if layout == "contiguous":
        return device * chunk + offsets
    if layout == "striped":
        return device + ring_size * offsets
    return jnp.concatenate([device * chunk + offsets, (2 * ring_size - 1 - device) * chunk + offsets])
