"""What comes out of a store is what is in the episode files, to the bit."""

import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.episodes import store_write
from ring_rl.agent.episodes.exorl import list_episodes, read_episodes, select_best_fraction, write_episode
from ring_rl.agent.episodes.load import DataConfig, load_episodes, normalisation_of
from ring_rl.agent.episodes.relabel_cache import RelabelConfig
from ring_rl.agent.episodes.store import EpisodeStore, StaleStoreError, read_index
from ring_rl.agent.episodes.store_write import held_steps, make_store, open_store
from ring_rl.agent.episodes.trajectory import Trajectory


def episode(seed, *, length=8, hold=1, observation_dim=3, action_dim=2, physics_dim=4):
    generator = np.random.default_rng(seed)
    actions = generator.uniform(-1, 1, (length // hold, action_dim)).repeat(hold, axis=0)
    return Trajectory(
        observations=generator.normal(size=(length + 1, observation_dim)).astype(np.float32),
        actions=actions.astype(np.float32),
        rewards=generator.uniform(size=length).astype(np.float32),
        discounts=generator.integers(0, 2, length).astype(np.float32),
        physics=generator.normal(size=(length + 1, physics_dim)) if physics_dim else None,
    )


def make_set(root, lengths=(8, 4, 12, 8), **options):
    folder = root / "cartpole" / "rnd"
    (folder / "buffer").mkdir(parents=True)
    for index, length in enumerate(lengths):
        write_episode(folder / "buffer", index, episode(index, length=length, **options))
    return folder


def settings(folder, *, store, action_repeat=1, max_episodes=None):
    return DataConfig(
        name="exorl",
        root=folder.parents[1],
        algorithm="rnd",
        max_episodes=max_episodes,
        action_repeat=action_repeat,
        rewards="stored",
        reward_column=None,
        relabel=RelabelConfig(threads=None, verify_episodes=0, tolerance=1e-6),
        store=store,
        store_from_megabytes=1.0,
    )


def load(folder, **options):
    return load_episodes(settings(folder, **options), task="cartpole_swingup", progress=False)


def assert_same_sets(stored, read):
    assert len(stored.trajectories) == len(read.trajectories)
    for one, other in zip(stored.trajectories, read.trajectories, strict=True):
        for name in ("observations", "actions", "rewards", "discounts"):
            assert getattr(one, name).dtype == np.float32
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert one.physics is None
    np.testing.assert_array_equal(stored.returns, read.returns)
    np.testing.assert_array_equal(stored.lengths, read.lengths)
    assert (stored.observation_dim, stored.action_dim) == (read.observation_dim, read.action_dim)
    assert normalisation_of(stored) == normalisation_of(read)


@given(
    decisions=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    hold=st.sampled_from([1, 2, 4, 20]),
    observation_dim=st.integers(1, 4),
    action_dim=st.integers(1, 3),
    physics_dim=st.sampled_from([0, 3]),
    max_episodes=st.sampled_from([None, 1, 3]),
)
def test_a_store_gives_what_the_files_hold(
    tmp_path_factory, decisions, hold, observation_dim, action_dim, physics_dim, max_episodes
):
    folder = make_set(
        tmp_path_factory.mktemp("data"),
        [each * hold for each in decisions],
        hold=hold,
        observation_dim=observation_dim,
        action_dim=action_dim,
        physics_dim=physics_dim,
    )
    for repeat in {1, hold}:
        read = load(folder, store="never", action_repeat=repeat, max_episodes=max_episodes)
        assert isinstance(read.trajectories, tuple)
        stored = load(folder, store="always", action_repeat=repeat, max_episodes=max_episodes)
        assert_same_sets(stored, read)
        assert_same_sets(select_best_fraction(stored, 0.4), select_best_fraction(read, 0.4))


@given(changes=st.lists(st.integers(1, 11), max_size=4), length=st.integers(1, 12))
def test_held_steps(changes, length):
    actions = np.zeros((length, 2), np.float32)
    for number, change in enumerate(changes):
        actions[change:] += number + 1
    held = [
        k
        for k in range(1, length + 1)
        if length % k == 0 and (actions.reshape(-1, k, 2) == actions[::k][:, None]).all()
    ]
    assert held_steps(actions) == max(held)


def test_actions_that_were_not_held_are_refused_as_when_read_into_memory(tmp_path):
    folder = make_set(tmp_path, (8, 8), hold=4)
    write_episode(folder / "buffer", 2, episode(2, length=8, hold=2))
    message = "the action changes at control step 2, inside a group of action_repeat 4"
    with pytest.raises(ValueError, match=message):
        load(folder, store="never", action_repeat=4)
    with pytest.raises(ValueError, match=rf"episode_000002_8.npz: {message}"):
        load(folder, store="always", action_repeat=4)
    assert len(load(folder, store="always", action_repeat=2).trajectories) == 3


def test_several_rewards_a_step(tmp_path):
    folder = make_set(tmp_path, ())
    rewards = np.random.default_rng(0).uniform(size=(5, 3)).astype(np.float32)
    one = episode(0, length=4)
    rows = {"observation": one.observations, "action": np.vstack([one.actions[:1], one.actions])}
    np.savez(folder / "buffer" / "episode_000000_4.npz", reward=rewards, discount=rewards[:, :1], **rows)
    store = make_store(folder, progress=False)
    assert store.reward_columns == 3
    for column in range(3):
        (trajectory,) = store.episodes(np.array([0]), column, action_repeat=1).trajectories
        np.testing.assert_array_equal(trajectory.rewards, rewards[1:, column])
    with pytest.raises(ValueError, match=r"reward_column=3 must be in 0\.\.2"):
        store.episodes(np.array([0]), 3, action_repeat=1)


def test_auto_makes_a_store_of_large_data_only_and_uses_one_that_is_there(tmp_path):
    folder = make_set(tmp_path)
    assert isinstance(load(folder, store="auto").trajectories, tuple)
    assert not (folder / "store").exists()
    make_store(folder, progress=False)
    assert not isinstance(load(folder, store="auto").trajectories, tuple)
    write_episode(folder / "buffer", 9, episode(9))
    assert isinstance(load(folder, store="auto").trajectories, tuple)  # the store is not of this buffer any more


def test_a_store_is_an_ordinary_folder_of_arrays(tmp_path):
    folder = make_set(tmp_path)
    make_store(folder, progress=False)
    names = ["actions.npy", "discounts.npy", "index.npz", "observations.npy", "rewards.npy"]
    assert sorted(each.name for each in (folder / "store").iterdir()) == names
    read = read_episodes(folder / "buffer", max_episodes=None, progress=False).trajectories
    observations = np.load(folder / "store" / "observations.npy", mmap_mode="r")
    np.testing.assert_array_equal(observations, np.concatenate([each.observations for each in read]))
    assert oct((folder / "store" / "index.npz").stat().st_mode & 0o444) == oct(
        (folder / "buffer" / "episode_000000_8.npz").stat().st_mode & 0o444
    )


def grown(folder):
    write_episode(folder / "buffer", 9, episode(9))


def shrunk(folder):
    (folder / "buffer" / "episode_000001_4.npz").unlink()


def changed(folder):
    path = folder / "buffer" / "episode_000001_4.npz"
    path.unlink()
    write_episode(folder / "buffer", 1, episode(77, length=4))


@pytest.mark.parametrize("change", [grown, shrunk, changed])
def test_a_store_of_another_buffer_is_refused_and_made_again(tmp_path, change):
    folder = make_set(tmp_path)
    make_store(folder, progress=False)
    change(folder)
    with pytest.raises(StaleStoreError, match=r"is not of these episodes .*remove it") as caught:
        EpisodeStore(folder / "store", list_episodes(folder / "buffer"))
    assert "\n" not in str(caught.value)
    assert open_store(folder) is None
    assert_same_sets(load(folder, store="always"), load(folder, store="never"))
    assert open_store(folder) is not None
    assert sorted(each.name for each in folder.iterdir()) == [".store.lock", "buffer", "store"]


def test_a_copied_data_set_keeps_its_store(tmp_path):
    folder = make_set(tmp_path / "here")
    make_store(folder, progress=False)
    copy = tmp_path / "there" / "cartpole" / "rnd"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    for path in (copy / "buffer").iterdir():
        os.utime(path, ns=(1, 1))
    assert open_store(copy) is not None


FILES = ("actions.npy", "discounts.npy", "index.npz", "observations.npy", "rewards.npy")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 20, -1])
def test_a_store_that_was_cut_off_is_refused(tmp_path, name, keep):
    folder = make_set(tmp_path)
    make_store(folder, progress=False)
    path = folder / "store" / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"the store .* is damaged .*remove it, it is made again") as caught:
        open_store(folder)
    assert not isinstance(caught.value, StaleStoreError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES[:2] + FILES[3:])
