import dataclasses

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ring_rl.kernels.cost import (
    STRATEGIES,
    AttentionShape,
    Cost,
    Halo,
    attention_flops,
    memory,
    traffic,
    transformer_flops,
    window_halo,
)
from ring_rl.kernels.layout import Layout, permutation
from ring_rl.kernels.mask import CAUSAL, FULL, Mask, visible

# B c K D = 2 x 4 x 4 x 16 = 512 elements of k on each of 8 devices.
SHAPE = AttentionShape(batch=2, tokens=32, query_heads=8, key_value_heads=4, head_dim=16, element_bytes=2)
SHARE = 512


def sent(strategy, axis_size, *, shape=SHAPE, mask=CAUSAL, layout: Layout = "contiguous"):
    return traffic(shape, strategy=strategy, mask=mask, layout=layout, axis_size=axis_size)


def test_attention_counts_two_products_forward_and_five_backward():
    cost = attention_flops(SHAPE, mask=FULL)
    one_product = 2 * 2 * 8 * 16 * 32 * 32
    assert cost == Cost(2 * one_product, 5 * one_product)
    assert cost.total == 7 * one_product


def test_hidden_pairs_are_not_counted():
    full, causal = attention_flops(SHAPE, mask=FULL), attention_flops(SHAPE, mask=CAUSAL)
    assert causal.total / full.total == pytest.approx(33 / 64)
    packed = attention_flops(SHAPE, mask=FULL, document_lengths=[16, 16])
    assert packed.total * 2 == full.total


def test_a_transformer_of_the_papers_form_has_the_papers_flops():
    batch, tokens, width, layers = 3, 128, 64, 5
    shape = AttentionShape(
        batch=batch, tokens=tokens, query_heads=4, key_value_heads=4, head_dim=width // 4, element_bytes=2
    )
    form = {"mask": FULL, "layers": layers, "model_width": width, "feed_forward_width": 4 * width}
    cost = transformer_flops(shape, **form, feed_forward_products=2, vocabulary=0)
    attention = 4 * batch * tokens**2 * width * layers
    products = 24 * batch * tokens * width**2 * layers
    assert cost == Cost(products + attention, 2 * products + attention * 5 // 2)
    with_vocabulary = transformer_flops(shape, **form, feed_forward_products=2, vocabulary=1000)
    assert with_vocabulary.forward - cost.forward == 2 * batch * tokens * width * 1000
    gated = transformer_flops(shape, **form, feed_forward_products=3, vocabulary=0)
    assert gated.forward - cost.forward == 2 * batch * tokens * layers * width * 4 * width


def test_grouped_heads_save_projections_and_no_attention():
    form = {"mask": FULL, "layers": 1, "model_width": 64, "feed_forward_width": 1, "feed_forward_products": 2}
    grouped = transformer_flops(SHAPE, **form, vocabulary=0)
    full = transformer_flops(dataclasses.replace(SHAPE, key_value_heads=8), **form, vocabulary=0)
    assert full.forward - grouped.forward == 2 * 2 * 32 * 2 * 64 * 4 * 16


def test_a_ring_sends_its_keys_and_values_round_and_in_backward_their_gradients():
    assert sent("ring", 8) == Cost(7 * 2 * SHARE * 2, 7 * 2 * SHARE * (2 + 4))
    assert sent("ring", 1) == Cost(0, 0)


@given(axis_size=st.sampled_from([1, 2, 4, 8]), layout=st.sampled_from(["contiguous", "zigzag", "striped"]))
def test_gathering_moves_as_much_as_a_ring(axis_size, layout):
    assert sent("all_gather", axis_size, layout=layout) == sent("ring", axis_size, layout=layout)


def test_ulysses_exchanges_all_but_its_own_part():
    # On 4 devices: q and out of 8 heads, k and v of 4, 8 tokens each, 3/4 of which go elsewhere.
    expected = 3 * (2 * 8 * 16) * 2 * (8 + 4) * 2 // 4
    assert sent("ulysses", 4) == Cost(expected, expected)
    # On 8 devices 4 key-value heads are repeated: one for each.
    expected = 7 * (2 * 4 * 16) * 2 * (8 + 8) * 2 // 8
    assert sent("ulysses", 8) == Cost(expected, expected)


def test_ulysses_and_a_ring_compared_as_the_choice_says():
    many_heads = dataclasses.replace(SHAPE, key_value_heads=8)
    ring, ulysses = (sent(strategy, 8, shape=many_heads).forward for strategy in ("ring", "ulysses"))
    assert ring == ulysses * 8 // 2


def test_hybrid_joins_a_ring_and_ulysses():
    assert sent("hybrid", (4, 1)) == sent("ring", 4)
    assert sent("hybrid", (1, 4)) == sent("ulysses", 4)
    # A device of a ring of 2 sends 2 of its group's 4 heads and 8 of its 16 tokens to the other group: its own bytes.
    exchange = 2 * 4 * 16 * 2 * (8 + 4) * 2 * 3 // 4
    assert sent("hybrid", (2, 4)) == Cost(exchange + 2 * SHARE * 2, exchange + 2 * SHARE * (2 + 4))


def test_one_device_sends_nothing():
    assert sent("blockwise", 1) == sent("dense", 1) == Cost(0, 0)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 28])
