"""The keys and values of everything a model has read, one slot a token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ring_rl.typing import Array, Float, Int32


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer, or of all layers with a leading axis."""

    k: Float[Array, "*layers B S K D"]
    v: Float[Array, "*layers B S K D"]

    def write(self, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], start: Array) -> "LayerCache":
        """One layer's cache with T new tokens in slots start .. start + T - 1."""
        at = (0, start, 0, 0)
        return LayerCache(
            jax.lax.dynamic_update_slice(self.k, k.astype(self.k.dtype), at),
            jax.lax.dynamic_update_slice(self.v, v.astype(self.v.dtype), at),
        )


class KVCache(NamedTuple):
    """A cache of `capacity` slots, of which the first `length` are filled; all rows grow together."""

    layers: LayerCache
    length: Int32[Array, ""]

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.layers.k.shape[2]


def empty_cache(
    *, layers: int, batch: int, capacity: int, key_value_heads: int, head_dim: int, dtype=jnp.float32
) -> KVCache:
    """A cache that has read nothing: 2 · layers · batch · capacity · key_value_heads · head_dim elements."""
    shape = (layers, batch, capacity, key_value_heads, head_dim)
    return KVCache(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)), jnp.int32(0))
