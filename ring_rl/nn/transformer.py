"""A decoder-only transformer on any mesh: batch, sequence, heads and weights may each be sharded."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.kernels.feedforward import blockwise_feedforward, check_chunks
from ring_rl.nn.attention import Attention
from ring_rl.nn.kv_cache import KVCache, LayerCache, empty_cache
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel, SequenceParallel
from ring_rl.nn.saved_activations import (
    SavedActivations,
    check_saved_activations,
    named_input,
    rematerialised,
)
from ring_rl.nn.weights import gathered, weight_specs, without_first_dimension
from ring_rl.typing import Array, Float, Int

ComputeDtype = Literal["float32", "bfloat16"]
# The fields of `TransformerConfig` that say in what memory the same function of the same parameters is computed.
MEMORY_CHOICES = ("feed_forward_chunks", "attention_block_size", "saved_activations")


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
        feed_forward_chunks: Steps in which the feed-forward runs; divides the tokens of a device.
        rotary_base: Base of the rotary frequencies.
        attention_window: How many tokens back a token sees, itself included; None is all of them.
        attention_block_size: Largest edge of a tile of attention scores, in tokens.
        saved_activations: What backward finds saved of a layer: "all", "products", "attention", "none" or
            "offload", as `ring_rl.nn.saved_activations` says.
        compute_dtype: Of activations and matrix products. Parameters, softmax, norms, rotary angles and sums of
            gradients over devices are float32 whatever it is.
    """

    layers: int
    width: int
    query_heads: int
    key_value_heads: int
    head_dim: int
    feed_forward_width: int
    feed_forward_chunks: int
    rotary_base: float
    attention_window: int | None
    attention_block_size: int
    saved_activations: SavedActivations
    compute_dtype: ComputeDtype

    def __post_init__(self) -> None:
        sizes = (
            "layers",
            "width",
            "query_heads",
            "key_value_heads",
            "head_dim",
            "feed_forward_width",
            "feed_forward_chunks",
            "attention_block_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"transformer.{name} must be at least 1, got {getattr(self, name)}")
        if self.query_heads % self.key_value_heads:
            raise ValueError(
                f"transformer.query_heads={self.query_heads} must be a multiple of "
                f"key_value_heads={self.key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"transformer.head_dim={self.head_dim} must be even, for rotary positions")
        if self.attention_window is not None and self.attention_window < 1:
            raise ValueError(
                f"transformer.attention_window must be at least 1 (a token sees itself), got {self.attention_window}; "
                "null is no window"
            )

    def check(self, parallel: SequenceParallel, *, batch: int, length: int) -> None:
        """Raises ValueError unless the mesh can run this model on `batch` sequences of `length` tokens.

        Nothing is compiled, so an entry point can ask before it does anything else.
        """
        parallel.check(batch, length)
        parallel.check_heads(query_heads=self.query_heads, key_value_heads=self.key_value_heads)
        parallel.check_divides("feed_forward_width", self.feed_forward_width)
        check_chunks(length // parallel.sequence_devices, chunks=self.feed_forward_chunks, of="feed-forward")
        check_saved_activations(self.saved_activations, parallel.mesh)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.feed_forward_chunks = config.feed_forward_chunks
        dtype = jnp.dtype(config.compute_dtype)
        self.attention_norm = _norm(config.width, rngs)
        self.attention = Attention(
            width=config.width,
            query_heads=config.query_heads,
            key_value_heads=config.key_value_heads,
            head_dim=config.head_dim,
            rotary_base=config.rotary_base,
            window=config.attention_window,
            block_size=config.attention_block_size,
            dtype=dtype,
            rngs=rngs,
        )
        self.feed_forward_norm = _norm(config.width, rngs)
        self.feed_forward_in = nnx.Linear(
            config.width,
            config.feed_forward_width,
            dtype=dtype,
            kernel_metadata=named("width", "hidden"),
            bias_metadata=named("hidden"),
            rngs=rngs,
        )
        self.feed_forward_out = RowParallelLinear(
            config.feed_forward_width,
            config.width,
            dtype=dtype,
            kernel_metadata=named("hidden", "width"),
            bias_metadata=named("width"),
            rngs=rngs,
        )

    def __call__(self, x: Array, positions: Array, segment_ids: Array | None, parallel: LocalParallel) -> Array:
        """The block over this device's tokens, inside `jax.shard_map`."""
        x = x + self.attention(_normalised(self.attention_norm, x), positions, segment_ids, parallel)
        feed_forward = partial(self._feed_forward, parallel=parallel)
        return x + blockwise_feedforward(feed_forward, x, chunks=self.feed_forward_chunks)

    def decode(self, x: Array, positions: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
        """The block over new tokens, after everything in the cache."""
        attended, cache = self.attention.decode(_normalised(self.attention_norm, x), positions, cache)
        x = x + attended
        return x + self._feed_forward(x, parallel=None), cache

    def _feed_forward(self, x: Array, *, parallel: LocalParallel | None) -> Array:
        hidden = jax.nn.gelu(self.feed_forward_in(_normalised(self.feed_forward_norm, x)))
        return self.feed_forward_out(hidden, parallel)


class Transformer(nnx.Module):
    """Blocks with stacked parameters, scanned, so that compile time does not grow with depth.

    The residual stream and the result are of `compute_dtype`, whatever the input is: a head or a loss decides itself
    what it wants in float32.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def make_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = make_blocks(rngs)
        self.final_norm = _norm(config.width, rngs)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        parallel: SequenceParallel,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T M"]:
        """Activations after the last norm; everything comes and goes in the layout of `parallel`.

        The whole of it is one `jax.shard_map`: every transfer between devices is one that is written down here, in
        `weights` and in the kernels.

        Args:
            x: Embedded tokens.
            positions: Global positions in the sequence, for the rotary embedding.
            parallel: The mesh.
            segment_ids: Documents of packed rows; a token sees only its own, and a negative id is padding.

        Raises:
            ValueError: The mesh cannot share the batch, the sequence, the heads or the feed-forward's width.
        """
        config, local = self.config, parallel.local()
        config.check(parallel, batch=x.shape[0], length=x.shape[1])
        dtype = jnp.dtype(config.compute_dtype)
        block_definition, blocks = nnx.split(self.blocks)
        norm_definition, norm = nnx.split(self.final_norm)
        block_specs, norm_specs = weight_specs(blocks, local), weight_specs(norm, local)
        layer_specs = without_first_dimension(block_specs)

        def run(blocks: nnx.State, norm: nnx.State, x: Array, positions: Array, segment_ids: Array | None) -> Array:
            def layer(x: Array, shards: nnx.State) -> tuple[Array, None]:
                x = named_input(x)
                block = nnx.merge(block_definition, gathered(shards, layer_specs, local, dtype=dtype))
                return block(x, positions, segment_ids, local), None

            x, _ = jax.lax.scan(rematerialised(layer, config.saved_activations), x.astype(dtype), blocks)
            return _normalised(nnx.merge(norm_definition, gathered(norm, norm_specs, local, dtype=dtype)), x)

        tokens = local.token_spec
        return jax.shard_map(
            run,
            mesh=local.mesh,
            in_specs=(block_specs, norm_specs, tokens, tokens, tokens),
            out_specs=tokens,
        )(blocks, norm, x, positions, segment_ids)

    def decode(self, x: Float[Array, "B T M"], cache: KVCache) -> tuple[Float[Array, "B T M"], KVCache]:
        """T new tokens after everything in the cache: the same activations as `__call__` on the whole sequence."""
        positions = (cache.length + jnp.arange(x.shape[1]))[None]
        x = x.astype(self.config.compute_dtype)
        layers = []
        for block, layer_cache in zip(self._layers(), cache.layers, strict=True):
            x, layer_cache = block.decode(x, positions, layer_cache)
            layers.append(layer_cache)
        return _normalised(self.final_norm, x), KVCache(tuple(layers), cache.length + x.shape[1])

    def unstack(self) -> None:
        """Gives every layer arrays of its own, for `decode` alone: nothing else runs afterwards.

        XLA copies a layer's weights out of the stack before it multiplies by them. In decoding, where a step reads
        every weight for one token a row, these copies cost more than all the rest.
        """
        self.blocks = nnx.List(self._layers())

    def _layers(self) -> list[Block]:
        if isinstance(self.blocks, nnx.List):
            return list(self.blocks)
        graphdef, parameters = nnx.split(self.blocks)
        slices = [jax.tree.map(lambda x, index=index: x[index], parameters) for index in range(self.config.layers)]
        return [nnx.merge(graphdef, each) for each in slices]

    def empty_cache(self, *, batch: int, capacity: int) -> KVCache:
        """A cache for `batch` sequences of at most `capacity` tokens."""
        return empty_cache(
            layers=self.config.layers,
            batch=batch,
            capacity=capacity,
            key_value_heads=self.config.key_value_heads,
            head_dim=self.config.head_dim,
            dtype=jnp.dtype(self.config.compute_dtype),
        )


class RowParallelLinear(nnx.Linear):
    """x kernel + bias where the devices of the tensor axis hold some of the inputs, and those rows of the kernel."""

    def __call__(self, inputs: Float[Array, "*b F"], parallel: LocalParallel | None = None) -> Float[Array, "*b M"]:
        """The result, the same on all of them; without `parallel` everything is here."""
        if parallel is None or parallel.tensor_axis is None:
            return super().__call__(inputs)
        kernel, dtype = self.kernel[...], self.dtype or inputs.dtype
        y = parallel.sum_over_tensor_axis(inputs.astype(dtype) @ kernel.astype(dtype))
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, dtype=jnp.float32, scale_metadata=named("width"), rngs=rngs)


def _normalised(norm: nnx.RMSNorm, x: Array) -> Array:
    """The norm, in float32, as a result of x's dtype."""
    return norm(x).astype(x.dtype)
