import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="collecting needs the simulator: pip install 'ring_rl[simulator]'")

from ring_rl.agent.environments.batched_physics import BatchedPhysics
from ring_rl.agent.environments.environment import make_environment, observations_of_states, rewards_of_states
from ring_rl.agent.episodes.exorl import read_episode
from ring_rl.agent.episodes.trajectory import merge_held_actions
from ring_rl.agent.exploration import collection, collection_record
from ring_rl.agent.exploration.collection import CollectionConfig, collect, make_explorer, play_batch
from ring_rl.agent.exploration.ddpg import DDPGConfig
from ring_rl.agent.exploration.explorers import NoiseConfig, UniformConfig
from ring_rl.agent.exploration.policy_search import PolicySearchConfig
from ring_rl.agent.exploration.rnd import NoveltyConfig
from ring_rl.agent.exploration.rnd_explorer import RNDConfig

pytestmark = pytest.mark.simulator

UNIFORM = UniformConfig("uniform", 8, 3)
NOISE = NoiseConfig("noise", 8, 3, "mix", 0.1, 0.5, 4.0, 64.0, 1.0)
RND = RNDConfig(
    "rnd",
    action_hold=40,
    environments=2,
    seed_decisions=50,
    decisions_an_update=5,
    minibatch=8,
    replay_decisions=100,
    ddpg=DDPGConfig(8, 1e-3, 0.99, 3, 0.01, 0.2, 0.3),
    novelty=NoveltyConfig(8, 4, 1e-3, 5.0, "symlog", 1.0, 2.0, 1.0),
)
SEARCH = PolicySearchConfig("policy_search", 8, 2, 4, 2, 0.5, 0.5, 0.05, 60, 0.1, 1.0)


@pytest.fixture(autouse=True)
def without_cards(request, monkeypatch):
    """Cards take a second each; `test_the_card...` and the first test make them."""
    if "card" not in request.node.name and "published_layout" not in request.node.name:
        monkeypatch.setattr(collection, "returns_of_every_task", lambda *_, **__: {})
        monkeypatch.setattr(collection, "write_card", lambda *_, **__: None)


def configuration(root, **changes):
    settings = {
        "task": "cartpole_swingup",
        "explorer": UNIFORM,
        "episodes": 5,
        "seed": 0,
        "root": root,
        "algorithm": "test",
        "threads": 1,
        "save_state_seconds": 0.0,
    }
    return CollectionConfig(**{**settings, **changes})


def contents(config):
    return {path.name: path.read_bytes() for path in sorted((config.folder / "buffer").iterdir())}


def arrays(config):
    return [read_episode(path) for path in sorted((config.folder / "buffer").iterdir())]


def assert_same_episodes(one, other):
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.observations, right.observations)
        np.testing.assert_array_equal(left.actions, right.actions)
        np.testing.assert_array_equal(left.rewards, right.rewards)
        np.testing.assert_array_equal(left.physics, right.physics)


@pytest.mark.parametrize("explorer", [UNIFORM, NOISE, SEARCH, RND], ids=lambda each: each.name)
def test_a_folder_is_filled_in_the_published_layout(tmp_path, explorer):
    config = configuration(tmp_path, explorer=explorer, episodes=5)
    episodes = collect(config, progress=True)
    assert len(episodes.trajectories) == 5
    assert sorted(contents(config)) == [f"episode_{index:06d}_1000.npz" for index in range(5)]
    record = json.loads((config.folder / "collection.json").read_text())
    assert record["settings"]["explorer"]["name"] == explorer.name
    assert record["settings"]["task"] == "cartpole_swingup"
    assert record["reward_free"] is (explorer is not SEARCH)
    assert record["complete"] is True
    assert record["returns"]["max"] == pytest.approx(episodes.returns.max())
    assert set(record["versions"]) == {"python", "ring_rl", "dm_control", "mujoco", "numpy"}
    assert (config.folder / "returns.png").read_bytes().startswith(b"\x89PNG")
    for trajectory in episodes.trajectories:
        assert trajectory.observations.shape == (1001, 5)
        assert trajectory.physics.shape == (1001, 4)
        assert merge_held_actions(trajectory, 8).length == 125  # actions are held as the settings say


