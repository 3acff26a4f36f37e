"""Data sets from and to Minari. Whatever is written lands in a folder of the test; nothing is fetched."""

import importlib.util
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

pytest.importorskip("minari", reason="Minari data sets need minari")

import gymnasium
import minari
from minari.data_collector import EpisodeBuffer

from ring_rl.agent.environments.recorded import ActionRange
from ring_rl.agent.episodes.exorl import EpisodeSet
from ring_rl.agent.episodes.minari_read import MinariDataConfig, MinariSet
from ring_rl.agent.episodes.minari_write import MinariCard, write_minari
from ring_rl.agent.episodes.trajectory import Trajectory

CARD = MinariCard(
    author="someone", author_email=None, algorithm_name="noise", code_permalink=None, description="made up"
)
# What Minari says where a card leaves something out.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def minari_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def config(dataset_id, **changes):
    return MinariDataConfig(
        **({"name": "minari", "dataset_id": dataset_id, "download": False, "max_episodes": None} | changes)
    )


def write(episodes, dataset_id="made/up-v0", task="cartpole_swingup", action_repeat=4):
    return write_minari(
        dataset_id,
        episodes,
        task=task,
        action_repeat=action_repeat,
        card=CARD,
        collection={"settings": {"task": task}},
        progress=False,
    )


def bits(trajectory):
    columns = {
        name: getattr(trajectory, name) for name in ("observations", "actions", "rewards", "discounts", "physics")
    }
    return {name: None if x is None else (x.dtype, x.shape, x.tobytes()) for name, x in columns.items()}


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def trajectories(draw):
    length = draw(st.integers(1, 6))
    array = lambda shape, elements, dtype=np.float32: draw(arrays.arrays(dtype, shape, elements=elements))  # noqa: E731
    return Trajectory(
        observations=array((length + 1, 3), numbers),
        actions=array((length, 2), st.floats(-1, 1, width=32)),
        rewards=array(length, numbers),
        discounts=array(length, st.floats(0, 1, width=32)),
        physics=array((length + 1, 4), st.floats(allow_nan=False, allow_infinity=False), np.float64)
        if draw(st.booleans())
        else None,
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episodes=st.lists(trajectories(), min_size=1, max_size=3))
def test_what_is_written_comes_back_bit_for_bit(episodes, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
    write(EpisodeSet(tuple(episodes)))
    back = MinariSet(config("made/up-v0")).episodes(progress=False)
    assert [bits(each) for each in back.trajectories] == [bits(each) for each in episodes]


def test_others_read_terminations_truncations_and_all_that_we_hold(chains):
    full = chains.episode_set(2, length=5).trajectories
    fell = full[1].discounts.copy()
    fell[-1] = 0
    physics = np.arange(24.0).reshape(6, 4)
    episodes = EpisodeSet(
        (
            Trajectory(full[0].observations, full[0].actions, full[0].rewards, full[0].discounts, physics),
            Trajectory(full[1].observations, full[1].actions, full[1].rewards, fell, None),
        )
    )
    write(episodes)
    dataset = minari.load_dataset("made/up-v0")
    goes_on, fell_over = dataset[0], dataset[1]
    assert (goes_on.terminations[-1], goes_on.truncations[-1]) == (False, True)
    assert (fell_over.terminations[-1], fell_over.truncations[-1]) == (True, False)
    for episode in (goes_on, fell_over):
        assert not episode.terminations[:-1].any()
        assert not episode.truncations[:-1].any()
        assert len(episode.observations) == 6
    np.testing.assert_array_equal(goes_on.infos["physics"], physics)
    np.testing.assert_array_equal(fell_over.infos["discount"], [1, 1, 1, 1, 1, 0])
    assert dataset.total_steps == 10
    metadata = dataset.storage.metadata
    assert metadata["author"] == {"someone"}
    assert metadata["ring_rl"]["collection"] == {"settings": {"task": "cartpole_swingup"}}
    assert "made/up-v0" in minari.list_local_datasets()


@pytest.mark.simulator
@pytest.mark.skipif(importlib.util.find_spec("dm_control") is None, reason="the environment is dm_control's")
def test_the_environment_comes_back_from_an_exported_set(chains):
    from ring_rl.agent.environments.environment import register_environments

    write(chains.episode_set(1), action_repeat=4)
    dataset = minari.load_dataset("made/up-v0")
    environment = dataset.recover_environment()
    inside = environment.unwrapped
    assert (inside.task, inside.action_repeat, inside.episode_steps) == ("cartpole_swingup", 4, 250)
    register_environments()
    registered = gymnasium.spec("ring_rl/cartpole_swingup-v0")
    assert (dataset.env_spec.id, dataset.env_spec.entry_point) == (registered.id, registered.entry_point)


def test_a_set_exported_from_here_is_known_by_its_task_again():
    generator = np.random.default_rng(0)
    trajectory = Trajectory(
        observations=generator.normal(size=(6, 5)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(5, 1)).astype(np.float32),
        rewards=np.ones(5, np.float32),
        discounts=np.ones(5, np.float32),
        physics=None,
    )
    write(EpisodeSet((trajectory,)), action_repeat=4)
    opened = MinariSet(config("made/up-v0"))
    assert (opened.task, opened.action_repeat) == ("cartpole_swingup", 4)
    opened.check_task("cartpole_swingup")
    assert opened.recorded_environment("cartpole_swingup") is None
    with pytest.raises(ValueError, match="set task=cartpole_swingup"):
        opened.check_task("walker_walk")


def test_no_set_is_overwritten(chains, minari_root):
    folder = write(chains.episode_set(1, seed=1))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="not overwritten"):
        write(chains.episode_set(1, seed=2))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_export_that_fails_leaves_no_half_set(chains, minari_root):
    good = chains.episode_set(2)
    bad = good.trajectories[1]
    beyond = Trajectory(bad.observations, 2 * np.ones_like(bad.actions), bad.rewards, bad.discounts, None)
    with pytest.raises(ValueError, match=r"episode 1 has an action outside \[-1, 1\]"):
        write(EpisodeSet((good.trajectories[0], beyond)))
    assert minari.list_local_datasets() == {}
    assert not [path for path in minari_root.rglob("*") if path.name.endswith("hdf5")]
    write(good)


