"""What a layer reads of the few tokens before each, besides attention: a causal convolution, and shifted keys.

In training the tokens before a device's own come from its neighbours in the ring (`ring_rl.kernels.halo`); in decoding
they are kept from the tokens before. Neither ever reads across the border of a document.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax, vmap

from ring_rl.kernels.convolution import causal_convolution
from ring_rl.kernels.halo import chunks_with_previous, lagged
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel
from ring_rl.nn.token_context import TokenContext
from ring_rl.typing import Array, Bool, Float, Int, Shaped


class TokensBack(NamedTuple):
    """Tokens that can be asked for those a little before them.

    Attributes:
        chunks: Runs of tokens, each with the `reach` before it.
        reach: How far back.
        together: Whether the token 1, 2, ... back is of the same document; None is yes for all.
    """

    chunks: Shaped[Array, "B n c ..."]
    reach: int
    together: Bool[Array, "B T j"] | None

    def back(self, lag: int) -> Shaped[Array, "B T ..."]:
        """The token `lag` before each, zeros where there is none of the same document."""
        x = lagged(self.chunks, lag, count=self.reach)
        if lag == 0 or self.together is None:
            return x
        together_BT = self.together[:, :, lag - 1]
        return jnp.where(together_BT.reshape(*together_BT.shape, *(1,) * (x.ndim - 2)), x, 0)


def tokens_back(x: Shaped[Array, "B T ..."], count: int, context: TokenContext, parallel: LocalParallel) -> TokensBack:
    """A device's tokens and the `count` before them; inside `jax.shard_map`."""
    chunks = chunks_with_previous(x, count, layout=parallel.layout, axis_name=parallel.sequence_axes, fill=0)
    return TokensBack(chunks, count, context.together)


def tokens_back_decoding(
    x: Shaped[Array, "B T ..."], before: Shaped[Array, "B n ..."], counts: Int[Array, " B"] | None
) -> tuple[TokensBack, Shaped[Array, "B n ..."]]:
    """New tokens and the n before them, and the last n of all for the tokens that will follow.

    Args:
        x: New tokens.
        before: The last n before them; zeros stand before the first of a sequence.
        counts: How many of each row's new tokens are real, if not all.
    """
    joined, n = jnp.concatenate([before.astype(x.dtype), x], axis=1), before.shape[1]
    if counts is None:
        last = joined[:, joined.shape[1] - n :]
    else:
        last = vmap(lambda row, count: lax.dynamic_slice_in_dim(row, count, n))(joined, counts)
    return TokensBack(joined[:, None], n, None), last.astype(before.dtype)


class CausalConvolution(nnx.Module):
    """Σ_j kernel_j x_{t-j} for each channel alone, over the token and the `span` - 1 before it."""

    def __init__(self, *, width: int, span: int, rngs: nnx.Rngs):
        self.span = span
        initial = nnx.initializers.normal(1 / math.sqrt(span))
        self.kernel = nnx.Param(initial(rngs.params(), (span, width)), **named(None, "width"))

    def __call__(self, tokens: TokensBack) -> Float[Array, "B T M"]:
        """The convolution of tokens that know the `span` - 1 before them, in their dtype; sums are float32."""
        B, n, c, M = tokens.chunks.shape
        together = tokens.together
        if together is not None:
            together = together.reshape(B, n, c - tokens.reach, -1)
        return causal_convolution(tokens.chunks, self.kernel[...], together).reshape(B, -1, M)