def test_what_is_recorded_is_what_dm_control_does(tmp_path):
    """Observations and rewards are those of the recorded states; the first states, those of a reset."""
    config = configuration(tmp_path, explorer=SEARCH, episodes=3)
    explorer = make_explorer(config)
    trajectory = collect(config, progress=False).trajectories[0]
    np.testing.assert_allclose(
        observations_of_states(config.task, trajectory.physics[:200]), trajectory.observations[:200], atol=1e-6
    )
    rewards = rewards_of_states(config.task, trajectory.physics[1:201], trajectory.actions[:200])
    np.testing.assert_allclose(rewards, trajectory.rewards[:200], atol=1e-6)
    environment = make_environment(config.task, action_repeat=1)
    observation, _ = environment.reset(seed=explorer.batch(0).reset_seeds[0])
    np.testing.assert_array_equal(observation, trajectory.observations[0])
    for step in range(100):
        observation = environment.step(trajectory.actions[step])[0]
    np.testing.assert_allclose(observation, trajectory.observations[100], atol=1e-5)


@pytest.mark.parametrize("explorer", [UNIFORM, SEARCH, RND], ids=lambda each: each.name)
def test_an_interrupted_collection_goes_on_to_the_same_result(tmp_path, monkeypatch, explorer):
    whole = configuration(tmp_path / "whole", explorer=explorer, episodes=6)
    collect(whole, progress=False)
    interrupted = configuration(tmp_path / "interrupted", explorer=explorer, episodes=6)
    write = collection.write_episode

    def write_three_then_ctrl_c(folder, index, trajectory):
        if index == 3:
            raise KeyboardInterrupt
        return write(folder, index, trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(collection, "write_episode", write_three_then_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            collect(interrupted, progress=False)
    kept = contents(interrupted)
    assert len(kept) == 3
    record = json.loads((interrupted.folder / "collection.json").read_text())
    assert (record["complete"], record["episodes"]) == (False, 3)
    collect(interrupted, progress=False)
    assert contents(interrupted).items() >= kept.items()
    assert_same_episodes(arrays(interrupted), arrays(whole))
    assert json.loads((interrupted.folder / "collection.json").read_text())["complete"] is True


def test_a_missing_episode_in_the_middle_is_filled_in(tmp_path):
    config = configuration(tmp_path, episodes=4)
    collect(config, progress=False)
    before = arrays(config)
    (config.folder / "buffer" / "episode_000001_1000.npz").unlink()
    collect(config, progress=False)
    assert_same_episodes(arrays(config), before)


def test_a_finished_collection_is_left_alone(tmp_path, monkeypatch):
    config = configuration(tmp_path, episodes=2)
    collect(config, progress=False)
    before, record = contents(config), (config.folder / "collection.json").read_bytes()
    monkeypatch.setattr(collection, "BatchedPhysics", None)  # nothing may be simulated
    monkeypatch.setattr(collection_record, "git_commit", lambda: "another")
    assert len(collect(config, progress=False).trajectories) == 2
    assert contents(config) == before
    assert (config.folder / "collection.json").read_bytes() == record


def test_all_who_had_a_part_in_a_set_are_named(tmp_path, monkeypatch):
    config = configuration(tmp_path, episodes=3)
    monkeypatch.setattr(collection_record, "git_commit", lambda: "first")
    collect(config, progress=False)
    next((config.folder / "buffer").glob("episode_000001_*")).unlink()
    monkeypatch.setattr(collection_record, "git_commit", lambda: "second")
    collect(config, progress=False)
    record = collection_record.read_record(config.folder)
    assert [each["git_commit"] for each in record["made_by"]] == ["first", "second"]
    assert record["git_commit"] == "second"


def test_seeds_differ_and_threads_do_not_matter(tmp_path):
    base = configuration(tmp_path, explorer=SEARCH, episodes=4)
    variants = [base, replace(base, algorithm="threads", threads=2), replace(base, algorithm="seed", seed=1)]
    one, threads, seed = ([*collect(config, progress=False).trajectories] for config in variants)
    assert_same_episodes(one, threads)
    assert not np.array_equal(one[0].actions, seed[0].actions)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    config = configuration(tmp_path, episodes=2)
    collect(config, progress=False)
    before = contents(config)
    for changes, message in [
        ({"seed": 1}, r"collected otherwise \(seed: saved 0, wanted 1\); choose another folder with algorithm="),
        ({"task": "cartpole_balance"}, "task: saved 'cartpole_swingup', wanted 'cartpole_balance'"),
        ({"explorer": replace(UNIFORM, action_hold=4)}, "explorer.action_hold: saved 8, wanted 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            collect(replace(config, **changes), progress=False)
    assert contents(config) == before


def test_episodes_of_unknown_origin_are_not_mixed_with(tmp_path):
    config = configuration(tmp_path)
    (config.folder / "buffer").mkdir(parents=True)
    (config.folder / "buffer" / "episode_000000_1000.npz").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"no collection\.json to say where from"):
        collect(config, progress=False)
    (config.folder / "collection.json").write_text("{}")
    with pytest.raises(ValueError, match="no record of a collection"):
        collect(config, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "walker_fly"}, "unknown task"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"algorithm": "../escape"}, "algorithm names one folder"),
        ({"algorithm": ""}, "algorithm names one folder"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"explorer": replace(UNIFORM, action_hold=7)}, "not divisible by action_hold 7"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        configuration(tmp_path / "root", **changes)
    assert not (tmp_path / "root").exists()


def test_numbers_that_do_not_fit_the_search_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="more than population"):
        collect(configuration(tmp_path / "root", explorer=SEARCH, episodes=50), progress=False)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("task", ["walker_walk", "cheetah_run", "quadruped_walk"])
