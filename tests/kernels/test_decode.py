from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cpp_compiler import HAS_COMPILER, NO_COMPILER
from ring_rl.kernels.cache_slots import check_capacity, slot_positions
from ring_rl.kernels.decode import decode_attention, write_cache, write_segment_ids
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.reference import reference_attention

HEAD_DIM = 4
BATCH = 2
TOKENS = 40  # the longest sequence: shapes are few, so that few programs are compiled, and lengths are data
# C++ is tested where it can be compiled.
LOCAL = ("xla", "native_cpu") if HAS_COMPILER else ("xla",)
TOKEN_SPEC, CACHE_SPEC = P(), P(None, None, "sp")


def random_qkv(seed, *, heads, tokens=TOKENS):
    generator = np.random.default_rng(seed)
    shapes = [(BATCH, tokens, n, HEAD_DIM) for n in (heads[0], heads[1], heads[1])]
    return tuple(generator.normal(size=shape).astype(np.float32) for shape in shapes)


def rows_at(x_BT, length, new):
    """Tokens length .. length + new - 1 of every row; `length` is a number, or one a row."""
    at = np.broadcast_to(length, BATCH)
    return np.stack([x[start : start + new] for x, start in zip(x_BT, at, strict=True)])


def filled_cache(x_BTKD, *, length, slots, ring_size=1, slot_block=128, garbage=1e4):
    """A whole cache whose first `length` tokens (a number, or one a row) are known; finite garbage elsewhere."""
    cache = np.full((x_BTKD.shape[0], slots, *x_BTKD.shape[2:]), garbage, x_BTKD.dtype)
    for row, known in enumerate(np.broadcast_to(length, x_BTKD.shape[0])):
        cache[row, :known] = x_BTKD[row, :known]
    return np.swapaxes(cache, 1, 2)[:, :, slot_positions(slots, ring_size=ring_size, slot_block=slot_block)]


def slots_for(tokens, *, ring_size, slot_block):
    return -(-tokens // (ring_size * slot_block)) * ring_size * slot_block


@partial(jax.jit, static_argnames=("mask", "scale", "soft_cap"))
def expected_rows(q, k, v, segments, slopes, *, mask, scale=None, soft_cap=None):
    out, _ = reference_attention(
        q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, alibi_slopes=slopes,
        query_segments=segments, key_segments=segments,
    )  # fmt: skip
    return out


def expected_causal(q, k, v):
    return expected_rows(q, k, v, np.zeros(q.shape[:2], np.int32), None, mask=CAUSAL)


def step(q, k, v, k_cache, v_cache, length, *, write, attend):
    """Write the new tokens, then attend to everything: what a model's layer does."""
    k_cache, v_cache = write_cache(k_cache, v_cache, k, v, length=length, **write)
    return decode_attention(q, k_cache, v_cache, length=length, **write, **attend), k_cache, v_cache


def on_mesh(function, ring_size, *, sharded_tokens=False):
    """`function(q, k, v, k_cache, v_cache, length)` with the cache, donated, over `ring_size` devices."""
    mesh = Mesh(np.array(jax.devices()[:ring_size]), ("sp",))
    tokens = P(None, "sp") if sharded_tokens else TOKEN_SPEC
    specs = (tokens, tokens, tokens, CACHE_SPEC, CACHE_SPEC, P())
    out_specs = (tokens, CACHE_SPEC, CACHE_SPEC)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs), donate_argnums=(3, 4))


@given(
    seed=st.integers(0, 1000),
    length=st.integers(0, TOKENS - 3),
    new=st.sampled_from([1, 3]),
    heads=st.sampled_from([(4, 2), (3, 1)]),
    tile_size=st.sampled_from([3, 1024]),
    local=st.sampled_from(LOCAL),
)
def test_equals_the_last_rows_of_causal_attention(seed, length, new, heads, tile_size, local):
    q, k, v = random_qkv(seed, heads=heads)
    # Slots after the new tokens are not yet written; what lies in them must not matter.
    fill = partial(filled_cache, length=length + new, slots=TOKENS)
    got = plain_decode(rows_at(q, length, new), fill(k), fill(v), length, tile_size=tile_size, local=local)
    np.testing.assert_allclose(got, rows_at(expected_causal(q, k, v), length, new), atol=1e-5)


