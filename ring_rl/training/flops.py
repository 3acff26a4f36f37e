"""Model FLOPs: what one optimizer step computes by the mathematics, whatever a program computes again.

    model FLOPs = 6 P N + 12 H D pairs layers

with P the parameters that multiply activations, N tokens, H query heads of D dimensions, and `pairs` the (query, key)
pairs that see one another in the whole batch, of one layer: B T (T + 1) / 2 under a causal mask, so that causal
attention counts once. A multiplication and an addition count as two. Forward is a third of either term (2 P N and
4 H D pairs: q kᵀ and w v), backward two thirds. This is the convention of PaLM (arXiv:2204.02311, appendix B), with
the mask taken into account. Rematerialisation, masked tiles, the optimizer, norms and softmax count nothing.
`ring_rl.kernels.cost.attention_flops` counts 14 instead of 12, because attention kernels always form q kᵀ again.
"""

from __future__ import annotations

import math

from flax import nnx

__all__ = ["matmul_parameters", "model_flops_per_step"]

_MULTIPLIED = ("kernel", "head")


def model_flops_per_step(
    *, matmul_parameters: int, tokens: int, layers: int, query_heads: int, head_dim: int, visible_pairs: int
) -> int:
    """Forward and backward over one global batch, all devices and microbatches together.

    Args:
        matmul_parameters: P, as from `matmul_parameters`.
        tokens: N of the global batch.
        layers: attention layers; 0 for a model without attention.
        query_heads: H.
        head_dim: D.
        visible_pairs: of one layer over the whole batch: B times `ring_rl.kernels.pairs.visible_pairs`.

    Raises:
        ValueError: a number is negative.
    """
    sizes = {
        "matmul_parameters": matmul_parameters,
        "tokens": tokens,
        "layers": layers,
        "query_heads": query_heads,
        "head_dim": head_dim,
        "visible_pairs": visible_pairs,
    }
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
    return 6 * matmul_parameters * tokens + 12 * layers * query_heads * head_dim * visible_pairs


def matmul_parameters(parameters: nnx.State) -> int:
    """P: numbers in the parameters named "kernel", as flax names what multiplies activations, and "head", a
    vocabulary's own projection (`ring_rl.nn.vocabulary`).

    Embeddings are looked up and biases and scales added, which is free; a vocabulary projection tied to its
    embedding must be added by hand. Layers that see only some of the tokens (the embedding of one kind of token, a
    head that reads one token in four) count as if they saw all.
    """
    return sum(
        math.prod(parameter.get_value().shape)
        for path, parameter in nnx.to_flat_state(parameters)
        if path[-1] in _MULTIPLIED
    )
