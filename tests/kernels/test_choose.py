import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.kernels.choose import choose_strategy
from ring_rl.kernels.hardware import HARDWARE, VIRTUAL_CPU
from ring_rl.kernels.layout import LAYOUTS
from ring_rl.kernels.mask import CAUSAL, FULL, Mask

SLOW = HARDWARE["A100 InfiniBand"]


def choose(**changes):
    settings = {
        "mask": CAUSAL,
        "layout": "zigzag",
        "tokens": 2**14,
        "ring_size": 8,
        "query_heads": 32,
        "key_value_heads": 32,
        "head_dim": 128,
        "element_bytes": 2,
        "hardware": HARDWARE["H100 NVLink"],
    }
    return choose_strategy(**(settings | changes))


def test_one_device_needs_no_others():
    assert choose(ring_size=1) == "blockwise"


def test_a_ring_from_the_length_on_where_its_transfers_hide():
    """Causal zigzag, K = H, bfloat16 on an H100: backward needs c = 3.2 x 989e12 / 450e9 = 7033 tokens a device."""
    assert choose(tokens=8 * 7100) == "ring"
    assert choose(tokens=8 * 7000) == "ulysses"
    # Without a mask a hop has twice the work.
    assert choose(tokens=8 * 3600, mask=FULL) == "ring"
    assert choose(tokens=8 * 3500, mask=FULL) == "ulysses"
    # Four queries a key-value head: a quarter of the transfer.
    assert choose(tokens=8 * 1800, key_value_heads=8) == "ring"


def test_measured_hardware_changes_the_choice():
    at_half_peak = dataclasses.replace(HARDWARE["H100 NVLink"], flops_per_second=500e12)
    assert choose(tokens=8 * 4000) == "ulysses"
    assert choose(tokens=8 * 4000, hardware=at_half_peak) == "ring"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_window_asks_its_neighbours(layout):
    assert choose(mask=Mask(causal=True, window=1024), layout=layout, hardware=SLOW) == "ring"
    assert choose(mask=Mask(causal=True, window=2**14), layout=layout, hardware=SLOW) == "ulysses"


def test_a_window_over_stripes_is_judged_as_any_other_ring():
    assert choose(mask=Mask(causal=True, window=1024), layout="striped", hardware=SLOW) == "ulysses"


def test_heads_that_do_not_divide_are_gathered_while_they_are_few():
    uneven = {"ring_size": 7, "tokens": 14 * 1024, "hardware": SLOW}
    assert choose(**uneven) == "all_gather"  # 7 x 32 <= 4 x 64
    assert choose(**(uneven | {"ring_size": 14}), query_heads=30, key_value_heads=30) == "ring"
    assert choose(**(uneven | {"ring_size": 14}), query_heads=30, key_value_heads=5) == "all_gather"


def test_queries_are_not_sent_where_keys_are_fewer():
    """One key-value head on 8 devices: Ulysses would exchange 2 x (32 + 8) heads' worth, the gather 2 x 8."""
    assert choose(tokens=2**10, key_value_heads=1, hardware=SLOW) == "all_gather"


@given(
    layout=st.sampled_from(LAYOUTS),
    mask=st.sampled_from([FULL, CAUSAL, Mask(causal=True, causal_block_size=4), Mask(causal=True, window=3)]),
    ring_size=st.sampled_from([2, 3, 4, 8]),
    key_value_heads=st.sampled_from([1, 4, 8]),
)
def test_where_transfers_are_free_a_ring_it_is(layout, mask, ring_size, key_value_heads):
    chosen = choose(
        layout=layout,
        mask=mask,
        ring_size=ring_size,
        tokens=2 * ring_size,
        query_heads=8,
        key_value_heads=key_value_heads,
        hardware=VIRTUAL_CPU,
    )
    assert chosen == "ring"


def test_block_causality_is_judged_token_by_token():
    for tokens in (8 * 4000, 8 * 7000, 8 * 7100):
        for size in (512, tokens):
            assert choose(tokens=tokens, mask=Mask(causal=True, causal_block_size=size)) == choose(tokens=tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1001}, "sequence length 1001 is not divisible .* pad to 1008"),
        ({"key_value_heads": 5}, "32 query heads do not share 5 key-value heads evenly"),
        ({"ring_size": 0}, "ring size must be at least 1, got 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        choose(**changes)
