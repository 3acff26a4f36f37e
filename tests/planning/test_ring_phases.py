"""What rings have to do, phase by phase, worked out by hand."""

import dataclasses

import numpy as np
import pytest

from ring_rl.kernels.cost import traffic
from ring_rl.kernels.hardware import Hardware
from ring_rl.planning.rates import Cluster, Rates
from ring_rl.planning.ring_phases import (
    RingPhases,
    busiest_phases,
    layer_rings,
    phase_pairs,
    ring_bytes,
    ring_phases,
)
from ring_rl.planning.ring_timeline import simulate_ring
from ring_rl.planning.step_sizes import StepSizes
from small_steps import small_request

CLUSTER = Cluster(
    device=Hardware(
        name="made up", flops_per_second=1e6, memory_bytes=1e9, bytes_per_second=1e6, links=1, source="for tests"
    )
)
PEAK = Rates(products_share=1.0, attention_share=1.0, link_share=1.0, hop_latency_seconds=0.0, gathers_overlap=False)
HALF = dataclasses.replace(PEAK, attention_share=0.5, link_share=0.5)


def ring_sizes(ring=4, **changes):
    return StepSizes(small_request(mesh={"sp": ring}, context=16 * ring, **changes))


def windowed(**changes):
    return ring_sizes(transformer={"attention_window": 5}, layout="contiguous", **changes)


def test_phases_of_an_even_ring_add_up_to_the_work_and_the_traffic():
    sizes = ring_sizes()
    forward = ring_phases(sizes, cluster=CLUSTER, rates=HALF, backward=False)
    backward = ring_phases(sizes, cluster=CLUSTER, rates=HALF, backward=True)
    pairs = 64 * 65 // 2
    head_elements = 2 * 8
    assert forward.block_seconds.sum() * 0.5e6 == pytest.approx(4 * head_elements * pairs)
    assert backward.block_seconds.sum() * 0.5e6 == pytest.approx(10 * head_elements * pairs)
    hop = 2 * 16 * head_elements
    # Three hops of k and v in float32 forward; backward as many, and as many of the sums of their gradients.
    assert forward.transfer_seconds[:, 0] * 0.5e6 == pytest.approx([4 * hop] * 3 + [0])
    assert backward.transfer_seconds[:, 0] * 0.5e6 == pytest.approx([4 * hop, 4 * hop, 8 * hop, 4 * hop, 4 * hop])


def test_half_the_speed_of_one_device_and_one_link():
    sizes = ring_sizes()
    rates = {"cluster": CLUSTER, "rates": dataclasses.replace(PEAK, hop_latency_seconds=0.01), "backward": False}
    even = ring_phases(sizes, **rates)
    uneven = ring_phases(sizes, **rates, device_speeds=[1, 0.5, 1, 1], link_speeds=[1, 1, 0.25, 1])
    assert uneven.block_seconds[:, 1] == pytest.approx(2 * even.block_seconds[:, 1])
    assert uneven.block_seconds[:, 2] == pytest.approx(even.block_seconds[:, 2])
    # A slow link carries bytes slowly, and takes no longer to begin.
    assert uneven.transfer_seconds[:3, 2] - 0.01 == pytest.approx(4 * (even.transfer_seconds[:3, 2] - 0.01))
    assert uneven.transfer_seconds[3, 2] == 0
    assert simulate_ring(uneven).seconds > simulate_ring(even).seconds


def test_two_devices_have_one_hop_and_a_way_home():
    backward = ring_phases(ring_sizes(ring=2), cluster=CLUSTER, rates=PEAK, backward=True)
    hop = 4 * 2 * 16 * 16 / 1e6
    assert backward.transfer_seconds[:, 0] == pytest.approx([hop, 0, hop])


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_busiest_device_is_the_most_of_every_phase(layout, backward):
    sizes = ring_sizes(layout=layout)
    every = ring_phases(sizes, cluster=CLUSTER, rates=PEAK, backward=backward)
    one = busiest_phases(sizes, cluster=CLUSTER, rates=PEAK, backward=backward)
    assert one.block_seconds[:, 0] == pytest.approx(every.block_seconds.max(axis=1))
    assert one.transfer_seconds[:, 0] == pytest.approx(every.transfer_seconds.max(axis=1))
    assert one.waiting_seconds == pytest.approx(every.waiting_seconds)
    # Even devices, each phase as long as its longer part: what the timeline of the whole ring comes to.
    assert simulate_ring(every).seconds == pytest.approx(one.block_seconds.sum() + one.waiting_seconds)


