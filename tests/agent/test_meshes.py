"""The same agent, data and seed on every mesh: the losses of training agree."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ring_rl.agent.chain_batch import BatchLayout, ChainSampler
from ring_rl.agent.hindsight import ChainConfig
from ring_rl.agent.loss import make_action_loss
from ring_rl.agent.model import make_model
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.input import InputConfig, RowStream
from ring_rl.training.mesh import MeshConfig, make_mesh
from ring_rl.training.optimizer import make_optimizer
from ring_rl.training.state import create_state
from ring_rl.training.step import make_train_step
from small_optimizer import adamw

STEPS = 20
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 4, 2), (1, 1, 1, 8), (1, 2, 2, 2), (2, 1, 1, 4)]
OPTIMIZER = adamw(learning_rate=3e-3, weight_decay=0.01, beta2=0.98, warmup_steps=2)


@pytest.fixture(scope="module")
def losses(chains):
    """(dp, fsdp, tp, sp), accumulation steps, variations of the model -> the losses of 20 steps."""

    @functools.cache
    def run(
        sizes: tuple[int, int, int, int],
        accumulation_steps: int = 1,
        token_layout="fused",
        action_head="squared_error",
        embedding_dropout=0.0,
    ) -> list[float]:
        config = chains.sequence_config(token_layout, action_head=action_head, embedding_dropout=embedding_dropout)
        transformer = dataclasses.replace(
            config.transformer, width=32, query_heads=4, key_value_heads=4, head_dim=8, feed_forward_width=64
        )
        config = dataclasses.replace(config, transformer=transformer)
        dp, fsdp, tp, sp = sizes
        mesh = make_mesh(MeshConfig(dp=dp, fsdp=fsdp, tp=tp, sp=sp))
        # Chains of 30 steps, padded to 32, which every ring here divides: all meshes get the same rows.
        sampler = ChainSampler(
            chains.episode_set(12),
            ChainConfig(
                trajectories=3,
                random_length=True,
                order="ascending",
                target="chain_maximum",
                sampling="ranked",
                rank_temperature=2.0,
                loss_on="all",
            ),
            BatchLayout(batch_size=8, ring_size=8, layout="zigzag", pad_to_ring=True),
            seed=0,
        )
        optimizer = make_optimizer(OPTIMIZER, total_steps=STEPS)
        graphdef, state = create_state(lambda rngs: make_model(config, rngs), optimizer, seed=0, mesh=mesh)
        loss_function = make_action_loss(SequenceParallel(mesh=mesh, layout="zigzag"))
        step = make_train_step(loss_function, graphdef, optimizer, mesh, seed=0, accumulation_steps=accumulation_steps)
        stream = RowStream(
            sampler,
            batch_size=8,
            steps=STEPS,
            mesh=mesh,
            layout="zigzag",
            ring_size=sp,
            config=InputConfig(threads=1, prefetch_batches=1),
        )
        curve = []
        for _ in range(STEPS):
            state, metrics = step(state, next(stream))
            curve.append(metrics["loss"])
        stream.close()
        return [float(loss) for loss in jax.device_get(curve)]

    return run


def test_one_device_learns(losses):
    curve = losses((1, 1, 1, 1))
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_agree_on_every_mesh(losses, sizes):
    np.testing.assert_allclose(losses(sizes), losses((1, 1, 1, 1)), rtol=1e-4)


def test_losses_agree_with_accumulation(losses):
    np.testing.assert_allclose(losses((1, 2, 2, 2), 4), losses((1, 1, 1, 1)), rtol=1e-4)


def test_losses_agree_on_a_ring_where_a_step_is_several_tokens(losses):
    """With a head that is a distribution, and with dropout: the same entries are dropped on every mesh."""
    variation = {
        "token_layout": "return_state_action_reward",
        "action_head": "mixture",
        "embedding_dropout": 0.1,
    }
    expected = losses((1, 1, 1, 1), **variation)
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses((2, 1, 1, 4), **variation), expected, rtol=1e-4)
