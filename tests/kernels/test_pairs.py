import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels import pairs as pairs_module
from ring_rl.kernels.layout import LAYOUTS, permutation
from ring_rl.kernels.mask import CAUSAL, FULL, Mask, visible
from ring_rl.kernels.pairs import LONGEST_LENGTH, device_pairs, hop_pairs, visible_pairs, work_balance

windows = st.none() | st.integers(1, 30)
masks = st.one_of(
    st.builds(Mask, causal=st.just(False), window=windows),
    st.builds(Mask, causal=st.just(True), causal_block_size=st.integers(1, 9), window=windows),
)
# Few lengths, as the dense oracle is compiled for each.
LENGTH = 24
documents = st.none() | st.lists(st.integers(1, 9), max_size=4).filter(lambda lengths: sum(lengths) <= LENGTH)


def dense(mask: Mask, document_lengths: list[int] | None) -> np.ndarray:
    positions, segments = np.arange(LENGTH), np.zeros(LENGTH, int)
    if document_lengths is not None:
        segments = np.full(LENGTH, -1)
        segments[: sum(document_lengths)] = np.repeat(np.arange(len(document_lengths)), document_lengths)
    return np.asarray(visible(mask, positions, positions, segments, segments))


@given(mask=masks, document_lengths=documents)
def test_as_many_pairs_as_the_dense_mask_shows(mask, document_lengths):
    assert visible_pairs(mask, LENGTH, document_lengths) == dense(mask, document_lengths).sum()


@given(mask=masks, document_lengths=documents, layout=st.sampled_from(LAYOUTS), ring_size=st.sampled_from([1, 2, 3, 6]))
def test_pairs_between_devices_are_those_of_the_dense_mask(mask, document_lengths, layout, ring_size):
    order = permutation(LENGTH, ring_size=ring_size, layout=layout)
    blocks = dense(mask, document_lengths)[order][:, order].reshape(ring_size, LENGTH // ring_size, ring_size, -1)
    shape = {"layout": layout, "tokens": LENGTH, "ring_size": ring_size, "document_lengths": document_lengths}
    pairs = device_pairs(mask, **shape)
    np.testing.assert_array_equal(pairs, blocks.sum(axis=(1, 3)))
    hops = hop_pairs(mask, **shape)
    for hop in range(ring_size):
        for device in range(ring_size):
            assert hops[hop, device] == pairs[device, (device - hop) % ring_size]


def test_closed_forms_at_the_longest_length():
    t, w = LONGEST_LENGTH, 2**20
    assert visible_pairs(FULL, t) == t * t
    assert visible_pairs(CAUSAL, t) == t * (t + 1) // 2
    assert visible_pairs(Mask(causal=True, window=w), t) == t * w - w * (w - 1) // 2
    assert visible_pairs(Mask(causal=False, window=w), t) == t * (2 * w - 1) - w * (w - 1)
    with pytest.raises(ValueError, match="overflow 64 bits"):
        visible_pairs(CAUSAL, t + 1)


def test_blocks_beyond_those_counted_at_once():
    blocks, size = 2 * pairs_module._BLOCKS_AT_ONCE + 3, 2
    length = blocks * size
    assert visible_pairs(Mask(causal=True, causal_block_size=size), length) == length * (length + size) // 2


@pytest.mark.parametrize("ring_size", [2, 4, 8])
def test_balance_of_causal_work(ring_size):
    def balance(layout, **options):
        return work_balance(CAUSAL, layout=layout, tokens=4096, ring_size=ring_size, **options)

    assert balance("contiguous") == pytest.approx(2 - 1 / ring_size, rel=2e-3)
    assert balance("zigzag") == 1
    assert balance("striped") == pytest.approx(1, rel=ring_size * 1e-3)
    assert balance("striped") > 1
    # Who gathered all keys waits once: the last device of a contiguous layout still has the most to do.
    assert balance("contiguous", lockstep=False) == pytest.approx(2 - 1 / ring_size, rel=2e-3)
    assert balance("zigzag", lockstep=False) == 1


def test_waiting_at_every_hop_can_only_take_longer():
    packed = {"layout": "contiguous", "tokens": 64, "ring_size": 4, "document_lengths": [30, 4, 20]}
    lockstep, at_the_end = (work_balance(CAUSAL, lockstep=wait, **packed) for wait in (True, False))
    assert lockstep > at_the_end > 1


def test_without_a_mask_every_layout_is_balanced():
    assert {work_balance(FULL, layout=layout, tokens=48, ring_size=4) for layout in LAYOUTS} == {1.0}


@pytest.mark.parametrize(
    ("tokens", "document_lengths", "message"),
    [
        (12, [8, 8], r"documents of 16 tokens do not fit into a sequence of 12"),
        (12, [8, 0], r"at least 1 token, got 0"),
        (10, None, r"sequence length 10 is not divisible .* pad to 12"),
        (12, [], r"no token sees any other"),
    ],
)
def test_refusals(tokens, document_lengths, message):
    with pytest.raises(ValueError, match=message):
        work_balance(CAUSAL, layout="contiguous", tokens=tokens, ring_size=4, document_lengths=document_lengths)
