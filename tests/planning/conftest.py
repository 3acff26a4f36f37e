"""Requests and answers that the tests of this room share."""

import dataclasses

import pytest

from ring_rl.planning.compiled_step import CompiledMemory
from small_steps import small_request


@pytest.fixture(scope="session")
def ring_request():
    """A small model over a ring of two."""
    return small_request(mesh={"sp": 2}, weights_over_ring=True, context=256, loss_chunks=2)


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
