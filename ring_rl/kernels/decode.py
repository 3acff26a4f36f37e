"""New tokens against a cache of keys and values, on one device or spread over a mesh axis.

The cache never moves. Each of R devices attends the new tokens to the slots it holds, and the R softmaxes in progress
merge: what travels is one output a new token, not the cache.

Blocks of `slot_block` positions are dealt round robin, so that a growing cache is balanced from its first tokens on:

    device of position p    p // slot_block mod R
    slot on that device     p // slot_block // R * slot_block  +  p mod slot_block

A device's slots are thus in order of position, and with R = 1 the slot is the position.

Everything here is for inference: gradients are not defined.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax, vmap

from ring_rl.kernels.accumulate import float32_einsum
from ring_rl.kernels.local.block import Scoring
from ring_rl.kernels.mask import CAUSAL, Mask, visible
from ring_rl.kernels.online_softmax import Partial, finish
from ring_rl.kernels.varying import vary_alike
from ring_rl.typing import Array, Bool, Float, Float32, Int, Int32

DEFAULT_SLOT_BLOCK = 128
DEFAULT_TILE_SIZE = 1024


def decode_attention(
    q: Float[Array, "B T H D"],
    k_cache: Float[Array, "B K S D"],
    v_cache: Float[Array, "B K S D"],
    *,
    length: Int[Array, ""] | Int[Array, " B"] | int,
    mask: Mask = CAUSAL,
    axis_name: str | None = None,
    slot_block: int = DEFAULT_SLOT_BLOCK,
    sharded_tokens: bool = False,
    segment_ids: Int32[Array, "B T"] | None = None,
    cache_segment_ids: Int32[Array, "B S"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, " H"] | None = None,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Float[Array, "B T H D"]:
    """Attention of T new tokens, at positions length .. length + T - 1, to a cache that already holds them.

    Equal to the last T rows of attention over length + T tokens: one token (T = 1) or a chunk of a prompt, thousands
    of tokens, alike. Slots of later positions are ignored, whatever finite values they hold. A cache keeps heads
    before slots, so that a product reads the slots of one head from one stretch of memory; at one token a time
    reading the cache is all the cost.

    On a mesh axis (under `jax.shard_map` or `jax.vmap(axis_name=...)`) the caches are this device's slots and q is
    the same everywhere, as is the result. With `sharded_tokens`, which suits long chunks, q is this device's part of
    the chunk in contiguous layout, and so is the result: queries are gathered, outputs summed and scattered.

    Cost: O(B H T n D) work for the n slots a device has filled: work follows what is filled and, with a window, what
    is seen, not the capacity. Memory beyond the inputs and O(B T H D): one tile of scores, B H tile_size² float32
    at most. With an axis, one all-reduce of B T H (D + 1) float32 and one of B H T.

    Args:
        length: Tokens cached before the new ones; one number a row where rows differ. A prompt padded on its right
            needs nothing else under a causal mask: write it, then go on from each row's own length.
        mask: The rule over positions. One that looks ahead (block-causal, full) sees tokens that are in the cache,
            so with it the chunks given must be whole blocks to equal one call over all tokens.
        axis_name: Mesh axis whose devices share the slots; None: k_cache and v_cache are all there is.
        slot_block: Positions dealt to a device at a time, as in `write_cache`.
        segment_ids: Documents of the new tokens, and `cache_segment_ids` those in the slots (`write_segment_ids`).
        scale: Multiplies q·k; 1/√D if None.
        soft_cap: Logits become soft_cap tanh(logit / soft_cap).
        alibi_slopes: Logits lose slope_h |query position - key position|.
        tile_size: Largest edge of a tile of scores. Few queries take longer tiles, of up to 4 times as many slots.
            A tile of k and v that fits a CPU's cache is fastest there; an accelerator that decodes one token at a
            time against a long cache does better with fewer, larger tiles.

    Raises:
        ValueError: Shapes that do not fit one another, one of two segment ids, a slot count that `slot_block` does
            not divide. Not for length + T > capacity, which is data: see `check_capacity`.
    """
    _check(q, k_cache, v_cache, segment_ids, cache_segment_ids, sharded_tokens, axis_name, tile_size)
    if sharded_tokens:
        q = lax.all_gather(q, axis_name, axis=1, tiled=True)
        if segment_ids is not None:
            segment_ids = lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    cache = _Cache(k_cache, v_cache, cache_segment_ids, _Slots.of(k_cache, axis_name, slot_block))
    scoring = Scoring(scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale, soft_cap=soft_cap)
    length_b = jnp.atleast_1d(jnp.asarray(length, jnp.int32))
    partial = _attend(q, segment_ids, length_b, cache, mask, scoring, alibi_slopes, tile_size)
    if axis_name is not None:
        partial = _merge_over_devices(partial, axis_name, scatter=sharded_tokens)
    return jnp.swapaxes(finish(partial)[0], 1, 2).astype(q.dtype)


def write_cache(
    k_cache: Float[Array, "B K S D"],
    v_cache: Float[Array, "B K S D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    *,
    length: Int[Array, ""] | Int[Array, " B"] | int,
    axis_name: str | None = None,
    slot_block: int = DEFAULT_SLOT_BLOCK,
    sharded_tokens: bool = False,
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]:
    """The caches with the keys and values of T new tokens at positions length .. length + T - 1.

    Arguments as in `decode_attention`; every device keeps what falls into its own slots. A jit that is given the
    caches as donated arguments writes in place: O(B K T D) work and memory, whatever the capacity. Tokens beyond the
    capacity are dropped; nothing that is cached is overwritten by them (`check_capacity` tells beforehand).

    Raises:
        ValueError: Tokens of another batch, number of heads or width than the cache's.
    """
    (B, K, _, D), shape = k_cache.shape, k.shape
    if k.shape != v.shape or k_cache.shape != v_cache.shape or (shape[0], *shape[2:]) != (B, K, D):
        raise ValueError(
            f"k and v must be [{B}, tokens, {K}, {D}] for caches {k_cache.shape} and {v_cache.shape}, "
            f"got {k.shape} and {v.shape}"
        )
    slots = _Slots.of(k_cache, axis_name, slot_block)
    if sharded_tokens:
        k, v = (lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (k, v))
    heads_first = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    return (
        _write(k_cache, heads_first(k), length=length, slots=slots),
        _write(v_cache, heads_first(v), length=length, slots=slots),
    )


def write_segment_ids(
    cache_segment_ids: Int32[Array, "B S"],
    segment_ids: Int32[Array, "B T"],
    *,
    length: Int[Array, ""] | Int[Array, " B"] | int,
    axis_name: str | None = None,
    slot_block: int = DEFAULT_SLOT_BLOCK,
    sharded_tokens: bool = False,
) -> Int32[Array, "B S"]:
    """`write_cache` for the segment ids of packed documents."""
    if sharded_tokens:
        segment_ids = lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    cache_B1S1 = cache_segment_ids[:, None, :, None]
    slots = _Slots.of(cache_B1S1, axis_name, slot_block)
    return _write(cache_B1S1, segment_ids[:, None, :, None], length=length, slots=slots)[:, 0, :, 0]


def slot_positions(slots: int, *, ring_size: int, slot_block: int = DEFAULT_SLOT_BLOCK) -> Int32[np.ndarray, " slots"]:
    """The position that each slot of a whole cache holds, the devices' slots one after the other.

    `x[..., slot_positions(...), :]` brings keys in the order of their positions into that of a cache that is then
    sharded over `ring_size` devices; `np.argsort` of it is the way back.
    """
    if slots % ring_size:
        raise ValueError(f"{slots} slots cannot be shared by {ring_size} devices; use a multiple of {ring_size}")
    count = slots // ring_size
    check_slots(count, ring_size=ring_size, slot_block=slot_block)
    local = np.arange(count, dtype=np.int32)
    of = [_Slots(device, ring_size, slot_block, count).position(local) for device in range(ring_size)]
    return np.concatenate(of).astype(np.int32)


def check_slots(slots: int, *, ring_size: int, slot_block: int) -> None:
    """Raises ValueError unless each of `ring_size` devices can keep whole blocks in its `slots` slots."""
    if slot_block < 1:
        raise ValueError(f"slot_block must be at least 1 position, got {slot_block}")
    if ring_size > 1 and slots % slot_block:
        fit = -(-slots // slot_block) * slot_block
        raise ValueError(f"{slots} cache slots a device are not divisible by slot_block {slot_block}; use {fit}")


def check_capacity(length: int | np.ndarray | Array, *, new_tokens: int, capacity: int) -> None:
    """Raises ValueError unless every row has room for `new_tokens` after its `length` cached ones.

    For the host, before a step: under jit `length` is not known yet, and an overfull cache drops the tokens it has no
    slot for, so that they do not see themselves. `capacity` is that of all devices together.
    """
    longest = int(np.max(np.asarray(length)))
    if longest + new_tokens > capacity:
        raise ValueError(
            f"{longest} cached and {new_tokens} new tokens need {longest + new_tokens} cache slots, but there are "
            f"{capacity}; make a larger cache or feed at most {max(capacity - longest, 0)} tokens"
        )


@dataclasses.dataclass(frozen=True)
class _Slots:
    """Which positions the `count` slots of one device hold."""

    device: int | Array
    ring_size: int
    block: int
    count: int

    @staticmethod
    def of(cache: Array, axis_name: str | None, slot_block: int) -> "_Slots":
        count = cache.shape[2]
        if axis_name is None:
            return _Slots(0, 1, slot_block, count)
        ring_size = lax.axis_size(axis_name)
        check_slots(count, ring_size=ring_size, slot_block=slot_block)
        return _Slots(lax.axis_index(axis_name), ring_size, slot_block, count)

    def position(self, slot):
        if self.ring_size == 1:
            return slot
        return (slot // self.block * self.ring_size + self.device) * self.block + slot % self.block

    def before(self, position: Array) -> Array:
        """How many slots lie before the first one that holds `position` (not negative) or a later one."""
        if self.ring_size == 1:
            return jnp.minimum(position, self.count)
        blocks, rest = position // self.block, position % self.block
        whole = (blocks - self.device + self.ring_size - 1) // self.ring_size * self.block
        return jnp.minimum(whole + jnp.where(blocks % self.ring_size == self.device, rest, 0), self.count)

    def most(self, tokens: int) -> int:
        """The most slots that `tokens` consecutive positions, wherever they start, can fill."""
        if self.ring_size == 1:
            return min(tokens, self.count)
        blocks = (tokens + self.block - 2) // self.block + 1
        return min(tokens, -(-blocks // self.ring_size) * self.block, self.count)


class _Cache(NamedTuple):
    k: Array
    v: Array
    segment_ids: Array | None
    slots: _Slots

    def tile(self, start: Array | int, size: int) -> tuple[Array, Array, Array | None]:
        cut = lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)  # noqa: E731
        return cut(self.k, 2), cut(self.v, 2), None if self.segment_ids is None else cut(self.segment_ids, 1)


def _write(cache_BKSD: Array, new_BKTD: Array, *, length, slots: _Slots) -> Array:
    """New tokens fill consecutive slots of a device: read that stretch, put in what is new, write it back.

    One slice in, one out: compilers update a donated cache in place, which a scatter of single tokens may not be.
    """
    tokens, width = new_BKTD.shape[2], slots.most(new_BKTD.shape[2])

    def write(cache, new, length):
        start = jnp.minimum(slots.before(length), slots.count - width)
        token = slots.position(start + jnp.arange(width)) - length
        fresh = ((token >= 0) & (token < tokens))[:, None]
        old = lax.dynamic_slice_in_dim(cache, start, width, axis=-2)
        new = jnp.take(new, jnp.clip(token, 0, tokens - 1), axis=-2).astype(cache.dtype)
        return lax.dynamic_update_slice_in_dim(cache, jnp.where(fresh, new, old), start, axis=-2)

    length = jnp.asarray(length, jnp.int32)
    return (vmap(write) if length.ndim else write)(cache_BKSD, new_BKTD, length)


def _attend(
    q_BTHD: Array,
    segments_BT: Array | None,
    length_b: Array,
    cache: _Cache,
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


def _merge_over_devices(partial: Partial, axis_name: str, *, scatter: bool) -> Partial:
    """The softmax over all devices' slots: whole on each of them, or each its part of the tokens."""
    maximum_BHT = lax.pmax(partial.maximum, axis_name)
    kept_BHT = jnp.exp(partial.maximum - jnp.where(maximum_BHT > -jnp.inf, maximum_BHT, 0.0))
    numerator_BHTD, denominator_BHT = kept_BHT[..., None] * partial.numerator, kept_BHT * partial.denominator
    if not scatter:
        return Partial(lax.psum(numerator_BHTD, axis_name), maximum_BHT, lax.psum(denominator_BHT, axis_name))
    tokens = maximum_BHT.shape[2] // lax.axis_size(axis_name)
    return Partial(
        lax.psum_scatter(numerator_BHTD, axis_name, scatter_dimension=2, tiled=True),
        lax.dynamic_slice_in_dim(maximum_BHT, lax.axis_index(axis_name) * tokens, tokens, axis=2),
        lax.psum_scatter(denominator_BHT, axis_name, scatter_dimension=2, tiled=True),
    )


def _check(q, k_cache, v_cache, segment_ids, cache_segment_ids, sharded_tokens, axis_name, tile_size) -> None:
    """Raises ValueError for what can be known while tracing."""
    H, K = q.shape[2], k_cache.shape[1]
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"k_cache {k_cache.shape} and v_cache {v_cache.shape} differ in shape")
    if (q.shape[0], q.shape[3]) != (k_cache.shape[0], k_cache.shape[3]):
        raise ValueError(
            f"q {q.shape} and the cache {k_cache.shape} differ in batch or head dimension; "
            "q is [batch, tokens, heads, head_dim], a cache [batch, heads, slots, head_dim]"
        )
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key-value heads; use a multiple of {K}")
    if (segment_ids is None) != (cache_segment_ids is None):
        raise ValueError("segment ids are needed for the new tokens and for the cache alike, or for neither")
    if sharded_tokens and axis_name is None:
        raise ValueError("sharded_tokens=True needs axis_name, the mesh axis that the tokens are sharded over")
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1 token, got {tile_size}")
