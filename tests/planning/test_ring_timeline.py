"""Timelines of rings that can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ring_rl.kernels.hardware import Hardware
from ring_rl.planning.ring_timeline import RingPhases, draw_timelines, ring_phases, simulate_ring
from ring_rl.planning.step_sizes import StepSizes
from small_steps import small_request

HARDWARE = Hardware(
    name="made up", flops_per_second=1e6, memory_bytes=1e9, bytes_per_second=1e6, links=1, source="for tests"
)


def phases(blocks, transfers, devices=3):
    """The same for all devices, by phase."""
    alike = lambda seconds: np.tile(np.asarray(seconds, float)[:, None], devices)  # noqa: E731
    return RingPhases(alike(blocks), alike(transfers))


def ring_sizes(ring=4, **changes):
    return StepSizes(small_request(mesh={"sp": ring}, context=16 * ring, **changes))


def test_a_ring_that_hides_its_transfers_takes_as_long_as_its_blocks():
    timeline = simulate_ring(phases([2, 2, 2], [1, 1, 0]))
    assert timeline.seconds == 6
    assert timeline.idle_share == 0


def test_a_hop_that_takes_longer_than_its_block_costs_its_transfer():
    # Two hops of 5, under each a block of 2, and the last block, which nothing follows.
    assert simulate_ring(phases([2, 2, 2], [5, 5, 0])).seconds == 12


def test_what_is_sent_in_the_last_phase_is_waited_for():
    assert simulate_ring(phases([2, 2], [1, 9])).seconds == 11


def test_a_slow_device_delays_its_neighbours_one_hop_at_a_time():
    blocks, transfers = np.ones((4, 4)), np.zeros((4, 4))
    transfers[:-1] = 0.5
    blocks[:, 0] = 3.0
    timeline = simulate_ring(RingPhases(blocks, transfers))
    # Device 0 is never held up: the others are done before it.
    assert timeline.block_start[:, 0].tolist() == [0, 3, 6, 9]
    # The next waits from the second phase on, because the first transfer came early, and both ends of it must be there.
    assert timeline.block_start[:, 1].tolist() == [0, 1, 3.5, 6.5]
    # Device 2 is held up one hop later.
    assert timeline.block_start[:, 2].tolist() == [0, 1, 2, 4.0]
    assert timeline.seconds == 12


def test_a_slow_link_holds_up_both_of_its_ends():
    blocks, transfers = np.ones((3, 3)), np.full((3, 3), 0.5)
    transfers[2], transfers[:2, 1] = 0, 4.0
    timeline = simulate_ring(RingPhases(blocks, transfers))
    assert timeline.block_start[1].tolist() == [1, 4, 4]
    assert timeline.block_start[2].tolist() == [4.5, 8, 8]
    assert timeline.seconds == 9


@given(
    st.integers(2, 5).flatmap(
        lambda devices: st.tuples(
            npst.arrays(float, (devices, devices), elements=st.floats(0, 10)),
            npst.arrays(float, (devices, devices), elements=st.floats(0, 10)),
        )
    )
)
def test_no_ring_beats_its_busiest_device_or_loses_to_taking_turns(seconds):
    blocks, transfers = seconds
    timeline = simulate_ring(RingPhases(blocks, transfers))
    assert timeline.seconds >= blocks.sum(axis=0).max() - 1e-9
    assert timeline.seconds <= np.maximum(blocks.max(axis=1), transfers.max(axis=1)).sum() + 1e-9
    # In order on every device.
    assert (timeline.block_start[1:] >= timeline.block_end[:-1] - 1e-9).all()


def test_phases_of_an_even_ring_add_up_to_the_work_and_the_traffic():
    sizes = ring_sizes()
    forward = ring_phases(sizes, hardware=HARDWARE, attention_share=0.5, link_share=0.5, backward=False)
    backward = ring_phases(sizes, hardware=HARDWARE, attention_share=0.5, link_share=0.5, backward=True)
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
    rates = {"hardware": HARDWARE, "attention_share": 1.0, "link_share": 1.0, "backward": False}
    even = ring_phases(sizes, **rates)
    uneven = ring_phases(sizes, **rates, device_speeds=[1, 0.5, 1, 1], link_speeds=[1, 1, 0.25, 1])
    assert uneven.block_seconds[:, 1] == pytest.approx(2 * even.block_seconds[:, 1])
    assert uneven.block_seconds[:, 2] == pytest.approx(even.block_seconds[:, 2])
    assert uneven.transfer_seconds[:, 2] == pytest.approx(4 * even.transfer_seconds[:, 2])
    assert simulate_ring(uneven).seconds > simulate_ring(even).seconds


def test_two_devices_have_one_hop_and_a_way_home():
    backward = ring_phases(ring_sizes(ring=2), hardware=HARDWARE, attention_share=1.0, link_share=1.0, backward=True)
    hop = 4 * 2 * 16 * 16 / 1e6
    assert backward.transfer_seconds[:, 0] == pytest.approx([hop, 0, hop])


def test_drawing_says_how_long_and_how_idle():
    figure = draw_timelines({"even": simulate_ring(phases([2e-3] * 3, [1e-3, 1e-3, 0]))}, devices_drawn=2)
    assert figure.axes[0].get_title() == "even: 6 ms, 0% idle, 1 more devices not drawn"


@pytest.mark.parametrize("speeds", [[1, 1], [1, 1, 0, 1]])
def test_speeds_must_be_one_positive_number_a_device(speeds):
    with pytest.raises(ValueError, match="device_speeds must be 4 positive numbers"):
        ring_phases(
            ring_sizes(),
            hardware=HARDWARE,
            attention_share=1.0,
            link_share=1.0,
            backward=False,
            device_speeds=speeds,
        )


def test_without_a_ring_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no ring"):
        ring_phases(ring_sizes(ring=1), hardware=HARDWARE, attention_share=1.0, link_share=1.0, backward=False)
