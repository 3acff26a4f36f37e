"""A decoder-only transformer on any mesh: batch, sequence, heads and weights may each be sharded."""

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.nn.block import Block, normalised, rms_norm
from ring_rl.nn.kv_cache import KVCache, empty_cache
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.saved_activations import named_input, rematerialised
from ring_rl.nn.token_context import token_context
from ring_rl.nn.transformer_config import MEMORY_CHOICES, RetrievalAids, TransformerConfig
from ring_rl.nn.weights import gathered, weight_specs, without_first_dimension
from ring_rl.typing import Array, Float, Int

__all__ = ["MEMORY_CHOICES", "RetrievalAids", "Transformer", "TransformerConfig"]


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
        self.final_norm = rms_norm(config, rngs)

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
            positions: Global positions in the sequence, or in the document where rows are packed.
            parallel: The mesh.
            segment_ids: Documents of packed rows; a token sees only its own, and a negative id is padding.

        Raises:
            ValueError: The mesh cannot share the batch, the sequence, the heads or the feed-forward's width, or its
                layout tears apart what a convolution or key shift reads together.
        """
        config, local = self.config, parallel.local()
        config.check(parallel, batch=x.shape[0], length=x.shape[1])
        dtype = jnp.dtype(config.compute_dtype)
        block_definition, blocks = nnx.split(self.blocks)
        norm_definition, norm = nnx.split(self.final_norm)
        block_specs, norm_specs = weight_specs(blocks, local), weight_specs(norm, local)
        layer_specs = without_first_dimension(block_specs)

        def run(blocks: nnx.State, norm: nnx.State, x: Array, positions: Array, segment_ids: Array | None) -> Array:
            # Nothing in here depends on the layer: made outside of the scan, it is made once.
            context = token_context(config, positions, segment_ids, local)

            def layer(x: Array, scanned: tuple[nnx.State, Array | None]) -> tuple[Array, None]:
                shards, turns = scanned
                x = named_input(x)
                block = nnx.merge(block_definition, gathered(shards, layer_specs, local, dtype=dtype))
                return block(x, context, local, turns=True if turns is None else turns), None

            # Where all layers are alike no flag travels with them.
            turns = jnp.asarray(self._turns()) if config.no_position_layers else None
            x, _ = jax.lax.scan(rematerialised(layer, config.saved_activations), x.astype(dtype), (blocks, turns))
            return normalised(nnx.merge(norm_definition, gathered(norm, norm_specs, local, dtype=dtype)), x)

        tokens = local.token_spec
        return jax.shard_map(
            run,
            mesh=local.mesh,
            in_specs=(block_specs, norm_specs, tokens, tokens, tokens),
            out_specs=tokens,
        )(blocks, norm, x, positions, segment_ids)

    def decode(
        self, x: Float[Array, "B T M"], cache: KVCache, *, counts: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T M"], KVCache]:
        """T new tokens after everything in the cache: the same activations as `__call__` on the whole sequence.

        Rows grow alike, or, with `cache.length` a number a row, each from its own end.

        Args:
            x: Embedded tokens.
            cache: What has been read.
            counts: How many of each row's new tokens are real; the others, at its end, are padding, whose results mean
                nothing and which the next tokens replace. None is all. The cache then needs a length for each row.

        Raises:
            ValueError: `counts` with a cache of one length for all rows.
        """
        if counts is not None and cache.length.ndim == 0:
            raise ValueError(
                "counts differ by row, the cache has one length; use cache.with_row_lengths() from the start"
            )
        positions = jnp.atleast_1d(cache.length)[:, None] + jnp.arange(x.shape[1])
        context = token_context(self.config, positions)
        x = x.astype(self.config.compute_dtype)
        layers = []
        for block, layer_cache, turns in zip(self._layers(), cache.layers, self._turns(), strict=True):
            x, layer_cache = block.decode(x, context, layer_cache, turns=turns, counts=counts)
            layers.append(layer_cache)
        length = cache.length + (x.shape[1] if counts is None else counts)
        return normalised(self.final_norm, x), KVCache(tuple(layers), length)

    def unstack(self) -> None:
        """Gives every layer arrays of its own, for `decode` alone: nothing else runs afterwards.

        XLA copies a layer's weights out of the stack before it multiplies by them. In decoding, where a step reads
        every weight for one token a row, these copies cost more than all the rest.
        """
        self.blocks = nnx.List(self._layers())

    def _turns(self) -> list[bool]:
        """Whether the positions enter, for each layer."""
        return [index not in self.config.no_position_layers for index in range(self.config.layers)]

    def _layers(self) -> list[Block]:
        if isinstance(self.blocks, nnx.List):
            return list(self.blocks)
        graphdef, parameters = nnx.split(self.blocks)
        slices = [jax.tree.map(lambda x, index=index: x[index], parameters) for index in range(self.config.layers)]
        return [nnx.merge(graphdef, each) for each in slices]

    def empty_cache(self, *, batch: int, capacity: int) -> KVCache:
        """A cache for `batch` sequences of at most `capacity` tokens."""
        config, aids = self.config, self.config.retrieval
        return empty_cache(
            layers=config.layers,
            batch=batch,
            capacity=capacity,
            key_value_heads=config.key_value_heads,
            head_dim=config.head_dim,
            dtype=jnp.dtype(config.compute_dtype),
            last_inputs=None if aids is None else (aids.convolution_width - 1, config.width),
            last_key=aids is not None and aids.key_shift,
        )
