"""What a head says of every token, one by one: the most likely next token, and the log-probability of a given one.

Blockwise as the loss is (`ring_rl.kernels.cross_entropy`), so that the logits of a few tokens exist at a time, and
never [tokens, V]. For evaluation: no gradients are defined.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.kernels.feedforward import check_chunks
from ring_rl.typing import Array, Float, Float32, Int, Int32


class TokenScores(NamedTuple):
    """One entry a token.

    Attributes:
        best: The most likely token, the first of equals.
        best_log_probability: log p(best).
        target_log_probability: log p(target); 0 where the target is not in [0, V), or none was given.
    """

    best: Int32[Array, "B T"]
    best_log_probability: Float32[Array, "B T"]
    target_log_probability: Float32[Array, "B T"]


def blockwise_token_scores(
    hidden: Float[Array, "B T M"],
    head: Float[Array, "M V"],
    targets: Int[Array, "B T"] | None,
    *,
    chunks: int,
) -> TokenScores:
    """softmax(hidden head) read token by token, in `chunks` steps of every chunks-th token.

    Sums are float32. Cost: 2 B T M V FLOPs; memory of about three times B T V / chunks float32.

    Raises:
        ValueError: The shapes do not fit; `chunks` does not divide T.
    """
    if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"hidden {hidden.shape} and head {head.shape} must be [batch, tokens, width], [width, tokens]")
    if targets is not None and targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {targets.shape} must be one a token, {hidden.shape[:-1]}")
    B, T, _ = hidden.shape
    check_chunks(T, chunks=chunks, of="token score")
    targets = jnp.full((B, T), -1, jnp.int32) if targets is None else targets

    def score(hidden_BcM: Array, targets_Bc: Array) -> TokenScores:
        logits_BcV = float32_einsum("bcm,mv->bcv", hidden_BcM, head)
        token_V = lax.iota(jnp.int32, head.shape[1])
        maximum_Bc = jnp.max(logits_BcV, axis=-1)
        log_sum_Bc = jnp.log(jnp.sum(jnp.exp(logits_BcV - maximum_Bc[..., None]), axis=-1))
        # Comparing with every token, not indexing: it runs where V is sharded too.
        best_Bc = jnp.min(jnp.where(logits_BcV == maximum_Bc[..., None], token_V, head.shape[1]), axis=-1)
        of_target_Bc = jnp.sum(jnp.where(token_V == targets_Bc[..., None], logits_BcV, 0.0), axis=-1)
        known = (targets_Bc >= 0) & (targets_Bc < head.shape[1])
        target_Bc = jnp.where(known, of_target_Bc - maximum_Bc - log_sum_Bc, 0.0)
        return TokenScores(best_Bc, -log_sum_Bc, target_Bc)

    cut = lambda x: jnp.moveaxis(x.reshape(B, T // chunks, chunks, *x.shape[2:]), 2, 0)  # noqa: E731
    scores_nBc = lax.map(lambda step: score(*step), (cut(hidden), cut(targets)))
    return TokenScores(*(jnp.moveaxis(x, 0, 2).reshape(B, T) for x in scores_nBc))
