"""Small training steps that the planner's tests share: each test names only what it is about."""

import dataclasses
from typing import Any

from ring_rl.planning.compiled_step import StepRequest
from ring_rl.training.mesh import MeshConfig
from small_models import small_language_model, small_transformer
from small_optimizer import adamw


def small_request(
    *, transformer: dict[str, Any] | None = None, mesh: dict[str, int] | None = None, **changes: Any
) -> StepRequest:
    """One sequence of 64 tokens on one device; `transformer` and `mesh` change theirs, `changes` the request."""
    vocabulary_size = changes.pop("vocabulary_size", 32)
    model = small_language_model(
        transformer=small_transformer(**(transformer or {})),
        vocabulary_size=vocabulary_size,
        tied_embedding=changes.pop("tied_embedding", False),
    )
    small = StepRequest(
        model=model,
        mesh=MeshConfig(**{"dp": 1, "fsdp": 1, "tp": 1, "sp": 1, **(mesh or {})}),
        layout="zigzag",
        strategy="ring",
        ulysses_size=1,
        weights_over_ring=False,
        context=64,
        batch_size=1,
        loss_chunks=1,
        optimizer=adamw(),
        attention_block="auto",
        heads_at_once=None,
    )
    return dataclasses.replace(small, **changes)
