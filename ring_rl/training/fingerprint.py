"""A short name for the exact values of many arrays, the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ring_rl.training.named_arrays import named_arrays
from ring_rl.typing import Array, PyTree

__all__ = ["fingerprint_of_arrays"]

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint_of_arrays(tree: PyTree[Any]) -> str:
    """16 hexadecimal digits that other values, with all likelihood, do not have.

    Sums of the numbers' bits and of their squares, modulo 2^32: integers, so that neither the sharding nor the order
    in which devices add them makes a difference. Against mistakes, not against forgery. Each array is read once.
    """
    sums = jax.device_get(_sums(jax.tree.leaves(named_arrays(tree))))
    return "".join(f"{int(each):08x}" for each in sums)


@jax.jit
def _sums(arrays: list[Array]) -> tuple[Array, Array]:
    first = second = jnp.uint32(0)
    for number, array in enumerate(arrays):
        bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize]).astype(jnp.uint32)
        weight = jnp.uint32(2 * number + 1)
        first += weight * jnp.sum(bits, dtype=jnp.uint32)
        second += weight * jnp.sum(bits * (bits | 1), dtype=jnp.uint32)
    return first, second