@partial(jax.jit, static_argnames=("tile_size", "local"))
def plain_decode(q, k_cache, v_cache, length, *, tile_size, local):
    return decode_attention(q, k_cache, v_cache, length=length, tile_size=tile_size, local=local)


@settings(max_examples=12)  # nearly every example is a compilation of its own
@given(
    seed=st.integers(0, 1000),
    ring_size=st.sampled_from([1, 2, 4, 8]),
    length=st.integers(0, TOKENS - 11),
    new=st.sampled_from([1, 5, 11]),
    slot_block=st.sampled_from([1, 3, 4]),
    tile_size=st.sampled_from([2, 5]),
    heads=st.sampled_from([(2, 2), (4, 1), (6, 2)]),
    virtual=st.booleans(),
    local=st.sampled_from(LOCAL),
)
def test_a_sharded_cache_equals_the_reference(
    seed, ring_size, length, new, slot_block, tile_size, heads, virtual, local
):
    q, k, v = random_qkv(seed, heads=heads)
    fill = partial(
        filled_cache,
        slots=slots_for(TOKENS, ring_size=ring_size, slot_block=slot_block),
        ring_size=ring_size,
        slot_block=slot_block,
    )
    k_before, v_before, k_after = fill(k, length=length), fill(v, length=length), fill(k, length=length + new)
    attend = {"tile_size": tile_size, "local": local}
    function = partial(step, write={"axis_name": "sp", "slot_block": slot_block}, attend=attend)
    newest = [rows_at(x, length, new) for x in (q, k, v)]
    if virtual:  # a ring of any size on one device
        split = lambda x: x.reshape(*x.shape[:2], ring_size, -1, HEAD_DIM)  # noqa: E731
        run = jax.jit(jax.vmap(function, in_axes=(None, None, None, 2, 2, None), axis_name="sp"))
        out_RBTHD, k_cache, _ = run(*newest, split(k_before), split(v_before), length)
        assert (out_RBTHD == out_RBTHD[:1]).all()
        out, k_cache = out_RBTHD[0], np.moveaxis(k_cache, 0, 2).reshape(k_after.shape)
    else:
        out, k_cache, _ = on_mesh(function, ring_size)(*newest, k_before, v_before, length)
    np.testing.assert_allclose(out, rows_at(expected_causal(q, k, v), length, new), atol=1e-5)
    np.testing.assert_array_equal(k_cache, k_after)


MASKS = [
    CAUSAL,
    FULL,
    Mask(causal=True, window=5),
    Mask(causal=False, window=4),
    Mask(causal=True, causal_block_size=3),
    Mask(causal=True, causal_block_size=4, window=6),
]


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@settings(max_examples=2)
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, TOKENS - 7), min_size=BATCH, max_size=BATCH),
    soft_cap=st.sampled_from([None, 1.5]),
    slopes=st.sampled_from([None, (0.5, 0.25, 0.1, 0.0)]),
    segmented=st.booleans(),
)
def test_masks_scores_segments_and_rows_of_different_lengths(mask, local, seed, lengths, soft_cap, slopes, segmented):
    ring_size, slot_block, new = 4, 2, 7
    q, k, v = random_qkv(seed, heads=(4, 2))
    # Ids from -1 on: some tokens are padding, so that some rows see nothing.
    drawn = np.random.default_rng(seed).integers(-1 if segmented else 0, 3 if segmented else 1, (BATCH, TOKENS))
    segments = np.sort(drawn, axis=1).astype(np.int32)
    lengths, slopes = np.array(lengths), None if slopes is None else jnp.asarray(slopes)
    fill = partial(
        filled_cache,
        length=lengths,
        slots=slots_for(TOKENS, ring_size=ring_size, slot_block=slot_block),
        ring_size=ring_size,
        slot_block=slot_block,
    )
    segment_cache = fill(segments[..., None, None], garbage=1)[:, 0, :, 0]

    def run(q, k, v, new_segments, k_cache, v_cache, segment_cache, length):
        at = {"length": length, "axis_name": "sp", "slot_block": slot_block}
        k_cache, v_cache = write_cache(k_cache, v_cache, k, v, **at)
        packing = {}
        if segmented:
            segment_cache = write_segment_ids(segment_cache, new_segments, **at)
            packing = {"segment_ids": new_segments, "cache_segment_ids": segment_cache}
        scores = {"scale": 0.7, "soft_cap": soft_cap, "alibi_slopes": slopes, "local": local}
        return decode_attention(q, k_cache, v_cache, **at, mask=mask, tile_size=3, **scores, **packing)

    mesh = Mesh(np.array(jax.devices()[:ring_size]), ("sp",))
    specs = (P(), P(), P(), P(), CACHE_SPEC, CACHE_SPEC, P(None, "sp"), P())
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P()))
    out = run(*(rows_at(x, lengths, new) for x in (q, k, v, segments)), fill(k), fill(v), segment_cache, lengths)
    # What a row has not read yet exists for nobody.
    known = np.arange(TOKENS) < lengths[:, None] + new
    expected = expected_rows(q, k, v, np.where(known, segments, -1), slopes, mask=mask, scale=0.7, soft_cap=soft_cap)
    np.testing.assert_allclose(out, rows_at(expected, lengths, new), atol=1e-5)


