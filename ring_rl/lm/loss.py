"""The loss of a language model: what its targets cost, and how many of them it gets right."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ring_rl.lm.model import LanguageModel
from ring_rl.lm.token_batch import TokenBatch
from ring_rl.nn.parallel import SequenceParallel
from ring_rl.training.step import Loss, LossFunction
from ring_rl.typing import Array, Bool, Float, Float32, Int, PRNGKeyArray


def make_language_loss(parallel: SequenceParallel, *, chunks: int, z_loss: float) -> LossFunction:
    """Σ w (-log p(target) + z_loss log_sum_exp²) over the tokens of a batch, and Σ w.

    The head sees T / chunks of a device's tokens at a time. Reported beside the loss:

        token_accuracy    Σ w [target is the most likely token] / Σ w
        answer_accuracy   share of answers all of whose targets are; only where the batch has `answer_ids`
    """

    def language_loss(model: LanguageModel, batch: TokenBatch, key: PRNGKeyArray, /) -> Loss:
        del key
        hidden = model.hidden(batch.tokens, batch.positions, parallel, segment_ids=batch.segment_ids)
        sums, hits = model.vocabulary.cross_entropy_and_hits(
            hidden, batch.targets, parallel, chunks=chunks, weights=batch.weights, z_loss=z_loss
        )
        metrics = {"token_accuracy": (sums.correct_sum, sums.weight_sum)}
        if batch.answer_ids is not None:
            metrics["answer_accuracy"] = answers_right(hits, batch.weights, batch.answer_ids, parallel)
        return Loss(total=sums.loss_sum, weight=sums.weight_sum, metrics=metrics)

    return language_loss


def answers_right(
    hits: Bool[Array, "B T"],
    weights: Float[Array, "B T"],
    answer_ids: Int[Array, "B T"],
    parallel: SequenceParallel,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """How many answers of the batch are right in all their targets of positive weight, and how many answers it has.

    O(B T) memory on each of the devices that share a sequence, of a few bytes a token.
    """
    local, longest = parallel.local(), answer_ids.shape[1]

    def count(hits: Array, weights: Array, answer_ids: Array) -> tuple[Array, Array]:
        # One place beyond the last for all targets that answer nothing.
        asked = (weights > 0) & (answer_ids >= 0)
        place = jnp.where(asked, answer_ids, longest)
        row = lax.broadcasted_iota(jnp.int32, place.shape, 0)

        def anywhere(flags: Array) -> Array:
            here = jnp.zeros((len(place), longest + 1), jnp.int32).at[row, place].max(flags.astype(jnp.int32))
            return (lax.pmax(here, local.sequence_axes) if local.sequence_axes else here)[:, :longest] > 0

        seen, missed = anywhere(asked), anywhere(asked & ~hits)
        counted = jnp.sum(seen & ~missed, dtype=jnp.float32), jnp.sum(seen, dtype=jnp.float32)
        return lax.psum(counted, local.batch_axes) if local.batch_axes else counted

    tokens = local.token_spec
    return jax.shard_map(
        count, mesh=local.mesh, in_specs=(tokens, tokens, tokens), out_specs=(PartitionSpec(), PartitionSpec())
    )(hits, weights, answer_ids)
