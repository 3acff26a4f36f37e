"""The explorer without a simulator: observations are made up, so that what it sees is known."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from ring_rl.agent.exploration import rnd_explorer
from ring_rl.agent.exploration.ddpg import DDPGConfig
from ring_rl.agent.exploration.rnd import NoveltyConfig
from ring_rl.agent.exploration.rnd_explorer import RNDConfig, RNDExplorer
from ring_rl.config import from_mapping
from ring_rl.hydra_config import resolve

CONF = Path(__file__).parents[3] / "conf"
CONFIG = {
    "name": "rnd",
    "action_hold": 2,
    "environments": 3,
    "seed_decisions": 9,
    "decisions_an_update": 1,
    "minibatch": 8,
    "replay_decisions": 1000,
    "ddpg": DDPGConfig(8, 1e-3, 0.9, 3, 0.1, 0.2, 0.3),
    "novelty": NoveltyConfig(8, 4, 1e-3, 5.0, "symlog", 1.0, 2.0, 1.0),
}
DECISIONS = 10


def explorer(*, seed=0, episodes=7, **changes):
    config = RNDConfig(**{**CONFIG, **changes})
    return RNDExplorer(
        config, episodes=episodes, episode_steps=2 * DECISIONS, observation_dim=3, action_dim=2, seed=seed
    )


def play(agent, number):
    """Moves on a line by the first action; returns the batch's actions."""
    batch = agent.batch(number)
    observations = np.random.default_rng(batch.reset_seeds).normal(size=(len(batch.reset_seeds), 3)).astype(np.float32)
    taken = []
    for decision in range(DECISIONS):
        actions = batch.policy(observations, decision)
        observations = observations + np.concatenate([actions, actions[:, :1]], axis=1)
        batch.observe(actions, observations)
        taken.append(actions)
    agent.learn(number, [])
    return np.stack(taken)


def weights(agent):
    return jax.tree.leaves(jax.device_get(agent._state))


@pytest.fixture(scope="module")
def played():
    """Three batches of one explorer, with its state in between."""
    agent = explorer()
    states, actions = [], []
    for number in range(3):
        states.append(agent.state())
        actions.append(play(agent, number))
    return agent, states, actions


def test_batches_and_actions(played):
    agent, _, actions = played
    assert agent.batch_sizes == (3, 3, 1)
    assert [each.shape for each in actions] == [(DECISIONS, 3, 2), (DECISIONS, 3, 2), (DECISIONS, 1, 2)]
    assert all(each.dtype == np.float32 and np.abs(each).max() <= 1 for each in actions)
    assert agent.reward_free
    assert agent.learns


def test_it_learns_once_it_has_acted_at_random_for_long_enough():
    agent = explorer()
    before = weights(agent)
    batch = agent.batch(0)
    observations = np.zeros((3, 3), np.float32)
    for decision in range(3):  # 9 decisions, all of them random
        actions = batch.policy(observations, decision)
        batch.observe(actions, observations)
    for one, other in zip(before, weights(agent), strict=True):
        np.testing.assert_array_equal(one, other)
    batch.observe(batch.policy(observations, 3), observations)
    assert any(not np.array_equal(one, other) for one, other in zip(before, weights(agent), strict=True))
    assert set(agent.metrics) == {"critic_loss", "value", "novelty"}
    assert all(np.isfinite(value) for value in agent.metrics.values())


@pytest.mark.parametrize("decisions_an_update", [1, 7])
def test_updates_follow_decisions(decisions_an_update, monkeypatch):
    agent = explorer(decisions_an_update=decisions_an_update, seed_decisions=0)
    counts = []
    monkeypatch.setattr(
        rnd_explorer,
        "_learn",
        lambda _, __, state, transitions, *___: (counts.append(len(transitions.observations)), (state, {}))[1],
    )
    play(agent, 0)
    # The first 2 steps of 3 environments have no 3 decisions in a row yet.
    assert sum(counts) == 30 // decisions_an_update - 6 // decisions_an_update


def test_the_seed_determines_everything(played):
    _, _, actions = played
    same, other = explorer(), explorer(seed=1)
    for number in range(2):
        np.testing.assert_array_equal(play(same, number), actions[number])
        assert not np.array_equal(play(other, number), actions[number])


def test_it_goes_on_from_its_state_as_if_nothing_had_happened(played):
    agent, states, actions = played
    resumed = explorer()
    resumed.restore(states[1])
    for number in (1, 2):
        np.testing.assert_array_equal(play(resumed, number), actions[number])
    for one, other in zip(weights(agent), weights(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


def test_batches_come_in_order():
    agent = explorer()
    with pytest.raises(ValueError, match="batch 1 was asked for where batch 0 comes next"):
        agent.batch(1)


def test_a_replay_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="hold 2 episodes, fewer than environments 3; raise it to 30"):
        explorer(replay_decisions=29)


@pytest.mark.parametrize("name", ["action_hold", "environments", "decisions_an_update", "minibatch"])
def test_bad_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        RNDConfig(**{**CONFIG, name: 0})
    with pytest.raises(ValueError, match="seed_decisions must not be negative"):
        RNDConfig(**{**CONFIG, "seed_decisions": -1})


def test_the_published_numbers_are_the_published_ones():
    """URLB's agent/rnd.yaml, agent/ddpg.py and pretrain.yaml; what we add to its novelty is off."""
    config = composed("rnd")
    assert (config.action_hold, config.environments, config.seed_decisions) == (1, 1, 4000)
    assert (config.decisions_an_update, config.minibatch, config.replay_decisions) == (2, 1024, 1_000_000)
    assert config.ddpg == DDPGConfig(1024, 1e-4, 0.99, 3, 0.01, 0.2, 0.3)
    assert config.novelty == NoveltyConfig(1024, 512, 1e-4, 5.0, "none", 0.0, 1.0, 1.0)


def test_the_small_preset_holds_actions_and_is_small():
    config = composed("rnd_small")
    assert config.action_hold == 4
    assert max(config.ddpg.hidden_width, config.novelty.hidden_width) <= 256


def composed(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_mapping(RNDConfig, resolve(compose("collect", overrides=[f"explorer={name}"]))["explorer"])
