import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="environments need the simulator: pip install 'ring_rl[simulator]'")

import gymnasium
from dm_control import suite

from ring_rl.agent.environments.domains import DOMAINS, parse_task, task_names
from ring_rl.agent.environments.environment import (
    DMControlEnvironment,
    make_environment,
    make_vector_environment,
    observations_of_states,
    register_environments,
    rewards_of_states,
)

pytestmark = pytest.mark.simulator


def play(environment, *, seed, decisions, action_seed=0):
    """Observations, rewards, physics of an episode of random actions."""
    rng = np.random.default_rng(action_seed)
    observation, info = environment.reset(seed=seed)
    observations, physics, rewards, actions = [observation], [info["physics"]], [], []
    for _ in range(decisions):
        actions.append(rng.uniform(-1, 1, environment.action_space.shape).astype(np.float32))
        observation, reward, _, _, info = environment.step(actions[-1])
        observations.append(observation)
        physics.append(info["physics"])
        rewards.append(reward)
    return np.array(observations), np.array(actions), np.array(rewards), np.array(physics)


@pytest.mark.parametrize("task", task_names())
def test_every_listed_task_builds_with_the_listed_sizes(task):
    environment = make_environment(task, action_repeat=1)
    spec = DOMAINS[parse_task(task)[0]]
    observation, info = environment.reset(seed=0)
    assert observation.shape == environment.observation_space.shape == (spec.observation_dim,)
    assert observation.dtype == np.float32
    assert environment.action_space == gymnasium.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)
    assert info["physics"].shape == (spec.physics_dim,)
    assert info["physics"].dtype == np.float64
    simulation = environment.simulation
    assert simulation._step_limit == pytest.approx(spec.episode_steps)


def test_walker_observes_in_dm_controls_order():
    """Orientations (14), height (1), velocity (9); Gymnasium's sorted dictionaries put the height first."""
    environment = make_environment("walker_walk", action_repeat=1)
    observation, _ = environment.reset(seed=3)
    physics = environment.simulation.physics
    np.testing.assert_allclose(observation[:14], physics.orientations(), rtol=1e-6)
    assert observation[14] == pytest.approx(physics.torso_height(), rel=1e-6)
    np.testing.assert_allclose(observation[15:], physics.velocity(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("task", ["cartpole_swingup", "cheetah_run", "walker_run", "quadruped_walk"])
def test_it_equals_a_plain_dm_control_loop(task):
    """The same initial state, then dm_control alone with actions scaled by hand."""
    environment = make_environment(task, action_repeat=2)
    observations, actions, rewards, physics = play(environment, seed=5, decisions=10)
    domain, name = parse_task(task)
    plain = suite.load(domain, name, environment_kwargs={"flat_observation": True})
    word = int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(5))).integers(2**32))
    plain.task.random.seed(word)
    time_step = plain.reset()
    spec = plain.action_spec()
    np.testing.assert_array_equal(observations[0], time_step.observation["observations"].astype(np.float32))
    for decision, action in enumerate(actions):
        control = spec.minimum + (spec.maximum - spec.minimum) * (action.astype(np.float64) + 1) / 2
        total = 0.0
        for _ in range(2):
            time_step = plain.step(control)
            total += time_step.reward
        np.testing.assert_array_equal(
            observations[decision + 1], time_step.observation["observations"].astype(np.float32)
        )
        np.testing.assert_array_equal(physics[decision + 1], plain.physics.get_state())
        assert rewards[decision] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("task", ["cartpole_swingup", "cheetah_run"])
def test_a_seed_determines_the_episode(task):
    environment = make_environment(task, action_repeat=4)
    first = play(environment, seed=7, decisions=12)
    play(environment, seed=8, decisions=3)  # what came before must not matter
    again = play(environment, seed=7, decisions=12)
    elsewhere = play(make_environment(task, action_repeat=4), seed=7, decisions=12)
    other = play(environment, seed=8, decisions=12)
    for one, two, three in zip(first, again, elsewhere, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert not np.array_equal(first[0], other[0])


def test_resets_without_a_seed_continue_the_seeded_stream():
    environment = make_environment("cartpole_balance", action_repeat=1)
    environment.reset(seed=1)
    second = environment.reset()[0]
    third = environment.reset()[0]
    environment.reset(seed=1)
    np.testing.assert_array_equal(environment.reset()[0], second)
    assert not np.array_equal(second, third)


def test_the_time_limit_truncates_and_does_not_terminate():
    environment = make_environment("cartpole_balance", action_repeat=250)
    environment.reset(seed=0)
    ends = []
    for _ in range(environment.episode_steps):
        _, _, terminated, truncated, info = environment.step(np.zeros(1, np.float32))
        ends.append((terminated, truncated, info["discount"]))
    assert ends == [(False, False, 1.0)] * 3 + [(False, True, 1.0)]
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(np.zeros(1, np.float32))


def test_a_discount_of_zero_terminates(monkeypatch):
    environment = make_environment("cartpole_balance", action_repeat=4)
    environment.reset(seed=0)
    monkeypatch.setattr(environment.simulation.task, "get_termination", lambda physics: 0.0)
    reward = environment.step(np.zeros(1, np.float32))
    assert reward[2:4] == (True, False)
    assert reward[4]["discount"] == 0.0
    assert reward[1] <= 1.0  # the other three control steps were not taken


def test_action_repeat_sums_rewards():
    single = make_environment("cartpole_swingup", action_repeat=1)
    double = make_environment("cartpole_swingup", action_repeat=2)
    single.reset(seed=2)
    double.reset(seed=2)
    action = np.array([0.7], np.float32)
    total = single.step(action)[1] + single.step(action)[1]
    assert double.step(action)[1] == pytest.approx(total, rel=1e-12)


def test_actions_outside_the_box_are_clipped():
    inside, outside = (make_environment("cheetah_run", action_repeat=1) for _ in range(2))
    inside.reset(seed=0)
    outside.reset(seed=0)
    one = inside.step(np.ones(6, np.float32))
    other = outside.step(np.full(6, 5.0, np.float32))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]


