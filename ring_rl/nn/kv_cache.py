"""The keys and values of everything a model has read, one slot a token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_rl.typing import Array, Float, Int32


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer, heads before slots."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]

    def write(self, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], start: Array) -> "LayerCache":
        """The cache with T new tokens in slots start .. start + T - 1."""
        at = (0, 0, start, 0)
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        return LayerCache(
            jax.lax.dynamic_update_slice(self.k, heads_first(k).astype(self.k.dtype), at),
            jax.lax.dynamic_update_slice(self.v, heads_first(v).astype(self.v.dtype), at),
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
        """Slots a row has."""
        return self.layers[0].k.shape[2]

    def resized(self, capacity: int) -> "KVCache":
        """The cache with room for `capacity` tokens, which must hold the `length` that are in it."""
        change = [(0, 0, 0), (0, 0, 0), (0, capacity - self.capacity, 0), (0, 0, 0)]
        resize = lambda x: jax.lax.pad(x, jnp.zeros((), x.dtype), change)  # noqa: E731
        return KVCache(jax.tree.map(resize, self.layers), self.length)


def empty_cache(
    *, layers: int, batch: int, capacity: int, key_value_heads: int, head_dim: int, dtype=jnp.float32
) -> KVCache:
    """A cache that has read nothing: 2 · layers · batch · capacity · key_value_heads · head_dim elements."""
    zeros = lambda: jnp.zeros((batch, key_value_heads, capacity, head_dim), dtype)  # noqa: E731
    return KVCache(tuple(LayerCache(zeros(), zeros()) for _ in range(layers)), jnp.int32(0))