@pytest.mark.parametrize("sharded_tokens", [False, True])
@pytest.mark.parametrize("ring_size", [1, 8])
def test_chunked_prefill_equals_one_shot_equals_reference(ring_size, sharded_tokens):
    tokens = 64
    q, k, v = random_qkv(0, heads=(4, 2), tokens=tokens)
    function = partial(
        step,
        write={"axis_name": "sp", "slot_block": 4, "sharded_tokens": sharded_tokens},
        attend={"tile_size": 6},
    )
    run = on_mesh(function, ring_size, sharded_tokens=sharded_tokens)
    results = []
    for chunk in (tokens, 16):
        k_cache, v_cache = (np.zeros((BATCH, 2, 2 * tokens, HEAD_DIM), np.float32) for _ in range(2))
        outs = []
        for start in range(0, tokens, chunk):
            new = slice(start, start + chunk)
            out, k_cache, v_cache = run(q[:, new], k[:, new], v[:, new], k_cache, v_cache, start)
            outs.append(out)
        results.append(np.concatenate(outs, axis=1))
    np.testing.assert_allclose(results[0], expected_causal(q, k, v), atol=1e-5)
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)


@pytest.mark.parametrize("local", LOCAL)
@pytest.mark.parametrize("ring_size", [1, 8])
def test_bfloat16_is_as_good_as_the_naive_computation(ring_size, local):
    new, length = 8, TOKENS - 8
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(3, heads=(4, 2)))
    run = on_mesh(
        partial(step, write={"axis_name": "sp", "slot_block": 1}, attend={"tile_size": 3, "local": local}), ring_size
    )
    fill = partial(filled_cache, length=length, slots=TOKENS, ring_size=ring_size, slot_block=1)
    out, k_cache, _ = run(*(rows_at(x, length, new) for x in (q, k, v)), fill(k), fill(v), length)
    assert out.dtype == k_cache.dtype == jnp.bfloat16
    with jax.enable_x64(True):
        exact = np.asarray(expected_causal(*(np.asarray(x, np.float64) for x in (q, k, v))))
    assert exact.dtype == np.float64
    naive = expected_causal(*map(jnp.asarray, (q, k, v)))
    error = lambda x: np.abs(np.asarray(x, np.float64) - rows_at(exact, length, new)).max()  # noqa: E731
    assert 0 < error(out) <= 2 * error(rows_at(naive, length, new))


def test_extreme_scores_and_an_empty_cache():
    q, k, v = (x[:, :1] for x in random_qkv(1, heads=(2, 2)))
    run = on_mesh(partial(step, write={"axis_name": "sp", "slot_block": 1}, attend={"scale": 1e4}), 8)
    empty = np.zeros((BATCH, 2, 16, HEAD_DIM), np.float32)
    out, *_ = run(q, k, v, empty, empty, 0)
    np.testing.assert_allclose(out, v, atol=1e-6)  # a token that sees itself alone


