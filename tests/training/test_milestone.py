import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.training.milestone import AdvanceWhen, Milestone


def ends(values, config, *, first_step, minimum_steps, stop_after=None):
    """The first step at which the milestone is reached, None for never; perhaps saved and restored on the way."""
    milestone = Milestone(config, first_step=first_step, minimum_steps=minimum_steps)
    for step, value in enumerate(values, start=first_step + 1):
        milestone.observe(step, {"accuracy": value, "loss": 0.0})
        if step == stop_after:
            milestone = Milestone(
                config, first_step=first_step, minimum_steps=minimum_steps, observed=milestone.observed
            )
        if milestone.reached(step):
            return step
    return None


@given(
    values=st.lists(st.floats(0, 1), max_size=40),
    over_steps=st.integers(1, 7),
    first_step=st.integers(0, 50),
    minimum_steps=st.integers(0, 20),
    stop_after=st.integers(0, 90),
    above=st.sampled_from([0.3, 0.5, 0.7]),
)
def test_it_is_reached_at_the_first_good_block_that_is_late_enough(
    values, over_steps, first_step, minimum_steps, stop_after, above
):
    config = AdvanceWhen(metric="accuracy", above=above, below=None, over_steps=over_steps)
    blocks = [values[start : start + over_steps] for start in range(0, len(values) - over_steps + 1, over_steps)]
    wanted = [
        first_step + over_steps * (number + 1)
        for number, block in enumerate(blocks)
        if math.fsum(block) / over_steps >= above and over_steps * (number + 1) >= minimum_steps
    ]
    expected = wanted[0] if wanted else None
    assert ends(values, config, first_step=first_step, minimum_steps=minimum_steps) == expected
    # Whether it was stopped and went on, anywhere, changes nothing.
    assert ends(values, config, first_step=first_step, minimum_steps=minimum_steps, stop_after=stop_after) == expected


def test_a_falling_metric_has_a_bound_above():
    config = AdvanceWhen(metric="accuracy", above=None, below=0.1, over_steps=2)
    assert ends([1.0, 0.2, 0.1, 0.2, 0.1, 0.1], config, first_step=0, minimum_steps=0) == 6
    assert ends([0.0, math.nan], config, first_step=0, minimum_steps=0) is None
    zero = AdvanceWhen(metric="accuracy", above=None, below=0.0, over_steps=1)
    assert ends([0.1, 0.0], zero, first_step=0, minimum_steps=0) == 2


def test_without_a_milestone_nothing_is_reached_or_asked_for():
    milestone = Milestone(None, first_step=0, minimum_steps=0)
    milestone.observe(1, {})
    assert not milestone.due(1)
    assert not milestone.reached(1)


def test_steps_between_two_blocks_are_not_due():
    milestone = Milestone(
        AdvanceWhen(metric="loss", above=0.5, below=None, over_steps=3), first_step=2, minimum_steps=0
    )
    assert [step for step in range(3, 12) if milestone.due(step)] == [5, 8, 11]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"above": None}, "either above or below"),
        ({"below": 0.5}, "either above or below"),
        ({"over_steps": 0}, "over_steps must be at least 1, got 0"),
    ],
)
def test_bad_conditions_are_refused(changes, complaint):
    values = {"metric": "loss", "above": 0.5, "below": None, "over_steps": 1}
    with pytest.raises(ValueError, match=complaint):
        AdvanceWhen(**(values | changes))


def test_an_unknown_metric_is_named():
    milestone = Milestone(
        AdvanceWhen(metric="accuracy", above=0.5, below=None, over_steps=3), first_step=0, minimum_steps=0
    )
    with pytest.raises(ValueError, match="no metric accuracy for advance_when; choose one of gradient_norm, loss"):
        milestone.observe(1, {"loss": np.float32(1.0), "gradient_norm": np.float32(1.0)})