def test_a_window_moves_its_own_keys_only(window):
    mask = Mask(causal=True, window=window)
    assert window_halo(mask, layout="contiguous", tokens=32, ring_size=8) == Halo(window - 1, 0)
    moved = (window - 1) * 2 * 2 * 4 * 16
    assert sent("ring", 8, mask=mask) == Cost(moved * 2, moved * (2 + 4))
    assert sent("ring", 8, mask=mask).total < sent("ring", 8).total


@pytest.mark.parametrize("window", [29, 32, None])
def test_a_window_as_long_as_the_circle_goes_round(window):
    mask = Mask(causal=True, window=window)
    assert window_halo(mask, layout="contiguous", tokens=32, ring_size=8) is None
    assert sent("ring", 8, mask=mask) == sent("ring", 8)


@pytest.mark.parametrize(
    ("mask", "halo"),
    [
        (Mask(causal=False, window=4), Halo(keys_back=3, keys_ahead=3)),
        (Mask(causal=True, causal_block_size=3, window=4), Halo(keys_back=3, keys_ahead=2)),
        # Twice 14 and 14 keys for two chunks are as many as the circle's 7 x 8.
        (Mask(causal=False, window=15), None),
    ],
)
def test_halo_looks_ahead_where_the_mask_does(mask, halo):
    assert window_halo(mask, layout="zigzag", tokens=64, ring_size=8) == halo


def test_stripes_have_no_halo():
    assert window_halo(Mask(causal=True, window=2), layout="striped", tokens=64, ring_size=8) is None


# Reaches so far that no device has the halos of both its chunks elsewhere.
@example(window=25, causal=True, layout="zigzag", ring_size=8)
@given(
    window=st.integers(1, 56),
    causal=st.booleans(),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    ring_size=st.sampled_from([2, 4, 8]),
)
def test_a_halo_is_the_keys_that_a_chunk_sees_and_its_device_lacks(window, causal, layout, ring_size):
    tokens = 64
    mask = Mask(causal=causal, window=window)
    assume(window_halo(mask, layout=layout, tokens=tokens, ring_size=ring_size) is not None)
    shown = np.asarray(visible(mask, np.arange(tokens), np.arange(tokens)))
    held = permutation(tokens, ring_size=ring_size, layout=layout).reshape(ring_size, -1)
    received = []
    for tokens_of_device in held:
        chunks = np.split(tokens_of_device, 2 if layout == "zigzag" else 1)
        seen = [np.flatnonzero(shown[chunk].any(axis=0)) for chunk in chunks]
        received.append(sum(len(np.setdiff1d(keys, tokens_of_device)) for keys in seen))
    shape = dataclasses.replace(SHAPE, tokens=tokens)
    per_key = 2 * 2 * 4 * 16
    assert sent("ring", ring_size, shape=shape, mask=mask, layout=layout).forward == max(received) * per_key * 2


def test_the_rings_of_hybrid_ask_their_neighbours_too():
    window = Mask(causal=True, window=3)
    assert sent("hybrid", (8, 1), mask=window) == sent("ring", 8, mask=window)
    # Two keys, of 4 / 2 heads, in place of three shards of 8 tokens; the exchange stays as it is.
    saved = (3 * 8 - 2) * 2 * 2 * 2 * 16
    full, halo = (sent("hybrid", (4, 2), mask=mask) for mask in (CAUSAL, window))
    assert (full.forward - halo.forward, full.backward - halo.backward) == (saved * 2, saved * (2 + 4))


def test_memory_of_a_ring_is_two_shards_however_many_devices():
    four = memory(dataclasses.replace(SHAPE, tokens=16), strategy="ring", layout="contiguous", axis_size=4)
    eight = memory(SHAPE, strategy="ring", layout="contiguous", axis_size=8)
    assert four == eight
    assert eight.forward_buffers == 2 * 2 * SHARE * 2
    assert eight.backward_buffers == 2 * 2 * SHARE * (2 + 4)
    # q and out have twice the heads of k and v; the log-sum-exp has one float32 a row and head.
    assert eight.saved == (2 * 2 * SHARE + 2 * SHARE) * 2 + 4 * 2 * 4 * 8
    two = memory(dataclasses.replace(SHAPE, tokens=8), strategy="ring", layout="contiguous", axis_size=2)
    assert two.forward_buffers * 2 == eight.forward_buffers


