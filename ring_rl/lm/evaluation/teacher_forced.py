"""Whether a model would have said the answer: one pass over prompt and answer, on the ring, without a cache.

A token of the answer counts as found if it is the most likely one after everything before it. Where all of an answer's
tokens are, greedy decoding from the answer's beginning on would have written them: up to the first wrong token both see
the same text. Not asked is what greedy decoding would say after a wrong one or behind the answer (a longer number, for
one), nor whether it would have come to the answer's beginning, where words stand between it and the prompt; so this is
no measure of an answer in other words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ring_rl.kernels.layout import inverse_permutation, to_layout
from ring_rl.lm.model import LanguageModel
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.typing import Array, Float32, Int32

__all__ = ["ForcedAnswer", "padded_tokens", "teacher_forced"]


@dataclasses.dataclass(frozen=True)
class ForcedAnswer:
    """What a model thinks at each of a row's A answer tokens.

    Attributes:
        most_likely: The token that it would choose.
        targets: The answer's own.
        answer_ids: Which answer of the row each is part of.
        log_probabilities: Of the answer's own tokens.
    """

    most_likely: Int32[np.ndarray, " A"]
    targets: Int32[np.ndarray, " A"]
    answer_ids: Int32[np.ndarray, " A"]
    log_probabilities: Float32[np.ndarray, " A"]


def padded_tokens(length: int, *, multiple: int) -> int:
    """The length that a row of `length` tokens is padded to: at most eight lengths an octave, so few programs.

    Costs at most an eighth more tokens, and what `multiple` asks for.
    """
    coarse = 2 ** max(math.ceil(math.log2(max(length, 1))) - 4, 0)
    quantum = -(-coarse // multiple) * multiple
    return -(-length // quantum) * quantum


def teacher_forced(
    model: LanguageModel,
    rows: Sequence[TokenBatch],
    *,
    parallel: SequenceParallel,
    length_multiple: int,
    batch_size: int,
) -> list[ForcedAnswer]:
    """Reads every row, with its answers in it, in one batch.

    Args:
        model: As trained or loaded.
        rows: One document each, [T], with `answer_ids`; of any lengths.
        parallel: The mesh.
        length_multiple: What a row's tokens must be a multiple of.
        batch_size: Rows of the batch, so that a last, smaller one is no program of its own; filled up with padding, and
            to what the mesh's batch axes divide.

    Raises:
        ValueError: A row holds no answer, or there are more than `batch_size`.
    """
    if len(rows) > batch_size:
        raise ValueError(f"{len(rows)} rows do not fit into a batch of {batch_size}; raise batch_size")
    places_of = [np.flatnonzero(row.answer_ids >= 0) if row.answer_ids is not None else [] for row in rows]
    if not all(map(len, places_of)):
        raise ValueError("a row without an answer cannot be teacher-forced")
    length = padded_tokens(max(len(row.tokens) for row in rows), multiple=length_multiple)
    count = 2 ** math.ceil(math.log2(max(map(len, places_of))))
    shards = math.prod(parallel.size(axis) for axis in parallel.batch_axes)
    batch = -(-batch_size // shards) * shards
    # Padding stands on the right, where causality hides it.
    tokens = np.zeros((batch, length), np.int32)
    slots, wanted = np.zeros((batch, count), np.int32), np.zeros((batch, count), np.int32)
    slot_of = inverse_permutation(length, ring_size=parallel.ring_size, layout=parallel.layout)
    for number, (row, places) in enumerate(zip(rows, places_of, strict=True)):
        tokens[number, : len(row.tokens)] = row.tokens
        slots[number, : len(places)], wanted[number, : len(places)] = slot_of[places], row.targets[places]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    spread = NamedSharding(parallel.mesh, parallel.token_spec)
    by_token = [
        jax.device_put(to_layout(x, axis=1, ring_size=parallel.ring_size, layout=parallel.layout), spread)
        for x in (tokens, positions)
    ]
    graphdef, state = nnx.split(model)
    best, log_probabilities = jax.device_get(_read(graphdef, state, *by_token, slots, wanted, parallel=parallel))
    return [
        ForcedAnswer(
            most_likely=best[number, : len(places)],
            targets=wanted[number, : len(places)],
            answer_ids=np.asarray(row.answer_ids)[places],
            log_probabilities=log_probabilities[number, : len(places)],
        )
        for number, (row, places) in enumerate(zip(rows, places_of, strict=True))
    ]


@partial(jax.jit, static_argnums=0, static_argnames="parallel")
def _read(
    graphdef: Any,
    state: nnx.State,
    tokens: Array,
    positions: Array,
    slots: Array,
    wanted: Array,
    *,
    parallel: SequenceParallel,
) -> tuple[Array, Array]:
    model: LanguageModel = nnx.merge(graphdef, state)
    hidden_BTM = model.hidden(tokens, positions, parallel)
    logits_BAV = model.logits(_rows_at(hidden_BTM, slots, parallel))
    log_probabilities_BAV = jax.nn.log_softmax(logits_BAV)
    said = jnp.take_along_axis(log_probabilities_BAV, wanted[..., None], axis=-1)[..., 0]
    return jnp.argmax(logits_BAV, axis=-1).astype(jnp.int32), said


def _rows_at(hidden: Array, slots: Array, parallel: SequenceParallel) -> Array:
    """hidden[b, slots[b, a]] on every device of the ring; only these rows travel, never the whole sequence."""
    axis = parallel.sequence_axis
    if parallel.sequence_devices == 1:
        return jnp.take_along_axis(hidden, slots[..., None], axis=1)
    rows = PartitionSpec(parallel.token_spec[0])

    def taken(hidden: Array, slots: Array) -> Array:
        index = slots - lax.axis_index(axis) * hidden.shape[1]
        held = (index >= 0) & (index < hidden.shape[1])
        own = jnp.take_along_axis(hidden, jnp.where(held, index, 0)[..., None], axis=1)
        return lax.psum(jnp.where(held[..., None], own, 0), axis)

    return jax.shard_map(taken, mesh=parallel.mesh, in_specs=(parallel.token_spec, rows), out_specs=rows)(hidden, slots)
