"""The rule behind strategy="auto"."""

import dataclasses

from ring_rl.kernels.cost import AttentionShape, Strategy, exchanged_key_value_heads, traffic, window_halo
from ring_rl.kernels.hardware import Hardware
from ring_rl.kernels.layout import Layout, check_length
from ring_rl.kernels.mask import Mask
from ring_rl.kernels.overlap import ring_overlap

# All keys and values live while one layer runs; q, k, v and out of one layer are a small part of what a model of tens
# of layers keeps. Four times those is still a small part of it.
LARGEST_GATHER = 4

_ULYSSES_AND_RING: tuple[Strategy, Strategy] = ("ulysses", "ring")


def choose_strategy(
    *,
    mask: Mask,
    layout: Layout,
    tokens: int,
    ring_size: int,
    query_heads: int,
    key_value_heads: int,
    head_dim: int,
    element_bytes: int,
    hardware: Hardware,
) -> Strategy:
    """The strategy for attention over one mesh axis: the first of these that applies.

        1. blockwise    the axis has one device
        2. ring         a window asks neighbours for fewer keys than the full circle brings (`window_halo`)
        3. ring         every hop's transfer hides behind a block, forward and backward (`ring_overlap`)
        4. ulysses      the devices divide the query heads, and divide or are divided by the key-value heads; and it
                        sends no more than the ring (few key-value heads are cheap to send round, queries are not)
        5. all_gather   all keys and values take at most `LARGEST_GATHER` times the bytes of a device's own q, k, v
                        and out, that is n K <= LARGEST_GATHER (H + K)
        6. ring         otherwise: slower than its work, but it needs the least memory

    A ring that hides its transfers waits for nobody and needs the least memory, hence its rank. Where it does not,
    Ulysses sends less (n / 2 times where K = H) and all_gather waits once instead of at every hop. The rule looks at
    transfers, not at balance: a causal mask in a contiguous layout makes a ring wait for its last device
    (`work_balance`), and the remedy is another layout. A batch scales transfers and work alike and does not matter.
    Blocks of block causality are judged token by token, which leaves pairs out and so never takes a transfer for hidden
    that is not. `hybrid` needs a mesh of two axes and `dense` is for tests: neither is ever chosen.

    Args:
        mask: What may attend to what.
        layout: Which tokens a device holds.
        tokens: T, over all devices.
        ring_size: n, devices along the axis.
        query_heads: H.
        key_value_heads: K.
        head_dim: D.
        element_bytes: Of q, k and v.
        hardware: One of `HARDWARE`, `hardware_for(device_kind)`, or measured figures.

    Raises:
        ValueError: The devices do not divide the sequence, or K does not divide H.
    """
    shape = AttentionShape(
        batch=1,
        tokens=tokens,
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        element_bytes=element_bytes,
    )
    check_length(tokens, ring_size=ring_size, layout=layout)
    if ring_size == 1:
        return "blockwise"
    if window_halo(mask, layout=layout, tokens=tokens, ring_size=ring_size) is not None:
        return "ring"
    by_token = dataclasses.replace(mask, causal_block_size=1)
    if ring_overlap(shape, mask=by_token, layout=layout, ring_size=ring_size, hardware=hardware).hides:
        return "ring"
    if _heads_divide(shape, ulysses_size=ring_size):
        ulysses, ring = (
            traffic(shape, strategy=strategy, mask=mask, layout=layout, axis_size=ring_size).total
            for strategy in _ULYSSES_AND_RING
        )
        if ulysses <= ring:
            return "ulysses"
    if ring_size * key_value_heads <= LARGEST_GATHER * (query_heads + key_value_heads):
        return "all_gather"
    return "ring"


def _heads_divide(shape: AttentionShape, *, ulysses_size: int) -> bool:
    """Whether Ulysses can deal the heads out to that many devices."""
    try:
        exchanged_key_value_heads(shape, ulysses_size=ulysses_size)
    except ValueError:
        return False
    return True
