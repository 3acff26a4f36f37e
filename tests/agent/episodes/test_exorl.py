import io
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_rl.agent.episodes.exorl import (
    DOMAINS,
    EpisodeSet,
    list_episodes,
    parse_task,
    read_episode,
    read_episodes,
    select_best_fraction,
    write_episode,
)
from ring_rl.agent.episodes.trajectory import Trajectory


def make_trajectory(*, length=8, observation_dim=3, action_dim=2, reward=0.5, physics_dim=4, seed=0) -> Trajectory:
    rng = np.random.default_rng(seed)
    return Trajectory(
        observations=rng.normal(size=(length + 1, observation_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (length, action_dim)).astype(np.float32),
        rewards=np.full(length, reward, np.float32),
        discounts=np.ones(length, np.float32),
        physics=rng.normal(size=(length + 1, physics_dim)) if physics_dim else None,
    )


def published_arrays(*, length=8, reward_columns=1, seed=0) -> dict[str, np.ndarray]:
    """What a published file holds: row t has the action, reward and discount that led to observation t."""
    rng = np.random.default_rng(seed)
    arrays = {
        "observation": rng.normal(size=(length + 1, 3)).astype(np.float32),
        "action": rng.uniform(-1, 1, (length + 1, 2)).astype(np.float32),
        "reward": rng.uniform(0, 1, (length + 1, reward_columns)).astype(np.float32),
        "discount": np.ones((length + 1, 1), np.float32),
        "physics": rng.normal(size=(length + 1, 4)),
    }
    arrays["action"][0] = 0
    arrays["reward"][0] = 0
    return arrays


def save(folder, arrays, name="episode_000000_8.npz"):
    path = folder / name
    np.savez_compressed(path, **arrays)
    return path


def assert_same(left: Trajectory, right: Trajectory) -> None:
    for field in ("observations", "actions", "rewards", "discounts", "physics"):
        one, other = getattr(left, field), getattr(right, field)
        if other is None:
            assert one is None
        else:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


def test_row_t_of_a_file_is_what_led_to_observation_t(tmp_path):
    arrays = published_arrays()
    trajectory = read_episode(save(tmp_path, arrays))
    assert trajectory.length == 8
    np.testing.assert_array_equal(trajectory.observations, arrays["observation"])
    np.testing.assert_array_equal(trajectory.actions, arrays["action"][1:])
    np.testing.assert_array_equal(trajectory.rewards, arrays["reward"][1:, 0])
    np.testing.assert_array_equal(trajectory.discounts, arrays["discount"][1:, 0])
    np.testing.assert_array_equal(trajectory.physics, arrays["physics"])


def test_a_written_file_has_the_published_layout(tmp_path):
    trajectory = make_trajectory(length=8)
    path = write_episode(tmp_path, 42, trajectory)
    assert path.name == "episode_000042_8.npz"
    with np.load(path) as archive:
        shapes = {key: (archive[key].shape, archive[key].dtype.name) for key in archive.files}
        first_row = {key: archive[key][0] for key in ("action", "reward", "discount")}
    assert shapes == {
        "observation": ((9, 3), "float32"),
        "action": ((9, 2), "float32"),
        "reward": ((9, 1), "float32"),
        "discount": ((9, 1), "float32"),
        "physics": ((9, 4), "float64"),
    }
    assert (first_row["action"] == 0).all()
    assert (first_row["reward"] == 0).all()
    assert (first_row["discount"] == 1).all()


@given(
    length=st.integers(1, 20),
    observation_dim=st.integers(1, 4),
    action_dim=st.integers(1, 3),
    physics_dim=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_write_then_read_gives_the_same(tmp_path_factory, length, observation_dim, action_dim, physics_dim, seed):
    trajectory = make_trajectory(
        length=length,
        observation_dim=observation_dim,
        action_dim=action_dim,
        physics_dim=physics_dim,
        seed=seed,
    )
    path = write_episode(tmp_path_factory.mktemp("buffer"), 0, trajectory)
    assert_same(read_episode(path), trajectory)


def test_writing_never_overwrites(tmp_path):
    path = write_episode(tmp_path, 3, make_trajectory(reward=0.5))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_episode(tmp_path, 3, make_trajectory(reward=0.7))
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_episode(tmp_path, 3, make_trajectory(length=4))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def savez_until_the_disk_is_full(file, **_):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", savez_until_the_disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        write_episode(tmp_path, 0, make_trajectory())
    assert list(tmp_path.iterdir()) == []


def test_writing_into_no_folder_or_under_a_negative_index_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        write_episode(tmp_path / "nowhere", 0, make_trajectory())
    with pytest.raises(ValueError, match="at least 0"):
        write_episode(tmp_path, -1, make_trajectory())


def test_episodes_are_listed_by_index_and_strangers_ignored(tmp_path):
    for index in (10, 2, 1_000_000, 0):
        write_episode(tmp_path, index, make_trajectory())
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".episode_000005.half.npz").write_bytes(b"left by a crash")
    assert [path.name for path in list_episodes(tmp_path)] == [
        "episode_000000_8.npz",
        "episode_000002_8.npz",
        "episode_000010_8.npz",
        "episode_1000000_8.npz",
    ]


def test_names_of_the_urlb_recorder_are_read(tmp_path):
    save(tmp_path, published_arrays(), "20220131T120000_11_8.npz")
    save(tmp_path, published_arrays(), "20220131T120000_2_8.npz")
    assert [path.name for path in list_episodes(tmp_path)] == [
        "20220131T120000_2_8.npz",
        "20220131T120000_11_8.npz",
    ]
    assert len(read_episodes(tmp_path, max_episodes=None, progress=False).trajectories) == 2


@pytest.mark.parametrize("make_folder", [True, False])
def test_a_missing_or_empty_folder_names_the_remedy(tmp_path, make_folder):
    folder = tmp_path / "buffer"
    if make_folder:
        folder.mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"buffer.*datasets/exorl/collect\.py.*datasets/exorl/fetch\.py"
    ) as caught:
        read_episodes(folder, max_episodes=None, progress=False)
    assert "\n" not in str(caught.value)


