"""Made-up samples of evaluations."""

import pytest

from ring_rl.lm.evaluation.cells import SampleRecord


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
