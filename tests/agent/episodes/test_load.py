"""Whose rewards an agent gets, with the simulator itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ring_rl.agent.episodes import load as load_module
from ring_rl.agent.episodes.exorl import EpisodeFiles, read_episodes, write_episode
from ring_rl.agent.episodes.load import DataConfig, load_episodes, load_rewards
from ring_rl.agent.episodes.relabel_cache import RelabelConfig
from ring_rl.agent.episodes.trajectory import Trajectory
from ring_rl.config import to_mapping

CONF = Path(__file__).parents[3] / "conf"
SETTINGS = DataConfig(
    name="exorl",
    root=Path("to be set"),
    algorithm="rnd",
    max_episodes=None,
    action_repeat=1,
    rewards="auto",
    reward_column=None,
    relabel=RelabelConfig(threads=1, verify_episodes=1, tolerance=1e-6),
    store="auto",
    store_from_megabytes=1.0,
)


def episode(seed, *, length=6):
    generator = np.random.default_rng(seed)
    return Trajectory(
        observations=generator.normal(size=(length + 1, 5)).astype(np.float32),
        actions=np.repeat(generator.uniform(-1, 1, (length // 2, 1)), 2, axis=0).astype(np.float32),
        rewards=generator.uniform(size=length).astype(np.float32),
        discounts=np.ones(length, np.float32),
        physics=generator.normal(size=(length + 1, 4)),
    )


@pytest.fixture
def data(tmp_path):
    """A set whose stored rewards nobody has recorded in a simulator."""
    buffer = tmp_path / "cartpole" / "rnd" / "buffer"
    buffer.mkdir(parents=True)
    for index in range(4):
        write_episode(buffer, index, episode(index))
    return replace(SETTINGS, root=tmp_path)


def record(data, task):
    (data.root / "cartpole" / "rnd" / "collection.json").write_text(json.dumps({"settings": {"task": task}}))


def load(data, task="cartpole_swingup"):
    return load_episodes(data, task=task, progress=False)


def stored(data):
    return read_episodes(data.root / "cartpole" / "rnd" / "buffer", max_episodes=None, progress=False)


def test_stored_rewards_that_are_the_tasks_are_taken(data):
    record(data, "cartpole_swingup")
    np.testing.assert_array_equal(load(data).returns, stored(data).returns)
    assert all(each.physics is None for each in load(data).trajectories)


def test_stored_rewards_of_unknown_origin_are_taken_if_told_so(data):
    np.testing.assert_array_equal(load(replace(data, rewards="stored")).returns, stored(data).returns)


def test_stored_rewards_of_another_task_are_refused_if_told_to_take_them(data):
    record(data, "cartpole_balance")
    with pytest.raises(ValueError, match=r"holds the rewards of cartpole_balance, not of .*data\.rewards=auto"):
        load(replace(data, rewards="stored"))


def test_a_record_that_says_nothing_is_refused(data):
    (data.root / "cartpole" / "rnd" / "collection.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say for which task"):
        load(data)


@pytest.mark.parametrize(
    ("algorithm", "explorer", "published"),
    [
        ("rnd", "rnd_small", "rnd"),
        ("rnd_walker_run", "rnd_small", "rnd"),
        ("noise_walker_run", "noise", "rnd"),
        ("policy_search_walker_run", "policy_search", "rnd"),
        ("proto", None, "proto"),
    ],
)
def test_a_missing_set_names_the_commands_that_fill_its_folder(tmp_path, algorithm, explorer, published):
    root = tmp_path / "my data"
    with pytest.raises(FileNotFoundError, match="no data set at") as caught:
        load(replace(SETTINGS, root=root, algorithm=algorithm), "walker_run")
    message = str(caught.value)
    collecting = (
        f"`python datasets/exorl/collect.py task=walker_run explorer={explorer} algorithm={algorithm} root='{root}'`"
    )
    assert (collecting in message) is (explorer is not None)
    assert ("collect.py" in message) is (explorer is not None)
    assert f"`python datasets/exorl/fetch.py walker {published} --root '{root}'`" in message
    if explorer is not None:
        assert (CONF / "explorer" / f"{explorer}.yaml").is_file()


def test_stored_columns_are_the_domains_tasks(data):
    """As in point_mass_maze, of which one file holds the rewards of all tasks."""
    rewards = np.random.default_rng(0).uniform(size=(4, 7)).astype(np.float32)
    path = data.root / "cartpole" / "rnd" / "buffer" / "episode_000000_6.npz"
    with np.load(path) as arrays:
        whole = dict(arrays) | {"reward": rewards.T}
    for index in range(4):
        (path.parent / f"episode_{index:06d}_6.npz").unlink()
    np.savez(path, **whole)
    for column, name in enumerate(("balance", "balance_sparse", "swingup", "swingup_sparse")):
        trajectories = load(data, f"cartpole_{name}").trajectories
        np.testing.assert_array_equal(trajectories[0].rewards, rewards[column, 1:])
    chosen = load(replace(data, reward_column=1)).trajectories
    np.testing.assert_array_equal(chosen[0].rewards, rewards[1, 1:])
    path.unlink()
    np.savez(path, **(whole | {"reward": rewards.T[:, :3]}))
    with pytest.raises(ValueError, match=r"holds 3 rewards where cartpole has 4 tasks.*reward_column=0\.\.2"):
        load(data)


def test_a_column_is_of_the_stored_rewards(data):
    with pytest.raises(ValueError, match="reward_column chooses a stored reward"):
        replace(data, rewards="relabelled", reward_column=0)


@pytest.mark.simulator
@pytest.mark.parametrize("rewards", ["auto", "relabelled"])
def test_rewards_of_unknown_origin_are_relabelled(data, rewards):
    environment = pytest.importorskip(
        "ring_rl.agent.environments.environment", reason="relabelling needs the simulator"
    )
    episodes = load(replace(data, rewards=rewards))
    for mine, original in zip(episodes.trajectories, stored(data).trajectories, strict=True):
        wanted = environment.rewards_of_states("cartpole_swingup", original.physics[1:], original.actions)
        np.testing.assert_allclose(mine.rewards, wanted, atol=1e-6)
        np.testing.assert_array_equal(mine.observations, original.observations)
    decisions = load(replace(data, rewards=rewards, action_repeat=2))
    assert [each.length for each in decisions.trajectories] == [3] * 4
    np.testing.assert_allclose(decisions.returns, episodes.returns, atol=1e-5)
    rows = load_rewards(data, task="cartpole_swingup", progress=False)
    np.testing.assert_allclose([each.sum() for each in rows], episodes.returns, atol=1e-5)


@pytest.mark.simulator
def test_a_part_of_the_set_is_spaced_evenly_and_relabelled_alone(data):
    pytest.importorskip("dm_control", reason="relabelling needs the simulator")
    everything = load(data)
    part = load(replace(data, max_episodes=2))
    np.testing.assert_array_equal(part.returns, everything.returns[[0, 2]])


@pytest.mark.simulator
def test_a_recording_that_the_simulator_does_not_confirm_is_refused(data):
    pytest.importorskip("dm_control", reason="relabelling needs the simulator")
    record(data, "cartpole_balance")
    with pytest.raises(ValueError, match="relabelling cartpole_balance, for which the data were recorded, gives"):
        load(data)


@pytest.mark.parametrize("store", ["never", "always"])
@pytest.mark.parametrize("max_episodes", [None, 3])
def test_a_set_that_grows_while_it_is_relabelled_keeps_every_reward_at_its_episode(
    data, monkeypatch, store, max_episodes
):
    """Relabelling takes minutes, in which a collector goes on; here every reward is its episode's first observation."""
    buffer = data.root / "cartpole" / "rnd" / "buffer"

    def relabel(folder, episodes, signatures, **_):
        assert isinstance(episodes, EpisodeFiles)
        for index in range(4, 9):
            write_episode(buffer, index, episode(index))
        return [np.full(each.length, each.observations[0, 0], np.float32) for each in episodes]

    monkeypatch.setattr(load_module, "relabelled_rewards", relabel)
    episodes = load(replace(data, store=store, max_episodes=max_episodes)).trajectories
    assert len(episodes) == (max_episodes or 4)
    for each in episodes:
        assert each.rewards[0] == each.observations[0, 0]


def test_a_number_of_episodes_below_one_is_refused_before_anything_is_read(data):
    with pytest.raises(ValueError, match="max_episodes must be at least 1, got 0; use null to read all"):
        replace(data, max_episodes=0)


def test_settings_survive_yaml(data):
    assert to_mapping(data)["relabel"] == {"threads": 1, "verify_episodes": 1, "tolerance": 1e-6}
