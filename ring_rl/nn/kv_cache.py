"""The keys and values of everything a model has read, one slot a token."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_rl.kernels.decode import DEFAULT_SLOT_BLOCK, write_cache
from ring_rl.typing import Array, Float, Int32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["axis_name", "slot_block"])
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, heads before slots.

    Attributes:
        k: Keys, of this device's slots.
        v: Values.
        axis_name: The mesh axis whose devices share the slots, under `jax.shard_map`; None: all of them are here.
        slot_block: Positions dealt to a device at a time; see `ring_rl.kernels.decode`.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    axis_name: str | None = None
    slot_block: int = DEFAULT_SLOT_BLOCK

    def write(self, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], start: Array) -> "LayerCache":
        """The cache with T new tokens at positions start .. start + T - 1."""
        if self.axis_name is not None:
            shared = {"axis_name": self.axis_name, "slot_block": self.slot_block}
            k, v = write_cache(self.k, self.v, k, v, length=start, **shared)
            return dataclasses.replace(self, k=k, v=v)
        at = (0, 0, start, 0)
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        return dataclasses.replace(
            self,
            k=jax.lax.dynamic_update_slice(self.k, heads_first(k).astype(self.k.dtype), at),
            v=jax.lax.dynamic_update_slice(self.v, heads_first(v).astype(self.v.dtype), at),
        )


class KVCache(NamedTuple):
    """A cache of `capacity` slots, of which the first `length` are filled; all rows grow together.

    Layers are separate arrays: stacked, every new token would copy the whole cache, where a donated array of a
    layer's own is written in place.
    """

    layers: tuple[LayerCache, ...]
    length: Int32[Array, ""]

    @property
    def capacity(self) -> int:
        """Slots a row has, on this device."""
        return self.layers[0].k.shape[2]

    def resized(self, capacity: int) -> "KVCache":
        """The cache with `capacity` slots, enough for what is in it; each device's, where devices share them."""
        change = [(0, 0, 0), (0, 0, 0), (0, capacity - self.capacity, 0), (0, 0, 0)]
        resize = lambda x: jax.lax.pad(x, jnp.zeros((), x.dtype), change)  # noqa: E731
        return KVCache(jax.tree.map(resize, self.layers), self.length)

    def emptied(self, *, capacity: int, axis_name: str | None, slot_block: int) -> "KVCache":
        """An empty cache like this one, of which only shapes and types are read, with other slots."""
        zeros = lambda x: jnp.zeros((*x.shape[:2], capacity, x.shape[3]), x.dtype)  # noqa: E731
        layers = (LayerCache(zeros(layer.k), zeros(layer.v), axis_name, slot_block) for layer in self.layers)
        return KVCache(tuple(layers), jnp.int32(0))


def empty_cache(
    *, layers: int, batch: int, capacity: int, key_value_heads: int, head_dim: int, dtype=jnp.float32
) -> KVCache:
    """A cache that has read nothing: 2 · layers · batch · capacity · key_value_heads · head_dim elements."""
    zeros = lambda: jnp.zeros((batch, key_value_heads, capacity, head_dim), dtype)  # noqa: E731
    return KVCache(tuple(LayerCache(zeros(), zeros()) for _ in range(layers)), jnp.int32(0))
