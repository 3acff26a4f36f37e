"""One layer of a transformer: attention, then a feed-forward, each added to what came in."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from ring_rl.kernels.feedforward import blockwise_feedforward
from ring_rl.nn.attention import Attention
from ring_rl.nn.kv_cache import LayerCache
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel
from ring_rl.nn.short_memory import CausalConvolution, tokens_back, tokens_back_decoding
from ring_rl.nn.token_context import TokenContext
from ring_rl.nn.transformer_config import TransformerConfig
from ring_rl.typing import Array, Bool, Float, Int


class Block(nnx.Module):
    """x + convolution(norm(x)) if there is one, then x + attention(norm(x)), then x + feed_forward(norm(x)).

    feed_forward(x) is out(gelu(in(x))), or with "swiglu" out(silu(gate(x)) in(x)), or nothing.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.feed_forward_chunks = config.feed_forward_chunks
        span = 1 if config.retrieval is None else config.retrieval.convolution_width
        self.convolution_norm = rms_norm(config, rngs) if span > 1 else None
        self.convolution = CausalConvolution(width=config.width, span=span, rngs=rngs) if span > 1 else None
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = config.feed_forward
        if config.feed_forward == "none":
            return
        biased = config.feed_forward == "gelu"
        inwards = partial(
            nnx.Linear,
            config.width,
            config.feed_forward_width,
            use_bias=biased,
            dtype=jnp.dtype(config.compute_dtype),
            kernel_metadata=named("width", "hidden"),
            bias_metadata=named("hidden"),
            rngs=rngs,
        )
        self.feed_forward_norm = rms_norm(config, rngs)
        self.feed_forward_in = inwards()
        if config.feed_forward == "swiglu":
            self.feed_forward_gate = inwards()
        self.feed_forward_out = RowParallelLinear(
            config.feed_forward_width,
            config.width,
            use_bias=biased,
            dtype=jnp.dtype(config.compute_dtype),
            kernel_metadata=named("hidden", "width"),
            bias_metadata=named("width"),
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T M"],
        context: TokenContext,
        parallel: LocalParallel,
        *,
        turns: bool | Bool[Array, ""] = True,
    ) -> Float[Array, "B T M"]:
        """The block over this device's tokens, inside `jax.shard_map`; `turns` as in `Attention`."""
        if self.convolution is not None and self.convolution_norm is not None:
            y = normalised(self.convolution_norm, x)
            x = x + self.convolution(tokens_back(y, self.convolution.span - 1, context, parallel))
        x = x + self.attention(normalised(self.attention_norm, x), context, parallel, turns=turns)
        if self.feed_forward == "none":
            return x
        feed_forward = partial(self._feed_forward, parallel=parallel)
        return x + blockwise_feedforward(feed_forward, x, chunks=self.feed_forward_chunks)

    def decode(
        self,
        x: Float[Array, "B T M"],
        context: TokenContext,
        cache: LayerCache,
        *,
        turns: bool = True,
        counts: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T M"], LayerCache]:
        """The block over new tokens, after everything in the cache."""
        if self.convolution is not None and self.convolution_norm is not None:
            assert cache.last_inputs is not None
            y = normalised(self.convolution_norm, x)
            inputs, last_inputs = tokens_back_decoding(y, cache.last_inputs, counts)
            x, cache = x + self.convolution(inputs), cache.replace(last_inputs=last_inputs)
        y = normalised(self.attention_norm, x)
        attended, cache = self.attention.decode(y, context, cache, turns=turns, counts=counts)
        x = x + attended
        return (x if self.feed_forward == "none" else x + self._feed_forward(x, parallel=None)), cache

    def _feed_forward(self, x: Array, *, parallel: LocalParallel | None) -> Array:
        y = normalised(self.feed_forward_norm, x)
        if self.feed_forward == "swiglu":
            hidden = jax.nn.silu(self.feed_forward_gate(y)) * self.feed_forward_in(y)
        else:
            hidden = jax.nn.gelu(self.feed_forward_in(y))
        return self.feed_forward_out(hidden, parallel)


class RowParallelLinear(nnx.Linear):
    """x kernel + bias where the devices of the tensor axis hold some of the inputs, and those rows of the kernel."""

    def __call__(self, inputs: Float[Array, "*b F"], parallel: LocalParallel | None = None) -> Float[Array, "*b M"]:
        """The result, the same on all of them; without `parallel` everything is here."""
        if parallel is None or parallel.tensor_axis is None:
            return super().__call__(inputs)
        kernel, dtype = self.kernel[...], self.dtype or inputs.dtype
        y = parallel.sum_over_tensor_axis(inputs.astype(dtype) @ kernel.astype(dtype))
        return y if self.bias is None else y + self.bias[...].astype(dtype)


def rms_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """scale x / √(mean(x²) + ε), computed in float32."""
    return nnx.RMSNorm(
        config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, scale_metadata=named("width"), rngs=rngs
    )


def normalised(norm: nnx.RMSNorm, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
    """The norm, in float32, as a result of x's dtype."""
    return norm(x).astype(x.dtype)
