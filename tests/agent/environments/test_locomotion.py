"""The locomotion tasks that the suite does not have."""

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.environments.environment import make_environment, rewards_of_states

pytestmark = pytest.mark.simulator


@pytest.mark.parametrize(("speed", "forward", "backward"), [(5.0, 0.5, 0.0), (-2.0, 0.0, 0.2), (-12.0, 0.0, 1.0)])
def test_the_cheetah_is_paid_for_its_speed_in_the_tasks_direction(speed, forward, backward):
    state, actions = np.zeros((1, 18)), np.zeros((1, 6), np.float32)
    state[0, 9] = speed
    assert rewards_of_states("cheetah_run", state, actions)[0] == pytest.approx(forward, abs=1e-9)
    assert rewards_of_states("cheetah_run_backward", state, actions)[0] == pytest.approx(backward, abs=1e-9)


def test_the_walker_is_paid_for_its_angular_momentum():
    environment = make_environment("walker_flip", action_repeat=1)
    physics = environment.simulation.physics
    for spin in (-40.0, 0.0, 1.0, 3.0, 40.0):
        with physics.reset_context():
            physics.set_state(np.zeros(18))
            physics.named.data.qvel["rooty"] = spin
        state = physics.get_state()
        stand = rewards_of_states("walker_stand", state[None], np.zeros((1, 6), np.float32))[0]
        flip = rewards_of_states("walker_flip", state[None], np.zeros((1, 6), np.float32))[0]
        momentum = physics.named.data.subtree_angmom["torso"][1]  # not the sensor that the task reads
        assert flip == pytest.approx(stand * (5 * np.clip(momentum / 5, 0, 1) + 1) / 6)
    assert stand > 0.5
    assert flip == pytest.approx(stand)  # at 40 rad/s


def test_a_flip_has_the_states_and_observations_of_a_walk():
    flip, walk = (make_environment(task, action_repeat=1) for task in ("walker_flip", "walker_walk"))
    flip.reset(seed=1)
    walk.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(30):
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        one, _, _, _, one_info = flip.step(action)
        other, _, _, _, other_info = walk.step(action)
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one_info["physics"], other_info["physics"])
