"""Exact attention over a sequence that is sharded over devices; imports jax and numpy only."""

from ring_rl.kernels.attention import AttentionOutput, attention
from ring_rl.kernels.decode import decode_attention
from ring_rl.kernels.dropout import Dropout
from ring_rl.kernels.feedforward import blockwise_feedforward
from ring_rl.kernels.layout import Layout, from_layout, inverse_permutation, permutation, to_layout
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.reference import reference_attention
from ring_rl.kernels.strategies.sharded import SAVED_NAMES

__all__ = [
    "CAUSAL",
    "FULL",
    "SAVED_NAMES",
    "AttentionOutput",
    "Dropout",
    "Layout",
    "Mask",
    "attention",
    "blockwise_feedforward",
    "decode_attention",
    "from_layout",
    "inverse_permutation",
    "permutation",
    "reference_attention",
    "to_layout",
]
