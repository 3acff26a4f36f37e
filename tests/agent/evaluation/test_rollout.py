import types
import typing

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("dm_control", reason="rollouts need the simulator")

from ring_rl.agent.chain_batch import ChainBatch, chain_arrays
from ring_rl.agent.environments.environment import make_vector_environment
from ring_rl.agent.evaluation import policy
from ring_rl.agent.evaluation.policy import ModelPolicy, UniformPolicy, compiled_steps
from ring_rl.agent.evaluation.rollout import Rollouts, reset_seeds, roll_out
from ring_rl.agent.model import make_model
from ring_rl.agent.tokens import Normalisation, TokenLayout
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.simulator

ROWS, EPISODES, REPEAT = 3, 2, 20
TARGET = 4.0  # low enough that some episodes reach it, so that completion tokens differ


def config_and_parameters(chains, token_layout="fused", trajectories=EPISODES):
    import dataclasses

    config = dataclasses.replace(
        chains.sequence_config(token_layout, trajectories=trajectories, episode_steps=1000 // REPEAT),
        observation_dim=5,
        action_dim=1,
        normalisation=Normalisation(observation_mean=(0.0,) * 5, observation_scale=(1.0,) * 5, return_scale=100.0),
    )
    return config, nnx.split(make_model(config, nnx.Rngs(0)))[1]


@pytest.fixture
def environments():
    made = make_vector_environment("cartpole_swingup", count=ROWS, action_repeat=REPEAT)
    yield made
    made.close()


@pytest.mark.parametrize("token_layout", typing.get_args(TokenLayout))
def test_cached_rollouts_act_as_the_full_forward_pass_would(chains, environments, token_layout):
    """At every step of every episode, in every row, in the real simulator."""
    config, parameters = config_and_parameters(chains, token_layout)
    rollouts = roll_out(
        ModelPolicy(config, parameters),
        environments,
        seeds=reset_seeds(rows=ROWS, episodes=EPISODES, seed=0),
        target_return=TARGET,
    )
    assert (rollouts.returns >= TARGET).any()
    batch, expected = full_forward_pass(config, parameters, rollouts, steps=EPISODES * (1000 // REPEAT))
    np.testing.assert_allclose(batch.actions, expected, atol=2e-5)


class RaggedRows:
    """Made-up rows whose episodes end apart; a row that has ended must be left alone until it is reset."""

    def __init__(self, lengths):
        self.lengths, self.num_envs = np.array(lengths), len(lengths)  # [rows, episodes]
        self.single_action_space = types.SimpleNamespace(shape=(1,))
        self.generator = np.random.default_rng(0)
        self.episode, self.step_in_episode = np.full(self.num_envs, -1), np.zeros(self.num_envs, int)
        self.resets, self.observations = [], np.zeros((self.num_envs, 5), np.float32)

    def reset(self, *, seed, options=None):
        mask = np.ones(self.num_envs, bool) if options is None else options["reset_mask"]
        assert all(self.episode[row] < 0 or self.has_ended[row] for row in np.flatnonzero(mask))
        self.episode[mask] += 1
        self.step_in_episode[mask] = 0
        self.resets += [(int(row), seed[row]) for row in np.flatnonzero(mask)]
        return self._observe(mask), {}

    @property
    def has_ended(self):
        return self.step_in_episode >= self.lengths[np.arange(self.num_envs), self.episode]

    def step(self, actions):
        assert actions.shape == (self.num_envs, 1)
        playing = ~self.has_ended
        self.step_in_episode += playing
        terminated = self.has_ended & (self.episode % 2 == 0)
        rewards = np.where(playing, 0.5, 0.0)
        return self._observe(playing), rewards, terminated, self.has_ended & ~terminated, {"discount": 1.0 - terminated}

    def _observe(self, rows):
        self.observations = np.where(rows[:, None], self.generator.normal(size=(self.num_envs, 5)), self.observations)
        return self.observations.astype(np.float32)


def full_forward_pass(config, parameters, rollouts, steps):
    rows = [chain_arrays(row, steps=steps, loss_on="all", target=TARGET) for row in rollouts.trajectories]
    batch = ChainBatch(*(np.stack(columns) for columns in zip(*rows, strict=True)))
    parallel = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)), layout="contiguous")
    model = nnx.merge(nnx.split(make_model(config, nnx.Rngs(0)))[0], parameters)
    return batch, jax.jit(lambda batch: model(batch, parallel).mode())(batch)


