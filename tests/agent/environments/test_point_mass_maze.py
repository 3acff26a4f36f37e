import numpy as np
import pytest

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.environments.environment import make_environment, rewards_of_states
from ring_rl.agent.environments.point_mass_maze import TARGETS

pytestmark = pytest.mark.simulator


def roll(position, action, *, steps):
    """Where a ball ends that starts at rest and is pushed the same way all the time."""
    environment = make_environment("point_mass_maze_reach_top_left", action_repeat=1)
    environment.reset(seed=0)
    physics = environment.simulation.physics
    with physics.reset_context():
        physics.set_state(np.array([*position, 0.0, 0.0]))
    for _ in range(steps):
        observation, *_ = environment.step(np.array(action, np.float32))
    return observation[:2]


def test_episodes_start_at_rest_in_the_corner_of_the_top_left_room():
    environment = make_environment("point_mass_maze_reach_bottom_right", action_repeat=1)
    starts = np.array([environment.reset(seed=seed)[0] for seed in range(50)])
    assert (starts[:, 2:] == 0).all()
    assert (starts[:, :2] >= np.float32([-0.29, 0.15])).all()
    assert (starts[:, :2] <= np.float32([-0.15, 0.29])).all()
    assert (np.ptp(starts[:, :2], axis=0) > 0.1).all()


def test_an_arm_of_the_cross_stops_the_ball_and_the_gap_beside_it_lets_it_pass():
    stopped = roll((-0.1, 0.15), (0.0, -1.0), steps=500)
    assert 0.02 < stopped[1] < 0.035  # half the arm's thickness and the ball's radius
    passed = roll((-0.24, 0.15), (0.0, -1.0), steps=500)
    assert passed[1] < -0.25


def test_the_table_has_an_edge():
    assert roll((-0.24, 0.24), (-1.0, 1.0), steps=500) == pytest.approx([-0.29, 0.29], abs=0.005)


@pytest.mark.parametrize("name", TARGETS)
def test_the_reward_falls_with_the_distance_and_with_the_control(name):
    x, y = TARGETS[name]
    states = np.zeros((4, 4))
    states[:, 0], states[:, 1] = x + np.array([0.0, 0.0, 0.03, 0.1]), y
    actions = np.zeros((4, 2), np.float32)
    actions[1] = 1.0
    rewards = rewards_of_states(f"point_mass_maze_{name}", states, actions)
    np.testing.assert_allclose(rewards[:3], [1.0, 0.8, 0.1], atol=1e-9)
    assert rewards[3] < 1e-9
