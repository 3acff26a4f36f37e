"""Blockwise feed-forward: the hidden activations of a few tokens at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ring_rl.typing import Array, Float


def check_chunks(tokens: int, *, chunks: int, of: str = "feed-forward") -> None:
    """Raises ValueError unless `chunks` equal steps cover `tokens`; `of` says what they are steps of."""
    if chunks < 1 or tokens % chunks:
        raise ValueError(
            f"{tokens} tokens cannot be cut into {chunks} {of} chunks; choose a divisor of the token count"
        )


def blockwise_feedforward(
    function: Callable[[Float[Array, "B c M"]], Float[Array, "B c M"]],
    x: Float[Array, "B T M"],
    *,
    chunks: int,
) -> Float[Array, "B T M"]:
    """`function`, which acts on every token alone, applied in `chunks` steps.

    With more than one step, backward recomputes each: only B T F / chunks hidden activations exist at a time, in
    either pass, at the price of one more forward.

    A step takes every chunks-th token, not a contiguous stretch: with T sharded over a ring, tokens
    0, chunks, 2 chunks, ... lie on all devices alike, so each step keeps all of them busy and no token moves.
    For that, T / chunks must be a multiple of the ring size. With replicated weights, every step of backward sums
    its share of their gradient over the ring: take no more chunks than memory asks for. arXiv:2310.01889, section 3.

    Raises:
        ValueError: `chunks` does not divide T.
    """
    B, T, M = x.shape
    check_chunks(T, chunks=chunks)
    if chunks == 1:
        return function(x)
    x_nBcM = jnp.moveaxis(x.reshape(B, T // chunks, chunks, M), 2, 0)
    y_nBcM = jax.lax.map(jax.checkpoint(function), x_nBcM)
    return jnp.moveaxis(y_nBcM, 0, 2).reshape(B, T, -1)
