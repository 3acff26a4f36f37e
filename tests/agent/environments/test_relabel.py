import numpy as np
import pytest

pytest.importorskip("dm_control", reason="relabelling needs the simulator: pip install 'ring_rl[simulator]'")

from dataclasses import replace
from functools import cache

from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names
from ring_rl.agent.environments.environment import make_environment, rewards_of_states
from ring_rl.agent.environments.relabel import relabel
from ring_rl.agent.episodes.trajectory import Trajectory

pytestmark = pytest.mark.simulator


def play(task, steps, *, seed):
    """A random policy in dm_control's own loop, with the rewards that it pays."""
    environment = make_environment(task, action_repeat=1)
    generator = np.random.default_rng(seed)
    observation, info = environment.reset(seed=seed)
    observations, states, actions, rewards = [observation], [info["physics"]], [], []
    for _ in range(steps):
        actions.append(generator.uniform(-1, 1, environment.action_space.shape).astype(np.float32))
        observation, reward, _, _, info = environment.step(actions[-1])
        observations.append(observation)
        states.append(info["physics"])
        rewards.append(reward)
    discounts = np.ones(steps, np.float32)
    return Trajectory(
        np.array(observations), np.array(actions), np.array(rewards, np.float32), discounts, np.array(states)
    )


@cache
def recorded(domain):
    """Two episodes under the last task of a domain."""
    task = f"{domain}_{DOMAINS[domain].tasks[-1]}"
    return task, tuple(play(task, 25, seed=seed) for seed in (0, 1))


@pytest.mark.parametrize("task", task_names())
def test_every_tasks_rewards_are_dm_controls(task):
    """Whether the episodes were recorded under this task or under another of its domain."""
    recorded_task, episodes = recorded(parse_task(task)[0])
    for episode, rewards in zip(episodes, relabel(task, episodes, threads=2), strict=True):
        assert rewards.dtype == np.float32
        wanted = episode.rewards
        if task != recorded_task:
            wanted = rewards_of_states(task, episode.physics[1:], episode.actions)
        np.testing.assert_allclose(rewards, wanted, rtol=0, atol=1e-6)


def test_the_control_counts():
    episode = play("cartpole_balance", 25, seed=0)
    at_rest = replace(episode, actions=np.zeros_like(episode.actions))
    with_control, without = relabel("cartpole_balance", [episode, at_rest], threads=1)
    assert (without > with_control + 0.01).any()


def test_batches_of_episodes_change_nothing(monkeypatch):
    episodes = [play("cartpole_swingup", steps, seed=steps) for steps in (3, 9, 1, 6)]
    at_once = list(relabel("cartpole_swingup", episodes, threads=1))
    monkeypatch.setattr("ring_rl.agent.environments.relabel._STATES_AT_ONCE", 10)
    in_parts = list(relabel("cartpole_swingup", iter(episodes), threads=2))
    assert [len(each) for each in in_parts] == [3, 9, 1, 6]
    for one, other in zip(at_once, in_parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_episodes_without_states_or_of_another_domain_are_refused():
    episode = play("cartpole_swingup", 3, seed=0)
    with pytest.raises(ValueError, match="without physics states cannot be relabelled"):
        list(relabel("cartpole_swingup", [replace(episode, physics=None)], threads=1))
    with pytest.raises(ValueError, match="physics of walker_run must have shape"):
        list(relabel("walker_run", [episode], threads=1))