@pytest.mark.parametrize("token_layout", ["fused", "return_state_action_reward_completion"])
def test_rows_whose_episodes_end_apart_act_as_the_full_forward_pass_would(chains, token_layout):
    """Attempts follow each other without a gap in every row's memory, however long the other rows' last."""
    lengths = [[3, 9, 5], [10, 2, 1], [4, 4, 10]]
    config, parameters = config_and_parameters(chains, token_layout, trajectories=3)
    environments, ended = RaggedRows(lengths), []
    seeds = reset_seeds(rows=3, episodes=3, seed=0)
    rollouts = roll_out(
        ModelPolicy(config, parameters), environments, seeds=seeds, target_return=TARGET, on_episode=ended.append
    )
    assert [[each.length for each in row] for row in rollouts.trajectories] == lengths
    assert sorted(environments.resets) == sorted((row, seeds[row, e]) for row in range(3) for e in range(3))
    assert ended == [0, 1, 2]
    np.testing.assert_allclose(rollouts.returns, np.array(lengths) * 0.5)
    assert [each.discounts[-1] for each in rollouts.trajectories[0]] == [0, 1, 0]
    batch, expected = full_forward_pass(config, parameters, rollouts, steps=18)
    for row in range(3):
        steps = sum(lengths[row])
        np.testing.assert_allclose(batch.actions[row, :steps], expected[row, :steps], atol=2e-5)


def test_rows_whose_episodes_end_apart_wait_for_each_other_where_the_context_is_cleared(chains):
    lengths = [[3, 9, 5], [10, 2, 1], [4, 4, 10]]
    config, parameters = config_and_parameters(chains, trajectories=3)
    rollouts = roll_out(
        ModelPolicy(config, parameters),
        RaggedRows(lengths),
        seeds=reset_seeds(rows=3, episodes=3, seed=0),
        target_return=TARGET,
        carry_context=False,
    )
    assert [[each.length for each in row] for row in rollouts.trajectories] == lengths
    for row in range(3):
        for episode in range(3):
            alone = Rollouts((rollouts.trajectories[row][episode : episode + 1],))
            batch, expected = full_forward_pass(config, parameters, alone, steps=lengths[row][episode])
            np.testing.assert_allclose(batch.actions, expected, atol=2e-5)


def test_the_same_seed_gives_the_same_episodes_and_another_seed_others(chains, environments):
    config, parameters = config_and_parameters(chains)

    def returns(seed):
        seeds = reset_seeds(rows=ROWS, episodes=EPISODES, seed=seed)
        return roll_out(ModelPolicy(config, parameters), environments, seeds=seeds, target_return=TARGET).returns

    np.testing.assert_array_equal(returns(0), returns(0))
    assert not np.allclose(returns(0), returns(1))


def test_context_is_carried_over_unless_cleared(chains, environments):
    config, parameters = config_and_parameters(chains)
    seeds = np.full((ROWS, EPISODES), 7)

    def actions(carry_context):
        rollouts = roll_out(
            ModelPolicy(config, parameters),
            environments,
            seeds=seeds,
            target_return=TARGET,
            carry_context=carry_context,
        )
        return [episode.actions for episode in rollouts.trajectories[0]]

    carried, cleared = actions(True), actions(False)
    np.testing.assert_array_equal(carried[0], cleared[0])
    assert not np.allclose(carried[0], carried[1])
    # The same start and nothing remembered: the same episode again.
    np.testing.assert_array_equal(cleared[0], cleared[1])


def test_a_full_context_is_emptied(chains, environments):
    """A chain of one trajectory is a Decision Transformer: every episode starts anew."""
    config, parameters = config_and_parameters(chains, trajectories=1)
    seeds = np.full((ROWS, 3), 7)
    rollouts = roll_out(ModelPolicy(config, parameters), environments, seeds=seeds, target_return=TARGET)
    np.testing.assert_array_equal(rollouts.returns[:, 0], rollouts.returns[:, 1])