def test_rows_that_see_nothing_are_zero():
    q, k, v = (x[:, :3] for x in random_qkv(1, heads=(2, 2)))
    fill = partial(filled_cache, length=3, slots=3)
    segments = jnp.asarray([[-1, 0, 0], [0, 0, -1]], jnp.int32)
    out = decode_attention(q, fill(k), fill(v), length=0, segment_ids=segments, cache_segment_ids=segments)
    assert (out[0, 0] == 0).all()
    assert (out[1, 2] == 0).all()
    np.testing.assert_allclose(out[0, 1], v[0, 1], atol=1e-6)


@pytest.mark.parametrize("length", [30, np.array([30, 7])], ids=["one length", "a length a row"])
@pytest.mark.parametrize("ring_size", [1, 4])
def test_tokens_beyond_the_capacity_are_dropped_and_nothing_is_overwritten(ring_size, length):
    capacity, new = 32, 5
    _, k, _ = random_qkv(2, heads=(2, 2))
    fill = partial(filled_cache, k[:, :capacity], slots=capacity, ring_size=ring_size, slot_block=2)
    newest = rows_at(k, length, new)
    run = on_mesh(partial(step, write={"axis_name": "sp", "slot_block": 2}, attend={}), ring_size)
    _, k_cache, _ = run(np.zeros_like(newest), newest, newest, fill(length=length), fill(length=length), length)
    np.testing.assert_array_equal(k_cache, fill(length=np.minimum(length + new, capacity)))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("ring_size", [1, 8])
@pytest.mark.parametrize("new", [1, 64])
def test_a_donated_cache_is_written_in_place(ring_size, new, per_row):
    batch, slots = 2, 64 * 1024
    tokens = jax.ShapeDtypeStruct((batch, new, 2, HEAD_DIM), jnp.float32)
    cache = jax.ShapeDtypeStruct((batch, 2, slots, HEAD_DIM), jnp.float32)
    length = jax.ShapeDtypeStruct((batch,) if per_row else (), jnp.int32)
    function = partial(step, write={"axis_name": "sp", "slot_block": 16}, attend={"tile_size": 64})
    memory = (
        on_mesh(function, ring_size).lower(tokens, tokens, tokens, cache, cache, length).compile().memory_analysis()
    )
    cache_bytes = batch * 2 * slots * HEAD_DIM * 4 // ring_size
    assert memory.alias_size_in_bytes >= 2 * cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2


def test_a_prefill_chunk_never_holds_all_of_its_scores():
    new, slots = 1024, 8192
    tokens = jax.ShapeDtypeStruct((1, new, 1, HEAD_DIM), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, 1, slots, HEAD_DIM), jnp.bfloat16)

    def temporary_bytes(tile_size):
        run = jax.jit(partial(decode_attention, length=jnp.int32(0), tile_size=tile_size, local="xla"))
        return run.lower(tokens, cache, cache).compile().memory_analysis().temp_size_in_bytes

    tile = 64
    assert temporary_bytes(slots) > new * slots  # the measure sees scores where they are whole
    assert temporary_bytes(tile) < 8 * new * tile * 4 < new * slots / 2


def test_a_growing_cache_is_balanced_from_the_first_tokens_on():
    positions = slot_positions(4 * 6, ring_size=4, slot_block=2).reshape(4, 6)
    np.testing.assert_array_equal(positions[1], [2, 3, 10, 11, 18, 19])
    for length in range(25):
        held = (positions < length).sum(axis=1)
        assert held.max() - held.min() <= 2
    np.testing.assert_array_equal(np.sort(positions.ravel()), np.arange(24))


