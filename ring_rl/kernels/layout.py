"""Which tokens a device of the ring holds.

A sequence of T tokens is cut into equal chunks. `contiguous` gives device i chunk i of R. `zigzag` cuts 2R
chunks and gives device i the two chunks i and 2R-1-i, one early and one late, so that under a causal mask
every device has the same amount of work at every hop:

    R = 4          chunks  0  1  2  3  4  5  6  7
    contiguous     device  0  0  1  1  2  2  3  3
    zigzag         device  0  1  2  3  3  2  1  0

Tokens, positions, targets and loss weights are permuted once, where a batch is made, never inside a layer.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.typing import Array, Int, Shaped

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")


def chunks_per_device(layout: Layout) -> int:
    """How many separate stretches of the sequence one device holds."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    return 2 if layout == "zigzag" else 1


def padded_length(length: int, *, ring_size: int, layout: Layout) -> int:
    """The smallest length >= `length` that the ring divides."""
    multiple = ring_size * chunks_per_device(layout)
    return -(-length // multiple) * multiple


def check_length(length: int, *, ring_size: int, layout: Layout) -> None:
    """Raises ValueError, naming the remedy, unless `ring_size` devices can share `length` tokens."""
    if ring_size < 1:
        raise ValueError(f"ring size must be at least 1, got {ring_size}")
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


def local_positions(
    local_length: int, *, device: int | Int[Array, ""], ring_size: int, layout: Layout
) -> Int[Array, " T"]:
    """Global positions of the `local_length` tokens that `device` holds; `device` may be a traced axis index."""
    chunk = local_length // chunks_per_device(layout)
    offsets = jax.lax.iota(jnp.int32, chunk)
    if layout == "contiguous":
        return device * chunk + offsets
    return jnp.concatenate([device * chunk + offsets, (2 * ring_size - 1 - device) * chunk + offsets])
