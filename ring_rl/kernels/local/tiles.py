"""Tiles of queries against tiles of keys: how lengths are cut, and which tiles anybody can see.

Visibility is judged by what a tile spans: the least and greatest position and segment id of its tokens. A tile of
scores is *reachable* unless the spans prove that nobody in it sees anybody, and *open* if they prove that everybody
sees everybody. Along a row (or column) of tiles the reachable ones lie in [first, stop), of which [open_first,
open_stop) are open: so a row is three loops, masked, unmasked, masked, and what lies outside is never computed.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ring_rl.kernels.local.block import Relation
from ring_rl.kernels.tokens import Keys, Queries
from ring_rl.typing import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """`count` tiles of `size` tokens, the last one with `padding` tokens that do not exist."""

    count: int
    size: int
    padding: int

    @staticmethod
    def of(length: int, largest: int) -> "Tiling":
        """The fewest tiles of at most `largest` tokens, made as even as they go."""
        count = -(-length // largest)
        size = -(-length // count)
        return Tiling(count, size, count * size - length)


class Bounds(NamedTuple):
    """Per row of tiles: reachable are [first, stop), of these open are [open_first, open_stop)."""

    first: Int[Array | np.ndarray, "*b rows"]
    open_first: Int[Array | np.ndarray, "*b rows"]
    open_stop: Int[Array | np.ndarray, "*b rows"]
    stop: Int[Array | np.ndarray, "*b rows"]

    def known_equal(self, one: str, other: str) -> bool:
        """Whether it is known now that two of them are the same in every row."""
        a, b = getattr(self, one), getattr(self, other)
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and bool(np.all(a == b))


def visible_tiles(
    queries: Queries, keys: Keys, *, relation: Relation, rows: Tiling, columns: Tiling
) -> tuple[Bool[Array | np.ndarray, "*b rows columns"], Bool[Array | np.ndarray, "*b rows columns"]]:
    """(reachable, open) for every tile; numpy, known now, unless positions or segments decide it. b is the batch."""
    reachable = np.ones((rows.count, columns.count), bool)
    is_open = np.broadcast_to(np.arange(columns.count) < columns.count - (columns.padding > 0), reachable.shape)
    if relation.mask.needs_positions:
        by_position = _by_position(queries, keys, relation, rows, columns)
        reachable, is_open = reachable & by_position[0], is_open & by_position[1]
    if queries.segment_ids is not None and keys.segment_ids is not None:
        a_low, a_high = _spans(queries.segment_ids, rows)
        b_low, b_high = _spans(keys.segment_ids, columns)
        a_low, a_high, b_low, b_high = a_low[..., None], a_high[..., None], b_low[..., None, :], b_high[..., None, :]
        reachable = reachable & (a_low <= b_high) & (b_low <= a_high) & (a_high >= 0) & (b_high >= 0)
        is_open = is_open & (a_low == a_high) & (b_low == b_high) & (a_low == b_low) & (a_low >= 0)
    return reachable, is_open


def bounds(reachable: Bool[Array | np.ndarray, "*b rows columns"], is_open: Bool[Array | np.ndarray, "..."]) -> Bounds:
    """Where each row's reachable and open tiles begin and end; transpose both for the bounds of columns."""
    numpy = np if isinstance(reachable, np.ndarray) and isinstance(is_open, np.ndarray) else jnp
    count = reachable.shape[-1]
    index = np.arange(count, dtype=np.int32)
    least = lambda shown: numpy.min(numpy.where(shown, index, count), axis=-1)  # noqa: E731
    stop = numpy.max(numpy.where(reachable, index + 1, 0), axis=-1)
    first = numpy.minimum(least(reachable), stop)
    # Where none is open the masked ones are those after it: causal rows need no loop before their open tiles.
    open_first = numpy.where(least(is_open) < stop, least(is_open), first)
    closed_after = ~is_open & (index >= open_first[..., None])
    open_stop = numpy.maximum(numpy.minimum(least(closed_after), stop), open_first)
    return Bounds(*(x.astype(np.int32) for x in (first, open_first, open_stop, stop)))


def _by_position(queries: Queries, keys: Keys, relation: Relation, rows: Tiling, columns: Tiling):
    mask = relation.mask
    if relation.offset is not None:
        p_low, p_high = _static_spans(rows, relation.offset)
        s_low, s_high = _static_spans(columns, 0)
    else:
        p_low, p_high = _spans(queries.positions, rows)
        s_low, s_high = _spans(keys.positions, columns)
    p_low, p_high, s_low, s_high = p_low[..., None], p_high[..., None], s_low[..., None, :], s_high[..., None, :]
    reachable, is_open = True, True
    if mask.causal:
        block = mask.causal_block_size
        reachable = s_low // block <= p_high // block
        is_open = s_high // block <= p_low // block
    if mask.window is not None:
        reachable = reachable & (p_low - s_high < mask.window)
        is_open = is_open & (p_high - s_low < mask.window)
        if not mask.causal:
            reachable = reachable & (s_low - p_high < mask.window)
            is_open = is_open & (s_high - p_low < mask.window)
    return reachable, is_open


def _static_spans(tiling: Tiling, offset: int) -> tuple[np.ndarray, np.ndarray]:
    length = tiling.count * tiling.size - tiling.padding
    low = np.arange(tiling.count) * tiling.size
    return offset + low, offset + np.minimum(low + tiling.size, length) - 1


def _spans(x: Int[Array, "b T"], tiling: Tiling) -> tuple[Array, Array]:
    """Least and greatest of each tile, [b, count]."""
    tiles = jnp.pad(x, ((0, 0), (0, tiling.padding)), mode="edge").reshape(x.shape[0], tiling.count, tiling.size)
    return jnp.min(tiles, axis=-1), jnp.max(tiles, axis=-1)