def test_waiting_is_what_blocks_do_not_cover():
    phases = RingPhases(np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, 5.0], [1.0, 1.0]]))
    assert phases.waiting_seconds == 3
    assert phases.tightest == (5, 2)


def test_the_way_home_can_be_what_waits():
    # Bfloat16: a hop in between brings 2 + 4 bytes behind a block, the last one 4 behind half of the own block.
    sizes = ring_sizes(transformer={"compute_dtype": "bfloat16"})
    # 3072 and 2048 bytes, behind 128 and 68 pairs of 16 dimensions: 20.5 and 10.9 ms.
    last = 10 * 16 * 68 / 1e6
    slow = Cluster(device=dataclasses.replace(CLUSTER.device, bytes_per_second=170e3))
    exposed = busiest_phases(sizes, cluster=slow, rates=PEAK, backward=True)
    assert exposed.transfer_seconds[2, 0] < exposed.block_seconds[2, 0]
    assert exposed.waiting_seconds == pytest.approx(2048 / 170e3 - last)
    assert exposed.waiting_seconds > 0
    assert exposed.tightest == pytest.approx((2048 / 170e3, last))


@pytest.mark.parametrize(
    ("heads_at_once", "expected"), [(None, (3, 8, 4, 1)), (1, (1, 2, 1, 12)), (3, (1, 4, 2, 6)), (9, (1, 8, 4, 3))]
)
def test_some_heads_at_once_are_as_many_more_rings(heads_at_once, expected):
    heads = {"query_heads": 8, "key_value_heads": 4}
    sizes = ring_sizes(transformer=heads, heads_at_once=heads_at_once, batch_size=3)
    shape, rings = layer_rings(sizes)
    # No more than wanted, and a divisor of the heads there are; a row at a time.
    assert (shape.batch, shape.query_heads, shape.key_value_heads, rings) == expected
    whole = layer_rings(ring_sizes(transformer=heads, batch_size=3))[0]
    assert rings * shape.batch * shape.query_heads == whole.batch * whole.query_heads
    all_at_once = ring_sizes(transformer=heads, batch_size=3)
    assert rings * ring_bytes(sizes).total == ring_bytes(all_at_once).total


def test_each_ring_of_some_heads_pays_the_latency():
    late = dataclasses.replace(PEAK, hop_latency_seconds=100.0 / 1024)
    by_head = ring_sizes(heads_at_once=1)
    phases = ring_phases(by_head, cluster=CLUSTER, rates=late, backward=False)
    free = ring_phases(by_head, cluster=CLUSTER, rates=PEAK, backward=False)
    assert phases.transfer_seconds[:3] - free.transfer_seconds[:3] == pytest.approx(np.full((3, 4), 100.0 / 1024))
    assert phases.transfer_seconds[3].tolist() == [0, 0, 0, 0]
    assert layer_rings(by_head)[1] == 2


def test_a_window_asks_neighbours_once():
    sizes = windowed()
    sent = traffic(
        sizes.attention_shape(), strategy="ring", mask=sizes.mask, layout="contiguous", axis_size=sizes.ring_size
    )
    assert ring_bytes(sizes) == sent
    forward = ring_phases(sizes, cluster=CLUSTER, rates=PEAK, backward=False)
    backward = ring_phases(sizes, cluster=CLUSTER, rates=PEAK, backward=True)
    # The four keys before a shard, of two heads of 8, k and v in float32; the same of their gradients.
    keys = 4 * 2 * 2 * 8 * 4 / 1e6
    assert forward.transfer_seconds[:, 1] == pytest.approx([keys, 0])
    assert backward.transfer_seconds[:, 1] == pytest.approx([keys, 0, keys])
    # Of a later shard: 16 own keys for 5 and fewer queries before them, and 4 + 3 + 2 + 1 pairs with the neighbour.
    assert phase_pairs(sizes)[:, 1].tolist() == [5 * 16 - 10, 10]
    assert phase_pairs(sizes)[:, 0].tolist() == [70, 0]
    assert backward.block_seconds[:, 1].sum() == pytest.approx(10 * 16 * 80 / 1e6)


@pytest.mark.parametrize("speeds", [[1, 1], [1, 1, 0, 1]])
def test_speeds_must_be_one_positive_number_a_device(speeds):
    with pytest.raises(ValueError, match="device_speeds must be 4 positive numbers"):
        ring_phases(ring_sizes(), cluster=CLUSTER, rates=PEAK, backward=False, device_speeds=speeds)


def test_without_a_ring_there_are_no_phases():
    assert not ring_sizes(ring=1).keys_travel
    with pytest.raises(ValueError, match="has no ring"):
        ring_phases(ring_sizes(ring=1), cluster=CLUSTER, rates=PEAK, backward=False)
