import dataclasses

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="playing needs the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.environments.batched_physics import BatchedPhysics
from ring_rl.agent.environments.domains import DOMAINS, parse_task
from ring_rl.agent.environments.environment import make_environment
from ring_rl.agent.exploration.explorers import NoiseConfig, NoiseExplorer
from ring_rl.agent.exploration.play import play_batch

pytestmark = pytest.mark.simulator

NOISE = NoiseConfig("noise", 4, 2, "mix", 0.1, 0.5, 4.0, 64.0, 1.0)


def noise(task):
    action_dim = DOMAINS[parse_task(task)[0]].action_dim
    return NoiseExplorer(NOISE, episodes=2, action_dim=action_dim, seed=3)


@pytest.mark.parametrize("task", ["cartpole_swingup", "cheetah_run"])
def test_episodes_are_those_of_a_plain_dm_control_loop(task):
    """Observations, rewards and physics of every control step of a whole episode, to 1e-6."""
    batch = noise(task).batch(0)
    with BatchedPhysics(task, threads=2) as physics:
        played = play_batch(physics, batch, action_hold=4)[1]
    environment = make_environment(task, action_repeat=1)
    observation, info = environment.reset(seed=batch.reset_seeds[1])
    observations, states, rewards = [observation], [info["physics"]], []
    for action in played.actions:
        observation, reward, _, _, info = environment.step(action)
        observations.append(observation)
        states.append(info["physics"])
        rewards.append(reward)
    assert played.length == 1000
    np.testing.assert_allclose(played.observations, observations, atol=1e-6, rtol=0)
    np.testing.assert_allclose(played.rewards, rewards, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(played.physics, states)


@pytest.mark.parametrize("task", ["cheetah_run", "walker_walk", "jaco_reach_top_left"])
def test_an_explorer_is_played_alike_whether_it_says_its_actions_beforehand_or_not(task):
    batch, again = noise(task).batch(0), noise(task).batch(0)
    asked_every_decision = dataclasses.replace(again, reads_observations=True)
    with BatchedPhysics(task, threads=1) as physics:
        physics.episode_steps = 48
        at_once = play_batch(physics, batch, action_hold=4)
        in_turn = play_batch(physics, asked_every_decision, action_hold=4)
    for one, other in zip(at_once, in_turn, strict=True):
        assert one.length == 48
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.physics, other.physics)
        np.testing.assert_allclose(one.observations, other.observations, atol=1e-6)
        np.testing.assert_allclose(one.rewards, other.rewards, atol=1e-6)


def test_who_is_told_of_outcomes_must_read_observations():
    batch = noise("cartpole_swingup").batch(0)
    with pytest.raises(ValueError, match="must read observations"):
        dataclasses.replace(batch, observe=lambda actions, observations: None)