def test_every_episode_has_a_state_of_its_own():
    """Rows that shared initial states would not be independent samples, and intervals over them too narrow."""
    seeds = reset_seeds(rows=5, episodes=4, seed=3)
    assert len(set(seeds.flat)) == 20
    assert not set(seeds.flat) & set(reset_seeds(rows=5, episodes=4, seed=4).flat)


def test_more_episodes_than_a_context_holds_are_refused(chains, environments):
    config, parameters = config_and_parameters(chains)
    with pytest.raises(ValueError, match="3 episodes do not fit into one context of 2"):
        roll_out(ModelPolicy(config, parameters), environments, seeds=np.zeros((ROWS, 3), int), target_return=1.0)


def test_a_full_context_may_begin_anew(chains, environments):
    config, parameters = config_and_parameters(chains)
    seeds = np.tile([7, 8], (ROWS, 2))
    rollouts = roll_out(
        ModelPolicy(config, parameters), environments, seeds=seeds, target_return=TARGET, begin_anew=True
    )
    # Contexts hold 2 episodes: the third and fourth are the first two again.
    np.testing.assert_array_equal(rollouts.returns[:, :2], rollouts.returns[:, 2:])


def test_random_rows_differ_and_repeat():
    policy, again = (UniformPolicy(action_dim=2, seed=0) for _ in range(2))
    for each in (policy, again):
        each.begin(3)
    actions = policy.act(None)
    np.testing.assert_array_equal(actions, again.act(None))
    assert len(np.unique(actions)) == 6
    policy.begin(3)
    assert not np.array_equal(policy.act(None), actions)


def test_rows_must_match(chains, environments):
    config, parameters = config_and_parameters(chains)
    with pytest.raises(ValueError, match="2 rows of seeds for 3 environments"):
        roll_out(ModelPolicy(config, parameters), environments, seeds=np.zeros((2, 1), int), target_return=1.0)


def test_training_seeds_of_one_agent_are_compiled_once(chains, environments):
    """Each acts with its own parameters all the same."""
    config, parameters = config_and_parameters(chains)
    others = nnx.split(make_model(config, nnx.Rngs(1)))[1]
    compiled_steps.cache_clear()
    seeds = reset_seeds(rows=ROWS, episodes=1, seed=0)
    first, second = (
        roll_out(ModelPolicy(config, each), environments, seeds=seeds, target_return=TARGET).trajectories[0][0]
        for each in (parameters, others)
    )
    assert not np.allclose(first.actions, second.actions)
    steps = compiled_steps(config, None)
    assert (steps.act._cache_size(), steps.observe_and_act._cache_size()) == (1, 1)


@pytest.mark.parametrize("token_layout", ["fused", "return_state_action_reward"])
def test_a_memory_shared_by_8_devices_acts_as_one_on_a_single_device(chains, environments, monkeypatch, token_layout):
    """It grows on the way, and every device holds a part of it."""
    monkeypatch.setattr(policy, "FIRST_SLOTS", 32)
    monkeypatch.setattr(policy, "DEFAULT_SLOT_BLOCK", 4)
    compiled_steps.cache_clear()
    config, parameters = config_and_parameters(chains, token_layout)
    parallel = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=8)), layout="contiguous")
    shared = ModelPolicy(config, parameters, parallel=parallel)
    seeds = reset_seeds(rows=ROWS, episodes=EPISODES, seed=0)
    alone, together = (
        roll_out(each, environments, seeds=seeds, target_return=TARGET)
        for each in (ModelPolicy(config, parameters), shared)
    )
    for row, other in zip(alone.trajectories, together.trajectories, strict=True):
        for episode, same in zip(row, other, strict=True):
            np.testing.assert_allclose(same.actions, episode.actions, atol=1e-5)
    keys = shared._memory.layers[0].k
    assert len(keys.sharding.device_set) == 8
    assert all(np.abs(shard.data).max() > 0 for shard in keys.addressable_shards)
    assert keys.addressable_shards[0].data.shape[2] * 8 == keys.shape[2] >= EPISODES * (1000 // REPEAT)
    compiled_steps.cache_clear()
