"""Stretches of tokens: cut, stacked and chosen field by field."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.tokens import Cotangents, Keys, Queries, select, stack_batches

B, H, K, T, D = 2, 4, 2, 6, 3


def queries(seed=0, *, side=True, rows=1):
    generator = np.random.default_rng(seed)
    q = jnp.asarray(generator.normal(size=(B, H, T, D)))
    positions = jnp.asarray(generator.integers(0, 99, (rows, T)))
    if not side:
        return Queries(q, positions)
    segment_ids, slopes = jnp.asarray(generator.integers(0, 9, (B, T))), jnp.asarray(generator.uniform(size=(rows, H)))
    return Queries(q, positions, segment_ids, slopes, jnp.asarray(generator.integers(0, 9, (B, H, T)), jnp.uint32))


def keys(seed=0, *, side=True, rows=1):
    generator = np.random.default_rng(seed)
    k, v = jnp.asarray(generator.normal(size=(2, B, K, T, D)))
    positions = jnp.asarray(generator.integers(0, 99, (rows, T)))
    return Keys(k, v, positions, jnp.asarray(generator.integers(0, 9, (B, T))) if side else None)


def cotangents(seed=0):
    generator = np.random.default_rng(seed)
    out, d_out = jnp.asarray(generator.normal(size=(2, B, H, T, D)))
    log_sum_exp, delta = jnp.asarray(generator.normal(size=(2, B, H, T)))
    return Cotangents(out, log_sum_exp, d_out, delta)


def same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_array_equal(x, y, err_msg=name)


@given(start=st.integers(0, T), stop=st.integers(0, T), side=st.booleans())
def test_cut_along_tokens_and_nothing_else(start, stop, side):
    cut = slice(start, stop)
    q, k, c = queries(side=side), keys(side=side), cotangents()
    of_tokens = lambda x: None if x is None else x[..., cut]  # noqa: E731
    same(
        q.between(start, stop),
        Queries(q.q[:, :, cut], q.positions[:, cut], of_tokens(q.segment_ids), q.slopes, of_tokens(q.row_bits)),
    )
    same(k.between(start, stop), Keys(k.k[:, :, cut], k.v[:, :, cut], k.positions[:, cut], of_tokens(k.segment_ids)))
    same(c.between(start, stop), Cotangents(*(x[:, :, cut] for x in c)))


@pytest.mark.parametrize("make", [queries, keys])
@pytest.mark.parametrize("side", [False, True])
@pytest.mark.parametrize("rows", [1, B])
def test_stacked_stretches_keep_their_own_positions(make, side, rows):
    """A row of positions or slopes that stood for the whole batch is repeated for each half of the new one."""
    first, second = make(1, side=side, rows=rows), make(2, side=side, rows=rows)
    both = stack_batches(first, second)
    for name, x, a, b in zip(both._fields, both, first, second, strict=True):
        assert (x is None) == (a is None), name
        if x is not None:
            assert x.shape[0] == 2 * B
            np.testing.assert_array_equal(x[:B], np.broadcast_to(a, x[:B].shape), err_msg=name)
            np.testing.assert_array_equal(x[B:], np.broadcast_to(b, x[B:].shape), err_msg=name)


@pytest.mark.parametrize("make", [queries, keys, cotangents])
def test_select_takes_every_field_of_one(make):
    first, second = make(1), make(2)
    same(select(jnp.bool_(True), first, second), first)
    same(select(jnp.bool_(False), first, second), second)
