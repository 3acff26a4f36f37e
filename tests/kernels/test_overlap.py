import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.cost import AttentionShape
from ring_rl.kernels.hardware import HARDWARE, Hardware
from ring_rl.kernels.mask import CAUSAL, FULL, Mask
from ring_rl.kernels.overlap import minimal_share, ring_overlap


def machine(flops_per_second: float, bytes_per_second: float, links: int = 1) -> Hardware:
    return Hardware(
        name="test",
        flops_per_second=flops_per_second,
        memory_bytes=1.0,
        bytes_per_second=bytes_per_second,
        links=links,
        source="a test",
    )


def shape(tokens: int, *, query_heads: int = 8, key_value_heads: int = 2, element_bytes: int = 2) -> AttentionShape:
    return AttentionShape(
        batch=3,
        tokens=tokens,
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        head_dim=64,
        element_bytes=element_bytes,
    )


@pytest.mark.parametrize("ring_size", [2, 4])
def test_seconds_of_the_tightest_transfer_and_of_its_block(ring_size):
    """Forward any hop; backward the way home, where float32 sums of dk and dv have half a block to hide behind."""
    hardware = machine(1e12, 6e9, links=2)
    overlap = ring_overlap(
        shape(1024 * ring_size), mask=FULL, layout="contiguous", ring_size=ring_size, hardware=hardware
    )
    moved = 2 * 3 * 1024 * 2 * 64
    pairs = 3 * 8 * 64 * 1024**2
    assert overlap.forward_transfer_seconds == pytest.approx(moved * 2 / 3e9)
    assert overlap.backward_transfer_seconds == pytest.approx(moved * 4 / 3e9)
    assert overlap.forward_block_seconds == pytest.approx(4 * pairs / 1e12)
    assert overlap.backward_block_seconds == pytest.approx(10 * pairs / 2 / 1e12)


def test_every_block_but_the_last_covers_a_transfer():
    ring = {"layout": "contiguous", "ring_size": 4, "hardware": machine(1e12, 1e9)}
    seconds_per_pair = 4 * 3 * 8 * 64 / 1e12
    # Of a contiguous causal ring the own block has half the pairs of the busiest device at any other hop.
    causal = ring_overlap(shape(64), mask=CAUSAL, **ring)
    assert causal.forward_block_seconds == pytest.approx(16 * 17 / 2 * seconds_per_pair)
    # Of the keys two hops away the first query sees 4, the next ones 3, 2, 1; three hops away nobody sees any.
    window = ring_overlap(shape(64), mask=Mask(causal=True, window=16 + 1 + 4), **ring)
    assert window.forward_block_seconds == pytest.approx(10 * seconds_per_pair)


@given(
    layout=st.sampled_from(["contiguous", "zigzag"]),
    intensity=st.floats(50, 5000),
    links=st.sampled_from([1, 4, 6]),
    heads=st.sampled_from([(8, 8), (8, 2), (8, 1)]),
    element_bytes=st.sampled_from([2, 4]),
)
def test_the_minimal_share_is_where_hiding_begins(layout, intensity, links, heads, element_bytes):
    mask, visible_fraction = (FULL, 1) if layout == "contiguous" else (CAUSAL, 1 / 2)
    hardware = machine(intensity * 1e9, 1e9, links)
    sizes = {"query_heads": heads[0], "key_value_heads": heads[1], "element_bytes": element_bytes}
    least = {
        backward: minimal_share(hardware, **sizes, visible_fraction=visible_fraction, backward=backward)
        for backward in (False, True)
    }
    even = 2 * math.ceil(max(least.values()) / 2)

    def overlap(share):
        return ring_overlap(shape(share * 4, **sizes), mask=mask, layout=layout, ring_size=4, hardware=hardware)

    assert overlap(even + 2).hides
    if even > 4:
        assert not overlap(even - 4).hides
    forward = 2 * math.ceil(least[False] / 2)
    assert overlap(forward + 2).forward_transfer_seconds <= overlap(forward + 2).forward_block_seconds
    if forward > 4:
        assert overlap(forward - 4).forward_transfer_seconds > overlap(forward - 4).forward_block_seconds


def test_float32_gradients_make_backward_the_stricter_in_bfloat16_only():
    def least(element_bytes, backward):
        return minimal_share(
            HARDWARE["H100 NVLink"],
            query_heads=8,
            key_value_heads=8,
            element_bytes=element_bytes,
            visible_fraction=1,
            backward=backward,
        )

    assert least(2, True) / least(2, False) == pytest.approx(1.6)
    assert least(4, True) / least(4, False) == pytest.approx(0.8)


def test_backward_alone_can_fail_to_hide():
    sizes = {"query_heads": 8, "key_value_heads": 8, "element_bytes": 2}
    hardware = machine(1000e9, 1e9)
    # c = 1500 lies between forward's 1000 and backward's 1600; a hop in its midst would hide from 1200 on.
    overlap = ring_overlap(shape(6000, **sizes), mask=FULL, layout="contiguous", ring_size=4, hardware=hardware)
    assert overlap.forward_transfer_seconds <= overlap.forward_block_seconds
    assert not overlap.hides


def test_a_hop_without_work_hides_nothing():
    window = Mask(causal=True, window=16)
    long = {"layout": "contiguous", "ring_size": 8, "hardware": HARDWARE["H100 NVLink"]}
    assert ring_overlap(shape(2**20), mask=CAUSAL, **long).hides
    overlap = ring_overlap(shape(2**20), mask=window, **long)
    assert overlap.forward_block_seconds == 0
    assert not overlap.hides


def test_many_short_documents_leave_a_transfer_uncovered():
    ring = {"mask": CAUSAL, "layout": "zigzag", "ring_size": 8, "hardware": HARDWARE["H100 NVLink"]}
    assert ring_overlap(shape(2**18), **ring).hides
    assert not ring_overlap(shape(2**18), **ring, document_lengths=[256] * 2**10).hides


def test_free_transfers_hide_behind_anything():
    overlap = ring_overlap(
        shape(8), mask=Mask(causal=True, window=1), layout="striped", ring_size=8, hardware=HARDWARE["virtual CPU"]
    )
    assert overlap.hides


def test_refusals():
    with pytest.raises(ValueError, match="a ring of 1 has no hop"):
        ring_overlap(shape(8), mask=FULL, layout="contiguous", ring_size=1, hardware=HARDWARE["TPU v4"])
    with pytest.raises(ValueError, match=r"visible_fraction must be in \(0, 1\], got 0"):
        minimal_share(
            HARDWARE["TPU v4"], query_heads=1, key_value_heads=1, element_bytes=2, visible_fraction=0, backward=False
        )
