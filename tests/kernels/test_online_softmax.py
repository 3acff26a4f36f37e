"""Merging partial results: any order, any magnitude, and rows that saw nothing."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.mask import FULL
from ring_rl.kernels.online_softmax import begin, finish, merge, where_seen
from ring_rl.kernels.reference import reference_attention


def blocks(seed, count, scale):
    generator = np.random.default_rng(seed)
    q = jnp.asarray(scale * generator.normal(size=(1, 3, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(generator.normal(size=(1, 5 * count, 2, 4)), jnp.float32) for _ in range(2))
    pieces = [heads_first(q, k[:, 5 * i : 5 * i + 5], v[:, 5 * i : 5 * i + 5]) for i in range(count)]
    return pieces, heads_first(q, k, v)


def heads_first(q, k, v):
    out, log_sum_exp = reference_attention(q, k, v, mask=FULL)
    return jnp.swapaxes(out, 1, 2), log_sum_exp


@given(seed=st.integers(0, 1000), count=st.integers(1, 6), scale=st.sampled_from([1.0, 100.0]), data=st.data())
def test_merging_blocks_in_any_order_gives_the_whole(seed, count, scale, data):
    pieces, (out, log_sum_exp) = blocks(seed, count, scale)
    first, *rest = data.draw(st.permutations(pieces))
    partial = begin(*first)
    for piece in rest:
        partial = merge(partial, *piece)
    merged_out, merged_log_sum_exp = finish(partial)
    np.testing.assert_allclose(merged_out, out, atol=3e-6)
    np.testing.assert_allclose(merged_log_sum_exp, log_sum_exp, rtol=3e-6, atol=3e-6)


def test_a_block_nobody_sees_changes_nothing_whatever_it_holds():
    _, (out, log_sum_exp) = blocks(0, 1, 1.0)
    unseen = where_seen(jnp.bool_(False), log_sum_exp)
    after = finish(merge(begin(out, log_sum_exp), 1e9 * out, unseen))
    np.testing.assert_array_equal(after[0], finish(begin(out, log_sum_exp))[0])
    before = finish(merge(begin(jnp.full_like(out, jnp.nan), unseen), out, log_sum_exp))
    np.testing.assert_allclose(before[0], out, rtol=1e-6)


def test_rows_that_see_nothing_are_zero_and_not_nan():
    unseen = jnp.ones((1, 1, 2, 3)), jnp.full((1, 1, 2), -jnp.inf)
    out, log_sum_exp = finish(merge(begin(*unseen), *unseen))
    assert (out == 0).all()
    assert (log_sum_exp == -jnp.inf).all()
