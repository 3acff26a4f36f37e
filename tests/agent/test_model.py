import dataclasses
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ring_rl.agent.chain_batch import ChainBatch, chain_arrays, empty_batch
from ring_rl.agent.loss import make_action_loss
from ring_rl.agent.model import BehaviourCloningConfig, check_token_layout, make_model
from ring_rl.agent.tokens import Normalisation, TokenLayout, dropout, fourier_features, tokens_per_step
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.mesh import MeshConfig, make_mesh

LAYOUTS = typing.get_args(TokenLayout)


def parallel(dp=1, sp=1):
    return SequenceParallel(mesh=make_mesh(MeshConfig(dp=dp, fsdp=1, tp=1, sp=sp)), layout="zigzag")


def one_chain(chains, config):
    generator = np.random.default_rng(0)
    parts = [chains.trajectory(generator, config.episode_steps) for _ in range(config.trajectories)]
    parts.sort(key=lambda each: each.episode_return)
    chain = chain_arrays(parts, steps=config.trajectories * config.episode_steps, loss_on="all", target="chain_maximum")
    return ChainBatch(*(x[None] for x in chain))


def actions_of(config, batch):
    model = make_model(config, nnx.Rngs(0))
    graphdef, parameters = nnx.split(model)
    whole = jax.jit(lambda parameters, batch: nnx.merge(graphdef, parameters)(batch, parallel()).mode())
    return model, partial(whole, jax.device_get(parameters))(batch)


# Every layout, every head and every clock, each at least once.
VARIATIONS = [
    {"token_layout": "fused", "action_head": "mixture"},
    {"token_layout": "return_state_action", "action_head": "gaussian", "time_embedding": "learned"},
    {"token_layout": "return_state_action_reward", "action_head": "discretised", "trajectory_embedding": False},
    {"token_layout": "return_state_action_reward_completion", "action_head": "squared_error"},
    {"token_layout": "fused", "time_embedding": "none", "previous_step_in_token": False},
]


@pytest.mark.parametrize("variation", VARIATIONS, ids=lambda variation: "-".join(map(str, variation.values())))
def test_acting_step_by_step_equals_the_whole_chain(chains, variation):
    config = chains.sequence_config(**variation)
    batch = one_chain(chains, config)
    model, expected = actions_of(config, batch)
    act, observe = (
        nnx.jit(lambda m, memory, now: m.act(memory, now)),
        nnx.jit(lambda m, memory, now: m.observe(memory, now)),
    )
    memory = model.begin(batch=1)
    for t in range(batch.steps.shape[1]):
        now = ChainBatch(*(x[:, t : t + 1] for x in batch))
        action, memory = act(model, memory, now)
        np.testing.assert_allclose(action, expected[:, t], atol=1e-5, err_msg=f"step {t}")
        if t == 4:
            # An outcome and the step after it at once: the same.
            after = ChainBatch(*(x[:, t + 1 : t + 2] for x in batch))
            both, _ = nnx.jit(lambda model, *args: model.observe_and_act(*args))(model, memory, now, after)
            np.testing.assert_allclose(both, expected[:, t + 1], atol=1e-5)
        memory = observe(model, memory, now)
    assert int(memory.length) == memory.capacity


@pytest.mark.parametrize("token_layout", LAYOUTS)
def test_an_action_depends_on_nothing_after_it(chains, token_layout):
    config = chains.sequence_config(token_layout)
    batch, t = one_chain(chains, config), 17
    model, _ = actions_of(config, batch)
    inputs = batch._replace(**{
        name: jnp.asarray(getattr(batch, name))
        for name in ("observations", "actions", "rewards", "returns_to_go", "completions", "previous_actions")
    })  # fmt: skip

    def one_action(real):
        return jnp.sum(model(inputs._replace(**real), parallel()).mode()[0, t])

    names = ("observations", "actions", "rewards", "returns_to_go", "completions", "previous_actions")
    gradients = jax.jit(jax.grad(one_action))({name: getattr(inputs, name) for name in names})
    reach = {name: np.flatnonzero(np.abs(g[0].reshape(30, -1)).max(axis=1)) for name, g in gradients.items()}
    assert reach["observations"].tolist() == list(range(t + 1))
    assert reach["returns_to_go"].tolist() == list(range(t + 1))
    if token_layout == "fused":
        assert reach["previous_actions"].max() == t
        assert len(reach["actions"]) == 0
    else:
        # The action of step t is what is predicted: it must not be seen.
        assert reach["actions"].tolist() == list(range(t))
        assert reach["rewards"].tolist() == (list(range(t)) if "reward" in token_layout else [])
    if "completion" in token_layout:
        assert reach["completions"].tolist() == list(range(t))


def test_clocks_say_what_they_are_asked_to(chains):
    """With observations and returns that never change, only clocks tell tokens apart; a transformer of one window
    sees nothing but its own token."""
    empty = empty_batch(batch_size=1, steps=20, observation_dim=3, action_dim=2)
    batch = empty._replace(
        steps=np.tile(np.arange(10, dtype=np.int32), 2)[None],
        trajectory_indices=np.repeat(np.arange(2, dtype=np.int32), 10)[None],
        positions=np.arange(20, dtype=np.int32)[None],
    )

    def distinct(**clocks):
        config = chains.sequence_config(**clocks)
        config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, attention_window=1))
        return len(np.unique(np.round(actions_of(config, batch)[1][0], 5), axis=0))

    assert distinct() == 20
    assert distinct(trajectory_embedding=False) == 10
    assert distinct(time_embedding="learned", trajectory_embedding=False) == 10
    assert distinct(time_embedding="none") == 2
    assert distinct(time_embedding="none", trajectory_embedding=False) == 1


