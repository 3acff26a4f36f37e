from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.episodes.trajectory import Trajectory, merge_held_actions


def make_trajectory(*, decisions=5, hold=1, observation_dim=3, action_dim=2, physics_dim=4, seed=0) -> Trajectory:
    """Random numbers; every action is held for `hold` steps."""
    rng = np.random.default_rng(seed)
    length = decisions * hold
    return Trajectory(
        observations=rng.normal(size=(length + 1, observation_dim)).astype(np.float32),
        actions=np.repeat(rng.uniform(-1, 1, (decisions, action_dim)), hold, axis=0).astype(np.float32),
        rewards=rng.uniform(0, 1, length).astype(np.float32),
        discounts=np.ones(length, np.float32),
        physics=rng.normal(size=(length + 1, physics_dim)) if physics_dim else None,
    )


def test_length_counts_steps_not_states():
    assert make_trajectory(decisions=7).length == 7


def test_return_is_accumulated_in_float64():
    length = 100_000
    trajectory = Trajectory(
        observations=np.zeros((length + 1, 1), np.float32),
        actions=np.zeros((length, 1), np.float32),
        rewards=np.full(length, 0.1, np.float32),
        discounts=np.ones(length, np.float32),
        physics=None,
    )
    assert trajectory.episode_return == pytest.approx(float(np.float32(0.1)) * length, rel=1e-12)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("observations", np.zeros((6, 3)), "observations must be float32, got float64"),
        ("observations", np.zeros(6, np.float32), "observations must have 2 dimension"),
        ("observations", [[0.0]], "observations must be a numpy array"),
        ("actions", np.zeros((6, 2), np.float32), "actions must have 5 rows beside 6 observations, got 6"),
        ("rewards", np.zeros((5, 1), np.float32), "rewards must have 1 dimension"),
        ("discounts", np.zeros(4, np.float32), "discounts must have 5 rows"),
        ("physics", np.zeros((6, 4), np.float32), "physics must be float64"),
        ("physics", np.zeros((5, 4)), "physics must have 6 rows"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(make_trajectory(decisions=5), **{field: value})


def test_an_episode_without_a_step_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        Trajectory(
            observations=np.zeros((1, 1), np.float32),
            actions=np.zeros((0, 1), np.float32),
            rewards=np.zeros(0, np.float32),
            discounts=np.zeros(0, np.float32),
            physics=None,
        )


@given(decisions=st.integers(1, 12), hold=st.integers(1, 6), has_physics=st.booleans(), seed=st.integers(0, 99))
def test_merging_keeps_the_return_and_the_decisions(decisions, hold, has_physics, seed):
    trajectory = make_trajectory(decisions=decisions, hold=hold, physics_dim=4 if has_physics else 0, seed=seed)
    merged = merge_held_actions(trajectory, hold)
    assert merged.length == decisions
    assert merged.episode_return == pytest.approx(trajectory.episode_return, rel=1e-6)
    for decision in range(decisions):
        control = decision * hold
        np.testing.assert_array_equal(merged.observations[decision], trajectory.observations[control])
        np.testing.assert_array_equal(merged.actions[decision], trajectory.actions[control])
        wanted = trajectory.rewards[control : control + hold].sum(dtype=np.float64)
        assert merged.rewards[decision] == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_array_equal(merged.observations[-1], trajectory.observations[-1])
    assert (merged.physics is not None) == has_physics


def test_merging_multiplies_discounts():
    trajectory = make_trajectory(decisions=2, hold=2)
    ended = replace(trajectory, discounts=np.array([1, 1, 1, 0], np.float32))
    np.testing.assert_array_equal(merge_held_actions(ended, 2).discounts, [1, 0])


def test_merging_by_one_changes_nothing():
    trajectory = make_trajectory()
    assert merge_held_actions(trajectory, 1) is trajectory


def test_merging_refuses_actions_that_were_not_held():
    trajectory = make_trajectory(decisions=4, hold=2)
    with pytest.raises(ValueError, match=r"changes at control step 2.*action_hold=4"):
        merge_held_actions(trajectory, 4)


def test_merging_refuses_a_length_that_does_not_divide():
    with pytest.raises(ValueError, match="length 5 is not divisible by action_repeat 2"):
        merge_held_actions(make_trajectory(decisions=5), 2)


@pytest.mark.parametrize("action_repeat", [0, -1, 2.0, True])
def test_merging_refuses_what_is_not_a_count(action_repeat):
    with pytest.raises(ValueError, match="action_repeat must be an integer of at least 1"):
        merge_held_actions(make_trajectory(), action_repeat)
