"""The keys and values of everything a model has read, one slot a token."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ring_rl.kernels.cache_slots import DEFAULT_SLOT_BLOCK
from ring_rl.kernels.decode import write_cache
from ring_rl.typing import Array, Float, Int, Int32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "last_inputs", "last_keys"],
    meta_fields=["axis_name", "slot_block"],
)
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys (already rotated) and values of one layer, heads before slots.

    Attributes:
        k: Keys, of this device's slots.
        v: Values.
        last_inputs: The last n inputs of the layer's convolution, all of them on every device; None without one.
        last_keys: The last key before it was mixed with the one before it; None where keys are not shifted.
        axis_name: The mesh axis whose devices share the slots, under `jax.shard_map`; None: all of them are here.
        slot_block: Positions dealt to a device at a time; see `ring_rl.kernels.cache_slots`.
    """

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]
    last_inputs: Float[Array, "B n M"] | None = None
    last_keys: Float[Array, "B 1 K D"] | None = None
    axis_name: str | None = None
    slot_block: int = DEFAULT_SLOT_BLOCK

    def replace(self, **arrays: Array) -> "LayerCache":
        """The cache with other arrays under these names."""
        return dataclasses.replace(self, **arrays)

    def write(
        self, k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], start: Int[Array, ""] | Int[Array, " B"]
    ) -> "LayerCache":
        """The cache with T new tokens at positions start .. start + T - 1."""
        if self.axis_name is not None or start.ndim:
            shared = {"axis_name": self.axis_name, "slot_block": self.slot_block}
            k, v = write_cache(self.k, self.v, k, v, length=start, **shared)
            return self.replace(k=k, v=v)
        at = (0, 0, start, 0)
        heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
        return self.replace(
            k=jax.lax.dynamic_update_slice(self.k, heads_first(k).astype(self.k.dtype), at),
            v=jax.lax.dynamic_update_slice(self.v, heads_first(v).astype(self.v.dtype), at),
        )


class KVCache(NamedTuple):
    """A cache of `capacity` slots, of which the first `length` are filled.

    All rows grow together, or each has a length of its own (`with_row_lengths`). Layers are separate arrays: stacked,
    every new token would copy the whole cache, where a donated array of a layer's own is written in place.
    """

    layers: tuple[LayerCache, ...]
    length: Int32[Array, ""] | Int32[Array, " B"]

    @property
    def capacity(self) -> int:
        """Slots a row has, on this device."""
        return self.layers[0].k.shape[2]

    def with_row_lengths(self) -> "KVCache":
        """The same cache, whose rows may grow apart."""
        return self._replace(length=jnp.broadcast_to(self.length, self.layers[0].k.shape[:1]))

    def resized(self, capacity: int) -> "KVCache":
        """The cache with `capacity` slots, enough for what is in it; each device's, where devices share them."""
        change = [(0, 0, 0), (0, 0, 0), (0, capacity - self.capacity, 0), (0, 0, 0)]
        resize = lambda x: jax.lax.pad(x, jnp.zeros((), x.dtype), change)  # noqa: E731
        return self._replace(layers=tuple(layer.replace(k=resize(layer.k), v=resize(layer.v)) for layer in self.layers))

    def emptied(self, *, capacity: int, axis_name: str | None, slot_block: int) -> "KVCache":
        """An empty cache like this one, of which only shapes and types are read, with other slots."""
        cleared = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.layers)
        zeros = lambda x: jnp.zeros((*x.shape[:2], capacity, x.shape[3]), x.dtype)  # noqa: E731
        layers = (
            dataclasses.replace(layer, k=zeros(like.k), v=zeros(like.v), axis_name=axis_name, slot_block=slot_block)
            for layer, like in zip(cleared, self.layers, strict=True)
        )
        return KVCache(tuple(layers), jnp.zeros(self.length.shape, jnp.int32))

    def specs(self, axis_name: str | None) -> "KVCache":
        """How `jax.shard_map` takes and returns such a cache: slots over `axis_name`, the rest alike on all devices."""
        slots = PartitionSpec(None, None, axis_name)
        specs = jax.tree.map(lambda _: PartitionSpec(), self)
        layers = (dataclasses.replace(layer, k=slots, v=slots) for layer in specs.layers)
        return specs._replace(layers=tuple(layers))


def empty_cache(
    *,
    layers: int,
    batch: int,
    capacity: int,
    key_value_heads: int,
    head_dim: int,
    dtype=jnp.float32,
    last_inputs: tuple[int, int] | None = None,
    last_key: bool = False,
) -> KVCache:
    """A cache that has read nothing: 2 · layers · batch · capacity · key_value_heads · head_dim elements.

    And, with `last_inputs` (tokens, width), so many inputs of a convolution a layer; with `last_key` one key.
    """
    zeros = lambda *shape: jnp.zeros((batch, *shape), dtype)  # noqa: E731

    def layer() -> LayerCache:
        return LayerCache(
            zeros(key_value_heads, capacity, head_dim),
            zeros(key_value_heads, capacity, head_dim),
            last_inputs=None if last_inputs is None or not last_inputs[0] else zeros(*last_inputs),
            last_keys=zeros(1, key_value_heads, head_dim) if last_key else None,
        )

    return KVCache(tuple(layer() for _ in range(layers)), jnp.int32(0))