def test_a_store_that_lacks_a_file_or_has_another_sets_is_refused(tmp_path, name):
    folder, other = make_set(tmp_path / "one"), make_set(tmp_path / "other", (8, 4, 12, 9))
    make_store(folder, progress=False)
    make_store(other, progress=False)
    shutil.copy(other / "store" / name, folder / "store" / name)
    with pytest.raises(ValueError, match=r"is damaged .*where the index says"):
        open_store(folder)
    (folder / "store" / name).unlink()
    with pytest.raises(ValueError, match="is damaged"):
        open_store(folder)


def test_an_index_of_another_version_is_refused(tmp_path, monkeypatch):
    folder = make_set(tmp_path)
    monkeypatch.setattr("ring_rl.agent.episodes.store._FORMAT", 0)
    make_store(folder, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another version of ring_rl"):
        read_index(folder / "store" / "index.npz")


def test_an_interrupted_conversion_leaves_nothing_and_is_made_again(tmp_path, monkeypatch):
    folder = make_set(tmp_path)
    real, calls = store_write.read_episode_and_rewards, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(store_write, "read_episode_and_rewards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_store(folder, progress=False)
    assert sorted(each.name for each in folder.iterdir()) == [".store.lock", "buffer"]
    assert open_store(folder) is None
    make_store(folder, progress=False)
    assert open_store(folder) is not None


def test_what_a_killed_conversion_left_is_no_store_and_is_removed(tmp_path, monkeypatch):
    folder = make_set(tmp_path)

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(store_write, "write_index", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a process that is killed cleans nothing up
    with pytest.raises(SystemExit):
        make_store(folder, progress=False)
    assert (folder / ".store.unfinished" / "observations.npy").exists()
    assert open_store(folder) is None
    monkeypatch.undo()
    make_store(folder, progress=False)
    assert sorted(each.name for each in folder.iterdir()) == [".store.lock", "buffer", "store"]


def test_two_that_make_it_at_once_make_it_once(tmp_path, monkeypatch, capfd):
    folder = make_set(tmp_path)
    converting, go_on, conversions = threading.Event(), threading.Event(), []
    real = store_write._convert

    def slow(*arguments, **options):
        conversions.append(1)
        converting.set()
        assert go_on.wait(30)
        real(*arguments, **options)

    monkeypatch.setattr(store_write, "_convert", slow)
    threads = [threading.Thread(target=make_store, args=(folder,), kwargs={"progress": False}) for _ in range(2)]
    threads[0].start()
    assert converting.wait(30)
    threads[1].start()
    waited = ""
    while "waiting for another process" not in waited:
        waited += capfd.readouterr().err
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(conversions) == 1
    assert open_store(folder) is not None


def test_a_bad_episode_is_named_and_no_store_appears(tmp_path):
    folder = make_set(tmp_path)
    write_episode(folder / "buffer", 7, episode(7, action_dim=5))
    with pytest.raises(ValueError, match=r"episode_000007_8\.npz: actions of shape \(5,\) .*keep one domain"):
        make_store(folder, progress=False)
    (folder / "buffer" / "episode_000007_8.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"episode_000007_8\.npz: truncated or corrupt"):
        make_store(folder, progress=False)
    assert not (folder / "store").exists()


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    folder = make_set(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match=r"needs .* GB and the disk has .*data\.store=never"):
        make_store(folder, progress=False)
    assert not (folder / "store").exists()


def test_a_folder_that_cannot_be_written_names_the_way_to_read_it_nevertheless(tmp_path):
    folder = make_set(tmp_path)
    (folder / ".store.lock").mkdir()  # root may write anything but this
    with pytest.raises(OSError, match=r"store cannot be written beside the data .* or set data\.store=never"):
        load(folder, store="always")
    assert len(load(folder, store="never").trajectories) == 4


def test_many_threads_read_at_once(tmp_path):
    folder = make_set(tmp_path, [5 + index % 7 for index in range(40)])
    stored, read = load(folder, store="always"), load(folder, store="never")
    wrong = []

    def reader(seed):
        for index in np.random.default_rng(seed).integers(0, 40, 200):
            if not (stored.trajectories[index].observations == read.trajectories[index].observations).all():
                wrong.append(index)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_open_store_goes_on_when_it_is_replaced(tmp_path):
    """A training must not end because another one makes the store anew."""
    folder = make_set(tmp_path)
    stored = load(folder, store="always")
    before = [each.observations for each in stored.trajectories]
    grown(folder)
    make_store(folder, progress=False)
    for one, other in zip(stored.trajectories, before, strict=True):
        np.testing.assert_array_equal(one.observations, other)


def test_the_threshold_of_auto(tmp_path):
    folder = make_set(tmp_path)
    config = replace(settings(folder, store="auto"), store_from_megabytes=0.0)
    assert not isinstance(load_episodes(config, task="cartpole_swingup", progress=False).trajectories, tuple)
    with pytest.raises(ValueError, match="store_from_megabytes must be at least 0"):
        replace(config, store_from_megabytes=-1.0)