@pytest.mark.parametrize("dataset_id", ["../up-v0", "made/up", "", "made up-v0", "/up-v0"])
def test_malformed_ids_are_refused_before_anything_is_written(chains, minari_root, dataset_id):
    with pytest.raises(ValueError, match="a Minari id reads"):
        write(chains.episode_set(1), dataset_id)
    assert not minari_root.exists() or not list(minari_root.rglob("*"))


def make_foreign(
    observations, actions, *, observation_space, action_space, terminated, dataset_id="other/set-v0", env=None
):
    """A set made by Minari's own means, one episode for each item."""
    buffers = [
        EpisodeBuffer(
            observations=obs,
            actions=act,
            rewards=np.arange(len(act), dtype=np.float64) - 2,
            terminations=np.array([False] * (len(act) - 1) + [end]),
            truncations=np.array([False] * (len(act) - 1) + [not end]),
        )
        for obs, act, end in zip(observations, actions, terminated, strict=True)
    ]
    minari.create_dataset_from_buffers(
        dataset_id, buffers, env=env, observation_space=observation_space, action_space=action_space
    )
    return MinariSet(config(dataset_id))


ACTIONS = gymnasium.spaces.Box(np.float32([0, -1]), np.float32([4, 3]), (2,), np.float32)


def test_foreign_sets_have_their_actions_scaled_and_their_terminations_kept():
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    observations = [np.random.default_rng(i).normal(size=(length + 1, 3)) for i, length in enumerate((4, 2))]
    actions = [np.float32([[0, -1], [4, 3], [2, 1], [3, 1]]), np.float32([[1, 1], [2, 3]])]
    opened = make_foreign(
        observations, actions, observation_space=space, action_space=ACTIONS, terminated=[False, True]
    )
    assert opened.environment.action_range == ActionRange(low=(0.0, -1.0), high=(4.0, 3.0))
    assert opened.environment.max_episode_steps == 4
    first, second = opened.episodes(progress=False).trajectories
    np.testing.assert_array_equal(first.actions, np.float32([[-1, -1], [1, 1], [0, 0], [0.5, 0]]))
    np.testing.assert_array_equal(first.discounts, [1, 1, 1, 1])
    np.testing.assert_array_equal(second.discounts, [1, 0])
    np.testing.assert_array_equal(first.rewards, np.float32([-2, -1, 0, 1]))
    np.testing.assert_array_equal(second.observations, observations[1].astype(np.float32))
    assert second.physics is None
    assert len(MinariSet(config("other/set-v0", max_episodes=1)).episodes(progress=False).trajectories) == 1


def test_nested_observations_keep_the_order_that_the_set_wrote_down():
    # Minari's own reader would give the keys sorted.
    box = lambda size: gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)  # noqa: E731
    space = gymnasium.spaces.Dict([("z", box(1)), ("a", gymnasium.spaces.Dict([("y", box(1)), ("b", box(2))]))])
    part = lambda start, size: start + np.arange(3 * size, dtype=np.float32).reshape(3, size)  # noqa: E731
    observation = {"z": part(0, 1), "a": {"y": part(10, 1), "b": part(20, 2)}}
    actions = [np.zeros((2, 2), np.float32)]
    opened = make_foreign([observation], actions, observation_space=space, action_space=ACTIONS, terminated=[True])
    assert [leaf.path for leaf in opened.environment.observation] == [("z",), ("a", "y"), ("a", "b")]
    (episode,) = opened.episodes(progress=False).trajectories
    np.testing.assert_array_equal(episode.observations, [[0, 10, 20, 21], [1, 11, 22, 23], [2, 12, 24, 25]])


