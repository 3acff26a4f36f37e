import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.layout import (
    LAYOUTS,
    check_length,
    from_layout,
    local_positions,
    padded_length,
    permutation,
    to_layout,
)

layouts = st.sampled_from(LAYOUTS)
rings = st.integers(1, 9)


def test_zigzag_as_drawn():
    order = permutation(16, ring_size=4, layout="zigzag").reshape(4, 4)
    assert order.tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


@given(ring_size=rings, chunk=st.integers(1, 5), layout=layouts)
def test_round_trip_and_positions(ring_size, chunk, layout):
    length = 2 * ring_size * chunk
    x = np.random.default_rng(0).normal(size=(2, length, 3))
    shuffled = to_layout(x, axis=1, ring_size=ring_size, layout=layout)
    np.testing.assert_array_equal(from_layout(shuffled, axis=1, ring_size=ring_size, layout=layout), x)
    order = permutation(length, ring_size=ring_size, layout=layout).reshape(ring_size, -1)
    for device in range(ring_size):
        positions = local_positions(2 * chunk, device=device, ring_size=ring_size, layout=layout)
        np.testing.assert_array_equal(positions, order[device])
        # An own block is plain causal attention only because tokens are held in ascending order.
        assert (np.diff(order[device]) > 0).all()


@given(ring_size=rings, chunk=st.integers(1, 5))
def test_zigzag_balances_causal_work(ring_size, chunk):
    """Every device sees the same number of (query, key) pairs."""
    order = permutation(2 * ring_size * chunk, ring_size=ring_size, layout="zigzag").reshape(ring_size, -1)
    assert len(set((order + 1).sum(axis=1))) == 1


@given(length=st.integers(1, 100), ring_size=rings, layout=layouts)
def test_padded_length_is_the_smallest_that_fits(length, ring_size, layout):
    padded = padded_length(length, ring_size=ring_size, layout=layout)
    assert padded >= length
    check_length(padded, ring_size=ring_size, layout=layout)
    for shorter in range(length, padded):
        with pytest.raises(ValueError, match=rf"pad to {padded}$"):
            check_length(shorter, ring_size=ring_size, layout=layout)


def test_positions_of_a_traced_device():
    positions = jax.vmap(lambda device: local_positions(4, device=device, ring_size=4, layout="zigzag"))
    assert positions(np.arange(4)).tolist()[1] == [2, 3, 12, 13]


def test_bad_arguments():
    with pytest.raises(ValueError, match="ring size must be at least 1, got 0"):
        check_length(8, ring_size=0, layout="zigzag")
    with pytest.raises(ValueError, match="unknown layout 'striped'; choose one of contiguous, zigzag"):
        check_length(8, ring_size=2, layout="striped")
