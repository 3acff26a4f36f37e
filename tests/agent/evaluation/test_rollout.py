import typing

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("dm_control", reason="rollouts need the simulator")

from ring_rl.agent.chain_batch import ChainBatch, chain_arrays
from ring_rl.agent.environments.environment import make_vector_environment
from ring_rl.agent.evaluation.policy import ModelPolicy, UniformPolicy, compiled_steps
from ring_rl.agent.evaluation.rollout import reset_seeds, roll_out
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
    steps = EPISODES * (1000 // REPEAT)
    rows = [chain_arrays(row, steps=steps, loss_on="all", target=TARGET) for row in rollouts.trajectories]
    batch = ChainBatch(*(np.stack(columns) for columns in zip(*rows, strict=True)))
    parallel = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=1)), layout="contiguous")
    model = nnx.merge(nnx.split(make_model(config, nnx.Rngs(0)))[0], parameters)
    expected = jax.jit(lambda batch: model(batch, parallel))(batch)
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
    steps = compiled_steps(config)
    assert (steps.act._cache_size(), steps.observe_and_act._cache_size()) == (1, 1)
