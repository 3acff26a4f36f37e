import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="environments need gymnasium")

import gymnasium

from ring_rl.agent.environments.gymnasium_task import FlatEnvironment, make_recorded_environment, make_recorded_rows
from ring_rl.agent.environments.recorded import ActionRange, ObservationLeaf, RecordedEnvironment

STEPS = 20


class Countdown(gymnasium.Env):
    """Ends as its seed says, by itself; observations are nested, actions of the range [0, 4] in a 1 x 2 array."""

    observation_space = gymnasium.spaces.Dict(
        {"step": gymnasium.spaces.Box(0, 100, ()), "action": gymnasium.spaces.Box(0, 4, (1, 2), np.float32)}
    )
    action_space = gymnasium.spaces.Box(np.float32(0), np.float32(4), (1, 2), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 1 + (seed or 0) % 5
        return {"step": np.array(self.left, np.float32), "action": np.zeros((1, 2), np.float32)}, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.left -= 1
        assert self.left >= 0, "stepped after its end"
        return {"step": np.array(self.left, np.float32), "action": action}, 1.0, self.left == 0, False, {}


gymnasium.register("ring_rl_test/Countdown-v0", Countdown)


def countdown(**changes):
    settings = {
        "environment_id": "ring_rl_test/Countdown-v0",
        "spec": None,
        "observation": (ObservationLeaf(path=("step",), size=1), ObservationLeaf(path=("action",), size=2)),
        "action_range": ActionRange(low=(0.0, 0.0), high=(4.0, 4.0)),
        "max_episode_steps": STEPS,
    }
    return RecordedEnvironment(**(settings | changes))


def test_agents_see_vectors_and_act_in_the_environments_range():
    environment = make_recorded_environment(countdown())
    assert environment.observation_space.shape == (3,)
    observation, _ = environment.reset(seed=3)
    np.testing.assert_array_equal(observation, np.float32([4, 0, 0]))
    observation, reward, terminated, truncated, info = environment.step(np.float32([-1.0, 0.5]))
    np.testing.assert_array_equal(observation, np.float32([3, 0, 3]))
    assert (reward, terminated, truncated, info["discount"]) == (1.0, False, False, 1.0)
    environment.step(np.float32([-7.0, 7.0]))  # clipped: the environment itself asserts its range


def test_rows_end_apart_and_stand_still_until_they_are_reset():
    rows = make_recorded_rows(countdown(), count=3)
    observations, _ = rows.reset(seed=[0, 2, 4])
    np.testing.assert_array_equal(observations[:, 0], [1, 3, 5])
    log = [rows.step(np.zeros((3, 2), np.float32)) for _ in range(3)]
    np.testing.assert_array_equal([rewards for _, rewards, *_ in log], [[1, 1, 1], [0, 1, 1], [0, 1, 1]])
    np.testing.assert_array_equal([ended for _, _, ended, *_ in log], [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal([info["discount"] for *_, info in log], [[0, 1, 1], [1, 1, 1], [1, 0, 1]])
    observations, _ = rows.reset(seed=[1, None, None], options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(observations[:, 0], [2, 0, 2])
    observations, *_ = rows.step(np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(observations[:, 0], [1, 0, 1])
    rows.close()


def test_what_it_gave_before_does_not_change_under_the_callers_hands():
    rows = make_recorded_rows(countdown(), count=1)
    before, _ = rows.reset(seed=[4])
    rows.step(np.zeros((1, 2), np.float32))
    assert before[0, 0] == 5


def test_episodes_are_cut_at_the_recorded_limit():
    rows = make_recorded_rows(countdown(max_episode_steps=2), count=1)
    rows.reset(seed=[4])
    rows.step(np.zeros((1, 2), np.float32))
    _, _, terminated, truncated, info = rows.step(np.zeros((1, 2), np.float32))
    assert (terminated[0], truncated[0], info["discount"][0]) == (False, True, 1.0)


def test_the_recorded_specification_is_used_with_its_arguments():
    """Pendulum under another gravity is another task, though its id is the same."""
    spec = gymnasium.make("Pendulum-v1", g=1.0).spec
    assert spec is not None
    recorded = countdown(
        environment_id="Pendulum-v1",
        spec=spec.to_json(),
        observation=(ObservationLeaf(path=(), size=3),),
        action_range=ActionRange(low=(-2.0,), high=(2.0,)),
    )
    assert make_recorded_environment(recorded).unwrapped.g == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment_id": "ring_rl_test/Unknown-v0"}, "cannot make ring_rl_test/Unknown-v0"),
        ({"action_range": ActionRange(low=(0.0,), high=(4.0,))}, "the data hold 1 numbers an action"),
        ({"observation": (ObservationLeaf(path=("step",), size=2),)}, r"step has shape \(\), expected 2"),
    ],
)
def test_an_environment_that_does_not_fit_the_data_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_recorded_environment(countdown(**changes))


def test_what_an_environment_needs_and_lacks_is_named():
    gymnasium.register("ring_rl_test/Lacking-v0", "a_package_that_nobody_has:Environment")
    with pytest.raises(ImportError, match=r"cannot make ring_rl_test/Lacking-v0 .*a_package_that_nobody_has"):
        make_recorded_environment(countdown(environment_id="ring_rl_test/Lacking-v0"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_made_environment_passes_gymnasiums_own_check():
    from gymnasium.utils.env_checker import check_env

    recorded = countdown(
        environment_id="Pendulum-v1",
        observation=(ObservationLeaf(path=(), size=3),),
        action_range=ActionRange(low=(-2.0,), high=(2.0,)),
    )
    check_env(FlatEnvironment(gymnasium.make("Pendulum-v1"), recorded), skip_render_check=True)
