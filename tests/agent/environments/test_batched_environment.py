from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.environments.batched_environment import BatchedEnvironment
from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names
from ring_rl.agent.environments.environment import make_vector_environment

pytestmark = pytest.mark.simulator


def random_actions(count, environments, *, seed):
    """Some beyond [-1, 1], which are clipped."""
    shape = (count, *environments.action_space.shape)
    return np.random.default_rng(seed).uniform(-1.2, 1.2, shape).astype(np.float32)


def assert_same_step(batched, plain):
    """Everything that `reset` or `step` returns; states bit for bit."""
    *batched_values, batched_info = batched
    *plain_values, plain_info = plain
    np.testing.assert_allclose(batched_values[0], plain_values[0], atol=1e-6, rtol=1e-6)
    assert batched_values[0].dtype == np.float32
    if len(batched_values) > 1:
        np.testing.assert_allclose(batched_values[1], plain_values[1], atol=1e-12)
        np.testing.assert_array_equal(batched_values[2], plain_values[2])
        np.testing.assert_array_equal(batched_values[3], plain_values[3])
    assert set(batched_info) == set(plain_info)
    for name in batched_info:
        np.testing.assert_array_equal(batched_info[name], plain_info[name])


@pytest.mark.parametrize("task", [f"{domain}_{spec.tasks[0]}" for domain, spec in DOMAINS.items() if spec.tasks])
def test_it_equals_environments_in_turn(task):
    """Two episodes in a row from seeds, then one that goes on with the rows' streams."""
    repeat = DOMAINS[parse_task(task)[0]].episode_steps // 25
    batched = make_vector_environment(task, count=2, action_repeat=repeat, threads=2)
    plain = make_vector_environment(task, count=2, action_repeat=repeat, batched=False)
    assert isinstance(batched, BatchedEnvironment)
    assert not isinstance(plain, BatchedEnvironment)
    assert batched.single_observation_space == plain.single_observation_space
    assert batched.action_space == plain.action_space
    seeds: tuple[Any, ...] = (7, [3, None], None)
    for seed in seeds:
        assert_same_step(batched.reset(seed=seed), plain.reset(seed=seed))
        for actions in random_actions(3, batched, seed=1):
            assert_same_step(batched.step(actions), plain.step(actions))
    batched.close()
    plain.close()


@given(
    task=st.sampled_from([task for task in task_names() if task.startswith(("cartpole", "cheetah"))]),
    count=st.integers(1, 3),
    repeat=st.sampled_from([100, 200, 500]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=8, deadline=None)
def test_whole_episodes_are_dm_controls(task, count, repeat, seed):
    """Rows, repeats and seeds of any kind; the last step of both is the same one."""
    batched = make_vector_environment(task, count=count, action_repeat=repeat)
    plain = make_vector_environment(task, count=count, action_repeat=repeat, batched=False)
    assert_same_step(batched.reset(seed=seed), plain.reset(seed=seed))
    actions = random_actions(1000 // repeat, batched, seed=seed)
    for each in actions[:-1]:
        assert_same_step(batched.step(each), plain.step(each))
    last = batched.step(actions[-1])
    assert_same_step(last, plain.step(actions[-1]))
    assert last[3].all()
    batched.close()
    plain.close()


@pytest.mark.parametrize("task", ["walker_run", "quadruped_walk"])
def test_bodies_in_contact_do_not_drift(task):
    """300 control steps with contacts: the solver's warm start is handed on, so that nothing amplifies a difference."""
    batched = make_vector_environment(task, count=1, action_repeat=20)
    plain = make_vector_environment(task, count=1, action_repeat=20, batched=False)
    batched.reset(seed=0)
    plain.reset(seed=0)
    for each in random_actions(15, batched, seed=0):
        assert_same_step(batched.step(each), plain.step(each))
    batched.close()
    plain.close()


def test_it_is_a_gymnasium_vector_environment():
    with pytest.raises(ValueError, match="count of environments must be at least 1, got 0"):
        BatchedEnvironment("cartpole_swingup", count=0, action_repeat=1, threads=1)
    environments = BatchedEnvironment("cartpole_swingup", count=2, action_repeat=500, threads=1)
    assert isinstance(environments, gymnasium.vector.VectorEnv)
    assert environments.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.DISABLED
    actions = np.zeros((2, 1), np.float32)
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step\(\)"):
        environments.step(actions)
    observations, _ = environments.reset(seed=[1, 2])
    assert observations in environments.observation_space
    assert not environments.step(actions)[3].any()
    assert environments.step(actions)[3].all()
    with pytest.raises(RuntimeError, match="the episodes are over"):
        environments.step(actions)
    with pytest.raises(ValueError, match="1 seeds for 2 environments"):
        environments.reset(seed=[1])
    with pytest.raises(ValueError, match="all rows of a BatchedEnvironment start together"):
        environments.reset(seed=[1, 2], options={"reset_mask": np.array([True, False])})
    environments.reset(seed=[1, 2], options={"reset_mask": np.array([True, True])})
    with pytest.raises(ValueError, match=r"actions of cartpole_swingup must have shape \(2, 1\), got \(1, 1\)"):
        environments.step(actions[:1])
    with pytest.raises(ValueError, match="actions must be finite"):
        environments.step(np.array([[0.0], [np.nan]], np.float32))
    environments.close()
