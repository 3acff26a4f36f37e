import jax
import numpy as np
import pytest
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch, empty_batch
from ring_rl.agent.evaluation import policy as policy_module
from ring_rl.agent.evaluation.policy import ModelPolicy
from ring_rl.agent.model import BehaviourCloningConfig, make_model


@pytest.fixture(params=["gaussian", "mixture", "discretised"])
def model(request, chains):
    config = BehaviourCloningConfig(
        name="behaviour_cloning",
        hidden_widths=(8,),
        action_head=chains.action_heads[request.param],
        observation_dim=3,
        action_dim=2,
        normalisation=chains.sequence_config().normalisation,
    )
    return config, nnx.split(make_model(config, nnx.Rngs(0)))[1]


def actions_of(model, *, rows, decisions=4, **options):
    """The actions [rows, decisions] of a policy at rows whose observations are all the same."""
    policy = ModelPolicy(*model, **options)
    now = ChainBatch(*empty_batch(batch_size=rows, steps=1, observation_dim=3, action_dim=2))
    actions = []
    for decision in range(decisions):
        if decision in (0, 2):  # two episodes
            policy.begin(rows)
        actions.append(policy.act(now))
        policy.observe(now)
    return np.stack(actions, axis=1)


def test_draws_differ_by_row_and_decision_and_repeat_by_seed(model):
    actions = actions_of(model, rows=20, decisions=4, action_selection="sample", seed=3)
    assert len(np.unique(actions.reshape(-1, 2), axis=0)) > 8  # 25 pairs of values are all that the bins have
    assert (np.abs(actions) <= 1).all()
    assert not (actions[:, :2] == actions[:, 2:]).all()  # nor does an episode begin with the draws of the last one
    np.testing.assert_array_equal(actions, actions_of(model, rows=20, action_selection="sample", seed=3))
    assert not np.array_equal(actions, actions_of(model, rows=20, action_selection="sample", seed=4))


def test_a_rows_draws_do_not_depend_on_how_many_rows_there_are(model):
    many, few = (actions_of(model, rows=rows, action_selection="sample", seed=3) for rows in (20, 5))
    np.testing.assert_allclose(many[:5], few, atol=1e-6)


def test_modes_are_the_models_own_and_no_chance_is_in_them(model):
    actions = actions_of(model, rows=3, seed=3)
    np.testing.assert_array_equal(actions, actions_of(model, rows=3, seed=4))
    _, parameters = model
    graphdef = nnx.split(make_model(model[0], nnx.Rngs(0)))[0]
    expected, _ = nnx.merge(graphdef, parameters).act(
        (), empty_batch(batch_size=1, steps=1, observation_dim=3, action_dim=2)
    )
    np.testing.assert_allclose(actions, np.broadcast_to(jax.device_get(expected), actions.shape), atol=1e-6)


def test_another_selection_is_refused(model):
    with pytest.raises(ValueError, match="action_selection must be mode or sample, got 'greedy'"):
        ModelPolicy(*model, action_selection="greedy")


def test_a_memory_that_grows_acts_as_one_with_room_from_the_start(chains, monkeypatch):
    """From 12 slots to the whole context, in which the last decision has just its place."""
    config = chains.sequence_config("return_state_action_reward", trajectories=2, episode_steps=6)
    parameters = nnx.split(make_model(config, nnx.Rngs(0)))[1]
    columns = empty_batch(batch_size=2, steps=12, observation_dim=3, action_dim=2)
    observations = np.random.default_rng(0).normal(size=(2, 12, 3)).astype(np.float32)
    steps = ChainBatch(*columns)._replace(observations=observations)

    def actions(first_slots):
        monkeypatch.setattr(policy_module, "FIRST_SLOTS", first_slots)
        policy_module.compiled_steps.cache_clear()
        policy, taken, capacities = ModelPolicy(config, parameters), [], []
        for _ in range(2):  # a second context starts small again
            policy.begin(2)
            for step in range(12):
                now = ChainBatch(*(column[:, step : step + 1] for column in steps))
                taken.append(policy.act(now))
                policy.observe(now._replace(actions=taken[-1][:, None]))
                capacities.append(policy._memory.capacity)
        policy_module.compiled_steps.cache_clear()
        return np.stack(taken), capacities

    (grown, capacities), (whole, one_capacity) = actions(12), actions(1024)
    assert set(one_capacity) == {48}
    assert capacities == 2 * ([12] * 3 + [24] * 3 + [48] * 6)
    np.testing.assert_allclose(grown, whole, atol=1e-6)
