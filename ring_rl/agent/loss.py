"""The imitation loss."""

from collections.abc import Callable

import jax.numpy as jnp

from ring_rl.agent.chain_batch import ChainBatch
from ring_rl.agent.model import ImitationModel
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.step import Loss
from ring_rl.typing import PRNGKeyArray


def make_action_loss(parallel: SequenceParallel) -> Callable[[ImitationModel, ChainBatch, PRNGKeyArray], Loss]:
    """Σ w loss(a) over the steps of a batch, and Σ w; the loss is that of the model's action head.

    The weights say which steps count: padding has 0, and with the loss on the last trajectory only so has
    every other one. Losses of different heads do not compare; `action_error` = |a - mode|² / A, reported beside,
    does, and says little where the data answer one state with several actions.
    """

    def action_loss(model: ImitationModel, batch: ChainBatch, key: PRNGKeyArray) -> Loss:
        distribution = model(batch, parallel, dropout_key=key)
        weight = jnp.sum(batch.loss_weights)
        error_BT = jnp.mean(jnp.square(distribution.mode() - batch.actions), axis=-1)
        return Loss(
            total=jnp.sum(batch.loss_weights * distribution.loss(batch.actions)),
            weight=weight,
            metrics={"action_error": (jnp.sum(batch.loss_weights * error_BT), weight)},
        )

    return action_loss
