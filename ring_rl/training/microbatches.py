"""Gradient accumulation: sums over parts of a batch, one after another in the memory of one part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ring_rl.training.mesh import BATCH_AXES, batch_sharding
from ring_rl.typing import Array, PRNGKeyArray, PyTree

__all__ = ["split_microbatches", "sum_over_microbatches"]

Sums = TypeVar("Sums")


def sum_over_microbatches(
    function: Callable[[Any, PRNGKeyArray], Sums], batch: PyTree[Any], key: PRNGKeyArray, *, mesh: Mesh, steps: int
) -> Sums:
    """The sum, leaf by leaf and at least in float32, of function(microbatch, key_i) over `steps` microbatches.

    key_i is fold_in(key, i); a single step gets the whole batch and the key itself. Memory: one microbatch's, and
    twice the function's result (the sum and the summand).

    Raises:
        ValueError: the rows of each device are not divisible by `steps`.
    """
    if steps == 1:
        return jax.tree.map(_at_least_float32, function(batch, key))
    microbatches = split_microbatches(mesh, batch, steps)

    def add(sums: Sums, part: tuple[Array, Any]) -> tuple[Sums, None]:
        index, microbatch = part
        summands = function(microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda total, x: total + _at_least_float32(x), sums, summands), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches), key)
    zeros = jax.tree.map(lambda x: _at_least_float32(jnp.zeros(x.shape, x.dtype)), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(steps), microbatches))[0]


def split_microbatches(mesh: Mesh, batch: PyTree[Any], steps: int) -> PyTree[Array]:
    """Each leaf [B, ...] as [steps, B / steps, ...], without moving a row to another device.

    With D shards of b rows, microbatch i takes the i-th of `steps` equal runs of rows out of every shard: row
    d b + i b / steps + j of the batch is row d b / steps + j of microbatch i. A plain reshape would instead give the
    first microbatch the rows of the first devices. Scalars are repeated.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def split(x: Array, sharding: NamedSharding) -> Array:
        if not jnp.ndim(x):
            return jnp.broadcast_to(x, (steps,))
        rows, rest = x.shape[0] // (shards * steps), x.shape[1:]
        parts = jnp.reshape(x, (shards, steps, rows, *rest)).swapaxes(0, 1).reshape(steps, shards * rows, *rest)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, *sharding.spec)))

    return jax.tree.map(split, batch, batch_sharding(mesh, batch, accumulation_steps=steps))


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
