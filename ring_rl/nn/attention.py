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
from ring_rl.typing import Array, Float, Int

# Up to so many new tokens are decoded against the whole cache at once.
FEW_TOKENS = 16


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions.

    Training runs on each device's tokens and heads, which meet those of other devices by the strategy of the mesh.
    Decoding runs the new tokens against a cache and gives the same numbers.
    """

    def __init__(
        self,
        *,
        width: int,
        query_heads: int,
        key_value_heads: int,
        head_dim: int,
        rotary_base: float,
        window: int | None,
        block_size: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.rotary_base, self.block_size = head_dim, rotary_base, block_size
        self.mask = Mask(causal=True, window=window)
        projection = partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        inwards, outwards = named("width", "heads"), named("heads", "width")
        self.query = projection(width, query_heads * head_dim, kernel_metadata=inwards)
        self.key = projection(width, key_value_heads * head_dim, kernel_metadata=inwards)
        self.value = projection(width, key_value_heads * head_dim, kernel_metadata=inwards)
        self.out = projection(query_heads * head_dim, width, kernel_metadata=outwards)

    def __call__(
        self,
        x: Float[Array, "B T M"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        parallel: LocalParallel,
    ) -> Float[Array, "B T M"]:
        """Attention of this device's tokens, inside `jax.shard_map`; weights hold this device's heads."""
        q, k, v = self._project(x, positions)
        dense = parallel.strategy == "dense"
        axes = () if dense else parallel.sequence_axes
        out = attention(
            q,
            k,
            v,
            axis_name=axes or None,
            mask=self.mask,
            layout=parallel.layout,
            strategy=parallel.strategy if axes or dense else "blockwise",
            segment_ids=segment_ids,
            log_sum_exp_gradient=False,
            block_size=self.block_size,
        ).out
        return parallel.sum_over_tensor_axis(self._merge_heads(out))

    def decode(
        self, x: Float[Array, "B T M"], positions: Int[Array, "1 T"], cache: LayerCache
    ) -> tuple[Float[Array, "B T M"], LayerCache]:
        """Attention of T new tokens to everything in the cache and to one another; the cache with them added.

        A few tokens cost what the cache's capacity says, however much of it is filled: let it grow as it fills.
        """
        q, k, v = self._project(x, positions)
        cache = cache.write(k, v, positions[0, 0])
        # A few tokens read the cache in one product, whose memory is small: tile by tile costs several times as much.
        tile_size = cache.k.shape[2] if x.shape[1] <= FEW_TOKENS else DEFAULT_TILE_SIZE
        out = decode_attention(
            q,
            cache.k,
            cache.v,
            length=positions[0, 0],
            mask=self.mask,
            axis_name=cache.axis_name,
            slot_block=cache.slot_block,
            tile_size=tile_size,
        )
        return self._merge_heads(out), cache

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)  # noqa: E731
        q = rotate(heads(self.query(x)), positions, base=self.rotary_base)
        k = rotate(heads(self.key(x)), positions, base=self.rotary_base)
        return q, k, heads(self.value(x))

    def _merge_heads(self, out_BTHD: Array) -> Array:
        return self.out(out_BTHD.reshape(*out_BTHD.shape[:2], -1))
