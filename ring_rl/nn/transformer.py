"""A decoder-only transformer whose sequence may be sharded over a ring."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.kernels.feedforward import blockwise_feedforward
from ring_rl.kernels.strategies.sharded import SAVED_NAMES
from ring_rl.nn.attention import Attention
from ring_rl.nn.kv_cache import KVCache, LayerCache, empty_cache
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Array, Float, Int

SavedActivations = Literal["all", "attention", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size and memory choices of a transformer.

    Attributes:
        layers: Number of blocks.
        width: Model width M.
        query_heads: Query heads H.
        key_value_heads: Key-value heads K; H must be a multiple of it.
        head_dim: Head dimension D, even.
        feed_forward_width: Hidden width F.
        feed_forward_chunks: Steps in which the feed-forward runs; divides the token count.
        rotary_base: Base of the rotary frequencies.
        attention_block_size: Largest edge of a tile of attention scores, in tokens.
        saved_activations: What backward finds saved of a layer. "all": nothing is recomputed; "attention": the
            attention's output and log-sum-exp, so that the ring never runs a second time; "none": the layer's
            input only, all else is recomputed.
    """

    layers: int
    width: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    feed_forward_width: int
    feed_forward_chunks: int
    rotary_base: float
    attention_block_size: int
    saved_activations: SavedActivations

    def __post_init__(self) -> None:
        for name in ("layers", "width", "query_heads", "key_value_heads", "head_dim", "feed_forward_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"transformer.{name} must be at least 1, got {getattr(self, name)}")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"transformer.query_heads={self.query_heads} must be a multiple of "
                f"key_value_heads={self.key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"transformer.head_dim={self.head_dim} must be even, for rotary positions")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.feed_forward_chunks = config.feed_forward_chunks
        self.attention_norm = nnx.RMSNorm(config.width, scale_metadata=named("width"), rngs=rngs)
        self.attention = Attention(
            width=config.width,
            query_heads=config.query_heads,
            key_value_heads=config.key_value_heads,
            head_dim=config.head_dim,
            rotary_base=config.rotary_base,
            block_size=config.attention_block_size,
            rngs=rngs,
        )
        self.feed_forward_norm = nnx.RMSNorm(config.width, scale_metadata=named("width"), rngs=rngs)
        self.feed_forward_in = nnx.Linear(
            config.width,
            config.feed_forward_width,
            kernel_metadata=named("width", "hidden"),
            bias_metadata=named("hidden"),
            rngs=rngs,
        )
        self.feed_forward_out = nnx.Linear(
            config.feed_forward_width,
            config.width,
            kernel_metadata=named("hidden", "width"),
            bias_metadata=named("width"),
            rngs=rngs,
        )

    def __call__(self, x: Array, positions: Array, parallel: SequenceParallel) -> Array:
        """The block over a whole, possibly sharded, sequence."""
        x = x + self.attention(self.attention_norm(x), positions, parallel)
        return x + blockwise_feedforward(self._feed_forward, x, chunks=self.feed_forward_chunks)

    def decode(self, x: Array, positions: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
        """The block over new tokens, after everything in the cache."""
        attended, cache = self.attention.decode(self.attention_norm(x), positions, cache)
        x = x + attended
        return x + self._feed_forward(x), cache

    def _feed_forward(self, x: Array) -> Array:
        return self.feed_forward_out(jax.nn.gelu(self.feed_forward_in(self.feed_forward_norm(x))))


class Transformer(nnx.Module):
    """Blocks with stacked parameters, scanned, so that compile time does not grow with depth."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = make_blocks(rngs)
        self.final_norm = nnx.RMSNorm(config.width, scale_metadata=named("width"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T M"], positions: Int[Array, "B T"], parallel: SequenceParallel
    ) -> Float[Array, "B T M"]:
        """Activations after the last norm. `x` and global `positions` come in the layout of `parallel`."""
        parallel.check(*x.shape[:2])
        graphdef, parameters = nnx.split(self.blocks)

        def layer(x, parameters):
            x = nnx.merge(graphdef, parameters)(x, positions, parallel)
            return parallel.constrain(x), None

        x, _ = jax.lax.scan(_rematerialised(layer, self.config.saved_activations), parallel.constrain(x), parameters)
        return self.final_norm(x)

    def decode(self, x: Float[Array, "B T M"], cache: KVCache) -> tuple[Float[Array, "B T M"], KVCache]:
        """T new tokens after everything in the cache: the same activations as `__call__` on the whole sequence."""
        graphdef, parameters = nnx.split(self.blocks)
        positions = (cache.length + jnp.arange(x.shape[1]))[None]

        layers = []
        for index, layer_cache in enumerate(cache.layers):
            block = nnx.merge(graphdef, jax.tree.map(lambda parameter, index=index: parameter[index], parameters))
            x, layer_cache = block.decode(x, positions, layer_cache)
            layers.append(layer_cache)
        return self.final_norm(x), KVCache(tuple(layers), cache.length + x.shape[1])

    def empty_cache(self, *, batch: int, capacity: int) -> KVCache:
        """A cache for `batch` sequences of at most `capacity` tokens."""
        return empty_cache(
            layers=self.config.layers,
            batch=batch,
            capacity=capacity,
            key_value_heads=self.config.key_value_heads,
            head_dim=self.config.head_dim,
        )


def _rematerialised(layer, saved_activations: SavedActivations):
    if saved_activations == "all":
        return layer
    if saved_activations == "attention":
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return jax.checkpoint(layer, prevent_cse=False)
