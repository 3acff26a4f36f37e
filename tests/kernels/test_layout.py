import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.layout import (
    LAYOUTS,
    batch_to_layout,
    check_length,
    from_layout,
    layout_order,
    local_positions,
    natural_order,
    pad_to_layout,
    padded_length,
    permutation,
    to_layout,
)

layouts = st.sampled_from(LAYOUTS)
rings = st.integers(1, 9)


def test_zigzag_as_drawn():
    order = permutation(16, ring_size=4, layout="zigzag").reshape(4, 4)
    assert order.tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


def test_striped_as_drawn():
    order = permutation(16, ring_size=4, layout="striped").reshape(4, 4)
    assert order.tolist() == [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


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


@given(ring_size=rings, share=st.integers(1, 9))
def test_striped_balances_causal_work_up_to_the_diagonal(ring_size, share):
    """Pairs of devices differ by less than one key a query."""
    order = permutation(ring_size * share, ring_size=ring_size, layout="striped").reshape(ring_size, -1)
    pairs = (order + 1).sum(axis=1)
    assert pairs.max() - pairs.min() == (ring_size - 1) * share


@given(ring_size=st.integers(1, 5), chunk=st.integers(1, 3), layout=layouts, axis=st.integers(-3, 2))
def test_orders_without_gather(ring_size, chunk, layout, axis):
    """The compiled program's way gives what indexing gives, for any axis, and indexes nothing."""
    shape = [2, 3, 4]
    shape[axis] = 2 * ring_size * chunk
    x = np.arange(np.prod(shape)).reshape(shape)
    in_layout = to_layout(x, axis=axis, ring_size=ring_size, layout=layout)

    def there(x):
        return layout_order(x, axis=axis, ring_size=ring_size, layout=layout)

    def back(x):
        return natural_order(x, axis=axis, ring_size=ring_size, layout=layout)

    np.testing.assert_array_equal(there(jnp.asarray(x)), in_layout)
    np.testing.assert_array_equal(back(jnp.asarray(in_layout)), x)
    programs = str(jax.make_jaxpr(there)(x)) + str(jax.make_jaxpr(back)(x))
    assert "gather" not in programs
    assert "dynamic" not in programs


@given(length=st.integers(1, 40), ring_size=rings, layout=layouts, on_device=st.booleans())
def test_pad(length, ring_size, layout, on_device):
    segment_ids = np.zeros((2, length), np.int32)
    padded = pad_to_layout(
        jnp.asarray(segment_ids) if on_device else segment_ids, axis=1, ring_size=ring_size, layout=layout, fill=-1
    )
    assert isinstance(padded, np.ndarray) != on_device
    assert padded.dtype == np.int32
    assert padded.shape == (2, padded_length(length, ring_size=ring_size, layout=layout))
    assert (padded[:, :length] == 0).all()
    assert (padded[:, length:] == -1).all()


def test_batch_to_layout():
    batch = {"tokens": np.arange(8)[None] * 10, "positions": np.arange(8)[None], "observations": np.zeros((1, 8, 3))}
    moved = batch_to_layout(batch, ring_size=2, layout="striped")
    assert moved["tokens"].tolist() == [[0, 20, 40, 60, 10, 30, 50, 70]]
    assert moved["positions"].tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert moved["observations"].shape == (1, 8, 3)
    with pytest.raises(ValueError, match=r"one length along axis 1, got tokens 8, targets 7; pad the shorter ones"):
        batch_to_layout(
            {"tokens": batch["tokens"], "targets": batch["tokens"][:, 1:]}, ring_size=2, layout="contiguous"
        )


@given(length=st.integers(1, 100), ring_size=rings, layout=layouts)
def test_padded_length_is_the_smallest_that_fits(length, ring_size, layout):
    padded = padded_length(length, ring_size=ring_size, layout=layout)
    assert padded >= length
    check_length(padded, ring_size=ring_size, layout=layout)
    for shorter in range(length, padded):
        with pytest.raises(ValueError, match=rf"pad to {padded}$"):
            check_length(shorter, ring_size=ring_size, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_of_a_traced_device(layout):
    positions = jax.vmap(lambda device: local_positions(4, device=device, ring_size=4, layout=layout))
    np.testing.assert_array_equal(positions(np.arange(4)).reshape(-1), permutation(16, ring_size=4, layout=layout))


def test_bad_arguments():
    for refuse in (check_length, padded_length, permutation):
        with pytest.raises(ValueError, match="ring size must be at least 1, got 0"):
            refuse(8, ring_size=0, layout="zigzag")
        with pytest.raises(ValueError, match="unknown layout 'spiral'; choose one of contiguous, zigzag, striped"):
            refuse(8, ring_size=2, layout="spiral")
    with pytest.raises(ValueError, match=r"length 10 is not divisible into the 4 chunks of a zigzag ring .* pad to 12"):
        natural_order(jnp.zeros(10), axis=0, ring_size=2, layout="zigzag")
    with pytest.raises(ValueError, match=r"length 0 .* pad to 2"):
        check_length(0, ring_size=2, layout="striped")
    with pytest.raises(ValueError, match=r"no tokens to pad: axis 1 of shape \(2, 0\) is empty"):
        pad_to_layout(np.zeros((2, 0)), axis=1, ring_size=2, layout="striped", fill=0)