def test_the_environment_of_a_foreign_set_is_remembered_with_its_arguments():
    spec = gymnasium.make("Pendulum-v1", g=1.0).spec
    observations, actions = [np.zeros((3, 3), np.float32)], [np.zeros((2, 1), np.float32)]
    opened = make_foreign(
        observations, actions, observation_space=None, action_space=None, terminated=[False], env=spec
    )
    assert opened.task == "gymnasium/Pendulum-v1"
    environment = opened.recorded_environment("gymnasium/Pendulum-v1")
    assert environment is not None
    assert environment.action_range == ActionRange(low=(-2.0,), high=(2.0,))
    assert environment.max_episode_steps == 200
    assert json.loads(environment.spec or "")["kwargs"] == {"g": 1.0}
    with pytest.raises(ValueError, match="set task=gymnasium/Pendulum-v1"):
        opened.check_task("cartpole_swingup")


def test_a_set_that_does_not_say_its_environment_takes_the_tasks_word():
    space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    observations, actions = [np.zeros((3, 3), np.float32)], [np.zeros((2, 2), np.float32)]
    opened = make_foreign(observations, actions, observation_space=space, action_space=ACTIONS, terminated=[True])
    with pytest.raises(ValueError, match="set task=gymnasium/<id>"):
        opened.check_task("cartpole_swingup")
    opened.check_task("gymnasium/Other-v0")
    environment = opened.recorded_environment("gymnasium/Other-v0")
    assert environment is not None
    assert (environment.environment_id, environment.spec) == ("Other-v0", None)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (gymnasium.spaces.Discrete(3), ACTIONS, "the observation is a Discrete space"),
        (gymnasium.spaces.Box(0, 1, (3,)), gymnasium.spaces.Discrete(3), "actions are of a Discrete space"),
        (gymnasium.spaces.Box(0, 1, (3,)), gymnasium.spaces.Box(-np.inf, np.inf, (1,)), r"range \[-inf, inf\]"),
    ],
)
def test_sets_that_agents_cannot_read_are_refused_by_name(observation_space, action_space, message):
    sample = lambda space, count: np.array([space.sample() for _ in range(count)])  # noqa: E731
    with pytest.raises(ValueError, match=rf"other/set-v0 cannot be read: .*{message}"):
        make_foreign(
            [sample(observation_space, 3)],
            [sample(action_space, 2)],
            observation_space=observation_space,
            action_space=action_space,
            terminated=[True],
        )


def test_a_nan_is_named_with_its_episode():
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    observations = [np.zeros((3, 3), np.float32), np.full((3, 3), np.nan, np.float32)]
    actions = [np.zeros((2, 2), np.float32)] * 2
    opened = make_foreign(observations, actions, observation_space=space, action_space=ACTIONS, terminated=[True, True])
    with pytest.raises(ValueError, match="other/set-v0, episode 1: observations hold a NaN"):
        opened.episodes(progress=False)


def test_a_missing_set_says_what_is_here_and_fetches_nothing(chains):
    write(chains.episode_set(1))
    with pytest.raises(
        FileNotFoundError, match=r"no Minari data set 'made/down-v0'.*here are: made/up-v0; data.download"
    ):
        MinariSet(config("made/down-v0"))


def test_a_damaged_set_is_one_clear_line(chains):
    folder = write(chains.episode_set(1))
    (folder / "data" / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match="made/up-v0 cannot be opened"):
        MinariSet(config("made/up-v0"))


def test_fetching_is_minaris_own_and_its_failure_one_clear_line(monkeypatch):
    asked = []

    def load_dataset(dataset_id, download):
        asked.append((dataset_id, download))
        raise ConnectionError("no route\nto the server")

    monkeypatch.setattr(minari, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="far/away-v0 cannot be opened: no route to the server"):
        MinariSet(config("far/away-v0", download=True))
    assert asked == [("far/away-v0", True)]


@pytest.mark.parametrize(("max_episodes", "kept"), [(None, [0, 1, 2, 3, 4]), (2, [0, 2]), (9, [0, 1, 2, 3, 4])])
def test_a_part_of_a_set_is_spaced_evenly(chains, max_episodes, kept):
    episodes = chains.episode_set(5)
    write(episodes)
    part = MinariSet(config("made/up-v0", max_episodes=max_episodes)).episodes(progress=False)
    np.testing.assert_array_equal(part.returns, episodes.returns[kept])