def test_other_domains_play(task):
    """A short stretch of an episode: whole ones take walker seconds."""
    explorer = make_explorer(configuration(None, task=task, explorer=SEARCH, episodes=6))
    with BatchedPhysics(task, threads=2) as physics:
        physics.episode_steps = 24
        for number in range(2):
            trajectories = play_batch(physics, explorer.batch(number), action_hold=8)
            explorer.learn(number, trajectories)
    assert len(trajectories) == 4
    assert trajectories[0].length == 24
    assert np.isfinite(trajectories[0].observations).all()


def test_an_unstable_simulation_is_reported_in_a_line(tmp_path, monkeypatch):
    def explode(*_, **__):
        raise FloatingPointError("the simulation of x became unstable; use another seed")

    monkeypatch.setattr(BatchedPhysics, "play", explode)
    with pytest.raises(ValueError, match="became unstable"):
        collect(configuration(tmp_path), progress=False)


def test_rnd_sees_no_reward(tmp_path):
    """Two tasks of a domain that begin alike give the same episodes, with other rewards."""
    runs = {}
    for task in ("cheetah_run", "cheetah_run_backward"):
        config = configuration(tmp_path, task=task, algorithm=task, explorer=RND, episodes=4)
        runs[task] = collect(config, progress=False).trajectories
        assert json.loads((config.folder / "collection.json").read_text())["rewards_recorded"] == task
    for one, other in zip(*runs.values(), strict=True):
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.physics, other.physics)
        assert not np.array_equal(one.rewards, other.rewards)


def test_rnd_goes_on_from_what_it_has_learnt(tmp_path, monkeypatch):
    """The first batches are not played again, and their state on disk goes when the set is complete."""
    config = configuration(tmp_path, explorer=RND, episodes=6)
    played = []
    play = collection.play_batch

    def play_two_then_die(physics, batch, *, action_hold):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(batch)
        return play(physics, batch, action_hold=action_hold)

    with monkeypatch.context() as patch:
        patch.setattr(collection, "play_batch", play_two_then_die)
        with pytest.raises(KeyboardInterrupt):
            collect(config, progress=False)
        assert (config.folder / "explorer.npz").exists()
        played.clear()
        collect(config, progress=False)
        assert len(played) == 1
    assert not (config.folder / "explorer.npz").exists()
    whole = configuration(tmp_path, explorer=RND, episodes=6, algorithm="whole")
    collect(whole, progress=False)
    assert_same_episodes(arrays(config), arrays(whole))


def test_rnd_plays_again_what_was_lost_before_its_state(tmp_path, monkeypatch):
    config = configuration(tmp_path, explorer=RND, episodes=6)
    write = collection.write_episode

    def stop_at_the_last(folder, index, trajectory):
        if index == 5:
            raise KeyboardInterrupt
        return write(folder, index, trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(collection, "write_episode", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            collect(config, progress=False)
    before = arrays(config)
    (config.folder / "buffer" / "episode_000001_1000.npz").unlink()
    collect(config, progress=False)
    assert_same_episodes(arrays(config)[:5], before)


def test_a_state_that_is_damaged_says_what_to_do(tmp_path):
    config = configuration(tmp_path, explorer=RND, episodes=2)
    collect(config, progress=False)
    (config.folder / "buffer" / "episode_000001_1000.npz").unlink()
    (config.folder / "explorer.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"holds no explorer's state .* remove it"):
        collect(config, progress=False)


def test_the_card_has_the_returns_of_every_task(tmp_path):
    config = configuration(tmp_path, episodes=3)
    episodes = collect(config, progress=False)
    card = (config.folder / "card.md").read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in card.splitlines()}
    assert {"cartpole_balance", "cartpole_balance_sparse", "cartpole_swingup", "cartpole_swingup_sparse"} <= set(rows)
    assert rows["cartpole_swingup"].rstrip(" |").endswith(f"{episodes.returns.max():.0f}")
    assert "| looks at the task's reward | no |" in card