def without(key):
    return lambda arrays: arrays.pop(key)


def changed(key, change):
    def apply(arrays):
        arrays[key] = change(arrays[key])

    return apply


def poisoned(key, row, value):
    def apply(arrays):
        arrays[key][row] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("observation"), "key 'observation' is missing"),
        (without("action"), "key 'action' is missing"),
        (without("reward"), "key 'reward' is missing"),
        (without("discount"), "key 'discount' is missing"),
        (
            changed("observation", lambda a: a.astype(np.float64)),
            "'observation' must be float32, got float64",
        ),
        (changed("physics", lambda a: a.astype(np.float32)), "'physics' must be float64, got float32"),
        (changed("reward", lambda a: a[:, 0]), r"'reward' must have shape \(length \+ 1, n\), got \(9,\)"),
        (changed("action", lambda a: a[:, :0]), "'action' must have shape"),
        (changed("discount", lambda a: np.hstack([a, a])), "'discount' must have 1 column"),
        (changed("reward", lambda a: np.hstack([a] * 4)), r"4 columns.*reward_column=0\.\.3"),
        (
            changed("action", lambda a: a[:-1]),
            "'action' has 8 rows where the file's name says 8 transitions, so 9 rows",
        ),
        (changed("physics", lambda a: np.vstack([a, a])), "'physics' has 18 rows"),
        (poisoned("observation", 5, np.nan), "'observation' has a NaN or infinite value in row 5"),
        (poisoned("reward", 2, np.inf), "'reward' has a NaN or infinite value in row 2"),
        (poisoned("physics", 1, -np.inf), "'physics' has a NaN or infinite value in row 1"),
        (changed("reward", lambda a: a.astype(object)), "truncated or corrupt npz file"),
    ],
)
def test_bad_content_is_named_with_its_file(tmp_path, damage, message):
    arrays = published_arrays()
    damage(arrays)
    path = save(tmp_path, arrays)
    with pytest.raises(ValueError, match=message) as caught:
        read_episode(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lengths_that_disagree_with_the_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'observation' has 9 rows where the file's name says 7 transitions"):
        read_episode(save(tmp_path, published_arrays(length=8), "episode_000000_7.npz"))


@given(st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, data):
    path = save(tmp_path_factory.mktemp("buffer"), published_arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"truncated or corrupt npz file.*fetch or collect it again"):
        read_episode(path)


@given(st.data())
def test_a_flipped_byte_never_escapes_as_another_error(tmp_path_factory, data):
    """Headers, directory and compressed data alike: the result is the right content or one ValueError."""
    path = save(tmp_path_factory.mktemp("buffer"), published_arrays())
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        trajectory = read_episode(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        np.testing.assert_array_equal(trajectory.observations, published_arrays()["observation"])


def test_corrupt_compressed_data_is_refused(tmp_path):
    path = save(tmp_path, published_arrays())
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("physics.npy").header_offset + 120
    content = bytearray(path.read_bytes())
    content[middle : middle + 20] = os.urandom(20)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="truncated or corrupt npz file"):
        read_episode(path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    for content in (b"", b"hello", buffer.getvalue()):
        path = tmp_path / "episode_000000_8.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or corrupt npz file"):
            read_episode(path)


def test_a_name_that_is_not_an_episodes_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="not an episode's name"):
        read_episode(save(tmp_path, published_arrays(), "foo.npz"))
    with pytest.raises(FileNotFoundError, match="no such episode"):
        read_episode(tmp_path / "episode_000009_8.npz")


