"""New tokens against a cache of keys and values, on one device or spread over a mesh axis.

The cache never moves. Each of R devices attends the new tokens to the slots it holds, and the R softmaxes in progress
merge: what travels is one output a new token, not the cache.

`cache_slots.py` says which positions a slot holds. Everything here is for inference: gradients are not defined.
"""

import math
from typing import Literal

import jax.numpy as jnp
from jax import lax, vmap

from ring_rl.kernels.cache_slots import DEFAULT_SLOT_BLOCK, Slots
from ring_rl.kernels.decode_tiles import Cache, attend_by_tiles
from ring_rl.kernels.local.block import Demand, LocalBlock, Relation, Scoring
from ring_rl.kernels.local.select import block_named
from ring_rl.kernels.mask import CAUSAL, Mask
from ring_rl.kernels.online_softmax import Partial, begin, finish
from ring_rl.kernels.tokens import Keys, Queries
from ring_rl.typing import Array, Float, Int, Int32

DecodeBlock = Literal["auto", "xla", "native_cpu"]
DECODE_BLOCKS: tuple[DecodeBlock, ...] = ("auto", "xla", "native_cpu")
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
    local: DecodeBlock = "auto",
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
    is seen, not the capacity. Memory beyond the inputs and O(B T H D): one of XLA's tiles of scores, B H tile_size²
    float32 at most. With an axis, one all-reduce of B T H (D + 1) float32 and one of B H T.

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
        local: What computes a device's share: "xla", tiles that serve everywhere; "native_cpu", C++ on a CPU; "auto" is
            that where it serves, else "xla".
        tile_size: Largest edge of one of XLA's tiles of scores. Few queries take longer tiles, of up to 4 times as
            many slots. A tile of k and v that fits a CPU's cache is fastest there; an accelerator that decodes one
            token at a time against a long cache does better with fewer, larger tiles.

    Raises:
        ValueError: Shapes that do not fit one another, one of two segment ids, a slot count that `slot_block` does
            not divide, a block that there is not or that cannot serve. Not for length + T > capacity, which is data:
            see `check_capacity`.
    """
    _check(q, k_cache, v_cache, segment_ids, cache_segment_ids, sharded_tokens, axis_name, tile_size)
    if sharded_tokens:
        q = lax.all_gather(q, axis_name, axis=1, tiled=True)
        if segment_ids is not None:
            segment_ids = lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    cache = Cache(k_cache, v_cache, cache_segment_ids, Slots.of(k_cache, axis_name, slot_block))
    scoring = Scoring(scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale, soft_cap=soft_cap)
    length_b = jnp.atleast_1d(jnp.asarray(length, jnp.int32))
    block = _native_block(q, cache, local, mask=mask, scoring=scoring, alibi=alibi_slopes is not None)
    if block is None:
        partial = attend_by_tiles(q, segment_ids, length_b, cache, mask, scoring, alibi_slopes, tile_size)
    else:
        partial = _attend_at_once(block, q, segment_ids, length_b, cache, mask, scoring, alibi_slopes)
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
    slots = Slots.of(k_cache, axis_name, slot_block)
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
    slots = Slots.of(cache_B1S1, axis_name, slot_block)
    return _write(cache_B1S1, segment_ids[:, None, :, None], length=length, slots=slots)[:, 0, :, 0]


def _native_block(
    q: Array, cache: Cache, local: DecodeBlock, *, mask: Mask, scoring: Scoring, alibi: bool
) -> LocalBlock | None:
    """The block of a CPU, where it is wanted and serves; None is XLA's tiles.

    Raises:
        ValueError: It is asked for and cannot serve.
    """
    if local not in DECODE_BLOCKS:
        raise ValueError(f"unknown block {local!r} for decoding; choose one of {', '.join(DECODE_BLOCKS)}")
    if local == "xla":
        return None
    demand = Demand(
        dtype=q.dtype.name,
        head_dim=q.shape[3],
        query_heads=q.shape[2],
        key_value_heads=cache.k.shape[1],
        length=cache.slots.count,
        devices=cache.slots.ring_size,
        relations=(Relation(mask),),
        segments=cache.segment_ids is not None,
        alibi=alibi,
        scoring=scoring,
        log_sum_exp_gradient=False,
    )
    block = block_named("native_cpu", demand, block_size=None)
    refusal = block.refusal(demand)
    if not q.dtype == cache.k.dtype == cache.v.dtype:
        refusal = f"queries of {q.dtype} and caches of {cache.k.dtype} and {cache.v.dtype} are not of one dtype"
    if refusal is not None and local == "native_cpu":
        raise ValueError(f'decoding with local="native_cpu" cannot serve: {refusal}; local="xla" serves everything')
    return None if refusal is not None else block


def _attend_at_once(
    block: LocalBlock,
    q_BTHD: Array,
    segments_BT: Array | None,
    length_b: Array,
    cache: Cache,
    mask: Mask,
    scoring: Scoring,
    alibi_slopes: Array | None,
) -> Partial:
    """The softmax over this device's slots by a block that looks at positions: what is not yet filled lies ahead."""
    B, T = q_BTHD.shape[:2]
    positions_bT = length_b[:, None] + jnp.arange(T, dtype=jnp.int32)
    key_positions_1S = cache.slots.position(jnp.arange(cache.slots.count, dtype=jnp.int32))[None]
    key_segments_BS = cache.segment_ids
    _, ahead = mask.reach()
    if ahead != 0:
        # Where a query may look ahead, what is not yet filled must be hidden otherwise: it is padding.
        filled_bS = key_positions_1S < length_b[:, None] + T
        segments_BT = jnp.zeros((B, T), jnp.int32) if segments_BT is None else segments_BT
        key_segments_BS = jnp.where(filled_bS, 0 if key_segments_BS is None else key_segments_BS, -1)
        key_segments_BS = jnp.broadcast_to(key_segments_BS, (B, cache.slots.count)).astype(jnp.int32)
    slopes_1H = None if alibi_slopes is None else alibi_slopes.astype(jnp.float32)[None]
    queries = Queries(jnp.swapaxes(q_BTHD, 1, 2), positions_bT, segments_BT, slopes_1H)
    keys = Keys(cache.k, cache.v, key_positions_1S, key_segments_BS)
    return begin(*block.forward(queries, keys, relation=Relation(mask), scoring=scoring))


def _write(cache_BKSD: Array, new_BKTD: Array, *, length, slots: Slots) -> Array:
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
