"""Made-up samples of evaluations, and a model that answers at random."""

import pytest
from flax import nnx

from ring_rl.lm.evaluation.cells import SampleRecord
from ring_rl.lm.model import LanguageModel
from small_models import small_language_model, small_transformer


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
        config = small_language_model(
            vocabulary_size=vocabulary_size, transformer=small_transformer(layers=1, attention_block_size=64)
        )
        return LanguageModel(config, rngs=nnx.Rngs(seed))

    return make