def test_bad_actions_are_refused():
    environment = make_environment("cartpole_balance", action_repeat=1)
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step(np.zeros(1, np.float32))
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(2,\)"):
        environment.step(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="must be finite"):
        environment.step(np.array([np.nan], np.float32))


@pytest.mark.parametrize("action_repeat", [0, -4, 2.0, True])
def test_a_repeat_that_is_no_count_is_refused(action_repeat):
    with pytest.raises(ValueError, match="action_repeat must be an integer"):
        make_environment("cartpole_balance", action_repeat=action_repeat)


def test_a_repeat_that_does_not_divide_the_episode_is_refused():
    with pytest.raises(ValueError, match="1000 control steps, not divisible by action_repeat 3"):
        make_environment("cartpole_balance", action_repeat=3)
    with pytest.raises(ValueError, match="unknown task"):
        make_environment("cartpole_fly", action_repeat=1)


def test_a_vector_of_environments_equals_single_ones():
    vector = make_vector_environment("cartpole_swingup", count=3, action_repeat=250)
    observations, info = vector.reset(seed=[1, 2, 3])
    assert info["physics"].shape == (3, 4)
    actions = np.array([[0.1], [-0.2], [0.3]], np.float32)
    for _ in range(4):
        observations, rewards, _, truncated, _ = vector.step(actions)
    assert truncated.all()
    for row, seed in enumerate([1, 2, 3]):
        single = make_environment("cartpole_swingup", action_repeat=250)
        single.reset(seed=seed)
        for _ in range(4):
            observation, reward, *_ = single.step(actions[row])
        np.testing.assert_array_equal(observations[row], observation)
        assert rewards[row] == pytest.approx(reward, abs=1e-12)
    vector.close()
    with pytest.raises(ValueError, match="count of environments"):
        make_vector_environment("cartpole_swingup", count=0, action_repeat=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tasks_are_registered_on_demand():
    register_environments()
    register_environments()
    environment = gymnasium.make("ring_rl/cartpole_swingup-v0", action_repeat=4)
    assert isinstance(environment.unwrapped, DMControlEnvironment)
    assert environment.unwrapped.action_repeat == 4
    assert environment.reset(seed=0)[0].shape == (5,)


@pytest.mark.parametrize("module", ["environment", "batched_physics"])
def test_importing_registers_nothing_and_says_nothing(module):
    code = (
        f"import gymnasium, ring_rl.agent.environments.{module}; "
        "raise SystemExit(any(name.startswith('ring_rl') for name in gymnasium.registry))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("task", ["cartpole_swingup", "cartpole_balance_sparse", "cheetah_run", "walker_run"])
def test_states_give_back_rewards_and_observations(task):
    observations, actions, rewards, physics = play(make_environment(task, action_repeat=1), seed=1, decisions=60)
    np.testing.assert_allclose(rewards_of_states(task, physics[1:], actions), rewards, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(observations_of_states(task, physics), observations, rtol=1e-6, atol=1e-6)


def test_rewards_can_be_relabelled_for_another_task():
    _, actions, stand, physics = play(make_environment("walker_stand", action_repeat=1), seed=1, decisions=20)
    _, _, walk, _ = play(make_environment("walker_walk", action_repeat=1), seed=1, decisions=20)
    np.testing.assert_allclose(rewards_of_states("walker_walk", physics[1:], actions), walk, rtol=1e-9)
    assert not np.allclose(stand, walk)


def test_relabelling_counts_the_control():
    """A relabelling that leaves the control at zero pays too much where a task charges for it."""
    _, actions, rewards, physics = play(make_environment("cartpole_balance", action_repeat=1), seed=1, decisions=20)
    without_control = rewards_of_states("cartpole_balance", physics[1:], np.zeros_like(actions))
    assert (without_control > rewards).all()
    assert (without_control <= 1.25 * rewards * (1 + 1e-9)).all()


@pytest.mark.parametrize("task", ["quadruped_run", "jaco_reach_top_left"])
def test_accelerations_and_forces_do_not_come_back_from_states(task):
    _, _, _, physics = play(make_environment(task, action_repeat=1), seed=1, decisions=2)
    with pytest.raises(ValueError, match=f"{task.split('_')[0]} observes accelerations and forces"):
        observations_of_states(task, physics)


def test_without_the_simulator_the_remedy_is_named_and_data_still_reads():
    code = """
import sys
for name in ("dm_control", "mujoco", "gymnasium"):
    sys.modules[name] = None
import ring_rl.agent.episodes.exorl, ring_rl.agent.episodes.trajectory
assert ring_rl.agent.episodes.exorl.parse_task("walker_walk") == ("walker", "walk")
try:
    import ring_rl.agent.environments.environment
except ImportError as error:
    raise SystemExit(0 if "pip install 'ring_rl[simulator]'" in str(error) else 2)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
