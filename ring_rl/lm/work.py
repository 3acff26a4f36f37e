"""What one training step of a language model amounts to, in model FLOPs."""

from flax import nnx

from ring_rl.kernels.mask import Mask
from ring_rl.kernels.pairs import visible_pairs
from ring_rl.lm.model import LanguageModelConfig
from ring_rl.training.flops import matmul_parameters, model_flops_per_step


def model_flops(config: LanguageModelConfig, parameters: nnx.State, *, batch_size: int, length: int) -> int:
    """Forward and backward over a batch of rows, by the formula of `ring_rl.training.flops`.

    Rows count as one document each: packed ones attend to less.

    Args:
        config: the model's.
        parameters: its arrays, or their shapes.
        batch_size: rows B.
        length: tokens T of a row, padding included.
    """
    trunk = config.transformer
    tied_head = trunk.width * config.vocabulary_size if config.tied_embedding else 0
    return model_flops_per_step(
        matmul_parameters=matmul_parameters(parameters) + tied_head,
        tokens=batch_size * length,
        layers=trunk.layers,
        query_heads=trunk.query_heads,
        head_dim=trunk.head_dim,
        visible_pairs=batch_size * visible_pairs(Mask(causal=True, window=trunk.attention_window), length),
    )
