"""Small models that tests share: each test names only the fields that it is about, or that it needs otherwise."""

import dataclasses
from typing import Any

from ring_rl.lm.model import LanguageModelConfig
from ring_rl.nn.transformer_config import RetrievalAids, TransformerConfig


def small_transformer(**changes: Any) -> TransformerConfig:
    """A plain LLaMA of two layers, width 16 and two heads of 8; `changes` are fields of `TransformerConfig`."""
    small = TransformerConfig(
        layers=2,
        width=16,
        query_heads=2,
        key_value_heads=2,
        head_dim=8,
        norm_epsilon=1e-6,
        feed_forward="swiglu",
        feed_forward_width=16,
        feed_forward_chunks=1,
        rotary_base=100.0,
        rotary_fraction=1.0,
        rotary_scaling=None,
        no_position_layers=(),
        retrieval=None,
        attention_window=None,
        attention_block_size=16,
        saved_activations="none",
        compute_dtype="float32",
    )
    return dataclasses.replace(small, **changes)


def retrieval_aids(**changes: Any) -> RetrievalAids:
    """All the aids; `changes` are fields of `RetrievalAids`."""
    aids = RetrievalAids(
        convolution_width=4,
        key_shift=True,
        key_shift_initial=0.7,
        length_scaled_queries=True,
        length_scale_initial=0.3,
        keys_start_as_queries=True,
    )
    return dataclasses.replace(aids, **changes)


def small_language_model(**changes: Any) -> LanguageModelConfig:
    """`small_transformer()` between an embedding and a head; `changes` are fields of `LanguageModelConfig`."""
    small = LanguageModelConfig(
        name="language",
        vocabulary_size=32,
        tied_embedding=False,
        embedding_scale=1.0,
        trained_positions=64,
        transformer=small_transformer(),
    )
    return dataclasses.replace(small, **changes)