def test_bad_calls_are_refused_with_the_remedy():
    q, cache = jnp.zeros((1, 1, 4, 4)), jnp.zeros((1, 2, 6, 4))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key-value heads; use a multiple of 2"):
        decode_attention(jnp.zeros((1, 1, 3, 4)), cache, cache, length=0)
    with pytest.raises(ValueError, match="differ in shape"):
        decode_attention(q, cache, cache[:, :, :5], length=0)
    with pytest.raises(ValueError, match="differ in batch or head dimension"):
        decode_attention(q, jnp.swapaxes(cache, 2, 3), jnp.swapaxes(cache, 2, 3), length=0)
    with pytest.raises(ValueError, match="segment ids are needed for the new tokens and for the cache alike"):
        decode_attention(q, cache, cache, length=0, segment_ids=jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="needs axis_name"):
        decode_attention(q, cache, cache, length=0, sharded_tokens=True)
    with pytest.raises(ValueError, match="12 slots cannot be shared by 5 devices; use a multiple of 5"):
        slot_positions(12, ring_size=5, slot_block=2)
    split = partial(jnp.reshape, shape=(2, 1, 2, 3, 4))
    with pytest.raises(ValueError, match="3 cache slots a device are not divisible by slot_block 2; use 4"):
        jax.vmap(
            partial(decode_attention, length=0, axis_name="sp", slot_block=2), in_axes=(None, 0, 0), axis_name="sp"
        )(q, split(cache), split(cache))


def test_capacity_is_checked_on_the_host():
    check_capacity(6, new_tokens=2, capacity=8)
    check_capacity(jnp.asarray([1, 6]), new_tokens=2, capacity=8)
    with pytest.raises(ValueError, match="7 cached and 2 new tokens need 9 cache slots, but there are 8"):
        check_capacity(np.array([3, 7]), new_tokens=2, capacity=8)


@pytest.mark.parametrize(("mask", "first_read"), [(CAUSAL, 0), (Mask(causal=True, window=6), 8)])
def test_tiles_that_nobody_sees_are_not_read(mask, first_read):
    """What is not a number spoils every product it enters, hidden or not."""
    length, new = 16, 4
    q, k, v = random_qkv(5, heads=(2, 2))
    slots = np.arange(TOKENS)[:, None]
    unread = (slots < first_read) | (slots >= length + new)
    fill = lambda x: np.where(unread, np.float32(np.nan), filled_cache(x, length=TOKENS, slots=TOKENS))  # noqa: E731
    decode = jax.jit(partial(decode_attention, mask=mask, tile_size=4, local="xla"))
    out = decode(rows_at(q, length, new), fill(k), fill(v), length=length)
    expected = expected_rows(q, k, v, np.zeros((BATCH, TOKENS), np.int32), None, mask=mask)
    np.testing.assert_allclose(out, rows_at(expected, length, new), atol=1e-5)


@pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
def test_a_cpus_block_reads_no_tile_that_nobody_sees():
    """Tiles of 64 slots: of the four here the first two are behind the window, and the last is not yet filled."""
    slots, length, new, mask = 256, 180, 4, Mask(causal=True, window=20)
    q, k, v = random_qkv(6, heads=(2, 2), tokens=slots)
    unread = (np.arange(slots) < 128)[:, None] | (np.arange(slots) >= 192)[:, None]
    fill = lambda x: np.where(unread, np.float32(np.nan), filled_cache(x, length=slots, slots=slots))  # noqa: E731
    decode = jax.jit(partial(decode_attention, mask=mask, local="native_cpu"))
    out = decode(rows_at(q, length, new), fill(k), fill(v), length=length)
    expected = expected_rows(q, k, v, np.zeros((BATCH, slots), np.int32), None, mask=mask)
    np.testing.assert_allclose(out, rows_at(expected, length, new), atol=1e-5)


def test_blocks_that_cannot_decode_are_refused():
    q, cache = jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 2, 8, 4))
    with pytest.raises(ValueError, match="unknown block 'cudnn' for decoding; choose one of auto, xla, native_cpu"):
        decode_attention(q, cache, cache, length=0, local="cudnn")
    half = cache.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r'queries of float32 and caches of bfloat16.*local="xla" serves everything'):
        decode_attention(q, half, half, length=0, local="native_cpu")
    assert decode_attention(q, half, half, length=0).dtype == q.dtype


def test_tokens_of_another_shape_than_the_cache_are_refused():
    cache, tokens = jnp.zeros((2, 2, 8, 4)), jnp.zeros((2, 1, 2, 4))
    for wrong in (tokens[:1], tokens[:, :, :1], tokens[..., :2]):
        with pytest.raises(ValueError, match=r"k and v must be \[2, tokens, 2, 4\]"):
            write_cache(cache, cache, wrong, wrong, length=0)
