"""Requests and answers that the tests of this room share."""

import dataclasses

import pytest

from ring_rl.planning.compiled_step import CompiledMemory, StepRequest
from ring_rl.training.mesh import MeshConfig
from ring_rl.training.optimizer import AdamWConfig
from small_models import small_language_model


@pytest.fixture(scope="session")
def ring_request():
    """A small model over a ring of two."""
    optimizer = AdamWConfig(
        name="adamw",
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup_steps=0,
        schedule="constant",
        final_learning_rate_fraction=1.0,
        gradient_clip_norm=None,
        beta1=0.9,
        beta2=0.98,
    )
    return StepRequest(
        model=small_language_model(),
        mesh=MeshConfig(dp=1, fsdp=1, tp=1, sp=2),
        layout="zigzag",
        strategy="ring",
        ulysses_size=1,
        weights_over_ring=True,
        context=256,
        batch_size=1,
        loss_chunks=2,
        optimizer=optimizer,
        attention_block="auto",
    )


@pytest.fixture(scope="session")
def compiled():
    """`compiled(peak_bytes=1000)`: an answer of a compiler."""

    def answer(**changes):
        said = CompiledMemory(
            peak_bytes=1000,
            wanted_bytes=None,
            limit_bytes=None,
            state_bytes=100,
            attention_block="auto",
            lower_seconds=1.0,
            compile_seconds=2.0,
        )
        return dataclasses.replace(said, **changes)

    return answer
