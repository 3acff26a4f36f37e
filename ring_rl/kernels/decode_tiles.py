"""Decoding in XLA: tiles of new tokens against tiles of a cache's slots, online softmax between them.

Runs on every platform. Work follows what is filled and, with a window, what is seen: the tiles of slots that a tile of
tokens goes over are counted when the program runs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.kernels.cache_slots import Slots
from ring_rl.kernels.local.block import Scoring
from ring_rl.kernels.mask import Mask, visible
from ring_rl.kernels.online_softmax import Partial
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Bool, Float, Float32


class Cache(NamedTuple):
    """One device's slots."""

    k: Array
    v: Array
    segment_ids: Array | None
    slots: Slots

    def tile(self, start: Array | int, size: int) -> tuple[Array, Array, Array | None]:
        """(k, v, segment ids) of the slots start, ..., start + size - 1."""
        cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)  # noqa: E731
        return cut(self.k, 2), cut(self.v, 2), None if self.segment_ids is None else cut(self.segment_ids, 1)


def attend_by_tiles(
    q_BTHD: Array,
    segments_BT: Array | None,
    length_b: Array,
    cache: Cache,
    mask: Mask,
    scoring: Scoring,
    alibi_slopes: Array | None,
    tile_size: int,
) -> Partial:
    """The softmax over this device's slots, by tiles of queries and, within each, tiles of slots."""
    B, T, H, D = q_BTHD.shape
    K = cache.k.shape[1]
    stop_b = length_b + T
    count = -(-T // tile_size)
    rows = -(-T // count)
    slots_a_tile = min(cache.slots.count, tile_size * min(4, max(1, tile_size // rows)))

    def attend_rows(index, q_BtHD, segments_Bt) -> Partial:
        positions_bt = length_b[:, None] + index * rows + jnp.arange(rows)
        q_BKGtD = jnp.moveaxis(q_BtHD.reshape(B, rows, K, H // K, D), 1, 3)

        def extend(j, partial):
            # The last tile is moved back to end at the last slot; what it shares with the one before is hidden.
            start = jnp.minimum(j * slots_a_tile, cache.slots.count - slots_a_tile)
            k_BKsD, v_BKsD, key_segments_Bs = cache.tile(start, slots_a_tile)
            slot_s = start + jnp.arange(slots_a_tile)
            key_positions_bs = jnp.broadcast_to(cache.slots.position(slot_s), (length_b.shape[0], slots_a_tile))
            seen_bts = visible(mask, positions_bt, key_positions_bs, segments_Bt, key_segments_Bs)
            seen_bts &= (slot_s >= j * slots_a_tile) & (key_positions_bs < stop_b[:, None])[:, None]
            logits_BKGts = scoring.scale * float32_einsum("bkgtd,bksd->bkgts", q_BKGtD, k_BKsD)
            if scoring.soft_cap is not None:
                logits_BKGts = scoring.soft_cap * jnp.tanh(logits_BKGts / scoring.soft_cap)
            if alibi_slopes is not None:
                distance_bts = jnp.abs(positions_bt[:, :, None] - key_positions_bs[:, None, :]).astype(jnp.float32)
                slopes_KG = alibi_slopes.astype(jnp.float32).reshape(K, H // K)
                logits_BKGts -= slopes_KG[:, :, None, None] * distance_bts[:, None, None]
            return _extend(partial, logits_BKGts, seen_bts, v_BKsD)

        zeros_BKGtD = jnp.zeros(q_BKGtD.shape, jnp.float32)
        empty_BKGt = jnp.full(q_BKGtD.shape[:-1], -jnp.inf)
        partial = vary_alike(zeros_BKGtD, empty_BKGt, zeros_BKGtD[..., 0], q_BKGtD, cache.k, length_b)[:3]
        if slots_a_tile == cache.slots.count:
            partial = extend(0, partial)
        else:
            low, high = _seen_stretch(mask, length_b, T, first=index * rows, rows=rows)
            first, end = cache.slots.before(low) // slots_a_tile, -(-cache.slots.before(high) // slots_a_tile)
            partial = lax.fori_loop(first, end, extend, partial)
        numerator_BKGtD, maximum_BKGt, denominator_BKGt = partial
        rows_BHt = (B, H, rows)
        return Partial(
            numerator_BKGtD.reshape(B, H, rows, D),
            maximum_BKGt.reshape(rows_BHt),
            denominator_BKGt.reshape(rows_BHt),
        )

    if count == 1:
        return attend_rows(0, q_BTHD, segments_BT)
    tiles = lambda x: None if x is None else _row_tiles(x, count, rows)  # noqa: E731
    operands = (jnp.arange(count), tiles(q_BTHD), tiles(segments_BT))
    numerator, maximum, denominator = lax.map(lambda operand: attend_rows(*operand), operands)
    joined = lambda x: jnp.moveaxis(x, 0, 2).reshape(B, H, count * rows, *x.shape[4:])[:, :, :T]  # noqa: E731
    return Partial(joined(numerator), joined(maximum), joined(denominator))


def _extend(
    partial: tuple[Array, Array, Array],
    logits_BKGts: Float32[Array, "B K G t s"],
    seen_bts: Bool[Array, "b t s"],
    v_BKsD: Float[Array, "B K s D"],
) -> tuple[Array, Array, Array]:
    """One step of the online softmax."""
    numerator, maximum, denominator = partial
    logits_BKGts = jnp.where(seen_bts[:, None, None], logits_BKGts, -jnp.inf)
    new_maximum = jnp.maximum(maximum, jnp.max(logits_BKGts, axis=-1))
    # -inf - -inf is NaN; rows that have seen nothing need weights of zero, which any finite maximum gives.
    finite = jnp.where(new_maximum > -jnp.inf, new_maximum, 0.0)
    weights_BKGts = jnp.exp(logits_BKGts - finite[..., None])
    kept = jnp.exp(maximum - finite)
    value = float32_einsum("bkgts,bksd->bkgtd", weights_BKGts.astype(v_BKsD.dtype), v_BKsD)
    return kept[..., None] * numerator + value, new_maximum, kept * denominator + jnp.sum(weights_BKGts, axis=-1)


def _seen_stretch(mask: Mask, length_b: Array, tokens: int, *, first, rows: int) -> tuple[Array, Array]:
    """Positions [low, high) outside of which no row's new tokens first .. first + rows - 1 see anything."""
    back, ahead = mask.reach()
    written = jnp.max(length_b) + tokens
    low = jnp.int32(0) if back is None else jnp.maximum(jnp.min(length_b) + first - back, 0)
    high = written if ahead is None else jnp.minimum(jnp.max(length_b) + first + rows + ahead, written)
    return low, high


def _row_tiles(x_BT: Array, count: int, rows: int) -> Array:
    """[B, T, ...] -> [count, B, rows, ...], padded with zeros at the end."""
    B, T, *rest = x_BT.shape
    x_BT = jnp.pad(x_BT, [(0, 0), (0, count * rows - T)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x_BT.reshape(B, count, rows, *rest), 1, 0)
