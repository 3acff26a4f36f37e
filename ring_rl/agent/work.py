"""What one training step of an agent amounts to, in tokens and model FLOPs."""

from __future__ import annotations

from flax import nnx

from ring_rl.agent.model import ModelConfig, SequenceModelConfig
from ring_rl.agent.tokens import tokens_per_step
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import visible_pairs
from ring_rl.training.flops import matmul_parameters, model_flops_per_step

__all__ = ["model_flops", "tokens_per_chain"]


def tokens_per_chain(model: ModelConfig, *, steps: int) -> int:
    """Tokens that a model makes of a chain of `steps` environment steps; a policy without context reads one a step."""
    return steps * (tokens_per_step(model.token_layout) if isinstance(model, SequenceModelConfig) else 1)


def model_flops(model: ModelConfig, parameters: nnx.State, *, batch_size: int, steps: int) -> int:
    """Forward and backward over a batch of chains, by the formula of `ring_rl.training.flops`.

    Args:
        model: its configuration.
        parameters: its arrays, or their shapes.
        batch_size: chains B in a batch.
        steps: columns T of a chain, padding included.
    """
    tokens = tokens_per_chain(model, steps=steps)
    if not isinstance(model, SequenceModelConfig):
        layers, heads, head_dim, pairs = 0, 0, 0, 0
    else:
        trunk = model.transformer
        layers, heads, head_dim = trunk.layers, trunk.query_heads, trunk.head_dim
        pairs = visible_pairs(Mask(causal=True, window=trunk.attention_window), tokens)
    return model_flops_per_step(
        matmul_parameters=matmul_parameters(parameters),
        tokens=batch_size * tokens,
        layers=layers,
        query_heads=heads,
        head_dim=head_dim,
        visible_pairs=batch_size * pairs,
    )