def test_a_reward_column_is_chosen(tmp_path):
    arrays = published_arrays(reward_columns=4)
    path = save(tmp_path, arrays)
    np.testing.assert_array_equal(read_episode(path, reward_column=2).rewards, arrays["reward"][1:, 2])
    with pytest.raises(ValueError, match=r"reward_column=4 must be in 0\.\.3"):
        read_episode(path, reward_column=4)


def fill(folder, returns):
    for index, episode_return in enumerate(returns):
        write_episode(folder, index, make_trajectory(length=4, reward=episode_return / 4, seed=index))


def test_a_folder_is_read_in_order(tmp_path):
    fill(tmp_path, [4, 8, 2, 6])
    episodes = read_episodes(tmp_path, max_episodes=None, progress=True)
    np.testing.assert_allclose(episodes.returns, [4, 8, 2, 6])
    assert (episodes.observation_dim, episodes.action_dim) == (3, 2)
    assert episodes.best.episode_return == pytest.approx(8)
    assert list(episodes.quantiles) == ["min", "p10", "p25", "median", "p75", "p90", "p95", "max"]
    assert episodes.quantiles["min"] == pytest.approx(2)
    assert episodes.quantiles["median"] == pytest.approx(5)
    assert episodes.quantiles["max"] == pytest.approx(8)


def test_a_limit_takes_episodes_from_the_whole_recording(tmp_path):
    fill(tmp_path, range(10))
    episodes = read_episodes(tmp_path, max_episodes=4, progress=False)
    np.testing.assert_allclose(episodes.returns, [0, 2, 5, 7])
    assert len(read_episodes(tmp_path, max_episodes=99, progress=False).trajectories) == 10
    with pytest.raises(ValueError, match="max_episodes must be at least 1"):
        read_episodes(tmp_path, max_episodes=0, progress=False)


def test_episodes_of_two_domains_are_refused(tmp_path):
    write_episode(tmp_path, 0, make_trajectory(observation_dim=3))
    write_episode(tmp_path, 1, make_trajectory(observation_dim=4))
    with pytest.raises(ValueError, match=r"episode_000001_8\.npz.*\(4, 2\) differ from \(3, 2\)"):
        read_episodes(tmp_path, max_episodes=None, progress=False)
    with pytest.raises(ValueError, match="trajectory 1"):
        EpisodeSet((make_trajectory(action_dim=1), make_trajectory(action_dim=2)))


def test_lengths_may_differ(tmp_path):
    write_episode(tmp_path, 0, make_trajectory(length=3))
    write_episode(tmp_path, 1, make_trajectory(length=5))
    episodes = read_episodes(tmp_path, max_episodes=None, progress=False)
    assert [trajectory.length for trajectory in episodes.trajectories] == [3, 5]


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one trajectory"):
        EpisodeSet(())


@given(returns=st.lists(st.integers(0, 50), min_size=1, max_size=30), fraction=st.floats(0.01, 1))
def test_the_best_fraction_is_the_best(returns, fraction):
    base = make_trajectory(length=1)
    episodes = EpisodeSet(tuple(replace(base, rewards=np.array([each], np.float32)) for each in returns))
    best = select_best_fraction(episodes, fraction)
    count = max(1, round(fraction * len(returns)))
    np.testing.assert_array_equal(best.returns, sorted(returns)[-count:])


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction must be above 0"):
        select_best_fraction(EpisodeSet((make_trajectory(),)), fraction)


def test_every_built_task_parses():
    for domain, spec in DOMAINS.items():
        for task in spec.tasks:
            assert parse_task(f"{domain}_{task}") == (domain, task)


@pytest.mark.parametrize("task", ["cartpole_swngup", "cartpole", "", "hopper_hop", "walker_"])
def test_unknown_tasks_list_the_known_ones(task):
    with pytest.raises(ValueError, match=r"unknown task.*known are .*cartpole_swingup.*walker_run"):
        parse_task(task)


def test_a_misspelt_task_gets_a_guess():
    with pytest.raises(ValueError, match="did you mean 'cartpole_swingup'"):
        parse_task("cartpole_swngup")
