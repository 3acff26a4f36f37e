"""Dropout of attention weights that does not depend on how attention is computed.

Whether a weight is kept is a function of (key, batch row, head, query position, key position), all global, and of
nothing else: a counter-based generator instead of a stream. So every strategy, layout, ring size, tile size and
order of work gives the same mask, backward recomputes it instead of storing O(T S) bits, and a device needs only
what it already holds, positions.

    row bits = hash(key, batch row, head, query position)      once a query row
    bits     = hash'(row bits ^ hash(key position))            once a weight, 7 integer operations
    kept     = bits >= rate 2^32

For statistics, not for secrets. Two of n query rows share their bits with probability about n² / 2^33.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ring_rl.typing import Array, Bool, Int, PRNGKeyArray, Shaped, UInt32

# Chosen by a random search among odd multipliers: after `_hash` the flip of any bit flips every bit with a
# probability of 1/2 within 0.004 (a test holds them to it).
_FIRST_MULTIPLIER = np.uint32(0xE782CA53)
_SECOND_MULTIPLIER = np.uint32(0xB129DA9B)
# 2^32 / golden ratio, and its complement: `_hash(0)` is 0, which must not be what a zero word does.
_WORD_OFFSET = np.uint32(0x9E3779B9)
_KEY_OFFSET = np.uint32(0x61C88647)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "first_row", "first_head"], meta_fields=["rate"]
)
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Which attention weights become zero. A pytree: the rate is known when a program is compiled, the rest is data.

    Attributes:
        rate: Share of weights that become zero; the others are multiplied by 1 / (1 - rate).
        key: A typed key or a raw one (uint32 words). Use a new one for each layer and step.
        first_row: Which row of the global batch the first row of the local one is.
        first_head: Which of all query heads the first local one is.
    """

    rate: float
    key: PRNGKeyArray | UInt32[Array, " words"]
    first_row: int | Int[Array, ""] = 0
    first_head: int | Int[Array, ""] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout rate must be in [0, 1), got {self.rate}")


def query_row_bits(dropout: Dropout, *, positions: Int[Array, "b T"], batch: int, heads: int) -> UInt32[Array, "B H T"]:
    """Random bits of each row of weights; `positions` are global, of one row for all of the batch (b = 1) or of each.

    `batch` and `heads` count the local rows and query heads, which start at `dropout.first_row` and `first_head`.

    Raises:
        ValueError: `dropout.key` is a batch of keys, or `positions` are of another number of rows.
    """
    words = jax.random.key_data(dropout.key)
    if words.ndim != 1:
        raise ValueError(f"dropout needs one key, got keys of shape {dropout.key.shape}; split them before")
    if positions.shape[0] not in (1, batch):
        raise ValueError(f"positions of {positions.shape[0]} rows do not fit a batch of {batch}; give 1 row or {batch}")
    state = jnp.uint32(0)
    for word in words:
        state = _absorb(state, word)
    rows = dropout.first_row + jnp.arange(batch)
    local_heads = dropout.first_head + jnp.arange(heads)
    state = _absorb(state, rows[:, None, None])
    state = _absorb(state, local_heads[:, None])
    return _absorb(state, positions[:, None, :])


def kept(row_bits: UInt32[Array, "..."], key_positions: Int[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """Which weights stay, elementwise: give `row_bits[..., :, None]` and `key_positions[..., None, :]`, or reversed.

    P(kept) = 1 - rate, exact to 2^-32.
    """
    key_bits = _hash(key_positions.astype(jnp.uint32) + _KEY_OFFSET)
    bits = _hash_high(row_bits ^ key_bits)
    return bits >= drop_threshold(rate)


def drop_threshold(rate: float) -> np.uint32:
    """Weights whose bits are below it become zero."""
    return np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _hash_high(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """`_hash` but for its last step, which would mend only the low bits: a comparison reads the high ones."""
    x = (x ^ (x >> 16)) * _FIRST_MULTIPLIER
    return (x ^ (x >> 15)) * _SECOND_MULTIPLIER


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words in which every bit depends on all bits."""
    x = _hash_high(x)
    return x ^ (x >> 16)


def _absorb(state: UInt32[Array, "..."], word: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """One more word of a message into a state; for a given state different words give different states."""
    return _hash((state ^ word.astype(jnp.uint32)) + _WORD_OFFSET)
