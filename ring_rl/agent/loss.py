"""The imitation loss."""

from collections.abc import Callable

import jax.numpy as jnp

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.model import ImitationModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.step import Loss
from ring_rl.typing import Array, PRNGKeyArray


def make_action_loss(parallel: SequenceParallel) -> Callable[[ImitationModel, ChainBatch, PRNGKeyArray], Loss]:
    """Σ w |a - â|² / A over the steps of a batch, and Σ w.

    The weights say which steps count: padding has 0, and with the loss on the best trajectory only so has
    every other one. The action vector's entries are averaged, so that tasks with many actuators compare.
    """

    def action_loss(model: ImitationModel, batch: ChainBatch, key: PRNGKeyArray) -> Loss:
        del key
        error_BTA: Array = model(batch, parallel) - batch.actions
        total = jnp.sum(batch.loss_weights * jnp.mean(jnp.square(error_BTA), axis=-1))
        return Loss(total=total, weight=jnp.sum(batch.loss_weights), metrics={})

    return action_loss
