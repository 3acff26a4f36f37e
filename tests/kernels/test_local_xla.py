"""One local block alone, under the contract that every backend must keep."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ring_rl.kernels import CAUSAL, FULL, Dropout, Mask, reference_attention
from ring_rl.kernels.dropout import query_row_bits
from ring_rl.kernels.local.block import DIAGONAL, EVERYTHING, Demand, Relation, Scoring
from ring_rl.kernels.local.select import select_block
from ring_rl.kernels.local.xla import XlaBlock
from ring_rl.kernels.tokens import Cotangents, Keys, Queries

PLAIN = Scoring(scale=0.3)


def heads_first(x):
    return jnp.swapaxes(x, 1, 2)


def draw(seed, T, S, H, K, D=4):
    """q, k, v, d_out and d_log_sum_exp, heads before tokens."""
    generator = np.random.default_rng(seed)
    shapes = [(2, H, T, D), (2, K, S, D), (2, K, S, D), (2, H, T, D), (2, H, T)]
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


def placed(q, k, v) -> tuple[Queries, Keys]:
    """At positions 0, 1, 2, ..."""
    positions = lambda x: jnp.arange(x.shape[2], dtype=jnp.int32)[None]  # noqa: E731
    return Queries(q, positions(q)), Keys(k, v, positions(k))


def expected_of(attend, q, k, v, d_out, d_lse):
    """((out, lse), (dq, dk, dv), cotangents) of a reference, everything heads first."""

    def heads_first_attend(q, k, v):
        out, lse = attend(*map(heads_first, (q, k, v)))
        return heads_first(out), lse

    @jax.jit
    def differentiated(q, k, v):
        (out, lse), pull_back = jax.vjp(heads_first_attend, q, k, v)
        delta = jnp.einsum("bhtd,bhtd->bht", out, d_out) - d_lse
        cotangents = Cotangents(out, jnp.where(lse > -jnp.inf, lse, jnp.inf), d_out, delta)
        return (out, lse), pull_back((d_out, d_lse)), cotangents

    return differentiated(q, k, v)


@partial(jax.jit, static_argnames=("block", "relation", "scoring"))
def run(block, queries, keys, cotangents, *, relation, scoring=PLAIN):
    """(out, lse, dq, dk, dv) of a block."""
    forward = block.forward(queries, keys, relation=relation, scoring=scoring)
    return forward + block.backward(queries, keys, cotangents, relation=relation, scoring=scoring)


# Every example is two compilations of its own: few of them, and none spent on finding a smaller one.
@settings(max_examples=5, phases=[Phase.generate])
@given(
    seed=st.integers(0, 1000),
    T=st.integers(1, 33),
    S=st.integers(1, 33),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    block_size=st.integers(1, 40),
    mask=st.sampled_from([CAUSAL, FULL, Mask(causal=True, window=6), Mask(causal=True, causal_block_size=3)]),
    offset=st.sampled_from([None, 0, 5]),
    packed=st.booleans(),
    options=st.sampled_from([(None, False, 0.0), (3.0, True, 0.25)]),
)
def test_block_equals_reference(seed, T, S, heads, block_size, mask, offset, packed, options):
    """Any rectangle, wherever it lies; rows that see nothing included."""
    (q, k, v, d_out, d_lse), (soft_cap, alibi, rate) = draw(seed, T, S, *heads), options
    generator = np.random.default_rng(seed)
    query_positions = jnp.arange(T)[None] + (offset if offset is not None else int(generator.integers(0, 20)))
    key_positions = jnp.arange(S)[None]
    ids = [jnp.asarray(generator.integers(-1, 2, (2, n)), jnp.int32) if packed else None for n in (T, S)]
    slopes = jnp.asarray(generator.uniform(size=heads[0]), jnp.float32) if alibi else None
    dropout = Dropout(rate, jax.random.key(seed)) if rate else None
    reference = partial(
        reference_attention,
        mask=mask,
        scale=0.3,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=ids[0],
        key_segments=ids[1],
        soft_cap=soft_cap,
        alibi_slopes=slopes,
        dropout=dropout,
    )
    (out, lse), gradients, cotangents = expected_of(reference, q, k, v, d_out, d_lse)
    bits = query_row_bits(dropout, positions=query_positions, batch=2, heads=heads[0]) if dropout else None
    queries = Queries(q, query_positions, ids[0], None if slopes is None else slopes[None], bits)
    keys = Keys(k, v, key_positions, ids[1])
    scoring = Scoring(scale=0.3, soft_cap=soft_cap, dropout_rate=rate)
    block, relation = XlaBlock(block_size=block_size), Relation(mask, offset)
    got = run(block, queries, keys, cotangents, relation=relation, scoring=scoring)
    for a, b in zip(got, (out, lse, *gradients), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(("block_size", "length"), [(8, 8), (8, 24), (8, 9), (8, 1), (64, 24)])
def test_lengths_of_one_tile_and_lengths_no_tile_divides(block_size, length):
    q, k, v, d_out, d_lse = draw(2, length, length, 2, 1)
    (out, lse), gradients, cotangents = expected_of(
        partial(reference_attention, mask=CAUSAL, scale=0.3), q, k, v, d_out, d_lse
    )
    got = run(XlaBlock(block_size=block_size), *placed(q, k, v), cotangents, relation=DIAGONAL)
    for a, b in zip(got, (out, lse, *gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_results_are_float32_and_sums_are_too():
    """Ones summed in bfloat16 stop at 256; the denominator must not."""
    length = 2048
    ones = jnp.ones((1, 1, length, 4), jnp.bfloat16)
    queries, keys = placed(ones[:, :, :2], ones, ones)
    out, lse = XlaBlock(block_size=4096).forward(queries, keys, relation=EVERYTHING, scoring=PLAIN)
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, np.log(length) + 0.3 * 4, rtol=1e-6)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_rows_with_infinite_log_sum_exp_contribute_nothing():
    q, k, v, d_out, delta = draw(0, 6, 6, 2, 2)
    cotangents = Cotangents(q, jnp.full(delta.shape, jnp.inf), d_out, delta)
    for gradient in run(XlaBlock(block_size=4), *placed(q, k, v), cotangents, relation=EVERYTHING)[2:]:
        assert (gradient == 0).all()


def test_very_negative_log_sum_exp_does_not_overflow_padding():
    """Padded keys score 0; against a log-sum-exp of -1000 their weight would be e^1000."""
    q, k, v, d_out, d_lse = draw(1, 5, 5, 1, 1)
    q, k = q.at[..., 0].set(1.0), k.at[..., 0].set(-1000.0)
    reference = partial(reference_attention, mask=FULL, scale=1.0)
    _, gradients, cotangents = expected_of(reference, q, k, v, d_out, d_lse)
    assert (cotangents.log_sum_exp < -900).all()
    got = run(XlaBlock(block_size=3), *placed(q, k, v), cotangents, relation=EVERYTHING, scoring=Scoring(scale=1.0))
    for a, b in zip(got[2:], gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("relation", [EVERYTHING, DIAGONAL, Relation(CAUSAL), Relation(Mask(causal=True, window=9), 0)])
def test_tiles_that_nobody_sees_are_never_computed(relation):
    """Whole tiles of padding hold NaN: it would reach every row and gradient that any product of theirs touched."""
    q, k, v, d_out, d_lse = draw(3, 24, 24, 4, 2)
    ids = jnp.asarray([[0] * 8 + [-1] * 8 + [1] * 8] * 2, jnp.int32)
    poisoned = (ids < 0)[:, None, :, None]
    reference = partial(reference_attention, mask=relation.mask, scale=0.3, query_segments=ids, key_segments=ids)
    (out, lse), gradients, cotangents = expected_of(reference, q, k, v, d_out, d_lse)
    queries, keys = placed(*(jnp.where(poisoned, jnp.nan, x) for x in (q, k, v)))
    queries, keys = queries._replace(segment_ids=ids), keys._replace(segment_ids=ids)
    got = run(XlaBlock(block_size=4), queries, keys, cotangents, relation=relation)
    for a, b in zip(got, (out, lse, *gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("by_position", [False, True])
def test_keys_outside_the_window_or_the_past_are_never_computed(by_position):
    """Forward, tile by tile: NaN in a key shows in the rows of the tiles that compute it, and in no other."""
    mask = Mask(causal=True, window=5)
    q, k, v, *_ = draw(4, 24, 24, 1, 1)
    relation = Relation(mask, None if by_position else 0)
    forward = jax.jit(partial(XlaBlock(block_size=4).forward, relation=relation, scoring=PLAIN))
    for tile in range(6):
        poisoned = k.at[:, :, 4 * tile : 4 * tile + 4].set(jnp.nan)
        out, _ = forward(*placed(q, poisoned, v))
        touched = np.isnan(out).any(axis=(0, 1, 3)).reshape(6, 4).any(axis=1)
        assert np.flatnonzero(touched).tolist() == [row for row in (tile, tile + 1) if row < 6]


@pytest.mark.parametrize("field", ["block_size", "heads_at_once"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1.*got 0"):
        dataclasses.replace(XlaBlock(block_size=8, heads_at_once=1), **{field: 0})


def demand(*, devices) -> Demand:
    return Demand(
        dtype="float32",
        head_dim=64,
        query_heads=4,
        key_value_heads=2,
        length=128,
        devices=devices,
        relations=(DIAGONAL,),
        segments=False,
        alibi=False,
        scoring=PLAIN,
        log_sum_exp_gradient=True,
    )


def test_auto_says_which_block_runs_and_why_no_better_one(caplog):
    with caplog.at_level("INFO", logger="ring_rl"):
        block = select_block("auto", dataclasses.replace(demand(devices=1), dtype="float16"), block_size=8)
    assert isinstance(block, XlaBlock)
    assert block.block_size == 8
    assert "local attention block: xla; not native_cpu: it computes in float32 or bfloat16" in caplog.text


def test_a_ring_on_a_cpu_goes_a_few_heads_at_a_time():
    """Tiles of a few heads stay in a core's cache, and skipping by position costs nothing."""
    block = select_block("xla", demand(devices=4), block_size=8)
    assert block.heads_at_once is not None
    assert block.prefers_positions


def test_a_ring_of_single_tiles_on_a_cpu_sends_all_heads_together():
    block = select_block("xla", demand(devices=4), block_size=demand(devices=4).length)
    assert block.heads_at_once is None
    assert not block.prefers_positions


@pytest.mark.parametrize(
    "cut", [{"segments": True}, {"relations": (Relation(Mask(causal=True, window=8)),)}], ids=["segments", "window"]
)
def test_a_ring_on_a_cpu_takes_smaller_tiles_where_something_ends_inside_them(cut):
    whole = select_block("xla", demand(devices=4), block_size=None)
    assert isinstance(whole, XlaBlock)
    ragged = select_block("xla", dataclasses.replace(demand(devices=4), **cut), block_size=None)
    assert isinstance(ragged, XlaBlock)
    assert ragged.block_size < whole.block_size
