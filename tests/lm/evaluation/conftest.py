"""Made-up samples of evaluations, and a model that answers at random."""

import pytest
from flax import nnx

from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.model import LanguageModel, LanguageModelConfig
from ring_rl.nn.transformer_config import TransformerConfig


@pytest.fixture
def record():
    """`record(score=1.0, length=...)`: a record with whatever is given, and something plausible else."""

    def make(**fields):
        defaults = {
            "mode": "generated",
            "task": "line_retrieval",
            "length": 4096,
            "depth": None,
            "index": 0,
            "tokens": 4000,
            "items": 440,
            "answer_depth": 0.5,
            "score": 1.0,
            "chance": 1 / 440,
            "answers": ("1 2 3 4 5",),
            "output": "1 2 3 4 5",
            "negative_log_likelihood": None,
        }
        return SampleRecord(**{**defaults, **fields})

    return make


@pytest.fixture(scope="session")
def tiny_language_model():
    """`tiny_language_model(vocabulary_size=...)`: random weights, one layer."""

    def make(*, vocabulary_size, seed=0):
        transformer = TransformerConfig(
            layers=1,
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
            attention_block_size=64,
            saved_activations="none",
            compute_dtype="float32",
        )
        config = LanguageModelConfig(
            name="language",
            vocabulary_size=vocabulary_size,
            tied_embedding=False,
            embedding_scale=1.0,
            trained_positions=64,
            transformer=transformer,
        )
        return LanguageModel(config, rngs=nnx.Rngs(seed))

    return make
