"""Exact attention over a sequence that is sharded over devices; imports jax and numpy only."""

from ring_rl.kernels.attention import AttentionOutput, attention
from ring_rl.kernels.cache_slots import check_capacity, slot_positions
from ring_rl.kernels.cross_entropy import CrossEntropySums, blockwise_cross_entropy
from ring_rl.kernels.decode import decode_attention, write_cache, write_segment_ids
from ring_rl.kernels.document_balance import balanced_permutation
from ring_rl.kernels.dropout import Dropout
from ring_rl.kernels.feedforward import blockwise_feedforward
from ring_rl.kernels.layout import (
    Layout,
    batch_to_layout,
    from_layout,
    inverse_permutation,
    pad_to_layout,
    permutation,
    to_layout,
)
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.reference import reference_attention
from ring_rl.kernels.strategies.sharded import SAVED_NAMES

__all__ = [
    "CAUSAL",
    "FULL",
    "SAVED_NAMES",
    "AttentionOutput",
    "CrossEntropySums",
    "Dropout",
    "Layout",
    "Mask",
    "attention",
    "balanced_permutation",
    "batch_to_layout",
    "blockwise_cross_entropy",
    "blockwise_feedforward",
    "check_capacity",
    "decode_attention",
    "from_layout",
    "inverse_permutation",
    "pad_to_layout",
    "permutation",
    "reference_attention",
    "slot_positions",
    "to_layout",
    "write_cache",
    "write_segment_ids",
]
