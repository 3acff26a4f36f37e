import numpy as np
import pytest
from gymnasium.utils.seeding import np_random

pytest.importorskip("dm_control", reason="physics needs the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.environments import batched_physics
from ring_rl.agent.environments.batched_physics import BatchedPhysics
from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names
from ring_rl.agent.environments.environment import make_environment, rewards_of_states

pytestmark = pytest.mark.simulator


def random_actions(rng, physics, batch):
    return rng.uniform(-1, 1, (batch, DOMAINS[parse_task(physics.task)[0]].action_dim)).astype(np.float32)


@pytest.mark.parametrize("task", task_names())
def test_it_follows_a_plain_dm_control_loop(task):
    """Observations, rewards and states of one of three episodes, step by step, from the same reset."""
    rng = np.random.default_rng(0)
    environment = make_environment(task, action_repeat=1)
    with BatchedPhysics(task, threads=2) as physics:
        observations, states = physics.reset([4, 5, 6])
        observation, info = environment.reset(seed=5)
        np.testing.assert_array_equal(observations[1], observation)
        np.testing.assert_array_equal(states[1], info["physics"])
        for _ in range(8):
            actions = random_actions(rng, physics, 3)
            steps = physics.step(states, actions, action_hold=3)
            for control_step in range(3):
                observation, reward, _, _, info = environment.step(actions[1])
                np.testing.assert_allclose(steps.observations[1, control_step], observation, atol=1e-6, rtol=1e-6)
                np.testing.assert_allclose(steps.physics[1, control_step], info["physics"], atol=1e-6, rtol=1e-6)
                assert steps.rewards[1, control_step] == pytest.approx(reward, abs=1e-6)
            states = steps.physics[:, -1]


def plain_episode(task, seed, actions, hold):
    """States and rewards of dm_control's own loop."""
    environment = make_environment(task, action_repeat=1)
    _, info = environment.reset(seed=seed)
    states, rewards = [], []
    for action in actions.repeat(hold, axis=0):
        _, reward, _, _, info = environment.step(action)
        states.append(info["physics"])
        rewards.append(reward)
    return np.array(states), np.array(rewards)


@pytest.mark.parametrize("task", ["cartpole_swingup", "cheetah_run"])
def test_a_whole_episode_is_dm_controls_in_one_call_and_in_many(task, monkeypatch):
    """In one call it is cut into pieces that the simulator's records fit in; none of them may be felt."""
    monkeypatch.setattr(batched_physics, "_CHUNK_VALUES", 2**14)
    rng = np.random.default_rng(1)
    with BatchedPhysics(task, threads=2) as physics:
        start = physics.start([8, 9])
        actions = np.stack([random_actions(rng, physics, 2) for _ in range(100)], axis=1)
        played = physics.play(start.physics, actions, action_hold=10, warm_starts=start.warm_starts)
        states, warm_starts, rewards = start.physics, start.warm_starts, []
        for decision in range(100):
            steps = physics.step(states, actions[:, decision], action_hold=10, warm_starts=warm_starts)
            states, warm_starts = steps.physics[:, -1], steps.warm_starts
            rewards.append(steps.rewards)
    wanted_states, wanted_rewards = plain_episode(task, 9, actions[1], hold=10)
    np.testing.assert_array_equal(played.physics[1], wanted_states)
    np.testing.assert_allclose(played.rewards[1], wanted_rewards, atol=1e-9)
    np.testing.assert_array_equal(states, played.physics[:, -1])
    np.testing.assert_array_equal(warm_starts, played.warm_starts)
    np.testing.assert_allclose(np.concatenate(rewards, axis=1), played.rewards, atol=1e-9)


def test_a_cold_start_of_the_contact_solver_is_felt():
    """What warm starts are handed on for: without them a body in contact leaves dm_control's path."""
    rng = np.random.default_rng(1)
    with BatchedPhysics("walker_walk", threads=1) as physics:
        start = physics.start([0])
        warm, cold, warm_starts = start.physics, start.physics, start.warm_starts
        for _ in range(15):
            actions = random_actions(rng, physics, 1)
            steps = physics.step(warm, actions, action_hold=10, warm_starts=warm_starts)
            warm, warm_starts = steps.physics[:, -1], steps.warm_starts
            cold = physics.step(cold, actions, action_hold=10).physics[:, -1]
    assert 0 < np.abs(warm - cold).max() < 0.1


def test_a_start_continues_the_stream_of_a_generator():
    environment = make_environment("walker_walk", action_repeat=1)
    environment.reset(seed=3)
    observation, info = environment.reset()
    generator = np_random(3)[0]
    with BatchedPhysics("walker_walk", threads=1) as physics:
        physics.start([generator])
        again = physics.start([generator])
    np.testing.assert_array_equal(again.observations[0], observation)
    np.testing.assert_array_equal(again.physics[0], info["physics"])


@pytest.mark.parametrize("task", ["walker_run", "cheetah_run", "quadruped_walk", "cartpole_swingup"])
def test_sensors_do_not_lag(task):
    """Rewards are those of the states reached, by dm_control's own function, not of the states before."""
    rng = np.random.default_rng(2)
    with BatchedPhysics(task, threads=2) as physics:
        _, states = physics.reset(range(2))
        for _ in range(5):
            actions = random_actions(rng, physics, 2)
            steps = physics.step(states, actions, action_hold=2)
            states = steps.physics[:, -1]
        for episode in range(2):
            wanted = rewards_of_states(task, steps.physics[episode], np.repeat(actions[episode, None], 2, axis=0))
            np.testing.assert_allclose(steps.rewards[episode], wanted, atol=1e-9)
        np.testing.assert_allclose(physics.rewards(states, actions), steps.rewards[:, -1], atol=1e-12)


@pytest.mark.parametrize("task", ["walker_walk", "cartpole_swingup"])
def test_the_result_depends_neither_on_threads_nor_on_the_rest_of_the_batch(task):
    rng = np.random.default_rng(3)
    with BatchedPhysics(task, threads=1) as one, BatchedPhysics(task, threads=2) as two:
        _, states = one.reset(range(7))
        actions = random_actions(rng, one, 7)
        together = one.step(states, actions, action_hold=4)
        threaded = two.step(states, actions, action_hold=4)
        alone = two.step(states[3:4], actions[3:4], action_hold=4)
    np.testing.assert_array_equal(together.physics, threaded.physics)
    np.testing.assert_array_equal(together.rewards, threaded.rewards)
    np.testing.assert_array_equal(together.observations[3], alone.observations[0])


def test_actions_are_clipped():
    with BatchedPhysics("cartpole_swingup", threads=1) as physics:
        _, states = physics.reset([0])
        inside = physics.step(states, np.ones((1, 1), np.float32), action_hold=2)
        outside = physics.step(states, np.full((1, 1), 9.0, np.float32), action_hold=2)
    np.testing.assert_array_equal(inside.physics, outside.physics)
    np.testing.assert_array_equal(inside.rewards, outside.rewards)


def test_an_unstable_simulation_is_an_error_and_not_a_fresh_start():
    with BatchedPhysics("cartpole_swingup", threads=1) as physics:
        _, states = physics.reset([0, 1])
        states[1, 2:] = 1e12
        with pytest.raises(FloatingPointError, match="unstable in episode 1 of the batch"):
            physics.step(states, np.zeros((2, 1), np.float32), action_hold=4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="threads must be at least 1"):
        BatchedPhysics("cartpole_swingup", threads=0)
    with pytest.raises(ValueError, match="unknown task"):
        BatchedPhysics("cartpole_jump", threads=1)
    with BatchedPhysics("cartpole_swingup", threads=1) as physics:
        _, states = physics.reset([0, 1])
        actions = np.zeros((2, 1), np.float32)
        with pytest.raises(ValueError, match=r"actions of cartpole_swingup must have shape \(2, 1\), got \(1, 1\)"):
            physics.step(states, actions[:1], action_hold=1)
        with pytest.raises(ValueError, match=r"physics of cartpole_swingup must have shape \(2, 4\)"):
            physics.step(states[:, :3], actions, action_hold=1)
        with pytest.raises(ValueError, match="actions must be finite, got a NaN or infinity in row 1"):
            physics.step(states, np.array([[0], [np.nan]], np.float32), action_hold=1)
        with pytest.raises(ValueError, match="action_hold must be at least 1"):
            physics.step(states, actions, action_hold=0)
        with pytest.raises(ValueError, match=r"actions of cartpole_swingup must have shape \(2, 1, 1\), got \(2, 1\)"):
            physics.play(states, actions, action_hold=1)
        with pytest.raises(
            ValueError, match=r"actions of cartpole_swingup must have shape \(2, 1, 1\), got \(2, 0, 1\)"
        ):
            physics.play(states, actions[:, None][:, :0], action_hold=1)
        with pytest.raises(ValueError, match=r"warm_starts of cartpole_swingup must have shape \(2, 2\)"):
            physics.step(states, actions, action_hold=1, warm_starts=np.zeros((1, 2)))
    with pytest.raises(RuntimeError, match="closed"):
        physics.step(states, actions, action_hold=1)


@pytest.mark.parametrize("task", ["cheetah_run", "cartpole_swingup"])
def test_threads_that_share_resets_keep_their_order(task):
    with BatchedPhysics(task, threads=1) as one, BatchedPhysics(task, threads=3) as three:
        alone, shared = one.start(range(7)), three.start(range(7))
    np.testing.assert_array_equal(shared.observations, alone.observations)
    np.testing.assert_array_equal(shared.physics, alone.physics)
    np.testing.assert_array_equal(shared.warm_starts, alone.warm_starts)
