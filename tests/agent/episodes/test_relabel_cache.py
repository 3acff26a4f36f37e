"""The cache with a simulator that is made up: a task pays the sum of the state times a factor of its own."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest

from ring_rl.agent.episodes.derived import signature, signatures
from ring_rl.agent.episodes.exorl import EpisodeFiles, list_episodes, write_episode
from ring_rl.agent.episodes.relabel_cache import RelabelConfig, relabelled_rewards
from ring_rl.agent.episodes.trajectory import Trajectory

FACTORS = {"cartpole_balance": 1.0, "cartpole_swingup": 2.0}


def episode(seed, *, length=5, task="cartpole_balance"):
    generator = np.random.default_rng(seed)
    physics = generator.normal(size=(length + 1, 4))
    return Trajectory(
        observations=generator.normal(size=(length + 1, 5)).astype(np.float32),
        actions=generator.uniform(-1, 1, (length, 1)).astype(np.float32),
        rewards=paid(task, physics),
        discounts=np.ones(length, np.float32),
        physics=physics,
    )


def paid(task, physics):
    return (FACTORS[task] * physics[1:].sum(axis=1)).astype(np.float32)


@pytest.fixture
def simulator(monkeypatch):
    """Stands in for the simulator; a list of the tasks and numbers of episodes it was asked for."""
    asked = []

    def relabel(task, trajectories, *, threads):
        assert threads is None
        for trajectory in trajectories:
            asked.append(task)
            if len(asked) == asked_at_most[0]:
                raise KeyboardInterrupt
            yield paid(task, trajectory.physics)

    asked_at_most = [10**9]
    module = ModuleType("ring_rl.agent.environments.relabel")
    module.relabel = relabel
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("ring_rl.agent.episodes.relabel_cache.version", lambda name: installed[name])
    installed = {"mujoco": "3.1", "dm_control": "1.0"}
    asked_and_settings = type("Simulator", (), {})()
    asked_and_settings.asked, asked_and_settings.at_most, asked_and_settings.installed = asked, asked_at_most, installed
    return asked_and_settings


def no_simulator(monkeypatch):
    monkeypatch.setitem(sys.modules, "ring_rl.agent.environments.relabel", None)


def make_set(folder, count=4):
    (folder / "buffer").mkdir()
    for index in range(count):
        write_episode(folder / "buffer", index, episode(index, length=3 + index))
    return folder


def rewards_of(folder, task="cartpole_swingup", *, recorded_task=None, verify_episodes=2, paths=None):
    paths = paths or list_episodes(folder / "buffer")
    config = RelabelConfig(threads=None, verify_episodes=verify_episodes, tolerance=1e-6)
    return relabelled_rewards(
        folder,
        EpisodeFiles(paths),
        signatures(paths),
        task=task,
        recorded_task=recorded_task,
        config=config,
        progress=False,
    )


def wanted(folder, task="cartpole_swingup"):
    return [paid(task, each.physics) for each in EpisodeFiles(list_episodes(folder / "buffer"))]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


def test_the_second_time_needs_no_simulator(tmp_path, simulator, monkeypatch):
    folder = make_set(tmp_path)
    assert_equal(rewards_of(folder), wanted(folder))
    assert len(simulator.asked) == 4
    no_simulator(monkeypatch)
    assert_equal(rewards_of(folder), wanted(folder))
    assert sorted(each.name for each in (folder / "relabelled").iterdir()) == ["cartpole_swingup.npz"]
    with np.load(folder / "relabelled" / "cartpole_swingup.npz") as arrays:
        description = json.loads(str(arrays["description"]))
    assert description == {
        "task": "cartpole_swingup",
        "versions": {"mujoco": "3.1", "dm_control": "1.0"},
        "verified_episodes": 0,
    }


def test_a_copy_of_a_part_in_another_order_is_served_from_the_cache(tmp_path, simulator, monkeypatch):
    folder = make_set(tmp_path)
    rewards_of(folder)
    no_simulator(monkeypatch)
    paths = list_episodes(folder / "buffer")
    paths[2].rename(paths[2].with_name("episode_000077_5.npz"))
    renamed = (paths[2].with_name("episode_000077_5.npz"), paths[0])
    assert_equal(
        rewards_of(folder, paths=renamed), [paid("cartpole_swingup", e.physics) for e in EpisodeFiles(renamed)]
    )


def test_a_set_that_grew_is_relabelled_where_it_is_new(tmp_path, simulator):
    folder = make_set(tmp_path)
    rewards_of(folder)
    write_episode(folder / "buffer", 9, episode(9))
    assert_equal(rewards_of(folder), wanted(folder))
    assert len(simulator.asked) == 5


def test_an_episode_that_changed_is_relabelled(tmp_path, simulator):
    folder = make_set(tmp_path)
    rewards_of(folder)
    first = list_episodes(folder / "buffer")[0]
    before = signature(first)
    first.unlink()
    write_episode(folder / "buffer", 0, episode(99, length=3))
    assert signature(first) != before
    assert_equal(rewards_of(folder), wanted(folder))


def test_rewards_of_two_simulators_are_not_mixed(tmp_path, simulator):
    folder = make_set(tmp_path)
    rewards_of(folder)
    simulator.installed["mujoco"] = "3.2"
    rewards_of(folder)
    assert len(simulator.asked) == 4  # what is complete is served as it is
    write_episode(folder / "buffer", 9, episode(9))
    rewards_of(folder)
    assert len(simulator.asked) == 9


def test_an_interruption_keeps_what_was_finished(tmp_path, simulator):
    folder = make_set(tmp_path)
    simulator.at_most[0] = 3
    with pytest.raises(KeyboardInterrupt):
        rewards_of(folder)
    simulator.at_most[0] = 10**9
    assert_equal(rewards_of(folder), wanted(folder))
    assert len(simulator.asked) == 3 + 2


def test_recorded_rewards_must_come_out_again(tmp_path, simulator):
    folder = make_set(tmp_path)
    assert_equal(rewards_of(folder, recorded_task="cartpole_balance"), wanted(folder))
    assert simulator.asked == ["cartpole_balance"] * 2 + ["cartpole_swingup"] * 4


def test_a_recording_that_does_not_come_out_again_is_refused(tmp_path, simulator):
    folder = make_set(tmp_path)
    message = r"relabelling cartpole_swingup, for which .* was recorded: .*data\.relabel\.verify_episodes=0 to accept"
    with pytest.raises(ValueError, match=message) as caught:
        rewards_of(folder, "cartpole_balance", recorded_task="cartpole_swingup")
    assert "\n" not in str(caught.value)
    assert not (folder / "relabelled").exists()
    found = rewards_of(folder, "cartpole_balance", recorded_task="cartpole_swingup", verify_episodes=0)
    assert_equal(found, wanted(folder, "cartpole_balance"))


def test_without_a_simulator_the_command_is_named(tmp_path, monkeypatch):
    folder = make_set(tmp_path)
    no_simulator(monkeypatch)
    with pytest.raises(ImportError, match=r"no rewards of cartpole_swingup.*datasets/exorl/relabel\.py") as caught:
        rewards_of(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-40], lambda whole: b"", lambda whole: b"x" + whole[1:]])
def test_a_damaged_cache_is_one_clear_error(tmp_path, simulator, damage):
    folder = make_set(tmp_path)
    rewards_of(folder)
    path = folder / "relabelled" / "cartpole_swingup.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cartpole_swingup\.npz is damaged .*remove it"):
        rewards_of(folder)


def test_a_cache_of_another_task_is_refused(tmp_path, simulator):
    folder = make_set(tmp_path)
    rewards_of(folder, "cartpole_balance")
    (folder / "relabelled" / "cartpole_balance.npz").rename(folder / "relabelled" / "cartpole_swingup.npz")
    with pytest.raises(ValueError, match="is damaged"):
        rewards_of(folder)


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(tmp_path, simulator):
    folder = make_set(tmp_path)
    (folder / ".relabelled.lock").mkdir()  # root may write anything but this
    with pytest.raises(OSError, match="relabelled cannot be written beside the data"):
        rewards_of(folder)
    assert simulator.asked == []


@pytest.mark.parametrize("change", [{"threads": 0}, {"verify_episodes": -1}, {"tolerance": 0.0}])
def test_settings_out_of_range_are_refused(change):
    settings = {"threads": None, "verify_episodes": 1, "tolerance": 1e-6} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        RelabelConfig(**settings)
