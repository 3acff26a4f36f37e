"""What a layer reads of the few tokens before each, besides attention: a causal convolution, and shifted keys.

In training the tokens before a device's own come from its neighbours in the ring (`ring_rl.kernels.halo`); in decoding
they are kept from the tokens before. Neither ever reads across the border of a document.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import lax, vmap

from ring_rl.kernels.halo import chunks_with_previous, lagged
from ring_rl.nn.logical_axes import named
from ring_rl.nn.parallel import LocalParallel
from ring_rl.nn.token_context import TokenContext
from ring_rl.typing import Array, Float, Int, Shaped

# The token `lag` before each, zeros where there is none of the same document.
TokensBack = Callable[[int], Shaped[Array, "B T ..."]]


def tokens_back(x: Shaped[Array, "B T ..."], count: int, context: TokenContext, parallel: LocalParallel) -> TokensBack:
    """The up to `count` tokens before each of a device's, as a function of how far back; inside `jax.shard_map`."""
    chunks = chunks_with_previous(x, count, layout=parallel.layout, axis_name=parallel.sequence_axes, fill=0)

    def back(lag: int) -> Array:
        y = lagged(chunks, lag, count=count)
        if lag == 0 or context.together is None:
            return y
        together_BT = context.together[:, :, lag - 1]
        return jnp.where(together_BT.reshape(*together_BT.shape, *(1,) * (y.ndim - 2)), y, 0)

    return back


def tokens_back_decoding(
    x: Shaped[Array, "B T ..."], before: Shaped[Array, "B n ..."], counts: Int[Array, " B"] | None
) -> tuple[TokensBack, Shaped[Array, "B n ..."]]:
    """The tokens before each new one, and the last n of all for the tokens that will follow.

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
    return (lambda lag: lagged(joined[:, None], lag, count=n)), last.astype(before.dtype)


class CausalConvolution(nnx.Module):
    """Σ_j kernel_j x_{t-j} for each channel alone, over the token and the `span` - 1 before it."""

    def __init__(self, *, width: int, span: int, rngs: nnx.Rngs):
        self.span = span
        initial = nnx.initializers.normal(1 / math.sqrt(span))
        self.kernel = nnx.Param(initial(rngs.params(), (span, width)), **named(None, "width"))

    def __call__(self, back: TokensBack) -> Float[Array, "B T M"]:
        """The convolution of the tokens that `back` gives, in their dtype; sums are float32."""
        kernel_sM = self.kernel[...].astype(jnp.float32)
        terms = [kernel_sM[lag] * back(lag).astype(jnp.float32) for lag in range(self.span)]
        return sum(terms[1:], terms[0]).astype(back(0).dtype)
