from __future__ import annotations

import pytest

from ring_rl.training.profile import ProfileConfig, _own_durations


def test_an_operation_counts_without_those_inside_it():
    operations = [
        (0.0, 100.0, "while"),
        (10.0, 30.0, "dot"),
        (15.0, 5.0, "exp"),
        (50.0, 40.0, "dot"),
        (100.0, 10.0, "add"),
    ]
    expected = {"while": 30.0, "dot": 65.0, "exp": 5.0, "add": 10.0}
    own: dict[str, float] = {}
    for name, duration in _own_durations(reversed(operations)):
        own[name] = own.get(name, 0.0) + duration
    assert own == expected


@pytest.mark.parametrize("name", ["start_step", "steps"])
def test_a_profile_begins_after_the_first_step_and_holds_one(name):
    with pytest.raises(ValueError, match=f"{name} of a profile must be at least 1, got 0"):
        ProfileConfig(**{"enabled": True, "start_step": 1, "steps": 1, name: 0})
