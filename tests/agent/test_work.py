import jax
import pytest
from flax import nnx

from ring_rl.agent.model import BehaviourCloningConfig, make_model
from ring_rl.agent.tokens import Normalisation
from ring_rl.agent.work import model_flops, tokens_per_chain


def parameters_of(config):
    return nnx.state(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize(("token_layout", "tokens"), [("fused", 30), ("return_state_action_reward", 120)])
def test_flops_of_a_sequence_model_by_hand(chains, token_layout, tokens):
    config = chains.sequence_config(token_layout)
    parameters = parameters_of(config)
    assert tokens_per_chain(config, steps=30) == tokens
    # Every kernel, counted from the leaves themselves.
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    kernels = sum(leaf.size for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path))
    attention = 12 * config.transformer.layers * 4 * 4 * tokens * (tokens + 1) // 2
    got = model_flops(config, parameters, batch_size=8, steps=30)
    assert got == 8 * (6 * kernels * tokens + attention)


def test_flops_of_a_policy_without_context_by_hand(chains):
    config = BehaviourCloningConfig(
        name="behaviour_cloning",
        hidden_widths=(5,),
        action_head=chains.action_heads["squared_error"],
        observation_dim=3,
        action_dim=2,
        normalisation=Normalisation(observation_mean=(0.0,) * 3, observation_scale=(1.0,) * 3, return_scale=1.0),
    )
    assert tokens_per_chain(config, steps=30) == 30
    assert model_flops(config, parameters_of(config), batch_size=8, steps=30) == 6 * (3 * 5 + 5 * 2) * 8 * 30
