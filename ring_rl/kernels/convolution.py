"""A short causal convolution of every channel alone, whose backward is a convolution too.

Left to itself, differentiation would turn each of the slices below into a padded array of its own and add them up,
which takes several times as long on a CPU, and to compile.
"""

import jax
import jax.numpy as jnp

from ring_rl.typing import Array, Bool, Float


@jax.custom_vjp
def causal_convolution(
    chunks: Float[Array, "B n c M"], kernel: Float[Array, "s M"], together: Bool[Array, "B n t j"] | None
) -> Float[Array, "B n t M"]:
    """y_t = Σ_lag kernel_lag x_{t - lag} over the token and the s - 1 before it, c = s - 1 + t.

    Args:
        chunks: Runs of tokens, each with the s - 1 tokens before it (`ring_rl.kernels.halo.chunks_with_previous`).
        kernel: One weight a lag and channel.
        together: Whether the token 1, 2, ... back counts, for at least s - 1 of them; None is yes for all.

    Sums are float32, the result of the dtype of `chunks`. Differentiated once, in reverse.
    """
    t, float32 = chunks.shape[2] - len(kernel) + 1, jnp.float32
    terms = [kernel[lag].astype(float32) * _lagged(chunks, together, lag, t, len(kernel)) for lag in range(len(kernel))]
    return sum(terms[1:], terms[0]).astype(chunks.dtype)


def _forward(chunks: Array, kernel: Array, together: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return causal_convolution(chunks, kernel, together), (chunks, kernel, together)


def _backward(saved: tuple[Array, Array, Array | None], dy: Array) -> tuple[Array, Array, None]:
    chunks, kernel, together = saved
    span, c = len(kernel), chunks.shape[2]
    dy = dy.astype(jnp.float32)
    over = [jnp.sum(dy * _lagged(chunks, together, lag, c - span + 1, span), axis=(0, 1, 2)) for lag in range(span)]
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (span - 1, span - 1), (0, 0)])  # noqa: E731
    padded, counted = pad(dy), None if together is None else pad(together)

    def term(lag: int) -> Array:
        # The token at u of a chunk was read, `lag` later, by what now stands at u + lag.
        y = kernel[lag].astype(jnp.float32) * padded[:, :, lag : lag + c]
        return y if lag == 0 or counted is None else jnp.where(counted[:, :, lag : lag + c, lag - 1, None], y, 0.0)

    d_chunks = sum((term(lag) for lag in range(1, span)), term(0))
    return d_chunks.astype(chunks.dtype), jnp.stack(over).astype(kernel.dtype), None


causal_convolution.defvjp(_forward, _backward)


def _lagged(chunks: Array, together: Array | None, lag: int, t: int, span: int) -> Array:
    x = chunks[:, :, span - 1 - lag : span - 1 - lag + t].astype(jnp.float32)
    return x if lag == 0 or together is None else jnp.where(together[..., lag - 1, None], x, 0.0)