@pytest.mark.parametrize(("asked", "together"), [(1, 1), (3, 2), (4, 4), (9, 4)])
def test_buffers_of_some_heads_at_a_time_are_those_of_a_smaller_ring(asked, together):
    shape = dataclasses.replace(SHAPE, batch=3, query_heads=8, key_value_heads=4)
    group = dataclasses.replace(shape, batch=1, query_heads=2 * together, key_value_heads=together)
    ring = {"strategy": "ring", "layout": "contiguous", "axis_size": 4}
    found, alone, whole = memory(shape, **ring, heads_at_once=asked), memory(group, **ring), memory(shape, **ring)
    assert (found.forward_buffers, found.backward_buffers) == (alone.forward_buffers, alone.backward_buffers)
    assert found.saved == whole.saved
    with pytest.raises(ValueError, match="at least 1"):
        memory(shape, **ring, heads_at_once=0)


def test_memory_of_the_others():
    def of(strategy, axis_size):
        return memory(SHAPE, strategy=strategy, layout="contiguous", axis_size=axis_size)

    ring = of("ring", 8)
    assert of("all_gather", 8) == dataclasses.replace(
        ring, forward_buffers=4 * ring.forward_buffers, backward_buffers=4 * ring.backward_buffers
    )
    log_sum_exp = 4 * 2 * 4 * 8
    ulysses = of("ulysses", 8)
    assert ulysses.forward_buffers == ulysses.backward_buffers == 4 * 2 * SHARE * 2
    assert ulysses.saved == ulysses.forward_buffers + log_sum_exp
    assert of("hybrid", (8, 1)) == ring
    assert of("hybrid", (1, 8)) == ulysses
    hybrid = of("hybrid", (2, 4))
    assert hybrid.saved == ring.saved
    assert hybrid.forward_buffers == hybrid.saved - log_sum_exp + 2 * SHARE * 2
    blockwise, dense = of("blockwise", 1), of("dense", 1)
    assert blockwise.forward_buffers == blockwise.backward_buffers == 0
    assert blockwise.saved == dense.saved == 8 * ring.saved
    assert (dense.forward_buffers, dense.backward_buffers) == (4 * 2 * 8 * 32**2, 8 * 2 * 8 * 32**2)


@pytest.mark.parametrize(
    ("strategy", "axis_size", "changes", "message"),
    [
        ("ulysses", 3, {"tokens": 33}, "8 query heads cannot be dealt out to 3 devices"),
        ("ulysses", 4, {"query_heads": 12, "key_value_heads": 6}, "6 key-value heads neither divide 4 devices"),
        ("ring", 5, {}, "sequence length 32 is not divisible .* pad to 35"),
        ("hybrid", (2, 4), {"tokens": 34}, "sequence length 34 is not divisible by the 8 devices .* pad to 40"),
        ("hybrid", 8, {}, "axis_size of hybrid is .ring size, Ulysses size., got 8"),
        ("ring", (2, 4), {}, "axis_size of ring is one number"),
        ("ring", 0, {}, "at least 1, got 0"),
        ("blockwise", 2, {}, "blockwise has the whole sequence on one device"),
        ("tree", 2, {}, "unknown strategy 'tree'; choose one of ring, "),
    ],
)
def test_refusals(strategy, axis_size, changes, message):
    shape = dataclasses.replace(SHAPE, **changes)
    with pytest.raises(ValueError, match=message):
        sent(strategy, axis_size, shape=shape)
    with pytest.raises(ValueError, match=message):
        memory(shape, strategy=strategy, layout="contiguous", axis_size=axis_size)


def test_a_layout_must_suit_the_devices_of_ulysses():
    shape = dataclasses.replace(SHAPE, tokens=40)
    assert sent("ulysses", 8, shape=shape).total > 0
    with pytest.raises(ValueError, match="16 chunks of a zigzag ring of size 8; pad to 48"):
        sent("ulysses", 8, shape=shape, layout="zigzag")


def test_refused_shapes():
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        dataclasses.replace(SHAPE, tokens=0)
    with pytest.raises(ValueError, match="8 query heads do not share 3 key-value heads evenly"):
        dataclasses.replace(SHAPE, key_value_heads=3)


def test_every_strategy_has_a_cost():
    for strategy in STRATEGIES:
        axis_size = {"hybrid": (2, 2), "blockwise": 1, "dense": 1}.get(strategy, 4)
        assert memory(SHAPE, strategy=strategy, layout="zigzag", axis_size=axis_size).saved > 0
        assert (sent(strategy, axis_size, layout="zigzag").total > 0) == (axis_size != 1)
