import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.document_balance import balanced_permutation
from ring_rl.kernels.layout import permutation
from ring_rl.kernels.mask import CAUSAL, visible
from ring_rl.kernels.reference import reference_attention


def packed(document_lengths, *, ring_size, padding=0) -> np.ndarray:
    """Segment ids [T] of the documents, then of padding up to a length that the ring divides."""
    ids = np.repeat(np.arange(len(document_lengths)), document_lengths)
    total = len(ids) + padding
    return np.pad(ids, (0, padding + -total % ring_size), constant_values=-1)


def pairs_by_hop(segment_ids, order, ring_size) -> np.ndarray:
    """Number of visible (query, key) pairs [R R]: of a device's queries with the keys of the device h before it."""
    seen = np.asarray(visible(CAUSAL, order, order, segment_ids[order], segment_ids[order]))
    share = len(order) // ring_size
    by_devices = seen.reshape(ring_size, share, ring_size, share).sum(axis=(1, 3))
    return np.stack([np.roll(by_devices[device, ::-1], device + 1) for device in range(ring_size)])


document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(lengths=document_lengths, padding=st.integers(0, 20), ring_size=st.integers(1, 8))
def test_every_device_has_the_same_work(lengths, padding, ring_size):
    """Any documents, however short beside the ring: within R - 1 pairs."""
    segment_ids = packed(lengths, ring_size=ring_size, padding=padding)
    [order] = balanced_permutation(segment_ids[None], ring_size=ring_size)
    assert sorted(order) == list(range(len(segment_ids)))
    assert (np.diff(order.reshape(ring_size, -1)) > 0).all(), "tokens of a device must ascend"
    pairs = pairs_by_hop(segment_ids, order, ring_size).sum(axis=1)
    assert pairs.max() - pairs.min() <= ring_size - 1


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6), ring_size=st.integers(1, 6))
def test_divisible_documents_are_equal_at_every_hop(chunks, ring_size):
    segment_ids = packed(2 * ring_size * np.array(chunks), ring_size=ring_size)
    [order] = balanced_permutation(segment_ids[None], ring_size=ring_size)
    pairs = pairs_by_hop(segment_ids, order, ring_size)
    assert (pairs == pairs[0]).all()
    assert (pairs[:, 1:] == 2 * (np.array(chunks) ** 2).sum()).all(), "every hop but the first has two full blocks"


@pytest.mark.parametrize("ring_size", [2, 4, 8])
def test_better_than_zigzag_and_contiguous_on_a_mix(ring_size):
    """Many short documents and a long one, the case that a zigzag of the whole sequence gets wrong."""
    segment_ids = packed([700, *[40] * 8, 130, 11, 3, 100], ring_size=2 * ring_size)

    def imbalance(order):
        pairs = pairs_by_hop(segment_ids, order, ring_size).sum(axis=1)
        return pairs.max() / pairs.mean()

    [order] = balanced_permutation(segment_ids[None], ring_size=ring_size)
    assert imbalance(order) < 1.001
    for layout in ("contiguous", "zigzag"):
        assert imbalance(permutation(len(segment_ids), ring_size=ring_size, layout=layout)) > 1.2
    assert imbalance(permutation(len(segment_ids), ring_size=ring_size, layout="striped")) < 1.02


def test_one_document_is_zigzag():
    order = balanced_permutation(np.zeros((1, 48), int), ring_size=4)
    np.testing.assert_array_equal(order[0], permutation(48, ring_size=4, layout="zigzag"))


def test_as_drawn():
    segment_ids = packed([5, 9], ring_size=2, padding=2)
    [order] = balanced_permutation(segment_ids[None], ring_size=2)
    devices = np.empty(16, int)
    devices[order] = np.repeat([0, 1], 8)
    assert "".join(map(str, devices)) == "0011010011110001"


def test_every_row_has_its_own_order():
    rows = np.stack([packed([16], ring_size=2), packed([4, 12], ring_size=2)])
    orders = balanced_permutation(rows, ring_size=2)
    for row, order in zip(rows, orders, strict=True):
        np.testing.assert_array_equal(order, balanced_permutation(row[None], ring_size=2)[0])
    assert (orders[0] != orders[1]).any()
    tokens = np.arange(32).reshape(2, 16)
    held = np.take_along_axis(tokens, orders, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(held, np.argsort(orders, axis=1), axis=1), tokens)


def test_attention_needs_the_order_as_positions_and_nothing_else():
    segment_ids = np.stack([packed([5, 9], ring_size=2, padding=2), packed([16], ring_size=2)])
    orders = balanced_permutation(segment_ids, ring_size=2)
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 16, 1, 2)).astype(np.float32)
    held = lambda x: jnp.asarray(np.take_along_axis(x, orders.reshape(2, 16, *[1] * (x.ndim - 2)), axis=1))  # noqa: E731
    segments, positions = held(segment_ids), jnp.asarray(orders)
    natural, _ = reference_attention(
        *map(jnp.asarray, (q, k, v)), mask=CAUSAL, query_segments=segment_ids, key_segments=segment_ids
    )
    shuffled, _ = reference_attention(
        held(q),
        held(k),
        held(v),
        mask=CAUSAL,
        query_positions=positions,
        key_positions=positions,
        query_segments=segments,
        key_segments=segments,
    )
    np.testing.assert_allclose(shuffled, held(np.asarray(natural)), rtol=1e-6, atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"segment ids are of shape \[batch, tokens\], got \(8,\)"):
        balanced_permutation(np.zeros(8, int), ring_size=2)
    with pytest.raises(ValueError, match=r"length 9 is not divisible .* pad to 10"):
        balanced_permutation(np.zeros((1, 9), int), ring_size=2)
    with pytest.raises(ValueError, match="document 0 is in pieces, token 3 begins another; pack it in one piece"):
        balanced_permutation(np.array([[0, 0, 1, 0]]), ring_size=2)
