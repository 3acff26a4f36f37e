"""Multi-head attention over a sharded sequence, and against a cache."""

from functools import partial

import jax
from flax import nnx

from ring_rl.kernels.attention import attention
from ring_rl.kernels.decode import decode_attention
from ring_rl.kernels.mask import CAUSAL
from ring_rl.nn.kv_cache import LayerCache
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.nn.rotary import rotate
from ring_rl.typing import Array, Float, Int


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions.

    Training runs ring attention over the sequence axis of the mesh; a ring of one device is the ordinary
    blockwise kernel. Decoding runs the new tokens against a cache and gives the same numbers.
    """

    def __init__(
        self,
        *,
        width: int,
        query_heads: int,
        key_value_heads: int,
        head_dim: int,
        rotary_base: float,
        block_size: int,
        rngs: nnx.Rngs,
    ):
        self.query_heads, self.key_value_heads, self.head_dim = query_heads, key_value_heads, head_dim
        self.rotary_base, self.block_size = rotary_base, block_size
        inwards, outwards = named("width", "heads"), named("heads", "width")
        projection = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query = projection(width, query_heads * head_dim, kernel_metadata=inwards)
        self.key = projection(width, key_value_heads * head_dim, kernel_metadata=inwards)
        self.value = projection(width, key_value_heads * head_dim, kernel_metadata=inwards)
        self.out = projection(query_heads * head_dim, width, kernel_metadata=outwards)

    def __call__(
        self, x: Float[Array, "B T M"], positions: Int[Array, "B T"], parallel: SequenceParallel
    ) -> Float[Array, "B T M"]:
        """Attention over the whole sequence; `x` and global `positions` in the layout of `parallel`."""
        q, k, v = self._project(x, positions)
        spec = parallel.token_spec

        def attend(q, k, v):
            return attention(
                q,
                k,
                v,
                axis_name=parallel.sequence_axis,
                mask=CAUSAL,
                layout=parallel.layout,
                strategy="ring",
                log_sum_exp_gradient=False,
                block_size=self.block_size,
            ).out

        out = jax.shard_map(attend, mesh=parallel.mesh, in_specs=(spec, spec, spec), out_specs=spec)(q, k, v)
        return self._merge_heads(out)

    def decode(
        self, x: Float[Array, "B T M"], positions: Int[Array, "1 T"], cache: LayerCache
    ) -> tuple[Float[Array, "B T M"], LayerCache]:
        """Attention of T new tokens to everything in the cache and to one another; the cache with them added."""
        q, k, v = self._project(x, positions)
        cache = cache.write(k, v, positions[0, 0])
        return self._merge_heads(decode_attention(q, cache.k, cache.v, length=positions[0, 0])), cache

    def _project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        heads = lambda y, n: y.reshape(*y.shape[:2], n, self.head_dim)  # noqa: E731
        q = rotate(heads(self.query(x), self.query_heads), positions, base=self.rotary_base)
        k = rotate(heads(self.key(x), self.key_value_heads), positions, base=self.rotary_base)
        return q, k, heads(self.value(x), self.key_value_heads)

    def _merge_heads(self, out_BTHD: Array) -> Array:
        return self.out(out_BTHD.reshape(*out_BTHD.shape[:2], -1))
