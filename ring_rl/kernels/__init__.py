"""Exact attention over a sequence that is sharded over devices; imports jax and numpy only."""

from ring_rl.kernels.decode import decode_attention
from ring_rl.kernels.feedforward import blockwise_feedforward
from ring_rl.kernels.layout import Layout, from_layout, inverse_permutation, permutation, to_layout
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.reference import reference_attention
from ring_rl.kernels.strategies.ring import ring_attention, ring_attention_with_log_sum_exp

__all__ = [
    "CAUSAL",
    "FULL",
    "Layout",
    "Mask",
    "blockwise_feedforward",
    "decode_attention",
    "from_layout",
    "inverse_permutation",
    "permutation",
    "reference_attention",
    "ring_attention",
    "ring_attention_with_log_sum_exp",
    "to_layout",
]
