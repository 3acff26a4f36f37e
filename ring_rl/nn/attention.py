"""Multi-head attention over a sharded sequence, and against a cache."""

from functools import partial

import jax.numpy as jnp
from flax import nnx

from ring_rl.kernels.attention import attention
from ring_rl.kernels.decode import DEFAULT_TILE_SIZE, decode_attention
from ring_rl.kernels.mask import Mask
from ring_rl.nn.kv_cache import LayerCache
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel
from ring_rl.nn.rotary import rotate
from ring_rl.nn.short_memory import TokensBack, tokens_back, tokens_back_decoding
from ring_rl.nn.token_context import TokenContext
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.typing import Array, Bool, Float, Int

# Up to so many new tokens are decoded against the whole cache at once.
FEW_TOKENS = 16


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions.

    Training runs on each device's tokens and heads, which meet those of other devices by the strategy of the mesh.
    Decoding runs the new tokens against a cache and gives the same numbers.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.head_dim, self.block_size = config.head_dim, config.attention_block_size
        self.mask = Mask(causal=True, window=config.attention_window)
        width, H, K, D = config.width, config.query_heads, config.key_value_heads, config.head_dim
        projection = partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(config.compute_dtype), rngs=rngs)
        inwards, outwards = named("width", "heads"), named("heads", "width")
        self.query = projection(width, H * D, kernel_metadata=inwards)
        self.key = projection(width, K * D, kernel_metadata=inwards)
        self.value = projection(width, K * D, kernel_metadata=inwards)
        self.out = projection(H * D, width, kernel_metadata=outwards)
        aids = config.retrieval
        learned = lambda value, count: nnx.Param(jnp.full(count, value, jnp.float32), **named("heads"))  # noqa: E731
        self.key_shift_scale = learned(aids.key_shift_initial, K) if aids is not None and aids.key_shift else None
        self.query_scale = (
            learned(aids.length_scale_initial, H) if aids is not None and aids.length_scaled_queries else None
        )
        if aids is not None and aids.keys_start_as_queries:
            first_of_group = self.query.kernel[...].reshape(width, K, H // K, D)[:, :, 0]
            self.key.kernel[...] = first_of_group.reshape(width, K * D)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        context: TokenContext,
        parallel: LocalParallel,
        *,
        turns: bool | Bool[Array, ""] = True,
    ) -> Float[Array, "B T M"]:
        """Attention of this device's tokens, inside `jax.shard_map`; weights hold this device's heads.

        `turns` says whether queries and keys turn with their positions.
        """
        k = self._heads(self.key(x))
        if self.key_shift_scale is not None:
            k = self._shifted(tokens_back(k, 1, context, parallel))
        q, k = self._placed(self._heads(self.query(x)), k, context, turns)
        dense = parallel.strategy == "dense"
        axes = () if dense else parallel.sequence_axes
        out = attention(
            q,
            k,
            self._heads(self.value(x)),
            axis_name=axes or None,
            mask=self.mask,
            layout=parallel.layout,
            strategy=parallel.strategy if axes or dense else "blockwise",
            segment_ids=context.segment_ids,
            log_sum_exp_gradient=False,
            local=parallel.local_block,
            block_size=self.block_size,
            heads_at_once=parallel.heads_at_once,
        ).out
        return parallel.sum_over_tensor_axis(self._merge_heads(out))

    def decode(
        self,
        x: Float[Array, "B T M"],
        context: TokenContext,
        cache: LayerCache,
        *,
        turns: bool = True,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], LayerCache]:
        """Attention of T new tokens to everything in the cache and to one another; the cache with them added.

        A few tokens cost what the cache's capacity says, however much of it is filled: let it grow as it fills.
        """
        k = self._heads(self.key(x))
        if self.key_shift_scale is not None:
            assert cache.last_keys is not None
            keys, last_keys = tokens_back_decoding(k, cache.last_keys, counts)
            k, cache = self._shifted(keys), cache.replace(last_keys=last_keys)
        q, k = self._placed(self._heads(self.query(x)), k, context, turns)
        # One number where all rows agree.
        length = context.positions[:, 0] if len(context.positions) > 1 else context.positions[0, 0]
        cache = cache.write(k, self._heads(self.value(x)), length)
        # In XLA a few tokens read the cache in one product, whose memory is small: tiles cost up to twice as much.
        tile_size = cache.k.shape[2] if x.shape[1] <= FEW_TOKENS else DEFAULT_TILE_SIZE
        out = decode_attention(
            q,
            cache.k,
            cache.v,
            length=length,
            mask=self.mask,
            axis_name=cache.axis_name,
            slot_block=cache.slot_block,
            tile_size=tile_size,
        )
        return self._merge_heads(out), cache

    def _shifted(self, keys: TokensBack) -> Float[Array, "B T K D"]:
        """Keys mixed with those of the token before, before they turn."""
        assert self.key_shift_scale is not None
        own, previous, share_K1 = keys.back(0), keys.back(1), self.key_shift_scale[...][:, None]
        return ((1 - share_K1) * own + share_K1 * previous).astype(own.dtype)

    def _placed(self, q: Array, k: Array, context: TokenContext, turns: bool | Array) -> tuple[Array, Array]:
        """Queries and keys that know their positions."""
        if context.rotation is not None and turns is not False:
            turned = rotate(q, context.rotation), rotate(k, context.rotation)
            q, k = turned if turns is True else (jnp.where(turns, y, x) for y, x in zip(turned, (q, k), strict=True))
        if self.query_scale is not None:
            log_bT11 = jnp.log(context.positions.astype(jnp.float32) + 2.0)[:, :, None, None]
            q = (q * (self.query_scale[...][:, None] * log_bT11)).astype(q.dtype)
        return q, k

    def _heads(self, y: Array) -> Array:
        return y.reshape(*y.shape[:2], -1, self.head_dim)

    def _merge_heads(self, out_BTHD: Array) -> Array:
        return self.out(out_BTHD.reshape(*out_BTHD.shape[:2], -1))