def test_dropout_drops_its_share_at_the_same_places_on_every_mesh(chains):
    tokens = jnp.ones((3, 40, 16))
    positions = jnp.tile(jnp.arange(40), (3, 1))
    dropped = dropout(tokens, positions, rate=0.25, key=jax.random.key(0))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / dropped.size)
    assert len(np.unique(dropped.reshape(-1, 16), axis=0)) > 110  # of 120: tokens and rows differ
    order = np.random.default_rng(0).permutation(40)
    again = dropout(tokens, positions[:, order], rate=0.25, key=jax.random.key(0))
    np.testing.assert_array_equal(again, dropped[:, order])


def test_dropout_is_for_training_alone(chains):
    config = chains.sequence_config(embedding_dropout=0.5)
    batch = one_chain(chains, config)
    model, without = actions_of(config, batch)
    loss = make_action_loss(parallel())
    total = nnx.jit(lambda model, key: loss(model, batch, key).total)
    errors = [float(total(model, jax.random.key(seed))) for seed in (0, 0, 1)]
    assert errors[0] == errors[1] != errors[2]
    # `without` has no key and so drops nothing: it is what the same parameters say without dropout.
    dry = make_model(dataclasses.replace(config, embedding_dropout=0.0), nnx.Rngs(0))
    np.testing.assert_allclose(nnx.jit(lambda model: model(batch, parallel()).mode())(dry), without, atol=1e-6)


def behaviour_cloning_config(chains, action_head="squared_error"):
    return BehaviourCloningConfig(
        name="behaviour_cloning",
        hidden_widths=(8,),
        action_head=chains.action_heads[action_head],
        observation_dim=3,
        action_dim=2,
        normalisation=chains.sequence_config().normalisation,
    )


@pytest.mark.parametrize("head", ["squared_error", "gaussian", "mixture", "discretised"])
def test_the_error_of_an_action_is_reported_whatever_the_head(chains, head):
    batch = one_chain(chains, chains.sequence_config())
    batch.loss_weights[:, :20] = 0
    model, actions = actions_of(behaviour_cloning_config(chains, head), batch)
    result = make_action_loss(parallel())(model, batch, jax.random.key(0))
    expected = np.square(np.asarray(actions) - batch.actions)[0, 20:].mean()
    total, weight = result.metrics["action_error"]
    assert float(total / weight) == pytest.approx(expected, rel=1e-5)
    assert (float(result.total) == pytest.approx(float(total), rel=1e-6)) == (head == "squared_error")
    assert float(result.weight) == 10


def test_tokens_per_step_are_those_of_the_paper():
    assert [tokens_per_step(layout) for layout in LAYOUTS] == [3, 4, 5, 1]


def test_fourier_features_by_hand():
    got = fourier_features(jnp.array([0.5]), octaves=2)
    np.testing.assert_allclose(got, [[0.5, 1.0, 0.0, 0.0, -1.0]], atol=1e-6)


def test_normalisation_must_make_sense():
    with pytest.raises(ValueError, match="observation_mean has 1 entries, observation_scale 2"):
        Normalisation(observation_mean=(0.0,), observation_scale=(1.0, 1.0), return_scale=1.0)
    with pytest.raises(ValueError, match="are all returns of the data zero"):
        Normalisation(observation_mean=(), observation_scale=(), return_scale=0.0)


@pytest.mark.parametrize("token_layout", LAYOUTS)
def test_stripes_of_steps_are_refused_where_a_step_is_several_tokens(chains, token_layout):
    """Attention would take a device's tokens for every n-th one of the chain, and they are every n-th step."""
    config = chains.sequence_config(token_layout)
    striped = SequenceParallel(mesh=make_mesh(MeshConfig(dp=1, fsdp=1, tp=1, sp=2)), layout="striped")
    if token_layout == "fused":
        check_token_layout(token_layout, striped)
        return
    with pytest.raises(ValueError, match=f"token_layout={token_layout} makes . of a step; use layout=zigzag"):
        make_model(config, nnx.Rngs(0))(one_chain(chains, config), striped)


def test_padding_does_not_enter_the_loss(chains):
    config = chains.sequence_config()
    batch = one_chain(chains, config)
    model = make_model(config, nnx.Rngs(0))
    loss = nnx.jit(make_action_loss(parallel()))
    short = loss(model, batch, jax.random.key(0))
    padded = ChainBatch(*(np.pad(x, [(0, 0), (0, 6)] + [(0, 0)] * (x.ndim - 2), constant_values=3) for x in batch))
    padded.loss_weights[:, 30:] = 0
    trajectory_indices = np.minimum(padded.trajectory_indices, 2)
    long = loss(model, padded._replace(trajectory_indices=trajectory_indices), jax.random.key(0))
    np.testing.assert_allclose(long.total, short.total, rtol=1e-5)
    assert float(long.weight) == float(short.weight) == 30


def test_behaviour_cloning_sees_only_the_present(chains):
    config = behaviour_cloning_config(chains)
    batch = one_chain(chains, chains.sequence_config())
    model, expected = actions_of(config, batch)
    changed = batch._replace(returns_to_go=batch.returns_to_go + 7, actions=-batch.actions)
    np.testing.assert_array_equal(actions_of(config, changed)[1], expected)
    now = ChainBatch(*(x[:, 4:5] for x in batch))
    np.testing.assert_allclose(model.act(model.begin(batch=1), now)[0], expected[:, 4], atol=1e-6)
