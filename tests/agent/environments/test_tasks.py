"""What every task promises: recorded rewards come back from its states, and Gymnasium accepts it."""

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

import gymnasium
from gymnasium.utils.env_checker import check_env

from ring_rl.agent.environments import point_mass_maze
from ring_rl.agent.environments.batched_physics import BatchedPhysics
from ring_rl.agent.environments.domains import parse_task, task_names
from ring_rl.agent.environments.environment import (
    make_environment,
    make_vector_environment,
    register_environments,
    rewards_of_states,
)

pytestmark = pytest.mark.simulator


def start_where_the_task_pays(task):
    """An environment in an episode that random actions are paid in; rewards that are all 0 would prove nothing."""
    environment = make_environment(task, action_repeat=1)
    domain, name = parse_task(task)
    simulation = environment.simulation
    for seed in range(200):
        environment.reset(seed=seed)
        if domain != "jaco" or simulation.task.get_reward(simulation.physics) > 0.1:
            break
    state = {
        "point_mass_maze": np.array([*point_mass_maze.TARGETS.get(name, (0, 0)), 0.05, -0.05]),
        "cartpole": np.array([0.1, 0.05, 0.0, 0.0]),
    }.get(domain)
    if state is not None:
        with simulation.physics.reset_context():
            simulation.physics.set_state(state)
    return environment


@pytest.mark.parametrize("task", task_names())
def test_recorded_rewards_come_back_from_states_and_actions(task):
    """By the task's own simulation and by the batched one; also those that count the control."""
    environment = start_where_the_task_pays(task)
    rng = np.random.default_rng(0)
    recorded, states, actions = [], [], []
    for _ in range(40):
        actions.append(rng.uniform(-1, 1, environment.action_space.shape).astype(np.float32))
        _, reward, _, _, info = environment.step(actions[-1])
        recorded.append(reward)
        states.append(info["physics"])
    states, actions = np.array(states), np.array(actions)
    assert max(recorded) > 0.005
    np.testing.assert_allclose(rewards_of_states(task, states, actions), recorded, rtol=0, atol=1e-6)
    with BatchedPhysics(task, threads=1) as physics:
        np.testing.assert_allclose(physics.rewards(states, actions), recorded, rtol=0, atol=1e-6)
        without_control = physics.rewards(states, np.zeros_like(actions))
    counts_control = task in ("cartpole_balance", "cartpole_swingup") or task.startswith("point_mass_maze")
    assert (np.abs(without_control - recorded).max() > 1e-3) == counts_control


@pytest.mark.parametrize("task", task_names())
@pytest.mark.filterwarnings("ignore::UserWarning")  # the checker dislikes unbounded observations and no renderer
def test_gymnasium_makes_and_accepts_it(task):
    register_environments()
    environment = gymnasium.make(f"ring_rl/{task}-v0", action_repeat=2)
    assert environment.unwrapped.task == task
    check_env(environment.unwrapped)


@pytest.mark.parametrize("task", ["jaco_reach_top_left", "point_mass_maze_reach_top_left", "walker_flip"])
@pytest.mark.parametrize("batched", [False, True])
def test_rows_of_a_vector_are_the_episodes_of_their_seeds(task, batched):
    vector = make_vector_environment(task, count=2, action_repeat=2, batched=batched)
    single = make_environment(task, action_repeat=2)
    observations, _ = vector.reset(seed=[3, 4])
    observation, _ = single.reset(seed=4)
    np.testing.assert_array_equal(observations[1], observation)
    rng = np.random.default_rng(0)
    for _ in range(5):
        actions = rng.uniform(-1, 1, vector.action_space.shape).astype(np.float32)
        observations, rewards, *_ = vector.step(actions)
        observation, reward, *_ = single.step(actions[1])
        np.testing.assert_allclose(observations[1], observation, atol=1e-6, rtol=1e-6)
        assert rewards[1] == pytest.approx(reward, abs=1e-9)
    vector.close()
