"""The optimizer that tests share: each test names only the fields that it is about, or that it needs otherwise."""

import dataclasses
from typing import Any

from ring_rl.training.optimizer import AdamWConfig


def adamw(**changes: Any) -> AdamWConfig:
    """AdamW with a short warm-up, a cosine and clipping; `changes` are fields of `AdamWConfig`."""
    common = AdamWConfig(
        name="adamw",
        learning_rate=1e-3,
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.95,
        warmup_steps=5,
        schedule="cosine",
        final_learning_rate_fraction=0.1,
        gradient_clip_norm=1.0,
    )
    return dataclasses.replace(common, **changes)
