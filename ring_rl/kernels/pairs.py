"""How many pairs of a query and a key see one another: all work of attention is proportional to it.

Counted exactly and without writing the pairs down. A device's tokens are one or two arithmetic progressions, whatever
the layout, and among two progressions the pairs at least d positions apart are a sum of clipped consecutive integers,
which has a closed form. From that follow full, causal and windowed masks; block causality is summed over its blocks.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ring_rl.kernels.layout import Layout, check_length
from ring_rl.kernels.mask import Mask
from ring_rl.typing import Int

# Beyond it a number of pairs no longer fits in 64 bits.
LONGEST_LENGTH = 2**31
# Blocks of block causality that are counted at once: bounds memory at 8 bytes x devices x this.
_BLOCKS_AT_ONCE = 2**14


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """On each device R the positions start + stride r for 0 <= r < count."""

    start: Int[np.ndarray, " R"]
    count: Int[np.ndarray, " R"]
    stride: int

    def below(self, bounds_X: Int[np.ndarray, " X"]) -> Int[np.ndarray, "R X"]:
        """How many of a device's positions are smaller than each bound."""
        steps_RX = -((self.start[:, None] - bounds_X) // self.stride)
        return np.clip(steps_RX, 0, self.count[:, None])

    def within(self, start: int, stop: int) -> "_Tokens":
        """Those among the positions start, ..., stop - 1."""
        first_R, last_R = self.below(np.array([start, stop])).T
        return _Tokens(self.start + self.stride * first_R, last_R - first_R, self.stride)


def visible_pairs(mask: Mask, length: int, document_lengths: Sequence[int] | None = None) -> int:
    """Number of (query, key) pairs that see one another in one sequence: the sum of the dense mask.

        full            T²
        causal          T (T + 1) / 2
        causal, W <= T  T W - W (W - 1) / 2

    Args:
        mask: What may attend to what.
        length: T, tokens.
        document_lengths: Tokens of each document packed into the sequence, one after the other; what they leave over
            is padding, which sees nothing. None is one document of T tokens.

    Raises:
        ValueError: Impossible lengths.

    O(documents) time; with blocks of b > 1 tokens O(T / b).
    """
    pairs = device_pairs(mask, layout="contiguous", tokens=length, ring_size=1, document_lengths=document_lengths)
    return int(pairs.sum())


def device_pairs(
    mask: Mask, *, layout: Layout, tokens: int, ring_size: int, document_lengths: Sequence[int] | None = None
) -> Int[np.ndarray, "R R"]:
    """Entry (i, j): pairs of a query that device i holds and a key that device j holds which see one another.

    Args:
        mask: What may attend to what.
        layout: Which tokens a device holds.
        tokens: Length of the whole sequence.
        ring_size: Number of devices.
        document_lengths: As in `visible_pairs`, in natural order.

    Raises:
        ValueError: The ring does not divide the sequence, or impossible lengths.
    """
    check_length(tokens, ring_size=ring_size, layout=layout)
    if tokens > LONGEST_LENGTH:
        raise ValueError(f"sequence length {tokens} is beyond {LONGEST_LENGTH}, where pairs overflow 64 bits")
    parts = _held_tokens(layout, tokens=tokens, ring_size=ring_size)
    pairs_RR = np.zeros((ring_size, ring_size), np.int64)
    for start, stop in _documents(tokens, document_lengths):
        document = [part.within(start, stop) for part in parts]
        for queries in document:
            for keys in document:
                pairs_RR += _count(mask, queries, keys)
    return pairs_RR


def hop_pairs(
    mask: Mask, *, layout: Layout, tokens: int, ring_size: int, document_lengths: Sequence[int] | None = None
) -> Int[np.ndarray, "R R"]:
    """Entry (t, i): pairs that device i computes at hop t of a ring, where it holds the keys of device i - t (mod R).

    Arguments and errors as in `device_pairs`. Hop 0 is the device's own block.
    """
    pairs_RR = device_pairs(mask, layout=layout, tokens=tokens, ring_size=ring_size, document_lengths=document_lengths)
    device_R = np.arange(ring_size)
    return pairs_RR[device_R, (device_R - device_R[:, None]) % ring_size]


def work_balance(
    mask: Mask,
    *,
    layout: Layout,
    tokens: int,
    ring_size: int,
    lockstep: bool = True,
    document_lengths: Sequence[int] | None = None,
) -> float:
    """How many times longer the devices take together than if all pairs were shared evenly; 1 is perfect.

        lockstep       Σ_t max_i pairs(t, i) / mean_i Σ_t pairs(t, i)
        otherwise      max_i Σ_t pairs(t, i) / mean_i Σ_t pairs(t, i)

    In a ring devices wait for one another's keys at every hop (lockstep); those that gathered all keys only meet at
    the end. For long causal sequences, in lockstep: contiguous 2 - 1/R, zigzag and striped 1.

    Raises:
        ValueError: As in `device_pairs`, or nothing is visible at all.
    """
    pairs_RR = hop_pairs(mask, layout=layout, tokens=tokens, ring_size=ring_size, document_lengths=document_lengths)
    if not pairs_RR.any():
        raise ValueError("no token sees any other, so there is no work to balance; give at least one document")
    busiest = pairs_RR.max(axis=1).sum() if lockstep else pairs_RR.sum(axis=0).max()
    return float(busiest / pairs_RR.sum(axis=0).mean())


def _held_tokens(layout: Layout, *, tokens: int, ring_size: int) -> list[_Tokens]:
    """What each device holds, as progressions: two in zigzag, else one."""
    device_R = np.arange(ring_size)
    share = tokens // ring_size
    if layout == "striped":
        return [_Tokens(device_R, np.full(ring_size, share), ring_size)]
    if layout == "contiguous":
        return [_Tokens(device_R * share, np.full(ring_size, share), 1)]
    chunk_R = np.full(ring_size, share // 2)
    return [_Tokens(chunk_R * chunk, chunk_R, 1) for chunk in (device_R, 2 * ring_size - 1 - device_R)]


def _documents(length: int, document_lengths: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    """First and last-plus-one position of each document."""
    if document_lengths is None:
        document_lengths = [length]
    if any(n < 1 for n in document_lengths):
        raise ValueError(f"documents have at least 1 token, got {min(document_lengths)}; leave empty ones out")
    if sum(document_lengths) > length:
        raise ValueError(f"documents of {sum(document_lengths)} tokens do not fit into a sequence of {length}")
    stop = 0
    for document_length in document_lengths:
        start, stop = stop, stop + document_length
        yield start, stop


def _count(mask: Mask, queries: _Tokens, keys: _Tokens) -> Int[np.ndarray, "R R"]:
    """Visible pairs of each device's queries with each device's keys."""
    if not mask.causal:
        if mask.window is None:
            return np.outer(queries.count, keys.count)
        return _at_least(1 - mask.window, queries, keys) - _at_least(mask.window, queries, keys)
    shown_RR = _at_least(0, queries, keys) if mask.causal_block_size == 1 else _block_causal(mask, queries, keys)
    # What lies W or more behind is visible without the window, as it is causal whatever the blocks.
    return shown_RR if mask.window is None else shown_RR - _at_least(mask.window, queries, keys)


def _at_least(distance: int, queries: _Tokens, keys: _Tokens) -> Int[np.ndarray, "R R"]:
    """Pairs whose query is at least `distance` positions after its key.

    In steps of the stride that is r - r' >= e, so Σ_r clip(r - e + 1, 0, number of keys).
    """
    apart_RR = distance - queries.start[:, None] + keys.start
    e_RR = -(-apart_RR // queries.stride)
    most_RR = np.broadcast_to(keys.count, e_RR.shape)
    return _clipped_sum(queries.count[:, None] - e_RR + 1, most_RR) - _clipped_sum(1 - e_RR, most_RR)


def _clipped_sum(stop: Int[np.ndarray, "*b"], most: Int[np.ndarray, "*b"]) -> Int[np.ndarray, "*b"]:
    """Σ_{y < stop} clip(y, 0, most)."""
    rising = np.clip(stop, 0, most + 1)
    return rising * (rising - 1) // 2 + most * np.maximum(stop - most - 1, 0)


def _block_causal(mask: Mask, queries: _Tokens, keys: _Tokens) -> Int[np.ndarray, "R R"]:
    """Σ over blocks of the queries in the block times the keys before the block's end."""
    size = mask.causal_block_size
    first = int(queries.start.min()) // size
    last = int((queries.start + queries.stride * queries.count).max()) // size
    pairs_RR = np.zeros((len(queries.start), len(keys.start)), np.int64)
    for block in range(first, last + 1, _BLOCKS_AT_ONCE):
        ends_X = size * (1 + np.arange(block, min(block + _BLOCKS_AT_ONCE, last + 1)))
        inside_RX = queries.below(ends_X) - queries.below(ends_X - size)
        pairs_RR += inside_RX @ keys.below(ends_X).T
    return pairs_RR
