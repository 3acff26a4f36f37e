"""Timelines of rings that can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ring_rl.planning.ring_phases import RingPhases
from ring_rl.planning.ring_timeline import draw_timelines, simulate_ring


def phases(blocks, transfers, devices=3):
    """The same for all devices, by phase."""
    alike = lambda seconds: np.tile(np.asarray(seconds, float)[:, None], devices)  # noqa: E731
    return RingPhases(alike(blocks), alike(transfers))


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


def test_drawing_says_how_long_and_how_idle():
    even = simulate_ring(phases([2e-3] * 3, [1e-3, 1e-3, 0]))
    figure = draw_timelines({"even": even, "again": even, "last": even}, devices_drawn=2, columns=2)
    # Columns are filled one after the other.
    titles = [axes.get_title().partition(":")[0] for axes in figure.axes]
    assert titles == ["even", "last", "again", ""]
    assert figure.axes[0].get_title() == "even: 6 ms, 0% idle; 1 more devices not drawn"
    blocks, sent = figure.axes[0].collections[:2]
    assert [path.get_extents().x0 for path in blocks.get_paths()] == pytest.approx([0, 2, 4])
    # Nothing is sent in the last phase.
    assert len(sent.get_paths()) == 2
